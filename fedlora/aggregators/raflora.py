"""raFLoRA: each unit is averaged over the clients that have it, so that small ranks do not empty the tail.

Wu, Hu, Min, Wang, 2026, arXiv 2602.13486, equation (8) (read in a third-party implementation of its algorithm 1). Let
l = 0 < l_1 < l_2 < ... be the clients' ranks, and N_h the sum of n over the clients of rank h or more:

    D = sum_h sum_{k: r_k >= h} (n_k / N_h) s_k B_k[:, l:h] A_k[l:h],      then singular values as in FlexLoRA.

Under FlexLoRA a client of rank 2 counts as zero in all directions behind its second, which vanish in a few rounds even
without training. Here unit j is divided by N_j = sum of n over this round's clients with r_k > j, which gives the
slices' numbers whichever clients reply. D is therefore not the ideal update D*, unless all ranks are equal.

Ours: a unit that no client of the round has stays as it was broadcast. (The implementation takes the levels from all
clients and leaves such a slice out, so that one round without a large client erases the tail; what the paper says there
could not be read.) A unit whose singular value is zero keeps its old row of A, as in FlexLoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._base import Aggregator, Claim, ClientPlan, ClientSpec, ClientUpdate, GlobalState, rules
from fedlora.aggregators._nested import collect, nested_start
from fedlora.lowrank import svd


@final
@rules.register("raflora")
@dataclass(frozen=True)
class RaFlora(Aggregator):
    """s B A <- sum_j sum_{k has unit j} n_k / N_j s_k B_k[:, j] A_k[j], cut to rank r; B and A share sqrt(S)."""

    claims: ClassVar[Claim] = Claim.MIXED_RANKS
    paper: ClassVar[str] = "Wu et al. 2026, arXiv 2602.13486"
    keeps_basis: ClassVar[bool] = False

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The first r_k units, which are those of the r_k largest singular values."""
        return ClientPlan(nested_start(state, client.layout, client.client_id))

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """Equation (8), unit by unit; `collect` says what is refused, and what is held in memory."""
        dense, terms = collect(state, updates)
        pairs = {}
        for name, pair in state.adapter.pairs.items():
            mine = terms.pop(name)
            owners = torch.zeros(pair.rank, dtype=torch.float64)
            for weight, theirs in mine:
                owners[: theirs.rank] += weight
            parts = [
                (1.0, LoraPair(theirs.A, theirs.B.double() * (weight / owners[: theirs.rank]), theirs.scale))
                for weight, theirs in mine
            ]
            seen = max(theirs.rank for _, theirs in mine)
            if seen < pair.rank:
                parts.append((1.0, LoraPair(pair.A[seen:], pair.B[:, seen:], pair.scale)))
            pairs[name] = svd(parts, pair.rank).pair(pair.rank, pair.scale, pair.A.dtype, idle=pair.A)
        return replace(state, adapter=AdapterState(pairs, dense), round=state.round + 1)
