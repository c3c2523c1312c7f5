"""Parts that clients train and keep: never in a message, through absence, kills and lost replies to the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from support.command_line import invoke
from support.errors import raises
from support.federations import deploy, simulate, timeless
from support.interrupted import (
    deployed_without_a_reply,
    killed_and_redeployed,
    killed_and_resumed,
)
from support.kept import files, newest, raw
from support.tiny_federations import MakeConfig

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import load_aggregator
from fedlora.callbacks import Callback
from fedlora.errors import ConfigError, ReplyError, RuleError
from fedlora.evaluation.baselines import local_only
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.flower_strategy import FedLoraStrategy
from fedlora.report import write_report
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.state_io import unpack
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import open_workspace

PERSONAL = ("evaluation.on=clients", "evaluation.min_examples=2", "runtime.cohort=1", "runtime.prefix_cache=off")
FEDSA = ("strategy.name=fedsa", *PERSONAL)


def at_nodes(folder: Path, outcome: RunOutcome) -> Path:
    return folder / "kept" / outcome.rundir.run_id


def same_end(one: RunOutcome, other: RunOutcome, *uncounted: str) -> None:
    """The same adapter and record, but for traffic: `uncounted`, and that of evaluations, whose heads nobody counts."""
    mine, theirs = one.state.adapter.tensors(), other.state.adapter.tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for record, again in zip(timeless(one.records), timeless(other.records), strict=True):
        for line in (record, again):
            for key in uncounted:
                line.pop(key, None)
            for key in ("bytes_up", "bytes_down"):
                line.get("federated", {}).pop(key, None)
        assert record == again


RESUMED = ("bytes_down",)  # what clients held is sent again


@pytest.mark.slow
@pytest.mark.parametrize(
    "keep", [pytest.param("['B','dense']", marks=pytest.mark.slow), "['*layer.1.*','classifier.bias']"]
)
def test_what_is_kept_is_in_no_message_and_all_pools_come_to_the_same(
    tiny_config: MakeConfig, messages: list[Message], tmp_path: Path, keep: str
) -> None:
    keys = (f"strategy={{name='keep',keep={keep}}}", *PERSONAL, "rounds=2")
    grid = deploy(tiny_config(*keys, name="grid"), ledgers=tmp_path)
    assert len(messages) > 20
    sent = [raw(message) for message in messages]
    start = open_workspace(grid.rundir.config).base.initial_adapter(grid.rundir.config.seed).tensors()
    for client_id in range(4):
        kept = newest(at_nodes(tmp_path, grid), client_id)
        for name, value in kept.items():
            assert not torch.equal(value, start[name])
            assert not any(value.numpy().tobytes() in content for content in sent)
    shared = next(value for name, value in grid.state.adapter.tensors().items() if name not in kept)
    assert any(shared.numpy().tobytes() in content for content in sent)  # by the evaluation: the search can find
    here = simulate(tiny_config(*keys, name="here"))
    same_end(here, grid)
    assert files(here.rundir.clients_dir) == files(at_nodes(tmp_path, grid))


@pytest.mark.slow
def test_one_client_that_keeps_parts_trains_as_one_that_sends_all(tiny_config: MakeConfig) -> None:
    alone = (*PERSONAL, "partition.clients=1")
    whole = simulate(tiny_config(*alone, name="whole"))
    kept = simulate(tiny_config(*alone, "strategy.name=fedsa", name="kept"))
    personal = kept.state.adapter.with_tensors(newest(kept.rundir.clients_dir, 0)).tensors()
    assert all(torch.equal(personal[name], value) for name, value in whole.state.adapter.tensors().items())
    for mine, theirs in zip(kept.records, whole.records, strict=True):
        assert mine["federated"]["figures"] == theirs["federated"]["figures"]


@pytest.mark.slow
def test_clients_are_measured_and_exported_with_what_they_keep(tiny_config: MakeConfig, tmp_path: Path) -> None:
    outcome = simulate(tiny_config(*FEDSA, "train.lr=0.05"))
    workspace, last = open_workspace(outcome.rundir.config), outcome.records[-1]["federated"]
    apart = workspace.data.apart["test"]
    for client_id in range(4):
        personal = outcome.state.adapter.with_tensors(newest(outcome.rundir.clients_dir, client_id))
        for adapter, figures in ((personal, last), (outcome.state.adapter, last["shared"])):
            workspace.base.write(adapter)
            own = evaluate(workspace.base, workspace.task, apart.examples, indices=apart.clients[client_id]).overall
            assert figures["clients"][str(client_id)]["accuracy"] == own["accuracy"]
            assert figures["clients"][str(client_id)]["loss"] == pytest.approx(own["loss"])
    first = outcome.records[0]["federated"]
    assert {key: first[key] for key in first["shared"]} == first["shared"]  # before anybody has trained
    assert last["clients"] != last["shared"]["clients"]
    words = ["export", str(outcome.rundir.path), str(tmp_path / "own"), "--client", "2"]
    assert "adapter of client 2 of round 3 is in" in invoke(*words).output
    exported = load_file(tmp_path / "own" / "adapter_model.safetensors")
    mine = outcome.state.adapter.with_tensors(newest(outcome.rundir.clients_dir, 2)).tensors()
    assert len(exported) == len(mine)
    for name, value in mine.items():
        module, mark, factor = name.rpartition(":")
        theirs = f"{module}.lora_{factor}.weight" if mark else name
        assert torch.equal(exported[f"base_model.model.{theirs}"], value)
    refused = invoke(*words[:2], tmp_path / "nobody", "--client", "9")
    assert refused.exit_code == 1
    assert "has no model of client 9's own" in refused.output


@pytest.mark.slow
@pytest.mark.parametrize("key", ["strategy.name=fedsa", "train.personal=0.5"])
def test_a_client_that_has_not_trained_has_the_shared_model(tiny_config: MakeConfig, tmp_path: Path, key: str) -> None:
    outcome = simulate(tiny_config(key, *PERSONAL, "server.fraction=0.5", "rounds=1", "train.lr=0.05"))
    last = outcome.records[-1]
    own, shared = last["federated"]["clients"], last["federated"]["shared"]["clients"]
    assert len(last["answered"]) == 2
    for client_id in range(4):
        trained = client_id in last["answered"]
        assert (own[str(client_id)] != shared[str(client_id)]) == trained
        words = ["export", str(outcome.rundir.path), str(tmp_path / str(client_id)), "--client", str(client_id)]
        said = invoke(*words)
        assert (said.exit_code == 0) == trained
        assert trained or "either it has not trained" in said.output


@pytest.mark.slow
def test_a_report_shows_each_clients_own_model_beside_the_others(tiny_config: MakeConfig) -> None:
    outcome = simulate(tiny_config(*FEDSA, "train.lr=0.05"))
    workspace = open_workspace(outcome.rundir.config)
    alone = local_only(workspace)
    outcome.rundir.write_json("baselines.json", {"local_only": alone})
    page = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", write_report(outcome.rundir).read_text("utf-8")))
    assert "Against the shared model" in page
    assert "Against the model trained alone" in page
    assert "trained alone, worst tenth of the clients" in page
    shared, own = outcome.records[-1]["federated"]["shared"]["clients"], outcome.records[-1]["federated"]["clients"]
    gain = sum(own[k]["accuracy"] > shared[k]["accuracy"] for k in own)
    lose = sum(own[k]["accuracy"] < shared[k]["accuracy"] for k in own)
    assert f"{gain} of 4 clients gain by a model of their own and {lose} lose" in page
    apart = workspace.data.apart["test"]
    assert all("own" not in part for part in (alone["best"], alone["mean"], alone["worst"]))
    assert [row["client"] for row in alone["clients"]] == [0, 1, 2, 3]
    assert all(0 <= row["own"]["accuracy"] <= 1 for row in alone["clients"])
    counted = [row["own"]["accuracy"] * len(apart.clients[row["client"]]) for row in alone["clients"]]
    assert all(count == pytest.approx(round(count)) for count in counted)  # shares of what the client keeps apart


@pytest.mark.parametrize(
    ("rule", "killed"),
    [
        ("fedsa", 2),
        pytest.param("fedsa", 3, marks=pytest.mark.slow),
        pytest.param("fedrep", 2, marks=pytest.mark.slow),
        pytest.param("fedrep", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_and_resumed_run_ends_with_the_same_bytes_kept_parts_included(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, rule: str, killed: int
) -> None:
    """Half of the clients are away in each round, and the round that is repeated was trained before."""
    keys = (f"strategy.name={rule}", *PERSONAL, "server.fraction=0.5", "rounds=4")
    straight = simulate(tiny_config(*keys, name="straight"))
    assert len({tuple(record["answered"]) for record in straight.records[1:]}) > 1
    resumed = killed_and_resumed(tiny_config(*keys, name="killed"), killed, monkeypatch)
    same_end(straight, resumed, *RESUMED)
    kept = files(straight.rundir.clients_dir)
    assert len({name.split("/")[0] for name in kept}) == 4
    assert kept == files(resumed.rundir.clients_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "killed"), [("fedsa", 2), ("fedsa", 3), ("fedrep", 3)])
def test_a_deployed_run_that_is_killed_and_resumed_ends_with_the_same_bytes(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: str, killed: int
) -> None:
    keys = (f"strategy.name={rule}", *PERSONAL, "server.fraction=0.5", "rounds=4")
    straight = deploy(tiny_config(*keys, name="straight"), ledgers=tmp_path / "straight")
    config = tiny_config(*keys, name="killed")
    resumed = killed_and_redeployed(config, killed, tmp_path / "killed", monkeypatch)
    same_end(straight, resumed, *RESUMED)
    assert files(at_nodes(tmp_path / "straight", straight)) == files(at_nodes(tmp_path / "killed", resumed))


@pytest.mark.slow
def test_a_client_whose_reply_was_lost_goes_on_from_what_the_server_has_used(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has trained, and its store knows: without the reply this counts as never done, and a replay is the same."""
    run = deployed_without_a_reply(tiny_config(*FEDSA, "rounds=4", name="run"), tmp_path, monkeypatch)
    assert [record["answered"] for record in run.records[1:]] == [[0, 1, 2, 3], [0, 2, 3], *[[0, 1, 2, 3]] * 2]
    again = simulate(tiny_config(*FEDSA, "rounds=4", name="again"), replay=run.records)
    mine, theirs = run.state.adapter.tensors(), again.state.adapter.tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert files(again.rundir.clients_dir) == files(at_nodes(tmp_path, run))


@pytest.mark.nightly
def test_in_several_processes_clients_keep_the_same(tiny_config: MakeConfig) -> None:
    keys = (*FEDSA, "server.fraction=0.75")
    here = simulate(tiny_config(*keys, name="here"))
    two = simulate(tiny_config(*keys, "runtime.processes=2", name="two"))
    same_end(here, two)
    assert files(here.rundir.clients_dir) == files(two.rundir.clients_dir)


PRIVATE = {
    "example": ("privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}",),
    "client": ("privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}",),
}


@pytest.mark.slow
@pytest.mark.parametrize("unit", PRIVATE)
def test_private_clients_keep_parts_too(
    tiny_config: MakeConfig, same_secrets: Callable[[], None], tmp_path: Path, unit: str
) -> None:
    """The kept part comes of the same noisy steps (example), or leaves in no update and is not noised (client)."""
    keys = ("strategy.name=fedsa", *PRIVATE[unit], "server.weighting=uniform", "server.aggregation_error=false")
    keys += PERSONAL[2:]
    same_secrets()
    here = simulate(tiny_config(*keys, name="here"))
    same_secrets()
    grid = deploy(tiny_config(*keys, name="grid"), ledgers=tmp_path)
    same_end(here, grid)
    assert len(files(here.rundir.clients_dir)) == 4 * 3
    start = open_workspace(here.rundir.config).base.initial_adapter(here.rundir.config.seed)
    assert all(torch.equal(pair.B, start.pairs[name].B) for name, pair in here.state.adapter.pairs.items())
    if unit == "client":
        assert files(here.rundir.clients_dir) == files(at_nodes(tmp_path, grid))


@pytest.mark.slow
def test_a_private_client_that_fails_keeps_what_it_had(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under user-level privacy its update changes nothing; no more does what it keeps."""
    from fedlora.federation import client_training

    real = client_training.train_cohort

    def failing(base: Any, task: Any, examples: Any, jobs: Any, configs: Any) -> Any:
        found = real(base, task, examples, jobs, configs)
        return [RuntimeError("broken") if job.round == 3 else one for job, one in zip(jobs, found, strict=True)]

    monkeypatch.setattr(client_training, "train_cohort", failing)
    keys = ("strategy.name=fedsa", *PRIVATE["client"], "server.aggregation_error=false", *PERSONAL[2:])
    outcome = simulate(tiny_config(*keys))
    for client_id in range(4):
        folder = outcome.rundir.clients_dir / f"client-{client_id}"
        third, second = (unpack((folder / f"00000{n}-00000{n - 1}.safetensors").read_bytes())[0] for n in (3, 2))
        assert all(torch.equal(third[name], value) for name, value in second.items())


@pytest.mark.slow
def test_a_client_whose_kept_part_is_lost_is_left_out_by_name(tiny_config: MakeConfig) -> None:
    outcome = simulate(tiny_config(*FEDSA, "rounds=1"))
    (file,) = (outcome.rundir.clients_dir / "client-2").iterdir()
    file.unlink()
    config = tiny_config(*FEDSA, "rounds=2")
    resumed = run_simulation(config, RunDir.open(outcome.rundir.path), Callback(), resume=True)
    assert resumed.records[-1]["answered"] == [0, 1, 3]
    assert "put its store back" in resumed.records[-1]["refused"]["2"]
    assert "put its store back" in resumed.records[-1]["federated"]["left_out"]["2"]


def test_a_node_keeps_nothing_that_the_runs_rule_does_not_let_it_keep(tiny_config: MakeConfig) -> None:
    asked: Any = SimpleNamespace(plan=SimpleNamespace(kept={"layer:B": None}), run="ab" * 16)
    with raises(ReplyError, "kept-unasked", "'fedavg'"):
        client_app._store(asked, SimpleNamespace(node_config={}, run_config={}), tiny_config())  # type: ignore[arg-type]


def test_what_would_not_be_measured_or_kept_is_refused(tiny_config: MakeConfig) -> None:
    with raises(ConfigError, "personal-models-not-measured", "evaluation.on = 'clients'"):
        simulate(tiny_config("strategy.name=fedsa"))
    with raises(ConfigError, "best-round-not-kept", "selection.keep = 'last'"):
        simulate(tiny_config(*FEDSA, "selection.metric=loss", name="best"))
    with raises(RuleError, "nothing-kept", "names nothing of the adapter"):
        simulate(tiny_config("strategy={name='keep',keep=['classifier']}", *PERSONAL, name="typo"))
    headless = AdapterState({"layer": LoraPair(torch.ones(2, 4), torch.zeros(3, 2), 1.0)}, {})
    with raises(RuleError, "nothing-kept", "keep another part (A, B)"):
        load_aggregator("keep", {"keep": ["dense"]}).init(headless)
    load_aggregator("fedsa", {}).init(headless)
    with raises(RuleError, "nothing-shared", "share nothing"):
        simulate(tiny_config("strategy={name='keep',keep=['A','B','dense']}", *PERSONAL, name="all"))
    with raises(RuleError, "personal-rule", "keep parts of what they train"):
        FedLoraStrategy("fedsa", alpha=8)
