"""A hostile app in the SuperExec's place, under a user of its own: it gets what the site's policy lets out, no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import RecordDict
from support.other_user import cannot, run_as

import fedlora
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

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cannot()), reason=cannot())]

WORKER, NODE, APP = 42_001, 42_002, 42_003
"""Users (and groups) of the three programs of a node; nobody else on a machine has such numbers."""
CANARY = "canary-of-one-patient"
SCRIPT = Path(__file__).parents[1] / "support" / "hostile_app.py"


@dataclass(frozen=True)
class Attack:
    """What came of it.

    Args:
        outcomes: Attempt -> what the app got.
        loot: All bytes that it got.
        folder: Of the node.
        log: The worker's.
    """

    outcomes: dict[str, Any]
    loot: bytes
    folder: Path
    log: str


@pytest.fixture(scope="module")
def attack(tiny_bert: Path) -> Iterator[Attack]:
    """A node of three users, attacked; which outcome is right is for the tests to say."""
    with tempfile.TemporaryDirectory(prefix="fedlora-", dir="/tmp") as name:
        folder, guard = Path(name), Guard()
        folder.chmod(0o755)
        shutil.copytree(tiny_bert, folder / "model")
        for one in (folder / "model", *(folder / "model").iterdir()):
            one.chmod(0o755 if one.is_dir() else 0o644)
        config, forbidden = configs(folder)
        make_node(folder, config)
        owned = {"site": (WORKER, 0o700), "socket": (WORKER, 0o2750), "supernode": (NODE, 0o700), "app": (APP, 0o700)}
        for part, (user, mode) in owned.items():
            give(folder / part, user)
            (folder / part).chmod(mode)
        os.chown(folder / "socket", WORKER, APP)
        (folder / "socket").chmod(0o2750)
        home = {"HOME": str(folder / "site"), "FEDLORA_CACHE": str(folder / "site" / "cache"), "USER": "worker"}
        command = ["worker", "--socket", f"{folder}/socket/w.sock", "--site", f"{folder}/site"]
        with (folder / "worker.log").open("wb") as log:
            worker = run_as(
                WORKER,
                [sys.executable, "-m", "fedlora", *command],
                groups=[APP],
                env={**os.environ, **home},
                stderr=log,
                stdout=log,
                cwd=folder,
            )
            guard.watch(worker)
            try:
                until(lambda: (folder / "socket" / "w.sock").exists(), lambda: (folder / "worker.log").read_text())
                outcomes = attacked(folder, config, forbidden, worker.pid, guard)
                assert worker.poll() is None, "the worker is gone"
            finally:
                worker.terminate()
                worker.wait(60)
                guard.close()
        log_text = (folder / "worker.log").read_text()
        yield Attack(outcomes, (folder / "app" / "loot").read_bytes(), folder, log_text)


def configs(folder: Path) -> tuple[RunConfig, RunConfig]:
    """Of a run that the policy allows, and of one without privacy."""
    shared = (
        *("data.source=nodes", "partition.name=nodes", "partition.clients=1", f"model.name='{folder}/model'"),
        *("adapter.targets=['query','value']", "adapter.rank=2", "task.name=text-classification", "evaluation.on=off"),
        *("task.labels=['negative','positive']", "runtime.threads=1", "runtime.kernels=off", "train.steps=1"),
    )
    private = (
        *("server.weighting=uniform", "privacy.public_examples=40", "privacy.delta=1e-3", "privacy.epsilon=8.0"),
        *("privacy.max_grad_norm=0.5", "privacy.accountant=rdp"),
    )
    return parse_config("", [*shared, *private], name="run"), parse_config("", shared, name="run")


def make_node(folder: Path, config: RunConfig) -> None:
    site, supernode = folder / "site", folder / "supernode"
    for part in (site, supernode, folder / "socket", folder / "app"):
        part.mkdir()
    rows = [f"{CANARY} number {n} great happy,{'positive' if n % 2 else 'negative'},x{n}" for n in range(40)]
    (site / "data.csv").write_text("\n".join(["text,label,diagnosis", *rows]) + "\n")
    (site / "ledger.jsonl").touch()
    facts = {"partition-id": 0, "data": f"{site}/data.csv", "ledger": f"{site}/ledger.jsonl", "device": "cpu"}
    (site / "node-config.toml").write_text(tomli_w.dumps(facts))
    workspace = open_workspace(config)
    policy = {
        "private_only": True,
        "epsilon": 8.0,
        "delta": 1e-3,
        "columns": ["text", "label"],
        "message_mb": 4,
        "base_models": {config.model.name: workspace.base.fingerprint},
    }
    (site / "policy.toml").write_text(tomli_w.dumps(policy))
    (supernode / "node.key").write_text("secret")
    rule = load_aggregator("fedavg")
    state = rule.init(workspace.base.initial_adapter(config.seed), seed=1)
    planned = Planner(config, rule, workspace, run="ab" * 16).request(
        RoundRequest(1, [0], state), ClientInfo(0), Held()
    )
    (folder / "app" / "request").write_bytes(pack({}, content=RequestEncoder().encode(planned), state=RecordDict()))


def give(path: Path, user: int) -> None:
    for one in (path, *path.rglob("*")):
        os.chown(one, user, user)


def attacked(folder: Path, config: RunConfig, forbidden: RunConfig, worker: int, guard: Guard) -> dict[str, Any]:
    """Run the hostile app, which ends with the test; its outcomes."""
    site = folder / "site"
    facts = {
        "socket": f"{folder}/socket/w.sock",
        "worker": worker,
        "home": f"{folder}/app",
        "request": f"{folder}/app/request",
        "marker": f"{folder}/socket/marker",
        "config": config.to_toml(),
        "open": forbidden.to_toml(),
        "files": [
            *(f"{site}/{name}" for name in ("data.csv", "policy.toml", "node-config.toml")),
            *(f"{site}/{name}" for name in ("ledger.jsonl", "audit.jsonl")),
            f"{folder}/supernode/node.key",
        ],
        "folders": [str(site), f"{folder}/supernode", f"{folder}/socket", str(Path(fedlora.__file__).parent)],
    }
    path = folder / "app" / "facts.json"
    path.write_text(json.dumps(facts))
    give(folder / "app", APP)
    app = run_as(
        APP,
        [sys.executable, str(SCRIPT), str(path)],
        env={**os.environ, "HOME": str(folder / "app"), "USER": "app", "FLWR_HOME": str(folder / "app")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder / "app",
    )
    guard.watch(app)
    said, errors = app.communicate(timeout=500)
    assert app.returncode == 0, errors.decode()
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def until(holds: Any, explain: Any, within_s: float = 120.0) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, explain()
        time.sleep(0.1)


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
    allowed = {f"list {attack.folder}/socket", f"list {Path(fedlora.__file__).parent}"}
    assert len(tried) > 20
    assert {name for name, outcome in tried.items() if not str(outcome).startswith("PermissionError")} == allowed


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
    ledger = Ledger(attack.folder / "site" / "ledger.jsonl")
    assert ledger.attempts("ab" * 16) == 1
    assert 0 < ledger.epsilon(1e-3, "rdp") <= 8.0
    assert not (attack.folder / "app" / "ledger.jsonl").exists()


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
    assert CANARY in (attack.folder / "site" / "data.csv").read_text()
    for word in (CANARY, "diagnosis", "x17", f"{attack.folder}/site/ledger"):
        assert word.encode() not in attack.loot.replace(b"'diagnosis'", b""), word


def test_zz(attack):
    for n, o in attack.outcomes.items():
        print(n, "->", str(o)[:250])
    print(attack.log[-5000:])
    print((attack.folder / "site" / "ledger.jsonl").read_text())
