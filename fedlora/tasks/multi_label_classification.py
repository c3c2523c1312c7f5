"""Multi-label classification: any number of classes for each text or pair of texts.

Shapes: n = examples, b = examples in a batch, c = classes, h = bins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedlora.assets import Checkpoint
from fedlora.errors import DataError, nearest
from fedlora.model.classes import in_trained_order, trained_classes
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Table, require_possible, tasks, wide
from fedlora.tasks._class_figures import (
    binary_sums,
    calibration_error,
    figures_by_class,
    mean_auroc,
    require_binary_sums,
)
from fedlora.tasks._classification import class_kwargs, class_names
from fedlora.tasks._text_head import WholeTextHead


@tasks.register("multi-label-classification")
@dataclass(frozen=True)
class MultiLabelClassification(WholeTextHead):
    """Any number of classes for each text: its topics, the emotions in it.

    A label is a list of names, `["joy", "pride"]`, which may be empty; or a text with commas between them, as in a .csv
    file, where `[]` stands for none. Where no class is named by a number, a whole number in a list is a class's place,
    from 0. The loss of an example is the mean binary cross entropy of its classes, in nats, as of transformers'
    problem_type "multi_label_classification". A class is predicted where its probability is at least one half.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included; of a pair the longer text first.
        labels: names of the classes in the order of their numbers. Empty: the source's own names where it has them,
            else those found, sorted. A node that reads its own file needs them, since it may lack a class. A checkpoint
            whose head was trained for these very classes keeps its own order of them.
    """

    metric: ClassVar[str] = "micro_f1"
    has_classes: ClassVar[bool] = True

    labels: tuple[str, ...] = ()

    def targets(
        self, table: Table, column: str, model_path: str | Path | Checkpoint
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Which classes each example has, uint8 [n, c], and the names of the classes."""
        cells = [_listed(value, row, column) for row, value in enumerate(table.columns[column])]
        found = [(row, name) for row, cell in enumerate(cells) for name in cell]
        known = self.labels or table.label_names
        names = class_names([name for _, name in found], column, known, [row for row, _ in found])
        names = in_trained_order(names, trained_classes(model_path)) or names
        places: dict[str | int, int] = {name: place for place, name in enumerate(names)}
        if any(name.isdecimal() for name in names):
            places |= {int(name): place for place, name in enumerate(names) if name.isdecimal()}
        else:
            places |= {place: place for place in range(len(names))}
        targets = np.zeros((len(cells), len(names)), dtype=np.uint8)
        for row, name in found:
            if name not in places:
                raise DataError(
                    f"row {row}, column {column!r}: {clean_text(repr(name), 80)} is not a class; "
                    f"{nearest(str(name), names)}",
                    code="label-not-a-class",
                )
            targets[row, places[name]] = 1
        return targets, names

    def invented(self, role: str) -> Sequence[Any] | None:
        """None of the classes, one, all but one, and all."""
        return [[], self.labels[:1], self.labels[1:], self.labels] if role == "label" else None

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The number and the names of the classes, and the padding token that some models look for."""
        kind = {"problem_type": "multi_label_classification"}
        return {**super().model_kwargs(examples), **class_kwargs(examples.label_names), **kind}

    def shown(self, examples: Examples, index: int) -> str:
        """The names of its classes."""
        names = np.asarray(examples.label_names)[examples.inputs["targets"][index] != 0]
        return ", ".join(names) or "none"

    def losses(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """The mean binary cross entropy of each example's classes, in nats."""
        return self._losses(wide(self.logits(model, batch)), batch)

    def _losses(self, logits: Float[Tensor, "b c"], batch: Batch) -> Float[Tensor, "b"]:
        wanted = batch["labels"].to(logits)
        return functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b ..."]]:
        """For each example "loss" in nats, and of its classes "labels" (0 or 1) and "probabilities" [b, c]."""
        logits = wide(self.logits(model, batch))
        labels = batch["labels"].to(logits)
        return {"loss": self._losses(logits, batch), "labels": labels, "probabilities": logits.sigmoid()}

    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sums over some examples.

        Returns:
            "examples"; "loss"; "exact", how many have just the classes that were predicted; "counts" [c, 3], for each
            class its examples, those that it was predicted for, and those of both; "calibration" [h, 3] and "scores"
            [c, 2, h] as of `fedlora.tasks._class_figures`, of each class of each example.
        """
        labels, probabilities = measures["labels"] > 0.5, np.asarray(measures["probabilities"], dtype=np.float64)
        guesses = probabilities >= 0.5
        found = [labels.sum(axis=0), guesses.sum(axis=0), (labels & guesses).sum(axis=0)]
        return {
            "examples": np.asarray(float(len(labels))),
            "loss": np.asarray(np.sum(measures["loss"], dtype=np.float64)),
            "exact": np.asarray(float((labels == guesses).all(axis=1).sum())),
            "counts": np.stack(found, axis=1).astype(np.float64),
            **binary_sums(labels, probabilities),
        }

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures of the examples that were added up.

        Returns:
            "micro_f1", the F1 of all classes of all examples together; "macro_f1", the mean over the classes that occur
            as label or as prediction; "exact_match", the share of examples whose classes are all right;
            "hamming_error", the share of single decisions that are wrong; "auroc", the mean over the classes; "ece",
            the calibration error of the classes' probabilities; "loss", the mean.
        """
        own, guessed, right = sums["counts"].T
        examples, size = float(sums["examples"]), own + guessed
        figures = {
            "micro_f1": float(2 * right.sum() / max(size.sum(), 1)),
            "macro_f1": float(np.mean(2 * right[size > 0] / size[size > 0])) if size.any() else 0.0,
            "exact_match": float(sums["exact"]) / examples,
            "hamming_error": float((size - 2 * right).sum() / (examples * len(own))),
            "ece": calibration_error(sums["calibration"]),
            "loss": float(sums["loss"]) / examples,
        }
        return {**figures, "auroc": mean_auroc(sums["scores"])} if "scores" in sums else figures

    def by_class(self, sums: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
        """See `figures_by_class`."""
        return figures_by_class(names, sums["counts"], sums.get("scores"))

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """No class has more examples, or more that are right, than there are."""
        (own, guessed, both), examples = sums["counts"].T, float(sums["examples"])
        require_possible((both <= np.minimum(own, guessed)).all(), "of a class more are right than there are")
        require_possible((own + guessed - both <= examples).all(), f"a class has more than {examples:g} examples")
        require_possible(float(sums["exact"]) <= examples, f"more than {examples:g} examples are right")
        require_binary_sums(sums, examples * len(own), float(own.sum()), own)


def _listed(value: Any, row: int, column: str) -> list[str | int]:
    """The classes of a cell, each by its name or its number."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.lstrip().startswith("[") else value.split(",")
        except ValueError:
            found = None
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if isinstance(found, list | tuple) and all(type(name) in (str, int) for name in found):
        cell = [name.strip() if isinstance(name, str) else name for name in found]
        if "" not in cell and len(set(cell)) == len(cell):
            return cell
    raise DataError(
        f"row {row}, column {column!r}: {clean_text(repr(value), 80)} is no list of classes, each once: write "
        '["a", "b"], or [] for none',
        code="not-a-list-of-classes",
    )
