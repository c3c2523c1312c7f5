"""Learning problems, one file each; `[task] name` in a config chooses one."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fedlora.config import OpenTable
from fedlora.tasks._base import Examples, Table, Task, tasks

__all__ = ["Examples", "Table", "Task", "load_task", "task_classes", "tasks"]


def load_task(table: OpenTable) -> Task:
    """The task that a config's `[task]` table describes.

    Raises:
        ConfigError: there is no such task, or a field is unknown or of the wrong type.
    """
    task_classes()
    return tasks.build(table.name, table.fields)


def task_classes() -> dict[str, type[Task]]:
    """Every task that a config can name."""
    for module in iter_modules(__path__):
        if not module.name.startswith("_"):
            import_module(f"{__name__}.{module.name}")
    return {name: tasks.get(name) for name in tasks}
