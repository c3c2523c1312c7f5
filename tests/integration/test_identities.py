"""Client numbers belong to keys: by the run's config, or for the run to the first key that was that client."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from support.errors import raises
from support.nothing_lost import Witness
from support.on_a_grid import grid_of, serve_on
from support.tiny_federations import MakeConfig

from fedlora.config import RunConfig
from fedlora.deploy.keys import make_node_key
from fedlora.errors import ReplyError, RoundError
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app, identities
from fedlora.flower.identities import Bindings, Identity, fingerprint
from fedlora.flower.task_identity import task_identity
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid

A, B, C = (Identity(name, f"SHA256:{name}") for name in ("site-a", "site-b", "site-c"))


def pem(openssh: bytes) -> bytes:
    key = serialization.load_ssh_public_key(openssh)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


KEYS = [make_node_key(name).public for name in ("site-a", "site-b", "site-c", "site-d", "stranger")]


# ------------------------------------------------------------------------------------------------ bindings


def test_the_first_key_of_a_client_stays_its_key() -> None:
    kept: list[Mapping[int, Identity]] = []
    bindings = Bindings(remember=lambda known: kept.append(dict(known)))
    bindings.bind(0, A)
    bindings.bind(1, B)
    bindings.bind(0, A)  # back again
    assert kept == [{0: A}, {0: A, 1: B}]
    for impostor in (C, Identity(A.name, C.key), Identity("", C.key), Identity()):
        with raises(ReplyError, "client-has-another-node", "server.nodes"):
            bindings.bind(0, impostor)
    with raises(ReplyError, "client-has-another-node", "server.nodes"):
        bindings.bind(0, B)
    with raises(ReplyError, "node-is-another-client", "partition-id"):
        bindings.bind(5, B)
    again = Bindings(known=kept[-1])  # a resume
    again.bind(1, B)
    with raises(ReplyError, "client-has-another-node"):
        again.bind(1, A)


def test_keys_that_register_themselves_bind_nothing() -> None:
    bindings = Bindings(remember=lambda known: pytest.fail("nothing is to be kept"))
    bindings.bind(0, Identity("", "SHA256:x"))
    bindings.bind(0, Identity("", "SHA256:y"))  # the same node, started again
    bindings.bind(0, None)


@pytest.mark.parametrize("pins", [("site-a", "site-b"), (A.key, B.key), ("site-a", B.key)])
def test_a_config_says_which_node_is_which_client(pins: tuple[str, ...]) -> None:
    bindings = Bindings(pins, known={0: C})  # what was before does not matter: a site may have a new machine
    bindings.bind(0, A)
    bindings.bind(1, B)
    for client_id, node in ((0, B), (1, A), (0, C), (2, C), (0, Identity()), (1, Identity("", "SHA256:site-c"))):
        with raises(ReplyError, "not-its-node", "server.nodes"):
            bindings.bind(client_id, node)


def test_a_fingerprint_is_what_openssh_shows(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_bytes(KEYS[0])
    try:
        shown = subprocess.run(["ssh-keygen", "-lf", "key.pub"], cwd=tmp_path, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("there is no ssh-keygen here")
    assert fingerprint(pem(KEYS[0])) == shown.decode().split()[1]
    assert [fingerprint(odd) for odd in (b"", b"\xff" * 32, KEYS[0])] == ["", "", ""]


# ------------------------------------------------------------------------------------------------ in a run


class Registered(LoopbackGrid):
    """A grid whose nodes 2, 3, ... are registered with the keys of `KEYS`.

    Args:
        config: of the run.
        says: which client each says it is.
        names: under which each is registered.
    """

    def __init__(self, config: RunConfig, says: Iterable[int], names: Iterable[str]) -> None:
        super().__init__(client_app.app, [{"partition-id": k} for k in says], {"toml": config.to_toml()})
        self.names = list(names)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node_id, name=self.names[node_id - 2], public_key=pem(KEYS[node_id - 2]))
            for node_id in self._contexts
        ]


@pytest.fixture(autouse=True)
def over_a_superlink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "over_a_superlink", lambda grid: isinstance(grid, Registered))


def run(config: RunConfig, grid: LoopbackGrid, rundir: RunDir, **how: Any) -> tuple[RunOutcome, list[str]]:
    said = Witness(rundir)
    return serve_on(grid, config, said, rundir=rundir, **how), said.lines


def test_an_impostor_that_is_first_takes_nobodys_place(tiny_config: MakeConfig) -> None:
    config = tiny_config(
        "rounds=1", "train.steps=1", "server.node_timeout_s=0.1", "server.nodes=['site-a','site-b','site-c','site-d']"
    )
    names = ["stranger", "site-a", "site-b", "site-c", "site-d"]
    grid = Registered(config, [0, 0, 1, 2, 3], names)
    outcome, _ = run(config, grid, RunDir.create(config))
    assert outcome.records[1]["answered"] == [0, 1, 2, 3]
    assert outcome.records[1]["turned_away"].keys() == {"stranger (node 2)"}
    assert "site-a" in outcome.records[1]["turned_away"]["stranger (node 2)"]


class OneAnswersForAnother(Registered):
    """Its node 3 answers what node 2 is asked to train: under its own id, or as node 2's client from its own place."""

    def __init__(self, *args: Any, as_itself: bool) -> None:
        super().__init__(*args)
        self._as_itself = as_itself

    def _answer(self, message: Message) -> Message:
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != 2:
            return super()._answer(message)
        with task_identity(self.run.run_id, 3):
            reply = self._client_app(message, self._contexts[3])
        reply.metadata.__dict__["_src_node_id"] = 3 if self._as_itself else 2
        return reply


@pytest.mark.parametrize(
    ("as_itself", "said"), [(True, "node 3 answers what another node was asked"), (False, "client 1")]
)
def test_a_node_cannot_answer_as_another(tiny_config: MakeConfig, as_itself: bool, said: str) -> None:
    config = tiny_config(
        "rounds=1", "train.steps=1", "server.node_timeout_s=0.1", "server.nodes=['site-a','site-b','site-c','site-d']"
    )
    grid = OneAnswersForAnother(config, range(4), ["site-a", "site-b", "site-c", "site-d"], as_itself=as_itself)
    outcome, _ = run(config, grid, RunDir.create(config))
    assert outcome.records[1]["answered"] == [1, 2, 3]
    assert said in outcome.records[1]["refused"]["0"]


def test_after_a_resume_a_client_is_still_its_key(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "train.steps=1", "server.node_timeout_s=0.1")
    names = ["site-a", "site-b", "site-c", "site-d", "stranger"]
    rundir = RunDir.create(config)
    run(config, Registered(config, range(4), names), rundir)
    assert {k: row["name"] for k, row in rundir.read_json("nodes.json").items()} == dict(
        zip("0123", names, strict=False)
    )
    more = tiny_config("rounds=2", "train.steps=1", "server.node_timeout_s=0.1")
    rundir = RunDir.open(rundir.path, more)
    # Node 6 has another key and comes in client 1's place.
    grid = Registered(more, [0, 9, 2, 3, 1], names)
    del grid._contexts[3]
    outcome, lines = run(more, grid, rundir, resume=True)
    assert outcome.records[2]["answered"] == [0, 2, 3]
    assert any("refused node 6 'stranger': client 1 is the node 'site-b'" in line for line in lines)


def test_a_private_run_remembers_its_nodes_too(tiny_config: MakeConfig) -> None:
    changes = ("rounds=1", "train.steps=1", "train.batch_size=40", "server.weighting=uniform", "privacy.delta=1e-3")
    private = ("privacy.public_examples=40", "privacy.max_grad_norm=0.5", "privacy.noise_multiplier=1.5")
    config = tiny_config(*changes, *private, "server.node_timeout_s=0.1")
    names, rundir = ["site-a", "site-b", "site-c", "site-d"], RunDir.create(config)
    grid = Registered(config, range(4), names)
    for node_id, context in grid._contexts.items():
        context.node_config["ledger"] = str(rundir.path.parent / f"node-{node_id}.jsonl")
    run(config, grid, rundir)
    assert [row["name"] for row in rundir.read_json("nodes.json").values()] == names
    # One of them comes back with an older copy of its ledger: it is known by its key, whatever it says.
    ledger = rundir.path.parent / "node-3.jsonl"
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    again = RunDir.open(rundir.path, tiny_config(*changes[1:], *private, "rounds=2", "server.node_timeout_s=0.1"))
    grid = Registered(again.config, range(4), names)
    for node_id, context in grid._contexts.items():
        context.node_config["ledger"] = str(rundir.path.parent / f"node-{node_id}.jsonl")
    outcome, lines = run(again.config, grid, again, resume=True)
    assert outcome.records[2]["answered"] == [0, 2, 3]
    (line,) = [line for line in lines if "rolled back" in line]
    assert line.startswith("refused node 3 'site-b': ")
    assert "node-3.jsonl" in line


def test_nobody_who_is_pinned_ends_in_words(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "server.node_timeout_s=0.1", "server.nodes=['w','x','y','z']")
    with raises(RoundError, "no-node", "server.nodes"):
        run(config, Registered(config, range(4), "abcd"), RunDir.create(config))


def test_nodes_of_a_simulation_are_the_servers_own_whatever_the_config_says(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "train.steps=1", "server.nodes=['w','x','y','z']")
    rundir = RunDir.create(config, overwrite=True)
    for outcome in (run_simulation(config, rundir), serve_on(grid_of(config), config)):
        assert outcome.records[1]["answered"] == [0, 1, 2, 3]
        assert not (outcome.rundir.path / "nodes.json").exists()
