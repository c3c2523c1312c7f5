"""The tests of noise, samples and seeds: they raise no more alarms than they say, and find what they are for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fedlora.privacy.checks import (
    Check,
    _squares,
    excluded_bits,
    expanded_from_a_word,
    independence,
    largest,
    masks,
    noise_grain,
    noise_scale,
    noise_shape,
    samples,
    shares,
    spread,
)
from fedlora.privacy.dpsgd import poisson_batches, secret_generator

TRIALS, LEVEL = 120, 0.1


def drawn(n: int, q: float, steps: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.isin(np.arange(n), sample) for sample in poisson_batches(n, q, steps, rng)])


def scale(rng: np.random.Generator) -> Check:
    return noise_scale("", {str(d): torch.from_numpy(rng.normal(size=d)) for d in (1, 5, 300)}, LEVEL)


def shape(rng: np.random.Generator) -> Check:
    return noise_shape("", torch.from_numpy(rng.normal(size=300)), LEVEL)


def alike(rng: np.random.Generator) -> Check:
    groups = [torch.from_numpy(rng.normal(size=(8, d))) for d in (3, 200)]
    return independence("", groups, LEVEL)


def counted(rng: np.random.Generator) -> Check:
    return shares("", {str(p): (int(rng.binomial(50, p)), 50, p) for p in (0.02, 0.5)}, LEVEL)


def scattered(rng: np.random.Generator) -> Check:
    whole = drawn(40, 0.15, 20, rng)
    return spread("", {"sizes": (whole.sum(1), 40), "times": (whole.sum(0), 20)}, 0.15, LEVEL)


def dropped(rng: np.random.Generator) -> Check:
    return masks("", [rng.normal(size=(6, 8)) for _ in range(3)], LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("test", [scale, shape, alike, counted, scattered, dropped])
def test_false_alarms_are_no_more_than_said(test: Callable[[np.random.Generator], Check]) -> None:
    rng = np.random.default_rng(0)
    alarms = sum(test(rng).bad for _ in range(TRIALS))
    assert alarms <= binom.isf(1e-6, TRIALS, LEVEL)


def test_sums_of_squares_have_the_law_that_counting_gives_them() -> None:
    trials, q = 3, 0.3
    mass = binom.pmf(range(trials + 1), trials, q)
    wanted = np.zeros(9)
    for one, other in product(range(trials + 1), repeat=2):
        wanted[(one - 1) ** 2 + (other - 1) ** 2] += mass[one] * mass[other]
    np.testing.assert_allclose(_squares(2, trials, q), wanted, atol=1e-12)


# ------------------------------------------------------------------------------------------------ what they find


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_noise_of_another_size_is_found_in_a_tensor_of_two_entries(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(64 * d, generator=generator) for name, d in (("A", 128), ("B", 96), ("bias", 2))}
    assert not noise_scale("", draws).bad
    found = noise_scale("", {**draws, "bias": factor * draws["bias"]})
    assert found.bad
    assert "bias" in found.measured
    assert noise_scale("", {**draws, "A": draws["A"] * torch.nan}).bad


def test_noise_of_another_law_or_grain_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=generator)
    uniform = (torch.rand(20_000, generator=generator) - 0.5) * 12**0.5
    laplace = torch.from_numpy(np.random.default_rng(0).laplace(scale=0.5**0.5, size=20_000))
    assert [noise_shape("", draws).bad for draws in (normal, uniform, laplace, normal * torch.nan)] == [False] + [
        True
    ] * 3
    assert not noise_grain("", normal).bad
    assert noise_grain("", normal.bfloat16()).bad
    assert noise_grain("", normal.half()).bad


@pytest.mark.parametrize("factor", [1.0, -0.2])
def test_noise_that_is_used_twice_is_found_up_to_a_factor_and_a_sign(factor: float) -> None:
    draws = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    assert not independence("", [draws]).bad
    again = draws.clone()
    again[7] = factor * draws[250]
    assert independence("", [draws[:5], again]).bad
    again = draws.clone()
    again[7] += draws[250]  # half of its variance
    assert independence("", [again]).bad


def test_seeds_of_so_many_bits_repeat_themselves() -> None:
    """With probability 0.99: of 400 tries at the limit, hardly more than 4 show none."""
    assert excluded_bits(1000) == 16
    assert excluded_bits(2) == 0
    rng = np.random.default_rng(0)
    for g in (50, 250):
        seeds = rng.integers(2 ** excluded_bits(g), size=(400, g))
        assert sum(len(np.unique(row)) == g for row in seeds) <= 12


def test_a_state_that_was_made_from_a_word_is_told_from_one_that_was_drawn() -> None:
    assert expanded_from_a_word(torch.Generator().manual_seed(2**60 + 1))
    assert not expanded_from_a_word(secret_generator())


@pytest.mark.parametrize("q", [0.1, 1.0])
def test_poisson_samples_pass_and_others_are_found(q: float) -> None:
    n, steps = max(10, round(10 / q)), 100
    rng = np.random.default_rng(1)

    def verdict(make: Callable[[], np.ndarray]) -> bool:
        return any(found.bad for found in samples("", [make() for _ in range(4)], q))

    assert not verdict(lambda: drawn(n, q, steps, rng))
    if q == 1:
        assert verdict(lambda: drawn(n, 0.99, steps, rng))
        return
    size = round(q * n)

    def shuffled() -> np.ndarray:
        order = np.concatenate([rng.permutation(n) for _ in range(-(-steps * size // n) + 1)])
        out = np.zeros((steps, n), bool)
        for step in range(steps):
            out[step, order[step * size : (step + 1) * size]] = True
        return out

    def of_one_size() -> np.ndarray:
        return rng.random((steps, n)).argsort(1) < size

    once = drawn(n, q, steps, rng)
    assert verdict(shuffled)
    assert verdict(of_one_size)
    assert verdict(lambda: drawn(n, 1.2 * q, steps, rng))
    assert verdict(lambda: drawn(n, q / 1.2, steps, rng))
    assert verdict(lambda: np.repeat(drawn(n, q, steps // 2, rng), 2, axis=0))
    assert verdict(lambda: once)


def test_masks_that_somebody_shares_are_found() -> None:
    rng = np.random.default_rng(0)
    run = rng.normal(size=(8, 16))
    other = rng.normal(size=(8, 16))
    assert not masks("", [run, other]).bad
    assert masks("", [run, other, run]).bad  # of the run's seed
    assert masks("", [run, np.repeat(other[:, :1], 16, axis=1)]).bad  # one for the whole batch
    assert masks("", [run, np.repeat(other[:1], 8, axis=0)]).bad  # one for all steps
    assert masks("", [np.repeat(other[:, ::2], 2, axis=1)]).bad  # in pairs


def test_a_norm_that_is_not_finite_passes_no_bound() -> None:
    assert not largest("", [0.5, 1.0], 1.0, "C", reached=0.9).bad
    assert largest("", [0.5, 1.1], 1.0, "C").bad
    assert largest("", [0.5, float("nan")], 1.0, "C").bad
    assert largest("", [0.5], 1.0, "C", reached=0.9).bad
