"""What every classification task shares: labels, loss, accuracy.

Shapes: b = examples in a batch, c = classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedlora.errors import ConfigError, DataError, nearest
from fedlora.tasks._base import Batch, Examples, Task


class Classification(Task):
    """One class for each example; a subclass says how an example becomes inputs and inputs become logits."""

    metric: ClassVar[str] = "accuracy"

    @abstractmethod
    def logits(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b c"]:
        """The model's scores of the classes."""

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The number and the names of the classes."""
        names = examples.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }

    def losses(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """Cross entropy of each example in nats."""
        return functional.cross_entropy(self._wide_logits(model, batch), batch["labels"], reduction="none")

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """For each example: "loss" in nats, "correct" as 0 or 1, and "label", the number of its class."""
        logits = self._wide_logits(model, batch)
        return {
            "loss": functional.cross_entropy(logits, batch["labels"], reduction="none"),
            "correct": (logits.argmax(dim=-1) == batch["labels"]).to(logits.dtype),
            "label": batch["labels"].to(logits.dtype),
        }

    def summarise(self, measures: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The mean loss in nats, and as fractions the accuracy and what it is read against.

        "balanced_accuracy" is the mean over the classes of the share of their examples that are right, and
        "majority_share" the share of the largest class: the accuracy of always answering with it.
        """
        label = np.asarray(measures["label"]).astype(np.int64)
        sizes = np.bincount(label)
        right = np.bincount(label, weights=measures["correct"])
        return {
            "accuracy": float(np.mean(measures["correct"], dtype=np.float64)),
            "balanced_accuracy": float(np.mean(right[sizes > 0] / sizes[sizes > 0])),
            "majority_share": float(sizes.max() / sizes.sum()),
            "loss": float(np.mean(measures["loss"], dtype=np.float64)),
        }

    def _wide_logits(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b c"]:
        logits = self.logits(model, batch)
        # Half-precision logits lose the loss's last digits; double precision stays as it is.
        return logits if logits.dtype == torch.float64 else logits.float()


def class_names(values: Sequence[Any], column: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes in the order of their numbers: those known, else the labels found, in sorted order.

    Labels that all look like whole numbers are sorted as numbers: "2" comes before "10".

    Raises:
        DataError: a label is missing, or there are fewer than two classes.
        ConfigError: a known name occurs twice.
    """
    if known:
        if len(set(known)) != len(known):
            raise ConfigError(f"task.labels names a class twice: {', '.join(known)}; give each once")
        names = tuple(known)
    else:
        found = {_label(value, row, column) for row, value in enumerate(values)}
        numeric = all(name.lstrip("-").isdecimal() for name in found)
        names = tuple(sorted(found, key=int if numeric else str))
    if len(names) < 2:
        raise DataError(f"column {column!r} holds {len(names)} label(s) and a classifier needs two; check data.label")
    return names


def class_ids(values: Sequence[Any], column: str, names: Sequence[str]) -> np.ndarray:
    """The class of each example, int64 [n]: its label's place in `names`.

    A label that is no name but a whole number below the number of names is taken as that place.

    Raises:
        DataError: a label is missing or is no class.
    """
    places = {name: place for place, name in enumerate(names)}
    numbers = {str(place): place for place in range(len(names))} | places
    ids = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        label = _label(value, row, column)
        if label not in numbers:
            raise DataError(f"row {row}, column {column!r}: {label!r} is no class; {nearest(label, names)}")
        ids[row] = numbers[label]
    return ids


def _label(value: Any, row: int, column: str) -> str:
    if isinstance(value, (bool, np.bool_)):
        return str(int(value))
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    shown = "missing" if value is None or value != value or isinstance(value, str) else f"{value!r}, not a class"
    raise DataError(f"row {row}, column {column!r}: the label is {shown}; remove the row or fill it in")
