"""How good the model is, over all test examples and for each domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.callbacks import Evaluation
from fedlora.errors import DataError, nearest
from fedlora.progress import activity
from fedlora.tasks._base import Batch, Examples, Measurable, Task, length_batches, to_device
from fedlora.training.out_of_memory import released
from fedlora.unexpected import ran_out

CPU_TOKENS = 2048
DEVICE_TOKENS = 16384

Measures = dict[str, np.ndarray]
"""What a task measured of n examples, [n, ...] by name, float64."""
Measure: TypeAlias = Callable[[torch.nn.Module, Batch], Mapping[str, Tensor]]
"""What is computed of a model and a batch of b examples, [b, ...] by name."""


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

    Args:
        base: the model with its adapter.
        task: measures and summarises.
        examples: to be measured.
        indices: positions of those that count; None for all.
        domain_column: column of `examples.columns` by which to group as well.
        batch_tokens: see `measures_of`.

    Raises:
        DataError: there are no examples, or no such column.
    """
    domains = domains_of(examples, domain_column)
    measures = measures_of(base, task, examples, indices=indices, batch_tokens=batch_tokens)
    return summarised(task, measures, domains, indices)


def domains_of(examples: Examples, column: str | None) -> np.ndarray | None:
    """The domain of each example [n]; None without a column of domains.

    Raises:
        DataError: there is no such column.
    """
    if column is None:
        return None
    if column not in examples.columns:
        raise DataError(
            f"the examples have no column {column!r}; {nearest(column, examples.columns)}", code="no-such-column"
        )
    return np.asarray(examples.columns[column])


def measures_of(
    base: Measurable,
    task: Task,
    examples: Examples,
    *,
    indices: np.ndarray | None = None,
    batch_tokens: int | None = None,
    run_batches: Callable[[Sequence[np.ndarray]], Sequence[Measures]] | None = None,
) -> Measures:
    """What the task measures of some examples.

    Examples of like length share a batch, so little is padded; each example's measures go back to its own place, so
    the batches show in the result by rounding only.

    Args:
        base: the model with its adapter.
        task: measures.
        examples: to be measured.
        indices: positions of those that count; None for all.
        batch_tokens: most tokens in a batch, padding included (a longer example is a batch of its own); None: 2048 on
            a CPU, where larger batches leave its caches and take longer, 16384 elsewhere. A base that is `coupled`
            gets one example at a time.
        run_batches: is given the batches, as positions in `examples`, and gives the measures of each; None:
            `measure_batches`, in this process.

    Raises:
        DataError: there are no examples.
    """
    chosen = np.arange(len(examples)) if indices is None else np.asarray(indices)
    if len(chosen) == 0:
        raise DataError(
            "there are no examples to evaluate on: raise data.test_fraction, or name a data.test file",
            code="no-examples",
        )
    budget = batch_tokens or (CPU_TOKENS if base.device.type == "cpu" else DEVICE_TOKENS)
    if base.coupled is not None:
        budget = 1  # each example alone: what its batch holds would show in its result
    places = list(length_batches(np.asarray(examples.lengths)[chosen], budget))
    batches = [chosen[place] for place in places]
    found = run_batches(batches) if run_batches else measure_batches(base, task, examples, batches)
    measures: Measures = {}
    for place, part in zip(places, found, strict=True):
        for name, values in part.items():
            measures.setdefault(name, np.full((len(chosen), *values.shape[1:]), np.nan))[place] = values
    return measures


def measure_batches(base: Measurable, task: Task, examples: Examples, batches: Sequence[np.ndarray]) -> list[Measures]:
    """Measure batches of examples with the adapter that was written to `base` last.

    Args:
        base: the model with its adapter.
        task: measures.
        examples: of which the batches are.
        batches: positions in `examples`.

    Returns:
        The measures of each batch, in the order of its examples.
    """
    return _each(base, task, examples, batches, task.measure, "evaluating: %d%% of the test examples")


def losses_of(base: Measurable, task: Task, examples: Examples, indices: np.ndarray) -> Float[np.ndarray, "n"]:
    """The loss of each of n examples as training minimises it, class weights and smoothed labels included.

    In evaluation mode, with the adapter that was written to `base` last: one forward pass an example, and none of what
    else evaluation measures.

    Args:
        base: the model with its adapter.
        task: whose `losses` they are.
        examples: of which some are measured.
        indices: their positions; the losses are in this order.

    Raises:
        DataError: there are no examples.
    """

    def losses(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": task.losses(model, batch)}

    def run_batches(batches: Sequence[np.ndarray]) -> list[Measures]:
        return _each(base, task, examples, batches, losses, "the loss before training: %d%% of a client's examples")

    return measures_of(base, task, examples, indices=indices, run_batches=run_batches)["loss"]


def _each(
    base: Measurable, task: Task, examples: Examples, batches: Sequence[np.ndarray], measure: Measure, doing: str
) -> list[Measures]:
    """What `measure` gives for each batch; `doing` says how many percent are done."""
    base.train_mode(False)
    count, done = sum(map(len, batches)), 0
    measured: list[Measures] = []
    with torch.inference_mode():
        for rows in batches:
            activity.info(doing, 100 * done // count)  # of all, or of this process's share
            done += len(rows)
            measured.append(_measured(base, task, examples, rows, measure))
    return measured


def _measured(base: Measurable, task: Task, examples: Examples, rows: np.ndarray, measure: Measure) -> Measures:
    """The measures of some examples, computed in one batch, or in halves of it where memory runs out."""
    try:
        batch = to_device(task, task.collate(examples, rows), base.device)
        # To the CPU first: Apple's MPS has no double precision.
        return {name: found.cpu().double().numpy() for name, found in measure(base.model, batch).items()}
    except Exception as error:
        if len(rows) == 1 or base.coupled is not None or not ran_out(error):
            raise
        released(error)
    halves = [_measured(base, task, examples, half, measure) for half in np.array_split(rows, 2)]
    return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def summarised(
    task: Task, measures: Measures, domains: np.ndarray | None = None, indices: np.ndarray | None = None
) -> Evaluation:
    """The figures of what was measured.

    Args:
        task: summarises.
        measures: of all examples, or of those at `indices`.
        domains: of all examples, see `domains_of`.
        indices: positions of the examples that were measured; None for all.
    """
    by_domain: dict[str, dict[str, float]] = {}
    if domains is not None:
        column = domains if indices is None else domains[indices]
        sizes = Counter(column.tolist())
        for domain in sorted(sizes, key=lambda name: (-sizes[name], str(name))):
            inside = column == domain
            by_domain[str(domain)] = task.summarise({name: every[inside] for name, every in measures.items()})
    sums = task.sums(measures)
    return Evaluation(task.figures(sums), by_domain, measures, sums, indices)
