"""Coordinate-wise median and trimmed mean of what clients send.

Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
arXiv 1803.01498, definitions 1 and 2; here with the clients' weights n_k, so that one client counts as its duplicates:

    median:        the value where half of the weight is reached (the mean of two where they share the middle);
    trimmed mean:  the mean of the weight between the quantiles beta and 1 - beta, fractions of a client included.

Each number of each tensor on its own: the result depends on the basis of the factors, as FedAvg's does. Values are
sorted, not summed and subtracted, so that no liar's size is left in the rounding. What comes out is the inner rule's
one update: around FFA-LoRA only B is looked at.

`trim` must be at least the liars' share of the weight: of a liar of share p, p - beta is left in the mean.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.aggregators._around import AroundMean, Inner, as_one, in_order, received, require_share, weighted_median
from fedlora.aggregators._base import Claim, ClientUpdate, GlobalState, rules
from fedlora.aggregators.fedavg import FedAvg

PAPER = "Yin et al., ICML 2018, arXiv 1803.01498"


class Coordinatewise(AroundMean):
    """A centre of each number on its own."""

    @abstractmethod
    def centre(self, values: Tensor, weights: Tensor) -> Tensor:
        """The centre of one tensor.

        Args:
            values: one row for each client, float64 [K, n].
            weights: n_k, float64 [K].

        Returns:
            float64 [n].
        """

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The centre of each tensor that was sent, as the inner rule's one update; holds all updates at once.

        A number that is not finite counts as infinitely large.

        Raises:
            RuleError: no update, one does not fit, or see the inner rule.
        """
        replies = received(self, state, updates)
        weights = torch.tensor([one.update.num_examples for one in replies], dtype=torch.float64)
        centres = {}
        for name, before in replies[0].sent.items():
            values = torch.stack([one.values[name].double().flatten() for one in replies])
            values = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
            centres[name] = self.centre(values, weights).reshape(before.shape)
        return self.outer_state(self.inner.aggregate(self.inner_state(state), [as_one(replies, centres)]))


@final
@rules.register("median")
@dataclass(frozen=True)
class Median(Coordinatewise):
    """The weighted median of each number, in the place of the mean in `inner`.

    Args:
        inner: a rule that claims LINEAR.

    Raises:
        ConfigError: it does not.
    """

    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.ROBUST | Claim.ANY_TENSORS
    paper: ClassVar[str] = PAPER

    def __post_init__(self) -> None:
        self.require_linear()

    def centre(self, values: Tensor, weights: Tensor) -> Tensor:
        """Definition 1."""
        return weighted_median(values, weights)


@final
@rules.register("trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean(Coordinatewise):
    """The mean of each number without the lowest and highest share of the weight, in the place of the mean in `inner`.

    Args:
        trim: beta, the share that is cut at each end; at least the share of the clients that may lie.
        inner: a rule that claims LINEAR.

    Raises:
        ConfigError: the share is not in [0, 1/2), or the inner rule does not claim LINEAR.
    """

    trim: float = 0.3
    inner: Inner = field(default_factory=FedAvg)

    claims: ClassVar[Claim] = Claim.ROBUST | Claim.ANY_TENSORS
    paper: ClassVar[str] = PAPER

    def __post_init__(self) -> None:
        require_share("trimmed_mean", "trim", self.trim)
        self.require_linear()
        if self.trim == 0:
            self._claim(self.claims & ~Claim.ROBUST)

    def centre(self, values: Tensor, weights: Tensor) -> Tensor:
        """Definition 2."""
        means = []
        for ordered, share in in_order(values, weights / weights.sum()):
            high = share.cumsum(dim=1)
            kept = high.clamp(max=1 - self.trim) - (high - share).clamp(min=self.trim)
            kept = torch.where(kept > 1e-12, kept, 0.0)  # a rounding times a liar's 1e8 would be seen
            means.append(torch.where(kept > 0, ordered * kept, 0.0).sum(dim=1) / kept.sum(dim=1))
        return torch.cat(means)
