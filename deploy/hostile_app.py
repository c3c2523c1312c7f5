"""What an app of a coordinator could try at a site, started in the SuperExec's place; and how the demo starts it.

python hostile_app.py SOCKET RUN FILE...

SOCKET is the worker's, RUN the config of a run, of which the app asks more than the site allows, and each FILE one that
it would like to read. Prints a JSON object, attempt -> outcome.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

USERS = {"site": 42_001, "supernode": 42_002, "superexec": 42_003}
"""Users (and groups) of a node's three programs, by their folders; nobody else on a machine has such numbers."""
DEMANDS = {
    "rounds=1000": "max_rounds",
    "data.source=/etc/passwd": "sources",
    "task.name=os:system": "code",
    "model.name=/etc": "base_models",
}
"""Keys of a run's config (more rounds; a file, a program and a folder of the site's machine) -> the clause that forbids
it."""


def separate_users(node: Path, data: Path) -> str:
    """Give each program of a node a user of its own, as docs/deployment.md has it; why that is left out here, or "".

    Args:
        node: The node's folder.
        data: Its data file, which becomes the worker's.
    """
    from fedlora.deploy.foreground import worker_socket

    if os.geteuid() != 0:
        return "only root can start programs of several users"
    look = [sys.executable, "-c", f"import os, fedlora; os.stat({str(node)!r})"]
    if not all(_runs(look, as_user(user)) for user in USERS.values()):
        return f"other users than root do not reach {sys.executable}, or this folder"
    if Path(worker_socket(node)).parent != node / "socket":
        return f"the path of {node} is too long for a socket in it"
    for path in (node / "site", node / "supernode", node / "superexec"):
        for one in (path, *path.rglob("*")):
            os.chown(one, USERS[path.name], USERS[path.name])
    os.chown(data, USERS["site"], USERS["site"])
    data.chmod(0o600)
    os.chown(node / "socket", USERS["site"], USERS["superexec"])
    (node / "socket").chmod(0o2750)
    return ""


def as_user(user: int) -> dict[str, Any]:
    """Arguments of `subprocess.run` for a user who is in no other group than its own."""
    return {"user": user, "group": user, "extra_groups": []}


def _runs(command: list[str], user: dict[str, Any]) -> bool:
    try:
        return subprocess.run(command, cwd="/", capture_output=True, check=False, **user).returncode == 0
    except OSError:  # the program itself is out of reach
        return False


def attack(node: Path, run: Path, files: list[Path]) -> dict[str, str]:
    """Start this app in the place of a node's SuperExec: attempt -> outcome.

    Args:
        node: The node's folder.
        run: Of the app, its run.toml.
        files: That it tries to read; with none of them it runs as the present user.
    """
    from local_federation import wait_until

    from fedlora.deploy.foreground import worker_socket

    socket = worker_socket(node)
    wait_until(Path(socket).exists, f"the worker of {node.name}")
    home = str(node / "superexec")
    done = subprocess.run(
        [sys.executable, __file__, socket, str(run), *map(str, files)],
        cwd="/",
        env={**os.environ, "HOME": home, "FLWR_HOME": home},
        capture_output=True,
        text=True,
        check=False,
        **(as_user(USERS["superexec"]) if files else {}),
    )
    if done.returncode:
        raise SystemExit(f"error: the hostile app failed: {done.stderr}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def read(file: str) -> str:
    """How many bytes of a file the app can read, or why none."""
    try:
        return f"{len(Path(file).read_bytes())} bytes"
    except OSError as error:
        return str(error.strerror)


def demand(socket: Path, run: str, change: str) -> str:
    """What the worker says to a run with one key changed."""
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    from fedlora import __version__
    from fedlora.flower.messages import decode_head
    from fedlora.flower.task_identity import task_identity
    from fedlora.node_worker.client import ask

    with task_identity(1, 1):
        question = RecordDict({"hello": ConfigRecord({"fedlora": __version__})})
        message = Message(question, 1, "query.hello", ttl=60.0)
        context = Context(1, 1, {}, RecordDict(), {"toml": run, "set": change})
        said = decode_head(ask(socket, message, context, gate=True))
    return str(said.get("error", said["kind"]))


if __name__ == "__main__":
    socket, run, *files = sys.argv[1:]
    outcomes = {Path(file).name: read(file) for file in files}
    outcomes |= {change: demand(Path(socket), Path(run).read_text(), change) for change in DEMANDS}
    print(json.dumps(outcomes))
