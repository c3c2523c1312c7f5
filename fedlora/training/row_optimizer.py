"""Adapters as rows of one matrix, and optimisers that move all rows at once, each by its own rates.

K clients' trained tensors are the K rows of a matrix, so that a step of AdamW for all of them is a handful of vector
operations, and a layer's stacked tensor is a view of some columns. A pair of a smaller rank than the widest is padded
with zeros, and stays so: with zero columns in B and zero rows in A neither gets a gradient there, and no optimiser here
moves a zero that has none.

Shapes: k = clients, p = entries of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.config import TrainConfig

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Column:
    """Where one named tensor lies in each row.

    Args:
        name: as in `AdapterState.tensors`.
        shape: of the tensor, at the widest rank.
        start: its first entry.
    """

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """One after its last entry."""
        return self.start + math.prod(self.shape)

    def of(self, rows: Float[Tensor, "k p"]) -> Tensor:
        """The stacked tensor, a view [k, *shape]."""
        return rows[:, self.start : self.stop].unflatten(1, self.shape)

    def within(self, row: Float[Tensor, "p"], shape: Sequence[int]) -> Tensor:
        """The part of one row that a tensor of this shape fills, a view: all, or a corner for a smaller rank."""
        whole = row[self.start : self.stop].view(self.shape)
        return whole if shape == self.shape else whole[tuple(slice(size) for size in shape)]


@final
class Columns:
    """The layout of a row.

    Args:
        adapters: that become rows; they have the same modules, and any ranks.
        names: the tensors that a row holds, in order.
    """

    def __init__(self, adapters: Sequence[AdapterState], names: Sequence[str]) -> None:
        each = [adapter.tensors() for adapter in adapters]
        self.columns: list[Column] = []
        start = 0
        for name in names:
            shapes = [tensors[name].shape for tensors in each]
            column = Column(name, tuple(max(sizes) for sizes in zip(*shapes, strict=True)), start)
            self.columns.append(column)
            start = column.stop
        self.width = start

    def rows(self, adapters: Sequence[AdapterState], like: Tensor) -> Float[Tensor, "k p"]:
        """Adapters as the rows of a new matrix; their padding is zero.

        Args:
            adapters: those that the layout was made for.
            like: a tensor of the wanted dtype and device.
        """
        each = [adapter.tensors() for adapter in adapters]
        rows = like.new_zeros(len(each), self.width)
        for column in self.columns:
            values = [tensors[column.name] for tensors in each]
            if all(value.shape == column.shape for value in values):
                column.of(rows).copy_(torch.stack(values))
                continue
            for row, value in zip(rows, values, strict=True):
                column.within(row, value.shape).copy_(value)
        return rows

    def read(self, row: Float[Tensor, "p"], adapter: AdapterState) -> AdapterState:
        """An adapter of `adapter`'s shape from a row, on the CPU and in the row's dtype; what is not there is kept.

        Its tensors share no memory with the row nor with `adapter`; with each other they may.
        """
        columns, own = {column.name: column for column in self.columns}, row.detach().to("cpu", copy=True)
        found = {
            name: columns[name].within(own, value.shape).contiguous()
            if name in columns
            else value.detach().to("cpu", row.dtype, copy=True)
            for name, value in adapter.tensors().items()
        }
        pairs = {name: LoraPair(found[f"{name}:A"], found[f"{name}:B"], p.scale) for name, p in adapter.pairs.items()}
        return AdapterState(pairs, {name: found[name] for name in adapter.dense})


@final
class FlatOptimizer:
    """AdamW or SGD with momentum, as torch's, on some rows at a time.

    A row that takes no part in a step is not touched, and counts its own steps.

    Args:
        rows: how many rows there are.
        width: entries of a row.
        configs: each row's rates; all name the same optimiser.
        like: a tensor of the wanted dtype and device.
    """

    def __init__(self, rows: int, width: int, configs: Sequence[TrainConfig], like: Tensor) -> None:
        self._adamw = configs[0].optimizer == "adamw"
        self._decay = [config.weight_decay for config in configs]
        self._momentum = [config.momentum for config in configs]
        self._steps = [0] * rows
        needed = 2 if self._adamw else int(any(self._momentum))
        self._state = [like.new_zeros(rows, width) for _ in range(needed)]

    @torch.no_grad()
    def step(
        self, values: Float[Tensor, "k p"], gradients: Float[Tensor, "k p"], rows: Sequence[int], rates: Sequence[float]
    ) -> None:
        """Move some rows.

        Args:
            values: the rows, changed in place.
            gradients: in these rows; may be overwritten.
            rows: their numbers.
            rates: their learning rates.
        """

        def each(numbers: Sequence[float]) -> Tensor:
            return sent(numbers, values)[:, None]

        for row in rows:
            self._steps[row] += 1
        state = [take(held, rows) for held in self._state]
        decay = [self._decay[row] for row in rows]
        if self._adamw:
            first, second = state
            steps = [self._steps[row] for row in rows]
            if any(decay):
                values.mul_(each([1 - rate * weight for rate, weight in zip(rates, decay, strict=True)]))
            first.lerp_(gradients, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
            root = second.sqrt().div_(each([math.sqrt(1 - BETAS[1] ** t) for t in steps])).add_(EPSILON)
            size = each([-rate / (1 - BETAS[0] ** t) for rate, t in zip(rates, steps, strict=True)])
            values.addcmul_(torch.div(first, root, out=root), size)
        else:
            if any(decay):
                gradients.addcmul_(values, each(decay))
            if state:
                gradients = state[0].mul_(each([self._momentum[row] for row in rows])).add_(gradients)
            values.addcmul_(gradients, each([-rate for rate in rates]))
        for held, now in zip(self._state, state, strict=True):
            put(held, rows, now)


def sent(numbers: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor where another one is, in its dtype or the one given; the host does not wait for a GPU."""
    return torch.tensor(numbers, dtype=dtype or like.dtype).to(like.device, non_blocking=like.device.type == "cuda")


def take(held: Float[Tensor, "K p"], rows: Sequence[int]) -> Float[Tensor, "k p"]:
    """Some rows of a matrix to work on, a view where they follow each other; `put` writes them back."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return held[rows[0] : rows[0] + len(rows)]
    return held[sent(rows, held, torch.int64)]


def put(held: Float[Tensor, "K p"], rows: Sequence[int], now: Float[Tensor, "k p"]) -> None:
    """Write back what `take` gave, where that was a copy."""
    if now.untyped_storage().data_ptr() != held.untyped_storage().data_ptr():
        held[sent(rows, held, torch.int64)] = now
