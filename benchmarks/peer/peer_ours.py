"""fedlora's arm: its ServerApp and ClientApp on its in-process grid, held between rounds.

Started by peers.py: `python peer_ours.py FOLDER FIRST LAST THREADS DTYPE`, for the nodes of the clients FIRST to
LAST - 1 of the federation. A round is a whole one: plans, messages, checks, merge, metrics, checkpoint.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig
from peer_client import turns

from fedlora.attention import choose_attention
from fedlora.config import RunConfig, load_config
from fedlora.flower import client_app, server_app
from fedlora.flower.local_grid import LocalGrid, task_identity
from fedlora.flower.server_app import Session
from fedlora.kernels import accelerate
from fedlora.model import save_adapter
from fedlora.progress import NoProgress
from fedlora.rundir import RunDir
from fedlora.training.sizing import cohort_size
from fedlora.training.workbench import Workbench, open_workbench


class EndError(Exception):
    """The benchmark has seen enough."""


class Turns(NoProgress):
    """Holds the run at the end of a turn until the benchmark asks for the next."""

    def __init__(self, bench: Workbench, rundir: RunDir) -> None:
        self._bench, self._rundir = bench, rundir
        self._asked = turns()
        self._turn: dict[str, Any] = {}
        self._left = 0

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """A round's line and checkpoint are written."""
        if record["round"]:
            if record["asked"] != record["answered"]:
                raise SystemExit(f"a client failed: {record}")
            self._left -= 1
        if self._left > 0:
            return
        if self._turn.get("save"):
            state = self._rundir.latest_checkpoint()
            assert state is not None
            folder = Path(f"{self._turn['save']}-{record['asked'][0]}")  # beside the other process's
            save_adapter(self._bench.base, state.adapter, folder, {})
        self._turn = next(self._asked, {})
        if not self._turn:
            raise EndError
        best, self._left = self._turn["kernels"] == "chosen", self._turn["rounds"]
        model = self._bench.base.model
        accelerate(model, self._bench.kernels.mode if best else "off")
        choose_attention(model, "auto" if best else "sdpa")


def main() -> None:
    """Answer the benchmark's turns."""
    folder, first, last, threads, dtype = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    kernels = "onednn" if dtype == "float32" else "off"  # what "auto" should find; on a busy machine it may not
    runtime = [f"runtime.threads={threads}", f"runtime.kernels={kernels}", f"model.dtype={dtype}"]
    config = load_config(f"{folder}/federation.toml", runtime)
    bench = open_workbench(config)
    with tempfile.TemporaryDirectory() as place:
        run(config, bench, RunDir.create(config, place), range(first, last))


def run(config: RunConfig, bench: Workbench, rundir: RunDir, mine: range) -> None:
    """As `fedlora.flower.run_local`, with some of the nodes."""
    run_config: dict[str, bool | float | int | str] = {"toml": config.to_toml()}
    nodes = [{"partition-id": k, "num-partitions": len(bench.data.clients)} for k in mine]
    grid = LocalGrid(client_app.app, nodes, run_config)
    grid.window, grid.together = cohort_size(bench, len(nodes)).clients, client_app.train_rounds
    context = Context(1, 1, UserConfig(), RecordDict(), UserConfig(run_config))
    try:
        with server_app.session(Session(rundir, Turns(bench, rundir))), task_identity(run_id=1):
            server_app.app(grid, context)
    except EndError:
        return


if __name__ == "__main__":
    main()
