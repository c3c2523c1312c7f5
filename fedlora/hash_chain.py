"""Files of hash-chained JSON lines: appended to under a lock, and on the disk when an append returns.

Each line is a JSON object with its number ("line") and a "hash": SHA-256 of the hash of the line before it (64 zeros
for the first) followed by the line's other keys as canonical JSON. A line that is changed, removed or moved breaks the
chain there. Two things do not: lines that are removed from the end, and a chain that is computed anew by somebody who
can write the file. The head (the hash of the last line), kept in another place, shows both.

A crash can cut the last line short. What is there of it stays, and the next append puts a record of it below:
{"event": "torn", "sha256": of the unreadable bytes}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import FedloraError
from fedlora.files import sync_folder

START = "0" * 64
"""In the place of the hash of a line before the first."""
TORN = "torn"
"""Event of a record that stands for the unreadable bytes above it."""


class ChainError(ValueError):
    """A file is no chain of lines.

    Args:
        line: Number of the first line that shows it.
        why: What is wrong with it, to follow "line 3".
        earlier: Whether its lines have no hashes at all, as an earlier fedlora wrote them.
    """

    def __init__(self, line: int, why: str, *, earlier: bool = False) -> None:
        super().__init__(f"line {line} {why}")
        self.line, self.earlier = line, earlier


@dataclass(frozen=True)
class Chain:
    """What is in a file.

    Args:
        records: All lines, with "line" and "hash".
        torn: Unreadable bytes at the end, for which no record stands yet; None where there are none.
        ends: Whether the last line has its line break.
        lines: Number of lines of the file.
    """

    records: tuple[Mapping[str, Any], ...] = ()
    torn: bytes | None = None
    ends: bool = True
    lines: int = 0

    @property
    def head(self) -> str:
        """The hash of the last line; "" in an empty file."""
        return str(self.records[-1]["hash"]) if self.records else ""

    def holds(self, head: str) -> bool:
        """Whether this chain has, or once had, a head: it goes on from there."""
        return any(record["hash"] == head for record in self.records)


def read_chain(data: bytes) -> Chain:
    """The lines of a file.

    Raises:
        ChainError: a line was changed, removed or moved, or is unreadable and not the last.
    """
    texts = data.split(b"\n")
    ends = not texts[-1]
    if ends:
        texts.pop()
    records: list[Mapping[str, Any]] = []
    unreadable: list[bytes] = []
    head = START
    for number, text in enumerate(texts, start=1):
        try:
            record = json.loads(text)
        except ValueError:
            unreadable.append(text)
            continue
        if unreadable and not _stands_for(record, b"\n".join(unreadable)):
            raise ChainError(number - len(unreadable), "cannot be read")
        unreadable = []
        if isinstance(record, dict) and b'"hash"' not in data:
            raise ChainError(number, "has no hash", earlier=True)
        head = _require_link(record, text, number, head)
        records.append(record)
    return Chain(tuple(records), b"\n".join(unreadable) if unreadable else None, ends, len(texts))


def _stands_for(record: object, unreadable: bytes) -> bool:
    digest = hashlib.sha256(unreadable).hexdigest()
    return isinstance(record, Mapping) and (record.get("event"), record.get("sha256")) == (TORN, digest)


def _require_link(record: Any, text: bytes, number: int, before: str) -> str:
    """The hash of a line, which follows from the one before."""
    if not isinstance(record, dict) or not isinstance(record.get("hash"), str) or type(record.get("line")) is not int:
        raise ChainError(number, "has no hash or no number")
    if record["line"] > number:
        raise ChainError(number, "is missing, or was moved")
    if record["line"] < number:
        raise ChainError(number, "is an earlier one again, or was moved")
    content = {key: value for key, value in record.items() if key != "hash"}
    if record["hash"] != _hash_of(before, content) or text != _canonical(record).encode():
        raise ChainError(number, "was changed, or does not follow from the line before it")
    return str(record["hash"])


def _hash_of(before: str, content: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{before}{_canonical(content)}".encode()).hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Mark:
    """Where a writer left a file.

    Args:
        size: In bytes.
        head: See `Chain.head`.
        lines: Their number.
    """

    size: int
    head: str
    lines: int


class ChainWriter:
    """A chained file, locked and open for appending.

    Args:
        path: Of the file; it and its folder are made if they are not there.
        what: The file in words, such as "privacy ledger".
        error: The kind of error to raise.
        wait: Whether to wait for whoever has the lock; otherwise that is an error.
        left: Where the caller left the file: if nobody else has written since, it is not read again.

    Attributes:
        chain: What was in the file; nothing of it if it was not read again.
        mark: Where the file ends now.

    Raises:
        FedloraError: somebody else has it open, or the system has no file locks.
        ChainError: it is no chain.
    """

    def __init__(
        self, path: Path, what: str, error: type[FedloraError], *, wait: bool = False, left: Mark | None = None
    ) -> None:
        self._fd, self._what, self._error = -1, f"{what} {str(path)!r}", error
        try:
            import fcntl
        except ImportError:
            raise error(
                f"{self._what} needs POSIX file locks: use Linux or macOS for what keeps one", code="no-file-locks"
            ) from None
        fresh = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if fresh:
                sync_folder(path.parent)
            size = os.fstat(self._fd).st_size
            self.chain = Chain() if left and left.size == size else read_chain(os.pread(self._fd, size, 0))
            self.mark = left if left and left.size == size else Mark(size, self.chain.head, self.chain.lines)
        except BlockingIOError:
            self.close()
            raise error(
                f"{self._what} is in use, and one process writes it at a time: wait for it, or name another file",
                code="file-in-use",
            ) from None
        except BaseException:
            self.close()
            raise

    def append(self, records: Iterable[Mapping[str, Any]], torn: Mapping[str, Any] | None = None) -> str:
        """Write lines in one piece and wait until they are on the disk; all of them are there afterwards, or none.

        Args:
            records: Without "line" and "hash"; after unreadable bytes a record of these comes first.
            torn: What that record says beside.

        Returns:
            The new head.

        Raises:
            FedloraError: they cannot be written; the file is as before.
        """
        wanted, chain = list(records), self.chain
        if chain.torn is not None:
            wanted.insert(0, {**(torn or {}), "event": TORN, "sha256": hashlib.sha256(chain.torn).hexdigest()})
        lines, after = self._chained(wanted)
        data = (b"" if chain.ends else b"\n") + lines
        try:
            written = os.write(self._fd, data)
            if written == len(data):
                os.fsync(self._fd)
        except OSError as error:
            self._undo(error.strerror or str(error))
        if written != len(data):
            self._undo("no space is left on its disk")
        self.chain = Chain()
        self.mark = Mark(self.mark.size + len(data), after.head, after.lines)
        return after.head

    def head_after(self, records: Iterable[Mapping[str, Any]]) -> str:
        """The head that `append` of these records would give, where nothing is torn."""
        return self._chained(records)[1].head

    def _chained(self, records: Iterable[Mapping[str, Any]]) -> tuple[bytes, Mark]:
        """Lines for some records, and where they would leave the file but for its size."""
        head, lines, data = self.mark.head, self.mark.lines, b""
        for record in records:
            lines += 1
            content = {**record, "line": lines}
            head = _hash_of(head or START, content)
            data += f"{_canonical({**content, 'hash': head})}\n".encode()
        return data, Mark(0, head, lines)

    def _undo(self, why: str) -> None:
        os.ftruncate(self._fd, self.mark.size)
        raise self._error(f"{self._what} cannot be written ({why}): free some space on its disk", code="disk-full")

    def close(self) -> None:
        """Give the lock back; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
