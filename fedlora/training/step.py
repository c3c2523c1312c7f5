"""Who and what is in a training step: clients with their state, groups of rows, and what puts adapters into the model.

Shapes: k = clients in a step or group, p = trained entries of an adapter, e = examples of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.tasks._base import Batch
from fedlora.training.job import TrainJob, TrainResult

Outcome: TypeAlias = TrainResult | Exception
"""A client's result, or the error that its training raised."""


@dataclass
class Client:
    """State of one client; `row` is its row in the matrices.

    `whole` is its batch where that must be made as a whole: by a task that packs examples into rows, or for a model in
    which they depend on each other.
    """

    row: int
    job: TrainJob
    config: TrainConfig
    steps: int = 0
    batches: Iterator[np.ndarray] = field(default_factory=lambda: iter(()))
    chosen: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    whole: Batch | None = None
    done: int = 0
    seen: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    compute: float = 0.0
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Group:
    """Rows that are computed in one pass, each client's after each other.

    Args:
        members: places of their clients in the step.
        clients: the members themselves.
        rows: of each client, which of its batch's.
        places: of each client's examples in its batch.
        batch: on the CPU.
    """

    members: list[int]
    clients: list[Client]
    rows: list[np.ndarray]
    places: list[np.ndarray]
    batch: Batch

    @property
    def sizes(self) -> list[int]:
        """How many rows of the batch each client has."""
        return [len(rows) for rows in self.rows]

    @property
    def chosen(self) -> Int[np.ndarray, "e"]:
        """Positions of the examples in the training set."""
        return np.concatenate([client.chosen[places] for client, places in zip(self.clients, self.places, strict=True)])

    def of_examples(self, values: Sequence[Any]) -> list[Any]:
        """A value for each example, from one for each client."""
        return [value for value, places in zip(values, self.places, strict=True) for _ in places]


class Binding(Protocol):
    """Puts the adapters of a step into the model: stacked, or a single one."""

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any, /) -> None: ...

    def bind(self, values: Float[Tensor, "k p"], rows: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
        """Use these clients' adapters until the next call.

        Args:
            values: the trained entries.
            rows: the clients' rows in the matrices.
            sizes: how many rows of the batch each client has.

        Returns:
            The tensors to differentiate by, in the order of the columns.
        """
        ...
