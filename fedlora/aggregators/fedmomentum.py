"""FedMomentum: the largest singular values of the ideal update stay in the adapter, the others go into the base.

Yan et al. 2026, arXiv 2603.08014 (abstract, and a third-party implementation). With the singular values of
D* = sum_k p_k s_k B_k A_k,

    s B A <- the r largest, B and A sharing sqrt(S);      W <- W + the others, up to a share of their energy.

It is FlexLoRA, and what FlexLoRA throws away is kept in the base. No rule of that rank moves less into the base: what
it moves is the Eckart-Young tail. At energy = 1 it is exact for mixed ranks too, without restarting the adapter.
Where the cut would leave out less than a tenth of the rank of all the clients' factors, as with many clients who have
little in common, these factors go into the base as they are, less the new adapter: that is the whole tail.

A receiver of rank r_k < r gets the first r_k units. What the units behind them hold is not in its model, as in
FFA-LoRA: it trains without it. A unit whose singular value is zero keeps its old row of A, as in FlexLoRA.
DoRA is refused (`require_no_magnitudes`); other dense parts are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    require_current_base,
    rules,
)
from fedlora.aggregators._bounds import require_energy
from fedlora.aggregators._nested import collect, nested_start, shares
from fedlora.aggregators.base_updates import on_current_base, with_change
from fedlora.lowrank import Terms, rank_of_energy, stack, svd

WORTH_CUTTING = 0.9
"""Largest rank of a tail that is decomposed, as a share of the rank of the stack that would hold it uncut."""


@final
@rules.register("fedmomentum")
@dataclass(frozen=True)
class FedMomentum(Aggregator):
    """s B A <- the top r of D*, W <- W + its tail up to `energy`; dense parts are averaged.

    Args:
        energy: share of the tail's squared singular values that goes into the base; at 1 the rule is exact.

    Raises:
        ConfigError: if `energy` is not in (0, 1].
    """

    energy: float = 0.9999

    claims: ClassVar[Claim] = Claim.CHANGES_BASE | Claim.MIXED_RANKS | Claim.GAUGE_FREE
    paper: ClassVar[str] = "Yan et al. 2026, arXiv 2603.08014"
    keeps_basis: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_energy("fedmomentum", self.energy)
        if self.energy == 1:
            self._claim(type(self).claims | Claim.EXACT)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The first r_k units of the adapter, and the base updates that the client lacks."""
        plan = ClientPlan(nested_start(state, client.layout, client.client_id))
        return on_current_base(plan, state, client.base_version)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """One decomposition for each module; `collect` says what is refused, and what is held in memory."""

        def current() -> Iterable[ClientUpdate]:
            for update in updates:
                require_current_base(state, update)
                yield update

        dense, terms = collect(state, current())
        pairs, change = {}, {}
        for name, pair in state.adapter.pairs.items():
            pairs[name], change[name] = self._split(shares(terms.pop(name)), pair)
        return with_change(state, AdapterState(pairs, dense), change)

    def _split(self, mine: Terms, pair: LoraPair) -> tuple[LoraPair, LoraPair]:
        """The new pair, and what goes into the base."""
        r, wide, tails = pair.rank, torch.promote_types(torch.float32, pair.A.dtype), [0]
        most = WORTH_CUTTING * (r + sum(theirs.rank for _, theirs in mine))

        def count(S: Tensor) -> int:
            tails.append(rank_of_energy(S[r:], self.energy))
            return r if tails[-1] > most else r + tails[-1]

        found = svd(mine, count)
        kept = found.pair(r, pair.scale, pair.A.dtype, idle=pair.A)
        rest, tail = [*mine, (-1.0, kept)], found.part(r)
        if tails[-1] > most:
            whole = stack(rest)
            return kept, LoraPair(whole.A.to(wide), whole.B.to(wide), whole.scale)
        if self.energy == 1 or pair.A.dtype != wide:  # with the rounding of what is broadcast
            tail = svd(rest, lambda S: rank_of_energy(S, self.energy))
        return kept, tail.pair(max(1, len(tail.S)), dtype=wide)
