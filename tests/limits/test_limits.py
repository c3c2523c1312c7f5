"""Where two rules must give the same, and where a rule must give something known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import Aggregator, ClientUpdate, GlobalState, broadcast_change
from fedlora.aggregators.fair import Fair
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flora import Flora
from fedlora.lowrank import DeltaSum

O, I, R, S = 10, 16, 4, 2.0  # noqa: E741
WEIGHTS = (1.0, 4.0, 2.0, 3.0)
ALL = [FedAvg(), FfaLora(), Flora(), Fair(), Fair(0.0), Fair(solver="cosine", steps=50, lr=0.5)]


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters(same_A: bool = False, same_B: bool = False) -> list[AdapterState]:
    return [
        AdapterState(
            {"m": LoraPair(noise(R, I, seed=0 if same_A else k), noise(O, R, seed=50 if same_B else 50 + k), S)},
            {"head": noise(3, seed=100 if same_A and same_B else 100 + k)},
        )
        for k in range(4)
    ]


def run(rule: Aggregator, clients: list[AdapterState]) -> tuple[GlobalState, torch.Tensor, DeltaSum]:
    """State after, dense change, and ideal sum (times the total weight)."""
    first = clients[0].pairs["m"]
    start = AdapterState({"m": LoraPair(first.A, torch.zeros_like(first.B), first.scale)}, {"head": torch.zeros(3)})
    before = rule.init(start.with_tensors({"head": start.dense["head"].double()}))
    after = rule.aggregate(before, [ClientUpdate(k, c, WEIGHTS[k]) for k, c in enumerate(clients)])
    ideal = DeltaSum()
    for k, client in enumerate(clients):
        ideal.add(client.pairs, WEIGHTS[k])
    change = torch.stack([c * p.scale * p.B @ p.A for c, p in broadcast_change(before, after).terms("m")]).sum(0)
    return after, change, ideal


def error(rule: Aggregator, clients: list[AdapterState]) -> float:
    _, change, ideal = run(rule, clients)
    wanted = torch.stack([c * p.scale * p.B @ p.A for c, p in ideal.terms("m")]).sum(0) / sum(WEIGHTS[: len(clients)])
    return float((change - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_one_client_alone_is_exact(rule: Aggregator) -> None:
    assert error(rule, adapters()[:1]) < 1e-12


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_equal_clients_are_that_client(rule: Aggregator) -> None:
    clients = adapters(same_A=True, same_B=True)
    state, change, _ = run(rule, clients)
    torch.testing.assert_close(change, clients[0].pairs["m"].delta(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.adapter.dense["head"], clients[0].dense["head"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_clients_of_equal_a_are_averaged_exactly_by_every_rule(rule: Aggregator) -> None:
    """FLoRA of equal A is FedAvg of B, and so is FFA-LoRA: with one A the product is linear in B."""
    clients = adapters(same_A=True)
    _, change, _ = run(rule, clients)
    _, fedavg, _ = run(FedAvg(), clients)
    torch.testing.assert_close(change, fedavg, rtol=1e-12, atol=1e-12)
    assert error(rule, clients) < 1e-12


@pytest.mark.parametrize("rule", [FedAvg(), Flora()], ids=repr)
def test_clients_of_equal_b_are_averaged_exactly_too(rule: Aggregator) -> None:
    assert error(rule, adapters(same_B=True)) < 1e-12


def test_factor_averaging_is_not_product_averaging() -> None:
    clients = adapters()
    assert error(FedAvg(), clients) > 0.3
    assert error(Fair(0.0), clients) < error(FedAvg(), clients)
    assert error(Flora(), clients) < 1e-12


def test_fair_becomes_fedavg_as_lambda_grows() -> None:
    clients = adapters()
    fedavg = run(FedAvg(), clients)[0].adapter.pairs["m"].B
    gaps = [
        float((run(Fair(10.0**power), clients)[0].adapter.pairs["m"].B - fedavg).norm()) for power in (0, 2, 4, 6, 12)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-10 * float(fedavg.norm())
    by_cosine = run(Fair(1e6, "cosine", steps=50, lr=0.5), clients)[0].adapter.pairs["m"].B
    assert torch.equal(by_cosine, fedavg)


def test_fair_without_a_penalty_is_the_projection_on_the_mean_a() -> None:
    clients = adapters()
    _, change, ideal = run(Fair(0.0), clients)
    wanted = torch.stack([c * p.scale * p.B @ p.A for c, p in ideal.terms("m")]).sum(0) / sum(WEIGHTS)
    A = run(FedAvg(), clients)[0].adapter.pairs["m"].A
    torch.testing.assert_close(change, wanted @ torch.linalg.pinv(A) @ A, rtol=1e-10, atol=1e-10)


def test_fairs_solvers_agree_on_the_direction_without_a_penalty() -> None:
    clients = adapters()
    closed, change, _ = run(Fair(0.0), clients)
    cosine, turned, _ = run(Fair(0.0, "cosine", steps=3000, lr=2.0), clients)
    angle = float((change * turned).sum() / change.norm() / turned.norm())
    assert 1 - angle < 1e-9
    # The cosine leaves the length open, so the two B are not the same.
    assert not torch.allclose(closed.adapter.pairs["m"].B, cosine.adapter.pairs["m"].B, rtol=1e-3)


@pytest.mark.parametrize("solver", ["closed", "cosine"])
@pytest.mark.parametrize("regularisation", [0.0, 0.01])
@pytest.mark.parametrize("case", ["rank-deficient", "zero A", "zero B", "opposite B", "all zero", "zero scale"])
def test_fair_gives_numbers_where_a_matrix_cannot_be_inverted(solver: str, regularisation: float, case: str) -> None:
    clients = []
    for k, client in enumerate(adapters()[:2]):
        pair = client.pairs["m"]
        A, B, scale = pair.A.clone(), pair.B.clone(), pair.scale
        if case == "rank-deficient":
            A[2] = A[0] + A[1]
            A[3] = 0
        elif case == "zero A":
            A.zero_()
        elif case == "zero B":
            B.zero_()
        elif case == "opposite B":
            B = (adapters()[0].pairs["m"].B) * (1.0 if k == 0 else -WEIGHTS[0] / WEIGHTS[1])
        elif case == "all zero":
            A.zero_()
            B.zero_()
        elif case == "zero scale":
            scale = 0.0
        clients.append(AdapterState({"m": LoraPair(A, B, scale)}, client.dense))
    rule = Fair(regularisation) if solver == "closed" else Fair(regularisation, "cosine", steps=20)
    state, change, _ = run(rule, clients)
    assert bool(torch.isfinite(change).all())
    assert all(bool(torch.isfinite(value).all()) for value in state.adapter.tensors().values())
    assert all(math.isfinite(value) for value in state.metrics.values())
    if case == "rank-deficient" and solver == "closed":
        assert error(rule, clients) <= error(FedAvg(), clients)
        # Of all minimisers the smallest one: nothing is put where the mean A cannot see it.
        full = run(Fair(1e-9), clients)[0].adapter.pairs["m"].B
        torch.testing.assert_close(state.adapter.pairs["m"].B, full, rtol=0.1, atol=0.1)


def test_fair_in_float32_sees_no_direction_in_rounding() -> None:
    """Rows of A that differ by float32 rounding are one direction; dividing by their difference would give 1e7."""
    clients = []
    for client in adapters():
        pair = client.pairs["m"]
        A = pair.A.float()
        A[1] = A[0] * (1 + 1e-7)
        clients.append(AdapterState({"m": LoraPair(A, pair.B.float(), S)}, client.dense))
    state, _, _ = run(Fair(0.0), clients)
    assert float(state.adapter.pairs["m"].B.abs().max()) < 10


@pytest.mark.parametrize("rule", [FfaLora(), Flora()], ids=repr)
def test_a_client_of_no_weight_to_speak_of_has_no_say(rule: Aggregator) -> None:
    clients = adapters(same_A=True)
    _, without, _ = run(rule, clients[:1])
    start = AdapterState({"m": replace(clients[0].pairs["m"], B=torch.zeros(O, R).double())}, clients[0].dense)
    before = rule.init(start)
    after = rule.aggregate(before, [ClientUpdate(0, clients[0], 1e18), ClientUpdate(1, clients[1], 1e-3)])
    change = torch.stack([c * p.scale * p.B @ p.A for c, p in broadcast_change(before, after).terms("m")]).sum(0)
    torch.testing.assert_close(change, without, rtol=1e-12, atol=1e-12)
