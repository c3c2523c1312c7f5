"""Whether an example's loss and gradient depend on the examples beside it: above all, on how far it is padded.

Padding that leaks (Fourier mixing, landmarks over all tokens, neighbouring embeddings) is invisible in an example that
was cut out of a padded batch: here each example is collated and computed truly alone, and beside longer ones.

Shapes: b = examples looked at, t = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from fedlora.model import Base
from fedlora.privacy.preflight import as_wide, restored, shaken, widened
from fedlora.tasks._base import Batch, Examples, Task
from fedlora.training.job import to_device

FEW = 4  # tokens that a shortened example keeps at least


def computed(base: Base) -> AbstractContextManager[None]:
    """While it lasts, the base computes all of its layers: what an invented example gives shall not be kept."""
    return nullcontext() if base.prefix is None else base.prefix.aside()


def company_of(task: Task, examples: Examples, indices: Sequence[int] | np.ndarray = ()) -> tuple[Batch, list[Batch]]:
    """Some examples of clearly different lengths in one padded batch, and each of them in a batch of its own.

    Where all of a data set are of one length, its examples are cut and repeated: what they say does not matter here.

    Args:
        task: gives batches.
        examples: of which some are taken.
        indices: which; empty: a shortest, a middling and a longest one.

    Returns:
        The joint batch and the single ones, on the CPU, in the same order.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if not len(chosen):
        order = np.argsort(np.asarray(examples.lengths), kind="stable")
        chosen = np.unique(order[[0, len(order) // 2, -1]])
    whole = [task.collate(examples, [int(index)]) for index in chosen]
    padded = task.padding(examples)
    alone = []
    for batch in whole:
        tokens = task.tokens(batch)
        alone.append(batch)
        if tokens is None or not padded:
            continue
        if tokens // 2 >= FEW:  # the end stays: there are the answer's tokens
            alone.append(
                {name: value[:, -(tokens // 2) :] if name in padded else value for name, value in batch.items()}
            )
        if 2 * tokens <= getattr(task, "max_length", 0):
            alone.append({name: value.repeat(1, 2) if name in padded else value for name, value in batch.items()})
    return task.join(examples, alone), alone


def coupled(base: Base, task: Task, examples: Examples, indices: Sequence[int] | np.ndarray = ()) -> float:
    """How far an example's loss and gradient move when it is put beside longer ones, without dropout.

    Computed in float64 where memory allows it, so that what is found is no rounding: below 1e-5 for a model whose
    examples do not see each other.

    Args:
        base: its adapter's values are left as they are, in whatever mode it is.
        task: gives batches and losses.
        examples: of which some are taken.
        indices: which; empty: a shortest, a middling and a longest one.

    Returns:
        The largest over examples, |g_together - g_alone| / |g_alone| over all of the adapter's tensors jointly, or the
        loss's relative difference if that is larger. Infinite where what is computed alone fails or is not finite.
    """
    together, alone = company_of(task, examples, indices)
    parameters = list(base.parameters.values())
    worst = 0.0
    with computed(base), restored(base.model, training=False), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        with shaken(base.model), widened(base.model):
            joint = task.losses(base.model, as_wide(base.model, to_device(together, base.device)))
            for row, batch in enumerate(alone):
                loss = task.losses(base.model, as_wide(base.model, to_device(batch, base.device)))[0]
                one = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
                other = torch.autograd.grad(
                    joint[row], parameters, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                a, b = (torch.cat([g.double().flatten() for g in found]) for found in (one, other))
                gaps = [
                    float((a - b).norm() / a.norm().clamp_min(1e-30)),
                    float((loss - joint[row]).abs() / loss.abs().clamp_min(1e-30)),
                ]
                worst = max([worst, *(gap if np.isfinite(gap) else float("inf") for gap in gaps)])
    return worst
