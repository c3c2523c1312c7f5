"""A SuperLink that stumbles at every kind of call, on both sides, and a run that loses nothing by it.

Without `fedlora.flower.patience` (seen with flwr 1.41.0): one 500 in pull-messages or in a heartbeat takes a node away
for good, its process stays; one in push-object loses the reply; one in get-nodes ends the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.real_federation import Federation, local
from support.stumbling_superlink import OK, Stumbles, every_second

from fedlora.config import parse_config
from fedlora.deploy import FederationPlan, NodePlan
from fedlora.privacy.ledger import Ledger

NODES = ("site-a", "site-b")
ROUNDS = 5
TEN = every_second("500", times=10)
EITHER = every_second("500", "broken", "503", "500", "broken", times=2)
"""Ten, of calls that can be carried out twice."""
ONCE = [*every_second("500", "503", times=4), *[OK] * 10, *every_second("500", "lost")]
"""Ten, of calls that hand something out once: what is lost is asked for again by the server."""
PLAN = {
    "fleet/activate-node": ["500"] * 10,
    "fleet/pull-messages": ONCE,
    "fleet/pull-object": EITHER,
    "fleet/confirm-message-received": EITHER,
    "fleet/push-messages": [*every_second("500", times=9), *every_second("lost")],
    "fleet/push-object": EITHER,
    "fleet/send-node-heartbeat": TEN,
    "runtime/acquire-task": every_second("500", "503", times=5),
    "runtime/pull-task-input": ["500"] * 3,
    "runtime/send-task-heartbeat": TEN,
    "runtime/push-logs": TEN,
    "runtime/get-nodes": EITHER,
    "runtime/push-messages": every_second("500", "lost", times=5),
    "runtime/push-object": EITHER,
    "runtime/pull-messages": ONCE,
    "runtime/pull-object": EITHER,
    "runtime/confirm-message-received": EITHER,
    "runtime/push-task-output": ["500", "lost"],
}
RARE = {"fleet/send-node-heartbeat", "runtime/send-task-heartbeat", "runtime/push-logs"}
"""Calls that go by the clock: a run is over before there were twenty of them."""
PRIVATE = (
    *("server.weighting=uniform", "train.steps=1", "train.batch_size=40", "privacy.public_examples=40"),
    *("privacy.delta=1e-3", "privacy.max_grad_norm=0.5", "privacy.accountant=rdp", "privacy.noise_multiplier=1.5"),
)
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def stumbles(tmp_path_factory: pytest.TempPathFactory) -> Stumbles:
    return Stumbles(tmp_path_factory.mktemp("s") / "s")


@pytest.fixture(scope="module")
def federation(
    tiny_bert: Path, tiny_csv: Path, stumbles: Stumbles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("f")
    changes = [f"model.name='{tiny_bert}'", f"data.source='{tiny_csv}'", "partition.name=iid", "partition.clients=2"]
    changes += ["train.steps=3", "train.batch_size=8", f"rounds={ROUNDS}", "server.node_timeout_s=120"]
    changes += ["runtime.device=cpu", "runtime.threads=1", "runtime.cohort=1", "runtime.kernels=off"]
    config = parse_config("", [*changes, "adapter.targets=['query','value']"], name="stumbles")
    nodes = tuple(NodePlan(name, ledger=f"{folder}/{name}.jsonl") for name in NODES)
    federation = Federation(folder, config, FederationPlan(("127.0.0.1",), nodes, control_port=local.free_ports(3)))
    patience = pytest.MonkeyPatch()
    patience.setattr(local, "PATIENCE_S", 1200.0)  # the SuperLink gives up a broken upload after 180 s
    try:
        federation.up("coordinator", *stumbles.prefix)
        federation.wait(lambda: local.listens(federation.project), "the SuperLink")
        federation.register()
        stumbles.plan(PLAN)
        for name in NODES:
            federation.up(name)
        yield federation
    finally:
        federation.down()
        patience.undo()


def test_a_run_loses_nothing_to_ten_errors_of_each_call(federation: Federation, stumbles: Stumbles) -> None:
    run = federation.run()
    assert run.finish() == {}
    assert run.answers() == [[0, 1]] * ROUNDS
    run.require_equal(run.simulate())
    planned = {call: sum(kind != OK for kind in kinds) for call, kinds in PLAN.items() if call not in RARE}
    # The run's files are there before Flower has been told that it ended.
    last = "runtime/push-task-output"
    federation.wait(lambda: stumbles.done()[last] == planned[last], f"the end of {last}")
    done = stumbles.done()
    assert {call: done[call] for call in planned} == planned
    assert all(done[call] for call in RARE)
    require_undisturbed(federation)


def test_a_private_run_spends_nothing_twice(federation: Federation, stumbles: Stumbles) -> None:
    stumbles.plan({call: kinds for call, kinds in PLAN.items() if call != "fleet/activate-node"})
    run = federation.run("name=private", *PRIVATE)
    assert run.finish() == {}
    assert run.answers() == [[0, 1]] * ROUNDS
    claim = json.loads((run.rundir / "result.json").read_text())["privacy"]["epsilon"]
    for name in NODES:
        ledger = federation.folder / f"{name}.jsonl"
        events = [json.loads(line)["event"] for line in ledger.read_text().splitlines()]
        assert events == ["started", "released"] * ROUNDS
        assert Ledger(ledger).epsilon(1e-3, "rdp") == pytest.approx(claim, rel=1e-12)
    require_undisturbed(federation)


def require_undisturbed(federation: Federation) -> None:
    """No program of anybody's has ended, and every node is there."""
    for name in ("coordinator", *NODES):
        assert "ended with status" not in (federation.folder / f"{name}.log").read_text()
    listed = local.flower(federation.project, "supernode", "list", "federation", "--format", "json")
    assert [node["status"] for node in json.loads(listed)["nodes"]] == ["online"] * len(NODES)
