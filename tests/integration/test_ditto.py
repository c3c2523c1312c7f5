"""Ditto: each client's own model beside the shared one. Li, Hu, Beirami, Smith, ICML 2021, arXiv 2012.04221."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from support.errors import raises
from support.federations import deploy, forget, simulate, timeless
from support.interrupted import killed_before_checkpoint
from typer.testing import CliRunner

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.callbacks import Callback
from fedlora.cli import app
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, PrivacyError
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.rng import derive
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.state_io import unpack
from fedlora.training.cohort import train
from fedlora.training.evaluate import evaluate
from fedlora.training.job import TrainJob
from fedlora.training.workspace import open_workspace

MakeConfig = Callable[..., RunConfig]
ALIKE = ("evaluation.on=clients", "evaluation.min_examples=2", "runtime.cohort=1", "runtime.prefix_cache=off")
DITTO = (*ALIKE, "train.personal=0.5")


def files(folder: Path) -> dict[str, bytes]:
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def own(outcome: RunOutcome, client_id: int) -> AdapterState:
    newest = sorted((outcome.rundir.clients_dir / f"client-{client_id}").iterdir())[-1]
    return outcome.state.adapter.with_tensors(unpack(newest.read_bytes())[0])


def gap(one: AdapterState, other: AdapterState) -> float:
    theirs = other.tensors()
    return max(float((value - theirs[name]).abs().max()) for name, value in one.tensors().items())


def test_at_0_it_is_a_model_trained_alone_and_the_shared_one_never_knows(tiny_config: MakeConfig) -> None:
    """Each client's rounds one after the other, on its own batches; without the key the run is the same."""
    outcome = simulate(tiny_config(*ALIKE, "train.personal=0", name="own"))
    plain = simulate(tiny_config(*ALIKE, name="plain"))
    assert gap(outcome.state.adapter, plain.state.adapter) == 0.0
    workspace, config = open_workspace(outcome.rundir.config), outcome.rundir.config
    start = workspace.base.initial_adapter(config.seed)
    for client_id, rows in enumerate(workspace.data.clients[:2]):
        alone = start
        for number in range(1, config.rounds + 1):
            seed = derive(config.seed, "train", number, client_id)
            job = TrainJob(alone, ALL_PARTS, rows, seed, round=number, rounds=config.rounds)
            alone = train(workspace.base, workspace.task, workspace.data.train, job, config.train).adapter
        assert gap(own(outcome, client_id), alone) == 0.0
        assert gap(alone, outcome.state.adapter) > 1e-3


@pytest.mark.slow
def test_of_one_client_at_0_both_models_are_one(tiny_config: MakeConfig) -> None:
    outcome = simulate(tiny_config(*ALIKE, "train.personal=0", "partition.clients=1"))
    assert gap(own(outcome, 0), outcome.state.adapter) == 0.0
    line = outcome.records[-1]["federated"]
    assert line["clients"] == line["shared"]["clients"]


@pytest.mark.slow
def test_the_larger_the_weight_the_nearer_is_the_shared_model(tiny_config: MakeConfig) -> None:
    """A step shrinks v - w by 1 - eta lambda and adds -eta grad: after many, |v - w| is |grad| / lambda."""
    apart = []
    for weight in (100.0, 1000.0, 10000.0):
        keys = ("train.optimizer=sgd", f"train.lr={0.5 / weight}", f"train.personal={weight}", "train.steps=30")
        outcome = simulate(tiny_config(*ALIKE, *keys, "rounds=1", "model.dtype=float64", name=f"at{weight:g}"))
        start = open_workspace(outcome.rundir.config).base.initial_adapter(outcome.rundir.config.seed)
        apart.append(gap(own(outcome, 0), start))
    assert apart[0] > 1e-5
    for near, nearer in pairwise(apart):
        assert nearer == pytest.approx(near / 10, rel=0.1)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Message]]:
    """All that passes between the server and nodes, both ways."""
    seen: list[Message] = []
    real = client_app.app.__call__

    class Tapped:
        def __call__(self, message: Message, context: Any) -> Message:
            seen.append(message)
            seen.append(real(message, context))
            return seen[-1]

    monkeypatch.setattr(client_app, "app", Tapped())
    return seen


def raw(message: Message) -> bytes:
    arrays = (array for record in message.content.values() for array in record.values())
    return b"".join(array.data if hasattr(array, "data") else str(array).encode() for array in arrays)


@pytest.mark.slow
def test_a_model_of_its_own_is_in_no_message_and_on_a_grid_it_is_the_same(
    tiny_config: MakeConfig, messages: list[Message], tmp_path: Path
) -> None:
    keys = (*DITTO, "server.fraction=0.75", "wire.up=int8", "rounds=3")
    grid = deploy(tiny_config(*keys, name="grid"), ledgers=tmp_path)
    here = simulate(tiny_config(*keys, name="here"))
    kept = files(here.rundir.clients_dir)
    assert kept
    assert kept == files(tmp_path / "kept" / grid.rundir.run_id)
    sent = [raw(message) for message in messages]
    for content in kept.values():
        for value in unpack(content)[0].values():
            assert not any(value.numpy().tobytes() in message for message in sent)
    assert gap(here.state.adapter, grid.state.adapter) == 0.0
    for mine, theirs in zip(timeless(here.records), timeless(grid.records), strict=True):
        for line in (mine, theirs):
            for key in ("bytes_up", "bytes_down"):
                line["federated"].pop(key, None)
        assert mine == theirs


@pytest.mark.slow
def test_killed_and_resumed_each_has_the_same_model_of_its_own(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = (*DITTO, "server.fraction=0.75", "rounds=4")
    straight = simulate(tiny_config(*keys, name="straight"))
    config = tiny_config(*keys, name="killed")
    rundir = RunDir.create(config)
    with killed_before_checkpoint(3, monkeypatch):
        run_simulation(config, rundir, Callback())
    forget(config)
    resumed = run_simulation(config, RunDir.open(rundir.path), Callback(), resume=True)
    assert gap(straight.state.adapter, resumed.state.adapter) == 0.0
    assert files(straight.rundir.clients_dir) == files(resumed.rundir.clients_dir)


@pytest.mark.slow
def test_in_a_cohort_as_alone_with_other_rules_too(tiny_config: MakeConfig) -> None:
    for rule in ("{name='ffa'}", "{name='rolora'}", "{name='feddyn'}"):
        keys = (*DITTO[:2], "train.personal=0.5", f"strategy={rule}", "model.dtype=float64", "rounds=3")
        one, four = (simulate(tiny_config(*keys, f"runtime.cohort={k}", name=f"of{k}")) for k in (1, 4))
        assert max(gap(own(one, k), own(four, k)) for k in range(4)) < 1e-10
        assert min(gap(own(one, k), one.state.adapter) for k in range(4)) > 1e-4


@pytest.mark.slow
def test_each_is_measured_and_exported_with_its_own(tiny_config: MakeConfig, tmp_path: Path) -> None:
    outcome = simulate(tiny_config(*DITTO, "train.lr=0.05"))
    workspace, last = open_workspace(outcome.rundir.config), outcome.records[-1]["federated"]
    apart = workspace.data.apart["test"]
    for client_id in range(4):
        for adapter, figures in ((own(outcome, client_id), last), (outcome.state.adapter, last["shared"])):
            workspace.base.write(adapter)
            rows = apart.clients[client_id]
            found = evaluate(workspace.base, workspace.task, apart.examples, indices=rows).overall
            assert figures["clients"][str(client_id)]["loss"] == pytest.approx(found["loss"])
    done = CliRunner().invoke(app, ["export", str(outcome.rundir.path), str(tmp_path / "out"), "--client", "2"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("keys", "kind", "code"),
    [
        (("evaluation.on=server",), ConfigError, "personal-models-not-measured"),
        (("selection.metric=loss",), ConfigError, "best-round-not-kept"),
        (("strategy.name=fedsa",), ConfigError, "personal-twice"),
        (("strategy.name=flora",), ConfigError, "no-step"),
        (("strategy.name=fedsvd",), ConfigError, "no-step"),
        (("strategy.name=ffa", "clients.ranks=[2,4]"), ConfigError, "personal-mixed-ranks"),
        (("train.keep_optimizer=true",), ConfigError, "two-optimisers"),
        (("train.optimizer=sgd", "train.lr=1.0", "train.personal=2"), ConfigError, "personal-diverges"),
        (
            ("privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}", "evaluation.on=server"),
            PrivacyError,
            "personal-not-private",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    tiny_config: MakeConfig, keys: tuple[str, ...], kind: type[FedloraError], code: str
) -> None:
    private = ("server.aggregation_error=false",) if code == "personal-not-private" else ()
    with raises(kind, code):
        simulate(tiny_config("evaluation.on=clients", "train.personal=0.5", *keys, *private))
