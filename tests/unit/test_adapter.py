"""The algebra of low-rank updates, against dense float64."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from support.errors import raises

from fedlora.adapter import (
    AdapterState,
    DeltaSum,
    LoraPair,
    PairShape,
    compress,
    fresh_pair,
    fresh_pairs,
    frobenius,
    relative_error,
    stack,
)
from fedlora.errors import RuleError


def pair(rank: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 11, generator=generator, dtype=torch.float64).to(dtype)
    return LoraPair(A, torch.randn(7, rank, generator=generator, dtype=torch.float64).to(dtype), scale)


def dense(p: LoraPair) -> torch.Tensor:
    return p.scale * (p.B.double() @ p.A.double())


@pytest.mark.parametrize(("A", "B"), [((3, 4), (5, 2)), ((3,), (5, 3)), ((3, 4), (3,))])
def test_factors_that_do_not_fit_are_no_pair(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with raises(RuleError, "not-a-lora-pair", A, B):
        LoraPair(torch.zeros(A), torch.zeros(B), 1.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_must_be_finite(scale: float) -> None:
    with raises(RuleError, "scale-not-finite", scale):
        LoraPair(torch.zeros(2, 3), torch.zeros(4, 2), scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_delta_is_the_dense_product_in_float32_or_wider(dtype: torch.dtype) -> None:
    p = pair(3, dtype=dtype)
    assert p.delta().dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(p.delta().double(), dense(p), rtol=1e-5, atol=1e-5)


def test_a_state_does_not_share_the_mappings_that_it_was_given() -> None:
    pairs = {"m": pair(2)}
    state = AdapterState(pairs)
    pairs.clear()
    assert list(state.pairs) == ["m"]
    with pytest.raises(TypeError):
        state.pairs["n"] = pair(2)  # type: ignore[index]


def test_with_tensors_is_the_inverse_of_tensors() -> None:
    state = AdapterState({"m": pair(2), "n": pair(3, 1)}, {"head": torch.ones(3)})
    again = state.with_tensors(state.tensors())
    assert again.layout == state.layout
    assert again.tensors().keys() == state.tensors().keys() == {"m:A", "m:B", "n:A", "n:B", "head"}
    assert all(again.tensors()[name] is value for name, value in state.tensors().items())
    with raises(RuleError, "no-such-tensor", "'extra'"):
        state.with_tensors({"extra": torch.ones(1)})


def test_parts_are_disjoint_and_their_bytes_add_up() -> None:
    state = AdapterState({"m": pair(2)}, {"head": torch.ones(3, dtype=torch.bfloat16)})
    assert [state.nbytes([part]) for part in ("A", "B", "dense")] == [2 * 11 * 8, 2 * 7 * 8, 6]
    assert state.nbytes() == 2 * 18 * 8 + 6


def test_states_survive_pickling_and_clones_share_no_memory() -> None:
    state = AdapterState({"m": pair(2)}, {"head": torch.ones(3)})
    for copy in (pickle.loads(pickle.dumps(state)), state.clone()):
        for name, value in state.tensors().items():
            assert torch.equal(copy.tensors()[name], value)
            assert copy.tensors()[name].data_ptr() != value.data_ptr()


def test_a_fresh_pair_is_pefts_draw_and_a_function_of_its_seed() -> None:
    shape = PairShape(7, 400, 16, 2.0)
    one = fresh_pair(shape, 3)
    assert one.shape == shape
    assert not one.B.any()
    # Kaiming-uniform with a = sqrt(5): the bound is 1 / sqrt(d_in), the variance a third of its square.
    assert float(one.A.abs().max()) <= 1 / 20
    assert float(one.A.double().var()) == pytest.approx(1 / 400 / 3, rel=0.05)
    assert torch.equal(one.A, fresh_pair(shape, 3).A)
    assert not torch.equal(one.A, fresh_pair(shape, 4).A)


def test_a_smaller_fresh_pair_is_not_tied_to_other_modules() -> None:
    layout = {"m": PairShape(7, 11, 2, 1.0), "n": PairShape(7, 11, 2, 1.0)}
    both, alone = fresh_pairs(layout, 1), fresh_pairs({"n": layout["n"]}, 1)
    assert not torch.equal(both["m"].A, both["n"].A)
    assert torch.equal(both["n"].A, alone["n"].A)


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
from fedlora.adapter import DeltaSum, LoraPair, relative_error

torch.manual_seed(0)
sums = [DeltaSum(), DeltaSum()]
for one in sums:
    for name in range(40):
        one.add({f"layers.{name}": LoraPair(torch.randn(2, 7), torch.randn(5, 2), 0.3)}, 1.7)
print(relative_error(*sums).hex())
"""


@pytest.mark.slow
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
