"""What a peer's client does: PEFT on transformers and a plain torch loop. Imports nothing of fedlora.

An imported module, because Ray sends what `__main__` holds by value with each message: a cache there is always empty.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

RATE = 1e-3


@lru_cache(maxsize=1)
def schedule(folder: str) -> dict[str, np.ndarray]:
    """Arrays "ids" [n, tokens], "labels" [n] or [n, tokens], "rows" [rounds, clients, steps, batch]."""
    with np.load(Path(folder) / "schedule.npz") as arrays:
        return dict(arrays)


def batch_size(folder: str) -> int:
    """Rows of a step."""
    return schedule(folder)["rows"].shape[-1]


def examples(folder: str, number: int, client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a client's batches in a round (from 1), one batch after the other."""
    arrays = schedule(folder)
    rows = arrays["rows"][(number - 1) % len(arrays["rows"]), client].reshape(-1)
    return torch.from_numpy(arrays["ids"][rows]), torch.from_numpy(arrays["labels"][rows])


def build(folder: str, dtype: str) -> Any:
    """The base with its adapter; what trains is in float32, whatever the base is."""
    import transformers
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    facts = json.loads((Path(folder) / "peer.json").read_text())
    kind = getattr(transformers, facts["auto_class"])
    base = kind.from_pretrained(facts["model"], dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, facts["adapter"], is_trainable=True)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, module in model.named_modules():
        if name.endswith("modules_to_save.default"):
            module.register_forward_pre_hook(lambda _module, args: (args[0].float(), *args[1:]))
    # Once more: a head that was read in the base's dtype was rounded.
    set_peft_model_state_dict(model, load_file(Path(facts["adapter"]) / "adapter_model.safetensors"))
    return model.train()


@lru_cache(maxsize=2)
def cached(folder: str, dtype: str) -> Any:
    """The same, once a process."""
    return build(folder, dtype)


def optimizer(parameters: Any, lr: float = RATE) -> torch.optim.Optimizer:
    """AdamW on what trains."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


def loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of one batch, padded with 0 to its longest text; of a language model the mean over its tokens."""
    mask = ids != 0
    longest = int(mask.sum(1).max())
    labels = labels[:, :longest] if labels.dim() == 2 else labels
    return model(input_ids=ids[:, :longest], attention_mask=mask[:, :longest].long(), labels=labels).loss


def train(model: Any, folder: str, number: int, client: int) -> None:
    """A plain loop over a client's batches in a round (from 1)."""
    ids, labels = examples(folder, number, client)
    size = batch_size(folder)
    steps = optimizer(model.parameters())
    for batch, answers in zip(ids.split(size), labels.split(size), strict=True):
        loss(model, batch, answers).backward()
        steps.step()
        steps.zero_grad()


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapter by PEFT's names."""
    from peft import get_peft_model_state_dict

    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}


def turns() -> Iterator[dict[str, Any]]:
    """The benchmark's commands, one a line; each is answered when the next is asked for. Ends with the input."""
    sys.stdout.write("@ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        yield json.loads(line)
        sys.stdout.write("@done\n")
        sys.stdout.flush()
