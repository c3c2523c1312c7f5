"""The audit log has a line for each request and answer before either has an effect, and shows what was done to it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import invoke
from support.errors import raises

from fedlora import hash_chain
from fedlora.errors import DeployError
from fedlora.site.audit_log import AUDIT_LOG, AuditLog, read_log


@pytest.fixture
def site(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path)
    for number in range(3):
        asked = log.write("request", {"type": "train", "round": number, "parts": None})
        log.write("answer", {"request": asked, "bytes": 10 + number, "ledger": f"{number}" * 64})
    return tmp_path


def node_log(site: Path, *options: str) -> tuple[int, str]:
    result = invoke("node", "log", site, *options)
    return result.exit_code, result.output


def change(site: Path, how: Callable[[list[bytes]], list[bytes]]) -> None:
    path = site / AUDIT_LOG
    path.write_bytes(b"".join(how(path.read_bytes().splitlines(keepends=True))))


def test_each_answer_names_its_request(site: Path) -> None:
    records = read_log(site).records
    assert [record["event"] for record in records] == ["request", "answer"] * 3
    for asked, answered in zip(records[::2], records[1::2], strict=True):
        assert answered["request"] == asked["hash"]
        assert "parts" not in asked
        assert asked["time"] <= answered["time"]


def test_the_log_knows_the_ledgers_head_that_was_written_last(site: Path) -> None:
    log = AuditLog(site)
    assert log.ledger == "2" * 64
    log.write("request", {"type": "query.hello"})
    assert log.ledger == "2" * 64
    log.write("answer", {"ledger": "3" * 64})
    assert (log.ledger, AuditLog(site).ledger) == ("3" * 64, "3" * 64)


def test_only_its_owner_can_read_it(site: Path) -> None:
    assert os.stat(site / AUDIT_LOG).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (lambda lines: lines[:2] + lines[3:], 3),
        (lambda lines: [*lines[:3], lines[3].replace(b'"bytes":11', b'"bytes":1'), *lines[4:]], 4),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
        (lambda lines: [*lines, lines[-1]], 7),
    ],
)
def test_verify_names_a_line_that_was_tampered_with(
    site: Path, how: Callable[[list[bytes]], list[bytes]], line: int
) -> None:
    assert node_log(site, "--verify")[0] == 0
    change(site, how)
    for options in (["--verify"], []):
        status, said = node_log(site, *options)
        assert status == 1
        assert f"line {line} " in said
        assert said.count("\n") == 1
    with raises(DeployError, "log-damaged", f"line {line} "):
        AuditLog(site)


def test_verify_finds_lines_that_were_cut_off_by_the_head_that_was_kept(site: Path) -> None:
    status, said = node_log(site, "--verify")
    head = said.split()[-1]
    assert status == 0
    assert head == read_log(site).head
    AuditLog(site).write("request", {"type": "train"})
    assert node_log(site, "--verify", "--head", head)[0] == 0
    change(site, lambda lines: lines[:4])
    assert node_log(site, "--verify")[0] == 0  # what is left is a chain
    status, said = node_log(site, "--verify", "--head", head)
    assert status == 1
    assert "line 4" in said


def test_the_log_is_printed_line_by_line(site: Path) -> None:
    status, said = node_log(site)
    lines = said.splitlines()
    assert status == 0
    assert len(lines) == 6
    assert lines[0].startswith("1 ")
    assert 'type="train"' in lines[0]
    assert "bytes=12" in lines[-1]
    assert node_log(site / "nowhere")[0] == 1


SESSION = """
import os, signal, sys
from pathlib import Path
from fedlora.site.audit_log import AuditLog
log, real = AuditLog(Path(sys.argv[1])), os.write
def half(fd, data):
    real(fd, data[:len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
log.write("answer", {"bytes": 5})
"""


def test_a_line_that_a_kill_cut_short_is_said_and_nothing_else_is_lost(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = read_log(site).records
    killed = subprocess.run([sys.executable, "-c", SESSION, str(site)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    status, said = node_log(site, "--verify")
    assert status == 0
    assert "cut short" in said
    data = (site / AUDIT_LOG).read_bytes()
    log = AuditLog(site)
    assert "unfinished line" in caplog.text
    log.write("request", {"type": "train"})
    found = read_log(site)
    assert found.records[: len(before)] == before
    assert [record["event"] for record in found.records[len(before) :]] == ["torn", "request"]
    assert (site / AUDIT_LOG).read_bytes().startswith(data)
    assert "cut short" not in node_log(site, "--verify")[1]


def test_what_cannot_be_written_down_is_an_error_and_leaves_the_log_whole(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, before = AuditLog(site), (site / AUDIT_LOG).read_bytes()

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hash_chain.os, "write", full)
        with raises(DeployError, "disk-full", site / AUDIT_LOG):
            log.write("request", {"type": "train"})
    assert (site / AUDIT_LOG).read_bytes() == before
    log.write("request", {"type": "train"})
    assert len(read_log(site).records) == 7


MANY = """
import sys
from pathlib import Path
from fedlora.site.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
for number in range(50):
    log.write(sys.argv[2], {"number": number})
"""


def test_two_processes_do_not_interleave(tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path), name]) for name in ("one", "other")]
    assert [process.wait(120) for process in both] == [0, 0]
    records = read_log(tmp_path).records
    assert len(records) == 100
    for name in ("one", "other"):
        assert [record["number"] for record in records if record["event"] == name] == list(range(50))


def test_the_file_is_json_lines(site: Path) -> None:
    for line in (site / AUDIT_LOG).read_text().splitlines():
        assert {"line", "hash", "event", "time"} <= json.loads(line).keys()
