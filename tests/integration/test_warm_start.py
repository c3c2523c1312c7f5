"""A federation goes on from an adapter that somebody trained: another run, or plain PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.errors import raises
from support.federations import Said, require_same
from support.federations import simulate as run
from support.interrupted import cut
from support.on_a_grid import grid_of, serve_on
from support.peft_adapters import train_by_peft
from support.tiny_federations import MakeConfig

import fedlora
from fedlora.api import train
from fedlora.audit.observed_trainer import first_job
from fedlora.errors import ModelError, RuleError, RunDirError
from fedlora.evaluation.baselines import local_only
from fedlora.evaluation.pretrained_adapter import Source, load_for
from fedlora.federation.given_adapter import read_start
from fedlora.federation.run import RunOutcome
from fedlora.flower.flower_strategy import initial_arrays
from fedlora.model.export import peft_name
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import refuse_early
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import open_workspace

PRIVATE = ("server.weighting=uniform", "privacy.public_examples=40", "privacy.delta=1e-3", "privacy.max_grad_norm=0.5")


@pytest.fixture
def by_peft(tiny_bert: Path, tmp_path: Path) -> Path:
    """An adapter of plain PEFT's."""
    train_by_peft(tiny_bert, tmp_path / "by-peft")
    return tmp_path / "by-peft"


@pytest.fixture
def first(tiny_config: MakeConfig) -> RunOutcome:
    """A run that has learnt something."""
    return run(tiny_config("rounds=2", name="first"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", ["fedavg", "flora", *(pytest.param(rule, marks=pytest.mark.nightly) for rule in ("ffa", "rolora", "fedex"))]
)
def test_a_run_begins_where_the_other_ended(rule: str, first: RunOutcome, tiny_config: MakeConfig) -> None:
    told = Said()
    config = tiny_config(f"adapter.start='{first.rundir.path}'", "rounds=1", f"strategy.name={rule}", name=rule)
    second = run(config, told)
    before, after = first.records[-1], second.records[0]
    assert (after["accuracy"], after["loss"]) == (before["accuracy"], pytest.approx(before["loss"], rel=1e-6))
    assert before["loss"] < first.records[0]["loss"] - 0.01, "and not where it began"
    if rule == "ffa":  # whose A nobody trains
        for name, value in first.adapter.tensors(("A",)).items():
            assert torch.equal(second.adapter.tensors()[name], value)
    start = read_start(open_workspace(config))
    assert start is not None
    assert second.rundir.provenance.start == start.digest
    assert json.loads((second.rundir.adapter_dir / "fedlora.json").read_text())["provenance"]["start"] == start.digest
    assert f"| Started from | the adapter first ({start.digest[:16]}) |" in _card(second)
    assert f"the run begins with the adapter in {str(first.rundir.adapter_dir)!r}" in told.lines
    assert "starting from the adapter first." in second.rundir.report.read_text()


def _card(outcome: RunOutcome) -> str:
    return (outcome.rundir.adapter_dir / "README.md").read_text()


@pytest.mark.slow
def test_a_resumed_run_needs_the_folder_no_more(by_peft: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    start = f"adapter.start='{by_peft}'"
    whole = run(tiny_config(start, name="whole"))
    config = tiny_config(start, name="cut")
    killed = RunDir.create(config)
    cut(killed, 2)
    shutil.rmtree(by_peft)
    done = train(config, folder=RunDir.open(killed.path, config))
    one, other = (found.adapter_dir / "adapter_model.safetensors" for found in (whole.rundir, done))
    assert one.read_bytes() == other.read_bytes()
    assert done.provenance.start == whole.rundir.provenance.start is not None
    with raises(RunDirError, "config-differs", "adapter.start"):
        RunDir.open(killed.path, tiny_config(f"adapter.start='{tmp_path}'", name="cut"))
    with raises(RunDirError, "not-an-adapter", by_peft):
        train(tiny_config(start, name="new"))
    assert not (tmp_path / "runs" / "new").exists()


@pytest.mark.slow
def test_a_resumed_run_replays_another_without_the_folder(by_peft: Path, tiny_config: MakeConfig) -> None:
    start = f"adapter.start='{by_peft}'"
    keys = ("runtime.cohort=1", "runtime.processes=1")
    whole = run(tiny_config(start, *keys, name="whole"))
    config = tiny_config(start, *keys, name="cut")
    killed = RunDir.create(config)
    cut(killed, 2)
    shutil.rmtree(by_peft)
    done = train(config, folder=RunDir.open(killed.path, config), replay=whole.rundir.path)
    assert done.finished
    assert done.provenance.start == whole.rundir.provenance.start


@pytest.mark.slow
def test_a_run_that_saved_no_state_reads_the_folder_again(by_peft: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config(f"adapter.start='{by_peft}'", "rounds=1", name="cut")
    rundir = RunDir.create(config)
    rundir.pin(open_workspace(config).pins)
    shutil.move(by_peft, by_peft.with_name("elsewhere"))
    with raises(RunDirError, "not-an-adapter", by_peft):
        train(config, folder=RunDir.open(rundir.path, config))
    shutil.move(by_peft.with_name("elsewhere"), by_peft)
    assert train(config, folder=RunDir.open(rundir.path, config)).provenance.start is not None


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", pytest.param("flora", marks=pytest.mark.nightly)])
def test_nodes_are_sent_the_adapter_and_need_no_such_folder(rule: str, by_peft: Path, tiny_config: MakeConfig) -> None:
    keys = (f"strategy.name={rule}", "rounds=2", "runtime.cohort=1", "runtime.prefix_cache=off")
    here = run(tiny_config(*keys, f"adapter.start='{by_peft}'", name="here"))
    config = tiny_config(*keys, f"adapter.start='{by_peft}'", name="grid")
    nodes = grid_of(tiny_config(*keys, "adapter.start='/not/on/this/node'", name="grid"))
    require_same(here, serve_on(nodes, config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit", ["privacy.noise_multiplier=1.0", "privacy={unit='client', delta=1e-3, noise_multiplier=1.0, clip_norm=1.0}"]
)
def test_a_claim_is_of_this_runs_training_alone(unit: str, by_peft: Path, tiny_config: MakeConfig) -> None:
    clients = "server.weighting=uniform", "server.aggregation_error=false"
    keys = (unit, *(clients if "unit" in unit else PRIVATE), "rounds=1")
    plain = run(tiny_config(*keys, name="plain")).rundir.read_json("result.json")["privacy"]
    outcome = run(tiny_config(*keys, f"adapter.start='{by_peft}'", name="warm"))
    claim = outcome.rundir.read_json("result.json")["privacy"]
    assert claim["epsilon"] == plain["epsilon"]
    assert "adapter.start" not in plain["statement"]
    assert "covers the data that this run trained on, and not what the adapter that it began with" in claim["statement"]
    assert "the two add up" in _card(outcome)
    assert "the two add up" in outcome.rundir.report.read_text()


@pytest.mark.slow
def test_whoever_goes_by_the_runs_start_goes_by_the_adapter(by_peft: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config(f"adapter.start='{by_peft}'")
    workspace = open_workspace(config)
    start = read_start(workspace)
    assert start is not None
    wanted = start.adapter.tensors()
    job = first_job(open_workspace(tiny_config(f"adapter.start='{by_peft}'", "privacy.noise_multiplier=1.0", *PRIVATE)))
    assert all(torch.equal(value, wanted[name]) for name, value in job.adapter.tensors().items())
    arrays = initial_arrays(config)
    for name, value in wanted.items():
        assert torch.equal(torch.from_numpy(arrays[peft_name(name)].numpy()), value), name
    still = ("train.optimizer=sgd", "train.lr=1e-30", "train.steps=1")
    found, cold = (
        local_only(open_workspace(tiny_config(*still, *keys)), [0])["clients"][0]["loss"]
        for keys in ((f"adapter.start='{by_peft}'",), ())
    )
    assert found == pytest.approx(run(tiny_config(*still, f"adapter.start='{by_peft}'")).records[0]["loss"], rel=1e-6)
    assert abs(found - cold) > 1e-3


@pytest.mark.slow
def test_a_rule_that_would_lose_it_is_refused_before_anything_is_written(
    by_peft: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(f"adapter.start='{by_peft}'", "strategy.name=fedsb")
    with raises(RuleError, "start-lost", "adapter.start"):
        train(config)
    with raises(RuleError, "start-lost"):
        refuse_early(config, open_workspace(config))
    refuse_early(config, open_workspace(config), begun=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_does_not_replace_the_one_that_it_begins_with(first: RunOutcome, tiny_config: MakeConfig) -> None:
    with raises(RunDirError, "start-in-run", first.rundir.path, "name="):
        train(tiny_config(f"adapter.start='{first.rundir.path}'", name="first"), overwrite=True)
    assert (first.rundir.adapter_dir / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_python_api_takes_a_runs_adapter(first: RunOutcome, tiny_config: MakeConfig, tmp_path: Path) -> None:
    found = fedlora.load_run(first.rundir.path)
    config = tmp_path / "second.toml"
    config.write_text(tiny_config("rounds=1", name="second").to_toml())
    second = fedlora.run(config, quiet=True, adapter={"start": found.adapter})
    assert second.metrics["loss"][0] == pytest.approx(found.metrics["loss"].iloc[-1], rel=1e-6)


# ------------------------------------------------------------------------------------------ real models, and 4 bits


@pytest.mark.slow
def test_a_base_in_four_bits_begins_with_an_adapter_of_its_own_and_of_no_other(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    packed = ("model.quantize=nf4", "rounds=1")
    made = run(tiny_config(*packed, name="packed"))
    again = run(tiny_config(*packed, f"adapter.start='{made.rundir.path}'", name="again"))
    assert again.records[0]["loss"] == pytest.approx(made.records[-1]["loss"], rel=1e-5)
    whole = run(tiny_config("rounds=1", name="whole"))
    for keys, start in ((packed, whole), (("rounds=1",), made)):
        with raises(ModelError, "quantized-otherwise", "model.quantize", "'nf4'", "none"):
            read_start(open_workspace(tiny_config(*keys, f"adapter.start='{start.rundir.path}'")))


@pytest.mark.slow
def test_minilm_goes_on_from_what_peft_trained(minilm: Path, vader: Path, tmp_path: Path) -> None:
    train_by_peft(minilm, tmp_path / "by-peft", r=8)
    keys: dict[str, Any] = {
        "output": str(tmp_path / "runs"),
        "rounds": 1,
        "data": {"limit": 400},
        "train": {"steps": 1},
        "partition": {"name": "iid", "clients": 2},
        "adapter": {"start": tmp_path / "by-peft", "rank": 8, "alpha": 16, "targets": ["query", "value"]},
    }
    found = fedlora.run("quickstart", name="warm", quiet=True, **keys)
    config = RunDir.open(found.path).config
    test = open_workspace(config).data.require_test()
    by_peft, task = load_for(Source(tmp_path / "by-peft", config), test)
    assert found.metrics["loss"][0] == pytest.approx(evaluate(by_peft, task, test).overall["loss"], rel=1e-4)
