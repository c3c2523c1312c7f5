"""Simulated devices in a round: stragglers and drop-outs are not trained, and a round without a quorum is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_federations import MakeConfig

from fedlora.config import RunConfig
from fedlora.federation import local_clients
from fedlora.federation.run import RunOutcome
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training.workspace import open_workspace


def run(config: RunConfig) -> RunOutcome:
    return run_simulation(config, RunDir.create(config, overwrite=True))


def profiles(*tables: str) -> str:
    return f"clients.profiles=[{', '.join(tables)}]"


FAST = '{name="fast", examples_per_s=100.0}'
SLOW = '{name="slow", examples_per_s=1.0, steps=2}'


def test_stragglers_miss_the_deadline_and_cost_nothing(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    real = local_clients.answer

    def watched(workspace: Any, asked: Any, *rest: Any) -> Any:
        trained.extend(one.client_id for one in asked)
        return real(workspace, asked, *rest)

    monkeypatch.setattr(local_clients, "answer", watched)
    outcome = run(tiny_config(profiles(FAST, SLOW), "server.simulated_deadline_s=10.0"))
    record = outcome.records[1]
    assert record["asked"] == [0, 1, 2, 3]
    assert record["answered"] == [0, 2]
    assert record["late"] == [1, 3]
    assert record["simulated_seconds"] == 10.0
    assert record["clients"]["0"]["simulated_seconds"] == pytest.approx(4 * 8 / 100)
    assert set(trained) == {0, 2}


def test_without_a_deadline_the_round_takes_as_long_as_its_slowest(tiny_config: MakeConfig) -> None:
    outcome = run(tiny_config(profiles(FAST, SLOW)))
    assert outcome.records[1]["answered"] == [0, 1, 2, 3]
    assert outcome.records[1]["simulated_seconds"] == pytest.approx(2 * 8 / 1.0)
    assert outcome.records[1]["clients"]["1"]["steps"] == 2
    assert outcome.records[1]["clients"]["0"]["steps"] == 4


def test_the_pass_that_measures_the_loss_takes_simulated_time(tiny_config: MakeConfig) -> None:
    outcome = run(tiny_config(profiles(FAST), "strategy.name=qfedavg", "rounds=1"))
    held = open_workspace(outcome.rundir.config).data.clients
    for client_id, row in outcome.records[1]["clients"].items():
        assert row["simulated_seconds"] == pytest.approx((4 * 8 + len(held[int(client_id)]) // 3) / 100)


@pytest.mark.parametrize("rule", ["fedavg", "flora"])
def test_a_round_without_a_quorum_is_lost_and_the_run_goes_on(tiny_config: MakeConfig, rule: str) -> None:
    slow = '{name="slow", examples_per_s=1.0}'
    lost = tiny_config(profiles(slow), "server.simulated_deadline_s=1.0", f"strategy.name={rule}", "rounds=2")
    outcome = run(lost)
    assert [record.get("lost") for record in outcome.records[1:]] == [True, True]
    start = [record["accuracy"] for record in outcome.records]
    assert start[0] == start[1] == start[2]
    assert outcome.state.round == 2


@pytest.mark.slow
def test_drop_outs_and_absences_are_on_record_and_repeat_themselves(tiny_config: MakeConfig) -> None:
    settings = (
        profiles('{name="phone", availability=0.6, dropout=0.3}'),
        "server.simulated_deadline_s=5.0",
        "server.quorum=0.1",
        "rounds=8",
        "train.steps=1",
    )
    one, again = run(tiny_config(*settings, name="a")), run(tiny_config(*settings, name="b"))
    keys = ("offline", "asked", "answered", "dropped", "lost")
    rows = [[record[key] for key in keys] for record in one.records[1:]]
    assert rows == [[record[key] for key in keys] for record in again.records[1:]]
    assert any(row[0] for row in rows)
    assert any(row[3] for row in rows)
    for offline, asked, answered, dropped, _ in rows:
        assert sorted(offline + asked) == [0, 1, 2, 3]
        assert sorted(answered + dropped) == asked
    tensors = one.adapter.tensors()
    assert all(torch.equal(tensors[name], value) for name, value in again.adapter.tensors().items())


def test_profiles_can_give_ranks(tiny_config: MakeConfig) -> None:
    outcome = run(tiny_config(profiles('{name="a", rank=4}', '{name="b", rank=1}'), "strategy.name=flora"))
    ranks = {pair.rank for pair in outcome.state.base_updates[-1].change.pairs.values()}
    assert ranks == {4 + 1 + 4 + 1}
