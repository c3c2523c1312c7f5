"""Federations of real processes for the tests: SuperLink, SuperExecs, SuperNodes and workers with TLS and node keys.

`fedlora deploy up` runs the programs, and starts again what was killed. All of it is watched by a guard: it ends with
the test, even if pytest is killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomli_w

from fedlora.assets import Checkpoint
from fedlora.callbacks import Callback
from fedlora.config import ModelConfig, RunConfig, parse_config
from fedlora.deploy import FederationPlan, write_project
from fedlora.model.fingerprint import fingerprint
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from support.nothing_lost import require_nothing_lost

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter/adapter_model.safetensors"


def _local_federation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local_federation", ROOT / "deploy" / "local_federation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PATIENCE_S = 500.0
    return module


local = _local_federation()
os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.2"  # seconds; Flower's own 1.0 is most of a tiny model's round


class Federation:
    """Coordinator and nodes in a folder, each by `fedlora deploy up`.

    Args:
        folder: for the project and everybody's logs.
        config: of its runs; `run` can change single keys.
        plan: addresses and nodes.
    """

    def __init__(self, folder: Path, config: RunConfig, plan: FederationPlan) -> None:
        self.folder, self.project = folder, folder / "federation"
        self.config, self.names = config, [node.name for node in plan.nodes]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        write_project(self.project, config, plan)

    def allow(self, models: Sequence[ModelConfig], sources: Sequence[str]) -> None:
        """Let each site's policy list these base models and sources, which may be paths, and forbid nothing else."""
        known = {model.name: fingerprint(Checkpoint.of(model)) for model in models}
        for name in self.names:
            path = self.folder_of(name) / "site" / "policy.toml"
            path.write_text(tomli_w.dumps({"base_models": known, "sources": list(sources)}))

    def begin(self) -> None:
        """Start the coordinator and let the nodes' keys in."""
        self.up("coordinator")
        self.wait(lambda: local.listens(self.project), "the SuperLink")
        self.register()

    def register(self) -> None:
        for name in self.names:
            key = f"{self.project}/coordinator/nodes/{name}.pub"
            local.flower(self.project, "supernode", "register", key, "federation", "--name", name)

    def folder_of(self, name: str) -> Path:
        return self.project if name == "coordinator" else self.project / "nodes" / name

    def up(self, name: str, *prefix: str) -> None:
        self.processes[name] = local.start(self.folder_of(name), self.folder / f"{name}.log", *prefix)

    def down(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            process.wait(60)
            local.bury(process)

    def pids(self, name: str, program: str) -> list[int]:
        """Processes of that program under one of the folders."""
        return [pid for pid in local.members(self.processes[name].pid) if program in local.command_line(pid)]

    def kill(self, name: str, program: str) -> None:
        for pid in self.pids(name, program):
            os.kill(pid, signal.SIGKILL)

    def run(self, *overrides: str) -> Run:
        """Start a run; `overrides` are as with `fedlora run --set`, without quotes and blanks."""
        config = parse_config(self.config.to_toml(), overrides)
        return Run(self, config, self._run(*overrides))

    def resume(self, run: Run, *overrides: str) -> Run:
        """A new run that goes on from the last checkpoint of another."""
        return Run(self, run.config, self._run(*overrides, more="resume=true "))

    def _run(self, *overrides: str, more: str = "") -> str:
        config = f'{more}set="{" ".join(overrides)}"'
        words = ["run", f"{self.project}/coordinator/app", "federation", "--run-config", config, "--format", "json"]
        said = json.loads(local.flower(self.project, *words))
        assert said["success"], said
        return str(said["run-id"])

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait; fails with the end of everybody's log."""
        try:
            local.wait_until(condition, what)
        except SystemExit as error:
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))
            pytest.fail(f"{error}\n{logs}")


@dataclass(frozen=True)
class Run:
    """A run of a federation.

    Args:
        federation: where it runs.
        config: with which.
        run_id: Flower's.
    """

    federation: Federation
    config: RunConfig
    run_id: str

    @property
    def rundir(self) -> Path:
        return self.federation.project / "coordinator" / "runs" / self.config.name

    def records(self) -> list[dict[str, Any]]:
        return local.records(self.rundir)

    def answers(self) -> list[list[int]]:
        return [record["answered"] for record in self.records()[1:]]

    def has_finished(self, number: int) -> bool:
        """Whether a round is over: its checkpoint is what makes it so."""
        return any(int(path.stem) >= number for path in (self.rundir / "checkpoints").glob("*.safetensors"))

    def finish(self) -> dict[tuple[int, int], str]:
        """Wait for its end, and see that nothing was lost, by its files and by the server's log; gives `left_out`."""
        self.federation.wait(lambda: (self.rundir / "result.json").is_file(), f"the end of {self.config.name}")
        rundir = RunDir.open(self.rundir)
        left_out = self.left_out()
        require_nothing_lost(rundir, left_out)
        assert rundir.read_metrics()[-1]["round"] == self.config.rounds
        return left_out

    def left_out(self) -> dict[tuple[int, int], str]:
        """(round, client) -> why its reply was not used, as the server said at the time: Flower keeps its log."""
        said = local.flower(self.federation.project, "log", self.run_id, "federation", "--show")
        found = re.findall(r"round (\d+): client (\d+) left out: (.*)", said)
        return {(int(number), int(client_id)): why.strip() for number, client_id, why in found}

    def simulate(self, **how: Any) -> Path:
        """The folder of its simulation; `how` is for `run_simulation`."""
        output, name = str(self.federation.folder), f"{self.config.name}-simulated"
        config = self.config.model_copy(update={"output": output, "name": name})
        return run_simulation(config, RunDir.create(config), Callback(), **how).rundir.path

    def require_equal(self, simulated: Path) -> None:
        """The bytes of the adapter are those of the simulation."""
        assert (self.rundir / WEIGHTS).read_bytes() == (simulated / WEIGHTS).read_bytes()
        mine, other = self.records(), local.records(simulated)
        assert [record["accuracy"] for record in mine] == [record["accuracy"] for record in other]
