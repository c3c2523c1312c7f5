"""Clients of tiny random models whose training can be compared to the last digit, float64 being the default."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.model import Base, load_base, seeded
from fedlora.speedups.attention import choose_attention
from fedlora.tasks import Examples, Table, Task, load_task
from fedlora.tasks._text import Tokens
from fedlora.tasks.image_classification import Pixels
from fedlora.training import TrainJob, train_cohort
from fedlora.training.row_groups import PassCost

WIDE = PassCost(1e9, math.inf, 10**9)
"""All rows of a step in one pass."""
PASSES = (PassCost(30.0, 64.0, 300), PassCost(30.0, 64.0, 300, padding=0.0), PassCost(0.0, math.inf, 1))
"""Some rows in a pass, with padding and without where a model can, and each row in one of its own."""


def texts(folder: Path, file: Path) -> tuple[Task, Examples]:
    task = load_task(OpenTable(name="text-classification"))
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    table = Table({name: [row[name] for row in rows] for name in rows[0]})
    return task, task.prepare(table, folder, {"text": "text", "label": "label"}, keep=())


def load(path: Path, task: Task, examples: Examples, dtype: str = "float64", dropout: float = 0.0) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(path), dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(rank=4, dropout=dropout),
        runtime=RuntimeConfig(device="cpu"),
    )
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    kwargs = {**task.model_kwargs(examples), **rates}
    base = load_base(config, task.auto_class, task.head, kwargs, task.peft_task_type)
    choose_attention(base.model)  # as in a run
    return base


def adapter(base: Base, rank: int | None, seed: int) -> AdapterState:
    """One with values everywhere, so that every tensor has a gradient."""
    state = base.initial_adapter(0)
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
    if (factor := changes.pop("tilt", 0.0)) != 0.0:
        mine["tilt"] = {name: factor * value for name, value in job.adapter.tensors().items()}
    if changes.pop("toward", False):
        mine["toward"] = adapter(base, rank, number + 100)
    return replace(job, **mine), config.model_copy(update=changes)


def together(base: Base, task: Task, examples: Examples, clients: list[Client], **kwargs: Any) -> list[Any]:
    return train_cohort(base, task, examples, [job for job, _ in clients], [config for _, config in clients], **kwargs)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DROP = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
VOCABULARY = 40
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**SMALL, **DROP}),
    "roberta": ("RobertaConfig", {**SMALL, **DROP, "max_position_embeddings": 40, "pad_token_id": 0}),
    "distilbert": ("DistilBertConfig", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("LlamaConfig", {**SMALL, "num_key_value_heads": 1, "attention_dropout": 0.1}),
    "qwen2": ("Qwen2Config", {**SMALL, "num_key_value_heads": 1}),
    "vit": ("ViTConfig", {**SMALL, **DROP, "image_size": 8, "patch_size": 4}),
}


def random_base(
    name: str,
    folder: Path,
    causal: bool,
    dtype: str = "float64",
    device: str = "cpu",
    quantize: str | None = None,
    runtime: dict[str, Any] | None = None,
    **adapter: Any,
) -> Base:
    """A tiny random model of an architecture, its head three classes or its vocabulary.

    `runtime` stands for the device."""
    import transformers

    kind, options = MODELS[name]
    if name != "vit":
        options = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    config = getattr(transformers, kind)(**options, num_labels=3)
    auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    auto = "AutoModelForImageClassification" if name == "vit" else auto
    with seeded(3, torch.device("cpu")):
        model = getattr(transformers, auto).from_config(config)
        for parameter in model.parameters():  # so that every layer matters
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    run = RunConfig(
        model=ModelConfig(name=str(folder), dtype=dtype, quantize=quantize),  # type: ignore[arg-type]
        adapter=AdapterConfig(**adapter),
        runtime=RuntimeConfig(**(runtime or {"device": device})),
    )
    base = load_base(run, auto, () if causal else ("classifier", "pre_classifier", "score"), {})
    choose_attention(base.model)
    return base


def random_examples(causal: bool, vit: bool) -> Examples:
    draw = np.random.default_rng(0)
    classes = draw.integers(0, 3, 200)
    if vit:
        values = draw.integers(0, 256, (200, 3, 8, 8)).astype(np.uint8)
        pixels = Pixels(values, np.full(3, 1 / 255, np.float32), np.zeros(3, np.float32))
        return Examples({"pixel_values": pixels}, classes, np.full(200, 5))
    rows = [draw.integers(3, VOCABULARY, draw.integers(4, 20)) for _ in range(200)]
    tokens = Tokens.join(rows, 0)
    if not causal:
        return Examples({"input_ids": tokens}, classes, tokens.lengths)
    labels = [np.where(np.arange(len(row)) < 2, -100, row) for row in rows]
    return Examples({"input_ids": tokens, "labels": Tokens.join(labels, -100)}, None, tokens.lengths)
