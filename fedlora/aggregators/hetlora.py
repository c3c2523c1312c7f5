"""HetLoRA: zero-padding for mixed ranks, each client weighted by the size of its update.

Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024,
arXiv 2401.06432, section 4 (sparsity-weighted aggregation):

    w_k = |B_k A_k|_F / sum_j |B_j A_j|_F,      A = sum_k w_k [A_k; 0],  B = sum_k w_k [s_k/s B_k, 0].

A and B are averaged each on its own, as in FedAvg, and a receiver of rank r_k gets the first r_k units. The norms come
from r x r Grams. Dense parts are weighted by n_k. Where all products are zero, so are the pairs.

Ours: the scale s_k / s, on which the paper is silent, and the other `weights`. Not here: the paper's regulariser on the
clients' last units and the pruning that follows from it, which need a loss of the client's own.
DoRA's magnitude vectors are averaged with the other dense parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    require_weight,
    rules,
)
from fedlora.aggregators._nested import nested_start, padded_columns, padded_rows, require_nested
from fedlora.lowrank import squared_norm, stacks


@final
@rules.register("hetlora")
@dataclass(frozen=True)
class HetLora(Aggregator):
    """A <- sum_k w_k [A_k; 0], B <- sum_k w_k [s_k/s B_k, 0] for each module; dense parts are averaged by n_k.

    Args:
        weights: w_k in proportion to |B_k A_k|_F ("norm", the paper's: a client under two names counts twice), to n_k
            ("examples", zero-padding as a baseline), or to their product ("both").
    """

    weights: Literal["norm", "examples", "both"] = "norm"

    claims: ClassVar[Claim] = Claim.MIXED_RANKS
    paper: ClassVar[str] = "Cho et al., EMNLP 2024, arXiv 2401.06432"

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The first r_k units."""
        return ClientPlan(nested_start(state, client.layout, client.client_id))

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The weighted means, one update in memory at a time.

        Raises:
            RuleError: if there is no update, or one does not fit.
        """
        dense = WeightedMean()
        means = {name: WeightedMean() for name in state.adapter.pairs}
        for update in updates:
            require_weight(update.num_examples, update.client_id)
            require_nested(state, update.adapter.layout, update.client_id)
            dense.add(update.adapter.dense, update.num_examples)
            for name, pair in state.adapter.pairs.items():
                theirs = update.adapter.pairs[name]
                weight = self._weight(theirs, update.num_examples)
                if weight > 0:
                    means[name].add({"A": padded_rows(theirs, pair), "B": padded_columns(theirs, pair)}, weight)
        averaged: dict[str, Tensor] = dense.result(like=state.adapter.dense)
        pairs = {name: self._pair(pair, means[name]) for name, pair in state.adapter.pairs.items()}
        return replace(state, adapter=AdapterState(pairs, averaged), round=state.round + 1)

    def _weight(self, pair: LoraPair, examples: float) -> float:
        if self.weights == "examples":
            return examples
        size = math.sqrt(squared_norm(*stacks([(1.0, pair)]))) / abs(pair.scale)
        return size * (examples if self.weights == "both" else 1.0)

    @staticmethod
    def _pair(pair: LoraPair, mean: WeightedMean) -> LoraPair:
        if not mean.count:  # nobody's product is other than zero
            return replace(pair, B=pair.B.new_zeros(pair.B.shape))
        exact = mean.exact()
        return LoraPair(exact["A"].to(pair.A.dtype), exact["B"].to(pair.B.dtype), pair.scale)
