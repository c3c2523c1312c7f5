"""Which examples are kept for the test.

Shapes: n = examples.
"""

from __future__ import annotations

import numpy as np

from fedlora.errors import DataError
from fedlora.rng import derive


def split_test(
    size: int, fraction: float, seed: int, *, groups: np.ndarray | None = None, domains: np.ndarray | None = None
) -> np.ndarray:
    """A mask of the test examples, bool [n].

    Groups go to the test as wholes, in an order of the seed's, domain by domain, until a domain's share is as near to
    `fraction` as whole groups allow; no domain loses all of its groups. A group that stands in several domains counts
    to the domain of its first example.

    Args:
        size: number of examples.
        fraction: of the examples for the test.
        seed: of the run.
        groups: group of each example [n]; None if each stands for itself.
        domains: domain of each example [n]; None if there is but one.

    Raises:
        DataError: no example would be in the test.
    """
    if groups is None:
        first, units = np.arange(size), np.arange(size)
    else:
        _, first, units = np.unique(groups, return_index=True, return_inverse=True)
    weights = np.bincount(units, minlength=len(first))
    homes = np.zeros(len(first), dtype=np.int64) if domains is None else domains[first]
    chosen = np.zeros(len(first), dtype=bool)
    for home in np.unique(homes):
        members = np.flatnonzero(homes == home)
        generator = np.random.default_rng(derive(seed, "test", str(home)))
        members = generator.permutation(members)
        totals = np.concatenate([[0], np.cumsum(weights[members])])
        # Not the last total: it would take all.
        number = int(np.argmin(np.abs(totals[:-1] - fraction * totals[-1])))
        chosen[members[:number]] = True
    mask = np.asarray(chosen[units])
    if not mask.any():
        raise DataError(
            f"a test fraction of {fraction} of {size} examples in {len(first)} groups is none; raise "
            "data.test_fraction, or give data.test"
        )
    return mask
