"""Tiny random models of transformers' own classes with everything random that their configs know, and examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig
from fedlora.model import Base, load_base
from fedlora.tasks import Examples, Task, load_task
from fedlora.tasks._text import Tokens
from fedlora.tasks.image_classification import Pixels

VOCABULARY = 60
SIDE = 16
"""Of a picture, in pixels."""
NAMED: dict[str, tuple[int, str]] = {
    "width": (
        16,
        "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim embed_dim input_embedding_size",
    ),
    "inner width": (
        32,
        "intermediate_size n_inner hidden_dim d_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff "
        "moe_intermediate_size shared_expert_intermediate_size dff",
    ),
    "layers": (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"),
    "key and value heads": (2, "num_key_value_heads num_kv_heads"),
    "heads": (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    "patch": (4, "patch_size"),
    "vocabulary": (VOCABULARY, "vocab_size"),
    "positions": (128, "max_position_embeddings n_positions n_ctx max_seq_len"),
    "side": (SIDE, "image_size"),
    "classes and channels": (3, "num_labels num_channels"),
}
"""What a size is of -> the size, and what transformers' configs call it."""
SMALL = {name: value for value, names in NAMED.values() for name in names.split()}
OWN: dict[str, dict[str, Any]] = {
    "Funnel": {"block_sizes": [1, 1], "d_head": 4},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "MobileBert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "Nystromformer": {"segment_means_seq_len": 8, "num_landmarks": 8},
    "T5": {"d_kv": 4},
    "Yoso": {"use_expectation": True},
}
"""What a family needs beside the common sizes."""


def config_of(kind: str, dropout: float = 0.1, depth: float = 0.0, **more: Any) -> Any:
    """A family's config at hidden size 16 with two layers.

    Args:
        kind: "Bert", "ViT", ...
        dropout: of everything whose name says so.
        depth: of stochastic depth.
    """
    import transformers

    cls = getattr(transformers, f"{kind}Config")
    plain = vars(cls())
    values: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}
    for name, value in plain.items():
        if name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            values[name] = SMALL[name]
        elif isinstance(value, float) and name.startswith("drop_path"):
            values[name] = depth
        elif ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, (int, float)) and "layer" not in name:
            values[name] = dropout
    if plain.get("head_dim") is not None:
        values["head_dim"] = 4
    return cls(**{**values, **OWN.get(kind, {}), **more})


def text_examples(count: int = 209, seed: int = 0) -> Examples:
    """Texts of 4 to 24 tokens, the first `count` - 9 of all lengths in turn."""
    draw = np.random.default_rng(seed)
    rows = [draw.integers(5, VOCABULARY, size=4 + number % 21) for number in range(count)]
    for row in rows:
        row[-1] = 2  # where families look for the text's end
    tokens = Tokens.join(rows, 0)
    return Examples({"input_ids": tokens}, draw.integers(0, 3, size=count), tokens.lengths, {}, ("a", "b", "c"))


def spoken_examples(count: int = 209, seed: int = 0) -> Examples:
    """The same as texts to be continued, whose second half counts."""
    texts = text_examples(count, seed)
    ids = texts.inputs["input_ids"]
    labels = Tokens.join([np.where(np.arange(len(row)) < len(row) // 2, -100, row) for row in ids], -100)
    return Examples({"input_ids": ids, "labels": labels}, None, texts.lengths)


def paired_examples(count: int = 209, seed: int = 0) -> Examples:
    """The same, each with another continuation of its first half, of 2 to 11 tokens, that is not preferred."""
    chosen, draw = spoken_examples(count, seed), np.random.default_rng(seed + 1)
    prompts = [row[: len(row) // 2] for row in chosen.inputs["input_ids"]]
    others = [draw.integers(5, VOCABULARY, size=2 + number % 10) for number in range(count)]
    pairs = list(zip(prompts, others, strict=True))
    ids = Tokens.join([np.append(prompt, other) for prompt, other in pairs], 0)
    labels = Tokens.join([np.append(np.full_like(prompt, -100), other) for prompt, other in pairs], -100)
    inputs = {**chosen.inputs, "rejected_input_ids": ids, "rejected_labels": labels}
    return Examples(inputs, None, chosen.lengths + ids.lengths)


def answered_examples(count: int = 209, seed: int = 0) -> Examples:
    """The same as texts for which a decoder is to write the next one."""
    texts = text_examples(count, seed)
    ids = texts.inputs["input_ids"]
    labels = ids.take(np.roll(np.arange(count), 1))
    before = Tokens.join([np.append(0, row[:-1]) for row in labels], 0)
    inputs = {"input_ids": ids, "decoder_input_ids": before, "labels": Tokens.join(list(labels), -100)}
    return Examples(inputs, None, texts.lengths + labels.lengths)


def rated_examples(count: int = 209, seed: int = 0) -> Examples:
    """The same as pairs of texts with a number each."""
    texts = text_examples(count, seed)
    ids = texts.inputs["input_ids"]
    second = Tokens.join([(np.arange(len(row)) >= len(row) // 2).astype(np.int64) for row in ids], 0)
    targets = np.random.default_rng(seed).normal(size=count)
    return Examples({"input_ids": ids, "token_type_ids": second, "targets": targets}, None, texts.lengths)


def labelled_examples(count: int = 209, seed: int = 0) -> Examples:
    """The same with any number of classes each."""
    texts = text_examples(count, seed)
    targets = np.random.default_rng(seed).integers(0, 2, size=(count, 3))
    return Examples({**texts.inputs, "targets": targets}, None, texts.lengths, {}, texts.label_names)


def tagged_examples(count: int = 209, seed: int = 0) -> Examples:
    """The same with a tag of every other token."""
    texts = text_examples(count, seed)
    ids, draw = texts.inputs["input_ids"], np.random.default_rng(seed)
    tags = [np.where(np.arange(len(row)) % 2, draw.integers(0, 3, size=len(row)), -100) for row in ids]
    return Examples(
        {"input_ids": ids, "targets": Tokens.join(tags, -100)}, None, texts.lengths, {}, ("O", "B-X", "I-X")
    )


def pictures(count: int = 209, seed: int = 0) -> Examples:
    """Pictures of noise."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 256, size=(count, 3, SIDE, SIDE), dtype=np.uint8)
    pixels = Pixels(values, np.full(3, 1 / 128, np.float32), np.full(3, -1, np.float32))
    return Examples({"pixel_values": pixels}, draw.integers(0, 3, size=count), np.full(count, 17), {}, ("a", "b", "c"))


KINDS: dict[str, tuple[str, str, Callable[[], Examples]]] = {
    "SequenceClassification": ("text-classification", "SequenceClassification", text_examples),
    "Regression": ("text-regression", "SequenceClassification", rated_examples),
    "MultiLabel": ("multi-label-classification", "SequenceClassification", labelled_examples),
    "TokenClassification": ("token-classification", "TokenClassification", tagged_examples),
    "CausalLM": ("causal-lm", "CausalLM", spoken_examples),
    "Preference": ("preference", "CausalLM", paired_examples),
    "Seq2Seq": ("seq2seq-lm", "ConditionalGeneration", answered_examples),
    "ImageClassification": ("image-classification", "ImageClassification", pictures),
}
"""What is learnt -> the task, the end of transformers' class, and examples."""


def loaded(
    folder: Path,
    kind: str,
    what: str = "SequenceClassification",
    dtype: str = "float64",
    lora_dropout: float = 0.1,
    quantize: str | None = None,
    **config: Any,
) -> tuple[Base, Task, Examples]:
    """A family's random model as a run loads it, its task, and examples.

    Args:
        folder: to be written to.
        kind: "Bert", "ViT", ...
        what: of `KINDS`.
        dtype: of the base.
        lora_dropout: of the adapter.
        quantize: `model.quantize`.
        config: of `config_of`.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task_name, head, examples_of = KINDS[what]
        name = "GPT2LMHeadModel" if (kind, head) == ("GPT2", "CausalLM") else f"{kind}For{head}"
        model = getattr(transformers, name)(config_of(kind, **config))
        for parameter in model.parameters():  # large enough that every layer shows
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    path = folder / f"{kind}-{what}"
    model.save_pretrained(path)
    task, examples = load_task(OpenTable(name=task_name)), examples_of()
    heads = [name for name in task.head if hasattr(model, name)]
    targets = tuple(name for name, module in model.named_modules() if _is_target(name, module, heads))
    run = RunConfig(
        model=ModelConfig(name=str(path), dtype=dtype, quantize=quantize),  # type: ignore[arg-type]
        adapter=AdapterConfig(rank=2, targets=targets, dropout=lora_dropout, modules_to_save=tuple(heads)),
        runtime=RuntimeConfig(device="cpu"),
    )
    return load_base(run, task.auto_class, task.head, task.model_kwargs(examples), task.peft_task_type), task, examples


def _is_target(name: str, module: nn.Module, heads: list[str]) -> bool:
    from transformers.pytorch_utils import Conv1D

    inside = "layer" in name or ".h." in name or "block" in name or "stage" in name
    kind = type(module) in (nn.Linear, Conv1D)
    return inside and kind and name.split(".")[0] not in heads
