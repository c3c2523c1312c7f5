"""Lines that survive a crash: the file under a ledger."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.files import sync_folder


class Appender:
    """A file of JSON lines, locked and open for appending; each append is on the disk when it returns.

    Args:
        path: of the file; it and its folder are made if they are not there.

    Raises:
        PrivacyError: somebody else has it open, or the system has no file locks.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            import fcntl
        except ImportError:
            raise PrivacyError(
                "a privacy ledger needs POSIX file locks: run private clients on Linux or macOS", code="no-file-locks"
            ) from None
        fresh = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise PrivacyError(
                f"privacy ledger {str(path)!r} is in use, and one client trains one round at a time: wait for it, or "
                "give each client a ledger of its own",
                code="ledger-in-use",
            ) from None
        if fresh:
            sync_folder(path.parent)

    def read(self) -> bytes:
        """All that is in the file."""
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def append(self, lines: Iterable[Mapping[str, Any]], prefix: bytes = b"") -> None:
        """Write lines in one piece, after `prefix`, and wait until they are on the disk."""
        data = prefix + b"".join(json.dumps(line, sort_keys=True).encode() + b"\n" for line in lines)
        if os.write(self._fd, data) != len(data):
            raise PrivacyError(
                "the privacy ledger could not be written in full: free some space on its disk", code="disk-full"
            )
        os.fsync(self._fd)

    def close(self) -> None:
        """Give the lock back; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
