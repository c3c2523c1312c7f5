"""Direct checks of a private mechanism: exact tests of its noise, its samples and its seeds.

Canaries bound the epsilon of everything together, but loosely: a step that clips each tensor by itself, or draws its
samples at twice the rate, stays below the claim. These checks look at one property at a time. What they are given was
observed on the code that trains; nothing here depends on how that code is written.

A check is refuted by a sound mechanism with probability `ALPHA` at most. An audit makes fewer than `MOST` random ones,
so that it raises a false alarm with probability `FALSE_ALARM` at most, by the union bound. Several tests inside a check
share its `ALPHA` in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

FALSE_ALARM = 1e-3
MOST = 20
ALPHA = FALSE_ALARM / MOST


@dataclass(frozen=True)
class Check:
    """One line of an audit of the mechanism.

    Args:
        what: was checked.
        measured: what was observed.
        bound: what a sound mechanism shows.
        bad: whether it was refuted.
    """

    what: str
    measured: str
    bound: str = ""
    bad: bool = False

    @property
    def verdict(self) -> str:
        """In one word."""
        return "REFUTED" if self.bad else "holds" if self.bound else ""


# ------------------------------------------------------------------------------------------------ norms


def largest(what: str, values: Sequence[float], most: float, unit: str, *, reached: float = 0.0) -> Check:
    """Norms that must not pass a bound; a figure that is not finite passes every bound.

    Args:
        what: names the check.
        values: norms, in units of the bound on them.
        most: the largest one allowed.
        unit: in which they are given.
        reached: the largest one must be at least this, or the check has tried nothing.
    """
    found = max(value if math.isfinite(value) else math.inf for value in values)
    bound = f"at most {most:.5g} {unit}" + (f", at least {reached:.3g}" if reached else "")
    return Check(what, f"{found:.5g} {unit}", bound, not reached <= found <= most)


# ------------------------------------------------------------------------------------------------ noise


def noise_scale(what: str, draws: Mapping[str, Tensor], alpha: float = ALPHA) -> Check:
    """Whether draws have variance 1: the sum of d squares of standard normal numbers is chi-square with d degrees.

    Args:
        what: names the check.
        draws: name of a tensor (and step) -> its noise, divided by the deviation that it should have.
        alpha: of all draws together.
    """
    from scipy.stats import chi2

    size = alpha / (2 * len(draws))
    worst, line, bad = math.inf, ("none", ""), False
    for name, draw in draws.items():
        d, total = draw.numel(), float(draw.double().square().sum())
        low, high = (float(end) for end in (chi2.ppf(size, d), chi2.isf(size, d)))
        p = float(min(chi2.cdf(total, d), chi2.sf(total, d))) if math.isfinite(total) else 0.0
        if p < worst or not math.isfinite(total):
            worst = p
            line = (
                f"{math.sqrt(total / d):.4g} sigma ({name})",
                f"{math.sqrt(low / d):.4g} to {math.sqrt(high / d):.4g}",
            )
        bad |= not low <= total <= high
    return Check(what, *line, bad)


def noise_shape(what: str, draws: Tensor, alpha: float = ALPHA) -> Check:
    """Whether draws are normal: P(sup |F_n - F| > e) <= 2 exp(-2 n e^2) (Massart 1990, on Dvoretzky et al. 1956).

    Args:
        what: names the check.
        draws: that should be standard normal.
        alpha: of the check.
    """
    from scipy.special import ndtr

    values = np.sort(draws.double().flatten().cpu().numpy())
    n = len(values)
    normal, steps = ndtr(values), np.arange(n + 1) / n
    gap = float(max(np.max(steps[1:] - normal), np.max(normal - steps[:-1])))
    bound = math.sqrt(math.log(2 / alpha) / (2 * n))
    return Check(what, f"{gap:.4f} from normal", f"at most {bound:.4f}", not gap <= bound)


def noise_grain(what: str, draws: Tensor) -> Check:
    """Whether draws are as fine as float32: of a few thousand, hardly two are equal; in bfloat16 most are.

    Coarse noise shows through: a sum lands on other values than its neighbour's (Mironov 2012). In float32 the chance
    that a hundredth of 4096 normal numbers are equal to another one is far below 1e-20.
    """
    few = draws.flatten()[:4096].abs()
    equal = 1 - len(torch.unique(few)) / len(few)
    return Check(what, f"{equal:.1%} equal to another", "at most 1.0%", equal > 0.01)


def independence(what: str, groups: Sequence[Float[Tensor, "g d"]], alpha: float = ALPHA) -> Check:
    """Whether draws have nothing in common: the largest correlation of two, up to a factor or a sign.

    The squared cosine of two independent normal vectors of d numbers has the law Beta(1/2, (d - 1) / 2).

    Args:
        what: names the check.
        groups: of draws; those of a group are compared with each other.
        alpha: of all pairs of all groups together.
    """
    from scipy.stats import beta

    pairs = sum(len(group) * (len(group) - 1) // 2 for group in groups)
    worst, line, bad = math.inf, (f"0 of {pairs} pairs", ""), False
    for group in groups:
        if len(group) < 2:
            continue
        rows = group.double()
        norms = rows.norm(dim=1, keepdim=True)
        unit = torch.nan_to_num(rows / norms.clamp_min(1e-300))
        cosines = (unit @ unit.T).abs().fill_diagonal_(0.0)
        found, d = float(cosines.max()), group.shape[1]
        bound = math.sqrt(float(beta.isf(alpha / pairs, 0.5, (d - 1) / 2)))
        alike = int((cosines > bound).sum()) // 2
        p = float(beta.sf(min(1.0, found**2), 0.5, (d - 1) / 2))
        if p < worst or alike:
            worst = p
            line = (f"{found:.2f} correlated at most" + f", {alike} pairs" * bool(alike), f"at most {bound:.2f}")
        bad |= alike > 0
    return Check(what, *line, bad)


def excluded_bits(generators: int) -> int:
    """The longest seed, in bits, that would have been found by its repetitions with probability 0.99.

    Of g seeds out of N, P(no two are equal) <= exp(-g (g - 1) / (2 N)).
    """
    pairs = generators * (generators - 1) / 2
    return max(0, math.floor(math.log2(pairs / math.log(100)))) if pairs > 5 else 0


def expanded_from_a_word(generator: torch.Generator) -> bool:
    """Whether a fresh generator's state was made from a seed of 32 bits: all that torch keeps of `manual_seed`'s on a
    CPU, and few enough to try them all against a published update.

    Knuth's recurrence fills the Mersenne twister (Matsumoto and Nishimura 2002, init_genrand): word i follows from
    word i - 1. Of 624 words drawn by themselves hardly one does.
    """
    if generator.device.type != "cpu":
        return False
    words = generator.get_state().numpy()[24 : 24 + 624 * 8].view(np.uint64)
    before, after = words[:-1], words[1:]
    numbers = np.arange(1, 624, dtype=np.uint64)
    follows = (np.uint64(1812433253) * (before ^ (before >> np.uint64(30))) + numbers) & np.uint64(0xFFFFFFFF)
    return bool((follows == after).mean() > 0.5)


# ------------------------------------------------------------------------------------------------ samples


def shares(what: str, counts: Mapping[str, tuple[int, int, float]], alpha: float = ALPHA) -> Check:
    """Counts of independent events against their probability, by the binomial law's own tails.

    Args:
        what: names the check.
        counts: what was counted -> how often it happened, of how many, and its probability.
        alpha: of all counts together.
    """
    from scipy.stats import binom

    size = alpha / (2 * len(counts))
    worst, line, bad = math.inf, ("none", ""), False
    for name, (found, trials, probability) in counts.items():
        p = float(min(binom.cdf(found, trials, probability), binom.sf(found - 1, trials, probability)))
        if p < worst:
            worst = p
            low, high = (int(binom.ppf(end, trials, probability)) for end in (size, 1 - size))
            label = f" ({name})" * bool(name)
            line = (
                f"{found / max(1, trials):.4g}{label}",
                f"{low / max(1, trials):.4g} to {high / max(1, trials):.4g}",
            )
        bad |= p < size
    return Check(what, *line, bad)


def spread(what: str, counts: Mapping[str, tuple[np.ndarray, int]], probability: float, alpha: float = ALPHA) -> Check:
    """Whether counts scatter as independent draws make them: sums of squares, by the law that the binomial gives them.

    Samples of a fixed size scatter too little, and so do the times that each example was drawn in shuffled passes.

    Args:
        what: names the check.
        counts: name -> numbers of events, and of how many draws each.
        probability: q of each draw.
        alpha: of all together.
    """
    size = alpha / (2 * len(counts))
    worst, line, bad = math.inf, ("none", ""), False
    for name, (each, trials) in counts.items():
        found = int(((each - round(trials * probability)) ** 2).sum())
        below = _squares(len(each), trials, probability).cumsum()
        at = float(below[min(found, len(below) - 1)])
        before = float(below[min(found, len(below)) - 1]) if found else 0.0
        p = min(at, 1 - before)
        if p < worst:
            worst = p
            mean = float((1 - below).sum())
            low, high = (float(np.searchsorted(below, end)) / mean for end in (size, 1 - size))
            line = (f"{found / mean:.3g} of the variance ({name})", f"{low:.3g} to {high:.3g}")
        bad |= p < size
    return Check(what, *line, bad)


def _squares(number: int, trials: int, probability: float) -> np.ndarray:
    """The law of the sum of `number` independent (count - m)^2, m the rounded mean of the binomial count."""
    from scipy.fft import irfft, next_fast_len, rfft
    from scipy.stats import binom

    support = np.arange(trials + 1)
    mass = binom.pmf(support, trials, probability)
    kept = mass > 1e-12 / number  # what is left out has no weight at any level that is asked for
    law = np.bincount((support[kept] - round(trials * probability)) ** 2, weights=mass[kept] / mass[kept].sum())
    length = (len(law) - 1) * number + 1
    size = next_fast_len(length, real=True)
    sums: np.ndarray = irfft(rfft(law, size) ** number, size)[:length]
    return sums


def samples(what: str, runs: Sequence[Bool[np.ndarray, "T n"]], rate: float) -> list[Check]:
    """Whether samples are Poisson samples: each example in each sample by a coin of its own.

    Args:
        what: names the checks.
        runs: whether each of n examples was in each of T samples; of several clients, or of one client twice.
        rate: q that the account uses.
    """
    whole, (steps, n) = np.stack(runs), runs[0].shape
    square = rate * rate
    out = [shares(f"{what}: rate", {"": (int(whole.sum()), whole.size, rate)})]
    if rate >= 1:
        return out

    def both(one: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
        return int((one & other).sum()), one.size, square

    even, odd = steps // 2 * 2, (steps - 1) // 2 * 2 + 1
    half, pairs = n // 2, n // 2 * 2
    again = {
        "a step and the next": both(whole[:, 0:even:2], whole[:, 1:even:2]),
        "the next and the one after": both(whole[:, 1:odd:2], whole[:, 2:odd:2]),
    }
    together = {
        "neighbours": both(whole[:, :, 0:pairs:2], whole[:, :, 1:pairs:2]),
        "far apart": both(whole[:, :, :half], whole[:, :, half : 2 * half]),
    }
    scatter = {
        "sizes": (whole.sum(2).flatten(), n),
        "times each was drawn": (whole.sum(1).flatten(), steps),
    }
    across = {f"runs {i} and {k}": both(runs[i], runs[k]) for i in range(len(runs)) for k in range(i + 1, len(runs))}
    return [
        *out,
        spread(f"{what}: scatter", scatter, rate),
        shares(f"{what}: of two steps", again),
        shares(f"{what}: of two examples", together),
        *([shares(f"{what}: of two runs", across)] if across else []),
    ]


# ------------------------------------------------------------------------------------------------ masks


def masks(what: str, losses: Sequence[Float[np.ndarray, "T b"]], alpha: float = ALPHA) -> Check:
    """Whether what is dropped out is drawn anew for each example, step, client and run.

    All rows are one and the same example, so that losses differ by what was dropped out alone. If all masks are
    independent, which of two losses is the larger is a fair coin, and coins of different losses agree half of the time.
    Masks from the run's seed agree always: then one example more moves all others' masks, and with them their clipped
    gradients, by far more than C.

    Args:
        what: names the check.
        losses: of T steps and b rows; of several clients, or of one client twice.
        alpha: of the check.
    """
    counts: dict[str, tuple[int, int, float]] = {}

    def agree(name: str, one: np.ndarray, other: np.ndarray) -> None:
        told = (one != 0) & (other != 0)
        counts[name] = (int((np.sign(one) == np.sign(other))[told].sum()), int(told.sum()), 0.5)

    across = [run[:, 0::2] - run[:, 1::2] for run in losses]  # of neighbours, in the same step
    for i, run in enumerate(losses):
        along = run[0::2] - run[1::2]  # of a row, in two steps
        agree(f"of neighbours, run {i}", along[:, 0::2], along[:, 1::2])
        agree(f"of two steps, run {i}", across[i][0::2], across[i][1::2])
        for k in range(i):
            agree(f"of runs {k} and {i}", across[i], across[k])
    for name, (_, of, _) in counts.items():
        if not of:
            return Check(what, f"the same ({name})", "drawn anew", True)
    return shares(what, counts, alpha)
