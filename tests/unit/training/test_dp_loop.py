"""Private training in company: Opacus's numbers for each client, whatever the others do."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.states import gap
from torch import Tensor

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.errors import PrivacyError
from fedlora.model import Base, load_base, seeded
from fedlora.privacy.calibrate import Schedule
from fedlora.privacy.dpsgd import PrivateStep
from fedlora.speedups.attention import choose_attention
from fedlora.tasks import Examples, Table, Task, load_task
from fedlora.training import TrainJob, TrainResult
from fedlora.training.dp_loop import PrivateTrainingLoop, train_private_cohort
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.job import learning_rate
from fedlora.training.opacus_loop import add_proximal, make_optimizer
from fedlora.training.row_groups import PassCost

STEPS = 4


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(OpenTable(name="text-classification"))


@pytest.fixture(scope="module")
def examples(task: Task, tiny_bert: Path, tiny_csv: Path) -> Examples:
    with tiny_csv.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    table = Table({name: [row[name] for row in rows] for name in rows[0]})
    return task.prepare(table, tiny_bert, {"text": "text", "label": "label"}, keep=())


@pytest.fixture
def base(tiny_bert: Path, task: Task, examples: Examples) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(tiny_bert), dtype="float64"),
        adapter=AdapterConfig(rank=4),
        runtime=RuntimeConfig(device="cpu"),
    )
    found = load_base(config, task.auto_class, task.head, task.model_kwargs(examples), task.peft_task_type)
    choose_attention(found.model)  # as in a run
    return found


def adapter(base: Base, rank: int, seed: int) -> AdapterState:
    state = base.initial_adapter(0)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1

    pairs = {
        name: replace(state.pairs[name], A=draw(s.rank, s.d_in), B=draw(s.d_out, s.rank), scale=s.scale)
        for name, s in base.layout(rank).items()
    }
    return AdapterState(pairs, dict(state.dense))


OPTIMIZERS: list[dict[str, Any]] = [{}, {"optimizer": "sgd", "lr": 0.1}, {"optimizer": "sgd", "momentum": 0.9}]
RANKS = (4, 2, 6)
SIZES: tuple[tuple[int, ...], ...] = ((9, 0, 3, 14), (1, 5, 0, 0), (0, 0, 0, 0))
"""Sizes of each client's samples, step by step."""


def clients(
    base: Base, **changes: Any
) -> tuple[list[tuple[TrainJob, TrainConfig]], list[PrivateSettings], list[list[np.ndarray]]]:
    draw = np.random.default_rng(0)
    work, settings, samples = [], [], []
    for k, rank in enumerate(RANKS):
        start = adapter(base, rank, k)
        tilt = {name: 0.1 * k * value for name, value in start.tensors().items() if k}
        job = TrainJob(start, ALL_PARTS, np.arange(60 * k, 60 * k + 40), k, proximal_mu=0.3 * k, tilt=tilt)
        work.append((job, TrainConfig(lr=0.01 * (k + 1), warmup_steps=k).model_copy(update=changes)))
        plan = Schedule(0.2, STEPS, 1, 8.0 + k)
        settings.append(PrivateSettings(plan, 0.5 + k, 0.05 * (k + 1), physical_batch_size=(None, 2, 4)[k]))
        samples.append([np.sort(draw.choice(40, size, replace=False)) for size in SIZES[k]])
    return work, settings, samples


def by_opacus(
    base: Base,
    task: Task,
    examples: Examples,
    work: tuple[TrainJob, TrainConfig],
    how: PrivateSettings,
    samples: Sequence[np.ndarray],
    generator: torch.Generator,
) -> AdapterState:
    """One client by `PrivateStep`: Opacus's hooks, clipping and noise, torch's optimisers."""
    job, config = work
    parameters = base.write(job.adapter, job.trains)
    anchor = [parameter.detach().clone() for parameter in parameters]
    base.train_mode(True)
    optimizer = make_optimizer(parameters, config)

    def after_noise() -> None:
        add_proximal(parameters, anchor, job.proximal_mu)
        for name, parameter in zip(base.tensor_names(), parameters, strict=True):
            if name in job.tilt:
                parameter.grad += job.tilt[name]

    with PrivateStep(
        base.model,
        optimizer,
        max_grad_norm=how.max_grad_norm,
        noise_multiplier=how.noise_multiplier,
        expected_batch_size=how.schedule.expected_batch_size,
        physical_batch_size=how.physical_batch_size,
        after_noise=after_noise,
        generator=generator,
    ) as private:
        for step, sample in enumerate(samples):
            optimizer.param_groups[0]["lr"] = learning_rate(step, len(samples), config, job)
            private.step(sample, lambda rows: task.losses(base.model, task.collate(examples, job.indices[rows])))
    return base.read()


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that goes on from where a generator's last draw ended: the same, tensor by tensor and all at once."""
    rolls: dict[int, tuple[torch.Generator, np.random.Generator]] = {}

    def noise(std: float, like: Tensor, generator: torch.Generator, **_: Any) -> Tensor:
        _, draw = rolls.setdefault(id(generator), (generator, np.random.default_rng(generator.initial_seed())))
        return torch.from_numpy(std * draw.standard_normal(tuple(like.shape))).to(like.dtype)

    monkeypatch.setattr("fedlora.training.dp_loop.noise", noise)
    monkeypatch.setattr(
        "opacus.optimizers.optimizer._generate_noise", lambda std, reference, **how: noise(std, reference, **how)
    )


def passes() -> list[object]:
    """Each optimiser with each size of a pass; slow are three in which all of them are, the others are nightly."""
    places = product(enumerate((1, 80, 10**6)), enumerate(OPTIMIZERS))
    sizes, names = ("each row", "few", "all"), ("adamw", "sgd", "momentum")
    return [
        pytest.param(most, one, marks=pytest.mark.nightly if j != k else (), id=f"{sizes[j]}-{names[k]}")
        for (j, most), (k, one) in places
    ]


@pytest.mark.parametrize(("most", "optimizer"), passes())
@pytest.mark.slow
def test_company_gives_opacus_numbers(
    base: Base, task: Task, examples: Examples, optimizer: dict[str, Any], most: int, same_noise: None
) -> None:
    work, settings, samples = clients(base, **optimizer)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(k) for k in range(len(work))]

    wanted = [by_opacus(base, task, examples, *one) for one in zip(work, settings, samples, generators(), strict=True)]
    found = PrivateTrainingLoop(
        base,
        task,
        examples,
        work,
        settings,
        cost=PassCost(10.0, 64.0, most),
        generators=generators(),
        samples=[iter(rows) for rows in samples],
    ).run()
    for one, other, (job, _) in zip(wanted, found, work, strict=True):
        assert isinstance(other, TrainResult), other
        assert gap(one, other.adapter) < 1e-10
        assert gap(one, job.adapter) > 1e-4, "it did move"
        assert (other.num_examples, other.steps) == (1, STEPS)


@pytest.mark.parametrize("most", [1, 10**6], ids=["row by row", "together"])
def test_class_weights_are_in_an_examples_gradient_before_it_is_clipped(
    base: Base, task: Task, examples: Examples, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x - lr / b sum_i clip(w_i grad l_i, C), with l_i the losses without weights, one example after the other."""
    assert examples.labels is not None
    weights = {"positive": 5.0, "negative": 0.5}
    start, rows, expected, lr = adapter(base, 4, 0), np.arange(40, 64), 8.0, 0.1
    parameters = base.write(start, ALL_PARTS)
    base.train_mode(True)
    each = []
    for row in rows:
        (loss,) = task.losses(base.model, task.collate(examples, np.array([row])))
        weight = weights[examples.label_names[int(examples.labels[row])]]
        each.append([weight * one for one in torch.autograd.grad(loss, parameters)])
    norms = torch.stack([torch.cat([one.flatten() for one in gradients]).norm() for gradients in each])
    bound = float(norms.median())
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)  # Opacus's
    assert 0 < int((factors < 1).sum()) < len(rows), "some are clipped"
    wanted = {
        name: start.tensors()[name] - lr / expected * torch.einsum("i,i...->...", factors, torch.stack(gradients))
        for name, *gradients in zip(base.tensor_names(), *each, strict=True)
    }
    monkeypatch.setattr("fedlora.training.dp_loop.noise", lambda _std, like, *_args, **_how: torch.zeros_like(like))
    weighted = load_task(OpenTable(name="text-classification", class_weights=weights))
    (found,) = PrivateTrainingLoop(
        base,
        weighted,
        examples,
        [(TrainJob(start, ALL_PARTS, np.arange(100), 0), TrainConfig(optimizer="sgd", lr=lr))],
        [PrivateSettings(Schedule(0.2, 1, 1, expected), 1.0, bound)],
        cost=PassCost(10.0, 64.0, most),
        generators=[torch.Generator()],
        samples=[iter([rows])],
    ).run()
    assert isinstance(found, TrainResult), found
    assert gap(found.adapter, start.with_tensors(wanted)) < 1e-12
    assert gap(found.adapter, start) > 1e-4, "it did move"


def test_a_gradient_that_is_not_finite_counts_as_none(
    base: Base, task: Task, examples: Examples, monkeypatch: pytest.MonkeyPatch, same_noise: None
) -> None:
    work, settings, samples = clients(base, optimizer="sgd", lr=0.1)
    real = type(task).losses

    def spoilt(self: Task, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = real(self, model, batch)
        return torch.where(batch["input_ids"].sum(1) % 3 == 0, losses * torch.inf, losses)

    monkeypatch.setattr(type(task), "losses", spoilt)
    generators = [[torch.Generator().manual_seed(k) for k in range(3)] for _ in range(2)]
    wanted = [by_opacus(base, task, examples, *one) for one in zip(work, settings, samples, generators[0], strict=True)]
    found = PrivateTrainingLoop(
        base, task, examples, work, settings, generators=generators[1], samples=[iter(rows) for rows in samples]
    ).run()
    assert all(gap(one, other.adapter) < 1e-10 for one, other in zip(wanted, found, strict=True))  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["collate", "losses"])
@pytest.mark.parametrize("alone", [False, True], ids=["stacked", "opacus"])
@pytest.mark.slow
def test_an_example_that_cannot_be_computed_adds_nothing_and_moves_nobody_else(
    base: Base,
    task: Task,
    examples: Examples,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    alone: bool,
) -> None:
    """One example fails: the client's update is that of the others, for the same noise, whatever parts it came in."""
    work, settings, samples = clients(base, optimizer="sgd", lr=0.1)
    bad = {(k, int(sample[len(sample) // 2])) for k, parts in enumerate(samples) for sample in parts if len(sample) > 2}
    bad |= {(1, int(samples[1][0][0]))}  # a sample of this one alone
    rows = {int(work[k][0].indices[place]) for k, place in bad}
    without = [
        [np.array([r for r in s if (k, int(r)) not in bad], int) for s in parts] for k, parts in enumerate(samples)
    ]

    def run(drawn: Sequence[Sequence[np.ndarray]]) -> list[AdapterState]:
        generators = [torch.Generator().manual_seed(k) for k in range(len(work))]
        if alone:
            return [
                by_opacus(base, task, examples, *one) for one in zip(work, settings, drawn, generators, strict=True)
            ]
        found = PrivateTrainingLoop(
            base, task, examples, work, settings, generators=generators, samples=[iter(parts) for parts in drawn]
        ).run()
        assert all(isinstance(outcome, TrainResult) for outcome in found)
        return [outcome.adapter for outcome in found]  # type: ignore[union-attr]

    wanted = run(without)
    collate, losses = type(task).collate, type(task).losses

    def collates(self: Task, all_of_them: Examples, indices: Any) -> dict[str, Tensor]:
        if where == "collate" and rows & set(np.asarray(indices).tolist()):
            raise ValueError(f"secret {min(rows)}")
        return {**collate(self, all_of_them, indices), "rows": torch.as_tensor(np.asarray(indices))}  # type: ignore[arg-type]

    def computes(self: Task, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = losses(self, model, batch)
        if where == "losses" and rows & set(batch["rows"].tolist()):
            raise IndexError("secret: index out of range")  # half way: what hooks have noted is there
        return found

    monkeypatch.setattr(type(task), "collate", collates)
    monkeypatch.setattr(type(task), "losses", computes)
    found = run(samples)
    assert max(gap(one, other) for one, other in zip(wanted, found, strict=True)) < 1e-10
    drawn, kept = (sum(len(sample) for parts in some for sample in parts) for some in (samples, without))
    times = drawn - kept
    assert sum("left out of a private step" in record.getMessage() for record in caplog.records) == times > 4


def test_examples_of_no_length_are_added_once(base: Base, task: Task, examples: Examples) -> None:
    """A task of one's own may say nothing of lengths: what follows from them must not have a part added twice."""
    work, settings, samples = clients(base, optimizer="sgd", lr=0.1)
    parts = samples[1][1]  # the sample comes in parts of two

    def run(lengths: np.ndarray) -> AdapterState:
        (outcome,) = PrivateTrainingLoop(
            base,
            task,
            replace(examples, lengths=lengths),
            [work[1]],
            [settings[1]],
            generators=[torch.Generator().manual_seed(0)],
            samples=[iter(samples[1])],
        ).run()
        assert isinstance(outcome, TrainResult), outcome
        return outcome.adapter

    for silent in (parts[:2], np.arange(40)):
        lengths = examples.lengths.copy()
        lengths[work[1][0].indices[silent]] = 0
        assert gap(run(lengths), run(examples.lengths)) < 1e-10


def test_a_client_whose_examples_are_not_there_fails_and_does_not_train_on_the_others_alone(
    base: Base, task: Task, examples: Examples
) -> None:
    work, settings, _ = clients(base)
    beyond = replace(work[0][0], indices=np.array([0, len(examples)]))
    found = PrivateTrainingLoop(base, task, examples, [(beyond, work[0][1]), *work[1:]], settings).run()
    assert isinstance(found[0], PrivacyError)
    assert found[0].code == "no-such-example"
    assert all(isinstance(outcome, TrainResult) for outcome in found[1:])


def test_what_the_model_cannot_do_for_any_example_ends_its_client(
    base: Base, task: Task, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Task, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        raise PrivacyError("this model cannot 42")

    monkeypatch.setattr(type(task), "losses", refuses)
    work, settings, _ = clients(base)
    jobs, configs = zip(*work, strict=True)
    found = train_private_cohort(base, task, examples, jobs, configs, settings)
    assert all(isinstance(outcome, PrivacyError) for outcome in found)
    assert not any("42" in str(outcome) for outcome in found)


def test_no_two_runs_are_the_same(base: Base, task: Task, examples: Examples) -> None:
    work, settings, _ = clients(base)
    jobs, configs = zip(*work, strict=True)
    with seeded(0, torch.device("cpu")):
        first = train_private_cohort(base, task, examples, jobs, configs, settings)
    with seeded(0, torch.device("cpu")):
        again = train_private_cohort(base, task, examples, jobs, configs, settings)
    for one, other in zip(first, again, strict=True):
        assert gap(one.adapter, other.adapter) > 1e-4  # type: ignore[union-attr]
