"""Weights are loaded to where they stay: on one GPU, or layer by layer on several; and nothing else changes by it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cohorts import MODELS, client, random_base, random_examples, together
from support.errors import raises
from support.pretend_gpu import pretend_gpu

from fedlora.callbacks import Callback
from fedlora.config import OpenTable, RunConfig, parse_config
from fedlora.errors import ConfigError, ModelError
from fedlora.model import Base, load_base
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.tasks import Examples, Task, _token_loss, load_task
from fedlora.training import TrainResult, close_workspace
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import open_workspace

pytestmark = pytest.mark.slow
GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of so many layers that accelerate finds something for the second GPU."""
    for name in ("bert", "llama"):
        kind, options = MODELS[name]
        few = {"max_position_embeddings": 64} if name == "bert" else {}
        monkeypatch.setitem(MODELS, name, (kind, {**options, **few, "num_hidden_layers": 6}))
    monkeypatch.setattr(_token_loss, "CHUNK", 7)


def made(name: str, folder: Path, **runtime: Any) -> tuple[Base, Task, Examples]:
    base = random_base(name, folder, name == "llama", "float32", dropout=0.1, runtime=runtime)
    kind = "causal-lm" if name == "llama" else "text-classification"
    return base, load_task(OpenTable(name=kind)), random_examples(name == "llama", vit=False)


def learnt(base: Base, task: Task, examples: Examples) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
    """What two clients' adapters become, and a figure."""
    more = {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0} if task.auto_class.endswith("CausalLM") else {}
    found = together(base, task, examples, [client(base, k, rank=(4, 2)[k], size=10, **more) for k in range(2)])
    for outcome in found:
        assert isinstance(outcome, TrainResult), outcome
    base.write(found[1].adapter)
    return [outcome.adapter.tensors() for outcome in found], evaluate(base, task, examples, batch_tokens=512).overall


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_clients_learn_on_two_gpus_what_they_learn_on_a_cpu(name: str, tmp_path: Path, deep: None) -> None:
    adapters, figures = learnt(*made(name, tmp_path, device="cpu"))
    with pretend_gpu(count=2):
        base, task, examples = made(name, tmp_path, device_map="auto")
        held = [sum(p.numel() for p in base.model.parameters() if p.device == device) for device in GPUS]
        assert min(held) > sum(held) / 5, "each has its part"
        assert base.device == GPUS[0]
        assert set(base.devices) == set(GPUS)
        found, measured = learnt(base, task, examples)
    assert measured == figures
    for one, other in zip(found, adapters, strict=True):
        assert all(torch.equal(one[key], value) for key, value in other.items())


@pytest.mark.parametrize("rule", ["fedavg", "flora"])
def test_a_run_on_two_gpus_ends_with_the_bytes_of_a_cpu(
    rule: str, tiny_bert: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    from transformers import AutoConfig, BertModel

    shutil.copytree(tiny_bert, tmp_path / "deep")
    shape = AutoConfig.from_pretrained(tiny_bert)
    shape.num_hidden_layers = 6
    BertModel(shape).save_pretrained(tmp_path / "deep")
    found = []
    for key in ("device=cpu", "device_map=auto"):
        given = [f"model.name='{tmp_path / 'deep'}'", "model.dtype=float32", f"strategy.name={rule}", f"runtime.{key}"]
        config = tiny_config(*given, name=f"{rule}-{len(found)}")
        close_workspace()
        with pretend_gpu(count=2) if found else contextlib.nullcontext():
            outcome = run_simulation(config, RunDir.create(config), Callback())
            assert len(open_workspace(config).base.devices) == 1 + len(found)
            close_workspace()
        found.append(outcome.adapter.tensors())
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_a_base_that_the_gpus_do_not_hold_is_refused(tmp_path: Path, deep: None) -> None:
    with pretend_gpu(count=2, memory=20_000), raises(ModelError, "gpu-too-small", "do not hold the base", "nf4"):
        made("llama", tmp_path, device_map="auto")


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_spreading_takes_all_gpus(device: str, tmp_path: Path) -> None:
    with pretend_gpu(count=2), raises(ConfigError, "devices-differ", device, "remove one of them"):
        made("llama", tmp_path, device=device, device_map="auto")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_base_lies_on_the_gpu_that_was_asked_for(quantize: str | None, tmp_path: Path) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    with pretend_gpu(count=2):
        base = random_base("llama", tmp_path, True, "float32", "cuda:1", quantize)
        assert {value.device for value in (*base.model.parameters(), *base.model.buffers())} == {GPUS[1]}


@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_what_a_checkpoint_lacks_is_drawn_alike_on_every_device(quantize: str, tmp_path: Path) -> None:
    import transformers

    if quantize:
        pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path)
    task = load_task(OpenTable(name="text-classification"))

    def loaded(device: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]:
        given = [f"model.name='{tmp_path}'", "model.dtype=float32", f"model.quantize={quantize}"]
        config: RunConfig = parse_config("", [*given, f"runtime.device={device}"])
        base = load_base(config, task.auto_class, task.head, {"num_labels": 3}, task.peft_task_type)
        assert base.random == ("bert.pooler.dense",)
        drawn = {name: value.cpu() for name, value in base.random_tensors().items()}
        return drawn, dict(base.initial_adapter(0).dense), base.fingerprint

    wanted = loaded("cpu")
    for seed in (1, 2):
        with pretend_gpu():
            torch.cuda.manual_seed(seed)  # which another process has in another state
            found = loaded("cuda")
        for one, other in zip(found[:2], wanted[:2], strict=True):
            assert all(torch.equal(one[key], value) for key, value in other.items())
        assert found[2] == wanted[2]
