"""Attacks on our own private step: a lower bound of epsilon that a claim must stay above.

An audit can refute a claim, never prove it. Two kinds: the one-run audit with canaries (Steinke et al. 2023,
arXiv 2305.08846), and a two-world audit aimed at one client. `fedlora.privacy.checks` looks at the mechanism itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import PrivacyError
from fedlora.privacy.dpsgd import Losses, poisson_batches, secret_rng

CONFIDENCE = 0.95
"""Of a lower bound."""


class Step(Protocol):
    """What is audited: `PrivateStep`, or somebody's own."""

    def step(self, indices: np.ndarray, losses: Losses) -> None:
        """One private step on a sample."""


MakeStep = Callable[[torch.nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]]
"""Model and optimiser -> a context manager that gives a `Step`; for a user's own setting
`lambda model, optimizer: PrivateStep(model, optimizer, max_grad_norm=..., ...)`."""
Sampler = Callable[[int], Iterable[np.ndarray]]
"""Number of examples -> the samples of all steps."""
Attack = Callable[[np.ndarray], np.ndarray]
"""Numbers of the canaries that are among the examples [k] -> a score of every canary [m], high where it seems in."""


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Args:
        claimed: the epsilon that was claimed.
        lower_bound: with `CONFIDENCE`, the true epsilon is at least this.
        correct: guesses that were right.
        guesses: guesses made.
    """

    claimed: float
    lower_bound: float
    correct: int
    guesses: int

    @property
    def refuted(self) -> bool:
        """Whether the claim cannot be true (at the audit's confidence)."""
        return self.lower_bound > self.claimed


def audit_in_one_run(
    attack: Attack,
    *,
    claimed: float,
    delta: float,
    canaries: int = 4000,
    generator: np.random.Generator | None = None,
) -> AuditResult:
    """The one-run audit: Steinke et al. 2023, Algorithm 1.

    A fair coin decides for each canary whether it is among the examples. The highest scores are guessed to be in, the
    lowest out, and the rest is left open. A tenth of the canaries is guessed, half of them for each side, and 400 if
    there are so many: with fewer even right guesses alone bound epsilon too low. Few are right more often: 400 of 4000
    told a quarter of the noise from the whole in 60 of 60 runs at epsilon 4 (q = 1, T = 1) and at epsilon 1 (q = 1/4,
    T = 8).

    Args:
        attack: trains on the canaries that are in, and scores all: `canary_steps`, or a whole training loop.
        claimed: epsilon of all that `attack` does, at `delta`.
        delta: of the claim.
        canaries: m.
        generator: of the coins.

    Returns:
        The lower bound and how it came about.
    """
    rng = generator if generator is not None else secret_rng()
    included = rng.random(canaries) < 0.5
    order = np.argsort(attack(np.flatnonzero(included)))
    half = min(canaries, max(400, canaries // 10)) // 2
    correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    bound = epsilon_lower_bound(canaries, 2 * half, correct, delta, CONFIDENCE)
    return AuditResult(claimed, bound, correct, 2 * half)


def canary_steps(
    make_step: MakeStep,
    *,
    sample_rate: float,
    steps: int,
    rounds: int = 1,
    canaries: int = 4000,
    sampler: Sampler | None = None,
) -> Attack:
    """An attack on private steps, on a model that holds nothing but Dirac canaries.

    Canary i has a gradient along coordinate i alone, far above any clip norm; its score is what the noisy gradients
    have added up to there.

    Args:
        make_step: the step under audit, with its clip norm, noise and expected batch size; made anew each round.
        sample_rate: q of the claim.
        steps: T of the claim, in one round.
        rounds: how often.
        canaries: m; the model has this many parameters.
        sampler: how a round's batches are drawn; `poisson_batches` if not given.
    """
    draw = sampler or (lambda n: poisson_batches(n, sample_rate, steps))

    def attack(members: np.ndarray) -> np.ndarray:
        model = Canaries(canaries)
        for _ in range(rounds):
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            with make_step(model, optimizer) as private:
                for indices in draw(len(members)):
                    private.step(indices, lambda part: model(torch.from_numpy(members[part])))
        return model.scores()

    return attack


class Canaries(torch.nn.Module):
    """Loss of canary i = 10,000 w_i: its gradient is 10,000 e_i.

    Args:
        m: how many; w = 0 [m] at first.
    """

    def __init__(self, m: int) -> None:
        super().__init__()
        self.line = torch.nn.Linear(m, 1, bias=False)
        torch.nn.init.zeros_(self.line.weight)

    def forward(self, canary: Tensor) -> Tensor:
        """Numbers of canaries [b] -> their losses [b]."""
        rows = torch.nn.functional.one_hot(canary, self.line.in_features).to(self.line.weight.dtype)
        losses: Tensor = self.line(1e4 * rows).squeeze(1)
        return losses

    def scores(self) -> np.ndarray:
        """How far gradient descent has moved each weight [m] down."""
        down: np.ndarray = -self.line.weight.detach().cpu().flatten().double().numpy()
        return down


def epsilon_lower_bound(m: int, r: int, v: int, delta: float, confidence: float) -> float:
    """The largest epsilon that v right guesses of r refute: Steinke et al. 2023, Theorem 5.2 and Appendix D.

    Args:
        m: canaries.
        r: guesses, <= m.
        v: right ones, <= r.
        delta: of the claim.
        confidence: 1 minus the probability of refuting a true claim.
    """
    if not 0 <= v <= r <= m:
        raise PrivacyError(
            f"an audit needs 0 <= right guesses <= guesses <= canaries, not {v}, {r}, {m}", code="out-of-range"
        )
    low, high = 0.0, 1.0
    while _p_value(m, r, v, high, delta) < 1 - confidence:
        low, high = high, 2 * high
        if high > 64:
            return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(m, r, v, middle, delta) < 1 - confidence else (low, middle)
    return low


def _p_value(m: int, r: int, v: int, eps: float, delta: float) -> float:
    """Largest probability of at least v right guesses of r under (eps, delta)-privacy."""
    from scipy.stats import binom

    q = 1 / (1 + math.exp(-eps))
    beta = float(binom.sf(v - 1, r, q))
    mass = np.cumsum(binom.pmf(v - np.arange(1, v + 1), r, q))
    alpha = float(np.max(mass / np.arange(1, v + 1), initial=0.0))
    return min(1.0, beta + alpha * delta * 2 * m)


def audit_two_worlds(
    output: Callable[[bool], float], *, claimed: float, delta: float, trials: int = 2000
) -> AuditResult:
    """A targeted audit: run the mechanism with and without one worst-case client, and tell the worlds apart.

    Half of the trials choose the threshold and its side, the other half count its errors; the bound is
    log((1 - delta - FNR) / FPR) with Clopper-Pearson upper ends (Jagielski et al. 2020, arXiv 2006.07709, section 3).

    Args:
        output: world -> a number, high where the client is there (a projection of what the mechanism gave out).
        claimed: epsilon at `delta`.
        delta: of the claim.
        trials: runs in each world.
    """
    from scipy.stats import beta

    half = trials // 2
    without, there = ([output(world) for _ in range(2 * half)] for world in (False, True))
    absent, present = np.array(without), np.array(there)

    def upper(errors: int) -> float:
        return 1.0 if errors >= half else float(beta.ppf((1 + CONFIDENCE) / 2, errors + 1, half - errors))

    def bound(high_errors: int, low_errors: int) -> float:
        false_positive, false_negative = upper(high_errors), upper(low_errors)
        one = math.log(max(1 - delta - false_negative, 1e-300) / false_positive)
        other = math.log(max(1 - delta - false_positive, 1e-300) / false_negative)
        return max(0.0, one, other)

    def errors(threshold: float, part: slice) -> tuple[int, int]:
        return int((absent[part] >= threshold).sum()), int((present[part] < threshold).sum())

    candidates = np.quantile(np.concatenate([absent[:half], present[:half]]), np.linspace(0.005, 0.995, 199))
    best = max(candidates, key=lambda t: bound(*errors(float(t), slice(half))))
    wrong = errors(float(best), slice(half, None))
    return AuditResult(claimed, bound(*wrong), 2 * half - sum(wrong), 2 * half)
