"""A federation of three nodes on this machine, as in production: `make deploy-demo`.

TLS with a certificate authority of its own, node keys, process isolation, each node with a file of its own. One site's
policy forbids what the run asks: it is left out, by name. In the middle of the run another node is killed (SIGKILL);
the round goes on with the one that is left, the node comes back and takes part again. Afterwards the same federation is
simulated in one process, with the same clients answering in each round, and must end with the same accuracy: to the
byte of the adapter.

python deploy/demo.py [FOLDER]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.programs import Guard

SITES = ("site-a", "site-b", "site-c")
VICTIM = "site-b"
FORBIDS = "site-c"
ROUNDS = 5
FEDLORA = [sys.executable, "-m", "fedlora"]
PATIENCE_S = 900.0
"""For anything that is waited for: every message starts a process that imports torch, and machines may be slow."""

CONFIG = """\
rounds = {rounds}

[model]
name = "digits-vit"

[adapter]
rank = 8
alpha = 16.0
targets = ["q_proj", "v_proj", "fc1", "fc2"]

[task]
name = "image-classification"
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]

[data]
source = "{folder}/data/all.jsonl"
test = "{folder}/data/test.jsonl"

[partition]
name = "natural"
column = "site"

[train]
steps = 24
batch_size = 16
lr = 2e-3

[server]
quorum = 0.3
deadline_s = 300
node_timeout_s = 120

[runtime]
device = "cpu"
threads = 1
kernels = "off"
"""


def main() -> int:
    """Run the demo; the exit status is 0 only if deployment and simulation agree."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/deploy-demo").resolve()
    if folder.exists() and not (folder / "demo").is_file():
        print(f"error: {folder} is in the way: give another folder", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "demo").touch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say(f"all files and everybody's log: {folder}, from where paths begin below")
    config = write_data(folder)
    project = folder / "federation"
    init(project, config)
    begin = time.monotonic()
    with running(project) as nodes:
        wait_until(lambda: listens(project), "the SuperLink")
        for site in SITES:
            key = f"{project}/coordinator/nodes/{site}.pub"
            flower(project, "supernode", "register", key, "federation", "--name", site)
            nodes[site] = start(project / "nodes" / site, folder / f"{site}.log")
        flower(project, "run", f"{project}/coordinator/app", "federation")
        rundir = project / "coordinator" / "runs" / "demo"
        kill_and_bring_back(project, rundir, nodes, folder)
        wait_until(lambda: finished(project, rundir), "the run to end")
    say(f"deployed: {time.monotonic() - begin:.0f} s; simulating it")
    return compare(folder, config, rundir)


def write_data(folder: Path) -> Path:
    """The sites' files (each has few kinds of digits), the server's test file, and all sites' in one to simulate."""
    from fedlora.assets import fetch

    for asset in ("digits", "digits-vit"):
        fetch(asset, report=say)
    rows = [json.loads(line) for line in (fetch("digits")).open(encoding="utf-8")][::3]
    files: dict[str, list[dict[str, object]]] = {name: [] for name in (*SITES, "test", "all")}
    for number, row in enumerate(rows):
        # Site k holds the digits 3 k to 3 k + 3: neighbours share one kind.
        homes = [k for k in range(len(SITES)) if 3 * k <= int(row["label"]) <= 3 * k + 3]
        site = SITES[homes[number % len(homes)]]
        files["test" if number % 4 == 0 else site].append({**row, "site": site})
    files["all"] = [row for site in SITES for row in files[site]]
    (folder / "data").mkdir()
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    config = folder / "demo.toml"
    config.write_text(CONFIG.format(folder=folder, rounds=ROUNDS), encoding="utf-8")
    return config


def init(project: Path, config: Path) -> None:
    """`fedlora deploy init` for one machine: no proxy, everything on loopback."""
    port = free_ports(1 + len(SITES))
    command = [*FEDLORA, "deploy", "init", str(project), str(config)]
    command += ["--host", "127.0.0.1", "--control-port", str(port)]
    for site in SITES:
        command += ["--node", site, "--data", f"{site}={config.parent}/data/{site}.jsonl"]
        command += ["--ledger", f"{site}={project}/{site}-ledger.jsonl"]
    say_command(project, "fedlora", *command[3:])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    policy = project / "nodes" / FORBIDS / "site" / "policy.toml"
    policy.write_text(f"max_rounds = {ROUNDS - 1}\n{policy.read_text()}")
    say(
        f"{FORBIDS} allows {ROUNDS - 1} rounds in federation/nodes/{FORBIDS}/site/policy.toml, and the run has {ROUNDS}"
    )


def free_ports(number: int) -> int:
    """The first of so many free ports in a row."""
    for port in range(21000, 21900, number):
        with suppress(OSError):
            for k in range(number):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + k))
            return port
    raise SystemExit("error: no free ports between 21000 and 21900")


@contextmanager
def running(project: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The coordinator's programs; all that is put into the dict ends with them."""
    processes = {"coordinator": start(project, project.parent / "coordinator.log")}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        for process in processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            bury(process)


def start(folder: Path, log: Path, *prefix: str) -> subprocess.Popen[bytes]:
    """`fedlora deploy up` in the background, after the words of `prefix`."""
    say(f"fedlora deploy up {'federation' if folder.name == 'federation' else f'federation/nodes/{folder.name}'}")
    command = [*prefix, *FEDLORA, "deploy", "up", str(folder)]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    guard().watch(process)
    return process


def bury(process: subprocess.Popen[bytes]) -> None:
    """Wait for a program's end, and watch it no longer: its number may become another's."""
    process.wait()
    guard().forget(process)


@cache
def guard() -> Guard:
    """Ends what `start` started when this process is gone, however it went."""
    from fedlora.programs import Guard

    return Guard(grace_s=30.0)


def flower(project: Path, *arguments: str) -> str:
    """A command of Flower's, with the coordinator's connection."""
    say_command(project, "flwr", *arguments)
    environment = {**os.environ, "FLWR_HOME": str(project / "coordinator" / "flower")}
    program = Path(sys.executable).parent / "flwr"
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: flwr {' '.join(arguments)} failed: {done.stdout}{done.stderr}")
    return done.stdout


def listens(project: Path) -> bool:
    """Whether the project's SuperLink takes connections."""
    return connects(tomllib.loads((project / "coordinator" / "federation.toml").read_text())["control-port"])


def connects(port: int) -> bool:
    """Whether something on this machine listens there."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def kill_and_bring_back(project: Path, rundir: Path, nodes: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    """SIGKILL to everything of one node in round 2, while it trains; start it again as an admin would."""
    node = project / "nodes" / VICTIM
    wait_until(lambda: tell(rundir) >= 2 and trains(node), f"{VICTIM} to train in round 2")
    group = members(nodes[VICTIM].pid)
    for pid in group:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    bury(nodes[VICTIM])
    say(f"killed {VICTIM} in round {len(records(rundir))} (SIGKILL, {len(group)} processes)")
    nodes[VICTIM] = start(node, folder / f"{VICTIM}.log")


def trains(node: Path) -> bool:
    """Whether a process of the node's app runs."""
    return any(str(node) in line and "flwr-clientapp" in line for line in map(command_line, processes()))


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


def records(rundir: Path) -> list[dict[str, object]]:
    """The run's lines of metrics; complains of nothing that is not there yet."""
    with suppress(OSError):
        return [json.loads(line) for line in (rundir / "metrics.jsonl").read_text().split("\n")[:-1]]
    return []


_told, _next_look = 0, 0.0


def tell(rundir: Path) -> int:
    """Say the rounds that have not been said yet; how many there are, with the evaluation before training."""
    global _told
    for record in records(rundir)[_told:]:
        _told += 1
        who = f"clients {record['answered']} answered" if "answered" in record else "before training"
        refused = [f"; client {k}: {str(why).partition(' — ')[0]}" for k, why in record.get("refused", {}).items()]
        away = [f"; left out: {why}" for why in record.get("turned_away", {}).values()]
        missing = [f"; client {k}: no reply" for k in record.get("missing", ())]
        say(f"round {record['round']}: accuracy {record['accuracy']:.1%}, {who}{''.join(refused + missing + away)}")
    return _told


def finished(project: Path, rundir: Path) -> bool:
    """Whether the run has its result; tells each round once, and ends the demo if the run failed."""
    global _next_look
    tell(rundir)
    if (rundir / "result.json").is_file():
        return True
    if time.monotonic() > _next_look:
        _next_look = time.monotonic() + 60.0  # it costs seconds
        runs = json.loads(flower_list(project)).get("runs", [])
        if runs and str(runs[0]["status"]).startswith("finished") and "completed" not in runs[0]["status"]:
            raise SystemExit(f"error: the run is {runs[0]['status']}: flwr log, and {project.parent}/coordinator.log")
    return False


def flower_list(project: Path) -> str:
    """`flwr list`, quietly."""
    environment = {**os.environ, "FLWR_HOME": str(project / "coordinator" / "flower")}
    command = [Path(sys.executable).parent / "flwr", "list", "federation", "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else "{}"


def wait_until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    """Wait, not for ever."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"error: waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.5)


def compare(folder: Path, config: Path, deployed: Path) -> int:
    """Simulate the run with the same clients in each round, and say both accuracies."""
    command = [*FEDLORA, "run", str(config), "--set", f"output={folder}", "--set", "name=simulation"]
    command += ["--replay", str(deployed), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    simulated = folder / "simulation"
    one, other = records(deployed)[-1]["accuracy"], records(simulated)[-1]["accuracy"]
    weights = "adapter/adapter_model.safetensors"
    same = (deployed / weights).read_bytes() == (simulated / weights).read_bytes()
    say(
        f"final accuracy: deployed {one:.2%}, simulated {other:.2%}; "
        f"adapters {'equal to the byte' if same else 'DIFFER'}"
    )
    say(
        f"(the simulation leaves {FORBIDS} out, and {VICTIM} of the rounds that it missed; all else is the same anyway)"
    )
    return 0 if same and one == other else 1


_begin = time.monotonic()
_lock = threading.Lock()


def say_command(project: Path, *words: str) -> None:
    """One line, with files by their names in the demo's folder."""
    say(" ".join(words).replace(f"{project.parent}/", ""))


def say(line: str) -> None:
    """One line, with the seconds since the start."""
    with _lock:
        print(f"{time.monotonic() - _begin:5.0f} s  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
