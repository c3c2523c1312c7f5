"""Files that survive a crash, and locks that do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The folder for downloaded and derived files: $FEDLORA_CACHE, or ~/.cache/fedlora."""
    named = os.environ.get("FEDLORA_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fedlora"


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader finds the old file or the new one, whole, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` left below a folder where a process was killed; nobody may be writing there."""
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file inside; the system lets go of it when the process ends, however it ends.

    Where the system has no POSIX locks nothing is locked.

    Args:
        path: of the file; is made if it is not there, and stays.

    Raises:
        BlockingIOError: somebody else holds it, in this process or another.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
