"""The optimiser's state stays with the client from round to round: as if training had not been interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import client, random_base, random_examples, together
from support.command_line import invoke
from support.errors import raises
from support.federations import deploy, simulate
from support.interrupted import killed_and_resumed
from support.kept import files, newest
from support.states import gap, same_adapter
from support.tiny_federations import MakeConfig

from fedlora.callbacks import Callback
from fedlora.config import OpenTable, TrainConfig
from fedlora.errors import ConfigError, FedloraError, TrainingError
from fedlora.federation import client_training
from fedlora.federation.client_store import RESIDUAL
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.state_io import unpack
from fedlora.tasks import load_task
from fedlora.training import TrainResult
from fedlora.training.row_optimizer import Columns, FlatOptimizer

KEPT = ("train.keep_optimizer=true", "runtime.cohort=1", "runtime.processes=1")


@pytest.mark.parametrize("how", [{}, {"optimizer": "sgd", "momentum": 0.9}], ids=["adamw", "sgd"])
def test_a_state_goes_on_in_another_optimiser(how: dict[str, object], tmp_path: Path) -> None:
    """Two steps and two more are four, for adapters of several ranks, whoever's row it is."""
    base = random_base("llama", tmp_path, causal=True)
    adapters = [client(base, k, rank=rank)[0].adapter for k, rank in enumerate((4, 2))]
    like = torch.empty(0, dtype=torch.float64)
    config = TrainConfig(lr=0.1, weight_decay=0.1).model_copy(update=how)
    columns = Columns(adapters, base.tensor_names())
    draw = torch.Generator().manual_seed(0)
    gradients = [
        torch.where(
            columns.rows(adapters, like) != 0, torch.randn(2, columns.width, generator=draw, dtype=torch.float64), 0.0
        )
        for _ in range(4)
    ]

    def moved(optimizer: FlatOptimizer, values: torch.Tensor, some: list[torch.Tensor]) -> torch.Tensor:
        for gradient in some:
            optimizer.step(values, gradient.clone(), [0, 1], [0.1, 0.1])
        return values

    whole = moved(FlatOptimizer(2, columns.width, [config] * 2, like), columns.rows(adapters, like), gradients)
    first = FlatOptimizer(2, columns.width, [config] * 2, like)
    values = moved(first, columns.rows(adapters, like), gradients[:2])
    for row, adapter in enumerate(adapters):  # alone, in a layout without padding
        own = Columns([adapter], base.tensor_names())
        state = first.state_of(row, columns, adapter)
        second = FlatOptimizer(1, own.width, [config], like)
        second.load(0, own, adapter, state)
        after = own.rows([columns.read(values[row], adapter)], like)
        for gradient in gradients[2:]:
            second.step(after, own.rows([columns.read(gradient[row], adapter)], like), [0], [0.1])
        assert gap(own.read(after[0], adapter), columns.read(whole[row], adapter)) < 1e-12
    other = FlatOptimizer(2, columns.width, [config] * 2, like)
    with raises(TrainingError, "kept-state-differs", "train.keep_optimizer"):
        other.load(0, columns, adapters[0], first.state_of(1, columns, adapters[1]))


def test_a_tensor_without_a_state_starts_anew_beside_those_that_go_on(tmp_path: Path) -> None:
    """AdamW's corrections of bias go by each tensor's own steps."""
    base = random_base("llama", tmp_path, causal=True)
    adapter, like = client(base, 0)[0].adapter, torch.empty(0, dtype=torch.float64)
    columns, config = Columns([adapter], base.tensor_names()), TrainConfig(lr=0.1)
    gradient = torch.randn(1, columns.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def after(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        optimizer, values = FlatOptimizer(1, columns.width, [config], like), columns.rows([adapter], like)
        optimizer.load(0, columns, adapter, state)
        optimizer.step(values, 2 * gradient, [0], [0.1])
        return columns.read(values[0], adapter).tensors(), optimizer.state_of(0, columns, adapter)

    first = FlatOptimizer(1, columns.width, [config], like)
    first.step(columns.rows([adapter], like), gradient.clone(), [0], [0.1])
    state = first.state_of(0, columns, adapter)
    (on, _), (anew, _) = after(state), after({})
    mixed, kept = after({name: value for name, value in state.items() if not name.endswith(":B")})
    for name, value in mixed.items():
        torch.testing.assert_close(value, (anew if name.endswith(":B") else on)[name], rtol=1e-12, atol=1e-15)
        assert int(kept[f"step/{name}"]) == (1 if name.endswith(":B") else 2)
    assert any(not torch.equal(on[name], anew[name]) for name in on)


def test_a_part_that_rests_in_a_round_keeps_its_state(tmp_path: Path) -> None:
    """As rules that train A and B in turn have it."""
    base, task = random_base("llama", tmp_path, causal=True), load_task(OpenTable(name="causal-lm"))
    examples, state, seen = random_examples(causal=True, vit=False), {}, []
    for part in ("A", "B", "A"):
        job, config = client(base, 0, trains=frozenset({part}), keep_optimizer=True)
        job = type(job)(**{**vars(job), "optimizer": state})
        (found,) = together(base, task, examples, [(job, config)])
        assert isinstance(found, TrainResult), found
        state = dict(found.optimizer)
        seen.append({name[-1]: int(value) for name, value in state.items() if name.startswith("step/")})
    assert seen == [{"A": 3}, {"A": 3, "B": 3}, {"A": 6, "B": 3}]


@pytest.mark.slow
def test_rounds_are_as_one_long_round(tiny_config: MakeConfig) -> None:
    """One client whose batch is all that it has: three rounds of two steps are six steps."""
    keys = ("partition.clients=1", "train.batch_size=500", "model.dtype=float64", *KEPT)
    whole = simulate(tiny_config(*keys, "train.steps=6", "rounds=1", name="whole"))
    parts = simulate(tiny_config(*keys, "train.steps=2", "rounds=3", name="parts"))
    anew = simulate(tiny_config(*keys, "train.steps=2", "rounds=3", "train.keep_optimizer=false", name="anew"))
    assert gap(whole.state.adapter, parts.state.adapter) < 1e-5
    assert gap(whole.state.adapter, anew.state.adapter) > 1e-3
    assert not anew.rundir.clients_dir.exists()


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the clients are away in each round."""
    keys = (*KEPT, "server.fraction=0.5", "rounds=4")
    straight = simulate(tiny_config(*keys, name="straight"))
    resumed = killed_and_resumed(tiny_config(*keys, name="killed"), 3, monkeypatch)
    assert same_adapter(straight.state.adapter, resumed.state.adapter)
    kept = files(straight.rundir.clients_dir)
    assert kept == files(resumed.rundir.clients_dir)
    steps = {int(value) for one in kept.values() for name, value in unpack(one)[0].items() if "/step/" in name}
    assert steps <= {4, 8, 12, 16}
    assert max(steps) > 4, "somebody went on"


@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("rolora", marks=pytest.mark.slow)])
def test_a_deployment_keeps_the_same(tiny_config: MakeConfig, tmp_path: Path, strategy: str) -> None:
    keys = (*KEPT, f"strategy.name={strategy}", "rounds=2")
    grid = deploy(tiny_config(*keys, name="grid"), ledgers=tmp_path)
    here = simulate(tiny_config(*keys, name="here"))
    assert same_adapter(grid.state.adapter, here.state.adapter)
    assert files(here.rundir.clients_dir) == files(tmp_path / "kept" / grid.rundir.run_id)


@pytest.mark.slow
def test_private_clients_keep_it_too(tiny_config: MakeConfig, same_secrets: Callable[[], None], tmp_path: Path) -> None:
    privacy = "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}"
    keys = (*KEPT, privacy, "server.weighting=uniform", "server.aggregation_error=false", "rounds=2")
    same_secrets()
    here = simulate(tiny_config(*keys, name="here"))
    same_secrets()
    grid = deploy(tiny_config(*keys, name="grid"), ledgers=tmp_path)
    assert same_adapter(here.state.adapter, grid.state.adapter)
    assert len(files(here.rundir.clients_dir)) == 4 * 2
    same_secrets()
    anew = simulate(tiny_config(*keys, "train.keep_optimizer=false", name="anew"))
    assert not same_adapter(here.state.adapter, anew.state.adapter)


@pytest.mark.slow
def test_nobody_sees_whose_first_round_failed(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under user-level privacy, where a failed client's update changes nothing."""
    from fedlora.federation import client_training

    real = client_training.train_cohort

    def failing(base: Any, task: Any, examples: Any, jobs: Any, configs: Any) -> Any:
        found = real(base, task, examples, jobs, configs)
        return [RuntimeError("broken") if job.round == 1 else one for job, one in zip(jobs, found, strict=True)]

    monkeypatch.setattr(client_training, "train_cohort", failing)
    privacy = "privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}"
    outcome = simulate(tiny_config(*KEPT, privacy, "server.aggregation_error=false", "rounds=3"))
    assert [record["answered"] for record in outcome.records[1:]] == [[0, 1, 2, 3]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("key", ["train.keep_optimizer=true", "train.personal=0.5"])
def test_what_a_key_kept_is_left_alone_when_a_resume_switches_it_off(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Beside it clients keep what topk did not send, from which they go on."""
    both = ("wire={up='topk', fraction=0.2}", "evaluation.on=both", "evaluation.min_examples=2", "train.steps=2")
    run = simulate(tiny_config(*both, key, "rounds=2"))
    began, real = [], client_training.train_cohort

    def watched(base: Any, task: Any, examples: Any, jobs: Any, configs: Any) -> Any:
        began.extend((job.adapter, bool(job.optimizer)) for job in jobs)
        return real(base, task, examples, jobs, configs)

    monkeypatch.setattr(client_training, "train_cohort", watched)
    config = tiny_config(*both, "rounds=3")
    again = run_simulation(config, RunDir.open(run.rundir.path, config), Callback(), resume=True)
    assert again.records[-1]["answered"] == [0, 1, 2, 3]
    assert len(began) == 4
    for adapter, has_state in began:
        assert same_adapter(adapter, run.state.adapter)
        assert not has_state
    for client_id in range(4):
        assert all(name.startswith(RESIDUAL) for name in newest(again.rundir.clients_dir, client_id))


def test_what_cannot_be_kept_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with raises(ConfigError, "key-without-effect", "train.momentum"):
        tiny_config("train.keep_optimizer=true", "train.optimizer=sgd")
    with pytest.raises(FedloraError, match="starts each round from a new adapter"):
        simulate(tiny_config(*KEPT, "strategy.name=flora"))
    with raises(ConfigError, "state-of-other-units", "'fslora'"):
        simulate(tiny_config(*KEPT, "strategy.name=fslora", "clients.ranks=[2,4]"))
    sgd = simulate(tiny_config(*KEPT, "train.optimizer=sgd", "train.momentum=0.9", "rounds=1", name="sgd"))
    assert np.isfinite(sgd.records[-1]["train_loss"])
    assert files(sgd.rundir.clients_dir)
    words = ["export", str(sgd.rundir.path), str(tmp_path / "own"), "--client", "0"]
    refused = invoke(*words)
    assert refused.exit_code == 1
    assert "has no model of client 0's own" in refused.output
