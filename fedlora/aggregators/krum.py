"""Krum and multi-Krum: the updates that lie closest to the others, by the changes of weights that they make.

Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
NeurIPS 2017, arXiv 1703.02757, section 4. Of n updates, f of which may lie,

    score_i = sum of the n - f - 2 smallest |D_i - D_j|^2 over j other than i;

the m best are aggregated (Krum: m = 1).

D_i is the change of weights, s B A less what the client started from, and the dense parts' steps. The distances come
from Grams of the factors, so that two clients whose factors are in different bases, or of different ranks, are as far
apart as their models are. The factors themselves are looked at once: see `fedlora.aggregators._around.usable`.

f and m are shares here, f = floor(share n), because the number of replies varies. The theorem asks for n >= 2 f + 3; a
round of fewer still has a result. f counts *names*: a client under many names outvotes the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

from fedlora.aggregators._around import (
    Around,
    Inner,
    gram_of_changes,
    received,
    require_share,
    squared_distances,
    usable,
)
from fedlora.aggregators._base import Claim, ClientUpdate, GlobalState, rules
from fedlora.aggregators._bounds import require_bounds
from fedlora.aggregators.fedavg import FedAvg


@final
@rules.register("krum")
@dataclass(frozen=True)
class Krum(Around):
    """`inner` aggregates the update that lies closest to the others, or the best share of them (multi-Krum).

    Metrics: "krum/kept", the number of updates that `inner` got.

    Args:
        liars: f as a share of the round's clients.
        keep: m as a share of them, at most 1 - liars; 0 for one update alone.
        inner: any rule.

    Raises:
        ConfigError: a share that is out of its range.
    """

    liars: float = 0.3
    keep: float = 0.0
    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.ROBUST
    paper: ClassVar[str] = "Blanchard et al., NeurIPS 2017, arXiv 1703.02757"

    def __post_init__(self) -> None:
        require_share("krum", "liars", self.liars)
        most = f"at least 0 and at most 1 - liars = {1 - self.liars:g}"
        require_bounds("krum", "keep", self.keep, 0 <= self.keep <= 1 - self.liars + 1e-9, most)
        kept = Claim.MIXED_RANKS | Claim.CHANGES_BASE | Claim.GAUGE_FREE
        self.inherit(kept, Claim.ROBUST if self.liars else Claim.NONE)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's, of the chosen updates; holds all updates at once.

        Raises:
            RuleError: no update, one does not fit, none is finite, or see the inner rule.
        """
        replies = received(self, state, updates)
        n, good = len(replies), usable(self.inner, replies)
        neighbours = max(1, n - math.floor(self.liars * n + 1e-9) - 2)
        scores = krum_scores(squared_distances(gram_of_changes(good)).tolist(), neighbours)
        count = max(1, math.floor(self.keep * n + 1e-9))
        best = sorted(range(len(good)), key=lambda i: (scores[i], i))[:count]
        kept = [good[i].update for i in sorted(best)]
        after = self.outer_state(self.inner.aggregate(self.inner_state(state), kept))
        return replace(after, metrics={**after.metrics, "krum/kept": float(len(kept))})


def krum_scores(distances: list[list[float]], neighbours: int) -> list[float]:
    """Each one's sum of its smallest squared distances to others."""
    return [sum(sorted(d for j, d in enumerate(row) if j != i)[:neighbours]) for i, row in enumerate(distances)]
