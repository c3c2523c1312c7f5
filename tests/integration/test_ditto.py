"""Ditto: each client's own model beside the shared one. Li, Hu, Beirami, Smith, ICML 2021, arXiv 2012.04221."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from flwr.app import Message
from safetensors.torch import load_file
from support.command_line import succeeds
from support.errors import raises
from support.federations import deploy, simulate, timeless, weights
from support.interrupted import (
    deployed_without_a_reply,
    killed_and_redeployed,
    killed_and_resumed,
)
from support.kept import files, newest, raw
from support.states import gap
from support.tiny_federations import MakeConfig

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators import ClientPlan
from fedlora.callbacks import Callback
from fedlora.errors import ConfigError, FedloraError, PrivacyError, ReplyError, TrainingError
from fedlora.federation import client_store, client_training
from fedlora.federation.client_store import ClientStore, divided
from fedlora.federation.client_training import own_model_of, start_of
from fedlora.federation.protocol import TrainRequest
from fedlora.federation.run import RunOutcome
from fedlora.rng import derive
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.state_io import unpack
from fedlora.training.cohort import train
from fedlora.training.evaluate import evaluate
from fedlora.training.job import TrainJob
from fedlora.training.workspace import open_workspace

ALIKE = ("evaluation.on=clients", "evaluation.min_examples=2", "runtime.cohort=1", "runtime.prefix_cache=off")
DITTO = (*ALIKE, "train.personal=0.5")


def own(outcome: RunOutcome, client_id: int) -> AdapterState:
    return outcome.state.adapter.with_tensors(divided(newest(outcome.rundir.clients_dir, client_id))[0])


def require_exported(folder: Path, adapter: AdapterState) -> None:
    exported, mine = load_file(folder / "adapter_model.safetensors"), adapter.tensors()
    assert len(exported) == len(mine)
    for name, value in mine.items():
        module, mark, factor = name.rpartition(":")
        assert torch.equal(exported[f"base_model.model.{f'{module}.lora_{factor}.weight' if mark else name}"], value)


@pytest.mark.slow
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
    """A step shrinks v - w by 1 - eta lambda and adds -eta grad: with eta lambda fixed, |v - w| goes as 1 / lambda, up
    to the loss's curvature over lambda."""
    apart = []
    for weight in (1e3, 1e4, 1e5):
        keys = ("train.optimizer=sgd", f"train.lr={0.5 / weight}", f"train.personal={weight}", "train.steps=30")
        outcome = simulate(tiny_config(*ALIKE, *keys, "rounds=1", "model.dtype=float64", name=f"at{weight:g}"))
        start = open_workspace(outcome.rundir.config).base.initial_adapter(outcome.rundir.config.seed)
        apart.append(gap(own(outcome, 0), start))
    assert apart[0] > 1e-4
    for (near, nearer), within in zip(pairwise(apart), (0.05, 0.005), strict=True):
        assert nearer == pytest.approx(near / 10, rel=within)


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
    resumed = killed_and_resumed(tiny_config(*keys, name="killed"), 3, monkeypatch)
    assert gap(straight.state.adapter, resumed.state.adapter) == 0.0
    assert files(straight.rundir.clients_dir) == files(resumed.rundir.clients_dir)


@pytest.mark.nightly
def test_the_shared_model_and_its_figures_are_the_same_to_the_byte_in_cohorts_and_processes(
    tiny_config: MakeConfig,
) -> None:
    keys = ("evaluation.on=clients", "evaluation.min_examples=2", "train.proximal_mu=0.1", "adapter.dropout=0.1")
    plain, ditto, two = (
        simulate(tiny_config(*keys, *more, name=f"run{k}"))
        for k, more in enumerate([(), ("train.personal=0.5",), ("train.personal=0.5", "runtime.processes=2")])
    )
    for outcome in (ditto, two):
        assert weights(outcome) == weights(plain)
        for line, without in zip(outcome.records, plain.records, strict=True):
            for key in ("answered", "train_loss", "bytes_up"):
                assert line.get(key) == without.get(key)
            assert line["federated"]["shared"]["figures"] == without["federated"]["figures"]
    assert files(ditto.rundir.clients_dir) == files(two.rundir.clients_dir)
    assert all(gap(own(ditto, k), ditto.state.adapter) > 1e-4 for k in range(4))


@pytest.mark.slow
def test_what_a_client_keeps_is_read_once_a_round(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many need it: the start, the own model's start and what topk has still to send."""
    reads: list[bytes] = []
    real = client_store.unpack
    monkeypatch.setattr(client_store, "unpack", lambda data: (reads.append(data), real(data))[1])
    keys = (*DITTO, "wire={up='topk', fraction=0.2}", "evaluation.every=3", "rounds=3")
    simulate(tiny_config(*keys))
    assert len(reads) == 4 * 2 + 4, "four clients in rounds 2 and 3, and the evaluation at the end"


@pytest.mark.slow
def test_beside_it_a_client_keeps_what_topk_did_not_send(tiny_config: MakeConfig) -> None:
    keys = (*ALIKE, "wire={up='topk', fraction=0.2}", "server.fraction=0.75")
    plain = simulate(tiny_config(*keys, name="plain"))
    ditto = simulate(tiny_config(*keys, "train.personal=0.5", name="ditto"))
    assert weights(ditto) == weights(plain)
    for client_id in range(4):
        (mine, _, residual), (nothing, _, alone) = (
            divided(newest(one.rundir.clients_dir, client_id)) for one in (ditto, plain)
        )
        assert not nothing
        assert mine.keys() == ditto.state.adapter.tensors().keys()
        assert residual.keys() == alone.keys()
        assert all(torch.equal(value, alone[name]) for name, value in residual.items())


@pytest.mark.slow
@pytest.mark.parametrize("killed", [2, 3])
def test_a_deployed_run_that_is_killed_and_resumed_has_the_same_models(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, killed: int
) -> None:
    keys = (*DITTO, "server.fraction=0.5", "rounds=4")
    straight = deploy(tiny_config(*keys, name="straight"), ledgers=tmp_path / "straight")
    config = tiny_config(*keys, name="killed")
    resumed = killed_and_redeployed(config, killed, tmp_path / "killed", monkeypatch)
    assert gap(straight.state.adapter, resumed.state.adapter) == 0.0
    kept = [files(tmp_path / name / "kept") for name in ("straight", "killed")]
    assert kept[0] == kept[1]
    assert len({name.split("/")[0] for name in kept[0]}) == 4


@pytest.mark.slow
def test_a_model_of_a_round_whose_reply_was_lost_counts_as_never_trained(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = deployed_without_a_reply(tiny_config(*DITTO, "rounds=4", name="run"), tmp_path, monkeypatch)
    assert [record["answered"] for record in run.records[1:]] == [[0, 1, 2, 3], [0, 2, 3], *[[0, 1, 2, 3]] * 2]
    again = simulate(tiny_config(*DITTO, "rounds=4", name="again"), replay=run.records)
    assert gap(run.state.adapter, again.state.adapter) == 0.0
    assert files(again.rundir.clients_dir) == files(tmp_path / "kept" / run.rundir.run_id)


@pytest.mark.slow
def test_a_client_whose_own_model_fails_or_is_lost_is_left_out_by_name(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client_training.train_cohort

    def failing(base: Any, task: Any, examples: Any, jobs: Any, configs: Any) -> Any:
        found = real(base, task, examples, jobs, configs)
        broken = TrainingError("the loss is nan", code="loss-not-finite")
        return [
            broken if (job.toward is not None and (job.round, job.client_id) == (2, 1)) else one
            for job, one in zip(jobs, found, strict=True)
        ]

    monkeypatch.setattr(client_training, "train_cohort", failing)
    outcome = simulate(tiny_config(*DITTO, "rounds=3"))
    assert [record["answered"] for record in outcome.records[1:]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert "its own model (train.personal): the loss is nan" in outcome.records[2]["refused"]["1"]
    (outcome.rundir.clients_dir / "client-1" / "000003-000001.safetensors").unlink()
    config = tiny_config(*DITTO, "rounds=4")
    resumed = run_simulation(config, RunDir.open(outcome.rundir.path), Callback(), resume=True)
    assert resumed.records[-1]["answered"] == [0, 2, 3]
    assert "put its store back" in resumed.records[-1]["refused"]["1"]
    assert "put its store back" in resumed.records[-1]["federated"]["left_out"]["1"]


def test_what_a_client_keeps_is_where_its_own_model_starts_and_never_the_shared_one(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config, store, shared = tiny_config(*DITTO), ClientStore(tmp_path), AdapterState({}, {"w": torch.ones(2)})
    first, later = (TrainRequest(ClientPlan(shared), number, 0, kept_round=number - 1) for number in (1, 2))
    assert torch.equal(own_model_of(first, store).dense["w"], torch.ones(2)), "it begins with the shared one"
    store.save(0, 1, {"w": torch.zeros(2)}, 0)
    assert start_of(later, store, config)[0] is shared
    assert torch.equal(own_model_of(later, store).dense["w"], torch.zeros(2))
    store.save(0, 1, {"w": torch.zeros(3)}, 0)
    with raises(ReplyError, "kept-part-differs", "client 0 kept 'w' (3,)"):
        own_model_of(later, store)


@pytest.mark.slow
def test_a_client_whose_own_model_has_another_shape_is_left_out_by_name(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(request: Any, store: Any) -> AdapterState:
        if request.client_id == 1:
            raise client_store.kept_differs(1, "w", torch.zeros(3))
        return own_model_of(request, store)

    monkeypatch.setattr(client_training, "own_model_of", differs)
    record = simulate(tiny_config(*DITTO, "rounds=1", "train.steps=1")).records[1]
    assert record["answered"] == [0, 2, 3]
    assert "asked to keep something else" in record["refused"]["1"]


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
    succeeds("export", outcome.rundir.path, tmp_path / "out", "--client", "2")
    require_exported(tmp_path / "out", own(outcome, 2))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["{name='fedavg'}", "{name='ravan', heads=2}"])
def test_a_node_exports_its_own_model_which_was_in_no_message(
    tiny_config: MakeConfig, messages: list[Message], tmp_path: Path, rule: str
) -> None:
    keys = (*DITTO, f"strategy={rule}", "rounds=2")
    sites = [tmp_path / f"site-{k}" for k in range(4)]
    nodes = [{"partition-id": k, "ledger": f"{site}/ledger.jsonl"} for k, site in enumerate(sites)]
    for site, node in zip(sites, nodes, strict=True):
        site.mkdir()
        (site / "node-config.toml").write_text(tomli_w.dumps(node))
    grid = deploy(tiny_config(*keys, name="grid"), nodes=nodes)
    sent = [raw(message) for message in messages]
    here = simulate(tiny_config(*keys, name="here"))
    shared = here.state.adapter.tensors()
    assert any(shared["classifier.weight"].numpy().tobytes() in message for message in sent), "the search can find"
    for client_id, site in enumerate(sites):
        words = ["node", "export", str(site), str(grid.rundir.adapter_dir), str(site / "out")]
        succeeds(*words)
        mine = own(here, client_id)
        require_exported(site / "out", mine.plain())
        trained = {name: value for name, value in mine.tensors().items() if not torch.equal(value, shared[name])}
        assert len(trained) > 4
        for value in (*trained.values(), *load_file(site / "out" / "adapter_model.safetensors").values()):
            if not any(torch.equal(value, other) for other in shared.values()):
                assert not any(value.numpy().tobytes() in message for message in sent)


@pytest.mark.parametrize(
    ("keys", "kind", "code"),
    [
        (("evaluation.on=server",), ConfigError, "personal-models-not-measured"),
        (("selection.metric=loss",), ConfigError, "best-round-not-kept"),
        (("strategy.name=fedsa",), ConfigError, "personal-twice"),
        (("strategy.name=flora",), ConfigError, "no-step"),
        (("strategy.name=fedsvd",), ConfigError, "no-step"),
        (("strategy.name=fedsvd", "train.personal=0"), ConfigError, "no-step"),
        (("strategy.name=fslora",), ConfigError, "no-step"),
        (("strategy.name=ffa", "clients.ranks=[2,4]"), ConfigError, "personal-mixed-ranks"),
        (("strategy.name=ffa", "clients.ranks=[2]", "adapter.rank=4"), ConfigError, "personal-mixed-ranks"),
        (("train.loop=json:dumps",), ConfigError, "key-without-effect"),
        (("train.keep_optimizer=true",), ConfigError, "two-optimisers"),
        (("train.optimizer=sgd", "train.lr=1.0", "train.personal=2"), ConfigError, "personal-diverges"),
        (
            ("train.optimizer=sgd", "train.lr=1.0", "train.momentum=0.5", "train.personal=3"),
            ConfigError,
            "personal-diverges",
        ),
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


def test_momentum_allows_larger_steps_towards_the_shared_model(tiny_config: MakeConfig) -> None:
    keys = ("train.optimizer=sgd", "train.lr=1.0", "train.momentum=0.5", "train.personal=2.9")
    assert tiny_config("evaluation.on=clients", *keys).train.personal == 2.9
