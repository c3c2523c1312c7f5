"""FedRot-LoRA: each client's factors are turned towards the broadcast before they are averaged.

Zhang, Kim, Cha, Vikalo, "FedRot-LoRA", ICML 2026, arXiv 2602.23638. For any rotation R, (R^T A, B R) is the same change
of weights as (A, B), but the mean of factors is not the same. Per module and client, against the factors (A_ref, B_ref)
that it started from, over all rotations R in SO(r):

    odd rounds   min |R^T A_k - A_ref|:   A_ref A_k^T = U S V^T,       R = V diag(1, .., 1, det V U^T) U^T;
    even rounds  min |B_k R - B_ref|:     B_ref^T B_k = U S V^T,       R = V diag(1, .., 1, det V U^T) U^T;
    softly       R <- the rotation closest to (1 - lambda) I + lambda R;      then the inner rule, on (R^T A_k, B_k R).

The paper turns on the client; R is a function of the update and the broadcast, so that the server can. In round 0 there
is nothing to turn to. Where (1 - lambda) I + lambda R is singular, as for a half turn at lambda = 1/2, no rotation is
closest, and R is taken as it is. (The authors' code has 1.5 for its default lambda, which means R in O(r) without
softening; here lambda is at most 1, and R a rotation.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._around import Around, Inner, Received, received
from fedlora.aggregators._base import Claim, ClientSpec, ClientUpdate, GlobalState, rules
from fedlora.aggregators._bounds import require_bounds
from fedlora.aggregators.fedavg import FedAvg
from fedlora.errors import RuleError


@final
@rules.register("fedrot")
@dataclass(frozen=True)
class FedRot(Around):
    """`inner` aggregates (R_k^T A_k, B_k R_k) with rotations R_k towards the broadcast.

    Args:
        strength: lambda; 0 leaves the factors as they are, 1 turns them all the way.
        inner: a rule whose clients send both factors.

    Raises:
        ConfigError: if `strength` is not in [0, 1].
    """

    strength: float = 0.5
    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.NONE
    paper: ClassVar[str] = "Zhang et al., ICML 2026, arXiv 2602.23638"

    def __post_init__(self) -> None:
        require_bounds("fedrot", "strength", self.strength, 0 <= self.strength <= 1, "at least 0 and at most 1")
        self.inherit(Claim.EXACT | Claim.MIXED_RANKS | Claim.CHANGES_BASE)
        if self.strength:
            object.__setattr__(self, "keeps_units", False)  # the server turns what a client sends

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """The inner rule's.

        Raises:
            RuleError: its clients send one factor alone, whose basis is that of the frozen one.
        """
        state = super().init(adapter, seed=seed)
        plan = self.plan(state, ClientSpec(0, adapter.layout))
        if not {"A", "B"} <= plan.sends:
            raise RuleError(
                f"fedrot turns A and B together, and {type(self.inner).__name__} freezes one of them: choose an inner "
                "rule whose clients train both, such as fedavg",
                code="rule-method-mismatch",
            )
        return state

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's, of the turned updates; holds all updates at once.

        Raises:
            RuleError: no update, one does not fit, or see the inner rule.
        """
        replies = received(self, state, updates)
        turned = (self._turned(one, state.round) for one in replies)
        return self.outer_state(self.inner.aggregate(self.inner_state(state), turned))

    def _turned(self, one: Received, number: int) -> ClientUpdate:
        if number == 0 or self.strength == 0:
            return one.update
        pairs, starts = {}, one.start.pairs
        for name, pair in one.update.adapter.pairs.items():
            start, A, B = starts[name], pair.A.double(), pair.B.double()
            cross = start.A.double() @ A.T if number % 2 else start.B.double().T @ B
            R = softened(rotation(cross), self.strength)
            pairs[name] = LoraPair((R.T @ A).to(pair.A.dtype), (B @ R).to(pair.B.dtype), pair.scale)
        return replace(one.update, adapter=AdapterState(pairs, one.update.adapter.dense))


def rotation(cross: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    """The rotation R with the largest tr(cross R); the identity for a zero matrix."""
    if not cross.any():
        return torch.eye(len(cross), dtype=cross.dtype)
    U, _, Vh = torch.linalg.svd(cross)
    V = Vh.T.clone()
    V[:, -1] *= torch.sign(torch.linalg.det(V @ U.T))
    R: Tensor = V @ U.T
    return R


def softened(R: Float[Tensor, "r r"], strength: float) -> Float[Tensor, "r r"]:
    """The rotation closest to (1 - strength) I + strength R, or R where there is none."""
    mixed = (1 - strength) * torch.eye(len(R), dtype=R.dtype) + strength * R
    if float(torch.linalg.svdvals(mixed)[-1]) < 1e-6:
        return R
    return rotation(mixed.T)
