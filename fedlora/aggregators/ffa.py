"""FFA-LoRA: A is drawn once and frozen everywhere; only B is trained, sent and averaged.

Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
With one A for all, sum_k p_k s B_k A = s (sum_k p_k B_k) A: the mean of B is exact, and half the bytes travel.

Mixed ranks, beyond the paper: A is nested. Client k freezes the first r_k rows of A, and its B_k [d_out, r_k], padded
with zeros and multiplied by s_k / s, is a B for the whole A:

    s_k B_k A[:r_k] = s [s_k/s B_k, 0] A,   hence   D = s (sum_k p_k [s_k/s B_k, 0]) A = D* exactly.

What a receiver of lower rank loses: it starts the round from the first r_k columns of B, so from s B[:, :r_k] A[:r_k].
What the columns behind r_k have learned is not in its model; it trains without it, and its reply counts as zero in
those columns, which shrink by the factor 1 - p_k each time it takes part. That is the rule's own behaviour and no
aggregation error: D* is the mean of what the clients hold. Where it hurts, give all clients one rank, or use a rule
that sends each client the whole change (flora).

DoRA's magnitude vectors are trained and averaged with the other dense parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, Part
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
from fedlora.aggregators._nested import nested_start, padded_columns, require_nested
from fedlora.errors import RuleError

TRAINED: frozenset[Part] = frozenset(("B", "dense"))


@final
@rules.register("ffa")
@dataclass(frozen=True)
class FfaLora(Aggregator):
    """B <- sum_k p_k [s_k/s B_k, 0] over one frozen A; dense parts are trained and averaged, not frozen with A."""

    claims: ClassVar[Claim] = Claim.EXACT | Claim.LINEAR | Claim.MIXED_RANKS
    paper: ClassVar[str] = "Sun et al., ICLR 2024, arXiv 2403.12313"

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """The initial adapter's A is the A of the whole run.

        Raises:
            RuleError: if a module's A is zero: B would get no gradient, ever.
        """
        for name, pair in adapter.pairs.items():
            if not pair.A.any():
                raise RuleError(
                    f"FFA-LoRA freezes A, and the A of {name!r} is zero, so that B would never get a gradient: "
                    "initialise A at random (PEFT's default)",
                    code="frozen-a-is-zero",
                )
        return GlobalState(adapter=adapter, seed=seed)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The first r_k rows of A, and the first r_k columns of B in the client's own scale: s/s_k B[:, :r_k].

        Raises:
            RuleError: if the client's modules are not the global ones, its rank is above the global rank, or one of the
                scales is zero.
        """
        start = nested_start(state, client.layout, client.client_id)
        return ClientPlan(start, trains=TRAINED, sends=TRAINED)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The mean of the padded and rescaled B.

        Raises:
            RuleError: if there is no update, one does not fit, or one was trained on another A.
        """
        mean = WeightedMean()
        for update in updates:
            require_nested(state, update.adapter.layout, update.client_id)
            tensors: dict[str, Tensor] = dict(update.adapter.dense)
            for name, pair in state.adapter.pairs.items():
                theirs = update.adapter.pairs[name]
                if not torch.equal(theirs.A, pair.A[: theirs.rank].to(theirs.A.dtype)):
                    raise RuleError(
                        f"client {update.client_id} trained {name!r} with another A than the frozen one: it must "
                        "start from this run's plan and keep A fixed",
                        code="frozen-a-changed",
                    )
                tensors[f"{name}:B"] = padded_columns(theirs, pair)
            mean.add(tensors, update.num_examples)
        adapter = state.adapter.with_tensors(mean.result(like=state.adapter.tensors(TRAINED)))
        return replace(state, adapter=adapter, round=state.round + 1)
