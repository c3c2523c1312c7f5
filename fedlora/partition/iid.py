"""Clients that are all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.partition._base import Count, Partitioner, PartitionInput, partitioners, shuffled


@partitioners.register("iid")
@dataclass(frozen=True, kw_only=True)
class Iid(Partitioner):
    """All clients alike: a seeded shuffle, cut into equal parts (sizes differ by one at most).

    Args:
        clients: how many.
    """

    clients: Count

    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray]:
        """See `Partitioner.assign`."""
        return np.array_split(shuffled(info.size, seed), self.clients)
