"""Text classification: one label for each text or pair of texts, by a classification head on the base model.

Shapes: n = examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fedlora.assets import Checkpoint
from fedlora.tasks._base import Examples, Table, tasks
from fedlora.tasks._classification import Classification, Weights
from fedlora.tasks._text_head import WholeTextHead


@tasks.register("text-classification")
@dataclass(frozen=True)
class TextClassification(WholeTextHead, Classification):
    """One label for each text, or for each pair of texts (`data.columns.text_pair`), as in natural language inference.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included; of a pair the longer text first.
        labels: names of the classes in the order of their numbers. Empty: the source's own names where it has them,
            else the labels found, sorted. A node that reads its own file needs them, since it may lack a class. A
            checkpoint whose head was trained for these very classes keeps its own order of them.
        class_weights: name of a class -> what the loss of its examples is multiplied with in training; 1 for those that
            are not named. The loss stays a mean over examples, where torch's with `weight` is divided by the weights.
            Evaluation has none.
        label_smoothing: share of the training target that is spread evenly over all classes (Szegedy et al. 2016, arXiv
            1512.00567, section 7); evaluation has none.
    """

    labels: tuple[str, ...] = ()
    class_weights: Weights = field(default_factory=dict)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def targets(
        self, table: Table, column: str, model_path: str | Path | Checkpoint
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """The class of each example, int64 [n], and the names of the classes."""
        names, labels = self.classes(table, column, model_path)
        return labels, names

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The number and the names of the classes, and the padding token that some models look for."""
        return {**Classification.model_kwargs(self, examples), **WholeTextHead.model_kwargs(self, examples)}

    def shown(self, examples: Examples, index: int) -> str:
        """The name of the class."""
        assert examples.labels is not None
        return examples.label_names[int(examples.labels[index])]
