"""What is computed on a GPU is what is computed on a CPU; nothing mixes devices, and nothing waits layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import MODELS, client, random_base, random_examples, together
from support.pretend_gpu import Log, pretend_gpu

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.callbacks import Callback
from fedlora.config import OpenTable, RunConfig, RuntimeConfig
from fedlora.memory import widest
from fedlora.model import Base, changed_weights, load_adapted, save_adapter
from fedlora.model.dropout import set_dropout
from fedlora.privacy.calibrate import Schedule
from fedlora.runs.environment import describe_environment
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.speedups.cache_choice import open_cache
from fedlora.tasks import Examples, Task, load_task
from fedlora.training import TrainJob, TrainResult, close_workspace
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.dropout_masks import Watch
from fedlora.training.evaluate import evaluate
from fedlora.training.row_optimizer import Columns
from fedlora.training.runtime import setup

pytestmark = pytest.mark.slow
KINDS = ["cuda", "mps"]


def a_base(
    name: str, folder: Path, device: str, layers: str | None = None, **options: Any
) -> tuple[Base, Task, Examples]:
    causal = name != "bert"
    base = random_base(name, folder, causal, "float32", device, dropout=0.1, layers=layers)
    task = load_task(OpenTable(name="causal-lm" if causal else "text-classification", **options))  # type: ignore[arg-type]
    return base, task, random_examples(causal, vit=False)


def plainly(base: Base, task: Task, examples: Examples, count: int = 2, **changes: Any) -> list[AdapterState]:
    clients = [client(base, k, rank=(4, 2)[k % 2], size=10, **changes) for k in range(count)]
    return results(together(base, task, examples, clients))


def privately(base: Base, task: Task, examples: Examples) -> list[AdapterState]:
    check_model(base, task, examples, TrainJob(base.initial_adapter(0), ALL_PARTS, np.arange(4), 0))
    loop = PrivateTrainingLoop(
        base,
        task,
        examples,
        [client(base, k) for k in range(2)],
        [PrivateSettings(Schedule(0.3, 2, 1, 8.0), 0.5, 0.05)] * 2,
        samples=[iter([np.arange(9), np.arange(3, 7)]) for _ in range(2)],
        generators=[torch.Generator().manual_seed(k) for k in range(2)],
        masks=lambda rows: rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
    )
    return results(loop.run())


def results(outcomes: list[Any]) -> list[AdapterState]:
    for outcome in outcomes:
        assert isinstance(outcome, TrainResult), outcome
    return [outcome.adapter for outcome in outcomes]


def same(ones: list[AdapterState], others: list[AdapterState]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(torch.equal(one.tensors()[name], value) for one, two in pairs for name, value in two.tensors().items())


WAYS: dict[str, tuple[str, dict[str, Any], Callable[..., list[AdapterState]]]] = {
    "encoder": ("bert", {}, plainly),
    "decoder": ("llama", {}, plainly),
    "packed": ("llama", {"packing": True, "max_length": 40}, plainly),
    "checkpointed": ("bert", {}, lambda *of: plainly(*of, gradient_checkpointing=True, micro_batch_size=3)),
    "private": ("bert", {}, privately),
    "private decoder": ("gpt2", {}, privately),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_gives_the_bytes_of_the_cpu(way: str, tmp_path: Path) -> None:
    name, options, train = WAYS[way]
    wanted = train(*a_base(name, tmp_path, "cpu", **options))
    for kind in KINDS:
        with pretend_gpu(kind) as log:
            found = train(*a_base(name, tmp_path, kind, **options))
        assert sum(log.launches.values()) > 1000, "it did compute there"
        if train is plainly:
            assert not log.wide, "no double precision on the device"
        if kind == "cuda" or train is plainly:  # norms of private steps are float32's on MPS
            assert same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_gives_the_figures_of_the_cpu(kind: str, tmp_path: Path) -> None:
    wanted = evaluate(*a_base("llama", tmp_path, "cpu"), batch_tokens=512).overall
    with pretend_gpu(kind) as log:
        assert evaluate(*a_base("llama", tmp_path, kind), batch_tokens=512).overall == wanted
    assert not log.wide


def waits(log: Log, base: Base, task: Task, examples: Examples, count: int) -> float:
    """Waits of the host in one step of the first client's size."""
    found = []
    for steps in (2, 6):
        log.reset()
        clients = [client(base, 0, size=8, steps=steps) for _ in range(count)]
        results(together(base, task, examples, clients))
        found.append(sum(log.waits.values()))
    return (found[1] - found[0]) / 4


def test_a_step_waits_neither_for_each_layer_nor_for_each_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for layers, count in ((2, 2), (4, 2), (2, 40)):
        kind, options = MODELS["llama"]
        monkeypatch.setitem(MODELS, "llama", (kind, {**options, "num_hidden_layers": layers}))
        with pretend_gpu() as log:
            base, task, examples = a_base("llama", tmp_path / f"{layers}", "cuda")
            found.append(waits(log, base, task, examples, count))
    assert found[0] <= 8
    assert found[1] == found[0]
    assert found[2] <= found[0] + 3, "passes of some more lengths, whoever's"


def test_an_adapter_is_sent_at_once(tmp_path: Path) -> None:
    """And not tensor by tensor, each of which would be waited for."""
    with pretend_gpu() as log:
        base, _, _ = a_base("llama", tmp_path, "cuda")
        state = client(base, 0)[0].adapter
        for rank in (4, 2):
            log.reset()
            base.write(client(base, 0, rank=rank)[0].adapter)
            assert sum(log.waits.values()) == 1
        log.reset()
        columns = Columns([state, state], base.tensor_names())
        columns.rows([state, state], torch.empty(0, device=base.device))
        assert sum(log.waits.values()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("strategy.name=flora",),
        ("adapter.layers=top:1", "runtime.prefix_cache=on", "task.max_length=32"),
    ],
    ids=["fedavg", "flora", "prefix"],
)
def test_a_whole_run_ends_with_the_bytes_of_the_cpu(
    changes: tuple[str, ...], tiny_config: Callable[..., RunConfig], tmp_path: Path, no_workspace: None
) -> None:
    found = []
    for device in ("cpu", "auto"):
        config = tiny_config(
            "model.dtype=float32", *changes, f"name={device}", f"runtime.device={device}", "runtime.processes=1"
        )
        with pretend_gpu() if device == "auto" else contextlib.nullcontext():
            outcome = run_simulation(config, RunDir.create(config), Callback())
            close_workspace()
        facts = outcome.rundir.read_json("environment.json")
        assert facts["device"] == {"cpu": "cpu", "auto": "cuda:0"}[device]
        assert facts["cuda"] == {"cpu": None, "auto": "pretended"}[device]
        found.append(outcome.adapter)
    assert same(found[:1], found[1:])


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_recorded_of_determinism_is_true(strict: bool) -> None:
    with pretend_gpu():
        machine = setup(RuntimeConfig(device="cuda", deterministic=strict, threads=1))
        assert machine.deterministic == strict == torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "or fused attention would not repeat itself"
        assert not torch.utils.deterministic.fill_uninitialized_memory, "a kernel for each empty tensor"  # type: ignore[attr-defined]
    with pretend_gpu("mps"):
        assert not setup(RuntimeConfig(device="mps", threads=1)).deterministic
    assert setup(RuntimeConfig(device="cpu", threads=1)).deterministic


def test_a_run_on_the_cpu_leaves_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(runtime=RuntimeConfig(device="cpu"))
    with pretend_gpu():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: pytest.fail("CUDA was started"))
        assert describe_environment(config)["cuda"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_draws_from_the_devices_own_generator_are_noticed(kind: str) -> None:
    with pretend_gpu(kind):
        device = torch.device(kind, 0)
        with Watch(device) as watch:
            torch.zeros(2, device=device)
        assert not watch.drawn
        with Watch(device) as watch:
            torch.rand(2, device=device)
        assert watch.drawn
        with Watch(torch.device("cpu")) as watch:
            torch.rand(2, device=device)
        assert not watch.drawn


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_to_where_it_is_asked(kind: str, tmp_path: Path) -> None:
    base, _, _ = a_base("bert", tmp_path / "model", "cpu")
    state = client(base, 0)[0].adapter
    save_adapter(base, state, tmp_path / "adapter", {})
    config = RunConfig(model=base.config, runtime=RuntimeConfig(device="cpu"))
    wanted = [after - before for _, before, after in changed_weights(loaded(config, tmp_path, "cpu"))]
    with pretend_gpu(kind):
        assert {value.device.type for value in loaded(config, tmp_path, "cpu").parameters()} == {"cpu"}
        there = loaded(config, tmp_path, kind)
        assert {value.device.type for value in there.parameters()} == {kind}
        found = [after - before for _, before, after in changed_weights(there)]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def loaded(config: RunConfig, folder: Path, device: str) -> torch.nn.Module:
    kwargs = {"num_labels": 3}
    return load_adapted(config, folder / "adapter", "AutoModelForSequenceClassification", kwargs, torch.device(device))


def test_kept_states_take_the_memory_that_they_need(tmp_path: Path) -> None:
    """A GPU has no pages that are there only when they are written."""
    base, task, examples = a_base("bert", tmp_path, "cpu", layers="top:1")
    inputs = {name: value for name, value in task.collate(examples, np.arange(8)).items() if name != "labels"}
    with torch.no_grad():
        wanted = base.model(**inputs).logits
        with pretend_gpu():
            base, _, _ = a_base("bert", tmp_path, "cuda", layers="top:1")
            set_dropout(base.model, 0.0)
            there = {name: value.to("cuda") for name, value in inputs.items()}
            cache = open_cache(base.model, base.targets, base.heads, there)
            cache.clear(10_000)
            found = base.model(**there).logits.cpu()
            assert cache.fills == len(found)
            assert cache._flat is not None
            assert len(cache._flat) < 1000
    assert float((found - wanted).abs().max()) < 1e-5


def test_the_widest_dtype_is_one_that_the_device_has() -> None:
    assert [widest(torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == [torch.float64] * 2 + [torch.float32]
