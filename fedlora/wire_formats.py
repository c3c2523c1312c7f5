"""How tensors travel: one buffer with the bytes of each, without gaps, and a layout that says what they are.

A request says its layouts (`layout_json`), which are checked as a whole before a buffer is sliced (`read_layout`). The
layout of a reply follows from the request, so that none is sent and nothing of it can be wrong but its digest and the
length of its buffer. There is no pickle, no NumPy container and no offset anywhere.

Who carries the bytes (Flower's messages, or nobody in a simulation) is not known here.

Base updates are never rounded: all clients train on one base, to the byte. Where a client starts may be
(`[wire] down`), to the nearest, in bfloat16 or int8, as a function of the tensor alone. Of what a client sends (`[wire]
up`) it is the *change* from the tensor that the server sent that is rounded, since it is small, both sides know the
start exactly, and a small step is not lost beside a large value.

    float32     the tensor itself, in its own dtype
    bfloat16    the change, rounded to the nearest
    int8        the change, per row in steps of its own, rounded at random without bias (see `fedlora.quantise`):
                the rows' steps in float32, then the codes
    topk        the largest entries of the change by magnitude, a fraction of each tensor's: their places in ascending
                order as int32, then their values in float32; the other entries count as unchanged

A tensor that a format would not make smaller (a half-precision one in bfloat16, a scalar in int8) travels as it is. On
the way down so does all that is not float32, and in int8 a vector: one step would have to do for all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import ReplyError
from fedlora.quantise import LARGEST, Rows, dequantise, quantise, row_shape
from fedlora.sanitize import clean_text

WIRES = ("float32", "bfloat16", "int8", "topk")
RAW, BF16, INT8, TOPK = "raw", "change-bfloat16", "change-int8", "change-topk"
"""What the bytes of one tensor are: itself, or its change in a smaller format."""
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STEP = 4  # bytes of a row's step
_PLACE = 4  # bytes of an entry's place, and as many of its value
MOST_TENSORS, LONGEST_NAME, MOST_SIDES, MOST_ELEMENTS = 1 << 16, 1 << 10, 8, 1 << 40
"""Of a layout that is read: how many tensors, characters of a name, sides of a shape, and elements it may have."""


@dataclass(frozen=True)
class Header:
    """All of a tensor but its bytes.

    Args:
        form: `RAW`, `BF16`, `INT8` or `TOPK`.
        dtype: Type of the elements that are sent.
        shape: Shape of the tensor.
        nbytes: Number of bytes that are sent.
    """

    form: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@lru_cache(maxsize=4096)
def header_of(wire: str, dtype: torch.dtype, shape: tuple[int, ...], fraction: float = 1.0) -> Header:
    """The only header that a tensor of this dtype and shape can have in a wire format.

    Args:
        wire: One of `WIRES`.
        dtype: Of the tensor.
        shape: Of the tensor.
        fraction: Of its entries that "topk" sends, rounded up.
    """
    size = math.prod(shape)
    raw = Header(RAW, _NAMES[dtype], shape, dtype.itemsize * size)
    formed = {
        "float32": raw,
        "bfloat16": Header(BF16, "bfloat16", shape, torch.bfloat16.itemsize * size),
        "int8": Header(INT8, "int8", shape, _STEP * row_shape(shape)[0] + size),
        "topk": Header(TOPK, "float32", shape, 2 * _PLACE * max(1, math.ceil(fraction * size - 1e-9))),
    }[wire]
    return formed if formed.nbytes < raw.nbytes else raw


def header_of_value(wire: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Header:
    """The only header that a tensor can have on the way down; see `header_of`."""
    whole = dtype != torch.float32 or (wire == "int8" and len(shape) < 2)
    return header_of("float32" if whole else wire, dtype, shape)


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor as little-endian bytes: its own memory, where it is contiguous and on the CPU."""
    return _bytes(tensor.detach().cpu())


def from_raw(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `raw_bytes`; the result owns its memory."""
    return _tensor(data, DTYPES[dtype]).reshape(shape)


def encode_change(header: Header, tensor: Tensor, start: Tensor, seed: int) -> bytes | memoryview:
    """The bytes of a trained tensor for the way up.

    Args:
        header: Of `start`; see `header_of`.
        tensor: After training.
        start: The same tensor before it, as the server sent it.
        seed: Of the random rounding.
    """
    if header.form == RAW:
        return raw_bytes(tensor.to(start.dtype))
    tensor, start = tensor.detach().cpu(), start.detach().cpu()
    change = tensor.to(_wide(start)) - start.to(_wide(start))
    return _encoded(header, change, seed)


def encode_value(header: Header, tensor: Tensor) -> bytes | memoryview:
    """The bytes of a tensor for the way down, in the format of its `header_of_value`."""
    tensor = tensor.detach().cpu()
    return _bytes(tensor) if header.form == RAW else _encoded(header, tensor, None)


def decode_value(header: Header, data: bytes | memoryview) -> Tensor:
    """The tensor of as many bytes as the header says; it owns its memory.

    Raises:
        ReplyError: the codes or places are none that `encode_value` makes.
    """
    return from_raw(data, header.dtype, header.shape) if header.form == RAW else _decoded(header, data).float()


def as_sent(wire: str, tensor: Tensor) -> Tensor:
    """What a client would decode of a tensor; the tensor itself where it travels as it is."""
    header = header_of_value(wire, tensor.dtype, tuple(tensor.shape))
    return tensor if header.form == RAW else decode_value(header, encode_value(header, tensor))


def decode_change(header: Header, data: bytes | memoryview, start: Tensor) -> Tensor:
    """The trained tensor, in the dtype of its start, of as many bytes as the header says.

    Raises:
        ReplyError: the codes or places are none that `encode_change` makes.
    """
    if header.form == RAW:
        return from_raw(data, header.dtype, header.shape)
    start = start.detach().cpu()
    return (start.to(_wide(start)) + _decoded(header, data).to(_wide(start))).to(start.dtype)


def as_received(header: Header, tensor: Tensor, start: Tensor, seed: int) -> Tensor:
    """What the server would receive of a trained tensor: the tensor after `encode_change` and `decode_change`."""
    if header.form == RAW:
        return tensor.detach().to("cpu", start.dtype)
    return decode_change(header, encode_change(header, tensor, start, seed), start)


def _encoded(header: Header, change: Tensor, seed: int | None) -> bytes | memoryview:
    """A change, or a value as its change from zero; the seed is of int8's random rounding, None: to the nearest."""
    if header.form == BF16:
        return _bytes(change.to(torch.bfloat16))
    if header.form == TOPK:
        change = change.flatten().float()
        places = _largest(change, header.nbytes // (2 * _PLACE))
        return b"".join((_bytes(places.int()), _bytes(change[places])))
    rows = quantise(change, None if seed is None else torch.Generator().manual_seed(seed))
    return b"".join((_bytes(rows.steps), _bytes(rows.codes)))


def _decoded(header: Header, data: bytes | memoryview) -> Tensor:
    """The inverse of `_encoded`."""
    if header.form == BF16:
        return _tensor(data, torch.bfloat16).reshape(header.shape)
    if header.form == TOPK:
        return _scattered(data, header.shape)
    count, width = row_shape(header.shape)
    steps = _tensor(data[: _STEP * count], torch.float32)
    codes = _tensor(data[_STEP * count :], torch.int8).reshape(count, width)
    if bool((steps < 0).any()) or bool((codes < -LARGEST).any()):
        raise ReplyError(
            "its int8 codes are none that fedlora makes: a negative step, or a code of -128", code="invalid-codes"
        )
    return dequantise(Rows(steps, codes), header.shape)


def _largest(change: Tensor, count: int) -> Tensor:
    """The places of the largest magnitudes, ascending; of equal ones the first, and what is not finite before all."""
    size = change.abs().nan_to_num(nan=math.inf)
    least = size.topk(count).values[-1]
    tied = (size == least).nonzero().flatten()[: count - int((size > least).sum())]
    return torch.cat([(size > least).nonzero().flatten(), tied]).sort().values


def _scattered(data: bytes | memoryview, shape: tuple[int, ...]) -> Tensor:
    """The change that the places and values of some entries stand for."""
    half, size = len(data) // 2, math.prod(shape)
    places = _tensor(data[:half], torch.int32).long()
    if bool((places[1:] <= places[:-1]).any()) or not 0 <= int(places[0]) <= int(places[-1]) < size:
        raise ReplyError(
            "its places are none that a client sends: out of the tensor, or not in ascending order",
            code="invalid-codes",
        )
    change = torch.zeros(size)
    change[places] = _tensor(data[half:], torch.float32)
    return change.reshape(shape)


# ---------------------------------------------------------------------------------------------- many tensors


def layout_json(tensors: Mapping[str, Tensor], wire: str = "float32") -> list[Any]:
    """The layout of tensors on the way down, in the order of their bytes: [name, dtype, shape] of each, and the format
    of those that do not travel as they are."""
    said: list[Any] = []
    for name, tensor in tensors.items():
        header = header_of_value(wire, tensor.dtype, tuple(tensor.shape))
        said.append([name, _NAMES[tensor.dtype], list(tensor.shape), *([] if header.form == RAW else [wire])])
    return said


def read_layout(said: object, nbytes: int) -> dict[str, Header]:
    """The inverse of `layout_json`, of anything that JSON can hold.

    Args:
        said: The layout.
        nbytes: Length of the buffer that it describes.

    Raises:
        ReplyError: it is no layout, or not of a buffer of this length; nothing was read of the buffer.
    """
    if not isinstance(said, list) or len(said) > MOST_TENSORS:
        raise _no_layout(f"is no list of at most {MOST_TENSORS} tensors")
    found: dict[str, Header] = {}
    for entry in said:
        match entry:
            case [str(name), str(dtype), list(shape), *formats] if (
                name not in found
                and formats in ([], ["bfloat16"], ["int8"])
                and 0 < len(name) <= LONGEST_NAME
                and dtype in DTYPES
                and len(shape) <= MOST_SIDES
                and all(type(side) is int and side >= 0 for side in shape)
                and math.prod(side or 1 for side in shape) <= MOST_ELEMENTS
            ):
                found[name] = header_of_value(formats[0] if formats else "float32", DTYPES[dtype], tuple(shape))
            case _:
                raise _no_layout(
                    f"has an entry that is no name, dtype and shape of one tensor: {clean_text(entry, 80)}"
                )
    if (total := sum(header.nbytes for header in found.values())) != nbytes:
        raise _no_layout(f"describes {total} bytes, and the buffer has {nbytes}")
    return found


def _no_layout(what: str) -> ReplyError:
    return ReplyError(f"a message's layout {what}: install the same fedlora on server and node", code="invalid-layout")


def layout_digest(layout: Mapping[str, Header]) -> str:
    """16 hexadecimal digits that name a layout."""
    said = [[name, header.form, header.dtype, header.shape] for name, header in layout.items()]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def joined(parts: Iterable[bytes | memoryview]) -> bytes:
    """One buffer of the bytes of all tensors; each part is let go of when it is copied."""
    buffer = BytesIO()
    for part in parts:
        buffer.write(part)
    return buffer.getvalue()


def sliced(layout: Mapping[str, Header], buffer: bytes) -> dict[str, memoryview]:
    """The bytes of each tensor of a buffer that is as long as its layout says; views, without a copy."""
    view, parts, at = memoryview(buffer), dict[str, memoryview](), 0
    for name, header in layout.items():
        parts[name] = view[at : at + header.nbytes]
        at += header.nbytes
    return parts


def _wide(start: Tensor) -> torch.dtype:
    return torch.promote_types(start.dtype, torch.float32)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensor(data: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)
