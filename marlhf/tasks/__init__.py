"""Tasks by name: one module each, holding `task`, an instance of `marlhf.tasks.base.Task`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

from marlhf.text import DataError

if TYPE_CHECKING:
    from marlhf.tasks.base import Task


def task_names() -> list[str]:
    """Names of the tasks: the modules of this folder, `base` and the twins aside."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name != "base" and not name.endswith("_twin"))


def get_task(name: str) -> Task:
    """The task of that name; imports its module only. Raises DataError with the nearest name."""
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown task {name!r}: {hint}there are {', '.join(names)}")
    return importlib.import_module(f"marlhf.tasks.{name}").task
