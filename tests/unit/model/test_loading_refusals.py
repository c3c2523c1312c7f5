"""What a checkpoint must bring: all weights but a new head's, a tokenizer of its own, and the order of its classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.errors import raises

from fedlora.config import AdapterConfig, ModelConfig, RunConfig, RuntimeConfig
from fedlora.errors import DataError, FedloraError, ModelError
from fedlora.model import Base, load_base
from fedlora.tasks import load_task
from fedlora.tasks._base import Examples, Table
from fedlora.tasks._text import encode, load_tokenizer

SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYER = "bert.encoder.layer.1.output.dense.weight"


def load(path: Path, auto_class: str = "AutoModelForSequenceClassification", **model: Any) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(path), **model),
        adapter=AdapterConfig(rank=2, targets=("all-linear",)),
        runtime=RuntimeConfig(device="cpu"),
    )
    if auto_class.endswith("CausalLM"):
        return load_base(config, auto_class, (), {}, "CAUSAL_LM")
    return load_base(config, auto_class, ("classifier", "score"), {"num_labels": 3}, "SEQ_CLS")


@pytest.fixture
def changed(tiny_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny BERT with other tensors or another config."""

    def change(tensors: Callable[[dict[str, Any]], dict[str, Any]] | None = None, **config: Any) -> Path:
        path = Path(shutil.copytree(tiny_bert, tmp_path / "changed"))
        if tensors is not None:
            kept = tensors(load_file(path / "model.safetensors"))
            save_file(kept, path / "model.safetensors", {"format": "pt"})
        facts = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**facts, **config}))
        return path

    return change


def lacking(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("part", ["encoder.layer.1.", "word_embeddings", "encoder.layer.0.attention.self.query"])
def test_missing_weights_of_the_base_are_refused(changed: Callable[..., Path], part: str) -> None:
    path = changed(lacking(part))
    with raises(ModelError, "checkpoint-mismatch", part, "model.ignore_mismatched_sizes"):
        load(path)
    base = load(path, ignore_mismatched_sizes=True)
    assert any(part.strip(".") in name for name in base.random)
    assert not set(base.random) & set(base.targets), "random weights are no base for a pair"


@pytest.mark.parametrize("config", [{"intermediate_size": 48}, {"vocab_size": 500}, {"max_position_embeddings": 80}])
def test_weights_of_another_shape_are_refused(changed: Callable[..., Path], config: dict[str, int]) -> None:
    path = changed(**config)
    with raises(ModelError, "checkpoint-mismatch", "model.ignore_mismatched_sizes"):
        load(path)
    assert load(path, ignore_mismatched_sizes=True).random


def test_the_weights_of_another_architecture_are_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    path = changed()
    GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    shutil.copyfile(tmp_path / "gpt2" / "model.safetensors", path / "model.safetensors")
    with raises(ModelError, "checkpoint-mismatch", "BertForSequenceClassification"):
        load(path)


def test_a_new_task_may_bring_a_head_and_a_pooler_alone(changed: Callable[..., Path]) -> None:
    base = load(changed(lacking("pooler")))
    assert (base.heads, base.random) == (("classifier",), ("bert.pooler.dense",))
    assert sum("classifier" in note for note in base.notes) == 1
    assert "bert.pooler.dense" not in base.targets


def test_a_language_model_has_no_new_head(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    LlamaModel(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "trunk")
    with raises(ModelError, "checkpoint-mismatch", "lm_head.weight", "LlamaModel"):
        load(tmp_path / "trunk", "AutoModelForCausalLM")
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    assert load(tmp_path / "tied", "AutoModelForCausalLM").random == ()
    assert load(tmp_path / "tied").random == (), "a language model under a classifier lacks the head alone"


def test_a_target_without_weights_is_to_be_trained_in_full(changed: Callable[..., Path]) -> None:
    config = RunConfig(
        model=ModelConfig(name=str(changed(lacking("pooler")))),
        adapter=AdapterConfig(rank=2, targets=("pooler.dense",)),
        runtime=RuntimeConfig(device="cpu"),
    )
    with raises(ModelError, "weights-missing", "pooler.dense", "adapter.modules_to_save"):
        load_base(config, "AutoModelForSequenceClassification", ("classifier",), {"num_labels": 3}, "SEQ_CLS")


# ---------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Roberta", "Qwen2", "XLMRoberta", "DebertaV2", "T5", "Gemma"])
def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    import transformers

    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with raises(ModelError, "no-tokenizer", tmp_path):
        load_tokenizer(tmp_path)


def test_half_a_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate("abc")}))
    with raises(ModelError, "tokenizer-not-loadable", "merges"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_knows_no_word_is_refused(tiny_bert: Path) -> None:
    assert len(encode(tiny_bert, [("text", ["happy \u4e16", "film"])], 16)[0]) == 2
    with raises(DataError, "all-words-unknown"):
        encode(tiny_bert, [("text", ["\u4e16 \u754c", "\u4f60"])], 16)


# ---------------------------------------------------------------------------------------------- classes


@pytest.fixture
def judge(tiny_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with a trained head for some classes."""

    def make(*names: str) -> Path:
        from transformers import BertConfig, BertForSequenceClassification

        path = Path(shutil.copytree(tiny_bert, tmp_path / "judge"))
        facts = BertConfig.from_pretrained(path, id2label=dict(enumerate(names)))
        torch.manual_seed(0)
        BertForSequenceClassification(facts).save_pretrained(path)
        return path

    return make


def prepared(path: Path, values: list[Any], **fields: Any) -> Examples:
    from fedlora.config import OpenTable

    task = load_task(OpenTable(name="text-classification", **fields))
    table = Table({"text": ["happy film"] * len(values), "label": values})
    return task.prepare(table, path, {"text": "text", "label": "label"}, keep=())


def with_head(path: Path, examples: Examples) -> tuple[Base, torch.Tensor]:
    """The base and the head that training starts from."""
    task = load_task(RunConfig().task)
    config = RunConfig(model=ModelConfig(name=str(path)), runtime=RuntimeConfig(device="cpu"))
    base = load_base(config, task.auto_class, task.head, task.model_kwargs(examples), task.peft_task_type)
    return base, base.initial_adapter(0).dense["classifier.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"labels": ["neg", "pos"]}, {"labels": ["pos", "neg"]}])
@pytest.mark.parametrize("trained", [("pos", "neg"), ("neg", "pos"), ("POS", "Neg")])
def test_a_trained_heads_classes_keep_their_logits(
    judge: Callable[..., Path], trained: tuple[str, str], fields: dict[str, Any]
) -> None:
    path = judge(*trained)
    examples = prepared(path, ["neg", "pos", "pos"], **fields)
    assert [name.lower() for name in examples.label_names] == [name.lower() for name in trained]
    assert [examples.label_names[place] for place in examples.labels] == ["neg", "pos", "pos"]  # type: ignore[union-attr]
    base, head = with_head(path, examples)
    assert torch.equal(head, load_file(path / "model.safetensors")["classifier.weight"])
    assert base.model.config.id2label == dict(enumerate(examples.label_names))


@pytest.mark.parametrize("labels", [["neg", "new", "pos"], ["x", "y", "z"], ["neg", "pos", "neg"]])
def test_a_head_for_other_classes_starts_anew(judge: Callable[..., Path], labels: list[str]) -> None:
    path = judge("neg", "neutral", "pos")
    examples = prepared(path, labels)
    assert list(examples.label_names) == sorted(set(labels))
    base, head = with_head(path, examples)
    old = load_file(path / "model.safetensors")["classifier.weight"]
    assert not any(torch.equal(row, other) for row in head for other in old)
    (note,) = base.notes
    assert "neutral" in note
    assert "task.labels" in note


def test_a_file_that_lacks_a_class_keeps_the_head_where_all_are_named(judge: Callable[..., Path]) -> None:
    path = judge("pos", "neutral", "neg")
    examples = prepared(path, ["neg", "pos"], labels=["neg", "neutral", "pos"])
    assert examples.label_names == ("pos", "neutral", "neg")
    assert np.asarray(examples.labels).tolist() == [2, 0]
    assert torch.equal(with_head(path, examples)[1], load_file(path / "model.safetensors")["classifier.weight"])


@pytest.mark.parametrize("trained", [("LABEL_0", "LABEL_1"), ("negative", "positive")])
def test_numbers_are_the_heads_own(judge: Callable[..., Path], trained: tuple[str, str]) -> None:
    path = judge(*trained)
    examples = prepared(path, [1, 0])
    assert np.asarray(examples.labels).tolist() == [1, 0]
    assert torch.equal(with_head(path, examples)[1], load_file(path / "model.safetensors")["classifier.weight"])


def test_labels_as_numbers_count_the_named_classes_and_not_the_heads(judge: Callable[..., Path]) -> None:
    examples = prepared(judge("pos", "neg"), [0, 1, 1], labels=["neg", "pos"])
    assert [examples.label_names[place] for place in np.asarray(examples.labels)] == ["neg", "pos", "pos"]


def test_all_refusals_are_one_line(changed: Callable[..., Path]) -> None:
    with pytest.raises(FedloraError) as caught:
        load(changed(lacking("layer.1")))
    assert "\n" not in str(caught.value)
