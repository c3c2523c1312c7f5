"""How good the model is, over all test examples and for each domain."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from fedlora.callbacks import Evaluation
from fedlora.errors import DataError, nearest
from fedlora.progress import activity
from fedlora.tasks._base import Examples, Measurable, Task, length_batches, to_device

CPU_TOKENS = 2048
DEVICE_TOKENS = 16384


def evaluate(
    base: Measurable,
    task: Task,
    examples: Examples,
    *,
    indices: np.ndarray | None = None,
    domain_column: str | None = None,
    batch_tokens: int | None = None,
) -> Evaluation:
    """Measure the adapter that was written to `base` last.

    Examples of like length share a batch, so little is padded; each example's measures go back to its own place, so
    the batches show in the result by rounding only.

    Args:
        base: the model with its adapter.
        task: measures and summarises.
        examples: to be measured.
        indices: positions of those that count; None for all.
        domain_column: column of `examples.columns` by which to group as well.
        batch_tokens: most tokens in a batch, padding included (a longer example is a batch of its own); None: 2048 on
            a CPU, where larger batches leave its caches and take longer, 16384 elsewhere. A base that is `coupled`
            gets one example at a time.

    Raises:
        DataError: there are no examples, or no such column.
    """
    chosen = np.arange(len(examples)) if indices is None else np.asarray(indices)
    if len(chosen) == 0:
        raise DataError(
            "there are no examples to evaluate on: raise data.test_fraction, or name a data.test file",
            code="no-examples",
        )
    if domain_column is not None and domain_column not in examples.columns:
        raise DataError(
            f"the examples have no column {domain_column!r}; {nearest(domain_column, examples.columns)}",
            code="no-such-column",
        )
    budget = batch_tokens or (CPU_TOKENS if base.device.type == "cpu" else DEVICE_TOKENS)
    measures: dict[str, np.ndarray] = {}
    if base.coupled is not None:
        budget = 1  # each example alone: what its batch holds would show in its result
    base.train_mode(False)
    done = 0
    with torch.inference_mode():
        for places in length_batches(np.asarray(examples.lengths)[chosen], budget):
            activity.info("evaluating: %d of %d test examples", done, len(chosen))
            done += len(places)
            batch = to_device(task.collate(examples, chosen[places]), base.device)
            for name, values in task.measure(base.model, batch).items():
                found = values.detach().to("cpu", torch.float64).numpy()
                measures.setdefault(name, np.full((len(chosen), *found.shape[1:]), np.nan))[places] = found
    domains: dict[str, dict[str, float]] = {}
    if domain_column is not None:
        column = np.asarray(examples.columns[domain_column])[chosen]
        sizes = Counter(column.tolist())
        for domain in sorted(sizes, key=lambda name: (-sizes[name], str(name))):
            inside = column == domain
            domains[str(domain)] = task.summarise({name: every[inside] for name, every in measures.items()})
    sums = task.sums(measures)
    return Evaluation(task.figures(sums), domains, measures, sums)
