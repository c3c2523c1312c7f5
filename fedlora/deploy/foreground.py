"""Run a folder's programs in the foreground: what a terminal for each of them would do, no more.

A program that ends is started again after a pause, as `restart: unless-stopped` has it: Flower turns a node away that
comes back before it was missed. Ctrl-C ends them all, with everything that they started; so does whatever else ends
`up`, SIGKILL included: see `fedlora.programs`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fedlora.deploy import commands
from fedlora.deploy.commands import Address
from fedlora.deploy.project import read_toml, write_connection
from fedlora.errors import DeployError
from fedlora.node_worker.socket import LONGEST
from fedlora.programs import GRACE_S, end_groups, keep_running

PAUSE_S = 5.0
"""Before a program that ended is started again."""


@dataclass(frozen=True)
class Program:
    """A program of a folder.

    Args:
        name: for people.
        command: program and arguments.
        folder: in which it runs.
        environment: variables beside those of the caller.
    """

    name: str
    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def shell(self) -> str:
        """The line that a shell would run."""
        return shlex.join(self.command)


def programs(folder: Path) -> list[Program]:
    """The programs of a coordinator's or a node's folder, in the order in which they start.

    Where a coordinator's folder was moved, its Flower connection is put right.

    Raises:
        DeployError: it is neither.
    """
    folder = folder.resolve()
    if (folder / "coordinator" / "federation.toml").is_file():
        folder = folder / "coordinator"
    state, more = folder / "state", dict(commands.ENVIRONMENT)
    if (folder / "federation.toml").is_file():
        facts = read_toml(folder / "federation.toml", ("control-port", "proxied"))
        listen = Address("127.0.0.1", int(facts["control-port"]))
        lines = {
            "superlink": commands.superlink(str(folder), str(state), listen),
            "superexec": commands.superexec(str(folder), listen),
        }
        if facts["proxied"]:
            lines["proxy"] = commands.proxy(str(folder))
        home = folder / "flower"
        write_connection(folder, listen)
    elif (folder / "node.toml").is_file():
        facts = read_toml(folder / "node.toml", ("superlink", "runtime-port"))
        host, _, port = str(facts["superlink"]).rpartition(":")
        runtime = Address("127.0.0.1", int(facts["runtime-port"]))
        socket = worker_socket(state)
        more["FEDLORA_WORKER"] = socket
        lines = {
            "worker": commands.worker(socket),
            "supernode": commands.supernode(str(folder), Address(host.strip("[]"), int(port)), runtime),
            "superexec": commands.superexec(str(folder), runtime),
        }
        home = state / "flower"
    else:
        raise DeployError(
            f"{str(folder)!r} is neither a coordinator's folder nor a node's: create them with fedlora deploy init",
            code="not-a-federation",
        )
    environment = {**more, "FLWR_HOME": str(home)}
    return [Program(name, line, folder, environment) for name, line in lines.items()]


def worker_socket(state: Path) -> str:
    """Where a node's worker listens: in its folder, or, as a socket's path has to be short, in the temporary one."""
    inside = state / "worker.sock"
    if len(os.fsencode(inside)) <= LONGEST:
        return str(inside)
    short = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
    return str(Path(tempfile.gettempdir()) / f"fedlora-{os.getuid()}-{short}" / "worker.sock")


def script(folder: Path) -> str:
    """What `up` would run, as lines for a shell, each to be kept in a terminal of its own."""
    todo = programs(folder)
    lines = [f"cd {shlex.quote(str(todo[0].folder))}", f"mkdir -p {shlex.quote(str(todo[0].folder / 'state'))}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in todo[0].environment.items()]
    lines += [program.shell() for program in todo]
    if (todo[0].folder / "federation.toml").is_file():
        names = read_toml(todo[0].folder / "federation.toml", ("nodes",))["nodes"]
        lines += ["# once, when the SuperLink is up:"]
        lines += [shlex.join(commands.register(str(todo[0].folder), name)) for name in names]
        lines += ["# for each run:", shlex.join(commands.run(str(todo[0].folder)))]
    return "\n".join(lines) + "\n"


def environment_of(program: Program) -> dict[str, str]:
    """The environment of a program: Flower finds its other programs by their names on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **program.environment, "PATH": path}


def start(program: Program, output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own.

    Args:
        program: to be started.
        output: file descriptor for standard output and error; None: a pipe.

    Raises:
        DeployError: it is not installed.
    """
    environment = environment_of(program)
    (program.folder / "state").mkdir(mode=0o700, exist_ok=True)
    found = shutil.which(program.command[0], path=environment["PATH"])
    if found is None:
        cure = "https://caddyserver.com/docs/install" if program.command[0] == "caddy" else "pip install fedlora"
        raise DeployError(
            f"{program.command[0]!r} is not installed on this machine: {cure}", code="program-not-installed"
        )
    return subprocess.Popen(
        [found, *program.command[1:]],
        cwd=program.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output is None else output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(processes: Iterable[subprocess.Popen[bytes]], *, grace_s: float = GRACE_S) -> None:
    """End programs and all that they started; first with SIGTERM, then with SIGKILL."""
    left = list(processes)
    end_groups([process.pid for process in left], grace_s, lambda: [process.poll() for process in left])


def up(folder: Path, say: Callable[[str], None], *, pause_s: float = PAUSE_S) -> None:
    """Run a folder's programs until the caller is interrupted (Ctrl-C or SIGTERM); their output goes to `say`.

    Raises:
        DeployError: the folder is none, or a program is not installed.
    """
    todo = programs(folder)
    starts = {program.name: partial(_start_aloud, program, say) for program in todo}
    keep_running(starts, say, pause_s=(pause_s, pause_s), look=partial(_Link(todo[0].folder).look, say))
    say("all programs have ended")


class _Link:
    """Whether the SuperLink answers a node: says so when that changes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / commands.REACHED if (folder / "node.toml").is_file() else None
        self._since, self._away = time.time(), False

    def look(self, say: Callable[[str], None]) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # before the first answer there is no file
            self._since = max(self._since, self._file.stat().st_mtime)
        away = time.time() - self._since > commands.AWAY_S
        if away != self._away:
            self._away = away
            trouble = (
                f"has not answered this node for {commands.AWAY_S:g} s: fedlora deploy doctor looks for the reason"
            )
            say(f"the SuperLink {trouble if away else 'answers this node again'}")


def _start_aloud(program: Program, say: Callable[[str], None]) -> subprocess.Popen[bytes]:
    say(f"{program.name}: {program.shell()}")
    process = start(program)

    def read() -> None:
        for line in process.stdout or ():
            say(f"{program.name} | {line.decode(errors='replace').rstrip()}")

    threading.Thread(target=read, daemon=True).start()
    return process
