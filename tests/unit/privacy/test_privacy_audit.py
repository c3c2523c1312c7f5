"""The audit of the real private step: the truth passes, and each way of cheating is caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.errors import raises

from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Entry, epsilon
from fedlora.privacy.audit import (
    AuditResult,
    audit_in_one_run,
    audit_two_worlds,
    canary_steps,
    epsilon_lower_bound,
)
from fedlora.privacy.dpsgd import PrivateStep
from fedlora.privacy.mutants import MUTANTS, MakePrivateStep, broken

DELTA = 1e-5
COLUMNS = {"epsilon 4": (4.0, 1.0, 1), "epsilon 1": (1.0, 0.25, 8)}
"""Claim, q and T; at other claims, such as epsilon 2 in one step, a quarter of the noise may be missed."""
SIGMA = {"epsilon 4": 1.0815, "epsilon 1": 3.1188}


def true_step(column: str) -> MakePrivateStep:
    batch = 2000 * COLUMNS[column][1]
    settings = {"max_grad_norm": 1.0, "noise_multiplier": SIGMA[column], "expected_batch_size": batch}
    return lambda model, optimizer: PrivateStep(model, optimizer, **settings)


def audit(column: str, mutant: Callable[[PrivateStep], None] | None, seed: int) -> AuditResult:
    claimed, q, steps = COLUMNS[column]
    make = true_step(column) if mutant is None else broken(true_step(column), mutant)
    attack = canary_steps(make, sample_rate=q, steps=steps)
    return audit_in_one_run(attack, claimed=claimed, delta=DELTA, generator=np.random.default_rng(seed))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("column", COLUMNS)
def test_the_true_step_stays_below_its_claim(column: str, seed: int) -> None:
    assert not audit(column, None, seed).refuted


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
@pytest.mark.parametrize("column", COLUMNS)
def test_a_step_that_cheats_is_caught(column: str, mutant: Callable[[PrivateStep], None]) -> None:
    assert audit(column, mutant, 0).refuted


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_five_of_five(column: str) -> None:
    claimed, q, steps = COLUMNS[column]
    assert 0.99 * claimed < epsilon([Entry(q, SIGMA[column], steps)], DELTA) <= claimed
    assert all(audit(column, mutant, seed).refuted for mutant in MUTANTS.values() for seed in range(5))
    assert max(audit(column, None, seed).lower_bound for seed in range(5)) < 0.75 * claimed


@pytest.mark.slow
def test_sampling_that_is_not_secret_is_caught() -> None:
    """Batches of everything, accounted for as samples of a quarter."""
    claimed, q, steps = COLUMNS["epsilon 1"]
    attack = canary_steps(true_step("epsilon 1"), sample_rate=q, steps=steps, sampler=lambda n: [np.arange(n)] * steps)
    whole = audit_in_one_run(attack, claimed=claimed, delta=DELTA, generator=np.random.default_rng(0))
    fair = audit("epsilon 1", None, 0)
    assert whole.lower_bound > fair.lower_bound + 0.2


def test_the_bound_of_pure_privacy_is_the_binomials() -> None:
    """delta = 0, all of r guesses right: epsilon with (e^eps / (1 + e^eps))^r = 1 - confidence."""
    for r in (10, 100):
        p = 0.05 ** (1 / r)
        assert epsilon_lower_bound(1000, r, r, 0.0, 0.95) == pytest.approx(np.log(p / (1 - p)), rel=1e-6)


def test_the_bound_moves_the_right_way() -> None:
    bound = epsilon_lower_bound
    assert bound(1000, 500, 250, DELTA, 0.95) == 0.0
    assert bound(1000, 500, 450, DELTA, 0.95) > bound(1000, 500, 400, DELTA, 0.95) > 0
    assert bound(1000, 500, 450, DELTA, 0.95) < bound(1000, 500, 450, 0.0, 0.95)
    assert bound(1000, 500, 450, DELTA, 0.99) < bound(1000, 500, 450, DELTA, 0.95)
    with raises(PrivacyError, "out-of-range", 1000, 501, 500):
        bound(1000, 500, 501, DELTA, 0.95)


def test_randomised_response_is_audited_soundly() -> None:
    """A mechanism whose epsilon is known, through the same bound: refuted at half of it, never above it."""
    eps, m = 2.0, 2000
    truth = np.random.default_rng(0).random(m) < np.exp(eps) / (1 + np.exp(eps))
    bound = epsilon_lower_bound(m, m, int(truth.sum()), 0.0, 0.95)
    assert eps / 2 < bound < eps


@pytest.mark.slow
def test_two_worlds_of_a_known_mechanism() -> None:
    rng = np.random.default_rng(0)
    far = audit_two_worlds(lambda there: rng.normal(3.0 * there), claimed=1.0, delta=DELTA)
    assert far.refuted
    near = audit_two_worlds(lambda there: rng.normal(0.2 * there), claimed=1.0, delta=DELTA)
    assert not near.refuted
    few = [audit_two_worlds(lambda there: rng.normal(), claimed=0.0, delta=DELTA, trials=40) for _ in range(40)]
    assert sum(result.refuted for result in few) <= 2  # at a confidence of 0.95, chance alone refutes no oftener
