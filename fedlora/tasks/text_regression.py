"""Text regression: a number for each text or pair of texts, by a head of one output on the base model.

Shapes: n = examples, b = examples in a batch, h = bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.assets import Checkpoint
from fedlora.errors import ConfigError, DataError
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Table, require_possible, tasks, wide
from fedlora.tasks._text_head import WholeTextHead

RANK_BINS = 64
"""Bins of equal width, of `label_range` each way, in which Spearman's correlation sees labels and predictions."""
LARGEST = float(np.finfo(np.float32).max)
"""Of labels: the models' own single precision holds no larger ones."""
SLACK, TINY = 1e-9, 1e-300  # what rounding and underflow do to moments


@tasks.register("text-regression")
@dataclass(frozen=True)
class TextRegression(WholeTextHead):
    """A number for each text, such as a rating, or for each pair of texts, such as their likeness (STS-B).

    The loss of an example is the squared error of the head's one output, as of transformers' problem_type "regression";
    labels are taken as they are.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included; of a pair the longer text first.
        label_range: lowest and highest possible label, as in [0, 5]; others are refused. With it Spearman's correlation
            is reported, of labels and predictions in bins. (Ranks among all clients' examples are no sums; counts in
            bins that all clients share are.)
    """

    metric: ClassVar[str] = "mean_absolute_error"
    higher_is_better: ClassVar[bool] = False
    signed_sums: ClassVar[tuple[str, ...]] = ("moments",)

    label_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse a range without width or end."""
        if self.label_range is None:
            return
        low, high = self.label_range
        if not -LARGEST <= low < high <= LARGEST:
            what = "is empty" if math.isfinite(low) and math.isfinite(high) and low >= high else "has no end"
            raise ConfigError(
                f"task.label_range = {list(self.label_range)} {what}: give the lowest and then the highest label, each "
                f"of at most {LARGEST:.1e}",
                code="bad-value",
            )

    def targets(
        self, table: Table, column: str, model_path: str | Path | Checkpoint
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """The labels, float64 [n]; text is taken that is a number, as of a .csv file."""
        low, high = self.label_range or (-math.inf, math.inf)
        found = [_number(value, row, column) for row, value in enumerate(table.columns[column])]
        for row, value in enumerate(found):
            if not low <= value <= high:
                raise DataError(
                    f"row {row}, column {column!r}: the label {value:g} is outside task.label_range, {low:g} to "
                    f"{high:g}: correct the row or the range",
                    code="label-out-of-range",
                )
        return np.asarray(found, dtype=np.float64), ()

    def invented(self, role: str) -> Sequence[Any] | None:
        """Labels within the range."""
        low, high = self.label_range or (0.0, 1.0)
        return [low, (low + high) / 2, high, low] if role == "label" else None

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """One output, and the padding token that some models look for."""
        return {**super().model_kwargs(examples), "num_labels": 1, "problem_type": "regression"}

    def shown(self, examples: Examples, index: int) -> str:
        """The number."""
        return f"{examples.inputs['targets'][index]:g}"

    def losses(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """The squared error of each example."""
        predicted = wide(self.logits(model, batch))[:, 0]
        return (predicted - batch["labels"].to(predicted)) ** 2

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """For each example the squared error as "loss", "label", and "predicted"."""
        predicted = wide(self.logits(model, batch))[:, 0]
        label = batch["labels"].to(predicted)
        return {"loss": (predicted - label) ** 2, "label": label, "predicted": predicted}

    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sums over some examples.

        Returns:
            "examples"; "loss" and "absolute_error"; "moments" [5] of label, predicted, label^2, predicted^2 and their
            product; and with a range "ranks" [h, h], examples by the bins of their label (row) and of what was
            predicted (column).
        """
        y, p = (np.asarray(measures[name], dtype=np.float64) for name in ("label", "predicted"))
        found = {
            "examples": np.asarray(float(len(y))),
            "loss": np.asarray(((y - p) ** 2).sum()),
            "absolute_error": np.asarray(np.abs(y - p).sum()),
            "moments": np.asarray([y.sum(), p.sum(), (y * y).sum(), (p * p).sum(), (y * p).sum()]),
        }
        if self.label_range is not None:
            place = self._bins(y) * RANK_BINS + self._bins(p)
            found["ranks"] = np.bincount(place, minlength=RANK_BINS**2).reshape(RANK_BINS, -1).astype(np.float64)
        return found

    def _bins(self, values: np.ndarray) -> np.ndarray:
        assert self.label_range is not None
        low, high = self.label_range
        return np.clip(np.nan_to_num((values - low) / (high - low)) * RANK_BINS, 0, RANK_BINS - 1).astype(np.int64)

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures of the examples that were added up.

        Returns:
            "mean_absolute_error"; "loss", the mean squared error; "r2", the share of the labels' variance that is
            explained; "pearson" and, with a range, "spearman", the correlations of labels and predictions. The last
            three are NaN where labels (or for correlations predictions) do not vary.
        """
        n = float(sums["examples"])
        y, p, yy, pp, yp = (float(value) / n for value in sums["moments"])
        loss = float(sums["loss"]) / n
        vary, guessed = _variance(y, yy), _variance(p, pp)
        spread = math.sqrt(vary) * math.sqrt(guessed)
        figures = {
            "mean_absolute_error": float(sums["absolute_error"]) / n,
            "loss": loss,
            "r2": 1 - loss / vary if vary else math.nan,
            "pearson": max(-1.0, min((yp - y * p) / spread, 1.0)) if spread else math.nan,
        }
        return figures if self.label_range is None else {**figures, "spearman": _spearman(sums["ranks"])}

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """Moments are as Cauchy and Schwarz have them, and each example is in a bin."""
        n = float(sums["examples"])
        y, p, yy, pp, yp = (float(value) / n for value in sums["moments"])
        require_possible(
            all(square >= 0 and mean * mean <= square * (1 + SLACK) + TINY for mean, square in ((y, yy), (p, pp))),
            "its squares are too small for what is squared",
        )
        spreads = (max(square - mean * mean, 0.0) + SLACK * square for mean, square in ((y, yy), (p, pp)))
        most = math.prod(map(math.sqrt, spreads)) * (1 + SLACK) + TINY
        require_possible(abs(yp - y * p) <= most, "its products are too large for its squares")
        if self.label_range is not None:
            require_possible(sums["ranks"].sum() == n, f"the bins of the ranks do not have {n:g} examples")


def _variance(mean: float, square: float) -> float:
    """From the means of numbers and of their squares; what is left where all are equal is rounding."""
    found = square - mean * mean
    return found if found > 1e-12 * square else 0.0


def _spearman(counts: Float[np.ndarray, "h h"]) -> float:
    """Pearson's correlation of ranks; examples of one bin have their mean rank."""
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    of_row, of_column = (np.cumsum(some) - some / 2 - counts.sum() / 2 for some in (rows, columns))
    spread = float((rows @ of_row**2) * (columns @ of_column**2))
    return float(of_row @ counts @ of_column) / math.sqrt(spread) if spread > 0 else math.nan


def _number(value: Any, row: int, column: str) -> float:
    try:
        found = math.nan if isinstance(value, bool | np.bool_) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) <= LARGEST:
        raise DataError(
            f"row {row}, column {column!r}: the label {clean_text(repr(value), 80)} is no number of at most "
            f"{LARGEST:.1e}: remove the row or correct it",
            code="not-a-number",
        )
    return found
