"""Learning problems, one file each; `[task] name` in a config chooses one."""

from __future__ import annotations

from fedlora.config import OpenTable
from fedlora.tasks._base import Examples, Table, Task, tasks

__all__ = ["Examples", "Table", "Task", "load_task", "tasks"]


def load_task(table: OpenTable) -> Task:
    """The task that a config's `[task]` table describes.

    Raises:
        ConfigError: there is no such task, or a field is unknown or of the wrong type.
    """
    return tasks.build(table.name, table.fields)
