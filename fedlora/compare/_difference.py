"""Is it really better? A paired bootstrap over seeds, and over test examples where they are known.

Shapes: s = seeds, m = draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedlora.compare._groups import Group, silently_changed
from fedlora.compare._runs import Run
from fedlora.provenance import in_words

DRAWS = 1000
LEVEL = 0.95
AGREE = 1e-4
"""Relative difference up to which the figures of two runs count as the same: another order of sums stays below it."""


@dataclass(frozen=True)
class Difference:
    """The difference of one group to another.

    Args:
        seeds: the seeds that both groups have.
        why: a clause on what the interval covers, or why it decides nothing.
        mean: mean over these seeds of the differences of the final figures (mine minus the other's).
        low, high: ends of the interval; NaN where there is none.
        by_example: whether the test examples were drawn as well.
        verdict: "better", "worse", "the same" (in every round) or "undecided".
    """

    seeds: tuple[int, ...]
    why: str
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    by_example: bool = False
    verdict: str = "undecided"


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of some values, and half of its interval at `LEVEL` by Student's t; infinite for one value."""
    from scipy.stats import t

    found, count = np.asarray(values, dtype=float), len(values)
    if count < 2:
        return float(found.mean()), math.inf
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * float(found.std(ddof=1)) / math.sqrt(count)
    return float(found.mean()), half


def difference(mine: Group, other: Group, *, draws: int = DRAWS) -> Difference:
    """Compare the final figures of two groups, seed by seed.

    The standard error is that of a paired bootstrap: seeds are drawn with replacement, and where all seeds were tested
    on the same examples and kept their outcomes, these are drawn too, the same ones for all runs (where each seed has
    test examples of its own, what differs between seeds holds their share already). The interval is
    mean +- t(s - 1) sqrt(s / (s - 1)) SE: Student's quantile, and the correction for the narrowness of a bootstrap
    over few values (Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69(4),
    2015, section 4.3). Over seeds alone it is Student's paired interval. With one seed it is the 2.5% and 97.5%
    quantile over test examples, and says nothing about other seeds.

    Args:
        mine: the group that may be better.
        other: the group that it is measured against.
        draws: number of bootstrap samples; they are the same in every call.
    """
    pairs = mine.pairs(other)
    seeds = tuple(one.seed for one, _ in pairs)
    if not seeds:
        return Difference(seeds, "they have no seed in common")
    if changed := silently_changed(*pairs):
        return Difference(seeds, f"{in_words(changed)} changed between them")
    found = np.array([one.final - two.final for one, two in pairs])
    if not np.isfinite(found).all():
        return Difference(seeds, "a run ended with a figure that is not finite")
    runs = [run for pair in pairs for run in pair]
    by_example = len({run.test for run in runs}) == 1 and all(run.outcomes is not None for run in runs)
    mean = float(found.mean())
    if not found.any() and all(_agree(*pair) for pair in pairs):
        return Difference(
            seeds, "all figures agree in every round: what differs has no effect", mean, verdict="the same"
        )
    if len(seeds) == 1 and not by_example:
        return Difference(seeds, "one seed decides nothing: run more", mean)
    table = np.stack([_by_example(*pair, draws) for pair in pairs]) if by_example else np.tile(found, (draws, 1)).T
    rows = np.random.default_rng(0).integers(0, len(seeds), (draws, len(seeds)))
    means = table[rows, np.arange(draws)[:, None]].mean(axis=1)
    if float(means.std()) < 1e-12:  # of values that do not differ no bootstrap tells how far others would be
        what = "test example" if by_example and len(seeds) == 1 else "seed"
        why = f"every {what} gives the same difference, which tells nothing of others: run more"
        return Difference(seeds, why, mean)
    low, high = _interval(mean, means, len(seeds))
    why = f"{len(seeds)} seeds" + (" and their test examples" if by_example else "")
    if len(seeds) == 1:
        why = "one seed: the interval is over test examples, and another seed may turn it round"
    verdict = "undecided"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == runs[0].higher_is_better else "worse"
    return Difference(seeds, why, mean, low, high, by_example, verdict)


def _agree(one: Run, two: Run) -> bool:
    """Whether two runs did the same, up to rounding: their figures agree in every round, those of training too."""
    return all(
        mine.index.equals(yours.index) and np.allclose(mine, yours, rtol=AGREE, atol=0, equal_nan=True)
        for mine, yours in ((one.by_round(name), two.by_round(name)) for name in (one.metric, "loss", "train_loss"))
    )


def _interval(mean: float, means: Float[np.ndarray, "m"], seeds: int) -> tuple[float, float]:
    from scipy.stats import t

    if seeds == 1:
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)
    reach = float(t.ppf((1 + LEVEL) / 2, seeds - 1)) * math.sqrt(seeds / (seeds - 1)) * float(means.std())
    return mean - reach, mean + reach


def _by_example(one: Run, two: Run, draws: int) -> Float[np.ndarray, "m"]:
    """Differences of the figure over resampled test examples, the same ones for all pairs of runs."""
    assert one.outcomes is not None
    size = len(next(iter(one.outcomes.values())))
    generator = np.random.default_rng(1)
    samples = (generator.integers(0, size, size) for _ in range(draws))
    return np.array([_figure(one, rows) - _figure(two, rows) for rows in samples])


def _figure(run: Run, rows: np.ndarray) -> float:
    outcomes = run.outcomes or {}
    return run.task.summarise({name: values[rows] for name, values in outcomes.items()})[run.metric]
