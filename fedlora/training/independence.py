"""Examples for the check before private training: in company, and each truly alone.

Padding that leaks (Fourier mixing, landmarks over all tokens, neighbouring embeddings) is invisible in an example that
was cut out of a padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.tasks._base import Batch, Examples, Task

FEW = 4  # tokens that a shortened example keeps at least


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
