"""FLTrust: clients count as far as they go where a trusted client goes.

Cao, Fang, Liu, Gong, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021, arXiv
2012.13995, equations (2) to (4). With the trusted update d_0,

    TS_k = max(0, cos(D_k, D_0)),      the step  sum_k TS_k (|d_0| / |d_k|) d_k / sum_k TS_k.

In the paper d_0 is the server's own, from a small clean data set; here it is that of a client whom the server trusts,
and as there it is not averaged itself. The cosines are those of the changes of weights D_k (s B A less the start's, and
the dense parts' steps) from Grams of the factors, whatever basis or rank those have. The lengths are those of what is
sent, which is what the inner rule averages: a client that hides a large factor behind a small one is shortened too.

If nobody is trusted, or the trusted client did not answer, nothing changes in the round (third-party code falls back on
the plain mean, which is when it must not): let `server.fraction` be 1, so that it is asked in each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch

from fedlora.aggregators._around import Around, Inner, finite, gram_of_changes, received
from fedlora.aggregators._base import Claim, ClientUpdate, GlobalState, rules
from fedlora.aggregators.fedavg import FedAvg


@final
@rules.register("fltrust")
@dataclass(frozen=True)
class FlTrust(Around):
    """`inner` aggregates the updates, each as long as the trusted one and with its trust as the weight.

    Metrics: "fltrust/trusted", the share of the other clients whose trust is above 0; "fltrust/root", whether the
    trusted client answered (0 or 1).

    Args:
        root: number of the trusted client.
        inner: any rule.
    """

    root: int = 0
    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.ROBUST
    paper: ClassVar[str] = "Cao et al., NDSS 2021, arXiv 2012.13995"

    def __post_init__(self) -> None:
        self.inherit(Claim.MIXED_RANKS | Claim.CHANGES_BASE, Claim.ROBUST)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's, of the trusted updates; holds all updates at once.

        Raises:
            RuleError: no update, one does not fit, none is finite, or see the inner rule.
        """
        replies = finite(received(self, state, updates))
        place = next((i for i, one in enumerate(replies) if one.update.client_id == self.root), None)
        if place is None:
            metrics = {"fltrust/root": 0.0, "fltrust/trusted": 0.0}
            return replace(state, round=state.round + 1, metrics=metrics)
        root = replies[place]
        inner = gram_of_changes(replies)
        size = inner.diagonal().clamp(min=0.0).sqrt()
        trust = torch.where(size > 0, inner[place] / (size * size[place]), 0.0).clamp(min=0.0).nan_to_num(nan=0.0)
        scored = zip(replies, trust.tolist(), strict=True)
        trusted = [(one, score) for one, score in scored if one is not root and score > 0 and one.length > 0]
        metrics = {"fltrust/root": 1.0, "fltrust/trusted": len(trusted) / max(1, len(replies) - 1)}
        if not trusted:
            return replace(state, round=state.round + 1, metrics=metrics)
        kept = (replace(one.shortened(root.length / one.length), num_examples=score) for one, score in trusted)
        after = self.outer_state(self.inner.aggregate(self.inner_state(state), kept))
        return replace(after, metrics={**after.metrics, **metrics})
