"""Private training on one client is plain training plus clipping and noise, and tells nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import OpenTable, RunConfig, TrainConfig, parse_config
from fedlora.errors import ConfigError, PrivacyError
from fedlora.model import Base
from fedlora.privacy.accounting import Entry, epsilon
from fedlora.privacy.calibrate import Schedule
from fedlora.simulation.run import refuse_early
from fedlora.tasks import load_task
from fedlora.training import dp_check, open_workspace
from fedlora.training.cohort import train
from fedlora.training.dp_check import check_model, require_private_task
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings, private_settings
from fedlora.training.job import TrainJob
from fedlora.training.opacus_loop import train_by_opacus
from fedlora.training.workspace import Workspace

PRIVATE = ("server.weighting=uniform", "privacy.delta=1e-3", "privacy.max_grad_norm=1.0", "privacy.accountant=rdp")
N = 40


def config_of(*overrides: str) -> RunConfig:
    return parse_config("", [*PRIVATE, "privacy.public_examples=40", *overrides])


def settings(sigma: float, *, clip: float = 1e3, q: float = 1.0, steps: int = 3, **changes: Any) -> PrivateSettings:
    return PrivateSettings(Schedule(q, steps, 1, q * N), sigma, clip, **changes)


@pytest.fixture(scope="module")
def workspace(tiny_bert: Path, tiny_csv: Path) -> Workspace:
    config = parse_config(
        "",
        [
            f"model.name='{tiny_bert}'",
            f"data.source='{tiny_csv}'",
            "adapter.rank=4",
            "adapter.targets=['query','value']",
            "runtime.threads=1",
            "runtime.kernels=off",
            "runtime.device=cpu",
        ],
    )
    return open_workspace(config)


def job(base: Base, size: int = N, **changes: Any) -> TrainJob:
    state = base.initial_adapter(1)
    generator = torch.Generator().manual_seed(5)
    moved = {f"{name}:B": torch.randn(pair.B.shape, generator=generator) * 0.05 for name, pair in state.pairs.items()}
    return replace(TrainJob(state.with_tensors(moved), ALL_PARTS, np.arange(size), 0), **changes)


def move(result: AdapterState, start: AdapterState) -> torch.Tensor:
    before = start.tensors()
    return torch.cat([(value - before[name]).double().flatten() for name, value in result.tensors().items()])


@pytest.mark.parametrize(
    ("mu", "physical"),
    [(0.0, None), (0.5, 7), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(0.5, None), (0.0, 7)])],
)
def test_without_noise_and_clipping_it_is_the_plain_loop(workspace: Workspace, physical: int | None, mu: float) -> None:
    how = TrainConfig(steps=3, batch_size=N, optimizer="sgd", lr=0.2, momentum=0.5, warmup_steps=1, proximal_mu=mu)
    what = job(workspace.base)
    tilted = replace(what, tilt={name: 0.5 * value for name, value in what.adapter.tensors(("B",)).items()})
    quiet = settings(1e-9, physical_batch_size=physical)
    on = (workspace.base, workspace.task, workspace.data.train)
    for asked in (what, tilted):
        plain = move(train(*on, asked, how).adapter, what.adapter)
        for private in (train_private(*on, asked, how, quiet), train_by_opacus(*on, asked, how, quiet)):
            assert float((plain - move(private.adapter, what.adapter)).norm()) < 1e-4 * float(plain.norm())


def test_adamw_without_noise_goes_the_same_way(workspace: Workspace) -> None:
    how, what = TrainConfig(steps=3, batch_size=N, lr=1e-3), job(workspace.base)
    plain = train(workspace.base, workspace.task, workspace.data.train, what, how)
    private = train_private(workspace.base, workspace.task, workspace.data.train, what, how, settings(1e-9))
    one, other = move(plain.adapter, what.adapter), move(private.adapter, what.adapter)
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.999


def test_the_noise_is_there_is_new_each_time_and_has_the_size_it_should(workspace: Workspace) -> None:
    how, what = TrainConfig(optimizer="sgd", lr=1.0), job(workspace.base)
    once = settings(20.0, clip=0.5, steps=1)
    first, again = (
        move(train_private(workspace.base, workspace.task, workspace.data.train, what, how, once).adapter, what.adapter)
        for _ in range(2)
    )
    std = 20.0 * 0.5 / N
    spread = float((first - again).std()) / math.sqrt(2)  # the signal cancels
    assert spread == pytest.approx(std, rel=6 / math.sqrt(2 * len(first)))


def test_nothing_that_depends_on_the_data_is_in_the_result(workspace: Workspace) -> None:
    how, what = TrainConfig(lr=1e-3), job(workspace.base)
    result = train_private(workspace.base, workspace.task, workspace.data.train, what, how, settings(1.0, q=0.25))
    assert (result.num_examples, result.steps, result.examples_seen, result.compute_seconds) == (1, 3, 0, 0.0)
    assert math.isnan(result.loss)


def test_a_client_without_examples_takes_steps_of_noise(workspace: Workspace) -> None:
    how = TrainConfig(optimizer="sgd", lr=1.0)
    what = job(workspace.base, size=0)
    result = train_private(
        workspace.base, workspace.task, workspace.data.train, what, how, settings(2.0, clip=1.0, steps=4)
    )
    std = 2.0 / N * math.sqrt(4)
    moved = move(result.adapter, what.adapter)
    assert float(moved.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * len(moved)))


def test_the_base_trains_plainly_afterwards_as_before(workspace: Workspace) -> None:
    how, what = TrainConfig(steps=2, batch_size=8, lr=1e-3), job(workspace.base)
    before = train(workspace.base, workspace.task, workspace.data.train, what, how)
    train_private(workspace.base, workspace.task, workspace.data.train, what, how, settings(1.0))
    after = train(workspace.base, workspace.task, workspace.data.train, what, how)
    assert torch.equal(move(before.adapter, what.adapter), move(after.adapter, what.adapter))


def test_examples_that_all_fail_leave_an_update_of_noise_alone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def losses(model: object, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise ValueError(f"secret: {len(batch['labels'])} examples")

    monkeypatch.setattr(type(workspace.task), "losses", staticmethod(losses))
    what = job(workspace.base)
    found = train_private(workspace.base, workspace.task, workspace.data.train, what, TrainConfig(), settings(1.0))
    assert float(move(found.adapter, what.adapter).std()) > 0
    assert "secret: 1 examples" in caplog.text


def test_the_model_is_looked_at_once_on_examples_of_the_caller(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = dp_check.preflight
    monkeypatch.setattr(dp_check, "preflight", lambda *args: (seen.append(1), real(*args)))
    monkeypatch.setattr(workspace.base, "checked", set())
    for trains in (ALL_PARTS, ALL_PARTS, frozenset({"B"})):
        check_model(workspace.base, workspace.task, workspace.data.test, job(workspace.base, size=0, trains=trains))
    assert len(seen) == 2
    with raises(PrivacyError, "too-few-examples", "data.test_fraction"):
        check_model(
            workspace.base, workspace.task, workspace.data.test.take([0]), job(workspace.base, trains=frozenset({"A"}))
        )


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.slow
def test_noise_is_calibrated_for_all_rounds_from_declared_numbers() -> None:
    config = config_of("privacy.epsilon=4", "train.batch_size=10", "train.steps=2", "rounds=5")
    found = private_settings(config, 0)
    assert found.schedule == Schedule(0.25, 2, 5, 10.0)
    spent = epsilon([found.entry] * 5, 1e-3, "rdp")
    assert 3.99 < spent <= 4
    assert found.budget is not None
    assert found.budget.epsilon == 4


def test_declared_numbers_are_dealt_cyclically_and_profiles_have_their_own_schedule() -> None:
    profiles = 'clients.profiles=[{name="a", steps=3, batch_size=5}, {name="b", epochs=2}]'
    config = config_of(
        "privacy.public_examples=[20,50]", "privacy.noise_multiplier=1.5", "train.batch_size=10", profiles
    )
    assert private_settings(config, 0).schedule == Schedule(0.25, 3, 10, 5.0)
    assert private_settings(config, 1).schedule == Schedule(0.2, 10, 10, 10.0)
    assert private_settings(config, 2).entry == Entry(0.25, 1.5, 3)
    assert private_settings(config, 0).budget is None


REFUSED = {
    "both": (("privacy.epsilon=1", "privacy.noise_multiplier=1"), "not-exactly-one"),
    "neither": ((), "not-exactly-one"),
    "delta": (("privacy.epsilon=1", "privacy.delta=0.025"), "delta-too-large"),
    "gdp": (("privacy.epsilon=1", "privacy.accountant=gdp"), "accountant-not-sound"),
    "clip": (("privacy.epsilon=1", "train.clip_norm=1"), "batch-clipping"),
    "weights": (("privacy.epsilon=1", "server.weighting=examples"), "weights-tell-sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_private_is_refused_in_one_line(case: str) -> None:
    overrides, code = REFUSED[case]
    with raises(PrivacyError, code):
        config_of(*overrides)


def test_keys_are_checked_and_a_written_config_reads_back() -> None:
    with raises(ConfigError, "unknown-key", "'privacy.epsilonn'", "'epsilon'"):
        config_of("privacy.epsilonn=1")
    with raises(ConfigError, "bad-value", "privacy.delta"):
        parse_config("", ["server.weighting=uniform", "privacy.epsilon=1", "privacy.max_grad_norm=1"])
    config = config_of("privacy.epsilon=2", "privacy.public_examples=[40,50]")
    assert parse_config(config.to_toml()) == config
    assert parse_config(RunConfig().to_toml()).privacy is None


def test_a_task_that_packs_examples_is_refused() -> None:
    packed = load_task(OpenTable(name="causal-lm", packing=True))  # type: ignore[call-arg]
    with raises(PrivacyError, "packed-examples", "task.packing"):
        require_private_task(packed)


def test_an_epsilon_out_of_reach_is_refused_before_anything_is_trained(workspace: Workspace) -> None:
    privacy = config_of("privacy.epsilon=1e-9").privacy
    server = workspace.config.server.model_copy(update={"weighting": "uniform"})
    with raises(PrivacyError, "epsilon-out-of-reach", "1e-09"):
        refuse_early(workspace.config.model_copy(update={"privacy": privacy, "server": server}), workspace)
