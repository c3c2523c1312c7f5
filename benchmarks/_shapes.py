"""Random models of the benchmarks' three shapes: what several of them train."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.config import load_config
from fedlora.model import seeded
from fedlora.runs.environment import processor

SHAPES: dict[str, dict[str, Any]] = {
    "encoder": {"layers": 6, "hidden": 384, "heads": 12, "tokens": 64, "steps": 4},
    "tiny": {"layers": 2, "hidden": 64, "heads": 2, "tokens": 16, "steps": 4},
    "llama": {"layers": 6, "hidden": 384, "heads": 6, "tokens": 128, "steps": 2},
}
VOCABULARY = 2000
CLASSES = 4
TEXTS = ("fixed", "corpus")


def machine() -> str:
    """The processor, the vector instructions that torch uses, and torch's version."""
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def in_turn(arms: Mapping[str, Callable[[], None]], repeats: int, inner: int = 1) -> dict[str, list[float]]:
    """Seconds of processor time of each arm, all of which take turns `repeats` times, and each `inner` times a turn."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, run in arms.items():
            begin = time.process_time()
            for _ in range(inner):
                run()
            if repeat:
                seconds[name].append((time.process_time() - begin) / inner)
    return seconds


def lengths(texts: str, shape: str, count: int) -> np.ndarray:
    """Tokens of random texts [count]: all of the shape's, or as in the quickstart's corpus, cut to the shape's."""
    longest = SHAPES[shape]["tokens"]
    if texts == "fixed":
        return np.full(count, longest)
    from fedlora.data import load_data

    found = load_data(load_config("quickstart", [f"task.max_length={longest}"])).train.lengths
    return np.random.default_rng(0).choice(found, count)


def causal(shape: str) -> bool:
    """Whether a shape continues texts; the others classify them."""
    return shape == "llama"


def auto_class(shape: str) -> str:
    """The class of transformers that loads a shape."""
    return "AutoModelForCausalLM" if causal(shape) else "AutoModelForSequenceClassification"


def targets(shape: str) -> tuple[str, ...]:
    """Query and value."""
    return ("q_proj", "v_proj") if causal(shape) else ("query", "value")


def write_model(shape: str, folder: Path) -> None:
    """Save a model of random weights (seed 0), without dropout."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    size = SHAPES[shape]
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "pad_token_id": 0,
    }
    with seeded(0, torch.device("cpu")):
        if causal(shape):
            config: Any = LlamaConfig(**common, intermediate_size=1024)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        else:
            none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = BertConfig(**common, **none, intermediate_size=4 * size["hidden"], num_labels=CLASSES)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
