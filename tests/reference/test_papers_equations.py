"""Each rule against a NumPy float64 transcription of its paper's equations, written from the equations alone.

Nothing here calls the package's own algebra on the reference side: dense d_out x d_in matrices, plain loops.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import Aggregator, ClientUpdate, GlobalState, broadcast_change
from fedlora.aggregators.fair import Fair
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flora import Flora

Array = npt.NDArray[np.float64]
D_OUT, D_IN, RANK, ALPHA = 9, 14, 4, 8.0
N = [30.0, 10.0, 50.0]
RANKS = [4, 2, 3]


class Client:
    """One client's factors, and its share p_k of the data."""

    def __init__(self, k: int, rank: int, A: Array | None = None) -> None:
        draw = np.random.default_rng(k)
        self.p = N[k] / sum(N)
        self.s = ALPHA / rank
        self.A = draw.normal(size=(rank, D_IN)) if A is None else A
        self.B = draw.normal(size=(D_OUT, rank))
        self.head = draw.normal(size=3)

    @property
    def adapter(self) -> AdapterState:
        pair = LoraPair(torch.from_numpy(self.A), torch.from_numpy(self.B), self.s)
        return AdapterState({"m": pair}, {"head": torch.from_numpy(self.head)})


def merged(rule: Aggregator, clients: list[Client], start: AdapterState) -> tuple[GlobalState, Array]:
    """The rule's next state, and the dense change of weights that it broadcasts."""
    before = rule.init(start)
    updates = [ClientUpdate(k, client.adapter, N[k]) for k, client in enumerate(clients)]
    after = rule.aggregate(before, updates)
    terms = broadcast_change(before, after).terms("m")
    return after, np.sum([c * p.scale * (p.B.numpy() @ p.A.numpy()) for c, p in terms], axis=0)


def start(A: Array | None = None) -> AdapterState:
    A = np.random.default_rng(99).normal(size=(RANK, D_IN)) if A is None else A
    pair = LoraPair(torch.from_numpy(A), torch.zeros(D_OUT, RANK, dtype=torch.float64), ALPHA / RANK)
    return AdapterState({"m": pair}, {"head": torch.zeros(3, dtype=torch.float64)})


def same(actual: Array, expected: Array, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def ideal(clients: list[Client]) -> Array:
    """The update that a server with all the products would make: sum_k p_k (alpha / r_k) B_k A_k."""
    total = np.zeros((D_OUT, D_IN))
    for client in clients:
        total += client.p * client.s * client.B @ client.A
    return total


def mean_head(clients: list[Client]) -> Array:
    return np.sum([client.p * client.head for client in clients], axis=0)


def test_fedavg_is_fedits_mean_of_each_factor() -> None:
    clients = [Client(k, RANK) for k in range(3)]
    A = np.sum([client.p * client.A for client in clients], axis=0)
    B = np.sum([client.p * client.B for client in clients], axis=0)
    state, change = merged(FedAvg(), clients, start())
    same(state.adapter.pairs["m"].A.numpy(), A)
    same(state.adapter.pairs["m"].B.numpy(), B)
    same(change, (ALPHA / RANK) * B @ A)
    same(state.adapter.dense["head"].numpy(), mean_head(clients))


def test_ffa_is_the_mean_of_b_over_the_frozen_a() -> None:
    A0 = np.random.default_rng(7).normal(size=(RANK, D_IN))
    clients = [Client(k, RANK, A0) for k in range(3)]
    state, change = merged(FfaLora(), clients, start(A0))
    same(state.adapter.pairs["m"].B.numpy(), np.sum([client.p * client.B for client in clients], axis=0))
    same(change, ideal(clients))
    same(state.adapter.dense["head"].numpy(), mean_head(clients))


def test_ffa_with_nested_a_is_the_ideal_update_for_mixed_ranks() -> None:
    A0 = np.random.default_rng(7).normal(size=(RANK, D_IN))
    clients = [Client(k, rank, A0[:rank]) for k, rank in enumerate(RANKS)]
    state, change = merged(FfaLora(), clients, start(A0))
    same(change, ideal(clients))
    # Column j of B is fed by the clients whose rank is above j, and by nobody else.
    for j in range(RANK):
        column = np.zeros(D_OUT)
        for client in clients:
            if client.B.shape[1] > j:
                column += client.p * client.s / (ALPHA / RANK) * client.B[:, j]
        same(state.adapter.pairs["m"].B.numpy()[:, j], column)


def test_flora_is_the_stack_of_all_clients() -> None:
    clients = [Client(k, rank) for k, rank in enumerate(RANKS)]
    state, change = merged(Flora(), clients, start())
    stacked_A = np.concatenate([client.p * client.s * client.A for client in clients])
    stacked_B = np.concatenate([client.B for client in clients], axis=1)
    same(state.base_updates[-1].change.pairs["m"].A.numpy(), stacked_A)
    same(state.base_updates[-1].change.pairs["m"].B.numpy(), stacked_B)
    same(change, ideal(clients))
    assert not state.adapter.pairs["m"].B.any()
    same(state.adapter.dense["head"].numpy(), mean_head(clients))


@pytest.mark.parametrize("regularisation", [0.0, 0.01, 3.0])
def test_fair_in_closed_form_minimises_the_frobenius_objective(regularisation: float) -> None:
    clients = [Client(k, RANK) for k in range(3)]
    A = np.sum([client.p * client.A for client in clients], axis=0)
    B = np.sum([client.p * client.B for client in clients], axis=0)
    target = ideal(clients) / (ALPHA / RANK)
    # min |target - (B + R) A|^2 + lambda |R|^2 as one least-squares problem in R^T: [A^T; sqrt(lambda) I] R^T = [...].
    left = np.concatenate([A.T, np.sqrt(regularisation) * np.eye(RANK)])
    right = np.concatenate([(target - B @ A).T, np.zeros((RANK, D_OUT))])
    R = np.linalg.lstsq(left, right, rcond=None)[0].T
    state, change = merged(Fair(regularisation), clients, start())
    same(state.adapter.pairs["m"].A.numpy(), A)
    same(state.adapter.pairs["m"].B.numpy(), B + R, rtol=1e-11)
    same(change, (ALPHA / RANK) * (B + R) @ A, rtol=1e-11)
    penalty = regularisation * np.sum(R**2)
    objective = np.sum((target - (B + R) @ A) ** 2) + penalty
    assert state.metrics["fair/objective"] == pytest.approx(objective, rel=1e-11)
    assert state.metrics["fair/regulariser"] == pytest.approx(penalty, rel=1e-11)
    assert state.metrics["fair/objective_before"] == pytest.approx(np.sum((target - B @ A) ** 2), rel=1e-11)
    assert state.metrics["fair/correction"] == pytest.approx(np.linalg.norm(R) / np.linalg.norm(B), rel=1e-11)


@pytest.mark.parametrize("regularisation", [0.0, 0.001])
def test_fair_by_cosine_descends_the_papers_objective(regularisation: float) -> None:
    clients = [Client(k, RANK) for k in range(3)]
    A = np.sum([client.p * client.A for client in clients], axis=0)
    B = np.sum([client.p * client.B for client in clients], axis=0)
    target, lr, steps = ideal(clients), 2.0, 15
    T = torch.from_numpy(target)
    R = torch.zeros(D_OUT, RANK, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        product = (torch.from_numpy(B) + R) @ torch.from_numpy(A)
        loss = 1 - torch.nn.functional.cosine_similarity(T.flatten(), product.flatten(), dim=0, eps=0)
        (slope,) = torch.autograd.grad(loss, R)
        moved = R.detach() - lr * slope
        # The proximal map of lr * lambda * |R|: the exact minimiser of lr lambda |X| + |X - moved|^2 / 2.
        length = float(moved.norm())
        R = (moved * max(0.0, 1 - lr * regularisation / length)).requires_grad_()
    state, _ = merged(Fair(regularisation, "cosine", steps, lr), clients, start())
    same(state.adapter.pairs["m"].B.numpy(), B + R.detach().numpy(), rtol=1e-11)
    product = (B + R.detach().numpy()) @ A
    cosine = np.sum(target * product) / np.linalg.norm(target) / np.linalg.norm(product)
    penalty = regularisation * np.linalg.norm(R.detach().numpy())
    assert state.metrics["fair/objective"] == pytest.approx(1 - cosine + penalty, rel=1e-10)
    assert state.metrics["fair/regulariser"] == pytest.approx(penalty, rel=1e-10)
    assert state.metrics["fair/objective"] < state.metrics["fair/objective_before"]


def test_p_on_both_sides_is_wrong_by_one_minus_one_over_k() -> None:
    """With equal weights, each term of the wrong stack is p_k = 1/K times too small: the error is exactly 1 - 1/K."""
    for count in (2, 5, 10):
        draw = np.random.default_rng(count)
        factors = [(draw.normal(size=(D_OUT, 3)), draw.normal(size=(3, D_IN))) for _ in range(count)]
        right = np.sum([B @ A / count for B, A in factors], axis=0)
        wrong = np.sum([(B / count) @ (A / count) for B, A in factors], axis=0)
        assert np.linalg.norm(wrong - right) / np.linalg.norm(right) == pytest.approx(1 - 1 / count, rel=1e-12)
