"""Run a folder's programs in the foreground: what a terminal for each of them would do, no more.

A node's programs have a folder each. Where root runs `up`, each program is started as its folder's owner, so that the
worker's data, the SuperNode's key and the coordinator's app in the SuperExec are three users' matters.

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
from typing import Any

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


def home_of(folder: Path) -> Path:
    """A coordinator's or a node's folder; a federation's is its coordinator's.

    Raises:
        DeployError: it is neither.
    """
    folder = folder.resolve()
    if (folder / "coordinator" / "federation.toml").is_file():
        folder = folder / "coordinator"
    if not any((folder / name).is_file() for name in ("federation.toml", "node.toml")):
        raise DeployError(
            f"{str(folder)!r} is neither a coordinator's folder nor a node's: create them with fedlora deploy init",
            code="not-a-federation",
        )
    return folder


def programs(folder: Path) -> list[Program]:
    """The programs of a coordinator's or a node's folder, in the order in which they start.

    Where a coordinator's folder was moved, its Flower connection is put right.

    Raises:
        DeployError: it is neither.
    """
    folder = home_of(folder)
    if (folder / "federation.toml").is_file():
        facts = read_toml(folder / "federation.toml", ("control-port", "proxied"))
        listen = Address("127.0.0.1", int(facts["control-port"]))
        lines = {
            "superlink": commands.superlink(str(folder), str(folder / "state"), listen),
            "superexec": commands.superexec(str(folder), listen),
        }
        if facts["proxied"]:
            lines["proxy"] = commands.proxy(str(folder))
        write_connection(folder, listen)
        environment = {**commands.ENVIRONMENT, "FLWR_HOME": str(folder / "flower")}
        return [Program(name, line, folder, environment) for name, line in lines.items()]
    facts = read_toml(folder / "node.toml", ("superlink", "runtime-port"))
    host, _, port = str(facts["superlink"]).rpartition(":")
    superlink, runtime = Address(host.strip("[]"), int(port)), Address("127.0.0.1", int(facts["runtime-port"]))
    socket = worker_socket(folder)
    homes = {name: folder / name for name in (commands.SITE, commands.SUPERNODE, commands.SUPEREXEC)}
    site, supernode, superexec = (str(home) for home in homes.values())
    own = {
        "worker": (homes[commands.SITE], commands.worker(socket, site)),
        "supernode": (homes[commands.SUPERNODE], commands.supernode(supernode, superlink, runtime)),
        "superexec": (homes[commands.SUPEREXEC], commands.superexec(superexec, runtime)),
    }
    more = {**commands.ENVIRONMENT, "FEDLORA_WORKER": socket}
    return [
        Program(name, line, home, {**more, "FLWR_HOME": str(home / "state" / "flower")})
        for name, (home, line) in own.items()
    ]


def worker_socket(node: Path) -> str:
    """Where a node's worker listens: in its folder, or, as a socket's path has to be short, in the temporary one."""
    inside = node / commands.SOCKET
    if len(os.fsencode(inside)) <= LONGEST:
        return str(inside)
    short = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
    return str(Path(tempfile.gettempdir()) / f"fedlora-{os.getuid()}-{short}" / "worker.sock")


def script(folder: Path) -> str:
    """What `up` would run, as lines for a shell, each to be kept in a terminal of its own."""
    folder, lines, said = home_of(folder), list[str](), dict[str, str]()
    for program in programs(folder):
        home = shlex.quote(str(program.folder))
        if f"cd {home}" not in lines:
            lines += [f"cd {home}", "mkdir -p state"]
        lines += [f"export {n}={shlex.quote(v)}" for n, v in program.environment.items() if said.get(n) != v]
        said |= program.environment
        lines.append(program.shell())
    if (folder / "federation.toml").is_file():
        names = read_toml(folder / "federation.toml", ("nodes",))["nodes"]
        lines += ["# once, when the SuperLink is up:"]
        lines += [shlex.join(commands.register(str(folder), name)) for name in names]
        lines += ["# for each run:", shlex.join(commands.run(str(folder)))]
    return "\n".join(lines) + "\n"


def environment_of(program: Program) -> dict[str, str]:
    """The environment of a program: Flower finds its other programs by their names on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **program.environment, "PATH": path}


def start(program: Program, output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own; root starts it as the owner of its folder.

    Args:
        program: to be started.
        output: file descriptor for standard output and error; None: a pipe.

    Raises:
        DeployError: it is not installed.
    """
    environment, user = environment_of(program), _owner(program.folder)
    state = program.folder / "state"
    if not state.is_dir():
        state.mkdir(mode=0o700)
        if user:
            os.chown(state, user["user"], user["group"])
    if user:
        environment["HOME"] = str(program.folder)
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
        **user,
    )


def _owner(folder: Path) -> dict[str, Any]:
    """As whom a program of a folder is started; {} for the user that we are."""
    facts = folder.stat()
    if os.geteuid() or not facts.st_uid:
        return {}
    return {"user": facts.st_uid, "group": facts.st_gid, "extra_groups": []}


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End programs and all that they started; first with SIGTERM, then with SIGKILL."""
    left = list(processes)
    end_groups([process.pid for process in left], GRACE_S, lambda: [process.poll() for process in left])


def up(folder: Path, say: Callable[[str], None], *, pause_s: float = PAUSE_S) -> None:
    """Run a folder's programs until the caller is interrupted (Ctrl-C or SIGTERM); their output goes to `say`.

    Raises:
        DeployError: the folder is none, or a program is not installed.
    """
    todo, link = programs(folder), _Link(home_of(folder))
    starts = {program.name: partial(_start_aloud, program, say) for program in todo}
    keep_running(starts, say, pause_s=(pause_s, pause_s), look=partial(link.look, say))
    say("all programs have ended")


class _Link:
    """Whether the SuperLink answers a node: says so when that changes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / commands.SUPERNODE / commands.REACHED if (folder / "node.toml").is_file() else None
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
