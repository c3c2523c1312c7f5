"""Clients that differ in the domain that they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fedlora.errors import ConfigError, DataError
from fedlora.partition._base import (
    Count,
    Partitioner,
    PartitionInput,
    Positive,
    column_of,
    groups_of,
    largest_remainder,
    partitioners,
)
from fedlora.partition.dirichlet import dirichlet_over_clients
from fedlora.rng import derive


@partitioners.register("domain")
@dataclass(frozen=True, kw_only=True)
class Domain(Partitioner):
    """Each client sees one domain (hospital, product, kind of text), or a mix of domains of its own.

    Args:
        clients: how many in all; those of the first domain (in sorted order) come first.
        column: with the domains; None for the config's `data.domain`.
        allocation: clients of each domain: "equal", or "proportional" to its examples (at least one).
        within: how a domain is divided among its clients: another partitioner's table, such as
            `{name = "dirichlet", alpha = 0.5}`, without `clients`; None for iid.
        mixing: instead, each domain's examples are divided over all clients by a draw from Dir(mixing, ..., mixing).
    """

    cure: ClassVar[str] = "lower partition.clients, or raise partition.mixing or partition.within.alpha if it is set"
    why_dropped: ClassVar[str] = "the partitioner in partition.within left them out"

    clients: Count
    column: str | None = None
    allocation: Literal["equal", "proportional"] = "equal"
    within: dict[str, Any] | None = None
    mixing: Positive | None = None

    def __post_init__(self) -> None:
        """Refuse combinations of which one part would be ignored."""
        if self.mixing is not None and (self.within is not None or self.allocation != "equal"):
            raise ConfigError(
                "partition 'domain': partition.mixing gives each client examples of all domains, so that within and "
                "allocation have no effect: remove it, or remove these",
                code="key-without-effect",
            )
        if self.within is not None:
            self._inner(1)  # so that a wrong table is refused before any data are read

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the domains, if it is named here."""
        return () if self.column is None else (self.column,)

    @property
    def needs_domain(self) -> bool:
        """Whether the config's own column of domains is used."""
        return self.column is None

    def _inner(self, clients: int) -> Partitioner:
        fields = dict(self.within or {"name": "iid"})
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(
                "partition.within lacks the name of a partitioner: write it as in {name = 'dirichlet', ...}",
                code="missing-key",
            )
        if name in ("domain", "natural"):
            raise ConfigError(
                f"partition.within cannot be {name!r}; choose dirichlet, classes, shards, quantity or iid",
                code="not-allowed-within",
            )
        for key in ("clients", "label_noise", "feature_noise"):
            if key in fields:
                raise ConfigError(
                    f"partition.within cannot set {key!r}, which holds for all domains: move it to [partition]",
                    code="key-in-wrong-table",
                )
        return partitioners.build(name, {**fields, "clients": clients})

    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray]:
        """See `Partitioner.assign`."""
        column = self.column or info.domain
        if column is None:
            raise DataError("partition 'domain' needs a column of domains: set data.domain", code="no-domain-column")
        values = column_of(info, column)
        if self.mixing is not None:
            numbers = np.unique(values, return_inverse=True)[1]
            return dirichlet_over_clients(numbers, self.clients, self.mixing, 1, seed, self.cure)
        groups = groups_of(values)
        if self.clients < len(groups):
            raise DataError(
                f"{self.clients} clients are fewer than the {len(groups)} domains ({', '.join(groups)}): raise "
                "partition.clients, or set partition.mixing",
                code="fewer-clients-than-domains",
            )
        sizes = np.array([len(rows) for rows in groups.values()], dtype=np.float64)
        shares = sizes if self.allocation == "proportional" else np.ones_like(sizes)
        numbers = 1 + largest_remainder(_beyond_one(shares, self.clients), self.clients - len(groups))
        clients: list[np.ndarray] = []
        for (name, rows), count in zip(groups.items(), numbers, strict=True):
            if count > len(rows):
                raise DataError(
                    f"domain {name!r} has {len(rows)} examples for {count} clients; lower partition.clients",
                    code="too-few-examples",
                )
            inside = PartitionInput(size=len(rows), labels=None if info.labels is None else info.labels[rows])
            try:
                parts = self._inner(int(count)).assign(inside, derive(seed, "within", name))
            except DataError as error:
                raise DataError(f"domain {name!r}: {error}", code=error.code) from None
            clients += [rows[np.asarray(part, dtype=np.int64)] for part in parts]
        return clients


def _beyond_one(shares: np.ndarray, total: int) -> np.ndarray:
    """What each of some parts is due of `total` above the one that it has anyway."""
    due = shares / shares.sum() * total - 1
    due = np.maximum(due, 0)
    return due if due.sum() > 0 else np.ones_like(due)
