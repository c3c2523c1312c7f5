"""What private steps cost: entries of noise, and the epsilon that they add up to.

q = sample rate, sigma = noise multiplier, T = steps. Everything here is a function of these three numbers, none of
which may depend on the data.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedlora.errors import ConfigError, PrivacyError, nearest

ACCOUNTANTS = ("prv", "rdp")
UNITS = {
    "example": "one example of one client (add or remove it)",
    "client": "one whole client (its update replaced by zero)",
}
"""What one figure protects: example-level privacy is not user-level privacy, so every figure names its unit."""


@dataclass(frozen=True)
class Entry:
    """`steps` Gaussian mechanisms on Poisson samples.

    Args:
        sample_rate: q, the probability with which each record is in a step's batch, in (0, 1].
        noise_multiplier: sigma, the noise's standard deviation in units of the sensitivity, > 0.
        steps: T, empty batches included, >= 1.

    Raises:
        PrivacyError: if one of them is out of range.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"a sample rate must lie in (0, 1], not {self.sample_rate!r}", code="out-of-range")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(
                f"a noise multiplier must be positive and finite, not {self.noise_multiplier!r}: "
                "without noise there is no privacy",
                code="out-of-range",
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PrivacyError(
                f"the number of private steps must be an integer of at least 1, not {self.steps!r}", code="out-of-range"
            )


@dataclass(frozen=True)
class Budget:
    """How much may be spent in all.

    Args:
        epsilon: upper end, > 0.
        delta: in (0, 1); below one over the number of records.
        accountant: "prv" or "rdp".
    """

    epsilon: float
    delta: float
    accountant: str = "prv"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise PrivacyError(f"epsilon must be positive and finite, not {self.epsilon!r}", code="out-of-range")
        require_delta(self.delta)
        require_accountant(self.accountant)

    def holds(self, entries: Iterable[Entry]) -> bool:
        """Whether all of `entries` together stay within the budget; the cheap bound (RDP) is asked first."""
        spent = merged(entries)
        if epsilon(spent, self.delta, "rdp") <= self.epsilon:
            return True
        return self.accountant != "rdp" and epsilon(spent, self.delta, self.accountant) <= self.epsilon


def require_accountant(name: str) -> None:
    """`PrivacyError` for "gdp", `ConfigError` with the nearest valid name for any other unknown one."""
    if name == "gdp":
        raise PrivacyError(
            'the accountant "gdp" is a central-limit approximation that can report less than was spent '
            '(arXiv 2106.02848, section 1): choose "prv" or "rdp"',
            code="accountant-not-sound",
        )
    if name not in ACCOUNTANTS:
        raise ConfigError(f"unknown accountant {name!r}; {nearest(name, ACCOUNTANTS)}", code="unknown-name")


def require_delta(delta: float) -> None:
    """`PrivacyError` unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta must lie between 0 and 1 (well below 1 / number of examples), not {delta!r}", code="out-of-range"
        )


def merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Entries of equal rate and noise as one, sorted: the order does not matter, and PRV slows with their number."""
    steps: dict[tuple[float, float], int] = {}
    for entry in entries:
        key = (entry.sample_rate, entry.noise_multiplier)
        steps[key] = steps.get(key, 0) + entry.steps
    return tuple(Entry(q, sigma, count) for (q, sigma), count in sorted(steps.items()))


def epsilon(entries: Iterable[Entry], delta: float, accountant: str = "prv") -> float:
    """An upper bound of the epsilon of all entries together, at `delta`.

    "prv": the numerical composition of Gopi et al. 2021, arXiv 2106.02848, through Opacus, with an error of about
    0.3% added on top; where every entry has q = 1 it is exact (Balle and Wang 2018, arXiv 1805.06530, Theorem 8, on
    mu^2 = sum T / sigma^2). "rdp": Mironov et al. 2019, arXiv 1908.10530, through Opacus. RDP is also what is
    returned where it is the smaller of the two, or where PRV gives up (tiny deltas, three-digit epsilons): both are
    upper bounds.

    Raises:
        PrivacyError: for "gdp", or a delta out of range.
    """
    require_accountant(accountant)
    require_delta(delta)
    return _epsilon(merged(entries), delta, accountant)


@lru_cache(maxsize=512)
def _epsilon(entries: tuple[Entry, ...], delta: float, accountant: str) -> float:
    if not entries:
        return 0.0
    import numpy as np

    history = [(entry.noise_multiplier, entry.sample_rate, entry.steps) for entry in entries]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick = _opacus("rdp", history, delta)
        if accountant == "rdp" or not quick < 200:
            return quick
        if all(entry.sample_rate == 1 for entry in entries):
            mu = math.sqrt(sum(entry.steps / entry.noise_multiplier**2 for entry in entries))
            return gaussian_epsilon(mu, delta)
        # The error's size sets PRV's mesh, hence its time: an error in proportion to epsilon is cheap and tight.
        with contextlib.suppress(RuntimeError, ValueError):
            tight = _opacus("prv", history, delta, eps_error=min(max(0.003 * quick, 5e-4), 0.1))
            if math.isfinite(tight) and tight > 0:
                return min(tight, quick)
    return quick


def _opacus(name: str, history: list[tuple[float, float, int]], delta: float, **options: float) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    accountant: Any = {"prv": PRVAccountant, "rdp": RDPAccountant}[name]()
    accountant.history = history
    return float(accountant.get_epsilon(delta=delta, **options))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon of a Gaussian mechanism of sensitivity mu and noise 1 (Balle and Wang 2018, Theorem 8).

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu), solved by bisection from above.
    """
    from scipy.special import log_ndtr

    def excess(eps: float) -> float:
        first = math.exp(log_ndtr(mu / 2 - eps / mu))
        return first - math.exp(eps + log_ndtr(-mu / 2 - eps / mu)) - delta

    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def statement(value: float, budget_delta: float, unit: str, accountant: str = "prv") -> str:
    """One line that says what a figure means; epsilon is rounded up, never down.

    Example:
        >>> statement(2.9961, 1e-5, "example")
        '(2.997, 1e-05)-differential privacy for one example of one client (add or remove it), by the PRV accountant'
    """
    shown = "infinite" if not math.isfinite(value) else f"{math.ceil(value * 1000 - 1e-9) / 1000:.3f}"
    return f"({shown}, {budget_delta:g})-differential privacy for {UNITS[unit]}, by the {accountant.upper()} accountant"
