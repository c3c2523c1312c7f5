"""The one array in which the tensors of a message travel: Flower moves each array as objects of its own, one by one."""

from __future__ import annotations

from flwr.app import Array

from fedlora.errors import ReplyError

_STYPE = "fedlora.buffer.v1"


def to_array(buffer: bytes) -> Array:
    """A buffer as an array."""
    return Array("uint8", (len(buffer),), _STYPE, buffer)


def from_array(array: Array) -> bytes:
    """The buffer of an array.

    Raises:
        ReplyError: the array is of another kind.
    """
    if array != to_array(array.data):
        raise ReplyError(
            "its tensors do not travel in one buffer: install the same fedlora on server and node", code="no-buffer"
        )
    return array.data
