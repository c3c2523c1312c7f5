"""The services of docker-compose.yml as processes of this machine: they train, on files that the nodes bring."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.real_federation import ROOT, Federation, local

from fedlora.config import parse_config
from fedlora.deploy import FederationPlan, NodePlan, Program, start, stop
from fedlora.programs import Guard

NODES = ("site-a", "site-b")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def as_processes(project: Path, caddy: str | None) -> tuple[list[Program], list[list[str]], int]:
    """The services as programs of this machine: folders, hosts and ports are mapped.

    Returns:
        The programs, the health checks, and the SuperLink's port.
    """
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    first = local.free_ports(4)
    servers = {"superlink:8000": first, "proxy:8443": first + 1 if caddy else first}
    servers |= {"supernode-site-a:9094": first + 2, "supernode-site-b:9094": first + 3}
    own = {"superlink": first, "supernode-site-a": first + 2, "supernode-site-b": first + 3}

    def inside(word: str) -> str:
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word)

    def here(word: str, name: str, mounts: dict[str, str]) -> str:
        word = inside(word)
        for there, place in mounts.items():
            word = word.replace(there, place)
        for server, port in servers.items():
            word = word.replace(server, f"127.0.0.1:{port}")
        return {"0.0.0.0": "127.0.0.1", "8000": str(own.get(name)), "9094": str(own.get(name))}.get(word, word)

    todo, checks = [], []
    for name, service in services.items():
        volumes = [inside(volume).split(":") for volume in service["volumes"]]
        mounts = {there: place.replace("./federation", str(project)) for place, there, *_ in volumes}
        folder = Path(mounts["/federation"])
        if name == "proxy":
            if caddy is None:
                continue
            file = folder / "Caddyfile"
            file.write_text(file.read_text().replace(":8443 {", f":{first + 1} {{"))
        else:
            _, program, *words = service["healthcheck"]["test"]
            found = {"python": sys.executable}.get(program, str(Path(sys.executable).with_name(program)))
            checks.append([found, *(here(word, name, mounts) for word in words)])
        command = [here(word, name, mounts) for word in (*service["entrypoint"], *service["command"])]
        environment = {key: here(value, name, mounts) for key, value in service["environment"].items() if key != "HOME"}
        environment.pop("FEDLORA_CACHE", None)
        todo.append(Program(name, command, folder, environment))
    return todo, checks, first


def make_files(tiny_csv: Path, folder: Path) -> None:
    """test.csv, a file for each of two sites, and both sites' examples in all.csv with a column "site"."""
    head, *rows = tiny_csv.read_text(encoding="utf-8").splitlines()
    parts = {"test": rows[:60], "site-a": rows[60:130], "site-b": rows[130:200]}
    for name, part in parts.items():
        (folder / f"{name}.csv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")
    everybody = [f"{row},{site}" for site in NODES for row in parts[site]]
    (folder / "all.csv").write_text("\n".join([f"{head},site", *everybody]) + "\n", encoding="utf-8")


def test_compose_commands_make_a_federation_that_trains(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make_files(tiny_csv, tmp_path)
    settings = ["partition.name=natural", "partition.column=site", f"data.source='{tmp_path}/all.csv'"]
    settings += [f"model.name='{tiny_bert}'", "adapter.targets=['query','value']", "task.name=text-classification"]
    settings += ["task.labels=['negative','positive']", f"data.test='{tmp_path}/test.csv'", "rounds=1"]
    settings += ["train.steps=3", "runtime.device=cpu", "runtime.threads=1", "runtime.cohort=1", "runtime.kernels=off"]
    config = parse_config("", settings, name="composed")
    nodes = tuple(NodePlan(name, data=f"{tmp_path}/{name}.csv", ledger=f"{tmp_path}/{name}.jsonl") for name in NODES)
    folder = tmp_path_factory.mktemp("f")  # short: the worker's socket is in it
    federation = Federation(folder, config, FederationPlan(("example.org",), nodes))
    project = federation.project
    todo, checks, port = as_processes(project, shutil.which("caddy"))
    connection = project / "coordinator" / "flower" / "config.toml"
    connection.write_text(connection.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    running, guard = [], Guard()
    try:
        for program in todo:
            with (folder / f"{program.name}.log").open("wb") as log:
                running.append(start(program, log.fileno()))
            guard.watch(running[-1])
            if program.name == "superlink":
                federation.wait(lambda: local.connects(port), "the SuperLink")
                federation.register()
        run = federation.run()
        for check in checks:
            federation.wait(lambda check=check: answers(check), f"health: {check}")
        run.finish()
        assert all(process.poll() is None for process in running)
    finally:
        stop(running)
        guard.close()
    assert run.answers() == [[0, 1]]
    run.require_equal(run.simulate())


def answers(check: list[str]) -> bool:
    """Whether a health check passes."""
    return subprocess.run(check, check=False, timeout=60, capture_output=True).returncode == 0
