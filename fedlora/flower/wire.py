"""How one tensor travels: raw bytes with a declared dtype and shape; no pickle, no NumPy container.

What a server sends is never rounded: all clients train on one base and one state, to the byte. What a client sends may
be (`[wire] up`): then it is the *change* from the tensor that the server sent that is rounded, since it is small, both
sides know the start exactly, and a small step is not lost beside a large value.

    float32     the tensor itself, in its own dtype
    bfloat16    the change, rounded to the nearest
    int8        the change, per row in steps of its own, rounded at random without bias (see `fedlora.quantise`):
                the rows' steps in float32, then the codes

A tensor that a format would not make smaller (a half-precision one in bfloat16, a scalar in int8) travels as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from flwr.app import Array
from torch import Tensor

from fedlora.errors import ReplyError
from fedlora.quantise import LARGEST, Rows, dequantise, quantise, row_shape

WIRES = ("float32", "bfloat16", "int8")
STYPE = "fedlora.raw.v1"
BF16_STYPE = "fedlora.change-bf16.v1"
INT8_STYPE = "fedlora.change-int8.v1"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STEP = 4  # bytes of a row's step


@dataclass(frozen=True)
class Header:
    """All of an array but its bytes.

    Args:
        stype: name of the serialisation.
        dtype: declared type of the elements.
        shape: of the tensor.
        nbytes: length of the body.
    """

    stype: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@lru_cache(maxsize=4096)
def header_of(wire: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Header:
    """The only header that a tensor of this dtype and shape can have in a wire format."""
    size = math.prod(shape)
    raw = Header(STYPE, _NAMES[dtype], shape, dtype.itemsize * size)
    formed = {
        "float32": raw,
        "bfloat16": Header(BF16_STYPE, "bfloat16", shape, torch.bfloat16.itemsize * size),
        "int8": Header(INT8_STYPE, "int8", shape, _STEP * row_shape(shape)[0] + size),
    }[wire]
    return formed if formed.nbytes < raw.nbytes else raw


def to_array(tensor: Tensor) -> Array:
    """One tensor as raw little-endian bytes with its dtype and shape."""
    return Array(_NAMES[tensor.dtype], tuple(tensor.shape), STYPE, _bytes(tensor.detach().cpu()))


def from_array(array: Array) -> Tensor:
    """The tensor of a raw array whose header was checked; the result owns its memory."""
    return _tensor(array.data, DTYPES[array.dtype]).reshape(array.shape)


def encode_change(tensor: Tensor, start: Tensor, wire: str, seed: int) -> Array:
    """A trained tensor for the way up.

    Args:
        tensor: after training.
        start: the same tensor before it, as the server sent it.
        wire: one of `WIRES`.
        seed: of the random rounding.
    """
    header = header_of(wire, tensor.dtype, tuple(tensor.shape))
    if header.stype == STYPE:
        return to_array(tensor)
    tensor, start = tensor.detach().cpu(), start.detach().cpu()
    change = tensor.to(_wide(start)) - start.to(_wide(start))
    if header.stype == BF16_STYPE:
        data = _bytes(change.to(torch.bfloat16))
    else:
        rows = quantise(change, torch.Generator().manual_seed(seed))
        data = _bytes(rows.steps) + _bytes(rows.codes)
    return Array(header.dtype, header.shape, header.stype, data)


def decode_change(array: Array, start: Tensor) -> Tensor:
    """The trained tensor of an array whose header was checked, in the dtype of its start.

    Raises:
        ReplyError: the codes are none that `encode_change` makes.
    """
    if array.stype == STYPE:
        return from_array(array)
    shape, start = tuple(array.shape), start.detach().cpu()
    if array.stype == BF16_STYPE:
        change = _tensor(array.data, torch.bfloat16).reshape(shape)
    else:
        count, width = row_shape(shape)
        steps = _tensor(array.data[: _STEP * count], torch.float32)
        codes = _tensor(array.data[_STEP * count :], torch.int8).reshape(count, width)
        if bool((steps < 0).any()) or bool((codes < -LARGEST).any()):
            raise ReplyError("its int8 codes are none that a client makes: a negative step, or a code of -128")
        change = dequantise(Rows(steps, codes), shape)
    return (start.to(_wide(start)) + change.to(_wide(start))).to(start.dtype)


def _wide(start: Tensor) -> torch.dtype:
    return torch.promote_types(start.dtype, torch.float32)


def _bytes(tensor: Tensor) -> bytes:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)
