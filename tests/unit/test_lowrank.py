"""Sums of low-rank changes, against dense float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Literal

import pytest
import torch
from support.errors import raises

from fedlora import lowrank
from fedlora.adapter import LoraPair, PairShape
from fedlora.errors import RuleError
from fedlora.lowrank import (
    DeltaSum,
    compress,
    frobenius,
    gram,
    randomised_svd,
    rank_of_energy,
    relative_error,
    stack,
    svd,
)


def pair(rank: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 11, generator=generator, dtype=torch.float64).to(dtype)
    return LoraPair(A, torch.randn(7, rank, generator=generator, dtype=torch.float64).to(dtype), scale)


def dense(p: LoraPair) -> torch.Tensor:
    return p.scale * (p.B.double() @ p.A.double())


@pytest.mark.parametrize("ranks", [(3,), (3, 1, 5), (8, 9, 2)])
def test_a_stack_is_the_weighted_sum(ranks: tuple[int, ...]) -> None:
    terms = [(0.3 + k, pair(rank, k, scale=1.0 + k)) for k, rank in enumerate(ranks)]
    whole = stack(terms)
    assert (whole.rank, whole.scale) == (sum(ranks), 1.0)
    expected = sum(c * dense(p) for c, p in terms)
    torch.testing.assert_close(dense(whole), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stack_of_half_precision_factors_is_not_rounded_again(dtype: torch.dtype) -> None:
    terms = [(0.1, pair(2, 0, 0.7, dtype)), (0.9, pair(3, 1, 1.3, dtype))]
    expected = sum(c * dense(p) for c, p in terms)
    gap = (dense(stack(terms)) - expected).norm() / expected.norm()
    assert float(gap) < 1e-7


def test_nothing_cannot_be_stacked() -> None:
    with raises(RuleError, "no-updates"):
        stack([])


def test_frobenius_is_the_dense_norm() -> None:
    terms = [(0.3, pair(3, 0)), (-1.2, pair(5, 1, 0.5)), (2.0, pair(9, 2))]
    assert frobenius(terms) == pytest.approx(float(sum(c * dense(p) for c, p in terms).norm()), rel=1e-13)
    assert frobenius([]) == frobenius([(1.0, LoraPair(torch.zeros(0, 11), torch.zeros(7, 0), 1.0))]) == 0.0


def test_frobenius_sees_small_differences_of_large_terms() -> None:
    p, q = pair(3), pair(2, 1)
    tiny = LoraPair(q.A, q.B, 1e-10)
    assert frobenius([(1.0, p), (-1.0, p), (1.0, tiny)]) == pytest.approx(float(dense(tiny).norm()), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 128, 300])
def test_gram_holds_the_dense_inner_products(rank: int) -> None:
    start = pair(4, 9)
    sums = [[(0.5 + k, pair(rank, k, scale=1.0 + k)), (-1.0, start)] for k in range(4)]
    whole = torch.stack([sum(c * dense(p) for c, p in terms).flatten() for terms in sums])  # type: ignore[union-attr]
    torch.testing.assert_close(gram(sums), whole @ whole.T, rtol=1e-12, atol=1e-10)


def test_gram_of_nothing_is_zero() -> None:
    empty = LoraPair(torch.zeros(0, 11), torch.zeros(7, 0), 1.0)
    assert torch.equal(gram([[], [(1.0, empty)]]), torch.zeros(2, 2).double())


def test_singular_values_and_vectors_are_the_dense_ones_with_signs_of_their_own() -> None:
    terms = [(0.3, pair(2, 0)), (-1.2, pair(3, 1, 0.5))]
    found = svd(terms)
    U, S, Vh = torch.linalg.svd(sum(c * dense(p) for c, p in terms))
    torch.testing.assert_close(found.S, S[:5], rtol=1e-12, atol=1e-12)
    assert float((found.Vh.abs().amax(1) - found.Vh.amax(1)).abs().max()) == 0.0
    torch.testing.assert_close((found.U * found.S) @ found.Vh, (U[:, :7] * S) @ Vh[:7], rtol=1e-11, atol=1e-11)
    turned = svd(terms[::-1])
    torch.testing.assert_close(turned.Vh, found.Vh, rtol=1e-9, atol=1e-9)


def test_rank_of_energy_is_the_smallest_that_reaches_it() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 1e-9, 0.0]).double()
    ranks = {energy: rank_of_energy(values, energy) for energy in (0.0, 0.5, 0.6, 0.7, 0.9999, 1.0)}
    assert ranks == {0.0: 1, 0.5: 1, 0.6: 1, 0.7: 2, 0.9999: 3, 1.0: 4}
    assert rank_of_energy(values[:0], 0.9) == rank_of_energy(torch.zeros(2), 0.9) == 1


@pytest.mark.parametrize("falls", [0.0, 1.0])
def test_the_largest_values_of_a_large_sum_are_those_of_all(falls: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By eigenvectors: of a flat spectrum, and of one in which each term is a tenth of the one before it."""
    terms = [(10 ** (-falls * k), pair(2, k)) for k in range(3)]
    whole = svd(terms)
    monkeypatch.setattr(lowrank, "LARGE", 0)
    for count in (1, 3, 6):
        found = svd(terms, count)
        torch.testing.assert_close(found.S, whole.S[:count], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dense(found.pair(count)), dense(whole.pair(count)), rtol=1e-9, atol=1e-9)
    assert svd([*terms, *((-c, p) for c, p in terms)], 4).rank == 0
    low = svd([terms[0], terms[0]], lambda S: min(4, len(S)))
    assert low.rank == 2, "two clients who sent the same"


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-9, 0.0])
@pytest.mark.parametrize("clients", [3, 5])
def test_the_largest_values_are_those_of_all_however_alike_the_clients_are(
    apart: float, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far from dependent, B has a Cholesky factor; where it has none that can be trusted, Householder's QR is taken."""
    start, terms = pair(2, 9), []
    for k in range(clients):
        moved = pair(2, k)
        terms.append((0.3 + k, LoraPair(start.A + apart * moved.A, start.B + apart * moved.B, 2.0)))
    whole = svd(terms)
    monkeypatch.setattr(lowrank, "LARGE", 0)
    monkeypatch.setattr(lowrank, "BLOCK", 2)
    found = svd(terms, lambda S: min(4, len(S)))
    large = whole.S[:4] > 1e-6 * whole.S[0]  # those below come from the squares
    torch.testing.assert_close(found.S[large], whole.S[:4][large], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(dense(found.pair(2)), dense(whole.pair(2)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.U[:, :2].T @ found.U[:, :2], torch.eye(2).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("split", ["root", "left"])
@pytest.mark.parametrize("scale", [0.25, -3.0])
def test_both_splits_are_the_same_change(split: Literal["root", "left"], scale: float) -> None:
    p = pair(5)
    cut = svd([(1.0, p)]).pair(3, scale, split=split)
    torch.testing.assert_close(dense(cut), dense(compress(p, 3)), rtol=1e-11, atol=1e-11)
    if split == "left":
        torch.testing.assert_close(cut.A @ cut.A.T, torch.eye(3).double())


def test_a_unit_without_a_singular_value_keeps_a_row_of_a_that_can_learn() -> None:
    idle = torch.randn(6, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for terms in ([(1.0, pair(2))], [(1.0, pair(2)), (-1.0, pair(2))]):
        for split in ("root", "left"):
            made = svd(terms).pair(6, 2.0, split=split, idle=idle)  # type: ignore[arg-type]
            learned = 2 if len(terms) == 1 else 0
            assert torch.equal(made.A[learned:], idle[learned:])
            assert not made.B[:, learned:].any()
            torch.testing.assert_close(dense(made), sum(c * dense(p) for c, p in terms), rtol=1e-11, atol=1e-11)


def test_randomised_singular_values_are_within_their_stated_error() -> None:
    """The slowest spectrum there is, a flat one, at the size of a layer: 40 clients of rank 8."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    terms = [(1 / 40, LoraPair(draw(8, 400), draw(350, 8), 1.0)) for _ in range(40)]
    exact = svd(terms)
    best = math.sqrt(float(exact.S[16:].square().sum()))
    for turns, bound in ((0, math.sqrt(1 + 16 / 15)), (2, 1.02)):
        found = randomised_svd(terms, 16, seed=3, turns=turns)
        error = frobenius([*terms, (-1.0, found.pair(16))])
        assert best <= error * (1 + 1e-9)
        assert error <= bound * best
    again = randomised_svd(terms, 16, seed=3)
    assert all(torch.equal(one, two) for one, two in zip(again, randomised_svd(terms, 16, seed=3), strict=True))


def test_randomised_singular_values_of_a_low_rank_are_exact() -> None:
    terms = [(1.0, pair(3, 0)), (2.0, pair(1, 1))]
    torch.testing.assert_close(randomised_svd(terms, 4, 0).S, svd(terms).S, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 3, 6, 7, 9])
def test_compress_is_the_truncated_svd(rank: int) -> None:
    p = stack([(1.0, pair(4, 0)), (0.5, pair(4, 1))])
    U, S, Vh = torch.linalg.svd(dense(p))
    k = min(rank, 7)
    best = (U[:, :k] * S[:k]) @ Vh[:k]
    cut = compress(p, rank, scale=0.25)
    assert (cut.rank, cut.scale) == (rank, 0.25)
    torch.testing.assert_close(dense(cut), best, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("rank", "scale"), [(0, 1.0), (2, 0.0)])
def test_compress_refuses_what_cannot_hold_a_change(rank: int, scale: float) -> None:
    with raises(RuleError, "out-of-range", rank, scale):
        compress(pair(3), rank, scale)


def test_compress_of_nothing_is_nothing() -> None:
    cut = compress(LoraPair(torch.zeros(0, 11), torch.zeros(7, 0), 1.0), 2)
    assert cut.shape == PairShape(7, 11, 2, 1.0)
    assert not cut.delta().any()


def test_a_long_sum_stays_as_small_as_the_layer_and_exact() -> None:
    total, expected = DeltaSum(), torch.zeros(7, 11, dtype=torch.float64)
    for k in range(40):
        total.add({"m": pair(3, k)}, 0.1 * k - 1)
        expected += (0.1 * k - 1) * dense(pair(3, k))
        assert sum(p.rank for _, p in total.terms("m")) <= 2 * 7
    torch.testing.assert_close(sum(c * dense(p) for c, p in total.terms("m")), expected, rtol=1e-12, atol=1e-12)


def test_relative_error_is_the_dense_one_over_all_modules() -> None:
    actual, ideal = DeltaSum(), DeltaSum()
    actual.add({"m": pair(3, 0), "n": pair(2, 1)})
    ideal.add({"m": pair(4, 2)}, 3.0)
    ideal.add({"m": pair(1, 3), "n": pair(2, 4)}, 5.0)
    wanted = {"m": (3 * dense(pair(4, 2)) + 5 * dense(pair(1, 3))) / 8, "n": 5 * dense(pair(2, 4)) / 8}
    gap = (dense(pair(3, 0)) - wanted["m"]).norm() ** 2 + (dense(pair(2, 1)) - wanted["n"]).norm() ** 2
    size = wanted["m"].norm() ** 2 + wanted["n"].norm() ** 2
    assert relative_error(actual, ideal, 8.0) == pytest.approx(float((gap / size).sqrt()), rel=1e-12)


def test_relative_error_of_nothing() -> None:
    some, none = DeltaSum(), DeltaSum()
    some.add({"m": pair(2)})
    assert relative_error(none, none) == 0.0
    assert relative_error(some, none) == math.inf
    assert relative_error(none, some) == pytest.approx(1.0)


SUMS = """
import torch
from fedlora.adapter import LoraPair
from fedlora.lowrank import DeltaSum, relative_error

torch.manual_seed(0)
sums = [DeltaSum(), DeltaSum()]
for one in sums:
    for name in range(40):
        one.add({f"layers.{name}": LoraPair(torch.randn(2, 7), torch.randn(5, 2), 0.3)}, 1.7)
print(relative_error(*sums).hex())
"""


@pytest.mark.nightly
def test_the_aggregation_error_is_the_same_to_the_last_digit_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", SUMS],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(4)
    }
    assert len(found) == 1
