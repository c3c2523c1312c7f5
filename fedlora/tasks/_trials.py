"""What a language model is tried out for before it is trained: whether it predicts, and whether packing changes it.

The trials run the model on one real example, since no list of architectures could be complete: an encoder that is
loaded as a causal model sees the tokens that it is to predict, and its perplexity means nothing.

Shapes: w = rows of a batch, t = tokens of a row, k = tokens whose logits are looked at, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.tasks._base import Batch

Logits = Callable[[nn.Module, Batch, Bool[Tensor, "w t"]], Float[Tensor, "k v"]]
"""Model, batch and which of its tokens -> their logits."""

ENOUGH = 128  # tokens on which foresight shows
LOOKED_AT = 32  # tokens of a packed example whose logits are compared
FRONT = 3  # tokens of the example before it in the row
FORESIGHT = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative: what rounding may do where later tokens change (experts are given other company); 0.01 for narrower dtypes.
A dense causal model repeats every bit."""
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Relative, between a packed example and the same alone; 0.05 for narrower dtypes."""


def refuse_foresight(model: nn.Module, ids: np.ndarray, logits: Logits) -> None:
    """Change the later tokens of an example: the logits of earlier ones must not move.

    Args:
        model: its mode is left as it is.
        ids: of an example; the longer, the better.
        logits: how the task calls the model.

    Raises:
        ModelError: they do.
    """
    row = torch.from_numpy(ids[:ENOUGH].astype(np.int64))
    size = len(row)
    if size < 2:
        return
    cuts = sorted({1, size // 4, size // 2, size - 1} - {0})
    pool = torch.unique(row)
    other = pool[(torch.searchsorted(pool, row) + 1) % len(pool)] if len(pool) > 1 else (row + 1) % _vocabulary(model)
    places = torch.arange(size)
    rows = row.repeat(len(cuts), 1)
    later = places >= torch.tensor(cuts)[:, None]
    before = places == torch.tensor(cuts)[:, None] - 1
    found = []
    with evaluating(model), torch.no_grad():
        for changed in (rows, torch.where(later, other, rows)):
            batch = _on_device({"input_ids": changed, "attention_mask": torch.ones_like(changed)}, model)
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)  # some models hash their tokens by random rotations
                    found.append(logits(model, batch, before.to(batch["input_ids"].device)).cpu().double())
            except Exception:  # a model that fails does so in training, with the example's owner to be named
                return
    moved = (found[0] - found[1]).norm(dim=1) / found[0].norm(dim=1).clamp_min(1e-30)
    # The median: one expert that is chosen by a hair moves one row.
    if not float(moved.median()) <= FORESIGHT.get(_dtype(model), 0.01):
        raise ModelError(
            f"{type(model).__name__} is not causal: a token's logits depend on the tokens after it, which it is to "
            "predict; choose a decoder as model.name (for BERT and similar models, one whose config.json has "
            "is_decoder: true), or another task.name",
            code="not-causal",
        )


def refuse_leaks(model: nn.Module, ids: np.ndarray, logits: Logits) -> None:
    """Put an example behind another one in a row: it must give what it gives alone, whatever is before it.

    Args:
        model: its mode is left as it is.
        ids: of the longest example: one that no sliding window spans.
        logits: how the task calls the model.

    Raises:
        ModelError: it does not: windows, positions or states go on from one example to the next.
    """
    kind, cure = type(model).__name__, "set task.packing = false"
    mine = ids[: max(FRONT, len(ids) - FRONT)]
    fronts = [(mine[:FRONT] + shift) % _vocabulary(model) for shift in (1, 2)]
    found = {}
    with evaluating(model), torch.no_grad():
        for name, parts in {"alone": [mine], "behind": [fronts[0], mine], "other": [fronts[1], mine]}.items():
            batch = _on_device(_row(parts), model)
            chosen = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            chosen[:, -len(mine) :: max(1, len(mine) // LOOKED_AT)] = True
            chosen[:, -1] = True
            try:
                found[name] = logits(model, batch, chosen).cpu().double()
            except Exception as error:
                raise ModelError(
                    f"task.packing: {kind} cannot process packed examples; {cure}", code="packing-not-supported"
                ) from error
    size = float(found["alone"].norm())
    # The same shapes through the same kernels: what is masked must not change a bit, but rounding is forgiven.
    leaks, shifted = (float((found["behind"] - found[name]).norm()) / max(size, 1e-30) for name in ("other", "alone"))
    if not leaks <= min(1e-5, limit := ROUNDING.get(_dtype(model), 0.05)):
        raise ModelError(
            f"task.packing: {kind} lets an example attend to the one packed before it; {cure}", code="packing-leaks"
        )
    if not shifted <= limit:
        raise ModelError(
            f"task.packing: {kind} gives a packed example another result than the same example alone; {cure}",
            code="packing-changes-results",
        )


def _row(parts: list[np.ndarray]) -> Batch:
    """Examples one after the other in one row."""
    joined = np.concatenate(parts).astype(np.int64)
    positions = np.concatenate([np.arange(len(part)) for part in parts])
    segments = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    found = {"input_ids": joined, "position_ids": positions, "segments": segments}
    return {name: torch.from_numpy(values)[None] for name, values in found.items()}


def _on_device(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def _dtype(model: nn.Module) -> torch.dtype:
    inner = getattr(model, "get_input_embeddings", lambda: None)()
    return next((inner or model).parameters()).dtype


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every layer as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
