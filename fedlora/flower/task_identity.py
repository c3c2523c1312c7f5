"""For whom a process makes messages, which Flower keeps in a process-wide private class; it is touched here alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity


@contextlib.contextmanager
def task_identity(run_id: int, node_id: int = SUPERLINK_NODE_ID) -> Iterator[None]:
    """Inside, new messages belong to this run and node; Flower keeps that in a process-wide private class."""
    before = {name: getattr(TaskIdentity, f"_{name}") for name in ("task_id", "run_id", "node_id")}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, f"_{name}", value)
