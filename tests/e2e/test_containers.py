"""A federation in containers, each site on a machine of its own: `make test-containers`.

docker-compose.yml is started once for each machine, as a project with networks of its own, so that only the published
port joins them: the coordinator, which has no data, with site a, site b over a slow line whose connections break, and
site c. Then a site is cut off, the SuperLink and a SuperNode are killed, and a node's disk is full.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml
from support.compose import ENGINE, Machine
from support.real_federation import ROOT, WEIGHTS, Federation, local
from support.slow_relay import SlowRelay

from fedlora.assets import Checkpoint
from fedlora.config import parse_config
from fedlora.deploy import FederationPlan, NodePlan
from fedlora.model.fingerprint import fingerprint

SITES = ("site-a", "site-b", "site-c")
PORT = 8443
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.containers,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not ENGINE, reason="needs a Docker engine of its own: make test-containers starts one, as root"),
]


def compose_file(site: str, folder: Path) -> Path:
    """docker-compose.yml of a machine: for a third site, as its operator would change it, with a small disk."""
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text().replace("site-b", site))
    for service in services["services"].values():
        service.pop("build", None)  # `images` has built it
    for name in (f"superexec-{site}", f"worker-{site}"):
        small = {"type": "tmpfs", "target": "/small", "tmpfs": {"size": 4 << 20}}
        services["services"][name]["volumes"] = [*services["services"][name]["volumes"], small]
        services["services"][name]["environment"]["TMPDIR"] = "/small"
    services["services"][f"supernode-{site}"]["extra_hosts"] = ["coordinator:${GATEWAY:-127.0.0.1}"]
    path = folder / f"{site}.yml"
    path.write_text(yaml.safe_dump(services))
    return path


@pytest.fixture(scope="module")
def federation(tiny_bert: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """The folders; models and data lie where the containers see them."""
    folder = tmp_path_factory.mktemp("c")
    models = folder / "models"
    shutil.copytree(tiny_bert, models / "bert")
    head, *rows = tiny_csv.read_text(encoding="utf-8").splitlines()
    parts = dict(zip(SITES, (rows[:60], rows[60:150], rows[150:]), strict=True))
    settings = ["model.name=/models/bert", "adapter.targets=['query','value']", "task.name=text-classification"]
    settings += ["task.labels=['negative','positive']", "rounds=8", "train.steps=3"]
    settings += ["evaluation.on=clients", "evaluation.every=8", "data.test_fraction=0.3"]
    settings += ["runtime.device=cpu", "runtime.threads=1", "runtime.cohort=1", "runtime.kernels=off"]
    settings += ["server.node_timeout_s=120", "server.deadline_s=600", "server.quorum=0.3"]
    (folder / "all.csv").write_text(
        "\n".join([f"{head},site", *(f"{row},{site}" for site in SITES for row in parts[site])]) + "\n",
        encoding="utf-8",
    )
    nodes = tuple(NodePlan(name, data="/data/notes.csv", ledger="/var/lib/fedlora/ledger.jsonl") for name in SITES)
    config = parse_config("", settings, name="composed")
    federation = Federation(folder, config, FederationPlan(("coordinator", "proxy"), nodes, port=PORT))
    for place in ("coordinator", *(f"nodes/{site}" for site in SITES)):
        (federation.project / place / "data").mkdir()
    known = {"base_models": {"/models/bert": fingerprint(Checkpoint(str(models / "bert")))}}
    for site in SITES:
        (federation.project / "nodes" / site / "site" / "policy.toml").write_text(tomli_w.dumps(known))
    for site, part in parts.items():
        notes = federation.project / "nodes" / site / "data" / "notes.csv"
        notes.write_text("\n".join([head, *part]) + "\n", encoding="utf-8")
    return federation


@pytest.fixture(scope="module")
def machines(federation: Federation) -> Iterator[dict[str, Machine]]:
    """The coordinator with site a, and a machine for each of the others; all of it up, and the keys let in."""
    project, folder = federation.project, federation.folder
    common = {"FEDERATION": str(project), "FEDLORA_MODELS": str(folder / "models")}
    common |= {"FEDLORA_UID": str(os.getuid()), "FEDLORA_GID": str(os.getgid())}
    common |= {"FEDERATION_PORT": str(PORT)}
    hub = Machine("hub", compose_file("site-b", folder), common)
    machines = {"site-a": hub}
    relay: SlowRelay | None = None
    try:
        hub.compose("up", "--detach", "superlink", "superexec", "proxy")
        federation.wait(lambda: local.connects(8000), "the SuperLink")
        federation.register()
        gateway = hub.ask("proxy", "{{range .NetworkSettings.Networks}}{{.Gateway}} {{end}}").split()[0]
        relay = SlowRelay(("0.0.0.0", 0), ("127.0.0.1", PORT), delay_s=0.1, rate=2e6, breaks=0.5, longest=50_000)
        relay.__enter__()
        hub.compose("up", "--detach", "supernode-site-a", "worker-site-a", "superexec-site-a")
        for site, port in (("site-b", relay.port), ("site-c", PORT)):
            own = {**common, "GATEWAY": gateway, "FEDERATION_ADDRESS": f"coordinator:{port}"}
            own |= {"SITE_B": str(project / "nodes" / site), "SITE_B_DATA": str(project / "nodes" / site / "data")}
            machines[site] = Machine(site, compose_file(site, folder), own)
            machines[site].compose("up", "--detach", f"supernode-{site}", f"worker-{site}", f"superexec-{site}")
        yield machines
        assert relay.broken > 0, f"{relay.connections} connections, {relay.bytes} bytes"
    finally:
        for name, machine in machines.items():
            (folder / f"{name}.log").write_text(machine.compose("logs", "--no-color"))
            machine.compose("down", "--timeout", "5")
        if relay is not None:
            relay.__exit__()


def test_containers_train_through_cuts_kills_a_full_disk_and_a_slow_line(
    federation: Federation, machines: dict[str, Machine]
) -> None:
    hub, third = machines["site-a"], machines["site-c"]
    run = federation.run()
    federation.wait(lambda: run.has_finished(1), "round 1")
    supernode = hub.container("supernode-site-a")
    hub.docker("network", "disconnect", "hub_fleet", supernode)
    time.sleep(20)
    hub.docker("network", "connect", "hub_fleet", supernode)
    federation.wait(lambda: run.has_finished(2), "round 2")
    hub.kill("superlink")
    federation.wait(lambda: run.has_finished(3), "round 3")
    third.kill("supernode-site-c")
    federation.wait(lambda: run.has_finished(4), "round 4")
    for service in ("superexec-site-c", "worker-site-c"):
        fill = "dd if=/dev/zero of=/small/full bs=64k 2>/dev/null; true"
        third.docker("exec", third.container(service), "sh", "-c", fill)
    federation.wait(lambda: run.has_finished(5), "round 5")
    for service in ("superexec-site-c", "worker-site-c"):
        third.docker("exec", third.container(service), "rm", "/small/full")
    run.finish()
    answers = run.answers()
    assert answers[0] == answers[-1] == [0, 1, 2]
    assert sum(map(len, answers)) >= 3 * len(answers) - 4  # each fault costs a site a round at most
    assert all(third.ask(s, "{{.State.Status}}") == "running" for s in ("supernode-site-c", "worker-site-c"))
    for site, machine in machines.items():
        federation.wait(lambda machine=machine, site=site: healthy(machine, site), f"{site}'s health")
    listed = json.loads(local.flower(federation.project, "supernode", "list", "federation", "--format", "json"))
    assert [node["status"] for node in listed["nodes"]] == ["online"] * 3
    assert third.docker("exec", third.container("supernode-site-c"), "sh", "-c", "getent hosts superlink || true") == ""
    replayed = simulated(federation, run)
    assert (run.rundir / WEIGHTS).read_bytes() == (replayed / WEIGHTS).read_bytes()
    assert run.records()[-1]["accuracy"] == local.records(replayed)[-1]["accuracy"]


def healthy(machine: Machine, site: str) -> bool:
    return machine.ask(f"supernode-{site}", "{{.State.Health.Status}}") == "healthy"


def simulated(federation: Federation, run: Any) -> Path:
    """The run again, in one process on this machine, where models and data have other paths."""
    folder = federation.folder
    model, partition = run.config.model, parse_config("", ["partition.name=natural", "partition.column=site"]).partition
    config = run.config.model_copy(
        update={
            "model": model.model_copy(update={"name": str(folder / "models" / "bert")}),
            "data": run.config.data.model_copy(update={"source": str(folder / "all.csv")}),
            "partition": partition,
        }
    )
    return type(run)(federation, config, run.run_id).simulate(replay=run.records())
