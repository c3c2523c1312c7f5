"""NEFTune's noise is the paper's, belongs to client, step and row, and is there in training alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import PASSES, WIDE, client, random_base, random_examples, together
from support.errors import raises
from support.pretend_gpu import pretend_gpu
from support.states import farthest, gap
from torch import Tensor
from transformers import T5Config, T5ForSequenceClassification

from fedlora.adapter import AdapterState
from fedlora.config import OpenTable, parse_config
from fedlora.errors import ConfigError, TrainingError
from fedlora.model import Base
from fedlora.privacy.calibrate import Schedule
from fedlora.tasks import Examples, Task, load_task
from fedlora.tasks._base import REFERENCE, Batch
from fedlora.tasks.text_classification import TextClassification
from fedlora.training import TrainResult
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.embedding_noise import EmbeddingNoise, require_noisy

ALPHA = 5.0


def a_base(name: str, folder: Path, device: str = "cpu", **options: Any) -> tuple[Base, Task, Examples]:
    causal = name != "bert"
    base = random_base(name, folder, causal, device=device, dropout=0.1)
    kind = "causal-lm" if causal else "text-classification"
    return base, load_task(OpenTable(name=kind, **options)), random_examples(causal, vit=False)  # type: ignore[arg-type]


def plainly(base: Base, task: Task, examples: Examples, cost: Any = None, **changes: Any) -> list[AdapterState]:
    how = {"neftune_noise_alpha": ALPHA, **changes}
    clients = [client(base, k, rank=(4, 2)[k], batch_size=(8, 3)[k], **how) for k in range(2)]
    return adapters(together(base, task, examples, clients, cost=cost))


def privately(base: Base, task: Task, examples: Examples, cost: Any = None, **changes: Any) -> list[AdapterState]:
    loop = PrivateTrainingLoop(
        base,
        task,
        examples,
        [client(base, k, **{"neftune_noise_alpha": ALPHA, **changes}) for k in range(2)],
        [PrivateSettings(Schedule(0.3, 2, 1, 8.0), 0.5, 0.05)] * 2,
        cost=cost,
        samples=[iter([np.arange(9), np.arange(3, 7)]) for _ in range(2)],
        generators=[torch.Generator().manual_seed(k) for k in range(2)],
        masks=lambda rows: rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
    )
    return adapters(loop.run())


def adapters(outcomes: list[Any]) -> list[AdapterState]:
    assert all(isinstance(outcome, TrainResult) for outcome in outcomes), outcomes
    return [outcome.adapter for outcome in outcomes]


def test_the_noise_is_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha / sqrt(L d) times numbers that are uniform from -1 to 1, L without padding: Algorithm 1."""
    base, task, examples = a_base("llama", tmp_path)
    seen: list[tuple[Tensor, Tensor]] = []
    real = EmbeddingNoise._noisy

    def noisy(self: EmbeddingNoise, module: Any, args: Any, embedded: Tensor) -> Tensor:
        found = real(self, module, args, embedded)
        real_tokens = (args[0] != 0).sum(1)
        seen.append((found - embedded, real_tokens))
        return found

    monkeypatch.setattr(EmbeddingNoise, "_noisy", noisy)
    plainly(base, task, examples, WIDE, steps=20)
    assert any(len(set(tokens.tolist())) > 1 for _, tokens in seen), "rows are padded"
    drawn = []
    for noise, tokens in seen:
        width = noise.shape[2]
        for row, length in zip(noise, tokens.tolist(), strict=True):
            drawn.append((row[:length] / (ALPHA / math.sqrt(length * width))).flatten())
    values = torch.cat(drawn)
    assert float(values.abs().max()) <= 1
    deviations = len(values) ** 0.5 * torch.tensor(
        [values.mean() / 3**-0.5, (values.square().mean() - 1 / 3) / (4 / 45) ** 0.5]
    )
    assert float(deviations.abs().max()) < 4
    assert float(values.max()) > 0.999
    assert len(values.unique()) > 0.3 * len(values), "no two rows or steps have the same"


@dataclass(frozen=True)
class Referring(TextClassification):
    """Its loss also compares with what the start says of a text."""

    heard: list[Tensor] = field(default_factory=list)

    @property
    def refers(self) -> bool:
        return True

    def reference(self, model: Any, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        self.heard.append(model(**inputs).logits)
        return self.heard[-1]

    def losses(self, model: Any, batch: Batch) -> Tensor:
        plain = {name: value for name, value in batch.items() if name != REFERENCE}
        return super().losses(model, plain) + batch[REFERENCE].square().mean(1)


@pytest.mark.parametrize("cost", [WIDE, PASSES[-1]], ids=["together", "row by row"])
def test_what_a_task_refers_to_has_no_noise(cost: Any, tmp_path: Path) -> None:
    base, _, examples = a_base("bert", tmp_path)
    noisy, plain = Referring(), Referring()
    plainly(base, noisy, examples, cost)
    plainly(base, plain, examples, cost, neftune_noise_alpha=None)
    assert len(noisy.heard) > 1
    assert all(torch.equal(one, other) for one, other in zip(noisy.heard, plain.heard, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "train"),
    [
        ("bert", {}, plainly),
        ("llama", {}, plainly),
        ("llama", {"packing": True, "max_length": 40}, plainly),
        ("llama", {}, privately),
    ],
    ids=["encoder", "decoder", "packed", "private"],
)
@pytest.mark.slow
def test_passes_and_company_leave_it_alone(name: str, options: dict[str, Any], train: Any, tmp_path: Path) -> None:
    base, task, examples = a_base(name, tmp_path, **options)
    wanted = train(base, task, examples, WIDE)
    assert farthest(wanted, train(base, task, examples, WIDE, neftune_noise_alpha=None)) > 1e-4, "it does something"
    for cost in PASSES:
        assert farthest(wanted, train(base, task, examples, cost)) < 1e-10
    if train is plainly:
        alone = [client(base, 1, rank=2, batch_size=3, neftune_noise_alpha=ALPHA)]
        assert farthest(wanted[1:], adapters(together(base, task, examples, alone))) < 1e-10
        again = train(base, task, examples, gradient_checkpointing=True, micro_batch_size=2)
        assert farthest(wanted, again) < 1e-10


def test_a_client_without_it_is_left_alone_beside_one_with(tmp_path: Path) -> None:
    """Its masks are its own, too: noise that is drawn before them moves none."""
    base, task, examples = a_base("llama", tmp_path)
    pair = [client(base, 0, neftune_noise_alpha=ALPHA), client(base, 1)]
    (_, without), (alone,) = (adapters(together(base, task, examples, some)) for some in (pair, pair[1:]))
    assert gap(without, alone) < 1e-10


def test_there_is_none_in_evaluation(tmp_path: Path) -> None:
    base, task, examples = a_base("llama", tmp_path)
    hooks = dict(base.model.get_input_embeddings()._forward_hooks)
    (adapter,) = plainly(base, task, examples)[:1]
    assert base.model.get_input_embeddings()._forward_hooks == hooks
    base.write(adapter)
    base.train_mode(False)
    one, other = (task.measure(base.model, task.collate(examples, range(4)))["loss"] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.slow
def test_a_gpu_draws_the_same(tmp_path: Path) -> None:
    wanted = plainly(*a_base("llama", tmp_path))
    with pretend_gpu():
        assert farthest(wanted, plainly(*a_base("llama", tmp_path, "cuda"))) == 0.0


def test_what_it_cannot_be_added_to_is_refused(tmp_path: Path) -> None:
    base, task, examples = a_base("llama", tmp_path)
    t5 = T5ForSequenceClassification(T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with raises(ConfigError, "embeddings-without-rows", "T5ForSequenceClassification", "remove it"):
        require_noisy(t5, examples)
    require_noisy(base.model, examples)
    with raises(ConfigError, "noise-without-tokens", "train.neftune_noise_alpha"):
        require_noisy(base.model, random_examples(causal=False, vit=True))
    with raises(ConfigError, "noise-below-cache", "runtime.prefix_cache"):
        parse_config("", ["train.neftune_noise_alpha=5", "runtime.prefix_cache='on'"])
    embedding = base.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _args, out: out[:1])
    (outcome,) = together(base, task, examples, [client(base, 0, neftune_noise_alpha=ALPHA)])
    assert isinstance(outcome, TrainingError)
    assert outcome.code == "embeddings-without-rows"
