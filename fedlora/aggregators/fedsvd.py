"""FedSVD: FFA-LoRA whose A is made orthonormal after each round, by the singular vectors of B A.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025, arXiv
2505.12805, algorithm 1: clients train and send B; then

    B = sum_k p_k B_k,      B A = U S V^T,      A <- V^T,  B <- U S.

The product is unchanged, A A^T = I, and under user-level privacy the step is post-processing. It is computed from QR of
A^T = Q T and the SVD of the core B T^T [d_out, r], so that A stays in its row space where B has a rank below r (a dense
SVD returns arbitrary rows there) and B = 0 gives A = Q^T.

What to expect: V spans the row space of A, so that A never leaves the row space of the first A. Under plain SGD, with
clipping and Gaussian noise too, a turn of the basis changes nothing: the run is that of FFA-LoRA from an A0 that was
made orthonormal once. Under Adam it is another one. A travels down in every round.

Mixed ranks by nesting, as in FFA-LoRA; units come in the order of the singular values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._base import Aggregator, Claim, ClientPlan, ClientSpec, ClientUpdate, GlobalState, rules
from fedlora.aggregators.ffa import FfaLora


@final
@rules.register("fedsvd")
@dataclass(frozen=True)
class FedSvd(Aggregator):
    """B <- sum_k p_k [s_k/s B_k, 0] over one frozen A, then both turned so that A A^T = I."""

    claims: ClassVar[Claim] = Claim.EXACT | Claim.LINEAR | Claim.MIXED_RANKS
    paper: ClassVar[str] = "Lee et al., NeurIPS 2025, arXiv 2505.12805"
    keeps_basis: ClassVar[bool] = False

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """FFA-LoRA's; the first round trains over the A that the adapter starts with."""
        return FfaLora().init(adapter, seed=seed)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """FFA-LoRA's."""
        return FfaLora().plan(state, client)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """FFA-LoRA's, turned.

        Raises:
            RuleError: as FFA-LoRA.
        """
        after = FfaLora().aggregate(state, updates)
        return replace(after, adapter=_turned(after.adapter))


def _turned(adapter: AdapterState) -> AdapterState:
    """The same products with A A^T = I (where r > d_in, with zeros behind)."""
    pairs = {}
    for name, pair in adapter.pairs.items():
        Q, T = torch.linalg.qr(pair.A.double().T)
        U, S, Vh = torch.linalg.svd(pair.B.double() @ T.T, full_matrices=True)
        rows = Vh @ Q.T
        signs = torch.where(rows.gather(1, rows.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(rows)
        A, B = torch.zeros_like(pair.A, dtype=rows.dtype), torch.zeros_like(pair.B, dtype=rows.dtype)
        A[: len(rows)] = rows * signs
        B[:, : len(S)] = U[:, : len(S)] * S * signs[: len(S), 0]
        pairs[name] = LoraPair(A.to(pair.A.dtype), B.to(pair.B.dtype), pair.scale)
    return AdapterState(pairs, adapter.dense)
