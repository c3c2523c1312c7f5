"""How one tensor travels: raw bytes with a declared dtype and shape; no pickle, no NumPy container.

Who carries the bytes (Flower's messages, or nobody in a simulation) is not known here.

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

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
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


def raw_header(tensor: Tensor) -> Header:
    """The header of a tensor that travels as it is."""
    return header_of("float32", tensor.dtype, tuple(tensor.shape))


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor as little-endian bytes."""
    return _bytes(tensor.detach().cpu())


def from_raw(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `raw_bytes`; the result owns its memory."""
    return _tensor(data, DTYPES[dtype]).reshape(shape)


def encode_change(tensor: Tensor, start: Tensor, wire: str, seed: int) -> bytes:
    """The body of a trained tensor for the way up; its header is that of `header_of`.

    Args:
        tensor: After training.
        start: The same tensor before it, as the server sent it.
        wire: One of `WIRES`.
        seed: Of the random rounding.
    """
    header = header_of(wire, tensor.dtype, tuple(tensor.shape))
    if header.stype == STYPE:
        return raw_bytes(tensor)
    tensor, start = tensor.detach().cpu(), start.detach().cpu()
    change = tensor.to(_wide(start)) - start.to(_wide(start))
    if header.stype == BF16_STYPE:
        return _bytes(change.to(torch.bfloat16))
    rows = quantise(change, torch.Generator().manual_seed(seed))
    return _bytes(rows.steps) + _bytes(rows.codes)


def decode_change(header: Header, data: bytes, start: Tensor) -> Tensor:
    """The trained tensor of a body whose header was checked, in the dtype of its start.

    Raises:
        ReplyError: the codes are none that `encode_change` makes.
    """
    shape = header.shape
    if header.stype == STYPE:
        return from_raw(data, header.dtype, shape)
    start = start.detach().cpu()
    if header.stype == BF16_STYPE:
        change = _tensor(data, torch.bfloat16).reshape(shape)
    else:
        count, width = row_shape(shape)
        steps = _tensor(data[: _STEP * count], torch.float32)
        codes = _tensor(data[_STEP * count :], torch.int8).reshape(count, width)
        if bool((steps < 0).any()) or bool((codes < -LARGEST).any()):
            raise ReplyError(
                "its int8 codes are none that a client makes: a negative step, or a code of -128", code="invalid-codes"
            )
        change = dequantise(Rows(steps, codes), shape)
    return (start.to(_wide(start)) + change.to(_wide(start))).to(start.dtype)


def as_received(tensor: Tensor, start: Tensor, wire: str, seed: int) -> Tensor:
    """What the server would receive of a trained tensor: the tensor after `encode_change` and `decode_change`."""
    header = header_of(wire, tensor.dtype, tuple(tensor.shape))
    if header.stype == STYPE:
        return tensor.detach().cpu()
    return decode_change(header, encode_change(tensor, start, wire, seed), start)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}\0{_NAMES[tensor.dtype]}\0{tuple(tensor.shape)}\0".encode())
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def _wide(start: Tensor) -> torch.dtype:
    return torch.promote_types(start.dtype, torch.float32)


def _bytes(tensor: Tensor) -> bytes:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)
