"""Records and a head <-> bytes, for the socket between a node's process and its worker.

Layout: length of the head (8 bytes, little-endian), head (JSON), then the bytes of all arrays in the head's order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_LENGTH = 8


def pack(head: Mapping[str, Any], **contents: RecordDict) -> bytes:
    """One frame.

    Args:
        head: Any value that JSON can represent.
        contents: Records by name.
    """
    bodies: list[bytes] = []
    table = {name: [_described(key, record, bodies) for key, record in c.items()] for name, c in contents.items()}
    text = json.dumps({"head": dict(head), "contents": table}).encode()
    return b"".join((len(text).to_bytes(_LENGTH, "little"), text, *bodies))


def unpack(frame: bytes) -> tuple[dict[str, Any], dict[str, RecordDict]]:
    """Head and contents of a frame.

    Raises:
        ValueError: it is none, or it was cut short.
    """
    try:
        length = int.from_bytes(frame[:_LENGTH], "little")
        whole = json.loads(frame[_LENGTH : _LENGTH + length])
        view, at = memoryview(frame), _LENGTH + length
        contents: dict[str, RecordDict] = {}
        for name, rows in whole["contents"].items():
            contents[name] = RecordDict()
            for row in rows:
                contents[name][row["key"]], at = _record(row, view, at)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no frame: {type(error).__name__}: {error}") from None
    if at != len(frame):
        raise ValueError(f"a frame of {len(frame)} bytes that announces {at}")
    return whole["head"], contents


def _described(key: str, record: ArrayRecord | ConfigRecord | MetricRecord, bodies: list[bytes]) -> dict[str, Any]:
    if isinstance(record, ArrayRecord):
        arrays = [[name, a.dtype, list(a.shape), a.stype, len(a.data)] for name, a in record.items()]
        bodies.extend(a.data for a in record.values())
        return {"key": key, "kind": "arrays", "values": arrays}
    if isinstance(record, MetricRecord):
        return {"key": key, "kind": "metrics", "values": dict(record)}
    return {"key": key, "kind": "config", "values": {name: _plain(value) for name, value in record.items()}}


def _record(row: Mapping[str, Any], view: memoryview, at: int) -> tuple[ArrayRecord | ConfigRecord | MetricRecord, int]:
    if row["kind"] == "metrics":
        return MetricRecord(row["values"]), at
    if row["kind"] == "config":
        return ConfigRecord({name: _rich(value) for name, value in row["values"].items()}), at
    arrays: dict[str, Array] = {}
    for name, dtype, shape, stype, size in row["values"]:
        arrays[name] = Array(dtype, tuple(shape), stype, bytes(view[at : at + size]))
        at += size
    return ArrayRecord(arrays), at


def _plain(value: Any) -> Any:
    """JSON has no bytes: they go as an object, which no record can hold."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return [_rich(item) for item in value] if isinstance(value, list) else value
