"""Text classification: one label for each text, by a classification head on the base model.

Shapes: b = examples in a batch, t = tokens, c = classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedlora.errors import ConfigError, DataError, nearest
from fedlora.tasks._base import Batch, Examples, Table, Task, tasks
from fedlora.tasks._text import Tokens, encode


@tasks.register("text-classification")
@dataclass(frozen=True)
class TextClassification(Task):
    """One label for each text.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included.
        labels: names of the classes in the order of their numbers. Empty: the source's own names where it has them,
            else the labels found, sorted. A node that reads its own file needs them, since it may lack a class.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "accuracy"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    max_length: Annotated[int, Field(ge=4)] = 64
    labels: tuple[str, ...] = ()

    @property
    def head(self) -> tuple[str, ...]:
        """Names that transformers gives to the classification head (BERT's, and Llama's)."""
        return ("classifier", "score")

    def prepare(
        self, table: Table, model_path: str | Path, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise a table with columns "text" and "label" (strings, whole numbers or booleans).

        Raises:
            DataError: a text or label is missing; the message names the row (from 0) and the column.
        """
        names = class_names(table.columns[columns["label"]], columns["label"], self.labels or table.label_names)
        labels = class_ids(table.columns[columns["label"]], columns["label"], names)
        tokens = encode(model_path, table.columns[columns["text"]], columns["text"], self.max_length)
        return Examples(
            inputs={"input_ids": tokens},
            labels=labels,
            lengths=tokens.lengths,
            columns={name: np.asarray(table.columns[name]) for name in keep},
            label_names=names,
        )

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The number and the names of the classes, and the padding token that some models look for."""
        names = examples.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "pad_token_id": _tokens(examples).pad_id,
        }

    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """Padded to the longest text of the batch: "input_ids" and "attention_mask" [b, t], "labels" [b]."""
        ids, mask = _tokens(examples).pad(indices)
        assert examples.labels is not None
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.from_numpy(examples.labels[np.asarray(indices, dtype=np.int64)]),
        }

    def corrupt(self, examples: Examples, rows: np.ndarray, rate: float, seed: int) -> Examples:
        """Noise in the texts: `rate` is the share of words that are exchanged for words of other texts."""
        tokens = _tokens(examples).corrupt(rows, rate, seed)
        return replace(examples, inputs={**examples.inputs, "input_ids": tokens})

    def losses(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """Cross entropy of each text in nats."""
        return functional.cross_entropy(_logits(model, batch), batch["labels"], reduction="none")

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """For each text: "loss" in nats, and "correct" as 0 or 1."""
        logits = _logits(model, batch)
        return {
            "loss": functional.cross_entropy(logits, batch["labels"], reduction="none"),
            "correct": (logits.argmax(dim=-1) == batch["labels"]).to(logits.dtype),
        }

    def summarise(self, measures: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Accuracy as a fraction, and the mean loss in nats."""
        return {
            "accuracy": float(np.mean(measures["correct"], dtype=np.float64)),
            "loss": float(np.mean(measures["loss"], dtype=np.float64)),
        }


def _tokens(examples: Examples) -> Tokens:
    tokens = examples.inputs["input_ids"]
    assert isinstance(tokens, Tokens)
    return tokens


def _logits(model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b c"]:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
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
