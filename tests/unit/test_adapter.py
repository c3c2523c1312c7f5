"""Pairs, adapters and fresh draws."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pair, fresh_pairs
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
