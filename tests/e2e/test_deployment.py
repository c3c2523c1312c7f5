"""A federation of real processes: SuperLink, three SuperNodes, SuperExecs and workers with TLS and node keys.

They are started once. Runs on them have their processes killed in turn, and each ends with the adapter that it has in
one process, to the byte, with every finished round in its checkpoint and every reply that was left out in its metrics.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import succeeds
from support.federations import simulate
from support.real_federation import ROOT, WEIGHTS, Federation, local

from fedlora.config import ModelConfig, load_config, parse_config
from fedlora.deploy import FederationPlan, NodePlan, Program, programs, start, stop
from fedlora.deploy.evaluation import evaluate_in_deployment
from fedlora.deploy.keys import make_authority, make_node_key
from fedlora.programs import Guard
from fedlora.runs.rundir import RunDir

NODES = ("site-a", "site-b", "site-c")
STRANGERS = {
    "unregistered": r"Failed to activate SuperNode",
    "other-authority": r"CERTIFICATE_VERIFY_FAILED",
    "no-key": r"SuperNodes must be registered",
    "insecure": r"Failed to initialize the connection to the SuperLink",
}
"""Who asks to be let in -> what its SuperNode says when it was not."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ports() -> int:
    """The first of as many free ports as all programs of this file need: the SuperLink, nodes and strangers."""
    return int(local.free_ports(1 + len(NODES) + len(STRANGERS)))


@pytest.fixture(scope="module")
def federation(
    minilm: Path, vader: Path, tiny_bert: Path, tiny_csv: Path, ports: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    """The quickstart on three nodes, with the little that makes processes comparable to the byte."""
    folder = tmp_path_factory.mktemp("f")
    few = ("rounds=1", "train.steps=2", "data.limit=800", "partition.clients=3", "partition.mixing=0.5")
    here = ("runtime.device=cpu", "runtime.threads=1", "runtime.cohort=1", "runtime.kernels=off")
    config = load_config(ROOT / "configs" / "quickstart.toml", [*few, *here, "server.node_timeout_s=90"])
    nodes = tuple(NodePlan(name, ledger=f"{folder}/{name}-ledger.jsonl") for name in NODES)
    federation = Federation(folder, config, FederationPlan(("127.0.0.1",), nodes, control_port=ports))
    federation.allow([config.model, ModelConfig(name=str(tiny_bert))], [config.data.source, str(tiny_csv)])
    try:
        federation.begin()
        for name in NODES:
            federation.up(name)
        yield federation
    finally:
        federation.down()


@pytest.fixture(scope="module")
def tiny(tiny_bert: Path, tiny_csv: Path) -> list[str]:
    """Changes of the config that make a round a matter of seconds, whoever is killed in it."""
    return [
        f"model.name={tiny_bert}",
        f"data.source={tiny_csv}",
        "data.domain=domain",
        "partition.mixing=1.0",
        "train.steps=3",
        "train.lr=0.01",
        "train.batch_size=8",
    ]


def test_the_default_task_has_the_bytes_of_its_simulation(federation: Federation) -> None:
    run = federation.run("name=default")
    assert run.finish() == {}
    assert run.answers() == [[0, 1, 2]]
    run.require_equal(run.simulate())


def test_an_adapter_is_measured_where_the_data_are(federation: Federation, tiny: list[str], tmp_path: Path) -> None:
    changes = ["name=apart", *tiny, "evaluation.on=clients", "evaluation.min_examples=2", f"output={tmp_path}"]
    run = simulate(parse_config(federation.config.to_toml(), changes))
    said: list[str] = []
    found = evaluate_in_deployment(federation.project, run.rundir.adapter_dir, changes, said.append)
    assert found["figures"]["accuracy"] == run.records[-1]["accuracy"], said
    assert found["figures"]["macro_f1"] == run.records[-1]["macro_f1"]
    assert list(found["clients"]) == ["0", "1", "2"]


def test_a_node_exports_a_model_of_its_own(federation: Federation, tiny: list[str], tmp_path: Path) -> None:
    """Ditto's, which no reply has: in the folder of each site, to the byte as in a simulation."""
    apart = ("evaluation.on=clients", "evaluation.min_examples=2", "train.personal=0.5")
    run = federation.run("name=own", *tiny, *apart)
    assert run.finish() == {}
    simulated = run.simulate()
    run.require_equal(simulated)
    shared, models = (run.rundir / WEIGHTS).read_bytes(), set[bytes]()
    for client_id, name in enumerate(NODES):
        words = {
            "site": ["node", "export", federation.folder_of(name) / "site", run.rundir / "adapter"],
            "simulated": ["export", simulated, "--client", client_id],
        }
        for out, command in words.items():
            succeeds(*command, tmp_path / name / out)
        mine, theirs = (load_file(tmp_path / name / out / "adapter_model.safetensors") for out in words)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())
        models.add((tmp_path / name / "site" / "adapter_model.safetensors").read_bytes())
    assert len(models | {shared}) == len(NODES) + 1


@pytest.mark.nightly
def test_a_superlink_that_is_killed_loses_nothing(federation: Federation, tiny: list[str]) -> None:
    run = federation.run("name=superlink-killed", "rounds=2", *tiny)
    federation.wait(lambda: run.has_finished(1), "round 1")
    federation.kill("coordinator", "flower-superlink")
    assert run.finish() == {}
    assert run.answers() == [[0, 1, 2]] * 2
    run.require_equal(run.simulate())


def test_a_server_app_that_is_killed_is_resumed(federation: Federation, tiny: list[str]) -> None:
    """With what each client keeps, which is at its node alone."""
    personal = ("strategy.name=fedsa", "evaluation.on=clients", "evaluation.min_examples=2")
    changes = ("name=server-killed", "rounds=2", *tiny, *personal)
    killed = federation.run(*changes)
    federation.wait(lambda: killed.has_finished(1), "round 1")
    time.sleep(2)  # a node that is being sent a message would wait for the rest of it for a minute, as Flower does
    federation.kill("coordinator", "flwr-serverapp")
    before = (killed.rundir / "metrics.jsonl").read_bytes()
    run = federation.resume(killed, *changes)
    run.finish()
    assert (run.rundir / "metrics.jsonl").read_bytes().startswith(before)
    assert run.answers() == [[0, 1, 2]] * 2
    simulated = run.simulate()
    run.require_equal(simulated)
    for client_id, name in enumerate(NODES):
        place = federation.folder / f"{name}-ledger.jsonl.kept" / RunDir.open(run.rundir).run_id
        mine, theirs = (of_client(folder, client_id) for folder in (place, RunDir.open(simulated).clients_dir))
        assert mine == theirs
        assert mine
        assert [path.name for path in place.iterdir()] == [f"client-{client_id}"]


def of_client(folder: Path, client_id: int) -> dict[str, bytes]:
    """What a client keeps: the name of a file -> its bytes."""
    return {path.name: path.read_bytes() for path in (folder / f"client-{client_id}").iterdir()}


def test_strangers_are_turned_away(federation: Federation, ports: int) -> None:
    running: dict[str, subprocess.Popen[bytes]] = {}
    guard = Guard()
    try:
        for place, name in enumerate(STRANGERS):
            folder = federation.folder / name
            nothing_alive = shutil.ignore_patterns("state", "*.sock*")
            shutil.copytree(federation.project / "nodes" / "site-a", folder, ignore=nothing_alive)
            supernode = next(program for program in programs(folder) if program.name.startswith("supernode"))
            command = [*supernode.command, "--max-retries", "1"]
            command[command.index("--port") + 1] = str(ports + 1 + len(NODES) + place)
            if name == "unregistered":
                (folder / "supernode" / "node.key").write_bytes(make_node_key("stranger").private)
            elif name == "other-authority":
                (folder / "supernode" / "ca.crt").write_bytes(make_authority("other").public)
            else:
                at = command.index("--auth-supernode-private-key")
                del command[at : at + 2]
            if name == "insecure":
                at = command.index("--root-certificates")
                command[at : at + 2] = ["--insecure"]
            with (federation.folder / f"{name}.log").open("wb") as log:
                running[name] = start(Program(name, command, supernode.folder, supernode.environment), log.fileno())
            guard.watch(running[name])
        for name, process in running.items():
            process.wait(90)
            text = (federation.folder / f"{name}.log").read_text()
            assert process.returncode != 0, (name, text)
            assert "SuperNode ID" not in text, (name, text)
            assert re.search(STRANGERS[name], text), (name, text)
    finally:
        stop(running.values())
        guard.close()
    listed = local.flower(federation.project, "supernode", "list", "federation", "--format", "json")
    assert listed.count('"node-id"') == len(NODES)


LAUNCHER = """
import sys, time
from pathlib import Path
from support.real_federation import local
print(local.start(Path(sys.argv[1]), Path(sys.argv[2])).pid, flush=True)
time.sleep(600)
"""


def test_a_federation_ends_with_the_process_that_started_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However that ends: here by SIGKILL, as pytest itself could."""
    folder = tmp_path_factory.mktemp("g")
    port = local.free_ports(2)
    nodes = (NodePlan("alone", ledger=f"{folder}/ledger.jsonl"),)
    config = load_config(ROOT / "configs" / "quickstart.toml", ["partition.clients=1", "partition.mixing=1.0"])
    federation = Federation(folder, config, FederationPlan(("127.0.0.1",), nodes, control_port=port))
    log = tmp_path / "log"
    command = [sys.executable, "-c", LAUNCHER, str(federation.project), str(log)]
    places = f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": places})
    try:
        assert launcher.stdout is not None
        while not (line := launcher.stdout.readline()).strip().isdigit():
            assert line
        federation.wait(lambda: local.listens(federation.project), "the SuperLink")
        family = local.members(int(line))
        assert any("flower-superexec" in local.command_line(pid) for pid in family)
    finally:
        launcher.kill()
        launcher.wait()
    federation.wait(lambda: not alive(family), "all of it to end")


@pytest.mark.nightly  # it takes Flower a minute to miss it
def test_a_node_that_is_killed_is_missed_and_comes_back(federation: Federation, tiny: list[str]) -> None:
    run = federation.run("name=node-killed", "rounds=6", "server.quorum=0.6", *tiny)
    federation.wait(lambda: run.has_finished(1) and federation.pids("site-b", "flwr-clientapp"), "training")
    for program in ("flower-supernode", "flower-superexec", "flwr-clientapp"):
        federation.kill("site-b", program)
    federation.wait(lambda: [0, 2] in run.answers(), "a round without the node")
    missed = 1 + run.answers().index([0, 2])
    federation.wait(lambda: [0, 1, 2] in run.answers()[missed:], "a round with it")
    assert (missed, 1) in run.finish()
    record = run.records()[missed]
    assert record["refused"].keys() == {"1"} or record["missing"] == [1]
    run.require_equal(run.simulate(replay=run.records()))


def test_nothing_is_left_of_what_deploy_up_started_when_it_is_killed(federation: Federation) -> None:
    family = [pid for process in federation.processes.values() for pid in local.members(process.pid)]
    assert sum("flower-supernode" in local.command_line(pid) for pid in family) == len(NODES)
    for process in federation.processes.values():
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    federation.wait(lambda: not alive(family), "all of it to end")


def alive(pids: list[int]) -> list[str]:
    """Those of the processes that are still there; what died and was not buried has no command line."""
    time.sleep(0.2)
    return [line for line in map(local.command_line, pids) if line]
