"""For rules that claim LINEAR: what many clients sent as one update, their weighted mean with the sum of weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import final

import torch
from torch import Tensor

from fedlora.aggregators import Aggregator, Claim, ClientUpdate, WeightedMean
from fedlora.federation.client_pool import PartialAggregate
from fedlora.lowrank import DeltaSum


def sums_suffice(rule: Aggregator) -> bool:
    """Whether a rule comes to the same from a `PartialAggregate` as from the updates themselves: what LINEAR claims."""
    return Claim.LINEAR in rule.claims


@final
class RunningAggregate:
    """A partial aggregate in the making: one update in memory at a time, and a float64 sum for each layout.

    Args:
        measures_error: Whether the sum of the ideal update is kept.
    """

    def __init__(self, *, measures_error: bool) -> None:
        self._measures_error = measures_error
        self._first: dict[tuple[object, ...], ClientUpdate] = {}
        self._means: dict[tuple[object, ...], WeightedMean] = {}
        self._ideal, self._weight = DeltaSum(), 0.0

    def add(self, update: ClientUpdate, sent: Mapping[str, Tensor]) -> None:
        """Fold one update in.

        Args:
            update: Of one client.
            sent: The tensors that it sent; the others are its plan's, and nearly always the same for all of a layout.
        """
        alike = (*update.adapter.layout.items(), *sent)
        keys = ((number, *alike) for number in count())
        key = next(key for key in keys if key not in self._first or _same_rest(self._first[key], update, sent))
        self._first.setdefault(key, update)
        self._means.setdefault(key, WeightedMean()).add(sent, update.num_examples)
        if self._measures_error:
            self._ideal.add(update.adapter.pairs, update.num_examples)
            self._weight += update.num_examples

    def close(self) -> PartialAggregate:
        """What was added; each update's client is the first of those that it stands for."""
        updates = []
        for key, first in self._first.items():
            mean = self._means[key]
            adapter = first.adapter.with_tensors(mean.exact())
            updates.append(ClientUpdate(first.client_id, adapter, mean.total, first.base_version))
        return PartialAggregate(updates, self._ideal, self._weight)


def _same_rest(first: ClientUpdate, other: ClientUpdate, sent: Mapping[str, Tensor]) -> bool:
    """Whether what two clients did not send is the same; a plan may start each of them elsewhere."""
    mine, theirs = first.adapter.tensors(), other.adapter.tensors()
    return all(
        value is theirs[name] or torch.equal(value, theirs[name]) for name, value in mine.items() if name not in sent
    )
