"""A federation on this machine whose nodes answer fedlora's ServerApp from memory: of processes, or in containers.

As a program it is a node's worker that answers without training: `python _federation.py SOCKET [SITE]`, behind the
site's policy where there is a site.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NODES = 2
PATIENCE_S = 600.0
"""For a round, and for whatever else is waited for."""


def replay() -> None:
    """Let clients of this process answer what they were sent, moved by a little that differs by round and client."""
    from fedlora.federation.client_training import Answer
    from fedlora.federation.protocol import TrainedReply, TrainRequest
    from fedlora.flower import client_app

    def moved(asked: TrainRequest) -> TrainedReply:
        step = 1e-4 * (asked.round + asked.client_id)
        return TrainedReply(asked, {k: v + step for k, v in asked.starts.items()}, {"num_examples": 8, "loss": 1.0})

    def replayed(_: object, requests: Sequence[TrainRequest], *__: object) -> list[Answer]:
        return [moved(asked) for asked in requests]

    client_app.answer = replayed


def worker(path: str, site: str | None = None) -> None:
    """Serve a socket without training."""
    from fedlora.flower import client_app
    from fedlora.node_worker.gated_app import GatedApp
    from fedlora.node_worker.server import Worker

    replay()
    Worker(Path(path), app=client_app.app if site is None else GatedApp(Path(site))).serve()


class NoMoreRounds(SystemExit):
    """A run did not come to its end."""


class Federation:
    """SuperLink, nodes and workers, each a process.

    Args:
        folder: For logs, sockets and the database.
        poll_s: FLWR_SUPEREXEC_TASK_POLL_INTERVAL.
        in_memory: Whether the SuperLink has no database on the disk.
    """

    connection = "bench"

    def __init__(self, folder: Path, poll_s: float, in_memory: bool = False) -> None:
        self.folder, self.patience_s = folder, PATIENCE_S
        self._database = ":flwr-in-memory:" if in_memory else str(folder / "state.db")
        folder.mkdir(mode=0o700)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll_s),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def begin(self, nodes: int = NODES) -> str:
        """Start all; gives the SuperLink's address."""
        link, *runtimes = free_ports(1 + nodes)
        (self.folder / "flower").mkdir()
        (self.folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
        )
        plain = ["--insecure", "--host", "127.0.0.1"]
        database = ["--database", self._database, "--disable-runtime-dependency-installation"]
        self._start("superlink", "flower-superlink", *plain, "--port", str(link), *database)
        wait_for(lambda: listens(link), "the SuperLink", self._all_there)
        for number, port in enumerate(runtimes):
            path = self.folder / f"{number}.sock"
            self._start(f"worker-{number}", sys.executable, __file__, str(path))
            node = f'partition-id={number} num-partitions={nodes} worker="{path}"'
            where = ["--superlink", f"127.0.0.1:{link}", "--port", str(port), "--node-config", node]
            self._start(f"supernode-{number}", "flower-supernode", *plain, *where)
            wait_for(path.exists, "the worker", self._all_there)
        return f"127.0.0.1:{link}"

    def end(self) -> None:
        """End all that was started, and what it started."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def rounds(
        self, app: Path, file: Path, count: int, settings: str, look: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[dict[str, Any]]]:
        """Run an app, and give the seconds between its lines in a file, and the lines.

        Raises:
            NoMoreRounds: the run ends, or there is no new line for `patience_s`, before there are so many.
        """
        self._flwr("run", str(app), self.connection, "--run-config", settings)
        at, heard, next_look = list[float](), time.monotonic(), time.monotonic() + 60.0
        while len(at) < count:
            lines, now = file.read_bytes().count(b"\n") if file.is_file() else 0, time.monotonic()
            if lines > len(at):
                at += [now] * (lines - len(at))
                heard, next_look = now, now + 60.0
                look()
            elif now > heard + self.patience_s:
                raise NoMoreRounds(f"line {len(at) + 1} of {count} did not come in {now - heard:.0f} s")
            elif now > next_look:
                if self._idle():
                    raise NoMoreRounds(f"the run ended after line {len(at)} of {count}")
                next_look = time.monotonic() + 60.0
            time.sleep(0.02)
        wait_for(self._idle, "the end of the run")
        lines_read = [json.loads(line) for line in file.read_text().splitlines()]
        return [after - before for before, after in itertools.pairwise(at)], lines_read

    @property
    def superlink(self) -> int:
        """Process id of the SuperLink, which is its group's."""
        return self._processes[0].pid

    def _all_there(self) -> None:
        for process in self._processes:
            if process.poll() is not None:
                raise SystemExit(f"{process.args} ended: its log is in {self.folder}")

    def _flwr(self, *words: str) -> str:
        return subprocess.run(
            ["flwr", *words], env=self._environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    def _idle(self) -> bool:
        said = self._flwr("list", self.connection, "--format", "json")
        time.sleep(1)
        return all(run["status"].startswith("finished") for run in json.loads(said)["runs"])

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
            )


class ComposedFederation(Federation):
    """docker-compose.yml with its two nodes, in the engine of `make bench-containers`.

    What is around the federation's folder is mounted where it lies on this machine, so that paths are the same; the
    workers' program is this file's, behind the policy that `fedlora deploy init` writes.
    """

    connection = "federation"

    def begin(self, nodes: int = NODES) -> str:
        """Start all; gives the SuperLink's address."""
        import yaml

        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support.compose import ENGINE, Machine

        if not ENGINE:
            raise SystemExit("no Docker engine: make bench-containers starts one")
        around, project = self.folder.parent, self.folder / "federation"
        sites = [f"site-{letter}" for letter in "ab"[:nodes]]
        self._write_project(project, sites)
        (around / "_federation.py").write_text(Path(__file__).read_text())
        mounted = f"{around}:{around}"
        services = yaml.safe_load((Path(__file__).parents[1] / "docker-compose.yml").read_text())
        for name, service in services["services"].items():
            service.pop("build", None)  # docker_engine.sh has built it
            if name.startswith(("superexec", "worker")):
                poll_s = self._environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]
                service["environment"]["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = poll_s
            if name == "superexec":
                service["volumes"].append(mounted)
            if name.startswith("worker"):
                service["volumes"].append(f"{mounted}:ro")
                service |= {"entrypoint": ["python", f"{around}/_federation.py"]}
                service |= {"command": ["/run/fedlora/worker.sock", "/federation"]}
        file = self.folder / "docker-compose.yml"
        file.write_text(yaml.safe_dump(services))
        variables = {"FEDLORA_UID": str(os.getuid()), "FEDLORA_GID": str(os.getgid()), "FEDLORA_MODELS": str(around)}
        self._machine = Machine("bench", file, variables)
        self._machine.compose("up", "--detach", "superlink", "superexec", "proxy")
        wait_for(lambda: listens(8000), "the SuperLink")
        self._environment["FLWR_HOME"] = str(project / "coordinator" / "flower")
        for site in sites:
            key = str(project / "coordinator" / "nodes" / f"{site}.pub")
            self._flwr("supernode", "register", key, self.connection, "--name", site)
        programs = [f"{program}-{site}" for site in sites for program in ("supernode", "worker", "superexec")]
        self._machine.compose("up", "--detach", *programs)
        return "127.0.0.1:8000"

    def end(self) -> None:
        """End the containers."""
        if hasattr(self, "_machine"):
            (self.folder / "log").write_text(self._machine.compose("logs", "--no-color"))
            self._machine.compose("down", "--timeout", "5")

    def _write_project(self, project: Path, sites: Sequence[str]) -> None:
        """The folders of `fedlora deploy init`; the policies list all models and sources around the federation's."""
        import tomli_w

        from fedlora.assets import Checkpoint
        from fedlora.config import parse_config
        from fedlora.deploy import FederationPlan, NodePlan, write_project
        from fedlora.model.fingerprint import fingerprint

        config = parse_config("", ["partition.name=iid", f"partition.clients={len(sites)}"])
        write_project(project, config, FederationPlan(("proxy",), tuple(map(NodePlan, sites))))
        arms = [path.parent for path in self.folder.parent.glob("*/bert")]
        models = {str(arm / "bert"): fingerprint(Checkpoint(str(arm / "bert"))) for arm in arms}
        policy = tomli_w.dumps({"base_models": models, "sources": [str(arm / "texts.csv") for arm in arms]})
        for place in ("coordinator", *(f"nodes/{site}" for site in sites)):
            (project / place / "data").mkdir()
        for site in sites:
            (project / "nodes" / site / "site" / "policy.toml").write_text(policy)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listens(port: int) -> bool:
    """Whether somebody takes connections."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], what: str, check: Callable[[], object] = lambda: None) -> None:
    """Wait, or give up."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        check()
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not come")
        time.sleep(0.1)


if __name__ == "__main__":
    worker(*sys.argv[1:])
