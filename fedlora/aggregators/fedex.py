"""FedEx-LoRA: FedAvg of the factors, and what that lacks of the ideal update goes into the base.

Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
Models", ACL 2025, arXiv 2410.09432, equations (6) to (8):

    A = sum_k p_k A_k,  B = sum_k p_k B_k,      W <- W + sum_k p_k s_k B_k A_k - s B A;

training goes on from (A, B). The residual is sent in factored form, cut to its numerical rank, (K - 1) r for K clients
(the paper sends (K + 1) r from a Gram-Schmidt process). It is taken against the averages as they are broadcast, so that
the rounding of A and B is made good in the base. Where that rounding is no coarser than the residual's own, and the
clients are few beside the layer's width, no decomposition is needed: with one s, and client K as the reference,

    D* - s B A = s sum_k p_k (B_k - B) (A_k - A) = s sum_{k < K} p_k (B_k - B) (A_k - A_K).

`rank_cap` is the paper's truncation for many clients: the best residual of that rank (Eckart and Young 1936). The rule
is not exact then, and does not claim it.

DoRA is refused (`require_no_magnitudes`); other dense parts are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import LoraPair
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
from fedlora.aggregators._bounds import require_bounds
from fedlora.aggregators.base_updates import on_current_base, with_change
from fedlora.lowrank import DeltaSum, Svd, stack, svd


@final
@rules.register("fedex")
@dataclass(frozen=True)
class FedEx(Aggregator):
    """A <- sum_k p_k A_k, B <- sum_k p_k B_k, W <- W + D* - s B A; dense parts are averaged.

    Memory grows with the number of clients, up to where `DeltaSum` compresses their sum.

    Args:
        rank_cap: largest rank of the residual in each module; None: all of it, exactly.

    Raises:
        ConfigError: if `rank_cap` is below 1.
    """

    rank_cap: int | None = None

    claims: ClassVar[Claim] = Claim.EXACT | Claim.CHANGES_BASE | Claim.GAUGE_FREE
    paper: ClassVar[str] = "Singhal et al., ACL 2025, arXiv 2410.09432"

    def __post_init__(self) -> None:
        if self.rank_cap is not None:
            require_bounds("fedex", "rank_cap", self.rank_cap, self.rank_cap >= 1, "at least 1")
            self._claim(Claim.CHANGES_BASE)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The averages, and the base updates that the client lacks."""
        return on_current_base(super().plan(state, client), state, client.base_version)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """Equations (6) to (8).

        Raises:
            RuleError: if there is no update, one does not fit, or one was trained on another version of the base.
        """
        mean, ideal = WeightedMean(), DeltaSum()
        for update in updates:
            require_current_base(state, update)
            require_same_ranks(self, state, ClientSpec(update.client_id, update.adapter.layout))
            mean.add(update.adapter.tensors(), update.num_examples)
            ideal.add(update.adapter.pairs, update.num_examples)
        exact = mean.exact()
        averaged = state.adapter.with_tensors(mean.result(like=state.adapter.tensors()))
        change = {}
        for name, pair in averaged.pairs.items():
            wanted = [(weight / mean.total, theirs) for weight, theirs in ideal.pop(name)]
            dtype = torch.promote_types(torch.float32, pair.A.dtype)
            narrow = (mean.count - 1) * pair.rank < min(pair.shape.d_in, pair.shape.d_out)
            exactly = self.rank_cap is None and dtype == pair.A.dtype and narrow and len(wanted) == mean.count
            if exactly and (apart := _apart(wanted, exact[f"{name}:B"])):
                found = stack(apart)
                change[name] = LoraPair(found.A.to(dtype), found.B.to(dtype), found.scale)
                continue
            whole = svd([*wanted, (-1.0, pair)], self.rank_cap)
            change[name] = whole.pair(_rank(whole, dtype, self.rank_cap), dtype=dtype)
        return with_change(state, averaged, change)


def _apart(wanted: list[tuple[float, LoraPair]], B: Tensor) -> list[tuple[float, LoraPair]]:
    """sum_{k < K} p_k s (B_k - B) (A_k - A_K), without the terms that are zero."""
    last, terms = wanted[-1][1].A.double(), []
    for share, theirs in wanted[:-1]:
        terms.append((share, LoraPair(theirs.A.double() - last, theirs.B.double() - B, theirs.scale)))
    return [(share, term) for share, term in terms if term.A.any() and term.B.any()]


def _rank(found: Svd, dtype: torch.dtype, cap: int | None) -> int:
    """How many singular values a pair of that dtype can tell from the rounding of the largest; at least 1."""
    above = int((torch.finfo(dtype).eps * found.S.max() < found.S).sum()) if len(found.S) else 0
    return max(1, above if cap is None else min(above, cap))
