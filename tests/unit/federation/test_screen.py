"""Which replies are used: values, norms, weights and figures, each refused by the check that it is meant for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.errors import raises
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientPlan
from fedlora.config import RunConfig, parse_config
from fedlora.errors import ReplyError
from fedlora.federation.client_pool import ClientReply
from fedlora.federation.plausibility import COUNTED_LOSS, START_LOSS, Expectations, median_loss
from fedlora.federation.protocol import TrainRequest
from fedlora.federation.screen import FIGURES, Screen, l2_norm
from fedlora.privacy.disclosure import REFUSED
from fedlora.training.workspace import Workspace
from fedlora.wire_formats import decode_change, encode_change, header_of

PLAN = ClientPlan(AdapterState({"m": LoraPair(torch.ones(4, 8), torch.ones(6, 4), 2.0)}, {"head": torch.zeros(2)}))
REQUEST = TrainRequest(PLAN, 5, 1, "base")
HELD = 700
"""Examples of client 1."""
GOOD = {"num_examples": 7, "loss": 0.5}
CENTRAL = (
    *("privacy.unit=client", "privacy.noise_multiplier=1", "privacy.delta=1e-3", "privacy.clip_norm=1"),
    *("server.aggregation_error=false", "server.weighting=uniform"),
)


def config_of(*overrides: str) -> RunConfig:
    return parse_config("", ["server.max_examples=1000", "server.max_norm=100.0", *overrides])


def own_data(*overrides: str) -> RunConfig:
    return config_of("data={source='nodes', test='test.csv'}", "partition={name='nodes', clients=4}", *overrides)


def admit(
    tensors: dict[str, Tensor] | None = None,
    figures: Mapping[str, object] = GOOD,
    config: RunConfig | None = None,
    request: TrainRequest = REQUEST,
    **expected: Any,
) -> Any:
    """What the screen makes of a reply in which these tensors are others."""
    data = SimpleNamespace(clients=[range(0), range(HELD)])
    screen = Screen(config or config_of(), cast("Workspace", SimpleNamespace(data=data)))
    sent = {**request.starts, **(tensors or {})}
    return screen.admit(ClientReply(request.client_id), request, sent, figures, Expectations(**expected))


def test_a_valid_reply_is_admitted_with_its_values() -> None:
    found = admit({"head": torch.tensor([3.0, 4.0])})
    assert found.update.client_id == 1
    assert found.update.num_examples == 7
    assert torch.equal(found.update.adapter.dense["head"], torch.tensor([3.0, 4.0]))
    assert torch.equal(found.update.adapter.pairs["m"].A, torch.ones(4, 8))
    assert found.figures == {**GOOD, "update_norm": 5.0}


@pytest.mark.parametrize(
    ("tensor", "code", "named"),
    [
        (torch.full((4, 8), math.nan), "not-finite", "m:A"),
        (torch.full((4, 8), math.inf), "not-finite", "m:A"),
        (torch.full((4, 8), 1e4), "norm-above-maximum", "max_norm"),
        (torch.full((4, 8), 3e38), "norm-above-maximum", "max_norm"),
    ],
)
def test_values_that_nobody_trains_are_refused(tensor: Tensor, code: str, named: str) -> None:
    with raises(ReplyError, code, named):
        admit({"m:A": tensor})


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (b"\0\0\xc0\x7f", "not-finite"),  # NaN
        (b"\0\0\x80\x7f", "not-finite"),  # infinite
        (b"\xff\xff\x7f\x7f", "not-finite"),  # the largest, times its codes
        (b"\0\0\0\x60", "norm-above-maximum"),
    ],
)
def test_rounded_values_are_judged_by_what_they_decode_to(step: bytes, code: str) -> None:
    start = REQUEST.starts["m:A"]
    header = header_of("int8", start.dtype, (4, 8))
    data = encode_change(header, start + 0.1, start, 0)
    decoded = decode_change(header, step + data[4:], start)
    with raises(ReplyError, code):
        admit({"m:A": decoded})


@pytest.mark.parametrize(
    ("figures", "code", "named"),
    [
        ({"num_examples": 10**18}, "invalid-weight", "max_examples"),
        ({"num_examples": HELD + 1}, "invalid-weight", HELD),
        ({"num_examples": -3}, "invalid-weight", -3),
        ({"num_examples": 0}, "invalid-weight", 0),
        ({"num_examples": math.nan}, "invalid-weight", "whole number"),
        ({"num_examples": 7.0}, "invalid-weight", "whole number"),
        ({"num_examples": True}, "invalid-weight", "whole number"),
        ({"num_examples": [1, 2]}, "invalid-weight", "whole number"),
        ({"num_examples": None}, "invalid-weight", "whole number"),
        ({"loss": math.nan}, "invalid-metric", "loss"),
        ({"loss": math.inf}, "invalid-metric", "loss"),
        ({"loss": 10**400}, "invalid-metric", "loss"),
        ({"loss": [1.0, 2.0]}, "invalid-metric", "loss"),
        ({"seconds": -1.0}, "invalid-metric", "seconds"),
        ({"steps": 1e308}, "invalid-metric", "steps"),
        ({"password": 1.0}, "unexpected-metric", "password"),
    ],
)
def test_figures_that_no_client_measures_are_refused(figures: dict[str, Any], code: str, named: object) -> None:
    with raises(ReplyError, code, named):
        admit(figures={**GOOD, **figures})


def test_any_figure_that_a_client_measures_is_admitted() -> None:
    figures = dict.fromkeys(FIGURES, 1.0)
    assert figures.items() <= admit(figures={**GOOD, **figures}).figures.items()


def test_what_a_rule_asks_to_know_is_the_servers_own_knowledge() -> None:
    """Of a client of the partition it knows the number of examples, whatever that one claims, and so its rates."""
    request = replace(REQUEST, plan=replace(PLAN, asks=frozenset({"rates", "clients"})))
    keys = ("train.lr=0.5", "train.batch_size=100", "train.warmup_steps=1")
    facts = admit(request=request, config=config_of(*keys)).update.facts
    assert facts == {"clients": 2.0, "rates": 0.5 * 0.5 + 6 * 0.5}
    claimed = admit(figures={**GOOD, "num_examples": 250}, request=request, config=own_data(*keys)).update.facts
    assert claimed == {"clients": 2.0, "rates": 0.5 * 0.5 + 2 * 0.5}
    assert admit().update.facts == {}


LOSS = replace(REQUEST, plan=replace(PLAN, asks=frozenset({START_LOSS})))


@pytest.mark.parametrize(
    ("figures", "code"),
    [
        ({}, "metric-missing"),
        ({START_LOSS: math.nan}, "invalid-metric"),
        ({START_LOSS: math.inf}, "invalid-metric"),
        ({START_LOSS: -1e-9}, "invalid-metric"),
        ({START_LOSS: 1e14}, "invalid-metric"),
        ({START_LOSS: "0.5"}, "invalid-metric"),
    ],
)
def test_a_loss_that_a_rule_asks_for_must_be_one(figures: dict[str, Any], code: str) -> None:
    with raises(ReplyError, code, START_LOSS):
        admit(figures={**GOOD, **figures}, request=LOSS)


def test_a_task_with_negative_losses_is_told_what_the_rule_needs() -> None:
    with raises(ReplyError, "invalid-metric", "'fedavg' goes by losses that are not negative"):
        admit(figures={**GOOD, START_LOSS: -0.3}, request=LOSS)


def test_a_loss_that_no_rule_asks_for_is_refused() -> None:
    with raises(ReplyError, "unexpected-metric", START_LOSS):
        admit(figures={**GOOD, START_LOSS: 0.5})


@pytest.mark.parametrize(
    ("claimed", "before", "counted"),
    [(0.5, None, 0.5), (0.0, None, 0.0), (1e9, None, 1e9), (1e9, 0.25, 2.5), (2.4, 0.25, 2.4), (3.0, 0.0, 0.0)],
)
def test_a_loss_counts_ten_times_the_others_at_most(claimed: float, before: float | None, counted: float) -> None:
    """And is written down as it came."""
    found = admit(figures={**GOOD, START_LOSS: claimed}, request=LOSS, median_loss=before)
    assert found.update.facts == {START_LOSS: counted + 1e-10}
    assert found.figures[START_LOSS] == claimed
    assert found.figures.get(COUNTED_LOSS, claimed) == counted


def test_a_round_of_lies_moves_the_bound_by_ten_times_at_most() -> None:
    before = 0.5
    for _ in range(4):
        rows = [admit(figures={**GOOD, START_LOSS: loss}, request=LOSS, median_loss=before).figures
                for loss in (0.5, 1e12, 1e13)]  # fmt: skip
        after = median_loss([{"clients": dict(enumerate(rows))}])
        assert after == 10 * before
        before = after


def test_a_change_far_above_the_others_is_refused_only_where_it_is_compared() -> None:
    far = {"head": torch.tensor([80.0, 0.0])}
    with raises(ReplyError, "implausible-change", "max_norm_ratio"):
        admit(far, config=config_of("server.max_norm_ratio=10"), median_change=0.5)
    assert admit(far, config=config_of("server.max_norm_ratio=10"), median_change=9.0)
    assert admit(far, config=config_of("server.max_norm_ratio=off"), median_change=0.5)


def test_a_change_whose_squares_overflow_is_implausible() -> None:
    start = {"w": torch.full((4,), 1e300, dtype=torch.float64)}
    request = TrainRequest(ClientPlan(AdapterState({}, {"w": torch.zeros(4, dtype=torch.float64)})), 5, 1, "base")
    with raises(ReplyError, "implausible-change"):
        admit(start, config=config_of().model_copy(update={"server": parse_config("", []).server}), request=request)


@pytest.mark.parametrize(
    ("tensors", "figures"),
    [
        ({"m:A": torch.full((4, 8), math.nan)}, {"num_examples": 1}),
        ({}, {"num_examples": 3}),
        ({}, {"num_examples": 1, "loss": 0.5}),
    ],
)
def test_under_user_level_privacy_a_refusal_says_nothing_of_the_values(
    tensors: dict[str, Tensor], figures: dict[str, Any]
) -> None:
    with pytest.raises(ReplyError) as caught:
        admit(tensors, figures, parse_config("", CENTRAL))
    assert str(caught.value) == REFUSED


def test_under_user_level_privacy_a_large_change_is_admitted_and_no_figure_of_it_written_down() -> None:
    found = admit({"head": torch.tensor([1e9, 0.0])}, {"num_examples": 1}, parse_config("", CENTRAL), median_change=0.5)
    assert found.figures == {"num_examples": 1.0}


# ------------------------------------------------------------------------------------------------ weights


def test_a_client_of_the_partition_weighs_its_examples_and_a_uniform_one_1() -> None:
    assert admit().update.num_examples == 7
    assert admit(config=config_of("server.weighting=uniform")).update.num_examples == 1


def test_examples_that_nobody_can_count_weigh_no_more_than_the_others_allow() -> None:
    claims = {0: 10, 1: 1000, 2: 10, 3: 10}
    found = admit(figures={"num_examples": 1000}, config=own_data("server.max_weight_ratio=10"), claims=claims)
    assert found.update.num_examples == 100
    assert (found.figures["num_examples"], found.figures["weight"]) == (1000, 100)
    free = admit(figures={"num_examples": 1000}, config=own_data("server.max_weight_ratio=off"), claims=claims)
    assert free.update.num_examples == 1000
    assert "weight" not in free.figures


# ------------------------------------------------------------------------------------------------ norms


def test_a_norm_is_that_of_all_entries_together_and_infinite_rather_than_wrong() -> None:
    assert l2_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]) == 5.0
    assert l2_norm([]) == 0.0
    assert l2_norm([torch.full((2,), 3e38)]) == pytest.approx(3e38 * math.sqrt(2))
    assert l2_norm([torch.full((2,), 1e300, dtype=torch.float64)]) == math.inf
    assert l2_norm([torch.tensor([math.nan])]) == math.inf
    tensor, before = torch.tensor([3.0, 2.0, 3.0]), torch.ones(3)
    assert l2_norm([tensor], before) == 3.0
    assert (tensor.tolist(), before.tolist()) == ([3.0, 2.0, 3.0], [1.0, 1.0, 1.0]), "they are kept as they are"
