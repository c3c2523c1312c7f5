"""Adapters as rows of one matrix, and optimisers that move all rows at once, each by its own rates.

K clients' trained tensors are the K rows of a matrix, so that a step of AdamW for all of them is a handful of vector
operations, and a layer's stacked tensor is a view of some columns. A pair of a smaller rank than the widest is padded
with zeros, and stays so: with zero columns in B and zero rows in A neither gets a gradient there, and no optimiser here
moves a zero that has none.

Shapes: k = clients, p = entries of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.config import TrainConfig
from fedlora.errors import TrainingError

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

    @cached_property
    def stop(self) -> int:
        """One after its last entry."""
        return self.start + math.prod(self.shape)

    def of(self, rows: Float[Tensor, "k p"]) -> Tensor:
        """The stacked tensor, a view [k, *shape]."""
        return rows[:, self.start : self.stop].view(len(rows), *self.shape)

    def within(self, row: Float[Tensor, "p"], shape: Sequence[int]) -> Tensor:
        """The part of one row that a tensor of this shape fills, a view: all, or a corner for a smaller rank."""
        return _corner(row[self.start : self.stop].view(self.shape), shape)


def _corner(whole: Tensor, shape: Sequence[int]) -> Tensor:
    """What a tensor of this shape fills of the widest: all, or a corner for a smaller rank."""
    return whole if shape == whole.shape else whole[tuple(slice(size) for size in shape)]


@final
class Columns:
    """The layout of a row.

    Args:
        adapters: that become rows; they have the same modules, and any ranks.
        names: the tensors that a row holds, in order.
    """

    def __init__(self, adapters: Sequence[AdapterState], names: Sequence[str]) -> None:
        each = {id(adapter): adapter.tensors() for adapter in adapters}.values()  # most start from the same
        self.columns: list[Column] = []
        start = 0
        for name in names:
            shapes = [tensors[name].shape for tensors in each]
            column = Column(name, tuple(max(sizes) for sizes in zip(*shapes, strict=True)), start)
            self.columns.append(column)
            start = column.stop
        self.width = start
        self._sizes = [column.stop - column.start for column in self.columns]

    def stacked(self, rows: Float[Tensor, "k p"]) -> dict[str, Tensor]:
        """The stacked tensors by name, views [k, *shape]."""
        parts = zip(self.columns, rows.split(self._sizes, 1), strict=True)
        return {column.name: part.view(len(rows), *column.shape) for column, part in parts}

    def rows(self, adapters: Sequence[AdapterState], like: Tensor) -> Float[Tensor, "k p"]:
        """Adapters as the rows of a new matrix; their padding is zero.

        Args:
            adapters: those that the layout was made for.
            like: a tensor of the wanted dtype and device.
        """
        if len(adapters) > 1 and all(adapter is adapters[0] for adapter in adapters):
            return self.rows(adapters[:1], like).repeat(len(adapters), 1)
        each = [adapter.tensors() for adapter in adapters]
        # Put together in memory and sent at once: each copy to a GPU is waited for.
        place = like.device if like.is_meta else torch.device("cpu")
        rows = torch.zeros(len(each), self.width, dtype=like.dtype, device=place)
        for column, stacked in zip(self.columns, self.stacked(rows).values(), strict=True):
            values = [tensors[column.name] for tensors in each]
            if all(value.shape == column.shape for value in values):
                stacked.copy_(values[0] if len(values) == 1 else torch.stack(values))
                continue
            for row, value in zip(rows, values, strict=True):
                column.within(row, value.shape).copy_(value)
        return rows.to(like.device)

    def read(self, row: Float[Tensor, "p"], adapter: AdapterState) -> AdapterState:
        """An adapter of `adapter`'s shape from a row, on the CPU and in the row's dtype; what is not there is kept.

        Its tensors share no memory with the row nor with `adapter`; with each other they may.
        """
        values, parts = adapter.tensors(), row.detach().to("cpu", copy=True).split(self._sizes)
        found = {
            column.name: _corner(part.view(column.shape), values[column.name].shape).contiguous()
            for column, part in zip(self.columns, parts, strict=True)
        }
        for name in values.keys() - found.keys():
            found[name] = values[name].detach().to("cpu", row.dtype, copy=True)
        pairs = {
            name: LoraPair(found[f"{name}:A"], found[f"{name}:B"], pair.scale, found.get(f"{name}:R"))
            for name, pair in adapter.pairs.items()
        }
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
        self._names = ("exp_avg", "exp_avg_sq") if self._adamw else ("momentum_buffer",) * any(self._momentum)
        self._state = [like.new_zeros(rows, width) for _ in self._names]
        self._behind: dict[int, list[int]] = {}  # row -> steps that each column has missed, where they differ
        self._widths = torch.empty(0)

    def load(self, row: int, columns: Columns, adapter: AdapterState, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_of` gave; a tensor that is not in it starts anew.

        Raises:
            TrainingError: it is that of another optimiser, or of tensors of other shapes.
        """
        own, steps = adapter.tensors(), []
        for column in columns.columns:
            shape, taken = own[column.name].shape, state.get(f"step/{column.name}")
            steps.append(0 if taken is None else int(taken))
            for name, held in zip(self._names, self._state, strict=True):
                value = state.get(f"{name}/{column.name}")
                if taken is not None and (value is None or value.shape != shape):
                    raise TrainingError(
                        "train.keep_optimizer: the state that the client kept is that of another optimiser or another "
                        "adapter: remove it, or use a rule and ranks that stay as they are",
                        code="kept-state-differs",
                    )
                if value is not None:
                    column.within(held[row], shape).copy_(value)
        self._steps[row] = max(steps, default=0)
        if len(set(steps)) > 1:  # some have rested while others trained
            self._behind[row] = [self._steps[row] - taken for taken in steps]
            self._widths = torch.tensor([column.stop - column.start for column in columns.columns])

    def state_of(self, row: int, columns: Columns, adapter: AdapterState) -> dict[str, Tensor]:
        """A row's state on the CPU, by torch's name of each, a slash, and the tensor's name; "step/..." among them."""
        own, found = adapter.tensors(), {}
        behind = self._behind.get(row, [0] * len(columns.columns))
        for column, missed in zip(columns.columns, behind, strict=True):
            found[f"step/{column.name}"] = torch.tensor(self._steps[row] - missed)
            for name, held in zip(self._names, self._state, strict=True):
                part = column.within(held[row], own[column.name].shape)
                found[f"{name}/{column.name}"] = part.detach().to("cpu", copy=True).contiguous()
        return found

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
            if any(decay):
                values.mul_(each([1 - rate * weight for rate, weight in zip(rates, decay, strict=True)]))
            first.lerp_(gradients, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
            root = second.sqrt().div_(self._of_steps(lambda _, t: math.sqrt(1 - BETAS[1] ** t), rows, rates, values))
            size = self._of_steps(lambda rate, t: -rate / (1 - BETAS[0] ** t), rows, rates, values)
            root.add_(EPSILON)
            values.addcmul_(torch.div(first, root, out=root), size)
        else:
            if any(decay):
                gradients.addcmul_(values, each(decay))
            if state:
                gradients = state[0].mul_(each([self._momentum[row] for row in rows])).add_(gradients)
            values.addcmul_(gradients, each([-rate for rate in rates]))
        for held, now in zip(self._state, state, strict=True):
            put(held, rows, now)

    def _of_steps(
        self, factor: Callable[[float, int], float], rows: Sequence[int], rates: Sequence[float], like: Tensor
    ) -> Float[Tensor, "k _"]:
        """A factor for each row by its rate and its steps, [k, 1]; for each entry where a row's differ."""
        pairs = list(zip(rates, rows, strict=True))
        if not self._behind.keys() & set(rows):
            return sent([factor(rate, self._steps[row]) for rate, row in pairs], like)[:, None]
        even = [0] * len(self._widths)
        each = [[factor(rate, self._steps[row] - n) for n in self._behind.get(row, even)] for rate, row in pairs]
        table = torch.tensor(each, dtype=like.dtype).repeat_interleave(self._widths, 1)
        return table.to(like.device, non_blocking=like.device.type == "cuda")


def sent(numbers: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor where another one is, in its dtype or the one given; the host does not wait for a GPU."""
    return torch.tensor(numbers, dtype=dtype or like.dtype).to(like.device, non_blocking=like.device.type == "cuda")


def take(held: Float[Tensor, "K p"], rows: Sequence[int]) -> Float[Tensor, "k p"]:
    """Some rows of a matrix to work on, a view where they follow each other; `put` writes them back."""
    if _follow_each_other(rows):
        return held[rows[0] : rows[0] + len(rows)]
    return held[sent(rows, held, torch.int64)]


def add(held: Float[Tensor, "K p"], rows: Sequence[int], more: Float[Tensor, "k p"]) -> None:
    """Add to some rows of a matrix, each named once."""
    if _follow_each_other(rows):
        held[rows[0] : rows[0] + len(rows)].add_(more)
    else:
        held.index_add_(0, sent(rows, held, torch.int64), more)


def _follow_each_other(rows: Sequence[int]) -> bool:
    return list(rows) == list(range(rows[0], rows[0] + len(rows)))


def put(held: Float[Tensor, "K p"], rows: Sequence[int], now: Float[Tensor, "k p"]) -> None:
    """Write back what `take` gave, where that was a copy."""
    if now.untyped_storage().data_ptr() != held.untyped_storage().data_ptr():
        held[sent(rows, held, torch.int64)] = now
