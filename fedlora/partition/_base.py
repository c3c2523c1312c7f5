"""What a partitioner is, the check of what it gives, and what several of them need.

Shapes: n = examples, k = clients, c = classes (or domains).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, final

import numpy as np
from pydantic import Field

from fedlora.errors import ConfigError, DataError, nearest
from fedlora.registry import Registry
from fedlora.rng import derive

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
Rates = Rate | tuple[Rate, ...]


@dataclass(frozen=True)
class PartitionInput:
    """What a partitioner may look at.

    Args:
        size: number of examples.
        labels: class of each example [n], or None where the task has no classes.
        columns: column name -> values [n].
        domain: name of the column with the domains.
    """

    size: int
    labels: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    domain: str | None = None


@dataclass(frozen=True)
class Partition:
    """Who holds what.

    Args:
        clients: sorted indices of each client's examples; no index occurs twice, no client is empty.
        names: of the clients, where they have some; empty otherwise.
        dropped: sorted indices of the examples that no client holds.
        note: why examples were dropped; empty if none were.
        label_noise: for each client, the share of its labels that are to be made wrong.
        feature_noise: for each client, the strength of the noise that its inputs are to get.
    """

    clients: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    dropped: np.ndarray
    note: str
    label_noise: tuple[float, ...]
    feature_noise: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Partitioner(ABC):
    """A rule for who holds which examples.

    Args:
        label_noise: share of wrong labels; one rate for all clients, or several, given to the clients in turn.
        feature_noise: strength of the noise on the inputs, likewise; what it means is the task's affair.
    """

    cure: ClassVar[str] = "lower partition.clients"
    """What to change when a client comes out empty."""
    why_dropped: ClassVar[str] = ""
    """Why the rule may leave examples out."""

    label_noise: Rates = 0.0
    feature_noise: Rates = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the rule needs besides the labels and the domains."""
        return ()

    @property
    def needs_domain(self) -> bool:
        """Whether the rule needs `PartitionInput.domain`."""
        return False

    @abstractmethod
    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray] | Mapping[str, np.ndarray]:
        """The indices of each client's examples, in any order; a mapping names the clients."""

    @final
    def split(self, info: PartitionInput, seed: int) -> Partition:
        """Divide the examples; the same seed gives the same clients.

        Raises:
            DataError: a client would be empty, or the data lack the labels or the column that the rule needs.
        """
        found = self.assign(info, seed)
        names, shares = (tuple(found), found.values()) if isinstance(found, Mapping) else ((), found)
        clients = tuple(np.sort(np.asarray(rows, dtype=np.int64)) for rows in shares)
        for number, rows in enumerate(clients):
            if len(rows) == 0:
                raise DataError(
                    f"client {number} of {len(clients)} would have no examples; {self.cure}",
                    code="client-without-examples",
                )
        holders = np.zeros(info.size, dtype=np.int64)
        for rows in clients:
            holders[rows] += 1
        if (holders > 1).any() or sum(map(len, clients)) != holders.sum():
            raise DataError(
                f"{type(self).__name__} gave one example to two clients: this is a bug of the partitioner",
                code="example-given-twice",
            )
        dropped = np.flatnonzero(holders == 0)
        note = f"{len(dropped)} of {info.size} examples are on no client: {self.why_dropped}" if len(dropped) else ""
        return Partition(
            clients=clients,
            names=names,
            dropped=dropped,
            note=note,
            label_noise=_per_client(self.label_noise, len(clients), "label_noise"),
            feature_noise=_per_client(self.feature_noise, len(clients), "feature_noise"),
        )


partitioners: Registry[Partitioner] = Registry("partitioner", Partitioner, "fedlora.partition")


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """Draws for one purpose."""
    return np.random.default_rng(derive(seed, *key))


def shuffled(size: int, seed: int) -> np.ndarray:
    """The numbers 0 to `size` - 1 in an order of the seed's."""
    return np.asarray(generator(seed, "order").permutation(size), dtype=np.int64)


def labels_of(info: PartitionInput, name: str) -> np.ndarray:
    """The labels, which partitioner `name` cannot do without."""
    if info.labels is None:
        raise DataError(
            f"partition {name!r} needs labels, and this task has none: use iid, quantity, natural or domain",
            code="no-labels",
        )
    return info.labels


def column_of(info: PartitionInput, name: str) -> np.ndarray:
    """The values of a column."""
    if name not in info.columns:
        raise DataError(
            f"the data have no column {name!r} to partition by; {nearest(name, info.columns)}", code="no-such-column"
        )
    return info.columns[name]


def groups_of(values: np.ndarray) -> dict[str, np.ndarray]:
    """Value -> sorted indices where it stands, in sorted order."""
    names, numbers = np.unique(values, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(numbers, minlength=len(names)))[:-1])
    return {str(name): rows for name, rows in zip(names, parts, strict=True)}


def _per_client(rates: float | tuple[float, ...], clients: int, name: str) -> tuple[float, ...]:
    if not isinstance(rates, tuple):
        return (rates,) * clients
    if not rates or len(rates) > clients:
        raise ConfigError(
            f"partition.{name} has {len(rates)} rates for {clients} clients: give one, or one per client",
            code="wrong-number-of-rates",
        )
    return tuple(rates[number % len(rates)] for number in range(clients))


def with_flwr_datasets(partitioner: Any, values: np.ndarray, seed: int) -> list[np.ndarray]:
    """Let a partitioner of flwr-datasets divide the examples by its column "value" [n], taken in a seeded order.

    Raises:
        ValueError: the partitioner's own, when it finds no partition.
    """
    from datasets import Dataset

    order = shuffled(len(values), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about draws that are repeated and labels that are left out: said by us
        partitioner.dataset = Dataset.from_dict({"value": values[order], "index": order})
        count = partitioner.num_partitions
        return [np.asarray(partitioner.load_partition(i)["index"], dtype=np.int64) for i in range(count)]


def divided_by(partitioner: Any, values: np.ndarray, seed: int, cure: str) -> list[np.ndarray]:
    """As `with_flwr_datasets`, of which a failure is an error that names the cure.

    Raises:
        DataError: the partitioner finds no partition.
    """
    try:
        return with_flwr_datasets(partitioner, values, seed)
    except ValueError as error:
        reason = str(error).split(". ")[0].rstrip(". \n")
        raise DataError(
            f"{len(values)} examples cannot be divided this way: {reason}; {cure}", code="not-divisible"
        ) from None


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `shares` that add up to `total`, int64."""
    exact = shares / shares.sum() * total
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return np.asarray(whole, dtype=np.int64)
