"""A client's result does not depend on the company it trains in: float64 shows it to rounding."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.model import Base, load_base
from fedlora.tasks import Examples, Table, Task, load_task
from fedlora.training import TrainJob, TrainResult, train, train_cohort
from fedlora.training.job import batches
from fedlora.training.pool import Budget

WIDE = Budget(10**6, 10**6)
"""Everybody who waits goes."""


def texts(folder: Path, file: Path) -> tuple[Task, Examples]:
    task = load_task(OpenTable(name="text-classification"))
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    table = Table({name: [row[name] for row in rows] for name in rows[0]})
    return task, task.prepare(table, folder, {"text": "text", "label": "label"}, keep=())


@pytest.fixture(scope="module")
def task(tiny_bert: Path, tiny_csv: Path) -> Task:
    return texts(tiny_bert, tiny_csv)[0]


@pytest.fixture(scope="module")
def examples(tiny_bert: Path, tiny_csv: Path) -> Examples:
    return texts(tiny_bert, tiny_csv)[1]


def load(path: Path, task: Task, examples: Examples, dtype: str = "float64", dropout: float = 0.0) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(path), dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(rank=4, dropout=dropout),
        runtime=RuntimeConfig(device="cpu"),
    )
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return load_base(config, task.auto_class, task.head, {**task.model_kwargs(examples), **rates}, task.peft_task_type)


def adapter(base: Base, rank: int | None, seed: int) -> AdapterState:
    """One with values everywhere, so that every tensor has a gradient."""
    state = base.initial_adapter(1)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(base.adapter_dtype) * 0.1

    pairs = {
        name: replace(state.pairs[name], A=draw(s.rank, s.d_in), B=draw(s.d_out, s.rank), scale=s.scale)
        for name, s in base.layout(rank).items()
    }
    return AdapterState(pairs, {name: value + draw(*value.shape) for name, value in state.dense.items()})


Client = tuple[TrainJob, TrainConfig]


def client(base: Base, number: int, *, rank: int | None = None, size: int = 30, **changes: Any) -> Client:
    """A client of its own values, examples, rates; `changes` are of its job or its config."""
    job = TrainJob(adapter(base, rank, number), ALL_PARTS, np.arange(number * 20, number * 20 + size), seed=number)
    config = TrainConfig(steps=3, batch_size=8, lr=0.01)
    mine = {key: changes.pop(key) for key in ("trains", "proximal_mu") if key in changes}
    return replace(job, **mine), config.model_copy(update=changes)


def gap(one: AdapterState, other: AdapterState) -> float:
    two = other.tensors()
    return max(float((value - two[name]).abs().max()) for name, value in one.tensors().items())


def together(base: Base, task: Task, examples: Examples, clients: list[Client], **kwargs: Any) -> list[Any]:
    return train_cohort(base, task, examples, [job for job, _ in clients], [config for _, config in clients], **kwargs)


def check_alike(base: Base, task: Task, examples: Examples, clients: list[Client], within: float = 1e-10) -> None:
    """All together, each alone, and few at a time come to the same."""
    alone = [train(base, task, examples, job, config) for job, config in clients]
    for budget in (WIDE, Budget(300, 40)):
        for one, found, (job, _) in zip(
            alone, together(base, task, examples, clients, budget=budget), clients, strict=True
        ):
            assert isinstance(found, TrainResult), found
            assert gap(one.adapter, found.adapter) < within
            assert gap(one.adapter, replace_shape(job.adapter)) > 1e-4, "it did train"
            assert found.adapter.layout == one.adapter.layout
            assert found.loss == pytest.approx(one.loss, abs=within)
            assert (found.steps, found.examples_seen, found.num_examples) == (
                one.steps,
                one.examples_seen,
                one.num_examples,
            )


def replace_shape(state: AdapterState) -> AdapterState:
    return state


RAGGED: list[dict[str, Any]] = [
    {},
    {"rank": 2, "steps": 5, "lr": 0.003},
    {"rank": 7, "batch_size": 3, "warmup_steps": 2},
    {"size": 5, "steps": 7, "weight_decay": 0.1, "clip_norm": 0.3},
    {"batch_size": 11, "steps": 1, "proximal_mu": 0.5},
]
OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "sgd", "momentum"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_company_changes_nothing(
    tiny_bert: Path, task: Task, examples: Examples, optimizer: dict[str, Any], dropout: float
) -> None:
    base = load(tiny_bert, task, examples, dropout=dropout)
    check_alike(base, task, examples, [client(base, k, **{**optimizer, **one}) for k, one in enumerate(RAGGED)])


def plain(base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig) -> AdapterState:
    """The same with PEFT's own layers, torch's own optimisers, and one client."""
    parameters = base.write(job.adapter, job.trains)
    start = [p.detach().clone() for p in parameters]
    base.train_mode(True)
    decay = config.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=decay)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=decay)
    for step, chosen in enumerate(batches(job.indices, config.batch_size, config.steps or 0, job.seed)):
        optimizer.zero_grad()
        loss = task.losses(base.model, task.collate(examples, chosen)).mean()
        for parameter, origin in zip(parameters, start, strict=True):
            loss = loss + job.proximal_mu / 2 * ((parameter - origin) ** 2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
        optimizer.step()
    return base.read()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "sgd", "momentum"])
@pytest.mark.parametrize("trains", [("A", "B", "dense"), ("B", "dense"), ("A",), ("dense",)], ids="".join)
def test_a_cohort_is_torch_and_peft_client_by_client(
    tiny_bert: Path, task: Task, examples: Examples, optimizer: dict[str, Any], trains: tuple[Any, ...]
) -> None:
    base = load(tiny_bert, task, examples)
    clients = [client(base, k, **{**optimizer, **one, "trains": frozenset(trains)}) for k, one in enumerate(RAGGED)]
    wanted = [plain(base, task, examples, *one) for one in clients]
    for one, found, (job, _) in zip(wanted, together(base, task, examples, clients), clients, strict=True):
        assert gap(one, found.adapter) < 1e-10
        for name, value in found.adapter.tensors().items():
            part = name.rpartition(":")[2] if ":" in name else "dense"
            assert torch.equal(value, job.adapter.tensors()[name]) == (part not in trains), name
