"""What a resume may change in a run's config, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.errors import raises
from support.made_runs import make_run

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import GlobalState
from fedlora.compare import compare
from fedlora.config import RunConfig, flat_keys, parse_config
from fedlora.errors import RunDirError
from fedlora.report import write_report
from fedlora.runs.config_changes import FROM_NOW_ON, MACHINE, MECHANISM, PLACES, SAMPLING, Change, record, refused
from fedlora.runs.rundir import RunDir

EXAMPLE = (
    "server.weighting=uniform",
    "privacy.noise_multiplier=1.0",
    "privacy.delta=1e-5",
    "privacy.max_grad_norm=1.0",
    "privacy.public_examples=40",
)
CLIENT = (
    "server.aggregation_error=false",
    "privacy.unit=client",
    "privacy.noise_multiplier=1.0",
    "privacy.delta=1e-5",
    "privacy.clip_norm=1.0",
)
NODES = ("data.source=nodes", "data.test=t.csv", "partition.name=nodes", "partition.clients=3")


def config(*overrides: str) -> RunConfig:
    return parse_config("", ["name=first", *overrides])


@pytest.mark.parametrize(
    ("before", "after", "odd"),
    [
        # what the program's own messages advise
        ((), ("train.lr=1e-5",), []),
        ((), ("train.clip_norm=1.0", "server.max_norm=3.0", "server.deadline_s=9"), []),
        ((), ("server.node_timeout_s=9", "server.quorum=0.1", "server.clients_per_round=2"), []),
        ((), ("runtime.processes=1", "runtime.cohort=2", "rounds=50", "output=there"), []),
        ((), ("model.name=moved", "data.source=moved.csv"), []),
        # what decides rounds that are done
        ((), ("adapter.rank=2",), ["adapter.rank"]),
        ((), ("seed=2",), ["seed"]),
        ((), ("data.test_fraction=0.3",), ["data.test_fraction"]),
        ((), ("data.test=t.csv",), ["data.test"]),
        (("data.test=t.csv",), ("data.test=moved.csv",), []),
        ((), ("strategy.name=ffa",), ["strategy.name"]),
        ((), ("train.keep_optimizer=true",), ["train.keep_optimizer"]),  # of which nothing was kept
        (("train.keep_optimizer=true",), ("train.keep_optimizer=false",), []),
        ((), ("train.personal=0",), ["train.personal"]),  # nor of a model of its own
        (("train.personal=1",), ("train.personal=0.5",), []),
        # more clients
        ((), ("partition.clients=9",), ["partition.clients"]),
        (NODES, (*NODES, "partition.clients=4"), []),
        (NODES, (*NODES, "partition.clients=2"), ["partition.clients"]),
        # what a private run's noise was calculated for
        (EXAMPLE, (*EXAMPLE, "train.lr=1e-5", "server.deadline_s=9"), []),
        (EXAMPLE, (*EXAMPLE, "train.batch_size=3"), ["train.batch_size"]),
        (EXAMPLE, (*EXAMPLE, "train.epochs=3"), ["train.epochs"]),
        (EXAMPLE, (*EXAMPLE, "server.fraction=0.5"), ["server.fraction"]),
        (EXAMPLE, (*EXAMPLE, "data.source=moved.csv"), ["data.source"]),  # nothing pins it
        (CLIENT, (*CLIENT, "train.batch_size=3", "train.clip_norm=1.0"), []),
        (CLIENT, (*CLIENT, "server.clients_per_round=3"), ["server.clients_per_round"]),
        (CLIENT, (*CLIENT, "privacy.noise_multiplier=0.5"), ["privacy.noise_multiplier"]),
        ((*CLIENT, *NODES), (*CLIENT, *NODES, "partition.clients=4"), ["partition.clients"]),
    ],
)
def test_what_decides_the_rounds_to_come_may_change(
    before: tuple[str, ...], after: tuple[str, ...], odd: list[str]
) -> None:
    assert refused(config(*before), config(*after)) == odd


def test_every_place_that_is_named_is_a_key() -> None:
    names = {*flat_keys(config(*EXAMPLE, "selection.patience=2")), *RunConfig.model_fields}
    assert names >= {*MACHINE, *PLACES, *FROM_NOW_ON, *SAMPLING, *(key for keys in MECHANISM.values() for key in keys)}


def test_a_change_of_a_round_that_was_never_done_did_not_happen() -> None:
    first, second, third = (config(f"train.lr={lr}") for lr in (0.1, 0.2, 0.3))
    one = record([], first, second, done=4)
    assert one == [Change(5, "train.lr", 0.1, 0.2)]
    assert record(one, second, third, done=4) == [Change(5, "train.lr", 0.1, 0.3)]
    assert record(one, second, first, done=4) == []
    assert record(one, second, third, done=5) == [*one, Change(6, "train.lr", 0.2, 0.3)]
    assert record(one, second, config("train.lr=0.2", "rounds=99", "runtime.threads=3", "model.name=x"), done=7) == one


def test_more_rounds_change_those_to_come_under_a_schedule() -> None:
    for schedule, told in (("constant", []), ("cosine", [Change(5, "rounds", 10, 20)])):
        first, second = (config(f"train.schedule={schedule}", f"rounds={rounds}") for rounds in (10, 20))
        assert refused(first, second) == []
        assert record([], first, second, done=4) == told


def state(number: int) -> GlobalState:
    return GlobalState(AdapterState({"m": LoraPair(torch.ones(2, 3), torch.ones(4, 2), 2.0)}, {}), 7, number)


def test_a_run_keeps_what_was_changed_and_from_which_round_on(tmp_path: Path) -> None:
    output = f"output={json.dumps(str(tmp_path))}"
    run = RunDir.create(config(output, "train.lr=0.5"))
    run.append_metrics({"round": 3})
    run.checkpoints.save(state(3))
    with raises(RunDirError, "config-differs", "adapter.rank was 8 and is now 4"):
        RunDir.open(run.path, config(output, "train.lr=0.5", "adapter.rank=4"))
    with raises(RunDirError, "config-differs", "partition.clients", 9):
        RunDir.open(run.path, config(output, "train.lr=0.5", "partition.clients=9"))
    with raises(RunDirError, "config-differs", "train.lr was 0.5 and is now 0.1"):
        RunDir.open(run.path, config(output, "train.lr=0.1"), same=True)  # as a sweep does
    RunDir.open(run.path, config(output, "train.lr=0.1", "train.clip_norm=1.0")).resume()
    again = RunDir.open(run.path)
    assert list(map(str, again.changes)) == [
        "train.clip_norm from none to 1 at round 4",
        "train.lr from 0.5 to 0.1 at round 4",
    ]
    assert again.config.train.lr == 0.1
    again.resume()
    assert RunDir.open(run.path).changes == again.changes


def test_report_and_compare_say_that_a_run_was_changed(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", [0.5, 0.6])
    changed = make_run(tmp_path / "changed", [0.5, 0.7], "seed=1")
    row = Change(1, "train.lr", 0.5, 0.001).json
    (changed / "config_changes.json").write_text(json.dumps([row]))
    found = compare([plain, changed])
    assert len(found.groups) == 2  # no seeds of one setting
    assert any("changed train.lr from 0.5 to 0.001 at round 1" in note for note in found.notes)
    assert "train.lr from 0.5 to 0.001 at round 1" in write_report(RunDir.open(changed)).read_text()
