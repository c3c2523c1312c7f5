"""A federation of real processes: SuperLink, SuperExecs and SuperNodes with TLS and node keys, killed in turn.

Two nodes bring their own files. Every test ends with the adapter that the same run has in one process, to the byte.
`fedlora deploy up` runs the programs, and starts again what was killed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fedlora.config import RunConfig, load_config, parse_config
from fedlora.deploy import FederationPlan, NodePlan, Program, programs, start, stop, write_project
from fedlora.deploy.keys import make_authority, make_node_key
from fedlora.flower import run_local
from fedlora.progress import NoProgress
from fedlora.rundir import RunDir

ROOT = Path(__file__).parents[2]
NODES = ("site-a", "site-b")
WEIGHTS = "adapter/adapter_model.safetensors"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "deploy" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PATIENCE_S = 400.0
    return module


demo = _demo()


class Federation:
    """Coordinator and nodes in a folder, each by `fedlora deploy up`."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.project, self.config = folder, folder / "federation", config
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.spare_port = 0

    @property
    def rundir(self) -> Path:
        return self.project / "coordinator" / "runs" / "trial"

    def up(self, name: str, *prefix: str) -> None:
        folder = self.project if name == "coordinator" else self.project / "nodes" / name
        self.processes[name] = demo.start(folder, self.folder / f"{name}.log", *prefix)

    def down(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                for pid in demo.members(process.pid):
                    os.kill(pid, signal.SIGKILL)
                raise

    def pids(self, name: str, program: str) -> list[int]:
        """Processes of that program under one of the folders."""
        return [pid for pid in demo.members(self.processes[name].pid) if program in demo.command_line(pid)]

    def kill(self, name: str, program: str) -> None:
        for pid in self.pids(name, program):
            os.kill(pid, signal.SIGKILL)

    def run(self, *overrides: str) -> None:
        config = ["--run-config", " ".join(overrides)] if overrides else []
        demo.flower(self.project, "run", f"{self.project}/coordinator/app", "federation", *config)

    def status(self) -> str:
        import json

        return str(json.loads(demo.flower_list(self.project))["runs"][0]["status"])

    def records(self) -> list[dict[str, Any]]:
        return demo.records(self.rundir)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        try:
            demo.wait_until(condition, what)
        except SystemExit as error:
            logs = {path.name: path.read_text()[-1500:] for path in self.folder.glob("*.log")}
            pytest.fail(f"{error}; {self.records()}; {logs}")

    def finished(self) -> bool:
        return (self.rundir / "result.json").is_file()


def make_config(tiny_bert: Path, tiny_csv: Path, folder: Path, *overrides: str) -> RunConfig:
    """Data for two sites and a server in a folder, and the config of the run's simulation."""
    lines = tiny_csv.read_text(encoding="utf-8").splitlines()
    head, rows = lines[0], lines[1:]
    parts = {"test": rows[:60], "site-a": rows[60:130], "site-b": rows[130:200]}
    for name, part in parts.items():
        (folder / f"{name}.csv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")
    everybody = [f"{row},{site}" for site in NODES for row in parts[site]]
    (folder / "all.csv").write_text("\n".join([f"{head},site", *everybody]) + "\n", encoding="utf-8")
    settings = [
        "name=trial",
        f"model.name='{tiny_bert}'",
        "adapter.targets=['query','value']",
        "task.name=text-classification",
        "task.labels=['negative','positive']",
        f"data.source='{folder}/all.csv'",
        f"data.test='{folder}/test.csv'",
        "partition.name=natural",
        "partition.column=site",
        "train.steps=3",
        "train.lr=0.01",
        "server.node_timeout_s=90",
        "runtime.device=cpu",
        "runtime.threads=1",
        "runtime.cohort=1",
        "runtime.kernels=off",
    ]
    return parse_config("", [*settings, *overrides])


@pytest.fixture
def federate(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Federation]]:
    """Makes a federation and starts it; everything is ended afterwards."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    made: list[Federation] = []

    def make(*overrides: str) -> Federation:
        config = make_config(tiny_bert, tiny_csv, tmp_path, *overrides)
        nodes = tuple(
            NodePlan(name, data=f"{tmp_path}/{name}.csv", ledger=f"{tmp_path}/{name}-ledger.jsonl") for name in NODES
        )
        port = demo.free_ports(1 + len(nodes) + len(STRANGERS))
        federation = Federation(tmp_path, config)
        federation.spare_port = port + 1 + len(nodes)
        write_project(federation.project, config, FederationPlan(("127.0.0.1",), nodes, control_port=port))
        made.append(federation)
        federation.up("coordinator")
        federation.wait(lambda: demo.listens(federation.project), "the SuperLink")
        for name in NODES:
            key = f"{federation.project}/coordinator/nodes/{name}.pub"
            demo.flower(federation.project, "supernode", "register", key, "federation", "--name", name)
            federation.up(name)
        return federation

    yield make
    for federation in made:
        federation.down()


def simulate(federation: Federation, name: str = "simulated", **how: Any) -> Path:
    config = federation.config.model_copy(update={"output": str(federation.folder), "name": name})
    return run_local(config, RunDir.create(config), NoProgress(), **how).rundir.path


def test_a_superlink_that_is_killed_loses_nothing(federate: Callable[..., Federation]) -> None:
    federation = federate("rounds=2")
    federation.run()
    federation.wait(lambda: len(federation.records()) >= 2, "round 1")
    federation.kill("coordinator", "flower-superlink")
    federation.wait(federation.finished, "the run's end")
    assert [record["answered"] for record in federation.records()[1:]] == [[0, 1]] * 2
    assert (federation.rundir / WEIGHTS).read_bytes() == (simulate(federation) / WEIGHTS).read_bytes()


def test_a_server_app_that_is_killed_is_resumed(federate: Callable[..., Federation]) -> None:
    federation = federate("rounds=2")
    federation.run()
    federation.wait(lambda: len(federation.records()) >= 2, "round 1")
    federation.kill("coordinator", "flwr-serverapp")
    before = (federation.rundir / "metrics.jsonl").read_bytes()
    federation.run("resume=true")
    federation.wait(federation.finished, "the run's end")
    assert (federation.rundir / "metrics.jsonl").read_bytes().startswith(before)
    assert [record["answered"] for record in federation.records()[1:]] == [[0, 1]] * 2
    assert (federation.rundir / WEIGHTS).read_bytes() == (simulate(federation) / WEIGHTS).read_bytes()


def test_a_node_that_is_killed_is_missed_and_comes_back(federate: Callable[..., Federation]) -> None:
    federation = federate("rounds=5", "server.quorum=0.5")
    federation.run()
    federation.wait(lambda: len(federation.records()) >= 2 and federation.pids("site-b", "flwr-clientapp"), "training")
    for program in ("flower-supernode", "flower-superexec", "flwr-clientapp"):
        federation.kill("site-b", program)

    def answers() -> list[list[int]]:
        return [record["answered"] for record in federation.records()[1:]]

    federation.wait(lambda: [0] in answers(), "a round without the node")
    federation.wait(lambda: [0, 1] in answers()[answers().index([0]) :], "a round with it")
    federation.wait(federation.finished, "the run's end")
    missed = federation.records()[1 + answers().index([0])]
    assert missed["refused"].keys() == {"1"} or missed["missing"] == [1]
    again = simulate(federation, replay=federation.records())
    assert (federation.rundir / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()


@pytest.fixture
def far_away(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A network namespace "fedlora-far" at 10.99.7.2 behind a link to 10.99.7.1, and what runs `ip` on it."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("caddy") is None:
        pytest.skip("needs root, iproute2 and Caddy")
    try:
        ip("netns", "add", "fedlora-far")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", "fedlora0", "type", "veth", "peer", "name", "fedlora1", "netns", "fedlora-far")
        ip("address", "add", "10.99.7.1/24", "dev", "fedlora0")
        ip("link", "set", "fedlora0", "up")
        for words in ("address add 10.99.7.2/24 dev fedlora1", "link set fedlora1 up", "link set lo up"):
            ip("-n", "fedlora-far", *words.split())
        yield ip
    finally:
        subprocess.run(["ip", "link", "del", "fedlora0"], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", "fedlora-far"], check=False, capture_output=True)


def test_a_link_that_is_down_for_a_while_costs_nothing(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path, far_away: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node in a network of its own, through the proxy; the cable is out for twenty seconds while it trains."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    federation = Federation(tmp_path, make_config(tiny_bert, tiny_csv, tmp_path, "rounds=2"))
    first = demo.free_ports(3)
    nodes = tuple(NodePlan(name, data=f"{tmp_path}/{name}.csv", ledger=f"{tmp_path}/{name}.jsonl") for name in NODES)
    plan = FederationPlan(("10.99.7.1",), nodes, port=first, control_port=first + 1)
    write_project(federation.project, federation.config, plan)
    here = federation.project / "nodes" / "site-a" / "node.toml"
    here.write_text(here.read_text().replace("9094", str(first + 2)))
    try:
        federation.up("coordinator")
        federation.wait(lambda: demo.listens(federation.project), "the SuperLink")
        for name in NODES:
            key = f"{federation.project}/coordinator/nodes/{name}.pub"
            demo.flower(federation.project, "supernode", "register", key, "federation", "--name", name)
        federation.up("site-a")
        federation.up("site-b", "ip", "netns", "exec", "fedlora-far")
        federation.run()
        federation.wait(lambda: federation.records() and federation.pids("site-b", "flwr-clientapp"), "training")
        far_away("link", "set", "fedlora0", "down")
        time.sleep(20)
        far_away("link", "set", "fedlora0", "up")
        federation.wait(federation.finished, "the run's end")
    finally:
        federation.down()
    assert [record["answered"] for record in federation.records()[1:]] == [[0, 1]] * 2
    assert (federation.rundir / WEIGHTS).read_bytes() == (simulate(federation) / WEIGHTS).read_bytes()


STRANGERS = {
    "unregistered": r"Failed to activate SuperNode",
    "other-authority": r"CERTIFICATE_VERIFY_FAILED",
    "no-key": r"SuperNodes must be registered",
    "insecure": r"Failed to initialize the connection to the SuperLink",
}
"""Who asks to be let in -> what its SuperNode says when it was not."""


def test_strangers_are_turned_away(federate: Callable[..., Federation]) -> None:
    federation = federate("rounds=1")
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for place, name in enumerate(STRANGERS):
            folder = federation.folder / name
            shutil.copytree(federation.project / "nodes" / "site-a", folder, ignore=shutil.ignore_patterns("state"))
            supernode = next(program for program in programs(folder) if program.name.startswith("supernode"))
            command = [*supernode.command, "--max-retries", "1"]
            command[command.index("--port") + 1] = str(federation.spare_port + place)
            if name == "unregistered":
                (folder / "node.key").write_bytes(make_node_key("stranger").private)
            elif name == "other-authority":
                (folder / "ca.crt").write_bytes(make_authority("other").public)
            else:
                at = command.index("--auth-supernode-private-key")
                del command[at : at + 2]
            if name == "insecure":
                command[command.index("--root-certificates") : command.index("--root-certificates") + 2] = [
                    "--insecure"
                ]
            with (federation.folder / f"{name}.log").open("wb") as log:
                running[name] = start(Program(name, command, folder, supernode.environment), log.fileno())
        for name, process in running.items():
            process.wait(90)
            text = (federation.folder / f"{name}.log").read_text()
            assert process.returncode != 0, (name, text)
            assert "SuperNode ID" not in text, (name, text)
            assert re.search(STRANGERS[name], text), (name, text)
    finally:
        stop(running.values())
    listed = demo.flower(federation.project, "supernode", "list", "federation", "--format", "json")
    assert listed.count('"node-id"') == len(NODES)


# ------------------------------------------------------------------------------------------------ docker-compose.yml


def processes_of_compose(project: Path, caddy: str | None) -> tuple[list[Program], list[list[str]], int]:
    """The services of docker-compose.yml as programs of this machine: folders, hosts and ports are mapped.

    Returns:
        The programs, the health checks, and the SuperLink's port.
    """
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    first = demo.free_ports(4)
    servers = {"superlink:8000": first, "proxy:8443": first + 1 if caddy else first}
    servers |= {"supernode-site-a:9094": first + 2, "supernode-site-b:9094": first + 3}
    own = {"superlink": first, "supernode-site-a": first + 2, "supernode-site-b": first + 3}

    def here(word: str, name: str, folder: Path) -> str:
        word = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word).replace("/federation", str(folder))
        for server, port in servers.items():
            word = word.replace(server, f"127.0.0.1:{port}")
        return {"0.0.0.0": "127.0.0.1", "8000": str(own.get(name)), "9094": str(own.get(name))}.get(word, word)

    todo, checks = [], []
    for name, service in services.items():
        site = name.partition("-")[2]
        folder = project / "nodes" / site if site else project / "coordinator"
        if name == "proxy":
            if caddy is None:
                continue
            file = folder / "Caddyfile"
            file.write_text(file.read_text().replace(":8443 {", f":{first + 1} {{"))
        else:
            _, program, *words = service["healthcheck"]["test"]
            found = {"python": sys.executable}.get(program, str(Path(sys.executable).with_name(program)))
            checks.append([found, *(here(word, name, folder) for word in words)])
        command = [here(word, name, folder) for word in (*service["entrypoint"], *service["command"])]
        environment = {key: here(value, name, folder) for key, value in service["environment"].items() if key != "HOME"}
        environment.pop("FEDLORA_CACHE", None)
        todo.append(Program(name, command, folder, environment))
    return todo, checks, first


def test_compose_commands_make_a_federation(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = make_config(tiny_bert, tiny_csv, tmp_path)
    project = tmp_path_factory.mktemp("f") / "f"  # short: the worker's socket is in it
    nodes = tuple(NodePlan(name, data=f"{tmp_path}/{name}.csv") for name in NODES)
    write_project(project, config, FederationPlan(("example.org",), nodes))
    caddy = shutil.which("caddy")
    todo, checks, port = processes_of_compose(project, caddy)
    connection = project / "coordinator" / "flower" / "config.toml"
    connection.write_text(connection.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    running = []
    try:
        for program in todo:
            with (tmp_path / f"{program.name}.log").open("wb") as log:
                running.append(start(program, log.fileno()))
            if program.name == "superlink":
                demo.wait_until(lambda: demo.connects(port), "the SuperLink")
                for name in NODES:
                    key = f"{project}/coordinator/nodes/{name}.pub"
                    demo.flower(project, "supernode", "register", key, "federation", "--name", name)
        online = '"status": "online"'
        logs = lambda: {file.name: file.read_text()[-800:] for file in tmp_path.glob("*.log")}  # noqa: E731
        end = time.monotonic() + 90
        while demo.flower(project, "supernode", "list", "federation", "--format", "json").count(online) < len(NODES):
            assert time.monotonic() < end, logs()
        for check in checks:  # a worker loads the model first
            end = time.monotonic() + 90
            while subprocess.run(check, check=False, timeout=60).returncode:
                assert time.monotonic() < end, (check, logs())
                time.sleep(1)
        assert all(process.poll() is None for process in running), logs()
    finally:
        stop(running)
    assert load_config(project / "coordinator" / "app" / "run.toml").partition.name == "nodes"
