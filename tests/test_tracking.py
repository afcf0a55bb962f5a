"""Trackers get what the tables get; nothing happens unless they are asked for."""

import accelerate.tracking
import pytest

from marlhf.config import ConfigError
from marlhf.runs import Run

IDENTITY = {"stage": "toy", "config": {"ppo": {"lr": 0.1}, "name": "x"}, "seed": 0}
ROWS = [{"update": 1, "kl": 0.5, "flag": True, "text": "no", "none": None}, {"update": 2, "kl": 1}]


class Recorder:
    made = []  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.rows, self.done = args, kwargs, [], False
        self.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.done = True


@pytest.fixture(autouse=True)
def recorders(monkeypatch):
    Recorder.made.clear()
    kinds = dict.fromkeys(("tensorboard", "wandb"), Recorder)
    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", kinds)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def compute(root):
    with Run.open("toy", "run", IDENTITY, root) as run:
        for row in ROWS:
            run.log("metrics", row)
        run.log("samples", {"update": 1, "length": 3})
        run.finish({})
    return run


def test_both_trackers_get_the_numbers_of_each_row(monkeypatch, tmp_path):
    monkeypatch.setenv("MARLHF_TRACKERS", "tensorboard,wandb")
    run = compute(tmp_path)
    board, wandb = Recorder.made
    assert board.args == (run.path.name, str(tmp_path / "trackers"))
    assert wandb.kwargs == {"name": run.path.name, "dir": str(tmp_path / "trackers")}
    for tracker in (board, wandb):
        assert tracker.config == {"ppo.lr": 0.1, "name": "x"} and tracker.done
        assert tracker.rows == [
            (1, {"metrics/update": 1, "metrics/kl": 0.5}),
            (2, {"metrics/update": 2, "metrics/kl": 1}),
        ]
    import os

    assert os.environ["WANDB_MODE"] == "offline"
    assert len(run.frame("metrics")) == 2


def test_none_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("MARLHF_TRACKERS", raising=False)
    compute(tmp_path)
    assert not Recorder.made and not (tmp_path / "trackers").exists()


def test_wrong_names_and_missing_libraries_are_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("MARLHF_TRACKERS", "tensorbord")
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'. Did you mean tensorboard"):
        compute(tmp_path)

    def missing(self):
        raise ImportError("No module named 'tensorboard'")

    monkeypatch.setattr(Recorder, "start", missing)
    monkeypatch.setenv("MARLHF_TRACKERS", "tensorboard")
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        compute(tmp_path)
