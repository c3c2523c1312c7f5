"""Whole runs in several processes: the same as in one, and nothing is lost or left behind."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.errors import raises
from support.interrupted import cut
from support.states import same_state
from support.tiny_federations import MakeConfig
from support.waiting import until

from fedlora.adapter import AdapterState
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import PoolError
from fedlora.federation.run import RunOutcome
from fedlora.partition import partitioners
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation

TWO = "runtime.processes=2"
CASES = {
    "fedavg": ("strategy.name=fedavg", "train.clip_norm=1.0"),
    "no error": ("strategy.name=fedavg", "server.aggregation_error=false", "wire.up=int8"),
    "ffa, mixed ranks, some": ("strategy.name=ffa", "clients.ranks=[4,4,2,2]", "server.clients_per_round=3"),
    "ffa, unequal": ("strategy.name=ffa", "partition={name='dirichlet',clients=4,alpha=1.0}"),
    "flora, some": ("strategy.name=flora", "clients.ranks=[4,2]", "server.clients_per_round=2"),
    "fair": ("strategy.name=fair", "server.weighting=uniform"),
    "devices": (
        "clients.profiles=[{name='slow',dropout=0.4,examples_per_s=10},{name='fast',examples_per_s=1000}]",
        "server.simulated_deadline_s=30",
        "server.quorum=0.1",
    ),
}


def run(config: RunConfig) -> RunOutcome:
    return run_simulation(config, RunDir.create(config, overwrite=True), Callback())


def gap(one: AdapterState, other: AdapterState) -> float:
    """By changes of weights: how a change of rank below r is split into factors is not determined."""
    changes = [(pair.delta(), other.pairs[name].delta()) for name, pair in one.pairs.items()]
    changes += [(value, other.dense[name]) for name, value in one.dense.items()]
    return max(float((here - there).abs().max()) for here, there in changes)


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a line of metrics says that is no measurement of time or of a value that rounds."""
    loose = ("seconds", "clients", "loss", "accuracy", "error", "rule", "domains", "calibration")
    loose += ("majority_share", "f1", "mcc", "auroc", "ece", "classes")
    return {key: value for key, value in record.items() if not any(word in key for word in loose)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if "," in case else pytest.mark.nightly) for case in CASES]
)
def test_two_processes_come_to_what_one_does(tiny_config: MakeConfig, case: str) -> None:
    common = ("model.dtype=float64", "rounds=7", *CASES[case])
    one, two = run(tiny_config(*common, "runtime.processes=1")), run(tiny_config(*common, TWO, name="two"))
    assert two.rundir.read_json("environment.json")["processes"] == 2
    assert gap(one.adapter, two.adapter) < 1e-9
    for here, there in zip(one.records, two.records, strict=True):
        assert facts(there) == facts(here)
        if here["round"]:
            for client, row in here["clients"].items():
                assert there["clients"][client]["loss"] == pytest.approx(row["loss"], rel=1e-9)
            if "aggregation_error" in here:
                assert there["aggregation_error"] == pytest.approx(here["aggregation_error"], rel=1e-6, abs=1e-12)


@pytest.mark.nightly
def test_the_same_again_is_the_same_to_the_byte_and_so_is_a_resume(tiny_config: MakeConfig) -> None:
    settings = (TWO, "rounds=3", "partition.clients=5", "runtime.cohort=1")
    whole, again = run(tiny_config(*settings)), run(tiny_config(*settings, name="again"))
    assert same_state(whole.state, again.state)
    config = tiny_config(*settings, name="cut")
    rundir = RunDir.create(config)
    cut(rundir, 2)
    assert same_state(run_simulation(config, rundir, Callback(), resume=True).state, whole.state)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["example", pytest.param("client", marks=pytest.mark.nightly)])
def test_a_private_run_claims_what_it_claims_in_one_process(tiny_config: MakeConfig, unit: str) -> None:
    how = {
        "example": ("privacy.max_grad_norm=0.5", "privacy.public_examples=40", "server.weighting=uniform"),
        "client": ("privacy.clip_norm=0.1", "server.aggregation_error=false"),
    }[unit]
    common = ("rounds=2", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3", f"privacy.unit={unit}", *how)
    one, two = run(tiny_config(*common, "runtime.processes=1")), run(tiny_config(*common, TWO, name="two"))
    claims = [outcome.rundir.read_json("result.json")["privacy"]["epsilon"] for outcome in (one, two)]
    assert claims[0] == claims[1] > 0
    assert [facts(record) for record in one.records] == [facts(record) for record in two.records]
    ledgers = [sorted(path.name for path in outcome.rundir.privacy_dir.glob("*.jsonl")) for outcome in (one, two)]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0]


class _Kills(Callback):
    """Kills one of this process's children when round 2 begins."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def round_started(self, number: int, asked: object) -> None:
        if number == 2:
            child = next(c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline()))
            child.kill()

    def message(self, text: str) -> None:
        self.said.append(text)


def nobody_is_left() -> bool:
    return not [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", pytest.param("flora", marks=pytest.mark.nightly)])
def test_a_killed_process_is_replaced_and_the_run_ends_with_the_same_bytes(tiny_config: MakeConfig, rule: str) -> None:
    settings = (TWO, "rounds=3", f"strategy.name={rule}")
    whole = run(tiny_config(*settings))
    config, kills = tiny_config(*settings, name="killed"), _Kills()
    outcome = run_simulation(config, RunDir.create(config), kills)
    assert same_state(outcome.state, whole.state)
    assert any("status -9" in line for line in kills.said)
    assert [facts(record) for record in outcome.records] == [facts(record) for record in whole.records]
    assert nobody_is_left()


@pytest.mark.nightly
def test_a_killed_process_of_a_private_run_costs_its_round_and_nothing_else(tiny_config: MakeConfig) -> None:
    private = ("privacy.noise_multiplier=1.0", "privacy.delta=1e-3", "privacy.max_grad_norm=0.5")
    settings = (TWO, "rounds=3", *private, "privacy.public_examples=40", "server.weighting=uniform")
    whole = run(tiny_config(*settings)).rundir.read_json("result.json")["privacy"]["epsilon"]
    config = tiny_config(*settings, name="killed")
    rundir = RunDir.create(config)
    with raises(PoolError, "worker-died", "status -9", "resume the run"):
        run_simulation(config, rundir, _Kills())
    assert [record["round"] for record in rundir.read_metrics()] == [0, 1]
    assert nobody_is_left()
    run_simulation(config, rundir, Callback(), resume=True)
    assert rundir.read_json("result.json")["privacy"]["epsilon"] == whole


MODULE = """
from dataclasses import dataclass
from fedlora.partition import partitioners
from fedlora.partition.iid import Iid

@partitioners.register("mine")
@dataclass(frozen=True)
class Mine(Iid):
    pass
"""


@pytest.mark.nightly
def test_processes_know_what_an_imported_module_registered(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_partition.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(partitioners, "_entries", dict(partitioners._entries))
    importlib.import_module("my_partition")
    outcome = run(tiny_config(TWO, "rounds=1", "partition={name='mine',clients=4}"))
    assert outcome.records[-1]["answered"] == outcome.records[-1]["asked"]


SCRIPT = """
import sys
from pathlib import Path
from fedlora.config import load_config
from fedlora.simulation.run import run_simulation
from fedlora.callbacks import Callback
from fedlora.runs.rundir import RunDir

class Says(Callback):
    def round_ended(self, record):
        print(record["round"], flush=True)

config = load_config(sys.argv[1])
run_simulation(config, RunDir.create(config), Says())
"""


@pytest.mark.nightly
def test_a_script_needs_no_guard_and_leaves_nobody_behind_when_it_is_killed(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(TWO, "rounds=1000", name="script")
    (tmp_path / "script.toml").write_text(config.to_toml())
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "script.toml")]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert script.stdout is not None
        assert [script.stdout.readline().strip() for _ in range(3)] == ["0", "1", "2"]
        children = psutil.Process(script.pid).children()
        assert len(children) >= 2
    finally:
        os.kill(script.pid, signal.SIGKILL)
        script.wait()
    until(
        lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children),
        lambda: "a process outlived the script",
    )


@pytest.mark.nightly
def test_a_resumed_run_keeps_its_processes(tiny_config: MakeConfig) -> None:
    rundir = RunDir.create(tiny_config("rounds=2"))
    cut(rundir, 2)
    assert rundir.read_json("environment.json")["processes"] == 1
    rundir.note_environment(processes=2)  # as if "auto" had found work enough
    run_simulation(rundir.config, rundir, Callback(), resume=True)
    again = rundir.read_json("environment.json")
    assert (again["processes"], again["processes_why"]) == (2, "asked for")
