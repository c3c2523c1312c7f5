"""Adapters that plain PEFT trained and saved, without fedlora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.tensor([[2, 9, 30, 41, 3, 0], [2, 50, 51, 52, 53, 3]])
WORDS = torch.tensor([[3, 6, 7, 6, 7, 1], [4, 9, 8, 9, 8, 1]])  # of a vocabulary of 14


def train_by_peft(
    base: Path,
    folder: Path,
    *,
    labels: int = 2,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    initial: bool = False,
    **lora: Any,
) -> Tensor:
    """Train an adapter for two steps by plain PEFT and save it.

    Args:
        base: Folder of an encoder, which gets a new head, or of a causal language model.
        folder: Gets the adapter.
        labels: Number of classes.
        causal: Whether it is a language model.
        dtype: Of the base and the adapter.
        initial: Whether PEFT converts what was drawn from the weights (`path_initial_model_for_weight_conversion`).
        lora: Fields of PEFT's config.

    Returns:
        What `logits` gives of the model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    fields = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    if causal:
        fields |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if causal:
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        else:
            plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=dtype)
        model = get_peft_model(plain, LoraConfig(**(fields | lora)))
    if initial:  # as PEFT's guide to PiSSA has it
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "initial")
        model.peft_config["default"].init_lora_weights = lora["init_lora_weights"]
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        found = _forward(model, causal).float()
        wanted = WORDS[:, 1:].flatten() if causal else torch.tensor([0, 1])
        nn.functional.cross_entropy(found[:, :-1].flatten(0, 1) if causal else found, wanted).backward()
        optimizer.step()
    trained = logits(model, causal=causal)
    how = {"path_initial_model_for_weight_conversion": str(folder / "initial")} if initial else {}
    model.save_pretrained(folder, **how)
    return trained


def logits(model: nn.Module, *, causal: bool = False) -> Tensor:
    """Of a model in evaluation, for two rows: `IDS`, or for a language model `WORDS`."""
    model.eval()
    with torch.no_grad():
        return _forward(model, causal)


def _forward(model: nn.Module, causal: bool) -> Tensor:
    ids = WORDS if causal else IDS
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids) if causal else (ids != 0).long()).logits
    return found
