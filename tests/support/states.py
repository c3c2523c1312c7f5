"""Comparing adapters and states."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from torch import Tensor

from fedlora.adapter import EVERY_PART, AdapterState
from fedlora.aggregators import GlobalState
from fedlora.state_io import flatten_state


def gap(one: AdapterState, other: AdapterState, parts: Iterable[str] = EVERY_PART) -> float:
    """The largest difference of two entries."""
    theirs = other.tensors(parts)
    return max(float((value - theirs[name]).abs().max()) for name, value in one.tensors(parts).items())


def farthest(ones: Iterable[AdapterState], others: Iterable[AdapterState]) -> float:
    """The largest `gap` of two adapters in the same place."""
    return max(gap(one, other) for one, other in zip(ones, others, strict=True))


def same_adapter(one: AdapterState, other: AdapterState) -> bool:
    """Whether two adapters have equal entries under the same names."""
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def same_state(left: GlobalState, right: GlobalState) -> bool:
    """Whether two states are equal bit for bit, dtypes and order included (NaN equals NaN)."""
    one, other = flatten_state(left), flatten_state(right)
    return (
        json.dumps(one[1]) == json.dumps(other[1])
        and list(one[0]) == list(other[0])
        and all(_same_bits(one[0][name], other[0][name]) for name in one[0])
    )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)
