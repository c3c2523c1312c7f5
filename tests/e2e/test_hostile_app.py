"""A hostile app in the SuperExec's place, under a user of its own: it gets what the site's policy lets out, no more.

With an engine (`make test-containers`) the same attack starts in the SuperExec's container of docker-compose.yml.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import tomli_w
import yaml
from flwr.app import RecordDict
from support.compose import ENGINE, Machine
from support.other_user import cannot, run_as
from support.waiting import until

from fedlora.aggregators import load_aggregator
from fedlora.config import RunConfig, parse_config
from fedlora.federation.client_pool import ClientInfo, RoundRequest
from fedlora.federation.planner import Held, Planner
from fedlora.federation.protocol import PROTOCOL
from fedlora.flower.messages import RequestEncoder
from fedlora.node_worker.frames import pack
from fedlora.privacy.ledger import Ledger
from fedlora.programs import Guard
from fedlora.training.workspace import open_workspace

BY_USERS = pytest.param("users", marks=[pytest.mark.slow, pytest.mark.skipif(bool(cannot()), reason=cannot())])
IN_CONTAINERS = pytest.param(
    "containers",
    marks=[
        *(pytest.mark.nightly, pytest.mark.containers, pytest.mark.timeout(1800)),
        pytest.mark.skipif(not ENGINE, reason="needs a Docker engine of its own: make test-containers"),
    ],
)

WORKER, NODE, APP = 42_001, 42_002, 42_003
"""Users (and groups) of the three programs of a node; nobody else on a machine has such numbers."""
CANARY = "canary-of-one-patient"
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parents[1] / "support" / "hostile_app.py"


@dataclass(frozen=True)
class Attack:
    """What came of it.

    Args:
        outcomes: Attempt -> what the app got.
        loot: All bytes that it got.
        folder: Of the node.
        log: The worker's.
        socket: Its folder, as the app sees it.
        denials: The errors that keep a file from the app.
    """

    outcomes: dict[str, Any]
    loot: bytes
    folder: Path
    log: str
    socket: str
    denials: tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """Where the programs of a node see its parts: "site", "socket", "superexec", "data", "state" and "models".

    Args:
        folder: The node's, on this machine: each part is the folder of that name in it, the state lies in the site's.
        seen: Part -> where programs see it, if not there.
    """

    folder: Path
    seen: dict[str, str]

    def path(self, part: str) -> Path:
        return self.folder / ("site/state" if part == "state" else part)

    def __getitem__(self, part: str) -> str:
        return self.seen.get(part, str(self.path(part)))


MOUNTED = {
    "socket": "/run/fedlora",
    "superexec": "/federation",
    "data": "/data",
    "state": "/var/lib/fedlora",
    "models": "/models",
}
"""Part -> where docker-compose.yml mounts it (/federation is the site's folder in the worker's container)."""


@pytest.fixture(scope="module", params=[BY_USERS, IN_CONTAINERS])
def attack(request: pytest.FixtureRequest, tiny_bert: Path) -> Iterator[Attack]:
    """A node, attacked; which outcome is right is for the tests to say."""
    with tempfile.TemporaryDirectory(prefix="fedlora-", dir="/tmp") as name:
        node = Node(Path(name), MOUNTED if request.param == "containers" else {})
        node.folder.chmod(0o755)
        shutil.copytree(tiny_bert, node.path("models") / "model")
        for one in node.path("models").rglob("*"):
            one.chmod(0o755 if one.is_dir() else 0o644)
        config, forbidden = configs(node)
        make_node(node, config)
        facts = {
            "socket": f"{node['socket']}/worker.sock",
            "home": node["superexec"],
            "request": f"{node['superexec']}/request",
            "marker": f"{node['socket']}/marker",
            "config": config.to_toml(),
            "open": forbidden.to_toml(),
            "files": [
                *(f"{node['data']}/data.csv", f"{node['state']}/ledger.jsonl", f"{node['state']}/audit.jsonl"),
                *(f"{node['site']}/policy.toml", f"{node['site']}/node-config.toml", f"{node['supernode']}/node.key"),
            ],
            "folders": [node[part] for part in ("site", "state", "data", "supernode", "socket")],
        }
        attacked = attacked_in_containers if request.param == "containers" else attacked_by_a_user
        outcomes, log, denials = attacked(node, facts)
        loot = (node.path("superexec") / "loot").read_bytes()
        yield Attack(outcomes, loot, node.folder, log, node["socket"], denials)


def configs(node: Node) -> tuple[RunConfig, RunConfig]:
    """Of a run that the policy allows, and of one without privacy."""
    shared = (
        *("data.source=nodes", "partition.name=nodes", "partition.clients=1", f"model.name='{node['models']}/model'"),
        *("adapter.targets=['query','value']", "adapter.rank=2", "task.name=text-classification", "evaluation.on=off"),
        *("task.labels=['negative','positive']", "runtime.threads=1", "runtime.kernels=off", "train.steps=1"),
    )
    private = (
        *("server.weighting=uniform", "privacy.public_examples=40", "privacy.delta=1e-3", "privacy.epsilon=8.0"),
        *("privacy.max_grad_norm=0.5", "privacy.accountant=rdp"),
    )
    return parse_config("", [*shared, *private], name="run"), parse_config("", shared, name="run")


def make_node(node: Node, config: RunConfig) -> None:
    for part in ("state", "supernode", "socket", "superexec", "data"):
        node.path(part).mkdir(parents=True)
    rows = [f"{CANARY} number {n} great happy,{'positive' if n % 2 else 'negative'},x{n}" for n in range(40)]
    (node.path("data") / "data.csv").write_text("\n".join(["text,label,diagnosis", *rows]) + "\n")
    ledger = f"{node['state']}/ledger.jsonl"
    (node.path("state") / "ledger.jsonl").touch()
    facts = {"partition-id": 0, "data": f"{node['data']}/data.csv", "ledger": ledger, "device": "cpu"}
    (node.path("site") / "node-config.toml").write_text(tomli_w.dumps(facts))
    here = config.model.model_copy(update={"name": str(node.path("models") / "model")})
    workspace = open_workspace(config.model_copy(update={"model": here}))
    policy = {
        "private_only": True,
        "epsilon": 8.0,
        "delta": 1e-3,
        "columns": ["text", "label"],
        "message_mb": 4,
        "base_models": {config.model.name: workspace.base.fingerprint},
    }
    (node.path("site") / "policy.toml").write_text(tomli_w.dumps(policy))
    (node.path("supernode") / "node.key").write_text("secret")
    rule = load_aggregator("fedavg")
    state = rule.init(workspace.base.initial_adapter(config.seed), seed=1)
    planned = Planner(config, rule, workspace, run="ab" * 16).request(
        RoundRequest(1, [0], state), ClientInfo(0), Held()
    )
    frame = pack({}, content=RequestEncoder().encode(planned), state=RecordDict())
    (node.path("superexec") / "request").write_bytes(frame)
    shutil.copy(SCRIPT, node.path("superexec") / SCRIPT.name)


def give(path: Path, user: int) -> None:
    for one in (path, *path.rglob("*")):
        os.chown(one, user, user)


Attacked: TypeAlias = tuple[dict[str, Any], str, tuple[str, ...]]
"""Outcomes, the worker's log, and the errors that keep a file from the app."""


def attacked_by_a_user(node: Node, facts: dict[str, Any]) -> Attacked:
    """Worker, SuperNode and app are users of this machine."""
    folder, guard = node.folder, Guard()
    owned = {"site": WORKER, "data": WORKER, "supernode": NODE, "superexec": APP}
    home = {"HOME": f"{folder}/site", "FEDLORA_CACHE": f"{folder}/site/cache", "USER": "worker"}
    command = ["worker", "--socket", str(facts["socket"]), "--site", str(node.path("site"))]
    for part, user in owned.items():
        give(node.path(part), user)
        node.path(part).chmod(0o700)
    os.chown(node.path("socket"), WORKER, APP)
    node.path("socket").chmod(0o2750)
    log = folder / "worker.log"
    with log.open("wb") as file:
        worker = run_as(
            WORKER,
            [sys.executable, "-m", "fedlora", *command],
            groups=[APP],
            env={**os.environ, **home},
            stderr=file,
            stdout=file,
            cwd=folder,
        )
        guard.watch(worker)
        try:
            until(Path(facts["socket"]).exists, log.read_text)
            facts_file = write_facts(node, {**facts, "worker": worker.pid}, APP)
            app = run_as(
                APP,
                [sys.executable, str(SCRIPT), str(facts_file)],
                env={**os.environ, "HOME": facts["home"], "USER": "app", "FLWR_HOME": facts["home"]},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=facts["home"],
            )
            guard.watch(app)
            said, errors = app.communicate(timeout=500)
            assert app.returncode == 0, errors.decode()
            assert worker.poll() is None, "the worker is gone"
        finally:
            worker.terminate()
            worker.wait(60)
            guard.close()
    return json.loads(said.splitlines()[-1]), log.read_text(), ("PermissionError",)


def attacked_in_containers(node: Node, facts: dict[str, Any]) -> Attacked:
    """Worker and app are containers of docker-compose.yml, of one user: what keeps them apart is what they mount."""
    for part in ("site", "data", "supernode", "superexec", "socket"):
        give(node.path(part), WORKER)
        node.path(part).chmod(0o750)
    file = node.folder / "docker-compose.yml"
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for service in services["services"].values():
        service.pop("build", None)  # `docker_engine.sh images` has built it
    file.write_text(yaml.safe_dump(services))
    environment = {"SITE_A": str(node.folder), "SITE_A_DATA": node.path("data"), "FEDLORA_MODELS": node.path("models")}
    machine = Machine(
        "attacked",
        file,
        {k: str(v) for k, v in environment.items()} | {"FEDLORA_UID": str(WORKER), "FEDLORA_GID": str(WORKER)},
    )
    try:
        machine.compose("up", "--detach", "--no-deps", "worker-site-a")
        until((node.path("socket") / "worker.sock").exists, lambda: machine.compose("logs", "worker-site-a"))
        worker = int(machine.ask("worker-site-a", "{{.State.Pid}}"))
        write_facts(node, {**facts, "worker": worker}, WORKER)
        script, path = (f"{facts['home']}/{name}" for name in (SCRIPT.name, "facts.json"))
        app = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "python", "superexec-site-a", script, path)
        said = machine.compose(*app)
        assert machine.ask("worker-site-a", "{{.State.Status}} {{.RestartCount}}") == "running 0", "the worker is gone"
        log = machine.compose("logs", "--no-color", "worker-site-a")
    finally:
        machine.compose("down", "--timeout", "5")
    denials = ("PermissionError", "FileNotFoundError", "ProcessLookupError", "OSError: [Errno 30] Read-only")
    return json.loads(said.splitlines()[-1]), log, denials


def write_facts(node: Node, facts: dict[str, Any], user: int) -> Path:
    """For the app, which owns its folder; the path on this machine."""
    path = node.path("superexec") / "facts.json"
    path.write_text(json.dumps(facts))
    give(node.path("superexec"), user)
    return path


def refusal(clause: str) -> str:
    return f"this site's policy does not allow it: {clause}"


# ------------------------------------------------------------------------------------------------ what it gets

REFUSED = {
    "a run without privacy": "private_only",
    "evaluate without privacy": "private_only",
    "a larger epsilon": "epsilon",
    "a larger delta": "delta",
    "another column": "columns",
    **{f"a model at path {number}": "base_models" for number in range(6)},
    **{f"data at path {number}": "sources" for number in range(6)},
    "data of its own": "sources",
    "a source by name": "sources",
    **dict.fromkeys(("task by name", "strategy by name", "partition by name", "a rule within a rule"), "code"),
    **dict.fromkeys(("a program of this machine", "code of the model's"), "code"),
}
"""Attempt -> the clause that the app is told."""
TRAINED = ("a private round", "facts of another node", "another ledger", "beside silent connections")
"""Attempts that are a request which the policy allows, and are answered as if nothing else had been tried."""
FAILED = {
    "evaluate": "no client evaluates",
    "another message": "messages of the types",
    **dict.fromkeys(("a pickle as numpy.ndarray",), "do not travel in one buffer"),
    **dict.fromkeys(("a pickle as fedlora.buffer.v1", "a request with another buffer"), "bytes"),
    "a pickle as a plain array": "strategy is not fedlora's own",
    "a config that is no text": "not valid TOML",
    "a long config": "characters",
    **dict.fromkeys(("a note as a request", "a request with another layout"), "no readable head"),
    "a request with another round": "no readable head",
    "a request with another buffers": "buffers are not those",
    "a request with another merges": "its own log",
    "a request with another run": "does not name its run",
}
"""Attempt -> a part of the words in which it is answered."""
NO_REQUESTS = {
    **dict.fromkeys(("a message of nothing known", "a pickle", "half a frame", "a frame of nothing"), "no request"),
    **dict.fromkeys(("a deep frame", "a frame that announces all memory", "a frame of other types"), "no request"),
    "a huge frame": "RESOURCE_EXHAUSTED",
    "another method": "UNIMPLEMENTED",
}
"""Attempt -> a part of the error of the call."""


def test_it_reads_no_file_and_changes_none(attack: Attack) -> None:
    tried = {name: outcome for name, outcome in attack.outcomes.items() if name not in answered_attempts()}
    assert len(tried) > 20
    got = {name for name, outcome in tried.items() if not str(outcome).startswith(attack.denials)}
    assert got == {f"list {attack.socket}", "list fedlora"}


def answered_attempts() -> set[str]:
    return {"hello", *REFUSED, *TRAINED, *FAILED, *NO_REQUESTS}


def test_what_the_policy_forbids_is_refused_by_the_clause_alone(attack: Attack) -> None:
    found = {name: attack.outcomes[name] for name in REFUSED}
    note = {"protocol": PROTOCOL, "kind": "error", "records": ["reply"], "figures": []}
    assert found == {name: {**note, "error": refusal(clause)} for name, clause in REFUSED.items()}
    assert "the run's epsilon is 1000, the policy's 8" in attack.log


def test_what_the_policy_allows_is_an_update_of_this_node_and_nothing_beside(attack: Attack) -> None:
    hello = attack.outcomes["hello"]
    assert hello.keys() == {"protocol", "kind", "client_id", "fedlora", "fingerprint", "ledger", "records", "figures"}
    assert (hello["kind"], hello["client_id"], hello["figures"]) == ("hello", 0, [])
    first = attack.outcomes["a private round"]
    assert first.keys() == {"protocol", "kind", "round", "base_digest", "layout", "ledger", "records", "figures"}
    assert first["figures"] == sorted(
        ("num_examples", "steps", "sample_rate", "noise_multiplier", "max_grad_norm", "attempts")
    )
    assert all(attack.outcomes[name] == first for name in TRAINED)


def test_one_step_was_paid_for_however_often_it_was_asked_for(attack: Attack) -> None:
    ledger = Ledger(attack.folder / "site" / "state" / "ledger.jsonl")
    assert ledger.attempts("ab" * 16) == 1
    assert 0 < ledger.epsilon(1e-3, "rdp") <= 8.0
    assert not (attack.folder / "superexec" / "ledger.jsonl").exists()


def test_what_is_no_request_is_answered_in_words_and_ends_nothing(attack: Attack) -> None:
    for name, words in FAILED.items():
        assert attack.outcomes[name]["kind"] == "error", name
        assert words in attack.outcomes[name]["error"], name
    for name, words in NO_REQUESTS.items():
        assert words in attack.outcomes[name], name


def test_no_code_of_its_own_runs_in_the_worker(attack: Attack) -> None:
    assert not (attack.folder / "socket" / "marker").exists()


def test_not_a_word_of_the_data_comes_back(attack: Attack) -> None:
    assert attack.loot
    assert CANARY in (attack.folder / "data" / "data.csv").read_text()
    for word in (CANARY, "diagnosis", "x17", "state/ledger", "/var/lib/fedlora/ledger"):
        assert word.encode() not in attack.loot.replace(b"'diagnosis'", b""), word
