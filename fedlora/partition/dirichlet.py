"""Label skew by Dirichlet draws.

Shapes: n = examples, c = classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedlora.errors import DataError
from fedlora.partition._base import (
    Count,
    Partitioner,
    PartitionInput,
    Positive,
    generator,
    labels_of,
    partitioners,
    shuffled,
    with_flwr_datasets,
)
from fedlora.rng import derive


@partitioners.register("dirichlet")
@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partitioner):
    """Label skew: the smaller alpha, the fewer labels a client has; alpha to infinity is iid.

    - sizes = "drawn": each label's examples are divided by a draw from Dir(alpha, ..., alpha) over the clients, so that
      sizes differ too (Yurochkin et al. 2019, arXiv 1905.12022, section 4; flwr-datasets' DirichletPartitioner).
    - sizes = "equal": each client's label mix is a draw from Dir(alpha p), where p is the mix of all data, and clients
      are of one size (Hsu et al. 2019, arXiv 1909.06335, section 3). No example is drawn twice: where a label runs out,
      the rest of the mix is scaled up, so that the last clients take what is left.

    Args:
        clients: how many.
        alpha: concentration; 0.1 is strong skew, 100 nearly none.
        min_size: smallest client that is accepted; drawn again if missed (for sizes = "drawn").
        sizes: of the clients: "drawn" (they differ too) or "equal"; see above.
    """

    cure: ClassVar[str] = "raise partition.alpha, lower partition.clients, or set partition.sizes = 'equal'"

    clients: Count
    alpha: Positive = 0.5
    min_size: Count = 1
    sizes: Literal["drawn", "equal"] = "drawn"

    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray]:
        """See `Partitioner.assign`."""
        labels = labels_of(info, "dirichlet")
        if info.size // self.clients < self.min_size:
            raise DataError(
                f"{info.size} examples are fewer than min_size {self.min_size} for each of {self.clients} clients; "
                "lower partition.min_size or partition.clients",
                code="too-few-examples",
            )
        if self.sizes == "drawn":
            return dirichlet_over_clients(labels, self.clients, self.alpha, self.min_size, seed, self.cure)
        return _dirichlet_over_labels(labels, self.clients, self.alpha, seed)


def dirichlet_over_clients(
    values: np.ndarray, clients: int, alpha: float, min_size: int, seed: int, cure: str
) -> list[np.ndarray]:
    """Divide the examples of each value over the clients by a draw from Dir(alpha, ..., alpha)."""
    for attempt in range(10):  # of eleven draws each
        try:
            return _one_attempt(values, clients, alpha, min_size, seed, attempt)
        except ValueError:
            continue
    raise DataError(
        f"no draw gave each of {clients} clients at least {min_size} of {len(values)} examples (min_size); {cure}",
        code="min-size-not-reached",
    )


def _one_attempt(
    values: np.ndarray, clients: int, alpha: float, min_size: int, seed: int, attempt: int
) -> list[np.ndarray]:
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="value",
        alpha=alpha,
        min_partition_size=min_size,
        seed=derive(seed, "dirichlet", attempt),
    )
    return with_flwr_datasets(partitioner, values, seed)


def _dirichlet_over_labels(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Clients of one size, each with a label mix drawn from Dir(alpha p)."""
    names, numbers = np.unique(labels, return_inverse=True)
    order = shuffled(len(labels), seed)
    piles = [order[numbers[order] == number] for number in range(len(names))]
    left = np.array([len(pile) for pile in piles], dtype=np.int64)
    draws = generator(seed, "mixes")
    mixes = draws.dirichlet(alpha * left / left.sum(), size=clients)
    parts = []
    for mix, size in zip(mixes, [len(part) for part in np.array_split(order, clients)], strict=True):
        taken = np.zeros_like(left)
        while (missing := size - int(taken.sum())) > 0:
            open_mix = np.where(left > taken, mix, 0.0)
            if open_mix.sum() <= 0:  # nothing of the client's own labels is left
                open_mix = (left - taken).astype(np.float64)
            drawn = draws.multinomial(missing, open_mix / open_mix.sum())
            taken = np.minimum(taken + drawn, left)
        parts.append(
            np.concatenate([pile[rest - take : rest] for pile, rest, take in zip(piles, left, taken, strict=True)])
        )
        left -= taken
    return parts
