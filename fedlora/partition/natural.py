"""Clients as the data have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedlora.errors import DataError
from fedlora.partition._base import Count, Partitioner, PartitionInput, column_of, groups_of, partitioners


@partitioners.register("natural")
@dataclass(frozen=True, kw_only=True)
class Natural(Partitioner):
    """One client for each value of a column (user, site, document), in the values' sorted order.

    Args:
        column: whose values are the clients.
        min_size: values with fewer examples are no clients of their own.
        rest: what becomes of those: "drop" leaves their examples out, "pool" makes one client of all of them, the last.
    """

    cure: ClassVar[str] = "check the column"
    why_dropped: ClassVar[str] = (
        "their value of partition.column has fewer than partition.min_size examples (partition.rest = 'pool' makes "
        "one client of them)"
    )

    column: str
    min_size: Count = 1
    rest: Literal["drop", "pool"] = "drop"

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the clients."""
        return (self.column,)

    def assign(self, info: PartitionInput, seed: int) -> Mapping[str, np.ndarray]:
        """See `Partitioner.assign`."""
        groups = groups_of(column_of(info, self.column))
        clients = {name: rows for name, rows in groups.items() if len(rows) >= self.min_size}
        if not clients:
            raise DataError(
                f"no value of column {self.column!r} has {self.min_size} examples; lower partition.min_size",
                code="too-few-examples",
            )
        small = [rows for name, rows in groups.items() if name not in clients]
        if small and self.rest == "pool":
            clients[f"the other {len(small)}"] = np.concatenate(small)
        return clients
