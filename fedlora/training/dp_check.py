"""The check before private training: an example's gradient must not depend on the examples beside it.

Each example is computed in a padded batch and truly alone, since padding that leaks (Fourier mixing, landmarks over all
tokens, neighbouring embeddings) is invisible in an example that was cut out of a padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import PrivacyError
from fedlora.model import Base
from fedlora.privacy.preflight import preflight
from fedlora.tasks._base import Batch, Examples, Task
from fedlora.training.job import TrainJob
from fedlora.training.opacus_loop import masked_losses

FEW = 4  # tokens that a shortened example keeps at least


def check_model(base: Base, task: Task, examples: Examples, job: TrainJob) -> None:
    """Refuse a model on which private training would fail or not be private; once for each base and trained parts.

    Args:
        base: its adapter is overwritten.
        task: gives batches and losses.
        examples: some of them are looked at: public ones, such as the test set.
        job: its adapter and trained parts.

    Raises:
        PrivacyError: names the module and the cure.
    """
    require_private_task(task)
    if not base.method.bilinear:
        raise PrivacyError(
            f"per-sample gradients cannot be computed for method {base.method.name!r}: set adapter.method = 'lora', "
            "or another method that trains only A and B",
            code="no-per-sample-gradients",
        )
    if job.trains in base.checked:
        return
    base.write(job.adapter, job.trains)
    base.train_mode(True)
    if len(examples) < 2:
        raise PrivacyError(
            "the check before private training needs two test examples: raise data.test_fraction",
            code="too-few-examples",
        )
    together, alone = company_of(task, examples)

    def losses(model: torch.nn.Module, batch: Batch, rows: Sequence[int]) -> Tensor:
        return masked_losses(task, model, batch, np.asarray(rows, dtype=np.uint64), base.device)

    with base.uncached():
        preflight(base.model, losses, together, alone)
    base.checked.add(job.trains)


def require_private_task(task: Task) -> None:
    """`PrivacyError` for a task whose batches mix examples in one row."""
    if not task.rows_are_examples:
        raise PrivacyError(
            "this task packs several examples into one row, so that no gradient belongs to one example: set "
            "task.packing = false under [privacy]",
            code="packed-examples",
        )


def company_of(task: Task, examples: Examples, indices: Sequence[int] | np.ndarray = ()) -> tuple[Batch, list[Batch]]:
    """Some examples of clearly different lengths in one padded batch, and each of them in a batch of its own.

    Where all of a data set are of one length, its examples are cut and repeated: what they say does not matter here.

    Args:
        task: gives batches.
        examples: of which some are taken.
        indices: which; empty: a shortest, a middling and a longest one.

    Returns:
        One padded batch of all and the single ones, on the CPU, in the same order.
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
                {n: value[:, -max(1, value.shape[1] // 2) :] if n in padded else value for n, value in batch.items()}
            )
        if 2 * tokens <= (getattr(task, "max_length", 0) or 4 * FEW):
            alone.append({name: value.repeat(1, 2) if name in padded else value for name, value in batch.items()})
    return task.join(examples, alone), alone
