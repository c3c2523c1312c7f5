"""Of rules that need sums alone, what many clients sent as one update: their weighted mean, with the sum of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from fedlora.adapter import DeltaSum
from fedlora.aggregators import Aggregator, Claim, ClientUpdate, WeightedMean


@dataclass
class Sums:
    """What a process makes of its clients.

    Args:
        updates: one for each layout and each start of what is not sent; its client is the first of those that it stands
            for.
        ideal: sum_k n_k s_k B_k A_k of all of them, where the aggregation error is measured.
    """

    updates: list[ClientUpdate]
    ideal: DeltaSum


def sums_suffice(rule: Aggregator) -> bool:
    """Whether a rule comes to the same from `Sums` as from the updates themselves: what LINEAR claims."""
    return Claim.LINEAR in rule.claims


class RunningSums:
    """Sums in the making: one update in memory at a time, and a float64 sum for each layout."""

    def __init__(self) -> None:
        self._first: dict[tuple[object, ...], ClientUpdate] = {}
        self._means: dict[tuple[object, ...], WeightedMean] = {}
        self._ideal = DeltaSum()

    def add(self, update: ClientUpdate, sent: Mapping[str, Tensor], ideal: DeltaSum) -> None:
        """Fold one update in.

        Args:
            update: of one client.
            sent: the tensors that it sent; the others are its plan's, and nearly always the same for all of a layout.
            ideal: its term of the ideal sum, if that is kept.
        """
        alike = (*update.adapter.layout.items(), *sent)
        keys = ((number, *alike) for number in count())
        key = next(key for key in keys if key not in self._first or _same_rest(self._first[key], update, sent))
        self._first.setdefault(key, update)
        self._means.setdefault(key, WeightedMean()).add(sent, update.num_examples)
        self._ideal.extend(ideal)

    def close(self) -> Sums:
        """The sums."""
        updates = []
        for key, first in self._first.items():
            mean = self._means[key]
            adapter = first.adapter.with_tensors(mean.exact())
            updates.append(ClientUpdate(first.client_id, adapter, mean.total, first.base_version))
        return Sums(updates, self._ideal)


def _same_rest(first: ClientUpdate, other: ClientUpdate, sent: Mapping[str, Tensor]) -> bool:
    """Whether what two clients did not send is the same; a plan may start each of them elsewhere."""
    mine, theirs = first.adapter.tensors(), other.adapter.tensors()
    return all(
        value is theirs[name] or torch.equal(value, theirs[name]) for name, value in mine.items() if name not in sent
    )
