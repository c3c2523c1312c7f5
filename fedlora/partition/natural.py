"""Clients as the data have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.errors import DataError
from fedlora.partition._base import Count, Partitioner, PartitionInput, column_of, groups_of, partitioners


@partitioners.register("natural")
@dataclass(frozen=True, kw_only=True)
class Natural(Partitioner):
    """One client for each value of a column (user, site, document), in the values' sorted order.

    Args:
        column: whose values are the clients.
        min_size: values with fewer examples are dropped.
    """

    cure: ClassVar[str] = "check the column"
    why_dropped: ClassVar[str] = "their value of partition.column has fewer than partition.min_size examples"

    column: str
    min_size: Count = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the clients."""
        return (self.column,)

    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray]:  # noqa: ARG002 nothing is drawn
        """See `Partitioner.assign`."""
        groups = [rows for rows in groups_of(column_of(info, self.column)).values() if len(rows) >= self.min_size]
        if not groups:
            raise DataError(
                f"no value of column {self.column!r} has {self.min_size} examples; lower partition.min_size"
            )
        return groups
