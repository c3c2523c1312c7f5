"""What every classification task shares: labels, loss, accuracy.

Shapes: b = examples in a batch, c = classes.
"""

from __future__ import annotations

import math
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.nn import functional

from fedlora.assets import Checkpoint
from fedlora.errors import ConfigError, DataError, nearest
from fedlora.model.classes import in_trained_order, trained_classes
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Table, Task, wide
from fedlora.tasks._class_figures import class_figures, class_sums, figures_by_class, require_class_sums
from fedlora.tasks._text import require_encodable


def _require_table(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value
    raise ConfigError(
        f"task.class_weights = {value!r} is no table: give a number for each class that is to weigh more or less than "
        "1, as in class_weights = { fraud = 10.0 } (a class balanced as in scikit-learn: all examples / (number of "
        "classes x examples of the class))",
        code="not-a-table",
    )


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weights = Annotated[Mapping[str, Weight], BeforeValidator(_require_table, json_schema_input_type=Mapping[str, Weight])]
"""Of classes in the loss, by their names."""


class Classification(Task):
    """One class for each example; a subclass says how an example becomes inputs and inputs become logits."""

    metric: ClassVar[str] = "accuracy"
    has_classes: ClassVar[bool] = True
    labels: tuple[str, ...]
    class_weights: Mapping[str, float]
    label_smoothing: float

    @abstractmethod
    def logits(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b c"]:
        """The model's scores of the classes."""

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The number and the names of the classes."""
        return class_kwargs(examples.label_names)

    def invented(self, role: str) -> Sequence[Any] | None:
        """Each class in turn."""
        labels: Sequence[str] = getattr(self, "labels", ())
        return [labels[place % len(labels)] for place in range(4)] if role == "label" else None

    def losses(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """Cross entropy of each example in nats, with the labels smoothed, times the weight of its class."""
        logits, labels = wide(self.logits(model, batch)), batch["labels"]
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        if not self.class_weights:
            return losses
        names: Mapping[int, str] = model.config.id2label  # type: ignore[union-attr, assignment]
        return losses * losses.new_tensor([self.class_weights.get(names[k], 1.0) for k in range(len(names))])[labels]

    def classes(self, table: Table, column: str, model: str | Path | Checkpoint) -> tuple[tuple[str, ...], np.ndarray]:
        """See `classes_of`; refuses a weight for what is no class."""
        names, ids = classes_of(table.columns[column], column, self.labels or table.label_names, model)
        if unknown := self.class_weights.keys() - set(names):
            one = min(unknown)
            raise ConfigError(
                f"task.class_weights has {_shown(one)}, which is not a class; {_nearest_class(one, names)}",
                code="label-not-a-class",
            )
        return names, ids

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """For each example "loss" in nats, the numbers "label" and "predicted" of classes, "probabilities" [b, c]."""
        logits = wide(self.logits(model, batch))
        return {
            "loss": functional.cross_entropy(logits, batch["labels"], reduction="none"),
            "label": batch["labels"].to(logits.dtype),
            "predicted": logits.argmax(dim=-1).to(logits.dtype),
            "probabilities": logits.softmax(dim=-1),
        }

    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `fedlora.tasks._class_figures`."""
        return class_sums(*(measures[name] for name in ("loss", "label", "predicted", "probabilities")))

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """See `fedlora.tasks._class_figures`."""
        return class_figures(sums)

    def by_class(self, sums: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
        """See `figures_by_class`."""
        matrix = sums["confusion"]
        counts = np.stack([matrix.sum(axis=1), matrix.sum(axis=0), np.diag(matrix)], axis=1)
        return figures_by_class(names, counts, sums.get("scores"))

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """See `fedlora.tasks._class_figures`."""
        require_class_sums(sums)


def class_kwargs(names: Sequence[str]) -> dict[str, Any]:
    """The number and the names of classes, for `from_pretrained`."""
    numbers = {name: number for number, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def classes_of(
    values: Sequence[Any], column: str, known: Sequence[str], model: str | Path | Checkpoint
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes in the order of the model's logits, and the class of each example, int64 [n].

    Where the model's head was trained for the same classes (their case does not matter) their order is the head's:
    a name keeps its logit. Otherwise it is that of `class_names`.

    Args:
        values: labels.
        column: where they come from, for messages.
        known: names of the classes, by which labels that are whole numbers are counted.
        model: a folder, hub name or checkpoint.

    Raises:
        DataError: a label is missing or is no class, or there are fewer than two classes.
        ConfigError: a known name occurs twice.
    """
    names = class_names(values, column, known)
    ids = class_ids(values, column, names)
    ordered = in_trained_order(names, trained_classes(model))
    if ordered is None or ordered == names:
        return names, ids
    places = np.asarray([ordered.index(name) for name in names], dtype=np.int64)
    return ordered, places[ids]


def class_names(
    values: Sequence[Any], column: str, known: Sequence[str] = (), rows: Sequence[int] | None = None
) -> tuple[str, ...]:
    """The classes in the order of their numbers: those known, else the labels found, in sorted order.

    Labels that all look like whole numbers are sorted as numbers: "2" comes before "10".

    Args:
        values: labels.
        column: where they come from, for messages.
        known: names of the classes.
        rows: where each label stands, for messages, if a row may have several.

    Raises:
        DataError: a label is missing, two labels are one in two spellings, or there are fewer than two classes.
        ConfigError: a known name occurs twice.
    """
    if known:
        if len(set(known)) != len(known):
            raise ConfigError(
                f"task.labels names a class twice: {', '.join(known)}; give each once", code="class-named-twice"
            )
        names = tuple(known)
    else:
        found = _spellings(values, column, rows=rows)
        numeric = all(re.fullmatch(r"-?[0-9]+", name) for name in found)
        names = tuple(sorted(found, key=int if numeric else str))
    if len(names) < 2:
        raise DataError(
            f"column {column!r} has {len(names)} distinct labels and a classifier needs two: check data.label",
            code="too-few-classes",
        )
    return names


def class_ids(values: Sequence[Any], column: str, names: Sequence[str]) -> np.ndarray:
    """The class of each example, int64 [n]: its label's place in `names`.

    Where no name is a number, labels may also be the places themselves, from 0; not both ways in one column.

    Raises:
        DataError: a label is missing or is no class.
    """
    places = {name: place for place, name in enumerate(names)}
    found = _spellings(values, column, names)
    if not any(map(_number, names)) and not places.keys() & found:
        places = {str(place): place for place in range(len(names))}
    ids = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        label, _ = _label(value, row, column)
        if label not in places:
            raise DataError(
                f"row {row}, column {column!r}: {_shown(label)} is not a class; {_nearest_class(label, names)}",
                code="label-not-a-class",
            )
        ids[row] = places[label]
    return ids


def _spellings(
    values: Sequence[Any], column: str, known: Sequence[str] = (), rows: Sequence[int] | None = None
) -> set[str]:
    """The labels of a column as text.

    Raises:
        DataError: two of them are the same to a reader and not to a program: "1" and "1.0", 1 and "1", "yes" and
            "yes ", or the same letters in two Unicode forms. Neither is joined with the other nor made a class of its
            own without a word; names that were given in the config are taken at their word.
    """
    first: dict[tuple[str, str], int] = {}  # as text, kind of value -> row
    for row, value in enumerate(values) if rows is None else zip(rows, values, strict=True):
        first.setdefault(_label(value, row, column), row)
    seen: dict[str, tuple[str, str]] = {}
    for (label, kind), row in first.items():
        if kind == "text" and label in known:
            continue
        alike = seen.setdefault(_plain(label), (label, kind))
        if alike != (label, kind):
            one, other = (f"{_shown(text)} ({what})" for text, what in (alike, (label, kind)))
            raise DataError(
                f"column {column!r} has the labels {one} in row {first[alike]} and {other} in row {row}: write each "
                "class in one way, or name the classes in task.labels",
                code="label-in-two-spellings",
            )
    return {label for label, _ in first}


def _label(value: Any, row: int, column: str) -> tuple[str, str]:
    """A label as text, exactly as it is written, and what kind of value it was."""
    if isinstance(value, (bool, np.bool_)):
        return str(int(value)), "true or false"
    if isinstance(value, (int, np.integer)):
        return str(int(value)), "a whole number"
    if isinstance(value, float) and value.is_integer():
        return str(int(value)), "a number with a point"
    if isinstance(value, str) and value.strip():
        return require_encodable(value, row, column), "text"
    missing = value is None or value is np.nan or (isinstance(value, float) and math.isnan(value))
    shown = "missing" if missing or isinstance(value, str) else f"{_shown(value)}, not a class"
    raise DataError(
        f"row {row}, column {column!r}: the label is {shown}; remove the row or fill it in", code="not-a-label"
    )


def _number(text: str) -> Decimal | None:
    """What a label says if it is a number, in whatever spelling: 1, 01, 1.0, 1e0."""
    plain = text.strip()
    return Decimal(plain) if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,4})?", plain) else None


def _plain(label: str) -> str:
    """What a reader takes a label for."""
    number = _number(label)
    return str(number.normalize() + 0) if number is not None else unicodedata.normalize("NFKC", label).strip()


def _nearest_class(label: str, names: Sequence[str]) -> str:
    alike = [name for name in names if _plain(name) == _plain(label)]
    return f"did you mean {_shown(alike[0])}, which is written in another way?" if alike else nearest(label, names)


def _shown(value: Any) -> str:
    return clean_text(ascii(value) if isinstance(value, str) and value != clean_text(value) else repr(value), 80)
