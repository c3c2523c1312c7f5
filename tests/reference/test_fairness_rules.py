"""q-FedAvg and AFL against their papers: the algorithms transcribed, limit cases, and who is missing in a round.

Li et al., ICLR 2020, arXiv 1905.10497, algorithm 2; Mohri et al., ICML 2019, arXiv 1902.00146, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.adapter import AdapterState
from fedlora.aggregators import Aggregator, Claim, ClientSpec, ClientUpdate, GlobalState, load_aggregator
from fedlora.aggregators.fairness import Afl, QFedAvg, on_simplex
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.krum import Krum
from fedlora.errors import ConfigError, RuleError
from fedlora.testing import AggregatorContract
from fedlora.testing._toy import saved

SENT, LOSSES = ((0.1, -0.2), (0.3, 0.1), (-0.1, 0.4)), (0.5, 1.0, 2.0)
EQUAL = (1.0, 1.0, 1.0)


def start(*values: float) -> AdapterState:
    return AdapterState(dense={"w": torch.tensor(values, dtype=torch.float64)})


def one_round(
    rule: Aggregator,
    losses: Sequence[float] = LOSSES,
    weights: Sequence[float] = EQUAL,
    state: GlobalState | None = None,
    who: Sequence[int] = (0, 1, 2),
) -> GlobalState:
    """From w = 0, where client k sends `SENT[k]`."""
    facts = {"clients": 3.0}
    updates = [
        ClientUpdate(k, start(*SENT[k]), weights[k], facts={**facts, "start_loss": losses[k]})  # type: ignore[dict-item]
        for k in who
    ]
    return rule.aggregate(rule.init(start(0.0, 0.0)) if state is None else state, updates)


def values(state: GlobalState) -> list[float]:
    found: list[float] = state.adapter.dense["w"].tolist()
    return found


def q_fedavg_of_the_paper(q: float, L: float, weights: Sequence[float] = EQUAL) -> list[float]:
    w, sent, F, n = np.zeros(2), np.array(SENT), np.array(LOSSES), np.array(weights)
    step = L * (w - sent)
    delta = n[:, None] * F[:, None] ** q * step
    h = n * (q * F ** (q - 1) * (step**2).sum(axis=1) + L * F**q)
    found: list[float] = (w - delta.sum(axis=0) / h.sum()).tolist()
    return found


@pytest.mark.parametrize(
    ("q", "wanted"),
    [(0.0, (0.1, 0.1)), (1.0, (0.022388059701, 0.119402985075)), (5.0, (-0.016630785791, 0.074022246143))],
)
def test_q_fedavg_has_the_reference_values(q: float, wanted: tuple[float, float]) -> None:
    found = values(one_round(QFedAvg(q, lipschitz=10.0)))
    assert found == pytest.approx(wanted, abs=1e-12)
    assert found == pytest.approx(q_fedavg_of_the_paper(q, 10.0), rel=1e-13)


def test_q_fedavg_weighs_clients_by_their_examples_too() -> None:
    weights = (3.0, 1.0, 7.0)
    found = values(one_round(QFedAvg(0.5, lipschitz=4.0), weights=weights))
    assert found == pytest.approx(q_fedavg_of_the_paper(0.5, 4.0, weights), rel=1e-13)


@pytest.mark.parametrize("inner", [FedAvg(), FfaLora(), load_aggregator("fedadam", {})], ids=repr)
def test_q_fedavg_at_0_is_the_inner_rule_to_the_last_bit(inner: Aggregator) -> None:
    one, other = (
        type("Toy", (AggregatorContract,), {"aggregator": rule})() for rule in (QFedAvg(0.0, inner=inner), inner)
    )
    mine, theirs = one.states(torch.float32)[1], other.states(torch.float32)[1]
    for name, value in theirs.adapter.tensors().items():
        assert torch.equal(mine.adapter.tensors()[name], value)


def test_q_fedavg_without_curvature_is_the_mean_by_losses() -> None:
    """L towards 0: the whole step, with the weights n_k F_k^q; one client alone never draws beyond what it sent."""
    share = np.array(LOSSES) ** 2 / (np.array(LOSSES) ** 2).sum()
    assert values(one_round(QFedAvg(2.0, lipschitz=1e-12))) == pytest.approx(share @ np.array(SENT), rel=1e-9)
    for loss in (1e-10, 1.0, 1e30):
        moved = values(one_round(QFedAvg(2.0, lipschitz=5.0), losses=(loss, 1.0, 1.0), who=(0,)))
        assert 0 <= moved[0] / SENT[0][0] <= 1


def test_a_client_that_claims_a_huge_loss_draws_the_model_to_what_it_sent_and_no_further() -> None:
    for rule in (QFedAvg(1.0), Afl(rate=1.0)):
        state = one_round(rule, losses=(0.5, 1.0, 1e12))
        found = values(one_round(rule, losses=(0.5, 1.0, 1e12), state=rule.init(start(0.0, 0.0))))
        assert all(
            min(0, *column) - 1e-12 <= x <= max(0, *column) + 1e-12 for x, *column in zip(found, *SENT, strict=True)
        )
        assert math.isfinite(sum(values(state)))


# ------------------------------------------------------------------------------------------ AFL


def simplex_of_the_paper(point: np.ndarray) -> np.ndarray:
    """By bisection of the threshold, whatever the algorithm."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
    found: np.ndarray = np.maximum(point - low, 0)
    return found


def test_the_projection_is_the_closest_point_of_the_simplex() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        for scale in (0.01, 1.0, 100.0):
            point = generator.normal(size=size) * scale
            found = on_simplex(torch.tensor(point)).numpy()
            assert found == pytest.approx(simplex_of_the_paper(point), abs=1e-9)
            assert found.sum() == pytest.approx(1, abs=1e-9)
    assert on_simplex(torch.tensor([1e30, 3.0, 1e30], dtype=torch.float64)).tolist() == [0.5, 0.0, 0.5]


SLOPES, CENTRES, RATE = (1.0, 4.0), (1.0, -1.0), 0.05


def afl(rule: Aggregator, rounds: int, keep: bool = False) -> list[float]:
    """x after each round where a client makes one gradient step on f_k(x) = h_k / 2 (x - c_k)^2."""
    state, found = rule.init(AdapterState(dense={"x": torch.zeros(1, dtype=torch.float64)})), []
    for _ in range(rounds):
        updates = []
        for k, (slope, centre) in enumerate(zip(SLOPES, CENTRES, strict=True)):
            x = float(rule.plan(state, ClientSpec(k, {})).adapter.dense["x"])
            y = torch.tensor([x - RATE * slope * (x - centre)], dtype=torch.float64)
            facts = {"start_loss": slope / 2 * (x - centre) ** 2, "clients": 2.0}
            updates.append(ClientUpdate(k, AdapterState(dense={"x": y}), 1.0 + k, facts=facts))  # type: ignore[arg-type]
        state = rule.aggregate(state, updates)
        state = saved(state) if keep else state
        found.append(float(state.adapter.dense["x"]))
    return found


def test_afl_is_the_papers_algorithm_and_ends_where_both_losses_are_equal() -> None:
    """Gradient descent on x, projected ascent on lambda, from lambda = (1/2, 1/2); the minimax is at x = -1/3."""
    x, weights, wanted = 0.0, np.full(2, 0.5), []
    slopes, centres = np.array(SLOPES), np.array(CENTRES)
    for _ in range(400):
        losses, gradients = slopes / 2 * (x - centres) ** 2, slopes * (x - centres)
        x, weights = x - RATE * float(weights @ gradients), simplex_of_the_paper(weights + 0.1 * losses)
        wanted.append(x)
    found = afl(Afl(0.1), 400)
    assert found == pytest.approx(wanted, rel=1e-8)
    assert afl(Afl(0.1), 12, keep=True) == found[:12]
    assert found[-1] == pytest.approx(-1 / 3, abs=1e-3)
    assert abs(afl(FedAvg(), 400)[-1] + 1 / 3) > 0.1


def test_clients_that_are_away_count_in_afl_with_the_mean_loss_of_the_round() -> None:
    rule = Afl(0.2)
    state = one_round(rule, who=(0, 1))
    weights = simplex_of_the_paper(np.full(3, 1 / 3) + 0.2 * np.array([0.5, 1.0, 0.75]))  # of client 2 nobody knows
    assert float(state.memory["weight/others"]) == pytest.approx(weights[2])
    state = one_round(rule, losses=(9.0, 0.4, 1.6), state=state, who=(1, 2))
    weights = simplex_of_the_paper(weights + 0.2 * np.array([1.0, 0.4, 1.6]))
    assert [float(state.memory[f"weight/{k}"]) for k in range(3)] == pytest.approx(weights)
    assert float(state.memory["weight/others"]) == 0


def test_a_client_that_claims_a_huge_loss_and_leaves_does_not_stop_the_model(caplog: pytest.LogCaptureFixture) -> None:
    rule = Afl(1.0)
    state = one_round(rule, losses=(0.5, 0.5, 1e13))
    assert [float(state.memory[f"weight/{k}"]) for k in range(3)] == [0, 0, 1]
    assert not caplog.records
    state = one_round(rule, losses=(0.5, 1.0, 0.0), state=state, who=(0, 1))
    assert values(state) == pytest.approx(np.mean(SENT[:2], axis=0), rel=1e-12)  # without weight they share equally
    assert "round 2: all 2 clients that answered have the weight 0 in afl" in caplog.text
    after = one_round(rule, losses=(0.5, 1.0, 0.0), state=state, who=(0, 1))
    assert values(after) == pytest.approx(SENT[1], rel=1e-12)  # and from then on the one with the larger loss counts
    with raises(RuleError, "bad-weight"):
        one_round(rule, state=state, weights=(1.0, math.nan, 1.0), who=(0, 1))


def test_a_client_without_weight_changes_no_bit_of_the_mean_of_the_others() -> None:
    state = one_round(Afl(10.0), losses=(0.1, 5.0, 5.0))
    assert values(one_round(Afl(10.0), state=state)) == values(one_round(Afl(10.0), state=state, who=(1, 2)))


# ------------------------------------------------------------------------------------------ claims and refusals


def test_claims_and_refusals() -> None:
    assert QFedAvg().claims == Afl().claims == Claim.ANY_TENSORS
    assert QFedAvg(inner=FfaLora()).claims == Claim.NONE
    assert Afl(inner=load_aggregator("flora", {})).claims == Claim.CHANGES_BASE | Claim.GAUGE_FREE
    with raises(ConfigError, "no-step", "changes the base"):
        QFedAvg(inner=load_aggregator("flora", {}))
    for rule in (QFedAvg, Afl):
        with raises(ConfigError, "robust-inside", "around this one"):
            rule(inner=Krum())  # type: ignore[operator]
        with raises(RuleError, "fact-missing", "start_loss"):
            state = rule().init(start(0.0))
            rule().aggregate(state, [ClientUpdate(0, state.adapter, 1.0, facts={"clients": 1.0})])
    for bad in (-0.5, 21.0, math.nan):
        with raises(ConfigError, "out-of-range", "q must be"):
            QFedAvg(bad)
    with raises(ConfigError, "out-of-range", "at most 1e"):
        Afl(1e20)
    with raises(RuleError, "out-of-range", "lower q"):
        one_round(QFedAvg(20.0), losses=(1.0, 1e17, 1.0))
    assert math.isfinite(sum(values(one_round(QFedAvg(20.0), losses=(1e-10, 1e13, 1e13)))))
    for bad in (0.0, -1.0, math.inf):
        with raises(ConfigError, "out-of-range", "lipschitz"):
            QFedAvg(lipschitz=bad)
        with raises(ConfigError, "out-of-range", "rate"):
            Afl(bad)
