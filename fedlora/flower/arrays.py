"""Tensors as Flower's arrays, without a copy more than the bytes themselves."""

from __future__ import annotations

from flwr.app import Array
from torch import Tensor

from fedlora.wire_formats import from_raw, header_of, raw_bytes, raw_header


def to_array(tensor: Tensor) -> Array:
    """One tensor as raw little-endian bytes with its dtype and shape."""
    header = raw_header(tensor)
    return Array(header.dtype, header.shape, header.stype, raw_bytes(tensor))


def from_array(array: Array) -> Tensor:
    """The tensor of a raw array whose header was checked; the result owns its memory."""
    return from_raw(array.data, array.dtype, tuple(array.shape))


def change_array(tensor: Tensor, data: bytes, wire: str) -> Array:
    """The body that `encode_change` made of a tensor, with its header."""
    header = header_of(wire, tensor.dtype, tuple(tensor.shape))
    return Array(header.dtype, header.shape, header.stype, data)
