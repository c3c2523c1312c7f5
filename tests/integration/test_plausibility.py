"""One client cannot decide a round by what it claims: norms, weights, losses and ranks beside those of the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median_low
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import raises
from support.federations import weights
from support.on_a_grid import grid_of, serve_on
from support.tiny_federations import MakeConfig

from fedlora.config import RunConfig
from fedlora.errors import RoundError, RuleError
from fedlora.federation.plausibility import (
    COUNTED_LOSS,
    FIRST,
    START_LOSS,
    UPDATE_NORM,
    largest_change,
    largest_weight,
    median_change,
    median_loss,
    no_losses,
)
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.arrays import from_array, to_array
from fedlora.flower.messages import BUFFER
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid

positive = st.floats(1e-6, 1e6)


def line(*norms: float) -> dict[str, Any]:
    return {"clients": {str(k): {UPDATE_NORM: norm} for k, norm in enumerate(norms)}}


# ------------------------------------------------------------------------------------------------ the bounds


@settings(max_examples=40, deadline=None)
@given(st.lists(positive, min_size=3, max_size=9), st.randoms())
def test_the_bound_does_not_depend_on_order_and_no_minority_moves_it_far(norms: list[float], draw: Any) -> None:
    shuffled = draw.sample(norms, len(norms))
    assert median_change([line(*norms)]) == median_change([line(*shuffled)])
    liars = (len(norms) - 1) // 2
    moved = median_change([line(*sorted(norms)[liars:], *[1e300] * liars)])
    assert moved is not None
    assert moved <= max(norms)


def test_the_last_round_with_enough_clients_counts() -> None:
    assert median_change([]) is None
    assert median_change([{"round": 0}, line(1.0, 2.0)]) is None
    assert median_change([line(1.0, 2.0, 9.0), line(5.0, 6.0)]) == 2.0
    assert median_change([line(1.0, 2.0, 9.0), line(5.0, 6.0, 7.0), {"clients": {"0": {"num_examples": 3}}}]) == 6.0


@settings(max_examples=40, deadline=None)
@given(positive, positive, st.floats(1.1, 1e4))
def test_a_change_of_the_others_size_is_never_too_large(start: float, before: float, ratio: float) -> None:
    assert largest_change(start, before, ratio) >= ratio * before * (1 - 1e-12)
    assert largest_change(start, before, ratio) <= largest_change(2 * start, before, ratio)
    assert largest_change(start, None, ratio) == pytest.approx(FIRST * ratio * max(1.0, start))
    assert largest_change(start, 0.0, ratio) > 0  # where nobody changed anything the next one may


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=30))
def test_no_claim_gives_more_than_the_others_allow(counts: list[int]) -> None:
    claims = dict(enumerate(counts))
    for liar in claims:
        most = largest_weight(liar, {**claims, liar: 10**7}, 10.0)
        others = [count for client_id, count in claims.items() if client_id != liar]
        assert most <= max(10 * max(others), sum(others) / 3)
        share = most / (most + sum(others))
        assert share <= max(0.25, 10 * max(others) / (10 * max(others) + sum(others))) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=3, max_size=30))
def test_clients_within_ten_times_the_median_count_in_full(counts: list[int]) -> None:
    claims = dict(enumerate(counts))
    for client_id, count in claims.items():
        if count <= 10 * median_low(counts):
            assert largest_weight(client_id, claims, 10.0) >= count
    assert largest_weight(0, {0: 10**7, 1: 1}, 10.0) == math.inf  # of two nobody is the median


def test_the_largest_median_loss_of_all_rounds_counts() -> None:
    def losses(*values: float) -> dict[str, Any]:
        return {"clients": {str(k): {START_LOSS: value} for k, value in enumerate(values)}}

    assert median_loss([{"round": 0}, losses(1.0, 9.0), line(1.0, 2.0, 3.0)]) is None
    assert median_loss([losses(0.5, 0.7, 1e300), losses(0.1, 0.1, 0.2), losses(5.0, 6.0)]) == 0.7
    bounded = [{START_LOSS: 0.5}, *[{START_LOSS: 1e13, COUNTED_LOSS: 7.0}] * 2]
    assert median_loss([losses(0.5, 0.7, 0.9), {"clients": dict(enumerate(bounded))}]) == 7.0


def test_losses_that_no_model_has() -> None:
    assert no_losses({}) == []
    assert no_losses({0: 0.7, 1: 0.6, 2: 1.7e308, 3: -1e9}) == [2, 3]
    assert no_losses({0: 0.001, 1: 0.002, 2: 11.0}) == []  # a classifier that has not learnt beside two that have
    assert no_losses({0: 5e4, 1: 6e4, 2: 7e4}) == []


# ------------------------------------------------------------------------------------------------ in a run


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RecordDict, int], object]], None]:
    """Client 2's replies are changed by a function of their content and the round."""

    def install(change: Callable[[RecordDict, int], object]) -> None:
        real = LoopbackGrid._answer

        def answer(self: LoopbackGrid, message: Message) -> Message:
            reply = real(self, message)
            if message.metadata.dst_node_id == 4 and message.metadata.message_type == "train":
                change(reply.content, int(message.metadata.group_id))
            return reply

        monkeypatch.setattr(LoopbackGrid, "_answer", answer)

    return install


def scaled(factor: float, *rounds: int) -> Callable[[RecordDict, int], None]:
    def change(content: RecordDict, number: int) -> None:
        arrays = content.array_records["update"]
        if number in rounds:
            values = np.frombuffer(from_array(arrays[BUFFER]), "<f4") * np.float32(factor)
            arrays[BUFFER] = to_array(values.tobytes())

    return change


def metrics(**values: Any) -> Callable[[RecordDict, int], object]:
    return lambda content, number: content.metric_records["metrics"].update(values)


def run(config: RunConfig) -> RunOutcome:
    return serve_on(grid_of(config), config)


def simulate(config: RunConfig) -> RunOutcome:
    return run_simulation(config, RunDir.create(config, overwrite=True))


def test_an_update_that_is_far_too_large_is_refused_in_the_first_round_and_later(
    tiny_config: MakeConfig, lying: Callable[[Any], None]
) -> None:
    for factor, number in ((1e19, 1), (2e4, 2), (1e10, 4)):
        lying(scaled(factor, number))
    for record in run(tiny_config("runtime.cohort=1", "rounds=4", "train.steps=1")).records[1:]:
        if record["round"] == 3:
            assert record["answered"] == [0, 1, 2, 3]
        else:
            assert record["answered"] == [0, 1, 3]
            assert "max_norm_ratio" in record["refused"]["2"]


@pytest.mark.slow
def test_the_bound_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    tiny_config: MakeConfig, lying: Callable[[Any], None]
) -> None:
    lying(scaled(2e4, 3))
    whole = run(tiny_config("runtime.cohort=1", name="whole"))
    assert list(whole.records[3]["refused"]) == ["2"]
    first = run(tiny_config("runtime.cohort=1", "rounds=2", name="parts"))
    more = tiny_config("runtime.cohort=1", name="parts")
    rest = serve_on(grid_of(more), more, rundir=RunDir.open(first.rundir.path, more), resume=True)
    assert rest.records[3]["refused"] == whole.records[3]["refused"]
    assert weights(rest) == weights(whole)


def test_unequal_clients_are_not_harmed(tiny_config: MakeConfig) -> None:
    """Shares from a few examples to most of them, a learning rate that is far too large: the bounds change no bit."""
    uneven = ("partition.name=quantity", "partition.clients=4", "partition.alpha=0.3", "train.lr=0.3")
    results = [
        simulate(tiny_config(*uneven, f"server.max_norm_ratio={ratio}", name=str(ratio))) for ratio in (100.0, "off")
    ]
    assert weights(results[0]) == weights(results[1])
    assert all(record["answered"] == [0, 1, 2, 3] for record in results[0].records[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"num_examples": 10_000_000}, "max_examples"),
        ({"seconds": 1e308}, "seconds"),
        ({"seconds": -1.0}, "seconds"),
        ({"steps": 1e308}, "steps"),
        ({"examples_seen": -5.0}, "examples_seen"),
    ],
)
def test_figures_that_no_client_has_are_refused(
    values: dict[str, Any], word: str, tiny_config: MakeConfig, lying: Callable[[Any], None]
) -> None:
    lying(metrics(**values))
    record = run(tiny_config("runtime.cohort=1", "rounds=1", "train.steps=1")).records[1]
    assert word in record["refused"]["2"]
    assert record["answered"] == [0, 1, 3]


@pytest.mark.parametrize("loss", [1.7e308, -1.7e308, 1e9])
def test_a_loss_far_from_all_others_is_left_out_of_the_mean(
    loss: float, tiny_config: MakeConfig, lying: Callable[[Any], None]
) -> None:
    lying(metrics(loss=loss))
    outcome = run(tiny_config("runtime.cohort=1", "rounds=1", "train.steps=1"))
    record = outcome.records[1]
    assert record["answered"] == [0, 1, 2, 3]
    assert record["loss_left_out"] == [2]
    assert "loss" not in record["clients"]["2"]
    assert 0 < record["train_loss"] < 2


# ------------------------------------------------------------------------------------------------ ranks


def federate(config: RunConfig, **ranks: int) -> RunOutcome:
    """Nodes of which some ask for a rank in their own config: k3=17 is client 3."""
    nodes = [{"partition-id": k, **({"rank": ranks[f"k{k}"]} if f"k{k}" in ranks else {})} for k in range(4)]
    return serve_on(LoopbackGrid(client_app.app, nodes, {"toml": config.to_toml()}), config)


CENTRAL = ("privacy.unit=client", "privacy.noise_multiplier=1", "privacy.delta=1e-3", "privacy.clip_norm=1",
           "server.aggregation_error=false", "server.weighting=uniform")  # fmt: skip


@pytest.mark.parametrize("more", [(), ("strategy.name=ffa",), CENTRAL])
def test_a_node_whose_own_rank_the_rule_cannot_serve_is_set_aside(
    more: tuple[str, ...], tiny_config: MakeConfig
) -> None:
    rank = 17 if more != ("strategy.name=ffa",) else 400
    outcome = federate(tiny_config("rounds=1", "train.steps=1", "server.node_timeout_s=0.1", *more), k1=rank)
    assert outcome.records[1]["asked"] == [0, 2, 3]
    assert "rank" in outcome.records[1]["turned_away"]["3"]


def test_a_rank_above_the_largest_is_refused_and_one_below_is_not(tiny_config: MakeConfig) -> None:
    outcome = federate(
        tiny_config("rounds=1", "train.steps=1", "server.node_timeout_s=0.1", "strategy.name=flora"), k0=33, k1=32, k2=1
    )
    assert outcome.records[1]["asked"] == [1, 2, 3]
    assert "max_rank" in outcome.records[1]["turned_away"]["2"]
    more = tiny_config("rounds=1", "train.steps=1", "strategy.name=flora", "server.max_rank=33")
    assert federate(more, k0=33).records[1]["asked"] == [0, 1, 2, 3]


def test_ranks_that_the_runs_own_config_gives_end_the_run(tiny_config: MakeConfig) -> None:
    with raises(RuleError, "mixed-ranks"):
        federate(tiny_config("clients.ranks=[4,2]"))
    with raises(RoundError, "no-node", "rank 5"):
        federate(tiny_config("server.node_timeout_s=0.1"), k0=5, k1=5, k2=5, k3=5)
