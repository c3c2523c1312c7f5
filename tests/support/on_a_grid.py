"""Runs on a grid of nodes in this process: the server's and the clients' Flower apps, and the messages between them."""

from __future__ import annotations

from pathlib import Path

from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.server_app import serve
from fedlora.flower.task_identity import task_identity
from fedlora.runs.rundir import RunDir
from fedlora.testing.loopback_grid import LoopbackGrid


def grid_of(config: RunConfig, clients: int = 4) -> LoopbackGrid:
    """A node for each client; node 2 + k is client k."""
    return LoopbackGrid(client_app.app, [{"partition-id": k} for k in range(clients)], {"toml": config.to_toml()})


def serve_on(
    grid: LoopbackGrid,
    config: RunConfig,
    *callbacks: Callback,
    rundir: RunDir | None = None,
    resume: bool = False,
    run_id: int = 1,
    ledgers: Path | None = None,
) -> RunOutcome:
    """A whole run by the server's app.

    Args:
        grid: The nodes.
        config: Of the run.
        callbacks: Told what happens.
        rundir: The run's folder; None: a new one, in place of what is there.
        resume: Go on from its last checkpoint.
        run_id: Flower's.
        ledgers: Folder with a ledger for each client.
    """
    with task_identity(run_id):
        folder = rundir or RunDir.create(config, overwrite=True)
        return serve(grid, config, folder, *callbacks, resume=resume, ledgers=ledgers)
