"""On a real GPU: what is computed is what a CPU computes, repeats itself, and ends where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import MODELS, client, random_base, random_examples, together
from support.interrupted import cut_and_resumed
from support.states import farthest, gap

from fedlora.adapter import AdapterState
from fedlora.callbacks import Callback
from fedlora.config import OpenTable, RunConfig, RuntimeConfig
from fedlora.model import Base
from fedlora.privacy.calibrate import Schedule
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.tasks import Examples, Task, _token_loss, load_task
from fedlora.training import TrainResult, close_workspace
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.evaluate import evaluate
from fedlora.training.runtime import setup

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Workspace and switches of determinism are given back."""
    close_workspace()
    yield
    close_workspace()
    torch.use_deterministic_algorithms(False)


def a_base(name: str, folder: Path, device: str, dtype: str = "float64", **options: Any) -> tuple[Base, Task, Examples]:
    causal = name in ("llama", "gpt2", "qwen2")
    targets = ("q_proj", "v_proj") if name == "vit" else ()
    base = random_base(name, folder, causal, dtype, device, dropout=0.1, targets=targets)
    kind = "causal-lm" if causal else "image-classification" if name == "vit" else "text-classification"
    return base, load_task(OpenTable(name=kind, **options)), random_examples(causal, name == "vit")  # type: ignore[arg-type]


def plainly(base: Base, task: Task, examples: Examples, count: int = 3, **changes: Any) -> list[AdapterState]:
    return adapters(
        together(base, task, examples, [client(base, k, rank=(4, 2, 6)[k], **changes) for k in range(count)])
    )


def privately(base: Base, task: Task, examples: Examples) -> list[AdapterState]:
    loop = PrivateTrainingLoop(
        base,
        task,
        examples,
        [client(base, k, rank=(4, 2, 6)[k], optimizer="sgd", lr=0.1) for k in range(3)],
        [PrivateSettings(Schedule(0.3, 2, 1, 8.0), 1e-12, 0.05)] * 3,  # a GPU's generator draws other noise
        samples=[iter([np.arange(9), np.arange(3, 7)]) for _ in range(3)],
        masks=lambda rows: rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
    )
    return adapters(loop.run())


def adapters(outcomes: list[Any]) -> list[AdapterState]:
    for outcome in outcomes:
        assert isinstance(outcome, TrainResult), outcome
    return [outcome.adapter for outcome in outcomes]


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", {}, {}),
    "gpt2": ("gpt2", {}, {}),
    "llama": ("llama", {}, {}),
    "vit": ("vit", {}, {}),
    "packed": ("llama", {"packing": True, "max_length": 40}, {}),
    "checkpointed": ("llama", {}, {"gradient_checkpointing": True, "micro_batch_size": 3}),
    "noisy embeddings": ("qwen2", {}, {"neftune_noise_alpha": 5.0}),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_cpus(way: str, gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options, changes = WAYS[way]
    monkeypatch.setattr(_token_loss, "CHUNK", 7)
    (wanted, _), (found, base) = (
        (plainly(*made, **changes), made[0])
        for made in (a_base(name, tmp_path, device, **options) for device in ("cpu", gpu))
    )
    assert farthest(wanted, found) < 1e-9
    assert base.device.type == torch.device(gpu).type


def test_a_client_gets_in_company_what_it_gets_alone(gpu: str, tmp_path: Path) -> None:
    made = a_base("llama", tmp_path, gpu)
    assert farthest(plainly(*made)[:1], plainly(*made, count=1)) < 1e-10


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_private_steps_are_the_cpus(name: str, gpu: str, tmp_path: Path) -> None:
    assert farthest(*(privately(*a_base(name, tmp_path, device)) for device in ("cpu", gpu))) < 1e-7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_training_repeats_itself(name: str, dtype: str, gpu: str, tmp_path: Path) -> None:
    assert setup(RuntimeConfig(device=gpu, threads=1)).deterministic
    made = a_base(name, tmp_path, gpu, dtype)
    assert farthest(plainly(*made), plainly(*made)) == 0.0


def test_evaluation_is_the_cpus(gpu: str, tmp_path: Path) -> None:
    wanted, found = (evaluate(*a_base("llama", tmp_path, device)).overall for device in ("cpu", gpu))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_a_step_that_does_not_fit_is_taken_in_smaller_passes(gpu: str, tmp_path: Path) -> None:
    if gpu == "cpu":
        pytest.skip("a CPU's memory has no share that can be set")
    base, task, _ = a_base("llama", tmp_path, gpu, "float32", max_length=4096)
    long = random_examples(causal=True, vit=False)
    rows = [np.resize(ids, 4096) for ids in long.inputs["input_ids"]]
    tokens = type(long.inputs["input_ids"]).join(rows, 0)
    examples = Examples({"input_ids": tokens, "labels": tokens}, None, tokens.lengths)
    base.pass_tokens = 10**7
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (1 << 29)) / total)
    try:
        adapters(together(base, task, examples, [client(base, k, batch_size=30) for k in range(3)]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert base.pass_tokens < 10**6


@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    strategy: str, gpu: str, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def config(name: str) -> RunConfig:
        return tiny_config(f"strategy.name={strategy}", f"runtime.device='{gpu}'", "runtime.processes=1", name=name)

    whole = config("whole")
    rundir = RunDir.create(whole)
    wanted = run_simulation(whole, rundir, Callback()).adapter
    assert rundir.read_json("environment.json")["device"] == gpu
    close_workspace()
    assert gap(wanted, cut_and_resumed(config("killed"), 2).adapter) == 0.0


def test_a_base_on_all_gpus_learns_what_it_learns_on_a_cpu(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU at most")
    kind, shape = MODELS["llama"]
    monkeypatch.setitem(MODELS, "llama", (kind, {**shape, "num_hidden_layers": 6}))
    task, examples = load_task(OpenTable(name="causal-lm")), random_examples(causal=True, vit=False)
    wanted, found = (
        plainly(random_base("llama", tmp_path, causal=True, dropout=0.1, runtime=runtime), task, examples)
        for runtime in ({"device": "cpu"}, {"device_map": "auto"})
    )
    assert farthest(wanted, found) < 1e-9


def test_two_processes_share_one_gpu(gpu: str, tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(f"runtime.device='{gpu}'", "runtime.processes=2", name="shared")
    outcome = run_simulation(config, RunDir.create(config), Callback())
    assert all(bool(value.isfinite().all()) for value in outcome.adapter.tensors().values())
