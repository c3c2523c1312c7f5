"""The programs of a federation as processes of this machine: for the demo beside it, and for the tests.

`fedlora deploy up` runs coordinator and nodes in the background, and Flower's own commands talk to the SuperLink. A
guard ends all of them with this process, however it goes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.programs import Guard

FEDLORA = (sys.executable, "-m", "fedlora")
PATIENCE_S = 900.0
"""For anything that is waited for: every message starts a process that imports torch, and machines may be slow."""

_begin = time.monotonic()
_lock = threading.Lock()


def say(line: str) -> None:
    """One line, with the seconds since the start."""
    with _lock:
        print(f"{time.monotonic() - _begin:5.0f} s  {line}", flush=True)


def say_command(project: Path, *words: str) -> None:
    """One line, with files by their names in the folder of the project."""
    say(f"$ {' '.join(words)}".replace(f"{project.parent}/", ""))


# ---------------------------------------------------------------------------------------------- starting and ending


def start(folder: Path, log: Path, *prefix: str) -> subprocess.Popen[bytes]:
    """`fedlora deploy up` in the background, after the words of `prefix`.

    Args:
        folder: of a federation, whose coordinator it is, or of a node.
        log: gets what all its programs say.
        prefix: a command that runs it.
    """
    say(f"$ fedlora deploy up {'federation' if folder.name == 'federation' else f'federation/nodes/{folder.name}'}")
    command = [*prefix, *FEDLORA, "deploy", "up", str(folder)]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    guard().watch(process)
    return process


def bury(process: subprocess.Popen[bytes]) -> None:
    """Wait for a program's end, and watch it no longer: its number may become another's."""
    process.wait()
    guard().forget(process)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what `start` started."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        bury(process)


@cache
def guard() -> Guard:
    """Ends what `start` started when this process is gone, however it went."""
    from fedlora.programs import Guard

    return Guard(grace_s=30.0)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait, not for ever."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"error: waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.5)


# ---------------------------------------------------------------------------------------------- Flower


def flower(project: Path, *arguments: str) -> str:
    """What a command of Flower's says, with the coordinator's connection.

    Raises:
        SystemExit: it failed.
    """
    say_command(project, "flwr", *arguments)
    done = _flower(project, *arguments)
    if done.returncode:
        raise SystemExit(f"error: flwr {' '.join(arguments)} failed: {done.stdout}{done.stderr}")
    return done.stdout


def failed_run(project: Path) -> str:
    """How the last run ended if it did not end well; "" otherwise. It costs seconds."""
    done = _flower(project, "list", "federation", "--format", "json")
    runs = json.loads(done.stdout).get("runs", []) if done.returncode == 0 else []
    status = str(runs[0]["status"]) if runs else ""
    return status if status.startswith("finished") and "completed" not in status else ""


def _flower(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLWR_HOME": str(project / "coordinator" / "flower")}
    program = Path(sys.executable).parent / "flwr"
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------------------------------- ports, processes, files


def free_ports(number: int) -> int:
    """The first of so many free ports in a row."""
    for port in range(21000, 21900, number):
        with suppress(OSError):
            for k in range(number):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + k))
            return port
    raise SystemExit("error: no free ports between 21000 and 21900")


def listens(project: Path) -> bool:
    """Whether the project's SuperLink takes connections."""
    return connects(tomllib.loads((project / "coordinator" / "federation.toml").read_text())["control-port"])


def connects(port: int) -> bool:
    """Whether something on this machine listens there."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def members(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for other in processes():
        with suppress(OSError, IndexError, ValueError):
            parent = int(Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(other)
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


def processes() -> list[int]:
    """The numbers of all processes."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_line(pid: int) -> str:
    """What a process was started with; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def kill(pids: Sequence[int]) -> None:
    """SIGKILL to processes, of which some may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def records(rundir: Path) -> list[dict[str, Any]]:
    """The run's lines of metrics; complains of nothing that is not there yet."""
    with suppress(OSError):
        return [json.loads(line) for line in (rundir / "metrics.jsonl").read_text().split("\n")[:-1]]
    return []
