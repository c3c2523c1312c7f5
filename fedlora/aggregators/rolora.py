"""RoLoRA: B and A are trained in turn, one of them frozen everywhere; the mean of the other is exact.

Chen et al., NeurIPS 2025, arXiv 2502.01755, algorithm 1 (title and algorithm from the abstract and a third-party
config). In round t = 0, 2, 4, ... the clients train and send B over one frozen A, in the others A over one frozen B:

    sum_k p_k s B_k A = s (sum_k p_k B_k) A,      sum_k p_k s B A_k = s B (sum_k p_k A_k).

B goes first: with B = 0 the gradient of A is zero. One factor travels up; the broadcast has both.

Mixed ranks, beyond the paper, by nesting as in FFA-LoRA: where A is frozen, client k's B_k counts as [s_k/s B_k, 0];
where B is frozen, client k holds s/s_k B[:, :r_k], so that its change is s B[:, :r_k] A_k and A = sum_k p_k [A_k; 0],
without a scale. As there, a receiver of lower rank trains without the units that it lacks.

Dense parts are trained and averaged in every round; DoRA's magnitude vectors are among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, Part
from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    rules,
)
from fedlora.aggregators._nested import nested_start, padded_columns, padded_rows
from fedlora.aggregators.ffa import FfaLora
from fedlora.errors import RuleError


@final
@rules.register("rolora")
@dataclass(frozen=True)
class RoLora(Aggregator):
    """Even rounds: B <- sum_k p_k [s_k/s B_k, 0]; odd rounds: A <- sum_k p_k [A_k; 0]; the other factor is frozen."""

    claims: ClassVar[Claim] = Claim.EXACT | Claim.LINEAR | Claim.MIXED_RANKS
    paper: ClassVar[str] = "Chen et al., NeurIPS 2025, arXiv 2502.01755"

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """FFA-LoRA's: a zero A is refused, over which B could not learn."""
        return FfaLora().init(adapter, seed=seed)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The first r_k units, and the factor whose turn it is."""
        parts = frozenset[Part]((_trained(state), "dense"))
        return ClientPlan(nested_start(state, client.layout, client.client_id), trains=parts, sends=parts)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The mean of the trained factor.

        Raises:
            RuleError: if there is no update, one does not fit, or one was trained over another frozen factor.
        """
        part = _trained(state)
        mean = WeightedMean()
        for update in updates:
            start = nested_start(state, update.adapter.layout, update.client_id)
            tensors: dict[str, Tensor] = dict(update.adapter.dense)
            for name, pair in state.adapter.pairs.items():
                theirs, planned = update.adapter.pairs[name], start.pairs[name]
                frozen, wanted = (theirs.A, planned.A) if part == "B" else (theirs.B, planned.B)
                if not torch.equal(frozen, wanted.to(frozen.dtype)):
                    raise RuleError(
                        f"client {update.client_id} trained {name!r} over another {'A' if part == 'B' else 'B'} than "
                        "the frozen one: it must start from this round's plan and keep that factor fixed",
                        code="frozen-factor-changed",
                    )
                tensors[f"{name}:{part}"] = (padded_columns if part == "B" else padded_rows)(theirs, pair)
            mean.add(tensors, update.num_examples)
        trained = state.adapter.tensors((part, "dense"))
        adapter = state.adapter.with_tensors(mean.result(like=trained))
        return replace(state, adapter=adapter, round=state.round + 1)


def _trained(state: GlobalState) -> Part:
    return "A" if state.round % 2 else "B"
