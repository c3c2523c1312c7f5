"""SCAFFOLD and FedDyn against their papers: two quadratics, the algorithms transcribed, and who is missing in a round.

Clients minimise f_k(y) = h_k / 2 (y - c_k)^2 by K = 5 gradient steps of rate 0.1. Karimireddy et al., ICML 2020, arXiv
1910.06378, algorithm 1; Acar et al., ICLR 2021, arXiv 2111.04263, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.adapter import AdapterState
from fedlora.aggregators import Aggregator, Claim, ClientSpec, ClientUpdate, GlobalState, load_aggregator
from fedlora.aggregators.drift import FedDyn, Scaffold
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.krum import Krum
from fedlora.aggregators.personal import Keep
from fedlora.aggregators.rolora import RoLora
from fedlora.errors import ConfigError, RuleError
from fedlora.testing._toy import saved

RATE, STEPS = 0.1, 5
SLOPES, CENTRES = (1.0, 4.0), (1.0, -1.0)
Round = Sequence[int]


def play(
    rule: Aggregator,
    rounds: Sequence[Round],
    slopes: Sequence[float] = SLOPES,
    centres: Sequence[float] = CENTRES,
    weights: Sequence[float] | None = None,
    keep: Callable[[GlobalState], GlobalState] = lambda state: state,
) -> list[float]:
    """x after each round, from 0; in each the given clients answer."""
    state, found = rule.init(AdapterState(dense={"x": torch.zeros(1, dtype=torch.float64)})), []
    for clients in rounds:
        updates = []
        for k in clients:
            plan = rule.plan(state, ClientSpec(k, {}))
            start = float(plan.adapter.dense["x"])
            y, tilt = start, float(plan.tilt.get("x", 0.0))
            for _ in range(STEPS):
                y -= RATE * (slopes[k] * (y - centres[k]) + tilt + plan.proximal_mu * (y - start))
            sent = AdapterState(dense={"x": torch.tensor([y], dtype=torch.float64)})
            facts = {"rates": RATE * STEPS, "clients": float(len(slopes))}
            updates.append(ClientUpdate(k, sent, 1.0 if weights is None else weights[k], facts=facts))  # type: ignore[arg-type]
        state = keep(rule.aggregate(state, updates))
        found.append(float(state.adapter.dense["x"]))
    return found


@pytest.mark.parametrize(
    ("rule", "first", "end"),
    [
        (FedAvg(), (-0.256365, -0.342022955625, -0.370643420048203), -0.385004693073024),
        (Scaffold(), (-0.256365, -0.461181286875, -0.560743053677308), -0.6),
        (FedDyn(0.5), (-0.473289375, -0.587865000063867, -0.553243258413267), -0.6),
    ],
    ids=["fedavg", "scaffold", "feddyn"],
)
def test_the_optimum_is_reached_by_those_that_correct_the_drift(
    rule: Aggregator, first: tuple[float, ...], end: float
) -> None:
    found = play(rule, [(0, 1)] * 200)
    assert found[:3] == pytest.approx(first, rel=1e-12)
    assert found[-1] == pytest.approx(end, rel=1e-9)


def test_the_optimum_is_that_of_the_weighted_sum() -> None:
    """sum_k n_k h_k (x - c_k) = 0, where FedAvg stops elsewhere."""
    weights = (3.0, 1.0)
    wanted = (3 * 1 * 1 + 1 * 4 * -1) / (3 * 1 + 1 * 4)
    for rule in (Scaffold(), FedDyn(0.5)):
        assert play(rule, [(0, 1)] * 400, weights=weights)[-1] == pytest.approx(wanted, rel=1e-8)
    assert abs(play(FedAvg(), [(0, 1)] * 400, weights=weights)[-1] - wanted) > 0.01


DRAW = np.random.default_rng(3)
FIVE = {"slopes": DRAW.uniform(0.5, 4.0, 5).tolist(), "centres": DRAW.normal(size=5).tolist()}
SAMPLED = [sorted(DRAW.choice(5, size, replace=False).tolist()) for size in (2, 2, 1, 3, 5, 2, 1, 4, 2, 2)]


def scaffold_of_the_paper(rounds: Sequence[Round]) -> list[float]:
    """Algorithm 1 with option II and eta_g = 1: client k keeps c_k, and c moves by |S| / N times their mean change."""
    x, c, own, found = 0.0, 0.0, [0.0] * 5, []
    for clients in rounds:
        steps, changes = [], []
        for k in clients:
            y = x
            for _ in range(STEPS):
                y -= RATE * (FIVE["slopes"][k] * (y - FIVE["centres"][k]) + c - own[k])
            new = own[k] - c + (x - y) / (STEPS * RATE)
            steps.append(y - x)
            changes.append(new - own[k])
            own[k] = new
        x, c = x + sum(steps) / len(clients), c + len(clients) / 5 * sum(changes) / len(clients)
        found.append(x)
    return found


def feddyn_of_the_paper(rounds: Sequence[Round], alpha: float) -> list[float]:
    """Algorithm 1 with K gradient steps for the argmin: g_k <- g_k - alpha (y - x), h <- h - alpha / m sum (y - x)."""
    x, h, own, found = 0.0, 0.0, [0.0] * 5, []
    for clients in rounds:
        ends = []
        for k in clients:
            y = x
            for _ in range(STEPS):
                y -= RATE * (FIVE["slopes"][k] * (y - FIVE["centres"][k]) - own[k] + alpha * (y - x))
            own[k] -= alpha * (y - x)
            ends.append(y)
        h -= alpha / 5 * sum(y - x for y in ends)
        x = sum(ends) / len(clients) - h / alpha
        found.append(x)
    return found


@pytest.mark.parametrize(
    ("rule", "paper"),
    [(Scaffold(), scaffold_of_the_paper), (FedDyn(0.3), lambda rounds: feddyn_of_the_paper(rounds, 0.3))],
    ids=["scaffold", "feddyn"],
)
def test_with_some_clients_a_round_it_is_the_papers_algorithm(
    rule: Aggregator, paper: Callable[[Sequence[Round]], list[float]]
) -> None:
    """Whether all have answered before or not, and after each round from a checkpoint too."""
    wanted = paper(SAMPLED)
    assert play(rule, SAMPLED, **FIVE) == pytest.approx(wanted, rel=1e-12)
    assert play(rule, SAMPLED, **FIVE, keep=saved) == pytest.approx(wanted, rel=1e-12)


def test_what_an_inner_rule_does_not_send_keeps_its_variate() -> None:
    """RoLoRA's idle factor has no tilt, and its variate is there when it is trained again."""
    from fedlora.testing import AggregatorContract

    federation = type("Toy", (AggregatorContract,), {"aggregator": Scaffold(RoLora())})()
    state = federation.states()[0]
    seen = []
    for _ in range(4):
        plan = federation.aggregator.plan(state, federation.specs()[0])
        seen.append({name[-1] for name in plan.tilt if name[-2] == ":"})
        assert plan.tilt.keys() <= plan.adapter.tensors(plan.sends).keys()
        state = federation.next(state)
    assert seen[2:] in ([{"A"}, {"B"}], [{"B"}, {"A"}])


def test_claims_and_refusals() -> None:
    assert Scaffold(load_aggregator("ffa", {})).claims == Claim.EXACT
    assert Claim.ROBUST in Krum(inner=Scaffold()).claims
    assert Claim.PERSONAL in Keep(inner=FedDyn()).claims
    with raises(ConfigError, "no-step", "changes the base"):
        Scaffold(load_aggregator("flora", {}))
    for rule in (Scaffold, FedDyn):
        with raises(ConfigError, "robust-inside", "around this one"):
            rule(inner=load_aggregator("krum", {}))
    with raises(ConfigError, "rule-not-linear"):
        load_aggregator("median", {"inner": "scaffold"})
    for alpha in (0.0, -1.0, math.nan):
        with raises(ConfigError, "out-of-range", "alpha"):
            FedDyn(alpha)
    state = Scaffold().init(AdapterState(dense={"x": torch.zeros(1)}))
    with raises(RuleError, "fact-missing", "'clients'"):
        Scaffold().aggregate(state, [ClientUpdate(0, state.adapter, 1.0)])
