"""Local training is a function of adapter, examples and seed; evaluation is one of the model and the examples."""

from __future__ import annotations

import gc
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.errors import raises

from fedlora.adapter import ALL_PARTS, AdapterState, LoraPair
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.errors import ConfigError, DataError, TrainingError
from fedlora.model import Base, load_base
from fedlora.tasks import Examples, Table, Task, load_task
from fedlora.tasks._base import length_batches
from fedlora.training import TrainJob, TrainResult, evaluate, open_workspace, setup, train
from fedlora.training.job import batches, learning_rate, number_of_steps
from fedlora.training.runtime import keep_memory
from fedlora.training.workspace import close_workspace

pytestmark = pytest.mark.usefixtures("no_workspace")

FAST = TrainConfig(steps=4, batch_size=8, lr=1e-2)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(OpenTable(name="text-classification"))


@pytest.fixture(scope="module")
def examples(task: Task, tiny_bert: Path, tiny_csv: Path) -> Examples:
    import csv

    with tiny_csv.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = Table({name: [row[name] for row in rows] for name in rows[0]})
    return task.prepare(table, tiny_bert, {"text": "text", "label": "label"}, keep=("domain",))


def load(path: Path, task: Task, examples: Examples, dtype: str = "float32", dropout: float = 0.0) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(path), dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(rank=4, dropout=dropout),
        runtime=RuntimeConfig(device="cpu"),
    )
    kwargs = {**task.model_kwargs(examples), "hidden_dropout_prob": dropout}
    return load_base(config, task.auto_class, task.head, kwargs, task.peft_task_type)


def job(base: Base, *, seed: int = 0, size: int = 40, **changes: Any) -> TrainJob:
    """A client whose pairs are not zero, so that A has a gradient from the first step on."""
    state = base.initial_adapter(1)
    generator = torch.Generator().manual_seed(5)
    state = state.with_tensors(
        {
            f"{name}:B": torch.randn(pair.B.shape, generator=generator, dtype=pair.B.dtype) * 0.05
            for name, pair in state.pairs.items()
        }
    )
    return replace(TrainJob(state, ALL_PARTS, np.arange(size), seed), **changes)


def distance(first: AdapterState, second: AdapterState) -> float:
    two = second.tensors()
    return math.sqrt(sum(float((value - two[name]).double().norm()) ** 2 for name, value in first.tensors().items()))


def equal(first: AdapterState, second: AdapterState) -> bool:
    two = second.tensors()
    return all(torch.equal(value, two[name]) for name, value in first.tensors().items())


# ---------------------------------------------------------------------------------------------- training


def test_training_is_a_function_of_the_adapter_and_the_seed(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples, dropout=0.2)

    def run(seed: int) -> TrainResult:
        return train(base, task, examples, job(base, seed=seed), FAST)

    first = run(0)
    torch.manual_seed(99)
    other = run(1)
    small = {n: LoraPair(p.A[:2], p.B[:, :2], p.scale) for n, p in first.adapter.pairs.items()}
    train(base, task, examples, replace(job(base), adapter=AdapterState(small, first.adapter.dense)), FAST)
    evaluate(base, task, examples)
    again = run(0)
    assert equal(first.adapter, again.adapter)
    assert first.loss == again.loss
    assert not equal(first.adapter, other.adapter)


def test_dropout_is_on_while_training_and_comes_from_the_seed(tiny_bert: Path, task: Task, examples: Examples) -> None:
    """With one batch that holds everything, only dropout can make two seeds differ (the order of a sum rounds)."""
    config = TrainConfig(steps=1, batch_size=40, optimizer="sgd", lr=0.1)
    spread = {}
    for dropout in (0.0, 0.3):
        base = load(tiny_bert, task, examples, "float64", dropout)
        results = [train(base, task, examples, job(base, seed=seed), config).adapter for seed in (0, 1)]
        spread[dropout] = distance(*results)
    assert spread[0.0] < 1e-10
    assert spread[0.3] > 1e-4


def test_training_leaves_the_random_numbers_alone(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples, dropout=0.2)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    train(base, task, examples, job(base), FAST)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.slow
def test_the_loss_goes_down(tiny_bert: Path, task: Task, examples: Examples, optimizer: Any, dtype: str) -> None:
    base = load(tiny_bert, task, examples, dtype)
    config = TrainConfig(steps=30, optimizer=optimizer, lr=1e-2 if optimizer == "adamw" else 0.1, momentum=0.5)
    start = job(base, size=240)
    base.write(start.adapter)
    before = evaluate(base, task, examples).overall
    result = train(base, task, examples, start, config)
    base.write(result.adapter)
    after = evaluate(base, task, examples).overall
    assert after["loss"] < 0.8 * before["loss"]
    assert after["accuracy"] > before["accuracy"]
    assert (result.num_examples, result.steps, result.examples_seen) == (240, 30, 30 * 16)
    assert 0 < result.compute_seconds < result.seconds


def reference(base: Base, task: Task, examples: Examples, todo: TrainJob, config: TrainConfig) -> AdapterState:
    """The same by autograd alone: the objective written out, plain SGD steps by hand."""
    parameters = base.write(todo.adapter, todo.trains)
    start = [p.detach().clone() for p in parameters]
    for step, chosen in enumerate(batches(todo.indices, config.batch_size, config.steps or 0, todo.seed)):
        loss = task.losses(base.model.train(), task.collate(examples, chosen)).mean()
        for parameter, origin in zip(parameters, start, strict=True):
            loss = loss + todo.proximal_mu / 2 * ((parameter - origin) ** 2).sum()
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        shrink = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(rate * shrink * gradient)
    return base.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mu", "options"),
    [(0.0, {}), (3.0, {}), (0.0, {"warmup_steps": 3}), (0.0, {"clip_norm": 0.05}), (3.0, {"clip_norm": 0.2})],
)
def test_the_steps_are_those_of_the_objective(
    tiny_bert: Path, task: Task, examples: Examples, mu: float, options: dict[str, Any]
) -> None:
    base = load(tiny_bert, task, examples, "float64")
    config = TrainConfig(steps=5, batch_size=8, optimizer="sgd", lr=0.2, **options)
    todo = job(base, proximal_mu=mu)
    wanted = reference(base, task, examples, todo, config)
    found = train(base, task, examples, todo, config).adapter
    assert distance(found, wanted) < 1e-6 * distance(wanted, todo.adapter)
    plain = train(
        base,
        task,
        examples,
        replace(todo, proximal_mu=0.0),
        TrainConfig(steps=5, batch_size=8, optimizer="sgd", lr=0.2),
    ).adapter
    changed = bool(mu or options)
    assert (distance(found, plain) > 0.01 * distance(plain, todo.adapter)) == changed


def test_a_strong_proximal_term_holds_the_client_back(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples)
    free = train(base, task, examples, job(base), FAST).adapter
    held = train(base, task, examples, job(base, proximal_mu=50.0), FAST).adapter
    named = train(base, task, examples, job(base), FAST.model_copy(update={"proximal_mu": 50.0})).adapter
    start = job(base).adapter
    assert distance(held, start) < 0.5 * distance(free, start)
    assert equal(held, named), "the job's mu and the config's mean the same"


def test_frozen_parts_come_back_as_they_were(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples)
    start = job(base, trains=frozenset(("B", "dense")))
    found = train(base, task, examples, start, FAST).adapter
    for name, value in found.tensors().items():
        assert torch.equal(value, start.adapter.tensors()[name]) == name.endswith(":A"), name


def test_a_base_is_not_trained(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples)
    before = {n: v.clone() for n, v in base.plain_state_dict().items() if "classifier" not in n}
    train(base, task, examples, job(base), FAST)
    after = base.plain_state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_cannot_be_trained_is_refused(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples)
    with raises(TrainingError, "no-examples"):
        train(base, task, examples, job(base, size=0), FAST)
    with raises(TrainingError, "nothing-to-train"):
        train(base, task, examples, job(base, trains=frozenset()), FAST)
    wild = TrainConfig(steps=5, batch_size=8, optimizer="sgd", lr=1e38)
    with raises(TrainingError, "loss-not-finite", "step ", "train.lr", "1e+38"):
        train(base, task, examples, job(base), wild)
    with raises(TrainingError, "adapter-not-finite", "step 1"):
        train(base, task, examples, job(base), wild.model_copy(update={"steps": 1, "lr": math.inf}))


def test_a_client_smaller_than_a_batch_uses_what_it_has(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples)
    result = train(base, task, examples, job(base, size=3), TrainConfig(steps=4, batch_size=16))
    assert (result.steps, result.examples_seen) == (4, 12)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 30), st.integers(0, 3))
def test_batches_are_shuffled_passes(size: int, batch: int, steps: int, seed: int) -> None:
    indices = np.arange(100, 100 + size)
    found = list(batches(indices, batch, steps, seed))
    assert len(found) == steps
    in_a_pass = -(-size // batch)
    for start in range(0, steps, in_a_pass):
        one = np.concatenate(found[start : start + in_a_pass])
        assert len(set(one.tolist())) == len(one), "without replacement"
        if start + in_a_pass <= steps:
            assert sorted(one.tolist()) == indices.tolist(), "all of them"
    assert all(len(chosen) <= batch for chosen in found)
    assert [b.tolist() for b in found] == [b.tolist() for b in batches(indices, batch, steps, seed)]


@pytest.mark.parametrize(
    ("size", "options", "steps"),
    [
        (17, {}, 2),
        (17, {"epochs": 2}, 4),
        (16, {"epochs": 0.5}, 1),
        (160, {"epochs": 0.3}, 3),
        (160, {"epochs": 0.31}, 4),
        (3, {"epochs": 0.01}, 1),
        (3, {"steps": 7}, 7),
    ],
)
def test_epochs_are_rounded_up_to_steps(size: int, options: dict[str, Any], steps: int) -> None:
    assert number_of_steps(size, TrainConfig(batch_size=16, **options)) == steps


def test_warm_up_is_linear() -> None:
    config, in_round = TrainConfig(steps=9, lr=1.0, warmup_steps=3), [place(number, 4) for number in (1, 2)]
    assert [learning_rate(step, 9, config, in_round[0]) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(0, 9, config, in_round[1]) == 0.25, "anew in each round"
    over_rounds = TrainConfig(steps=9, lr=1.0, warmup_rounds=1.0)
    first, second = ([learning_rate(step, 9, over_rounds, one) for step in range(9)] for one in in_round)
    assert np.allclose(np.diff(first), 0.1)
    assert (first[0], second) == (0.1, [1.0] * 9), "and once in the run"


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_is_transformers_over_all_rounds(schedule: Any, warm: int) -> None:
    from transformers import get_scheduler

    rounds, steps = 5, 7
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warm * steps, num_training_steps=rounds * steps)
    wanted = []
    for _ in range(rounds * steps):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    config = TrainConfig(steps=steps, lr=0.3, schedule=schedule, warmup_rounds=warm)
    found = [learning_rate(k % steps, steps, config, place(1 + k // steps, rounds)) for k in range(rounds * steps)]
    assert found[warm * steps :] == pytest.approx(wanted[warm * steps :], abs=1e-12)
    halved = config.model_copy(update={"lr_end": 0.15})
    ends = [learning_rate(k % steps, steps, halved, place(1 + k // steps, rounds)) for k in range(rounds * steps)]
    assert ends[warm * steps :] == pytest.approx([0.15 + rate / 2 for rate in wanted[warm * steps :]], abs=1e-12)


def place(number: int, rounds: int) -> TrainJob:
    """A job of one round."""
    return TrainJob(AdapterState({}), ALL_PARTS, np.arange(1), 0, round=number, rounds=rounds)


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.mark.slow
def test_an_evaluation_does_not_depend_on_its_batches(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples, "float64", dropout=0.5)
    base.write(job(base).adapter)
    whole = evaluate(base, task, examples, domain_column="domain")
    base.train_mode(True)
    assert evaluate(base, task, examples, domain_column="domain") == whole, "and dropout is off"
    for tokens in (1, 40, 10**6):
        other = evaluate(base, task, examples, domain_column="domain", batch_tokens=tokens)
        assert other.overall == pytest.approx(whole.overall, rel=1e-12)
        assert other.domains["films"] == pytest.approx(whole.domains["films"], rel=1e-12)
    shuffled = np.random.default_rng(0).permutation(len(examples))
    assert evaluate(base, task, examples, indices=shuffled).overall == pytest.approx(whole.overall, rel=1e-12)


def test_domains_add_up_to_the_whole(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples)
    base.write(job(base).adapter)
    found = evaluate(base, task, examples, domain_column="domain")
    places = {domain: np.flatnonzero(examples.columns["domain"] == domain) for domain in found.domains}
    assert sorted(places) == ["films", "phones"]
    for domain, inside in places.items():
        alone = evaluate(base, task, examples, indices=inside).overall
        assert found.domains[domain] == pytest.approx(alone, rel=1e-5)
    for name in ("accuracy", "loss"):  # other figures are no means over examples
        value = found.overall[name]
        parts = sum(found.domains[domain][name] * len(inside) for domain, inside in places.items())
        assert value == pytest.approx(parts / len(examples), rel=1e-12)


def test_an_evaluation_of_nothing_is_refused(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples)
    with raises(DataError, "no-examples", "data.test_fraction"):
        evaluate(base, task, examples, indices=np.arange(0))
    with raises(DataError, "no-such-column", "'domain'"):
        evaluate(base, task, examples, domain_column="domian")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_length_batches_cover_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    array = np.array(lengths)
    found = list(length_batches(array, budget))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    assert all(len(places) == 1 or array[places].max() * len(places) <= budget for places in found)


# ---------------------------------------------------------------------------------------------- machine and workbench


def test_setup_records_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        machine = setup(RuntimeConfig(device="cpu", threads=2))
        assert machine.device == torch.device("cpu")
        assert torch.get_num_threads() == 2
        assert (machine.facts["threads"], machine.facts["device"]) == (2, "cpu")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert setup(RuntimeConfig(device="cpu")).threads == 1
        assert torch.get_num_threads() == 1
        with raises(ConfigError, "unknown-name", "'cuda'"):
            setup(RuntimeConfig(device="cudda"))
    finally:
        torch.set_num_threads(threads)


def test_freed_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert keep_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_memory()


def test_server_and_clients_share_one_workbench(tiny_bert: Path, tiny_csv: Path) -> None:
    from fedlora.config import parse_config

    text = f"""
        [model]
        name = {str(tiny_bert)!r}
        [data]
        source = {str(tiny_csv)!r}
        domain = "domain"
        [partition]
        name = "iid"
        clients = 3
        [runtime]
        device = "cpu"
        kernels = "off"
    """
    server = open_workspace(parse_config(text))
    client = open_workspace(parse_config(text, ["train.lr=0.5", "strategy.name=ffa"]))
    assert client.base is server.base
    assert client.data is server.data
    assert client.config.train.lr == 0.5
    assert server.speedups.kernels.mode == "off"
    assert open_workspace(client.config) is client
    assert open_workspace(server.config).config is server.config
    other = open_workspace(parse_config(text, ["adapter.rank=2"]))
    assert other.base is not server.base
    result = train(
        other.base,
        other.task,
        other.data.train,
        TrainJob(other.base.initial_adapter(0), ALL_PARTS, other.data.clients[0], 0),
        FAST,
    )
    assert result.num_examples == len(other.data.clients[0])
    close_workspace()
    assert open_workspace(other.config).base is not other.base  # what was let go of is not kept by its config


def test_the_collector_passes_over_libraries_and_over_no_model(tiny_bert: Path, tiny_csv: Path) -> None:
    from fedlora.config import parse_config

    workspace = open_workspace(parse_config(f"model.name={str(tiny_bert)!r}\ndata.source={str(tiny_csv)!r}"))
    assert gc.get_freeze_count() > 100_000
    assert any(found is workspace.base.model for found in gc.get_objects())  # which lists what is not passed over


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (8, 4), (3, 16), (1, 1)])
@pytest.mark.parametrize("settings", [{"steps": 1}, {"steps": 7}, {"epochs": 1.5}, {"epochs": 0.1}])
def test_examples_of_counts_what_the_batches_hold(size: int, batch_size: int, settings: dict) -> None:
    from fedlora.training.job import batches, examples_of, number_of_steps

    config = TrainConfig(batch_size=batch_size, **settings)
    drawn = batches(np.arange(size), batch_size, number_of_steps(size, config), seed=0)
    assert examples_of(size, config) == sum(len(batch) for batch in drawn)
