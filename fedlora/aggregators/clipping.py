"""Norm bounding and centred clipping: no client moves the result further than the others do.

*Norm bounding*, Sun, Kairouz, Suresh, McMahan, "Can You Really Backdoor Federated Learning?", 2019, arXiv 1911.07963,
section 3.2: each step d_k = x_k - x becomes d_k min(1, C / |d_k|), and the inner rule gets the shortened updates.

*Centred clipping*, Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021, arXiv
2012.10333, algorithm 2: around the last round's step v, in each of L iterations

    v <- v + sum_k p_k (d_k - v) min(1, tau / |d_k - v|);      the inner rule gets x + v as its one update.

Lengths are those of all that a client sends, as one vector: the factors and the dense parts, which is what a rule
averages. Without a radius of their own both take the (weighted) median length, so that it follows the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.aggregators._around import (
    Around,
    AroundMean,
    Inner,
    Received,
    as_one,
    finite,
    received,
    weighted_median,
)
from fedlora.aggregators._base import Claim, ClientUpdate, GlobalState, rules
from fedlora.aggregators._bounds import require_bounds, require_positive
from fedlora.aggregators.fedavg import FedAvg


@final
@rules.register("norm_bound")
@dataclass(frozen=True)
class NormBound(Around):
    """Each client's step is shortened to `bound`, then `inner` aggregates.

    Metrics: "norm_bound/bound", and "norm_bound/shortened", the share of the clients that were above it.

    Args:
        bound: C, largest length of a step; None: the weighted median of the round's lengths.
        inner: any rule.

    Raises:
        ConfigError: a bound that is not positive and finite.
    """

    bound: float | None = None
    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.ROBUST | Claim.ANY_TENSORS
    paper: ClassVar[str] = "Sun et al. 2019, arXiv 1911.07963"

    def __post_init__(self) -> None:
        require_positive("norm_bound", bound=self.bound)
        kept = Claim.MIXED_RANKS | Claim.CHANGES_BASE | Claim.ANY_TENSORS
        self.inherit(kept, Claim.ROBUST if self.bound is None else Claim.NONE)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's, of shortened updates; those that are not finite are dropped.

        Raises:
            RuleError: no update, one does not fit, none is finite, or see the inner rule.
        """
        replies = finite(received(self, state, updates))
        bound = _median_length(replies) if self.bound is None else self.bound
        kept = (one.shortened(min(1.0, bound / one.length) if one.length else 1.0) for one in replies)
        after = self.outer_state(self.inner.aggregate(self.inner_state(state), kept))
        above = sum(one.length > bound for one in replies) / len(replies)
        return replace(after, metrics={**after.metrics, "norm_bound/bound": bound, "norm_bound/shortened": above})


@final
@rules.register("centred_clipping")
@dataclass(frozen=True)
class CentredClipping(AroundMean):
    """The clipped mean around the last round's step, in the place of the mean in `inner`.

    Metrics: "centred_clipping/radius", of the last iteration.

    Args:
        radius: tau; None: in each iteration the weighted median of the distances from the centre.
        iterations: L.
        inner: a rule that claims LINEAR.

    Raises:
        ConfigError: a radius that is not positive and finite, no iteration, or an inner rule without LINEAR.
    """

    radius: float | None = None
    iterations: int = 3
    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.ROBUST | Claim.ANY_TENSORS
    paper: ClassVar[str] = "Karimireddy, He, Jaggi, ICML 2021, arXiv 2012.10333"

    def __post_init__(self) -> None:
        require_positive("centred_clipping", radius=self.radius)
        require_bounds("centred_clipping", "iterations", self.iterations, self.iterations >= 1, "at least 1")
        self.require_linear()
        if self.radius is not None:
            self._claim(self.claims & ~Claim.ROBUST)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """Algorithm 2; steps are taken one client at a time, several times over.

        Raises:
            RuleError: no update, one does not fit, none is finite, or see the inner rule.
        """
        replies = finite(received(self, state, updates))
        weights = torch.tensor([one.update.num_examples for one in replies], dtype=torch.float64)
        memory = self.own_memory(state)
        v = {
            name: memory.get(f"step/{name}", torch.zeros(before.shape, dtype=torch.float64))
            for name, before in replies[0].sent.items()
        }
        radius = 0.0
        for _ in range(self.iterations):
            away = [
                math.sqrt(sum(float((step - v[name]).square().sum()) for name, step in one.steps())) for one in replies
            ]
            radius = self.radius or float(weighted_median(torch.tensor(away, dtype=torch.float64), weights))
            v = _clipped(v, replies, away, radius)
        before = replies[0].sent
        centre = as_one(replies, {name: before[name].double() + step for name, step in v.items()})
        after = self.inner.aggregate(self.inner_state(state), [centre])
        kept = {**memory, **{f"step/{name}": step for name, step in v.items()}}
        metrics = {**after.metrics, "centred_clipping/radius": radius}
        return replace(self.outer_state(after, kept), metrics=metrics)


def _clipped(v: dict[str, Tensor], replies: list[Received], away: list[float], radius: float) -> dict[str, Tensor]:
    """One iteration."""
    moved = {name: value.clone() for name, value in v.items()}
    total = sum(one.update.num_examples for one in replies)
    for one, distance in zip(replies, away, strict=True):
        factor = one.update.num_examples / total * (min(1.0, radius / distance) if distance else 1.0)
        for name, step in one.steps():
            moved[name].add_(step - v[name], alpha=factor)
    return moved


def _median_length(replies: list[Received]) -> float:
    lengths = torch.tensor([one.length for one in replies], dtype=torch.float64)
    weights = torch.tensor([one.update.num_examples for one in replies], dtype=torch.float64)
    return float(weighted_median(lengths, weights))
