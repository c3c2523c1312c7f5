"""Fed-SB: a small core R_k is trained between factors that never change, and the mean of the cores is exact.

Singhal, Ponkshe, Vartak, Varshney, Vepakomma, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
Performance in (Private) Federated LoRA Fine-Tuning", TMLR 2026, arXiv 2502.15436, section 4:

    dW_k = s B R_k A,      R <- sum_k p_k R_k,      so that  s B R A = sum_k p_k dW_k.

r² numbers of each module travel where FedAvg sends r (d_in + d_out): of a square layer r / (2 d) of the bytes, rank for
rank. A and B are sent once.

The paper takes B, A and the first R from the singular value decomposition of a step of full fine-tuning on training
data, which no server of a federation has, and which nothing protects. Here B has random orthonormal columns, A random
orthonormal rows, and R is zero: training starts from the base, and a step of gradient descent on R is the projection of
the weight's own step on the two spaces. The paper's scale is 1; set alpha to the rank for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair, PairShape
from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    require_same_ranks,
    rules,
)
from fedlora.errors import RuleError
from fedlora.rng import derive

TRAINED = frozenset({"R", "dense"})


class Cored(Aggregator):
    """A and B are frozen; the cores between them are averaged, and so are dense parts."""

    claims: ClassVar[Claim] = Claim.EXACT | Claim.LINEAR

    def core(self, name: str, pair: LoraPair) -> Tensor:
        """The first core of a module: zeros [r, r]."""
        return pair.A.new_zeros(pair.rank, pair.rank)

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """With orthonormal factors in the place of the adapter's, and cores of zeros.

        Raises:
            RuleError: the rank is above d_in or d_out of a module, or it is a DoRA adapter.
        """
        if any("lora_magnitude_vector" in name for name in adapter.dense):
            raise RuleError(
                f"{type(self).__name__} trains cores in the layers of plain LoRA, and these are DoRA's: set "
                "adapter.method = 'lora'",
                code="dora-unsupported",
            )
        pairs = {name: self._pair(name, pair, derive(seed, "fedsb", name)) for name, pair in adapter.pairs.items()}
        return super().init(AdapterState(pairs, adapter.dense), seed=seed)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """Cores and dense parts are trained and sent.

        Raises:
            RuleError: a client of another rank than the global one.
        """
        require_same_ranks(self, state, client)
        return ClientPlan(state.adapter, trains=TRAINED, sends=TRAINED)  # type: ignore[arg-type]

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The mean of cores and dense parts, one update in memory at a time.

        Raises:
            RuleError: if there is no update, or one does not fit.
        """
        mean = WeightedMean()
        for update in updates:
            require_same_ranks(self, state, ClientSpec(update.client_id, update.adapter.layout))
            mean.add(update.adapter.tensors(TRAINED), update.num_examples)
        moved = mean.result(like=state.adapter.tensors(TRAINED))
        return replace(state, adapter=state.adapter.with_tensors(moved), round=state.round + 1)

    def _pair(self, name: str, pair: LoraPair, seed: int) -> LoraPair:
        shape = pair.shape
        if shape.rank > min(shape.d_in, shape.d_out):
            raise RuleError(
                f"{type(self).__name__}'s factors are orthonormal, and {name!r} is [{shape.d_out}, {shape.d_in}], "
                f"smaller than its rank {shape.rank}: lower adapter.rank, or its entry in adapter.rank_pattern",
                code="rank-above-layer",
            )
        A, B = orthonormal_factors(shape, seed)
        return LoraPair(A.to(pair.A.dtype), B.to(pair.B.dtype), shape.scale, self.core(name, pair))


@final
@rules.register("fedsb")
@dataclass(frozen=True)
class FedSb(Cored):
    """A and B are frozen; the core R between them, r x r, is averaged, and so are dense parts."""

    paper: ClassVar[str] = "Singhal et al., TMLR 2026, arXiv 2502.15436"


def orthonormal_factors(shape: PairShape, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, d_in] with A A^T = I, and B [d_out, r] with B^T B = I, float64, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(size, shape.rank, generator=generator, dtype=torch.float64) for size in (shape.d_in, shape.d_out)
    ]
    A, B = (torch.linalg.qr(one).Q for one in drawn)
    return A.T.contiguous(), B.contiguous()
