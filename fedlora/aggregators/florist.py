"""FLoRIST: FLoRA's stack, cut to the singular values that hold a share of its energy before it is sent.

Ramesh, Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language
Models", MLSys 2026, arXiv 2506.09199. With D* = sum_k p_k s_k B_k A_k = U S V^T, each module keeps the smallest rank p
with  sum_{i <= p} sigma_i^2 >= tau sum_i sigma_i^2,  found from the stacks without a dense matrix (QR of both and the
SVD of the core, where the paper takes two thin SVDs: the same values for less).

As in the authors' code, clients add what is left to their base and start again with a fresh adapter of their own rank.
It is FLoRA with a smaller download; with tau = 1 it is FLoRA. The relative error is at most sqrt(1 - tau).
The threshold alone, on an adapter of fixed rank, is FlexLoRA's field `energy`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._base import Aggregator, Claim, ClientPlan, ClientSpec, ClientUpdate, GlobalState, rules
from fedlora.aggregators._bounds import require_energy
from fedlora.aggregators.flora import Flora
from fedlora.lowrank import rank_of_energy, svd


@final
@rules.register("florist")
@dataclass(frozen=True)
class Florist(Aggregator):
    """W <- W + D* cut to the share `energy` of its squared singular values; each client goes on with a fresh pair.

    Metrics: "florist/rank", the mean over modules of the rank that is sent.

    Args:
        energy: tau; at 1 the rule is exact.

    Raises:
        ConfigError: if `energy` is not in (0, 1].
    """

    energy: float = 0.9

    claims: ClassVar[Claim] = Claim.MIXED_RANKS | Claim.CHANGES_BASE | Claim.GAUGE_FREE
    paper: ClassVar[str] = "Ramesh, Dass, MLSys 2026, arXiv 2506.09199"
    keeps_basis: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_energy("florist", self.energy)
        if self.energy == 1:
            self._claim(type(self).claims | Claim.EXACT)

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """FLoRA's: see there for an adapter that is trained already, and for DoRA."""
        return Flora().init(adapter, seed=seed)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """FLoRA's: the missing base updates, and a fresh pair of the client's own rank."""
        return Flora().plan(state, client)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """FLoRA's, with the stack of the round cut.

        Raises:
            RuleError: as FLoRA.
        """
        after = Flora().aggregate(state, updates)
        *log, last = after.base_updates
        stacks, change = dict(last.change.pairs), dict[str, LoraPair]()
        after, last = replace(after, base_updates=()), replace(last, change=AdapterState())
        for name in list(stacks):
            pair = stacks.pop(name)  # nobody else holds it: its memory is the next one's
            found = svd([(1.0, pair)], lambda S: rank_of_energy(S, self.energy))
            change[name] = found.pair(len(found.S), dtype=pair.A.dtype)
        metrics = {"florist/rank": sum(pair.rank for pair in change.values()) / len(change)} if change else {}
        last = replace(last, change=AdapterState(change))
        return replace(after, base_updates=(*log, last), metrics=metrics)
