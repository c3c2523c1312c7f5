"""fedlora's arm: `run_simulation`, held between rounds.

Started by peers.py: `python peer_ours.py FOLDER PROCESSES KERNELS DTYPE`. A round is a whole one: plans, messages,
checks, merge, metrics, checkpoint.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_client import turns

from fedlora.callbacks import Callback
from fedlora.config import RunConfig, load_config
from fedlora.model import save_adapter
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training.workspace import open_workspace


class EndError(Exception):
    """The benchmark has seen enough."""


class Turns(Callback):
    """Holds the run at the end of a turn until the benchmark asks for the next."""

    def __init__(self, config: RunConfig, rundir: RunDir) -> None:
        self._config, self._rundir = config, rundir
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
            state = self._rundir.checkpoints.latest()
            assert state is not None
            save_adapter(open_workspace(self._config).base, state.adapter, Path(self._turn["save"]), {})
        self._turn = next(self._asked, {})
        if not self._turn:
            raise EndError
        self._left = self._turn["rounds"]


def main() -> None:
    """Answer the benchmark's turns."""
    folder, processes, kernels, dtype = sys.argv[1:5]
    settings = [
        f"runtime.processes={processes}",
        f"runtime.kernels={'auto' if kernels == 'chosen' else 'off'}",
        f"runtime.attention={'auto' if kernels == 'chosen' else 'sdpa'}",
        f"model.dtype={dtype}",
    ]
    config = load_config(f"{folder}/federation.toml", settings)
    with tempfile.TemporaryDirectory() as place:
        rundir = RunDir.create(config, place)
        try:
            run_simulation(config, rundir, Turns(config, rundir))
        except EndError:
            return


if __name__ == "__main__":
    main()
