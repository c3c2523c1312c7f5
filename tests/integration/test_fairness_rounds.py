"""q-FedAvg and AFL in whole runs: what clients say of their losses, who is bounded, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import RecordDict
from support.errors import raises
from support.federations import Said, deploy, require_same, simulate
from support.interrupted import killed_and_resumed
from support.tiny_federations import MakeConfig
from support.tiny_words import LABEL_WORDS

from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.aggregators.fairness import QFedAvg
from fedlora.errors import ConfigError, PrivacyError, ReplyError, RuleError
from fedlora.federation import client, client_training
from fedlora.federation.plausibility import COUNTED_LOSS, START_LOSS
from fedlora.flower import client_app
from fedlora.flower.flower_strategy import FedLoraStrategy
from fedlora.tasks.text_classification import TextClassification
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import open_workspace

RULES = {
    "qfedavg": ("strategy={name='qfedavg',q=2.0,lipschitz=0.1}",),
    "afl": ("strategy={name='afl',rate=0.5,inner={name='ffa'}}",),
}
ALIKE = ("runtime.cohort=1", "runtime.prefix_cache=off", "server.fraction=0.75", "rounds=3")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_each_client_says_the_loss_of_what_it_was_sent_and_all_pools_agree(tiny_config: MakeConfig, rule: str) -> None:
    here = simulate(tiny_config(*RULES[rule], *ALIKE, name="here"))
    require_same(here, deploy(tiny_config(*RULES[rule], *ALIKE, name="grid")))
    workspace = open_workspace(here.rundir.config)
    workspace.base.write(workspace.base.initial_adapter(here.rundir.config.seed))
    first = here.records[1]["clients"]
    assert len(first) == 3
    for client_id, row in first.items():
        rows = workspace.data.clients[int(client_id)]
        found = evaluate(workspace.base, workspace.task, workspace.data.train, indices=rows)
        assert row[START_LOSS] == pytest.approx(found.overall["loss"], rel=1e-6)
        assert row[START_LOSS] != row["loss"]


def test_what_a_client_says_is_the_loss_that_it_goes_on_to_minimise(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step is on all its examples, its loss is F_k(w): with weighted classes and smoothed labels, by `losses`
    alone. Figures of evaluation, which generate text in some tasks, are none of it."""
    real = client.measure_start

    def measured(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(TextClassification, "measure", None)
            return real(*args)

    monkeypatch.setattr(client, "measure_start", measured)
    objective = ("task.label_smoothing=0.3", f"task.class_weights={{{next(iter(LABEL_WORDS))}=5.0}}")
    step = ("train.steps=1", "train.batch_size=1000", "model.dropout=0.0", "rounds=1")
    rows = simulate(tiny_config("strategy.name=qfedavg", *objective, *step)).records[1]["clients"].values()
    assert [row[START_LOSS] for row in rows] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert len({row[START_LOSS] for row in rows}) == 4


@pytest.mark.slow
def test_killed_and_resumed_it_comes_to_the_same(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*RULES["afl"], *ALIKE[:3], "rounds=4")
    straight = simulate(tiny_config(*keys, name="straight"))
    again = killed_and_resumed(tiny_config(*keys, name="killed"), 3, monkeypatch)
    require_same(straight, again, "bytes_down")


@pytest.mark.slow
def test_a_loss_that_is_no_loss_is_refused_and_a_large_one_is_bounded(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1 lies in every round; in round 2 it says infinity."""
    real = client_app.encode_reply

    def lying(reply: Any, seed: int) -> RecordDict:
        content = real(reply, seed)
        if reply.request.client_id == 1:
            content["metrics"][START_LOSS] = float("inf") if reply.request.round == 2 else 1e9
        return content

    monkeypatch.setattr(client_app, "encode_reply", lying)
    run = deploy(tiny_config("strategy.name=afl", "rounds=3", *ALIKE[:2]), said := Said())
    assert run.records[2]["answered"] == [0, 2, 3]
    assert "is no finite number" in run.records[2]["refused"]["1"]
    medians = [sorted(row[START_LOSS] for row in record["clients"].values())[1] for record in run.records[1:3]]
    for number, most in ((1, medians[0]), (3, max(medians))):
        assert run.records[number]["clients"]["1"][START_LOSS] == 1e9
        assert run.records[number]["clients"]["1"][COUNTED_LOSS] == pytest.approx(10 * most)
    assert float(run.state.memory["weight/1"]) == 1
    assert [line[:18] for line in said.lines if "loss" in line] == ["client 1 reports a"]


def test_large_losses_are_nobodys_lie_in_the_first_round_and_of_two_clients_nothing_is_known(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale, told = 1.0, dict[int, float]()
    real, truly = client.measure_start, QFedAvg.aggregate

    def scaled(*args: Any) -> Any:
        return {name: scale * value for name, value in real(*args).items()}  # type: ignore[union-attr]

    def aggregate(self: QFedAvg, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        updates = list(updates)
        told.clear()
        told.update({update.client_id: update.facts["start_loss"] for update in updates})
        return truly(self, state, updates)

    monkeypatch.setattr(client, "measure_start", scaled)
    monkeypatch.setattr(QFedAvg, "aggregate", aggregate)
    scale = 1e8
    keys = ("strategy.name=qfedavg", "rounds=1", "train.steps=1", *ALIKE[:2])
    simulate(tiny_config(*keys, name="four"), said := Said())
    assert len(told) == 4
    assert min(told.values()) > 1e7
    assert not [line for line in said.lines if "loss" in line]
    two = simulate(tiny_config(*keys, "server.clients_per_round=2", "rounds=2", name="two"), said)
    rows = two.records[2]["clients"].values()
    assert sorted(row[START_LOSS] for row in rows) == pytest.approx(sorted(told.values()))
    assert len(told) == 2
    assert not any(COUNTED_LOSS in row for row in rows)
    assert sum("fewer than 3 clients" in line for line in said.lines) == 1


def test_a_client_without_examples_says_that_it_has_none_and_one_that_cannot_be_measured_is_not_trained(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("strategy.name=qfedavg", "rounds=1", "train.steps=1", "server.quorum=0.5", *ALIKE[:2])
    trained, real, measured = [], client.train_requests, client.measure_start

    def cannot(workspace: Any, request: Any, store: Any) -> Any:
        return ReplyError("odd", code="odd") if request.client_id == 2 else measured(workspace, request, store)

    def noted(workspace: Any, requests: Any, *rest: Any) -> Any:
        trained.extend(request.client_id for request in requests)
        return real(workspace, requests, *rest)

    monkeypatch.setattr(client, "measure_start", cannot)
    monkeypatch.setattr(client, "train_requests", noted)
    held = client_training.examples_of_client
    monkeypatch.setattr(client_training, "examples_of_client", lambda w, k: held(w, k)[:0] if k == 1 else held(w, k))
    record = simulate(config).records[1]
    assert "client 1 has no examples" in record["refused"]["1"]
    assert record["refused"]["2"] == "odd"
    assert trained == [0, 3]


def test_what_would_tell_of_examples_or_not_work_is_refused(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}"
    hidden = ("server.weighting=uniform", "server.aggregation_error=false")
    with raises(PrivacyError, "fact-not-private", "without noise"):
        simulate(tiny_config("strategy.name=qfedavg", example, *hidden, name="refused"))
    client = "privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}"
    with raises(PrivacyError, "rule-not-linear", "LINEAR"):
        simulate(tiny_config("strategy.name=afl", client, *hidden, name="refused"))
    with raises(RuleError, "mixed-ranks"):
        simulate(tiny_config("strategy.name=qfedavg", "clients.ranks=[2,4]", name="refused"))
    with monkeypatch.context() as patch, raises(ConfigError, "relative-loss", "'qfedavg' goes by clients' losses"):
        patch.setattr(type(open_workspace(tiny_config()).task), "refers", True)
        simulate(tiny_config("strategy.name=qfedavg", name="refused"))
    with raises(RuleError, "loss-not-reported", "fedlora's own ServerApp"):
        strategy = FedLoraStrategy("qfedavg", alpha=8)
        strategy._plan(strategy.rule.init(open_workspace(tiny_config()).base.initial_adapter(0)))
