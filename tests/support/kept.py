"""What clients keep, and what passes between them and the server."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Message
from torch import Tensor

from fedlora.state_io import unpack


def files(folder: Path) -> dict[str, bytes]:
    """What clients keep: "client-0/000001-000000.safetensors" -> its bytes."""
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def newest(folder: Path, client_id: int) -> dict[str, Tensor]:
    """What a client keeps of the last round in which it trained."""
    return unpack(max((folder / f"client-{client_id}").iterdir()).read_bytes())[0]


def raw(message: Message) -> bytes:
    """All that a message says."""
    arrays = (array for record in message.content.values() for array in record.values())
    return b"".join(array.data if hasattr(array, "data") else str(array).encode() for array in arrays)
