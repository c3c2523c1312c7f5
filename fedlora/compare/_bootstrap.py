"""Is it really better? A paired bootstrap over seeds, and over test examples where they are known.

Shapes: s = seeds, m = draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedlora.compare._ground import in_pairs
from fedlora.compare._groups import Group
from fedlora.compare._reading import Run
from fedlora.provenance import in_words

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """One group against another.

    Args:
        mean: of the differences of the final figures (mine minus the other's) over the seeds that both have.
        low, high: the interval's ends; NaN where there is none.
        seeds: that both have.
        by_example: whether the test examples were drawn as well.
        verdict: "better", "worse" or "undecided".
        why: a clause on what the interval covers, or why it decides nothing.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]
    by_example: bool
    verdict: str
    why: str


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
        other: what it is measured against.
        draws: of the bootstrap; always the same ones.
    """
    seeds = tuple(sorted(mine.seeds.keys() & other.seeds.keys()))
    if not seeds:
        return _nothing((), "they have no seed in common")
    pairs = [(mine.seeds[seed], other.seeds[seed]) for seed in seeds]
    if changed := in_pairs(pairs):
        return _nothing(seeds, f"{in_words(changed)} changed between them")
    found = np.array([one.final - two.final for one, two in pairs])
    if not np.isfinite(found).all():
        return _nothing(seeds, "a run ended with a figure that is not finite")
    tests = {run.test for pair in pairs for run in pair}
    by_example = len(tests) == 1 and all(run.outcomes is not None for pair in pairs for run in pair)
    if len(seeds) == 1 and not by_example:
        return _nothing(seeds, "one seed decides nothing: run more", float(found[0]))
    generator = np.random.default_rng(0)
    if by_example:
        table = np.stack([_by_example(*pair, draws) for pair in pairs])
        columns = np.arange(draws)[:, None]
    else:
        table, columns = found[:, None], np.zeros((draws, 1), dtype=int)
    rows = generator.integers(0, len(seeds), (draws, len(seeds)))
    means = table[rows, columns].mean(axis=1)
    mean = float(found.mean())
    if float(means.std()) < 1e-12:  # of values that do not differ no bootstrap tells how far others would be
        what = "test example" if by_example and len(seeds) == 1 else "seed"
        return _nothing(seeds, f"every {what} gives the same difference, which tells nothing of others: run more", mean)
    low, high = _interval(mean, means, len(seeds))
    sign = 1 if mine.runs[0].higher_is_better else -1
    verdict = "better" if min(sign * low, sign * high) > 0 else "worse" if max(sign * low, sign * high) < 0 else ""
    return Difference(mean, low, high, seeds, by_example, verdict or "undecided", _covers(len(seeds), by_example))


def _interval(mean: float, means: Float[np.ndarray, "m"], seeds: int) -> tuple[float, float]:
    from scipy.stats import t

    if seeds == 1:
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)
    quantile = float(t.ppf((1 + LEVEL) / 2, seeds - 1))
    reach = quantile * math.sqrt(seeds / (seeds - 1)) * float(means.std())
    return mean - reach, mean + reach


def _by_example(one: Run, two: Run, draws: int) -> Float[np.ndarray, "m"]:
    """Differences of the figure over resampled test examples, the same ones for all pairs of runs."""
    assert one.outcomes is not None
    assert two.outcomes is not None
    size = len(next(iter(one.outcomes.values())))
    generator = np.random.default_rng(1)
    out = np.empty(draws)
    for draw in range(draws):
        rows = generator.integers(0, size, size)
        out[draw] = _figure(one, one.outcomes, rows) - _figure(two, two.outcomes, rows)
    return out


def _figure(run: Run, outcomes: Mapping[str, np.ndarray], rows: np.ndarray) -> float:
    return run.task.summarise({name: values[rows] for name, values in outcomes.items()})[run.metric]


def _covers(seeds: int, by_example: bool) -> str:
    if seeds == 1:
        return "one seed: the interval is over test examples, and another seed may turn it round"
    return f"{seeds} seeds" + (" and their test examples" if by_example else "")


def _nothing(seeds: tuple[int, ...], why: str, mean: float = math.nan) -> Difference:
    return Difference(mean, math.nan, math.nan, seeds, False, "undecided", why)
