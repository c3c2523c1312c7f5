"""FRLoRA: every round starts from the same factors, and what the mean of the factors has moved goes into the base.

Yan et al., "Federated Residual Low-Rank Adaptation of Large Language Models", ICLR 2025 (OpenReview e0rQRMUhs7), no
arXiv number; algorithm 1. From (A0, B0), the same in each round,

    A = sum_k p_k A_k,  B = sum_k p_k B_k,      W <- W + s (B A - B0 A0),      the adapter goes back to (A0, B0).

One round changes the weights as FedAvg does; over many the base collects a change of any rank, while the adapter stays
fresh. The paper starts from the largest singular values of W0, which is `adapter.method = "pissa"`.
From B0 = 0 it is FedAvg's product in the base and a restart from the same A0.

DoRA is refused (`require_no_magnitudes`); other dense parts are averaged and go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    require_current_base,
    require_same_ranks,
    rules,
)
from fedlora.aggregators.base_updates import on_current_base, with_change
from fedlora.lowrank import stack


@final
@rules.register("frlora")
@dataclass(frozen=True)
class FrLora(Aggregator):
    """W <- W + s mean(B) mean(A) - s B0 A0; each client starts from (A0, B0); dense parts are averaged."""

    claims: ClassVar[Claim] = Claim.CHANGES_BASE
    paper: ClassVar[str] = "Yan et al., ICLR 2025, OpenReview e0rQRMUhs7"

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """(A0, B0), and the base updates that the client lacks."""
        return on_current_base(super().plan(state, client), state, client.base_version)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The means, and the step of their product as one more base update of rank 2 r.

        Raises:
            RuleError: if there is no update, one does not fit, or one was trained on another version of the base.
        """
        mean = WeightedMean()
        for update in updates:
            require_current_base(state, update)
            require_same_ranks(self, state, ClientSpec(update.client_id, update.adapter.layout))
            mean.add(update.adapter.tensors(), update.num_examples)
        rounded, exact = mean.result(like=state.adapter.tensors()), mean.exact()
        change = {}
        for name, pair in state.adapter.pairs.items():
            wide = torch.promote_types(torch.float32, pair.A.dtype)
            averaged = LoraPair(exact[f"{name}:A"].to(wide), exact[f"{name}:B"].to(wide), pair.scale)
            change[name] = stack([(1.0, averaged), (-1.0, replace(pair, B=pair.B.to(wide)))])
        adapter = AdapterState(state.adapter.pairs, {name: rounded[name] for name in state.adapter.dense})
        return with_change(state, adapter, change)
