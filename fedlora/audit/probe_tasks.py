"""Tasks that an audit puts in place of a run's own, to see from outside what a private trainer does with it.

A trainer speaks to its task alone: it asks for the batch of some examples and for their losses. So a task sees which
examples are in each sample, and decides how large each gradient is; what the trainer made of it is in the adapter that
comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor

from fedlora.tasks._base import Batch, Examples, Task

NUMBER = "example_number"
"""The entry of a batch that says which examples are in it."""


class Probe:
    """A task's stand-in: it has everything that the task has, and knows which example each row of a batch is.

    Args:
        task: the run's own.
    """

    refers = False  # what is probed is the training, whatever the loss compares with

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    @property
    def task(self) -> Task:
        """Itself, as the trainer's type wants it."""
        return cast(Task, self)

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        """The task's own batch, with the numbers of its examples."""
        return {**self._task.collate(examples, indices), NUMBER: torch.from_numpy(np.asarray(indices))}

    def losses(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The task's own losses [b]."""
        return self._task.losses(model, _without_numbers(batch))


def _without_numbers(batch: Mapping[str, Tensor]) -> Batch:
    return {name: value for name, value in batch.items() if name != NUMBER}


@final
class Silent(Probe):
    """Examples without a gradient: what moves is noise. It needs no pass through the model, so there may be many.

    Args:
        task: the run's own.
        n: examples of each client: client k has those from k n to (k + 1) n.

    Attributes:
        samples: client -> each sample that was not empty, as numbers below n.
        values: client -> the trained values at each of these steps, if `look` is set.
        look: gives the values [b, p] that the rows of the batch under way are trained at, or None.
    """

    def __init__(self, task: Task, n: int) -> None:
        super().__init__(task)
        self._n = n
        self.samples: dict[int, list[np.ndarray]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.look: Callable[[], Tensor] | None = None

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        """The numbers alone; the sample is noted."""
        numbers = np.asarray(indices)
        for client in np.unique(numbers // self._n):
            self.samples.setdefault(int(client), []).append(numbers[numbers // self._n == client] % self._n)
        return {NUMBER: torch.from_numpy(numbers)}

    def losses(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Zeros [b] that depend on nothing trained."""
        numbers = batch[NUMBER]
        if self.look is not None:
            seen = self.look().detach().cpu()
            for row, client in enumerate((numbers // self._n).tolist()):
                self.values.setdefault(client, []).append(seen[row].clone())
        nothing = torch.zeros(len(numbers), device=numbers.device, requires_grad=True)
        return nothing * 1.0


@final
class Scaled(Probe):
    """The run's own examples, model and losses, each loss times a factor.

    Args:
        task: the run's own.
        factors: of each example [n].
        owners: the client that each example belongs to [n].

    Attributes:
        seen: client -> the losses of each pass before the factor, in the order of its examples.
    """

    def __init__(self, task: Task, factors: Sequence[float], owners: Sequence[int]) -> None:
        super().__init__(task)
        self._factors = torch.tensor(factors, dtype=torch.float64)
        self._owners = np.asarray(owners)
        self.seen: dict[int, list[np.ndarray]] = {}

    def losses(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The task's own losses [b] times their factors."""
        each = super().losses(model, batch)
        numbers = batch[NUMBER].cpu()
        values, owners = each.detach().double().cpu().numpy(), self._owners[numbers.numpy()]
        for client in np.unique(owners):
            self.seen.setdefault(int(client), []).append(values[owners == client])
        return each * self._factors[numbers].to(each)
