"""A run's metrics in TensorBoard or Weights & Biases as well, by accelerate's trackers.

$MARLHF_TRACKERS names them, with commas: tensorboard, wandb. They get every row of the tables
"metrics" and "evals"; the run's own files stay what results are read from. Weights & Biases works
offline unless $WANDB_MODE says another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from marlhf.config import ConfigError, nearest

VARIABLE = "MARLHF_TRACKERS"
NAMES = ("tensorboard", "wandb")
TABLES = ("metrics", "evals")


def start_trackers(name: str, folder: Path, config: dict[str, Any]) -> list:
    """accelerate's trackers that $MARLHF_TRACKERS asks for; their files go under `folder`.

    Raises ConfigError for a name that is unknown, or whose library is not installed.
    """
    started = []
    for each in filter(None, os.environ.get(VARIABLE, "").split(",")):
        if each not in NAMES:
            raise ConfigError(f"{VARIABLE}: no tracker {each!r}.{nearest(each, NAMES)}")
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[each]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if each == "wandb":
                os.environ.setdefault("WANDB_MODE", "offline")
                tracker = kind("marlhf", name=name, dir=str(folder))
            else:
                tracker = kind(name, str(folder))
            tracker.start()
        except ImportError as error:
            raise ConfigError(f"{VARIABLE}: pip install {each} ({error})") from None
        tracker.store_init_configuration(_flat(config))
        started.append(tracker)
    return started


def track(trackers: list, table: str, row: dict[str, Any]) -> None:
    """The row's numbers as <table>/<name>, at its update or step."""
    if table in TABLES:
        step = row.get("update", row.get("step"))
        values = {f"{table}/{name}": value for name, value in row.items() if _number(value)}
        for tracker in trackers:
            tracker.log(values, step=step)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str)) else str(value)
    return flat
