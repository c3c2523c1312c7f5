"""Whole federations: simulated without messages, and by Flower messages between a server and nodes in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.messages import HeldParts
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.workspace import open_workspace
from support.on_a_grid import serve_on


class Said(Callback):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def simulate(config: RunConfig, *callbacks: Callback, **how: Any) -> RunOutcome:
    """A run of `LocalClients`, or `WorkerPool` where the config asks for processes, in a new folder."""
    return run_simulation(config, RunDir.create(config, overwrite=True), *callbacks, **how)


def deploy(
    config: RunConfig,
    *callbacks: Callback,
    nodes: Sequence[dict[str, Any]] | None = None,
    rundir: RunDir | None = None,
    ledgers: Path | None = None,
    run_id: int = 1,
) -> RunOutcome:
    """A run of `FlowerClients`, with nodes that hold nothing yet.

    Args:
        config: Of the run.
        callbacks: Told what happens.
        nodes: Config of each node; None: one for each client of the partition.
        rundir: To be resumed; None: a new folder.
        ledgers: Folder with a ledger for each client.
        run_id: Flower's.
    """
    if nodes is None:
        nodes = [{"partition-id": k} for k in range(len(open_workspace(config).data.clients))]
    run_config = {"toml": config.to_toml()} | ({} if ledgers is None else {"ledger-dir": str(ledgers)})
    forget(config)
    grid = LoopbackGrid(client_app.app, nodes, run_config, run_id)
    again = None if rundir is None else RunDir.open(rundir.path, config)
    return serve_on(grid, config, *callbacks, rundir=again, resume=again is not None, run_id=run_id, ledgers=ledgers)


def weights(outcome: RunOutcome) -> bytes:
    """The file of the exported adapter."""
    return (outcome.rundir.adapter_dir / "adapter_model.safetensors").read_bytes()


def forget(config: RunConfig) -> None:
    """Hold nothing of earlier rounds, as a new process does."""
    open_workspace(config).base.rebase(0, ())
    client_app.held_parts = HeldParts()


def timeless(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what a clock measured."""
    return [_timeless(record) for record in records]


def require_alike(one: Any, other: Any) -> None:
    """Two records with the same numbers, but for the rounding of products in another process."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            require_alike(one[key], other[key])
    else:
        assert one == (pytest.approx(other, rel=1e-5) if isinstance(other, float) else other)


def require_same(one: RunOutcome, other: RunOutcome, *uncounted: str) -> None:
    """Two runs with the same state to the byte, and the same lines of metrics but for some keys."""
    mine, theirs = (run.state.adapter.tensors() | dict(run.state.memory) for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for record, again in zip(timeless(one.records), timeless(other.records), strict=True):
        for line in (record, again):
            for key in uncounted:
                line.pop(key, None)
        assert record == again


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _timeless(one) for key, one in value.items() if "seconds" not in key}
