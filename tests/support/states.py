"""Comparing states bit for bit."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from fedlora.aggregators import GlobalState
from fedlora.state_io import flatten_state


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
