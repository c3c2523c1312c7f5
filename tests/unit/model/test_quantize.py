"""Bases in 4 and 8 bits, by bitsandbytes on the CPU: what is trained on them is what plain PEFT would train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import MODELS, client, gap, random_base, random_examples, together
from support.errors import raises
from torch import nn

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators import BaseUpdate
from fedlora.callbacks import Callback
from fedlora.config import OpenTable, RunConfig, TrainConfig, parse_config
from fedlora.errors import ConfigError, ModelError
from fedlora.model import Base, load_base, quantize, save_adapter, save_merged, seeded
from fedlora.privacy.calibrate import Schedule
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.tasks import Examples, Task, load_task
from fedlora.training import TrainJob, TrainResult, close_workspace, train
from fedlora.training.cohort import why_alone
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings

pytest.importorskip("bitsandbytes")
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
ROWS = np.arange(6)
SGD = TrainConfig(steps=1, batch_size=8, optimizer="sgd", lr=0.1)


@pytest.fixture(scope="module", params=[("llama", "nf4"), ("llama", "int8"), ("bert", "nf4")], ids="-".join)
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Task, Examples]:
    name, quantize = request.param
    causal, folder = name == "llama", tmp_path_factory.mktemp(f"{name}-{quantize}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, (MODELS[name][0], {**MODELS[name][1], "hidden_size": 64, "intermediate_size": 128}))
        base = random_base(name, folder, causal, "float32", quantize=quantize)
    base.model.config.hidden_dropout_prob = 0.0  # type: ignore[union-attr]
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    task = load_task(OpenTable(name="causal-lm" if causal else "text-classification"))
    return base, task, random_examples(causal, vit=False)


def test_frozen_layers_are_quantised_and_heads_are_not(held: tuple[Base, Task, Examples]) -> None:
    base = held[0]
    kind = KINDS[str(base.config.quantize)]
    assert {type(layer.get_base_layer()).__name__ for layer in base.pair_layers.values()} == {kind}  # type: ignore[operator]
    heads = [m for head in base.head_modules.values() for m in head.modules() if isinstance(m, nn.Linear)]
    output = base.model.get_output_embeddings() if not base.heads else None  # type: ignore[operator]
    whole = [module for module in (*heads, output) if module is not None]
    assert whole
    assert all(type(module) is nn.Linear for module in whole)
    assert base.dtype == torch.float32


def test_a_step_is_that_of_plain_peft(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    job = TrainJob(client(base, 0)[0].adapter, ALL_PARTS, ROWS, 0)
    found = train(base, task, examples, job, SGD).adapter
    parameters = base.write(job.adapter)  # PEFT's own layers, on the same quantised base
    base.train_mode(True)
    loss = task.losses(base.model, task.collate(examples, ROWS)).mean()
    gradients = torch.autograd.grad(loss, parameters)
    names = base.tensor_names()
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        wanted = parameter.detach() - SGD.lr * gradient
        assert float((found.tensors()[name] - wanted).norm() / wanted.norm().clamp_min(1.0)) < 2e-4, name


def test_clients_train_side_by_side(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    assert why_alone(base) is None
    clients = [client(base, k, rank=(4, 2)[k], optimizer="sgd", lr=0.05) for k in range(2)]
    for one, other in zip(together(base, task, examples, clients), clients, strict=True):
        assert isinstance(one, TrainResult), one
        (alone,) = together(base, task, examples, [other])
        assert gap(one.adapter, alone.adapter) < 1e-3
        assert gap(one.adapter, other[0].adapter) > 1e-3, "it did train"


def test_private_training_sums_the_clipped_gradients_of_each_example(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    job = TrainJob(client(base, 0)[0].adapter, ALL_PARTS, ROWS, 0)
    check_model(base, task, examples, job)
    settings = PrivateSettings(Schedule(1.0, 1, 1, float(len(ROWS))), 1e-9, 0.05)
    found = train_private(base, task, examples, job, SGD.model_copy(update={"lr": 1.0}), settings).adapter
    parameters = base.write(job.adapter)
    base.train_mode(True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    clip = settings.clipping_norm(base.dtype)
    for row in ROWS:
        loss = task.losses(base.model, task.collate(examples, [row])).sum()
        gradients = torch.autograd.grad(loss, parameters)
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        total = [held + one * min(1.0, clip / norm) for held, one in zip(total, gradients, strict=True)]
    for name, parameter, gradient in zip(base.tensor_names(), parameters, total, strict=True):
        wanted = parameter.detach() - gradient / len(ROWS)
        assert float((found.tensors()[name] - wanted).abs().max()) < 1e-4, name


def test_changes_of_the_base_are_carried_beside_and_taken_back(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    state = client(base, 0)[0].adapter
    nothing, batch = base.initial_adapter(0), task.collate(examples, ROWS)
    pairs = AdapterState(state.pairs, {})

    def losses(adapter: AdapterState) -> torch.Tensor:
        base.write(adapter, frozenset())
        base.train_mode(False)
        with torch.no_grad():
            return task.losses(base.model, batch)

    before, wanted = losses(nothing), losses(AdapterState(state.pairs, nothing.dense))
    base.rebase(1, [BaseUpdate(0, 1, pairs)])
    changed = losses(nothing)
    base.rebase(0, ())
    assert float((changed - wanted).abs().max()) < 1e-3
    assert float((changed - before).abs().max()) > 1e-2
    assert torch.equal(losses(nothing), before)


def test_what_cannot_be_done_is_refused(held: tuple[Base, Task, Examples], tmp_path: Path) -> None:
    base = held[0]
    with raises(ModelError, "weight-quantised", "float32"):
        save_merged(base, base.initial_adapter(0), [], tmp_path / "merged")
    with raises(ConfigError, "dtype-too-wide", "model.dtype = 'auto'"):
        parse_config("", ["model.quantize=nf4", "model.dtype=float64"])


def test_another_quantisation_is_another_base(held: tuple[Base, Task, Examples]) -> None:
    base = held[0]
    config = RunConfig(model=base.config.model_copy(update={"quantize": None}))
    whole = load_base(config, base.recipe.auto_class, base.heads, {"num_labels": 3} if base.heads else {})
    assert whole.weights_digest != base.weights_digest


def test_an_adapter_goes_on_the_base_that_its_readme_loads(held: tuple[Base, Task, Examples], tmp_path: Path) -> None:
    from peft import PeftModel

    base, task, examples = held
    state, batch = client(base, 0)[0].adapter, task.plain_inputs(examples, ROWS)
    base.write(state, frozenset())
    base.train_mode(False)
    save_adapter(base, state, tmp_path / "adapter", {})
    said = base.recipe.snippet().replace("this folder", str(tmp_path / "adapter"))
    assert "BitsAndBytesConfig(" in said
    names: dict[str, Any] = {}
    exec(said, names)
    assert isinstance(names["model"], PeftModel)
    with torch.no_grad():
        ours, theirs = (model(**batch).logits.float() for model in (base.model, names["model"]))
    mask = batch["attention_mask"].bool()
    kept = mask if ours.dim() == 3 else slice(None)
    # On CPUs with AVX512-BF16 bitsandbytes computes in bfloat16 in evaluation, whatever the base's dtype.
    within = 2e-2 if base.config.quantize == "nf4" else 1e-3
    assert float((ours[kept] - theirs[kept]).abs().max()) < within * float(ours.abs().max())


def test_evaluation_leaves_a_base_that_can_be_trained(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    base.train_mode(False)
    batch = task.collate(examples, ROWS)
    parameters = base.write(client(base, 0)[0].adapter)
    with torch.inference_mode():
        before = task.losses(base.model, batch)
    gradients = torch.autograd.grad(task.losses(base.model, batch).sum(), parameters)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert float((task.losses(base.model, batch) - before).abs().max()) < 1e-5


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda _name: None)
    config = parse_config("", ["model.quantize=nf4"])
    with raises(ConfigError, "extra-missing", "pip install 'fedlora[quantize]'"):
        quantize.quantization(config, torch.float32, torch.device("cpu"))


@pytest.fixture
def fresh() -> Iterator[None]:
    close_workspace()
    yield
    close_workspace()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", "flora"])
def test_a_run_resumes_to_the_same_bytes(
    rule: str, tiny_bert: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path, fresh: None
) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    with seeded(0, torch.device("cpu")):
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        BertModel(BertConfig.from_pretrained(tiny_bert, **sizes)).save_pretrained(folder)

    def config(name: str, rounds: int) -> RunConfig:
        changes = (
            f"model.name='{folder}'",
            "model.quantize=nf4",
            f"strategy.name={rule}",
            "runtime.processes=1",
            f"rounds={rounds}",
        )
        return tiny_config(*changes, f"name={name}")

    whole = run_simulation(config("whole", 3), RunDir.create(config("whole", 3)), Callback())
    begun = run_simulation(config("halves", 1), RunDir.create(config("halves", 1)), Callback())
    close_workspace()
    resumed = run_simulation(config("halves", 3), begun.rundir, Callback(), resume=True)
    for name, value in whole.adapter.tensors().items():
        assert torch.equal(resumed.adapter.tensors()[name], value), name
    assert whole.records[-1]["loss"] < whole.records[0]["loss"]
