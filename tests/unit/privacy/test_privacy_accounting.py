"""Epsilon: against dp-accounting, against closed forms, and the noise that meets a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.errors import raises

from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.accounting import Budget, Entry, epsilon, gaussian_epsilon, merged, statement
from fedlora.privacy.calibrate import noise_multiplier_for, schedule

DELTA = 1e-5
HISTORIES = [
    [Entry(0.02, 1.0, 500)],
    [Entry(0.25, 2.0, 8)],
    [Entry(0.25, 20.0, 80)],
    [Entry(1.0, 1.0, 1)],
    [Entry(1.0, 5.0, 10)],
    [Entry(0.01, 0.8, 200), Entry(0.05, 1.5, 100)],
]


def reference(entries: list[Entry], delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for entry in entries:
        gaussian = dp_accounting.GaussianDpEvent(entry.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(entry.sample_rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, entry.steps))
    return accountant.get_epsilon(delta)


SLOW = [pytest.param(HISTORIES[k], marks=pytest.mark.slow) for k in (0, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("entries", HISTORIES[1:5] + SLOW)
def test_prv_is_within_one_percent_of_dp_accounting_and_never_below_it(entries: list[Entry]) -> None:
    truth = reference(entries, DELTA)
    assert truth * 0.9999 <= epsilon(entries, DELTA) <= truth * 1.01


@pytest.mark.parametrize("entries", HISTORIES[:3])
@pytest.mark.slow
def test_rdp_is_an_upper_bound(entries: list[Entry]) -> None:
    assert epsilon(entries, DELTA, "rdp") >= epsilon(entries, DELTA)


def test_the_figures_that_are_known() -> None:
    known = [Entry(0.02, 1.0, 500)]
    assert epsilon(known, DELTA) == pytest.approx(2.78, abs=0.02)
    assert epsilon(known, DELTA, "rdp") == pytest.approx(3.14, abs=0.01)
    assert epsilon([], DELTA) == 0.0


def test_full_batches_compose_as_one_gaussian() -> None:
    assert epsilon([Entry(1.0, 4.0, 16)], DELTA) == pytest.approx(epsilon([Entry(1.0, 1.0, 1)], DELTA), rel=1e-8)
    # delta(epsilon) of a Gaussian mechanism by integration of the densities' positive part
    eps, mu = gaussian_epsilon(1.0, 1e-3), 1.0
    x = np.linspace(-15, 15, 600_001)
    gap = np.exp(-((x - mu) ** 2) / 2) - np.exp(eps - x**2 / 2)
    assert np.maximum(gap, 0).sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi) == pytest.approx(1e-3, rel=1e-4)


def test_rounds_add_up_as_steps_and_not_as_epsilons() -> None:
    one_round = Entry(0.02, 1.0, 50)
    ten = epsilon([one_round] * 10, DELTA)
    assert merged([one_round] * 10) == (Entry(0.02, 1.0, 500),)
    assert ten == epsilon([Entry(0.02, 1.0, 500)], DELTA)
    assert epsilon([one_round], DELTA) < ten < 10 * epsilon([one_round], DELTA)


def test_gdp_is_refused_with_the_reason_and_a_misspelt_name_with_the_nearest() -> None:
    with raises(PrivacyError, "accountant-not-sound", "gdp", "prv"):
        epsilon([Entry(0.02, 1.0, 500)], DELTA, "gdp")
    with raises(ConfigError, "unknown-name", "'prv'"):
        epsilon([Entry(0.02, 1.0, 500)], DELTA, "prw")


@pytest.mark.parametrize(
    "bad", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.5, 0.0, 1), (0.5, math.inf, 1), (0.5, 1.0, 0), (0.5, 1.0, 1.5)]
)
def test_entries_out_of_range_are_refused(bad: tuple) -> None:
    with raises(PrivacyError, "out-of-range"):
        Entry(*bad)


@pytest.mark.parametrize(
    ("target", "q", "steps"),
    [(4.0, 1.0, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(3.0, 0.02, 500), (1.0, 0.25, 8)])],
)
def test_calibrated_noise_meets_its_budget_and_wastes_little_of_it(target: float, q: float, steps: int) -> None:
    sigma = noise_multiplier_for(target, DELTA, q, steps)
    spent = epsilon([Entry(q, sigma, steps)], DELTA)
    assert 0.99 * target <= spent <= target
    assert reference([Entry(q, sigma, steps)], DELTA) == pytest.approx(target, rel=0.01)


def test_calibration_covers_all_rounds_of_a_schedule() -> None:
    plan = schedule(1000, 16, 10, epochs=1)
    assert (plan.sample_rate, plan.steps, plan.expected_batch_size) == (0.016, 62, 16.0)
    budget = Budget(3.0, 1e-5, "rdp")
    entry = plan.entry(plan.noise_multiplier(budget))
    assert budget.holds([entry] * 10)
    assert not budget.holds([entry] * 11)


def test_a_small_client_takes_its_whole_data_in_each_step() -> None:
    plan = schedule(40, 64, 3, steps=5)
    assert (plan.sample_rate, plan.steps, plan.expected_batch_size) == (1.0, 5, 40.0)


def test_meaningless_deltas_and_impossible_budgets_are_refused() -> None:
    with raises(PrivacyError, "delta-too-large", 0.001, 1000):
        schedule(1000, 16, 10).noise_multiplier(Budget(3.0, 1e-3))
    with raises(PrivacyError, "epsilon-out-of-reach", 1e-7, 1e-12):
        noise_multiplier_for(1e-7, 1e-12, 1.0, 10**6)
    with raises(PrivacyError, "steps-and-epochs"):
        schedule(1000, 16, 10, steps=3, epochs=1)


def test_a_statement_rounds_up_and_names_what_it_protects() -> None:
    assert statement(2.9961, 1e-5, "example").startswith("(2.997, 1e-05)-differential privacy for one example")
    assert "one whole client" in statement(1.0, 1e-5, "client")
    assert statement(1.0, 1e-5, "client").startswith("(1.000,")
