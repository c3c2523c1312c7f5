"""Clients of unequal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedlora.errors import ConfigError, DataError
from fedlora.partition._base import (
    Count,
    Partitioner,
    PartitionInput,
    Positive,
    generator,
    largest_remainder,
    partitioners,
    shuffled,
)


@partitioners.register("quantity")
@dataclass(frozen=True, kw_only=True)
class Quantity(Partitioner):
    """Clients of unequal size, alike in everything else. Give `exponent` or `alpha`.

    Args:
        clients: how many.
        exponent: client i's share falls as (i + 1) ** -exponent: a power law, as in Li et al. 2020 (FedProx),
            arXiv 1812.06127, section 5.1. 0 is equal sizes.
        alpha: the shares are one draw from Dir(alpha, ..., alpha): Li et al. 2022 (NIID-Bench), arXiv 2102.02079,
            quantity skew.
        min_size: every client gets so many first, and the rest is shared out.
    """

    clients: Count
    exponent: Annotated[float, Field(ge=0)] | None = None
    alpha: Positive | None = None
    min_size: Count = 1

    def __post_init__(self) -> None:
        """Exactly one law."""
        if (self.exponent is None) == (self.alpha is None):
            raise ConfigError(
                "partition 'quantity' needs exactly one of exponent (a power law) and alpha (Dirichlet shares)",
                code="not-exactly-one",
            )

    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray]:
        """See `Partitioner.assign`."""
        spare = info.size - self.clients * self.min_size
        if spare < 0:
            raise DataError(
                f"{info.size} examples are fewer than min_size {self.min_size} for each of {self.clients} clients; "
                "lower partition.min_size or partition.clients",
                code="too-few-examples",
            )
        if self.exponent is not None:
            shares = np.arange(1, self.clients + 1, dtype=np.float64) ** -self.exponent
        else:
            assert self.alpha is not None
            shares = generator(seed, "sizes").dirichlet(np.full(self.clients, self.alpha))
        sizes = self.min_size + largest_remainder(shares, spare)
        return np.split(shuffled(info.size, seed), np.cumsum(sizes)[:-1])
