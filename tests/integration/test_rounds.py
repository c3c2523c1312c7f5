"""Whole federations in this process: they learn, repeat themselves, and survive bad clients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises
from support.federations import deploy, simulate, timeless
from support.interrupted import cut, cut_and_resumed, resumed
from support.states import same_adapter
from support.tiny_federations import MakeConfig

from fedlora.aggregators import equivalent_adapter
from fedlora.callbacks import Callback
from fedlora.errors import ConfigError, RoundError, RuleError, TrainingError
from fedlora.federation import client, client_training
from fedlora.federation.round_record import failed_at_the_end
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.messages import HeldParts
from fedlora.model.base_history import digest_of
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.tasks._base import to_device
from fedlora.training.workspace import open_workspace
from fedlora.wire_formats import layout_json

Run = Callable[..., RunOutcome]


run = simulate
both = pytest.mark.parametrize("run", [pytest.param(simulate, marks=pytest.mark.slow), deploy])
"""For laws of a round wherever its clients are; the pools' contract says that both come to the same."""


def test_a_federation_learns_and_says_what_it_did(tiny_config: MakeConfig) -> None:
    outcome = run(tiny_config("rounds=6"))
    first, *rounds = outcome.records
    assert [record["round"] for record in outcome.records] == list(range(7))
    assert rounds[-1]["accuracy"] > first["accuracy"] + 0.2
    assert set(first["domains"]) == {"films", "phones"}
    for record in rounds:
        assert record["asked"] == record["answered"] == [0, 1, 2, 3]
        assert record["aggregation_error"] > 0
        assert record["bytes_up"] > 4 * outcome.adapter.nbytes()


@pytest.mark.slow
def test_a_run_is_a_function_of_its_config(tiny_config: MakeConfig) -> None:
    one, again, other = run(tiny_config()), run(tiny_config(name="b")), run(tiny_config("seed=1", name="c"))
    assert same_adapter(one.state.adapter, again.state.adapter)
    assert timeless(one.records) == timeless(again.records)
    assert not same_adapter(one.state.adapter, other.state.adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", ["fedavg", "flora", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("ffa", "fair"))]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_config: MakeConfig, rule: str) -> None:
    whole = run(tiny_config(f"strategy.name={rule}", "rounds=4", "server.fraction=0.5", name="whole"))
    config = tiny_config(f"strategy.name={rule}", "rounds=4", "server.fraction=0.5", name="cut")
    resumed = cut_and_resumed(config, 3)
    assert same_adapter(resumed.adapter, whole.adapter)
    strip = [{k: v for k, v in r.items() if k != "bytes_down"} for r in timeless(resumed.records)]
    assert strip == [{k: v for k, v in r.items() if k != "bytes_down"} for r in timeless(whole.records)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", "ffa", "flora", "fair"])
def test_the_broadcast_error_is_what_the_rule_claims(tiny_config: MakeConfig, rule: str) -> None:
    outcome = run(tiny_config(f"strategy.name={rule}"))
    errors = [record["aggregation_error"] for record in outcome.records[1:]]
    assert (max(errors) < 1e-6) == (rule in ("ffa", "flora"))


@pytest.mark.slow
@both
def test_ffa_sends_a_once_and_b_alone_after_that(tiny_config: MakeConfig, run: Run) -> None:
    full, half = run(tiny_config(name="full")), run(tiny_config("strategy.name=ffa", name="half"))
    state = half.state.adapter
    ups = [run.records[2]["bytes_up"] for run in (full, half)]
    downs = [record["bytes_down"] for record in half.records[1:]]
    a_bytes = 4 * state.nbytes(("A",))
    assert ups[0] - ups[1] == a_bytes
    layout = json.dumps(layout_json(state.tensors(("A",))))[1:-1]
    assert downs[0] - downs[1] == a_bytes + 4 * len(f"{layout}, ")
    initial = open_workspace(tiny_config()).base.initial_adapter(0)
    assert all(torch.equal(state.pairs[k].A, initial.pairs[k].A) for k in state.pairs)


@pytest.mark.slow
def test_a_client_that_forgot_what_it_held_is_sent_everything(tiny_config: MakeConfig) -> None:
    expected = deploy(tiny_config("strategy.name=ffa", name="keeps"))

    class Forgets(Callback):
        def round_started(self, number: int, asked: object) -> None:
            client_app.held_parts = HeldParts()

    outcome = deploy(tiny_config("strategy.name=ffa", name="forgets"), Forgets())
    assert same_adapter(outcome.adapter, expected.adapter)
    assert outcome.records[2]["bytes_down"] > expected.records[2]["bytes_down"]


@pytest.mark.slow
@both
def test_flora_clients_that_join_late_or_restart_train_on_the_same_base(tiny_config: MakeConfig, run: Run) -> None:
    # On one base, server and nodes: what a node holds is there before its request comes.
    settings = ("strategy.name=flora", "server.clients_per_round=2", "rounds=6", "runtime.cohort=1")
    expected = simulate(tiny_config(*settings, name="stays"))
    held: list[str] = []

    class Restarts(Callback):
        def round_started(self, number: int, asked: object) -> None:
            held.append(digest_of(workspace.base))
            workspace.base.rebase(0, ())

    config = tiny_config(*settings, name="restarts")
    workspace = open_workspace(config)
    outcome = run(config, Restarts())
    assert same_adapter(outcome.adapter, expected.adapter)
    assert "" not in held[1:], "no client's base had changed when it was restarted"


def test_flora_ends_with_an_adapter_that_does_what_base_and_adapter_do(tiny_config: MakeConfig) -> None:
    outcome = run(tiny_config("strategy.name=flora", "clients.ranks=[8,4,2,1]"))
    adapter, error = equivalent_adapter(outcome.state, 10_000)
    assert error < 1e-5
    workspace = open_workspace(tiny_config())
    workspace.base.rebase(0, ())
    workspace.base.write(adapter)
    batch = to_device(workspace.task, workspace.task.collate(workspace.data.test, np.arange(8)), workspace.base.device)
    workspace.base.train_mode(False)
    with torch.no_grad():
        alone = workspace.task.losses(workspace.base.model, batch)
        workspace.base.rebase(outcome.state.base_version, outcome.state.base_updates)
        workspace.base.write(outcome.state.adapter)
        together = workspace.task.losses(workspace.base.model, batch)
    workspace.base.rebase(0, ())
    assert torch.allclose(alone, together, atol=1e-5)


def test_mixed_ranks_are_refused_before_anything_is_trained(tiny_config: MakeConfig) -> None:
    config = tiny_config("clients.ranks=[4,2]")
    rundir = RunDir.create(config)
    with raises(RuleError, "mixed-ranks", "flora"):
        run_simulation(config, rundir, Callback())
    assert rundir.read_metrics() == []


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Clients in this set raise."""
    bad: set[int] = set()
    real = client_training.job_of

    def job(workspace: Any, request: Any, *rest: Any) -> Any:
        if request.client_id in bad:
            raise TrainingError("disk on fire" if request.client_id % 2 else "the loss is not finite")
        return real(workspace, request, *rest)

    monkeypatch.setattr(client_training, "job_of", job)
    return bad


@both
def test_clients_that_raise_are_named_and_the_round_goes_on(
    tiny_config: MakeConfig, failing: set[int], run: Run
) -> None:
    failing |= {1, 2}
    outcome = run(tiny_config())
    for record in outcome.records[1:]:
        assert record["answered"] == [0, 3]
        assert "disk on fire" in record["refused"]["1"]
        assert "the loss is not finite" in record["refused"]["2"]


def test_a_fault_of_the_program_in_a_client_ends_the_simulation(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All clients are one program: rounds without those that meet the fault would be another experiment."""
    real = client_training.job_of

    def job(workspace: Any, request: Any, *rest: Any) -> Any:
        return 1 / 0 if request.client_id == 1 else real(workspace, request, *rest)

    monkeypatch.setattr(client_training, "job_of", job)
    with pytest.raises(ZeroDivisionError):
        run(tiny_config())


def test_below_the_quorum_the_run_stops_and_the_directory_stays(tiny_config: MakeConfig, failing: set[int]) -> None:
    config = tiny_config("server.max_failed_rounds=0")
    rundir = RunDir.create(config)

    class Breaks(Callback):
        def round_started(self, number: int, asked: object) -> None:
            if number == 2:
                failing.update({0, 1, 2})

    with raises(RoundError, "no-quorum", "round 2: 1 of 4", "client 0", f"--resume {rundir.path}"):
        run_simulation(config, rundir, Breaks())
    assert [record["round"] for record in rundir.read_metrics()] == [0, 1, 2]
    assert set(rundir.read_metrics()[-1]["refused"]) == {"0", "1", "2"}
    failing.clear()
    assert run_simulation(config, RunDir.open(rundir.path), Callback(), resume=True).state.round == 3


def test_lost_rounds_before_a_resume_count_as_those_after_it(tiny_config: MakeConfig, failing: set[int]) -> None:
    failing |= {0, 1, 2, 3}
    config = tiny_config("rounds=9", "server.max_failed_rounds=2", name="whole")
    with raises(RoundError, "no-quorum", "round 3: 0 of 4"):
        run(config)
    killed = RunDir.create(tiny_config("rounds=9", "server.max_failed_rounds=2", name="killed"))
    cut(killed, 3)
    for _ in range(2):  # and again: round 3 has no checkpoint, and is the third lost one in each attempt
        with raises(RoundError, "no-quorum", "round 3: 0 of 4"):
            resumed(killed)
    found = [timeless(RunDir.open(killed.path.parent / name).read_metrics()) for name in ("whole", "killed")]
    assert found[0] == found[1]


def test_rounds_that_simulated_devices_lost_are_no_failures_before_a_resume_either() -> None:
    lost = {"lost": True, "asked": [0, 1, 2], "answered": [0]}
    by_devices, nobody = {**lost, "dropped": [1, 2], "late": []}, {**lost, "asked": [], "answered": []}
    assert failed_at_the_end([lost, lost], 0.5) == 2
    for other in (by_devices, nobody, {**lost, "lost": False}):
        assert failed_at_the_end([lost, other, lost], 0.5) == 1
        assert failed_at_the_end([lost, other], 0.5) == 0
    assert failed_at_the_end([{**lost, "dropped": [1], "late": [2]}], 1.0) == 0
    assert failed_at_the_end([{**lost, "dropped": [1], "late": []}], 1.0) == 1
    assert failed_at_the_end([], 0.5) == 0


def test_all_clients_failing_ends_the_run_with_their_reason(tiny_config: MakeConfig, failing: set[int]) -> None:
    failing |= {0, 1, 2, 3}
    with raises(RoundError, "no-quorum", "0 of 4", "disk on fire"):
        run(tiny_config())


def test_more_clients_than_there_are_is_refused(tiny_config: MakeConfig) -> None:
    with raises(RoundError, "too-few-clients", 9, 4):
        run(tiny_config("server.clients_per_round=9"))


def test_sampling_is_seeded_and_reaches_everyone(tiny_config: MakeConfig) -> None:
    outcome = run(
        tiny_config("server.clients_per_round=1", "server.aggregation_error=false", "rounds=12", "train.steps=1")
    )
    asked = [record["asked"][0] for record in outcome.records[1:]]
    assert set(asked) == {0, 1, 2, 3}
    assert "aggregation_error" not in outcome.records[1]


@pytest.mark.slow
def test_the_base_is_loaded_once_for_all_clients_and_rounds(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.training import workspace

    loads, load_base = [], workspace.load_base
    monkeypatch.setattr(workspace, "load_base", lambda *wanted: (loads.append(wanted), load_base(*wanted))[1])
    workspace.close_workspace()
    run(tiny_config())
    run(tiny_config("strategy.name=ffa"))
    run(tiny_config("partition.clients=3"))
    assert len(loads) == 1


def test_peft_loads_the_adapter_and_gives_the_same_accuracy(tiny_config: MakeConfig, tiny_bert: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    outcome = run(tiny_config("rounds=5"))
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(plain, outcome.rundir.adapter_dir).eval()
    workspace = open_workspace(tiny_config())
    test = workspace.data.test
    with torch.no_grad():
        batch = workspace.task.collate(test, np.arange(len(test)))
        measured = workspace.task.summarise({k: v.numpy() for k, v in workspace.task.measure(model, batch).items()})
    assert measured["accuracy"] == outcome.records[-1]["accuracy"]


def test_a_config_that_cannot_work_is_refused_before_an_earlier_run_is_removed(tiny_config: MakeConfig) -> None:
    from fedlora.simulation.run import refuse_early

    for override, error in (("clients.ranks=[4,2]", RuleError), ("server.clients_per_round=9", RoundError)):
        config = tiny_config(override)
        with pytest.raises(error):
            refuse_early(config, open_workspace(config))
    refuse_early(tiny_config("clients.ranks=[4,2]", "strategy.name=ffa"), open_workspace(tiny_config()))


def test_a_merge_that_overflows_is_named_and_not_kept(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = client.train_requests

    def blown_up(result: Any) -> Any:
        large = {name: torch.full_like(value, 3e38) for name, value in result.adapter.tensors(("A", "B")).items()}
        return dataclasses.replace(result, adapter=result.adapter.with_tensors(large))

    monkeypatch.setattr(client, "train_requests", lambda *asked: [blown_up(result) for result in real(*asked)])
    config = tiny_config("strategy.name=flora", "adapter.alpha=64", "server.max_norm_ratio=off")
    rundir = RunDir.create(config)
    with raises(RoundError, "state-not-finite", "round 1", "server.max_norm"):
        run_simulation(config, rundir, Callback())
    assert [record["round"] for record in rundir.read_metrics()] == [0]


def test_what_a_callback_raises_ends_the_run_and_is_no_fault_of_the_round(tiny_config: MakeConfig) -> None:
    class Objects(Callback):
        def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
            raise ConfigError("no more of this", code="objection")

    config = tiny_config("rounds=2")
    with raises(ConfigError, "objection"):
        run_simulation(config, RunDir.create(config), Objects())
