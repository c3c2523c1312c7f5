"""FlexLoRA: the best approximation of the ideal update that the adapter's rank allows, by its singular values.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505, equation (2) and section 3.2:

    D* = sum_k p_k s_k B_k A_k = U S V^T,      client k goes on from  B = U_{r_k} S_{r_k} / s_k,  A = V_{r_k}^T.

The error is sqrt(sum_{i > r} sigma_i^2) (Eckart and Young 1936): no rule that keeps the base and the rank does better.
Clients of different ranks hold the leading parts of one decomposition. A unit whose singular value is zero keeps its
old row of A and gets B = 0, so that it can learn; the change of weights is the same.

Ours, beyond the paper: `split`, `energy`, and the randomised decomposition.
DoRA's magnitude vectors are averaged with the other dense parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

from fedlora.adapter import AdapterState
from fedlora.aggregators._base import Aggregator, Claim, ClientPlan, ClientSpec, ClientUpdate, GlobalState, rules
from fedlora.aggregators._bounds import require_energy
from fedlora.aggregators._nested import collect, nested_start, shares
from fedlora.errors import ConfigError
from fedlora.lowrank import randomised_svd, rank_of_energy, svd
from fedlora.rng import derive


@final
@rules.register("flexlora")
@dataclass(frozen=True)
class FlexLora(Aggregator):
    """s B A <- D* cut to its r largest singular values; dense parts are averaged.

    Args:
        split: "left", the paper's B = U S / s and A = V^T, or "root", B = U sqrt(S / s) and A = sqrt(S / s) V^T. The
            change of weights is the same; they train differently.
        energy: cut each module further, to the smallest rank that holds this share of sum_i sigma_i^2 (FLoRIST's
            threshold, Ramesh and Dass 2026, arXiv 2506.09199).
        svd: "exact", or "randomised" for many clients: see `fedlora.lowrank.randomised_svd` for its error.

    Raises:
        ConfigError: if `energy` is not in (0, 1], or is below 1 with the randomised decomposition.
    """

    split: Literal["left", "root"] = "left"
    energy: float = 1.0
    svd: Literal["exact", "randomised"] = "exact"

    claims: ClassVar[Claim] = Claim.MIXED_RANKS | Claim.GAUGE_FREE
    paper: ClassVar[str] = "Bai et al., NeurIPS 2024, arXiv 2402.11505"
    keeps_basis: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_energy("flexlora", self.energy)
        if self.svd == "randomised" and self.energy < 1:
            raise ConfigError(
                "flexlora: energy is measured over all singular values, which svd = 'randomised' does not compute: "
                "set svd = 'exact', or leave energy at 1",
                code="keys-exclude-each-other",
            )

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The first r_k units, which are those of the r_k largest singular values."""
        return ClientPlan(nested_start(state, client.layout, client.client_id))

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """Equation (2) for each module; `collect` says what is refused, and what is held in memory."""
        dense, terms = collect(state, updates)
        pairs = {}
        for name, pair in state.adapter.pairs.items():
            mine = shares(terms.pop(name))
            if self.svd == "exact":
                kept = svd(mine, lambda S, rank=pair.rank: min(rank, rank_of_energy(S, self.energy)))  # type: ignore[misc]
            else:
                kept = randomised_svd(mine, pair.rank, derive(state.seed, "flexlora", state.round, name))
            pairs[name] = kept.pair(pair.rank, pair.scale, pair.A.dtype, self.split, idle=pair.A)
        return replace(state, adapter=AdapterState(pairs, dense), round=state.round + 1)
