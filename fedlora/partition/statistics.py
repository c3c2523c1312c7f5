"""How much clients differ, as numbers.

Shapes: k = clients, c = classes (or domains).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def count_values(clients: Sequence[np.ndarray], values: np.ndarray, number: int) -> np.ndarray:
    """How often each client has each class or domain.

    Args:
        clients: each client's indices.
        values: class or domain of each example, 0 to `number` - 1 [n].
        number: of classes or domains.

    Returns:
        int64 [k, number].
    """
    return np.stack([np.bincount(values[rows], minlength=number) for rows in clients]).astype(np.int64)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of each client's distribution in bits [k]; 0 if it has one class only.

    Args:
        counts: [k, c], from `count_values`.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.asarray(np.abs(np.sum(shares * logs, axis=1)))  # no -0.0


def js_divergence(counts: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of each client's distribution from that of all clients together, in bits [k].

    JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, from 0 (the same) to 1 (nothing in common): Lin 1991, "Divergence
    measures based on the Shannon entropy", equation (4.1) with equal weights.

    Args:
        counts: [k, c], from `count_values`.
    """
    whole = counts.sum(axis=0, keepdims=True)
    mine = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    theirs = whole / max(int(whole.sum()), 1)
    # Rounding can make the difference of equal entropies a tiny negative number.
    return np.asarray(np.maximum(entropy((mine + theirs) / 2) - (entropy(mine) + entropy(theirs)) / 2, 0.0))


def mean_js_divergence(counts: np.ndarray) -> float:
    """Mean of `js_divergence` over the clients, weighted by their sizes."""
    return float(np.average(js_divergence(counts), weights=counts.sum(axis=1)))
