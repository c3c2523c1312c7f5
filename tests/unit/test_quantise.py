"""Rounding to eight bits: within a step, without bias, a function of the seed, exact where it can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.quantise import LARGEST, Rows, dequantise, quantise, row_shape


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_numpy(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """q = floor(x / s + u), s = max|x| / 127, along the longer side."""
    matrix = values.reshape(values.shape[0], -1)
    matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    u = torch.rand(matrix.shape, generator=drawn(seed)).numpy()
    s = (np.abs(matrix).max(axis=1) / np.float32(127)).astype(np.float32)
    return s, np.clip(np.floor(matrix / s[:, None] + u), -127, 127).astype(np.int8)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (5, 5), (2, 3, 4, 5)])
def test_it_is_the_formula(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=drawn(1))
    rows = quantise(values, drawn(7))
    steps, codes = by_numpy(values.numpy(), 7)
    assert np.array_equal(rows.steps.numpy(), steps)
    assert np.array_equal(rows.codes.numpy(), codes)
    assert rows.codes.shape == row_shape(shape)


@given(
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
    st.integers(0, 2**32),
    st.floats(1e-30, 1e30),
)
@settings(max_examples=100, deadline=None)
def test_every_value_is_within_a_step_of_itself(shape: tuple[int, ...], seed: int, size: float) -> None:
    values = torch.randn(shape, generator=drawn(seed)) * size
    rows = quantise(values, drawn(seed))
    back = dequantise(rows, shape)
    assert back.shape == values.shape
    step = dequantise(Rows(rows.steps, torch.ones_like(rows.codes)), shape)
    assert bool(((back - values).abs() <= step * (1 + 1e-4)).all())
    assert int(rows.codes.abs().max()) <= LARGEST


@given(
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
    st.integers(0, 2**32),
    st.one_of(st.floats(1e-42, 1e-30), st.floats(1e-30, 1e30)),
)
@settings(max_examples=200, deadline=None)
def test_to_the_nearest_is_within_half_a_step_and_not_rounded_again(
    shape: tuple[int, ...], seed: int, size: float
) -> None:
    values = torch.randn(shape, generator=drawn(seed)) * size
    rows = quantise(values, None)
    back = dequantise(rows, shape)
    half = dequantise(Rows(rows.steps / 2, torch.ones_like(rows.codes)), shape)
    none = 127 * torch.finfo(torch.float32).tiny  # a row below this is zero
    assert bool(((back - values).abs() <= torch.where(half > 0, half * (1 + 1e-4), none)).all())
    again = quantise(back, None)
    assert torch.equal(again.steps, rows.steps)
    assert torch.equal(again.codes, rows.codes)


def test_it_has_no_bias() -> None:
    values = torch.randn(4, 64, generator=drawn(3))
    draws = 4000
    total = torch.zeros(4, 64, dtype=torch.float64)
    for seed in range(draws):
        total += dequantise(quantise(values, drawn(seed)), (4, 64)).double()
    steps = quantise(values, drawn()).steps.double()[:, None]
    # A rounding's standard deviation is at most half a step; 256 means within 5 of their own.
    assert bool(((total / draws - values).abs() <= 5 * 0.5 * steps / draws**0.5).all())


def test_a_row_has_its_own_step() -> None:
    values = torch.stack([torch.full((50,), 1e-3), torch.full((50,), 1e3)])
    for matrix in (values, values.T):
        back = dequantise(quantise(matrix, drawn()), tuple(matrix.shape))
        assert torch.allclose(back, matrix, rtol=1e-6)


def test_zeros_and_whole_steps_are_exact() -> None:
    assert torch.equal(dequantise(quantise(torch.zeros(3, 4), drawn()), (3, 4)), torch.zeros(3, 4))
    codes = torch.tensor([[127.0, -127.0, 0.0, 5.0, -64.0]])
    assert torch.equal(dequantise(quantise(codes * 0.25, drawn()), (1, 5)), codes * 0.25)


def test_it_is_a_function_of_values_and_seed() -> None:
    values = torch.randn(3, 50, generator=drawn(1))
    kept = values.clone()
    one, same, other = (quantise(values, drawn(seed)).codes for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(values, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    values = torch.ones(2, 3)
    values[0, 1] = bad
    assert not torch.isfinite(dequantise(quantise(values, drawn()), (2, 3))[0]).all()


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (7,)])
def test_odd_shapes_pass(shape: tuple[int, ...]) -> None:
    values = torch.ones(shape)
    assert torch.equal(dequantise(quantise(values, drawn()), shape), values)
