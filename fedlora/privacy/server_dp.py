"""User-level privacy on the server: clip each client's update, add noise to their weighted mean.

DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963) around any rule that needs sums only, with the adaptive clipping of
Andrew et al. 2021 (arXiv 1905.03871). The server is trusted with the updates; whoever sees the global models is not.

d_k = what client k changed, over all tensors that it sent, jointly; C = clip norm; p_k = n_k / sum of n over the
replies that came; z = noise multiplier.  mean = sum_k p_k d_k min(1, C / |d_k|) + N(0, (z C max_k p_k)^2 I).

What is protected is one client's update, replaced by one that changes nothing; who answered, and the weights n_k, are
taken to be public. The count query of adaptive clipping moves by 1 then, from "clipped" to "unclipped", not by the 1/2
of Andrew et al., whose absent client is not counted at all: its noise is twice theirs.
Uniform weights give the least noise, and declared weights keep the counts private. No amplification by the sampling
of clients is claimed: each round costs a full step (q = 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.aggregators import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    names_claiming,
    require_weight,
)
from fedlora.errors import PrivacyError, RuleError
from fedlora.privacy.accounting import Entry
from fedlora.privacy.dpsgd import secret_generator

CLIP = "central.clip_norm"
"""Where `GlobalState.memory` keeps C."""


@final
@dataclass(frozen=True)
class ServerDP(Aggregator):
    """A LINEAR rule, seen through clipping and noise; it is an aggregator itself.

    The wrapped rule gets one single update, the noisy mean: whatever it does with it is post-processing.

    Args:
        rule: what is wrapped; it must claim LINEAR.
        noise_multiplier: z, > 0; one round costs `entry()`, adaptive clipping included.
        clip_norm: C, > 0; the first one under adaptive clipping. A good one is the median norm of an update.
        minimum_cohort: a round with fewer replies is dropped: the global adapter stays, and nothing is spent.
        adaptive: move C towards the `quantile` of the clients' norms.
        quantile: gamma of Andrew et al., the share of updates that are left unclipped.
        clip_lr: eta_C of Andrew et al.
        count_noise_multiplier: sigma_b, noise of the count query in units of its sensitivity, 1 client; None: 4 z. It
            must be above z, because both queries together cost what one with z does.

    Raises:
        PrivacyError: a number out of range, or a rule that does not claim LINEAR.
    """

    rule: Aggregator
    noise_multiplier: float
    clip_norm: float
    minimum_cohort: int = 2
    adaptive: bool = False
    quantile: float = 0.5
    clip_lr: float = 0.2
    count_noise_multiplier: float | None = None

    claims: ClassVar[Claim] = Claim.NONE
    paper: ClassVar[str] = "McMahan et al. 2018, arXiv 1710.06963; Andrew et al. 2021, arXiv 1905.03871"

    def __post_init__(self) -> None:
        if Claim.LINEAR not in self.rule.claims:
            raise PrivacyError(
                f"{type(self.rule).__name__} does not claim LINEAR: it treats each client's update separately, so "
                f"that noise on a sum would hide no client: choose one of {', '.join(names_claiming(Claim.LINEAR))}, "
                "or private training on the clients",
                code="rule-not-linear",
            )
        self._claim(self.rule.claims & Claim.PERSONAL)
        for name in ("noise_multiplier", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise PrivacyError(
                    f"central privacy needs a positive and finite {name}, not {value!r}", code="out-of-range"
                )
        if self.minimum_cohort < 1:
            raise PrivacyError(f"minimum_cohort must be at least 1, not {self.minimum_cohort}", code="out-of-range")
        if not (0 < self.quantile < 1 and self.clip_lr > 0):
            raise PrivacyError(
                "adaptive clipping needs a quantile between 0 and 1 and a positive clip_lr", code="out-of-range"
            )
        if self.adaptive and not self.count_multiplier > self.noise_multiplier:
            raise PrivacyError(
                f"count_noise_multiplier must be above noise_multiplier {self.noise_multiplier:g}, not "
                f"{self.count_multiplier:g}, or no noise would be left for the updates",
                code="out-of-range",
            )

    def entry(self) -> Entry:
        """What one round that was not dropped costs: one Gaussian mechanism with z, the count query included."""
        return Entry(1.0, self.noise_multiplier, 1)

    @property
    def update_multiplier(self) -> float:
        """Noise multiplier of the mean: z, or z_D = (z^-2 - sigma_b^-2)^(-1/2).

        Theorem 1 of Andrew et al. with the sensitivity that is ours (see above).
        """
        if not self.adaptive:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - self.count_multiplier**-2) ** -0.5)

    @property
    def count_multiplier(self) -> float:
        """sigma_b, the noise of the count of unclipped updates, in clients."""
        return 4 * self.noise_multiplier if self.count_noise_multiplier is None else self.count_noise_multiplier

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """The rule's own state, and the clip norm."""
        return self._with_clip(self.rule.init(adapter, seed=seed), self.clip_norm)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The rule's own plan."""
        return self.rule.plan(self._inner(state), client)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """Clip, average, add noise, and hand the rule the result as the one update that there was.

        `metrics` holds "clip_norm", "noise_std" and "dropped" (1.0 for a round below `minimum_cohort`).

        Raises:
            RuleError: no update, an update of other tensors than were asked for, or clients with different starts.
        """
        inner = self._inner(state)
        clip = float(state.memory[CLIP])
        start: AdapterState | None = None
        sent: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        total = largest = 0.0
        count = unclipped = 0
        for update in updates:
            weight = require_weight(update.num_examples, update.client_id)
            plan = self.rule.plan(inner, ClientSpec(update.client_id, update.adapter.layout, update.base_version))
            before = {name: value.detach().cpu() for name, value in plan.adapter.tensors(plan.sends).items()}
            if start is None:
                start, sent = plan.adapter, before
                sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in sent.items()}
            _require_same_start(sent, before, update.client_id)
            difference = _difference(update, plan, before)
            norm = math.sqrt(sum(float(d.square().sum()) for d in difference.values()))
            if math.isfinite(norm):  # an update that is not finite counts as zero: no weight of noise would hide it
                factor = min(1.0, clip / norm) if norm else 1.0
                for name, change in difference.items():
                    sums[name].add_(change, alpha=weight * factor)
            unclipped += norm <= clip
            count += 1
            total += weight
            largest = max(largest, weight)
        if start is None:
            raise RuleError("there is nothing to aggregate: give at least one client's update", code="no-updates")
        if count < self.minimum_cohort:
            metrics = {"dropped": 1.0, "clip_norm": clip, "noise_std": 0.0}
            return replace(state, round=state.round + 1, metrics=metrics)
        generator = secret_generator()
        std = self.update_multiplier * clip * largest / total
        noisy = {
            name: (sent[name].double() + sums[name] / total + _noise(sums[name], std, generator)).to(sent[name].dtype)
            for name in sorted(sums)
        }
        mean = ClientUpdate(-1, start.with_tensors(noisy), 1.0, inner.base_version)
        after = self.rule.aggregate(inner, [mean])
        metrics = {**after.metrics, "dropped": 0.0, "clip_norm": clip, "noise_std": std}
        return replace(self._with_clip(after, self._next_clip(clip, unclipped, count, generator)), metrics=metrics)

    def _next_clip(self, clip: float, unclipped: int, count: int, generator: torch.Generator) -> float:
        """Andrew et al., equation in section 3.1: C <- C exp(-eta_C (b - gamma)), b the noisy share of |d_k| <= C.

        Replacing one update by another moves the count by at most 1.
        """
        if not self.adaptive:
            return clip
        query = torch.tensor(unclipped, dtype=torch.float64)
        share = float(query + _noise(query, self.count_multiplier, generator)) / count
        return clip * math.exp(-self.clip_lr * (share - self.quantile))

    @staticmethod
    def _inner(state: GlobalState) -> GlobalState:
        return replace(state, memory={name: value for name, value in state.memory.items() if name != CLIP})

    @staticmethod
    def _with_clip(state: GlobalState, clip: float) -> GlobalState:
        return replace(state, memory={**state.memory, CLIP: torch.tensor(clip, dtype=torch.float64)})


def _noise(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    # The sum of four draws, halved: the gaps between floats give less away (Holohan and Braghin 2021).
    draws = torch.randn(4, *like.shape, dtype=torch.float64, generator=generator)
    return draws.sum(0) * (std / 2)


def _difference(update: ClientUpdate, plan: ClientPlan, before: dict[str, Tensor]) -> dict[str, Tensor]:
    after = update.adapter.tensors(plan.sends)
    if after.keys() != before.keys():
        odd = min(after.keys() ^ before.keys())
        raise RuleError(
            f"client {update.client_id} sent other tensors than it was asked for: {odd!r} differs",
            code="tensors-differ",
        )
    for name, value in after.items():
        if value.shape != before[name].shape:
            raise RuleError(
                f"client {update.client_id} sent {name!r} with shape {tuple(value.shape)}, and was asked for "
                f"{tuple(before[name].shape)}",
                code="shape-mismatch",
            )
    return {name: after[name].detach().cpu().double() - before[name].double() for name in before}


def _require_same_start(first: dict[str, Tensor], other: dict[str, Tensor], client_id: int) -> None:
    if other is first:
        return
    if first.keys() != other.keys() or any(not torch.equal(first[name], other[name]) for name in first):
        raise RuleError(
            f"client {client_id} starts from another adapter than the others, so that their updates have no common "
            "mean to add noise to: give all clients the same rank under central privacy",
            code="mixed-ranks",
        )
