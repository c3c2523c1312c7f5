"""FedAvg over LoRA factors: the mean of A and the mean of B, each on its own.

McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1; on LoRA factors: FedIT, Zhang et al., ICASSP 2024,
arXiv 2305.05644. Inexact by design: mean(B) mean(A) is not mean(B A); the run's aggregation error says by how much.
DoRA's magnitude vectors are averaged with the other dense parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    require_same_ranks,
    rules,
)


@final
@rules.register("fedavg")
@dataclass(frozen=True)
class FedAvg(Aggregator):
    """A <- sum_k p_k A_k, B <- sum_k p_k B_k, dense likewise; clients go on from the mean with a fresh optimiser."""

    claims: ClassVar[Claim] = Claim.LINEAR | Claim.ANY_TENSORS
    paper: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629; FedIT: Zhang et al. 2024, arXiv 2305.05644"

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The last line of McMahan's Algorithm 1, w <- sum_k (n_k / n) w_k, applied to each tensor."""
        mean = WeightedMean()
        for update in updates:
            require_same_ranks(self, state, ClientSpec(update.client_id, update.adapter.layout))
            mean.add(update.adapter.tensors(), update.num_examples)
        adapter = state.adapter.with_tensors(mean.result(like=state.adapter.tensors()))
        return replace(state, adapter=adapter, round=state.round + 1)
