"""Noise for a budget: the smallest noise multiplier with which all planned steps together stay within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Budget, Entry, epsilon

SMALLEST, LARGEST = 0.05, 1e5


@dataclass(frozen=True)
class Schedule:
    """A client's private steps, planned from declared and public numbers alone.

    Args:
        sample_rate: q of each step.
        steps: private steps in one round.
        rounds: rounds in which the client may take part.
        expected_batch_size: q times the declared number of examples, by which the noisy sum is divided.
    """

    sample_rate: float
    steps: int
    rounds: int
    expected_batch_size: float

    def entry(self, noise_multiplier: float) -> Entry:
        """What one round costs."""
        return Entry(self.sample_rate, noise_multiplier, self.steps)

    def noise_multiplier(self, budget: Budget) -> float:
        """`noise_multiplier_for` all rounds.

        Raises:
            PrivacyError: also for a delta of 1 / n or more, with which publishing one example at random is "private".
        """
        n = self.expected_batch_size / self.sample_rate
        if budget.delta * n >= 1:
            raise PrivacyError(
                f"delta {budget.delta:g} protects none of {n:.0f} examples: choose one far below 1 / {n:.0f}",
                code="delta-too-large",
            )
        return noise_multiplier_for(
            budget.epsilon, budget.delta, self.sample_rate, self.steps * self.rounds, budget.accountant
        )


def schedule(
    public_examples: int, batch_size: int, rounds: int, *, steps: int | None = None, epochs: float | None = None
) -> Schedule:
    """The plan of a client that declared `public_examples`.

    Args:
        public_examples: a number that the client has declared in public, not a count of its data: q is computed from
            it, and each example is drawn with q whatever the true number is, so that the claim holds for any.
        batch_size: expected size of a batch.
        rounds: all rounds of the run.
        steps: steps a round; or
        epochs: passes a round, epochs / q steps. One pass if neither is given.

    Raises:
        PrivacyError: if a number is out of range or both `steps` and `epochs` are given.
    """
    if public_examples < 1 or batch_size < 1 or rounds < 1:
        raise PrivacyError(
            "a private schedule needs a declared number of examples, a batch size and rounds, each at least 1, not "
            f"{public_examples}, {batch_size} and {rounds}",
            code="out-of-range",
        )
    if steps is not None and epochs is not None:
        raise PrivacyError("give a private schedule either steps or epochs, not both", code="steps-and-epochs")
    q = min(1.0, batch_size / public_examples)
    count = steps if steps is not None else max(1, round((1.0 if epochs is None else epochs) / q))
    Entry(q, 1.0, count)
    return Schedule(q, count, rounds, q * public_examples)


def noise_multiplier_for(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """The smallest sigma, rounded up to 4 decimals, with epsilon(q, sigma, T) <= `target_epsilon`.

    The result is checked with the same `accounting.epsilon` that reports at the end, so that what is planned is what
    is printed.

    Args:
        target_epsilon: of all steps together.
        delta: in (0, 1).
        sample_rate: q, in (0, 1].
        steps: T, over all planned rounds.
        accountant: "prv" or "rdp".

    Raises:
        PrivacyError: if no noise up to 1e5 is enough.
    """
    Budget(target_epsilon, delta, accountant)

    def cost(sigma: float, name: str = accountant) -> float:
        return epsilon([Entry(sample_rate, sigma, steps)], delta, name)

    if cost(LARGEST, "rdp") > target_epsilon and cost(LARGEST) > target_epsilon:
        raise PrivacyError(
            f"epsilon {target_epsilon:g} at delta {delta:g} cannot be reached in {steps} steps: raise epsilon or delta",
            code="epsilon-out-of-reach",
        )
    # RDP is quick and an upper bound, so its answer brackets the other's from above.
    high = LARGEST
    low = SMALLEST
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle, "rdp") > target_epsilon else (low, middle)
    sigma = high
    if accountant != "rdp":
        from scipy.optimize import brentq

        low = max(SMALLEST, high / 2)
        while low > SMALLEST and cost(low) <= target_epsilon:
            low = max(SMALLEST, low / 2)
        if cost(low) > target_epsilon:
            gap = [math.log(low), math.log(high)]
            sigma = math.exp(brentq(lambda x: math.log(cost(math.exp(x)) / target_epsilon), *gap, xtol=2e-4, rtol=1e-6))
        else:
            sigma = low
    sigma = math.ceil(sigma * 1e4) / 1e4
    while cost(sigma) > target_epsilon:  # the root is found to within a tolerance, on either side
        sigma = math.ceil(sigma * 1.0002 * 1e4) / 1e4
    return sigma
