"""Hashes by which two commands, or two machines, know that they read the same: of files, of rows, of JSON, of tensors.

All are hexadecimal and of 128 bits, but for those of files and tensors (SHA-256), and of fedlora's source.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.files import cache_dir, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # bytes
WORTH_KEEPING = 1 << 24  # bytes; of a file whose hash is kept on disk: smaller ones are read in milliseconds
SETTLED_S = 2.0  # a file that was written later than so long ago may be written again within its time stamp's tick
ROW = 16  # bytes of a row's hash

Stamp = tuple[str, int, int, int, int]
"""Path, size, times of the last change (of content, of the entry) in ns, and inode of a file."""


def stamp(path: Path) -> Stamp:
    """By which a file that was changed is known without reading it."""
    found = path.stat()
    return (str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a large one it is remembered in the cache folder, by the file's stamp."""
    return _file_digest(stamp(path))


@lru_cache(maxsize=4096)
def _file_digest(mark: Stamp) -> str:
    kept = None
    if mark[1] >= WORTH_KEEPING:
        kept = cache_dir() / "hashes" / digest_of(list(mark))
        with suppress(OSError):
            if len(text := kept.read_text(encoding="ascii").strip()) == 64:
                return text
    digest = hashlib.sha256()
    with open(mark[0], "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if kept is not None and time.time() - mark[3] / 1e9 > SETTLED_S and stamp(Path(mark[0])) == mark:
        with suppress(OSError):  # a cache that cannot be written saves no time, and harms nobody
            write_atomically(kept, found.encode())
    return found


@cache
def code_digest() -> str:
    """Of fedlora's own source, 16 digits: other code need not give the same bytes."""
    root = Path(__file__).resolve().parent
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root).as_posix()}\0".encode())
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()[:16]


def digest_of(value: Any) -> str:
    """Of what JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_of_rows(rows: np.ndarray, beside: Iterable[Sequence[Any]] = ()) -> str:
    """Of rows in their order.

    Args:
        rows: their hashes, as `row_digests` makes them.
        beside: more columns, of the same length each.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16)
    for column in beside:
        digest.update(b"\0column")
        for value in column:
            digest.update(_bytes(value))
    return digest.hexdigest()


def row_digests(columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """A hash of each row's content, bytes [n]: a number counts as what it looks like, so that 1 and "1" are the same.

    Args:
        columns: role -> values. What stands under "image" may be the path of a file, whose content counts then.
    """
    names = sorted(columns)
    size = len(columns[names[0]]) if names else 0
    out = np.empty(size, dtype=f"V{ROW}")
    for row in range(size):
        digest = hashlib.blake2b(digest_size=ROW)
        for name in names:
            value = columns[name][row]
            digest.update(_bytes(_content(value) if name == "image" else value))
        out[row] = digest.digest()
    return out


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of some tensors' names, dtypes, shapes and bytes, whatever their order."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{str(plain.dtype).removeprefix('torch.')}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    """A value as bytes that no other sequence of values begins with."""
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        data = value
    elif value is None:
        return b"none\0"
    elif isinstance(value, list | tuple | dict):
        data = json.dumps(value, sort_keys=True, default=_plain).encode()
    elif isinstance(value, np.ndarray):
        data = value.astype(str).tobytes() if value.dtype == object else value.tobytes()
        data = f"{value.dtype} {value.shape} ".encode() + data
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a picture of PIL
        data = f"{value.mode} {value.size} ".encode() + value.tobytes()
    else:
        data = str(value).encode("utf-8", "surrogatepass")
    return b"%d:" % len(data) + data


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _content(value: Any) -> Any:
    """The bytes of a picture that is given by its path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | os.PathLike):
        with suppress(OSError, ValueError):
            return file_digest(Path(value))
    return value
