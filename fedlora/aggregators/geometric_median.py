"""Geometric median (RFA): the point whose distances to the clients' updates have the smallest sum.

Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022,
arXiv 1912.13445, algorithm 2 (smoothed Weiszfeld):

    z = argmin sum_k p_k |z - D_k|,      beta_k = p_k / max(nu, |z - D_k|),  z <- sum_k beta_k D_k / sum_k beta_k.

D_k is the change of weights, s B A less what the client started from, and the dense parts' steps; all distances come
from the Gram matrix of the D_k, and z is its weights w_k = beta_k / sum beta. The inner rule gets the updates with the
weights w_k: an EXACT one makes the geometric median of the changes of weights, FedAvg the mean of the factors under the
same weights. The factors themselves are looked at once: see `fedlora.aggregators._around.usable`.

The authors' code stops after 4 iterations from the mean, where one liar of 9 with 1e8 still has 7,899 left of 1.0: each
iteration divides by about 8. Here the start is the half of the clients around the one with the smallest sum of
distances, and the iteration ends when z moves no more. A client on whose point the others pull less than its own p_k
holds the median there (Kuhn's condition), which is looked at first: the iteration would creep towards such a point.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from fedlora.aggregators._around import Around, Inner, gram_of_changes, received, squared_distances, usable
from fedlora.aggregators._base import Claim, ClientUpdate, GlobalState, rules
from fedlora.aggregators.fedavg import FedAvg

LONGEST = 10_000
"""Iterations at most."""
TOLERANCE = 1e-14
"""Length of the last iteration's step against the size of the updates around it."""
NU = 1e-9
"""Smallest distance in the denominator, against the median one at the start."""


@final
@rules.register("geometric_median")
@dataclass(frozen=True)
class GeometricMedian(Around):
    """`inner` aggregates with weights that make the geometric median of the changes of weights.

    Metrics: "geometric_median/largest_share", the largest of the weights.

    Args:
        inner: any rule; exact with one that claims EXACT.
    """

    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.ROBUST
    paper: ClassVar[str] = "Pillutla, Kakade, Harchaoui, IEEE TSP 2022, arXiv 1912.13445"

    def __post_init__(self) -> None:
        kept = Claim.MIXED_RANKS | Claim.CHANGES_BASE | Claim.GAUGE_FREE
        self.inherit(kept, Claim.ROBUST)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's, under Weiszfeld's weights; holds all updates at once.

        Raises:
            RuleError: no update, one does not fit, none is finite, or see the inner rule.
        """
        replies = usable(self.inner, received(self, state, updates))
        examples = torch.tensor([one.update.num_examples for one in replies], dtype=torch.float64)
        weights = weiszfeld(gram_of_changes(replies), examples / examples.sum())
        kept = [
            replace(one.update, num_examples=float(weight))
            for one, weight in zip(replies, weights, strict=True)
            if weight > 0
        ]
        after = self.outer_state(self.inner.aggregate(self.inner_state(state), kept))
        return replace(after, metrics={**after.metrics, "geometric_median/largest_share": float(weights.max())})


def weiszfeld(inner: Tensor, shares: Tensor) -> Tensor:
    """The weights w of the geometric median sum_k w_k D_k.

    Args:
        inner: <D_a, D_b>, float64 [K, K].
        shares: p_k, float64 [K].
    """
    apart = squared_distances(inner).sqrt()
    here = apart == 0.0
    pulls = torch.where(here, 0.0, shares / apart)  # of each client on the point of another
    pulls = pulls - torch.diag(pulls.sum(dim=1))
    held = (pulls @ inner * pulls).sum(dim=1).clamp(min=0.0).sqrt() <= (here * shares).sum(dim=1)
    if held.any():
        return _at(here[int(held.int().argmax())], shares)
    middle = int((apart * shares).sum(dim=1).argmin())
    nearest = apart[middle].argsort(stable=True)[: len(shares) // 2 + 1]
    w = _at(torch.zeros_like(shares, dtype=torch.bool).index_fill_(0, nearest, value=True), shares)
    size = float(apart[middle].median())
    return torch.from_numpy(_iterate(inner.numpy(), shares.numpy(), w.numpy(), size))


def _iterate(inner: Any, shares: Any, w: Any, size: float) -> Any:
    """Weiszfeld's iterations from weights w; in NumPy, whose calls on K numbers take a fifth of torch's.

    Args:
        inner: array [K, K].
        shares: array [K], as is w and what is given.
        size: of the updates, by which the iterations end.
    """
    lengths = inner.diagonal()
    for _ in range(LONGEST):
        moments = inner @ w
        away = (lengths - 2 * moments + w @ moments).clip(0.0) ** 0.5
        beta = shares / away.clip(NU * size)
        step = beta / beta.sum() - w
        w = w + step
        if (step @ inner @ step) <= (TOLERANCE * size) ** 2:
            break
    return w


def _at(chosen: Tensor, shares: Tensor) -> Tensor:
    w = torch.where(chosen, shares, 0.0)
    return w / w.sum()
