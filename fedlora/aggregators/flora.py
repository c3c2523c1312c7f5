"""FLoRA: stack the clients' pairs, and add the stack to the base; any ranks, exact.

Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976, section 3.2:

    [B_1, B_2, ...] [p_1 s_1 A_1; p_2 s_2 A_2; ...] = sum_k p_k s_k B_k A_k = D*.

Weight and scale are on one side only; on both, each term would be wrong by a factor p_k s_k.

The base has a version. Round t's stack takes it from version t to t + 1, and `GlobalState.base_updates` is the log. A
client that was not sampled, restarted or joined late is sent what it lacks, or its dense sum where that is smaller
(`catch_up`), and ends with the same bits as one that was there all along; an update trained on a stale base is refused.
Each client starts each round from a fresh adapter of its own rank: Kaiming A, zero B.

Dense parts stay in the adapter, and are averaged. DoRA is refused (`require_no_magnitudes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fedlora.adapter import AdapterState, LoraPair, fresh_pairs
from fedlora.aggregators._base import (
    Aggregator,
    BaseUpdate,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    require_current_base,
    require_modules,
    require_weight,
    rules,
)
from fedlora.aggregators.base_updates import on_current_base, with_change
from fedlora.lowrank import stack
from fedlora.memory import give_back
from fedlora.rng import derive

LET_GO = 2**27
"""Bytes of clients' tensors after which their memory goes back to the system: it lies in holes that no stack fits."""


@final
@rules.register("flora")
@dataclass(frozen=True)
class Flora(Aggregator):
    """W <- W + sum_k p_k s_k B_k A_k; each client goes on with a fresh pair."""

    claims: ClassVar[Claim] = Claim.EXACT | Claim.MIXED_RANKS | Claim.CHANGES_BASE | Claim.GAUGE_FREE
    paper: ClassVar[str] = "Wang et al., NeurIPS 2024, arXiv 2409.05976"
    keeps_basis: ClassVar[bool] = False

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """Version 0; an adapter that is trained already is added to the base first, as version 1.

        Raises:
            RuleError: for a DoRA adapter.
        """
        cold = super().init(_without_change(adapter), seed=seed)
        warm = any(pair.B.any() and pair.A.any() for pair in adapter.pairs.values())
        base_updates = (BaseUpdate(0, 1, AdapterState(adapter.pairs)),) if warm else ()
        return replace(cold, base_updates=base_updates)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The missing base updates, and a fresh pair for each module in the client's own layout.

        Raises:
            RuleError: if the client's modules are not the global ones.
        """
        require_modules(state, client.layout, client.client_id)
        seed = derive(state.seed, "flora", state.round, client.client_id)
        dtype = next((pair.A.dtype for pair in state.adapter.pairs.values()), torch.float32)
        fresh = AdapterState(fresh_pairs(client.layout, seed, dtype), state.adapter.dense)
        return on_current_base(ClientPlan(fresh, fresh_seed=seed), state, client.base_version)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The stack of all updates as one more entry of the log.

        The weights p_k are known when the last update is in, so factors are kept as they came and scaled at the end.
        Stacked in the order of client ids, so that the order of the replies changes no bit. What came is let go module
        by module, so that the peak of memory is the stack and `LET_GO` above it.

        Raises:
            RuleError: if there is no update, one does not fit, or one was trained on another version of the base.
        """
        mean = WeightedMean()
        terms: dict[str, list[tuple[int, float, LoraPair]]] = {name: [] for name in state.adapter.pairs}
        for update in updates:
            require_current_base(state, update)
            require_weight(update.num_examples, update.client_id)
            require_modules(state, update.adapter.layout, update.client_id)
            mean.add(update.adapter.dense, update.num_examples)
            for name, pair in update.adapter.pairs.items():
                terms[name].append((update.client_id, update.num_examples, pair))
        dense = mean.result(like=state.adapter.dense)
        change: dict[str, LoraPair] = {}
        let_go = 0
        for name in state.adapter.pairs:
            mine = sorted(terms.pop(name), key=lambda term: term[0])
            total = math.fsum(weight for _, weight, _ in mine)
            change[name] = pair = stack([(weight / total, pair) for _, weight, pair in mine])
            del mine
            let_go += pair.A.nbytes + pair.B.nbytes
            if let_go > LET_GO:
                give_back()
                let_go = 0
        adapter = AdapterState(_without_change(state.adapter).pairs, dense)
        return with_change(state, adapter, change)


def _without_change(adapter: AdapterState) -> AdapterState:
    """The same adapter with zero B: what it did is in the base."""
    return adapter.with_tensors({f"{name}:B": torch.zeros_like(pair.B) for name, pair in adapter.pairs.items()})
