"""A chain names the line that was changed, removed or moved, and a crash costs nothing that was written whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.errors import raises

from fedlora import hash_chain
from fedlora.errors import DeployError
from fedlora.hash_chain import Chain, ChainError, ChainWriter, Mark, read_chain


def write(path: Path, *values: Any, **options: Any) -> Mark:
    with closing(ChainWriter(path, "log", DeployError, **options)) as writer:
        writer.append([{"value": value} for value in values])
        return writer.mark


def values(path: Path) -> list[Any]:
    return [record.get("value") for record in read_chain(path.read_bytes()).records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "log.jsonl", 1, 2.5)
    write(tmp_path / "log.jsonl", "three", {"four": ["ä", None]})
    return tmp_path / "log.jsonl"


def test_what_was_appended_is_read(path: Path) -> None:
    assert values(path) == [1, 2.5, "three", {"four": ["ä", None]}]
    chain = read_chain(path.read_bytes())
    assert [record["line"] for record in chain.records] == [1, 2, 3, 4]
    assert chain.holds(chain.head)
    assert not chain.holds("0" * 64)
    assert read_chain(b"") == Chain()


def swapped(lines: list[bytes], one: int, other: int) -> list[bytes]:
    lines[one], lines[other] = lines[other], lines[one]
    return lines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines[:1] + lines[2:], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: swapped(lines, 1, 2), 2),
        (lambda lines: lines[:2] + lines[1:], 3),
        (lambda lines: [lines[0], lines[1].replace(b"2.5", b"2.6"), *lines[2:]], 2),
        (lambda lines: [*lines[:3], lines[3].replace(b"four", b"five")], 4),
        (lambda lines: [lines[0], lines[1].replace(b'"line":2,', b'"line": 2,'), *lines[2:]], 2),
        (lambda lines: [lines[0], b"nonsense", *lines[2:]], 2),
        (lambda lines: [lines[0], b'{"value":2}', *lines[2:]], 2),
        (lambda lines: [lines[0], b"7", *lines[2:]], 2),
        (lambda lines: [b'{"event":"torn","sha256":""}', *lines], 1),
    ],
)
def test_a_changed_line_is_named(path: Path, change: Callable[[list[bytes]], list[bytes]], line: int) -> None:
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(ChainError) as info:
        read_chain(path.read_bytes())
    assert info.value.line == line
    assert not info.value.earlier
    with pytest.raises(ChainError):
        write(path, "more")


def test_any_changed_byte_is_found(path: Path) -> None:
    data = path.read_bytes()
    head = read_chain(data).head
    for place in range(len(data)):
        for byte in (data[place] ^ 1, 0x0A, 0x20):
            changed = data[:place] + bytes([byte]) + data[place + 1 :]
            if changed == data:
                continue
            try:
                found = read_chain(changed)
            except ChainError:
                continue
            assert found.torn is not None or not found.ends or found.head != head


@pytest.mark.slow
def test_a_file_that_is_cut_anywhere_keeps_its_whole_lines(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    whole = values(path)
    for length in range(len(data) + 1):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(data[:length])
        kept = values(cut)
        lines = data[:length].split(b"\n")
        readable = sum(line.endswith(b"}") and line in data.split(b"\n") for line in lines)
        assert kept == whole[:readable]
        write(cut, "more")
        chain = read_chain(cut.read_bytes())
        assert chain.torn is None
        assert [r.get("value") for r in chain.records if r.get("event") != "torn"] == [*kept, "more"]
        assert cut.read_bytes().startswith(data[:length])


def test_unreadable_bytes_that_were_recorded_cannot_be_changed(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"va\x00\xff')
    write(path, "more")
    assert values(path)[-2:] == [None, "more"]
    data = path.read_bytes()
    for other in (data.replace(b'{"va\x00\xff', b'{"va\x00\xfe'), data.replace(b'{"va\x00\xff\n', b"")):
        with pytest.raises(ChainError, match="line 5"):
            read_chain(other)


@pytest.mark.parametrize("room", [0, 1, 90])
def test_a_full_disk_leaves_the_file_as_it_was(path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = path.read_bytes(), os.write

    def full(fd: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:room])

    with monkeypatch.context() as patch:
        patch.setattr(hash_chain.os, "write", full)
        with raises(DeployError, "disk-full", path):
            write(path, "more", "and more")
    assert path.read_bytes() == before
    write(path, "more")
    assert values(path)[-1] == "more"


def test_an_append_that_is_not_on_the_disk_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = path.read_bytes()
    monkeypatch.setattr(hash_chain.os, "fsync", broken)
    with raises(DeployError, "disk-full", path, "Input/output"):
        write(path, "more")
    assert path.read_bytes() == before


def test_a_file_is_not_read_again_where_nobody_else_wrote(path: Path) -> None:
    left = write(path, "five")
    with closing(ChainWriter(path, "log", DeployError, left=left)) as writer:
        assert writer.chain == Chain()
        left = (writer.append([{"value": "six"}]), writer.mark)[1]
    write(path, "seven")  # somebody else
    write(path, "eight", left=left)
    assert values(path)[-4:] == ["five", "six", "seven", "eight"]


def test_one_writer_at_a_time(path: Path) -> None:
    with closing(ChainWriter(path, "log", DeployError)), raises(DeployError, "file-in-use", path):
        ChainWriter(path, "log", DeployError)
    write(path, "more")


MANY = """
import sys
from contextlib import closing
from pathlib import Path
from fedlora.errors import DeployError
from fedlora.hash_chain import ChainWriter
for number in range(100):
    with closing(ChainWriter(Path(sys.argv[1]), "log", DeployError, wait=True)) as writer:
        writer.append([{"value": f"{sys.argv[2]} {number}"}])
"""


@pytest.mark.slow
def test_writers_in_several_processes_do_not_interleave(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    both = [subprocess.Popen([sys.executable, "-c", MANY, str(path), name]) for name in "ab"]
    assert [process.wait(120) for process in both] == [0, 0]
    found = values(path)
    for name in "ab":
        assert [value for value in found if value.startswith(name)] == [f"{name} {number}" for number in range(100)]
