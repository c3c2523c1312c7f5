"""How evenly a model serves the clients: the distribution of a figure over them.

Shapes: k = clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedlora.errors import DataError


@dataclass(frozen=True)
class Fairness:
    """A figure's distribution over clients, each of which counts alike.

    Args:
        mean: over the clients.
        variance: over the clients, mean((x - mean)²): what q-FFL calls uniformity (Li et al., "Fair Resource Allocation
            in Federated Learning", ICLR 2020, arXiv 1905.10497, definition 1 and table 1).
        worst: of one client.
        worst_decile: mean over the worst 10% of the clients, as in the same table; at least one client.
        best_decile: mean over the best 10%.
        gini: see `gini`; NaN where it is not defined.
    """

    mean: float
    variance: float
    worst: float
    worst_decile: float
    best_decile: float
    gini: float


def fairness(values: Sequence[float], *, higher_is_better: bool = True) -> Fairness:
    """The distribution of a figure over clients.

    Args:
        values: of each client [k].
        higher_is_better: which end is the worst.

    Raises:
        DataError: there is no client, or a value is not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise DataError(
            "a distribution over clients needs one finite figure per client: evaluate a model that converged",
            code="no-distribution",
        )
    ranked = np.sort(found) if higher_is_better else np.sort(found)[::-1]
    few = math.ceil(len(found) / 10)
    return Fairness(
        mean=float(found.mean()),
        variance=float(found.var()),
        worst=float(ranked[0]),
        worst_decile=float(ranked[:few].mean()),
        best_decile=float(ranked[-few:].mean()),
        gini=gini(found) if found.min() >= 0 and found.sum() > 0 else math.nan,
    )


def gini(values: Sequence[float] | Float[np.ndarray, "k"]) -> float:
    """Gini's coefficient: sum over i and j of |x_i - x_j| / (2 k² mean(x)).

    0 where all are equal, 1 - 1 / k where one has everything (Gini, "Variabilità e mutabilità", 1912).

    Args:
        values: none negative, not all zero [k].

    Raises:
        DataError: it is not defined.

    Example:
        >>> gini([1, 1, 1, 1]), gini([0, 0, 0, 1])
        (0.0, 0.75)
    """
    found = np.sort(np.asarray(values, dtype=np.float64))
    if not found.size or found[0] < 0 or found.sum() == 0:
        raise DataError(
            "Gini's coefficient needs values of which none is negative and at least one is positive",
            code="gini-undefined",
        )
    # In ascending order x_(i) is the larger of a pair (i - 1) times and the smaller one (k - i) times.
    rank = 2 * np.arange(1, len(found) + 1) - len(found) - 1
    return float((rank * found).sum() / (len(found) * found.sum()))
