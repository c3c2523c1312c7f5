"""FSLoRA: each client trains a random sketch of the global adapter's units, another one in each round.

Fang et al., "Federated Sketching LoRA", ICML 2026, arXiv 2501.19389, algorithm 1. Client k of rank k_i trains k_i of
the r units, drawn anew in each round and scaled so that the sketch is right on average:

    dW_k = s B S_k A,      S_k = (r / k_i) diag(mask),  E S_k = I;      B, A <- B, A + sum_k p_k (their units' steps).

A unit that no client drew stays as it is. With one alpha for all and s = alpha / r, the client's own scale is s r / k_i
already; under another scale (rsLoRA) its B is multiplied by what is missing, and divided by it on the way back.

The sketch is a function of the run's seed, the round and the client, so that nothing but the units travels. Unlike the
authors' code (whose names never match, so that nothing is sketched), A and B share one choice of units.
Dense parts are averaged; DoRA's magnitude vectors are among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, Layout, LoraPair
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
from fedlora.aggregators._nested import require_nested
from fedlora.rng import derive


@final
@rules.register("fslora")
@dataclass(frozen=True)
class FsLora(Aggregator):
    """A, B <- A, B + sum_k p_k (steps of client k's units); dense parts are averaged."""

    claims: ClassVar[Claim] = Claim.MIXED_RANKS
    paper: ClassVar[str] = "Fang et al., ICML 2026, arXiv 2501.19389"
    keeps_units: ClassVar[bool] = False

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The client's units of this round, in their order; all of them at the global rank."""
        return ClientPlan(_sketched(state, client.layout, client.client_id))

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The mean of the steps, each put back where its unit is; one update in memory at a time.

        Raises:
            RuleError: if there is no update, or one does not fit.
        """
        mean = WeightedMean()
        for update in updates:
            start = _sketched(state, update.adapter.layout, update.client_id)
            tensors: dict[str, Tensor] = dict(update.adapter.dense)
            for name, pair in state.adapter.pairs.items():
                theirs, planned = update.adapter.pairs[name], start.pairs[name]
                units = sketch(state, name, pair.rank, theirs.rank, update.client_id)
                A = torch.zeros_like(pair.A, dtype=torch.float64)
                B = torch.zeros_like(pair.B, dtype=torch.float64)
                A[units] = theirs.A.double() - planned.A.double()
                B[:, units] = (theirs.B.double() - planned.B.double()) / _missing(pair, theirs.rank, theirs.scale)
                tensors[f"{name}:A"], tensors[f"{name}:B"] = A, B
            mean.add(tensors, update.num_examples)
        like = state.adapter.tensors()
        mean.result(like=like)  # refuses what does not fit
        moved = {
            name: (step if name in state.adapter.dense else like[name].double() + step).to(like[name].dtype)
            for name, step in mean.exact().items()
        }
        return replace(state, adapter=state.adapter.with_tensors(moved), round=state.round + 1)


def sketch(state: GlobalState, module: str, rank: int, count: int, client_id: int) -> Tensor:
    """Which `count` of `rank` units a client trains in the next round, ascending, int64 [count]."""
    generator = torch.Generator().manual_seed(derive(state.seed, "fslora", state.round, client_id, module))
    return torch.randperm(rank, generator=generator)[:count].sort().values


def _sketched(state: GlobalState, layout: Layout, client_id: int) -> AdapterState:
    require_nested(state, layout, client_id)
    pairs = {}
    for name, pair in state.adapter.pairs.items():
        theirs = layout[name]
        if theirs != pair.shape:
            units = sketch(state, name, pair.rank, theirs.rank, client_id)
            B = pair.B[:, units] * _missing(pair, theirs.rank, theirs.scale)
            pair = LoraPair(pair.A[units], B, theirs.scale)
        pairs[name] = pair
    return AdapterState(pairs, state.adapter.dense)


def _missing(pair: LoraPair, count: int, scale: float) -> float:
    """What a client's own scale lacks of the sketch's, s r / k_i."""
    return pair.scale * pair.rank / count / scale
