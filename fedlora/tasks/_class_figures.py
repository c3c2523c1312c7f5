"""What is said of a classifier, computed from sums that add up over sets of examples.

A client that evaluates on its own examples sends the sums alone; those of all clients together give the figures of
their examples in one place.

Shapes: n = examples, c = classes, h = bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from fedlora.tasks._base import require_possible

SCORE_BINS = 200
"""Bins of equal width in which the AUROC sees probabilities."""
CALIBRATION_BINS = 15
"""Bins of equal width of the expected calibration error, as in Guo et al. 2017 (arXiv 1706.04599)."""
SLACK = 1e-5
"""By how much of itself a probability in single precision may be above 1."""
MOST_CLASSES = 100
"""With more classes, no histograms of their probabilities are kept, and there is no AUROC."""


def class_sums(
    loss: Float[np.ndarray, "n"],
    label: Float[np.ndarray, "n"],
    predicted: Float[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n c"],
) -> dict[str, np.ndarray]:
    """Sums over some examples.

    Args:
        loss: in nats.
        label: number of the right class.
        predicted: number of the class with the largest probability.
        probabilities: of each class.

    Returns:
        "examples"; "loss", their sum; "confusion" [c, c], examples of each label (row) by what was predicted (column);
        "calibration" [h, 3], for each bin of the predicted class's probability its examples, their probabilities added
        up, and how many are right; "scores" [c, 2, h] (for at most 100 classes), for each class the histogram of its
        probability over the examples of other classes and over its own.
    """
    n, c = probabilities.shape
    labels, guesses = label.astype(np.int64), predicted.astype(np.int64)
    confidence = np.take_along_axis(probabilities, guesses[:, None], axis=1)[:, 0]
    sums: dict[str, np.ndarray] = {
        "examples": np.asarray(float(n)),
        "loss": np.asarray(np.sum(loss, dtype=np.float64)),
        "confusion": np.bincount(labels * c + guesses, minlength=c * c).reshape(c, c).astype(np.float64),
        "calibration": _calibration(confidence, guesses == labels),
    }
    return {**sums, **_scores(labels[:, None] == np.arange(c), probabilities)}


def binary_sums(labels: Bool[np.ndarray, "n c"], probabilities: Float[np.ndarray, "n c"]) -> dict[str, np.ndarray]:
    """Sums over some examples of which each has any number of classes.

    Returns:
        "calibration" and "scores" as of `class_sums`; the former of the probability of each class of each example, and
        of whether it has the class.
    """
    return {"calibration": _calibration(probabilities.ravel(), labels.ravel()), **_scores(labels, probabilities)}


def _calibration(confidence: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "h 3"]:
    columns = (np.ones(len(right)), confidence, right.astype(np.float64))
    bins = _bins(confidence, CALIBRATION_BINS)
    return np.stack([np.bincount(bins, column, CALIBRATION_BINS) for column in columns], axis=1)


def _scores(own: Bool[np.ndarray, "n c"], probabilities: Float[np.ndarray, "n c"]) -> dict[str, np.ndarray]:
    c = own.shape[1]
    if c > MOST_CLASSES:
        return {}
    place = (np.arange(c) * 2 + own) * SCORE_BINS + _bins(probabilities, SCORE_BINS)
    counts = np.bincount(place.ravel(), minlength=c * 2 * SCORE_BINS)
    return {"scores": counts.reshape(c, 2, SCORE_BINS).astype(np.float64)}


def require_class_sums(sums: Mapping[str, np.ndarray]) -> None:
    """Raise `ReplyError` for what `class_sums` never gives."""
    confusion, examples = sums["confusion"], float(sums["examples"])
    require_possible(confusion.sum() == examples, f"the confusion matrix is not of {examples:g} examples")
    require_binary_sums(sums, examples, float(np.trace(confusion)), confusion.sum(axis=1))


def require_binary_sums(
    sums: Mapping[str, np.ndarray], decisions: float, right: float, of_class: Float[np.ndarray, "c"]
) -> None:
    """Raise `ReplyError` for histograms of other numbers of examples.

    Args:
        sums: with "calibration", and "scores" where there are any.
        decisions: how many probabilities are in "calibration".
        right: how many of them are of what is so.
        of_class: examples of each class.
    """
    count, confidence, hits = sums["calibration"].T
    inside = (hits <= count) & (confidence <= count * (1 + SLACK))
    require_possible(
        count.sum() == decisions and hits.sum() == right and inside.all(),
        "the bins of the calibration error do not have as many probabilities and right answers as there are",
    )
    if "scores" in sums:
        others, own = sums["scores"].sum(axis=2).T
        require_possible(
            (own == of_class).all() and (others + own == float(sums["examples"])).all(),
            "the bins of the AUROC do not have as many examples of each class as there are",
        )


def class_figures(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Figures of the examples that were added up.

    Classes without an example are left out of means over classes.

    Returns:
        "accuracy"; "balanced_accuracy", the mean recall over the classes; "majority_share", the accuracy of always
        answering with the largest class; "macro_f1" and "weighted_f1", the mean F1 over the classes that occur as label
        or as prediction, and the mean weighted by their examples; "mcc", the Matthews correlation coefficient (for c
        classes Gorodkin's R_K, 2004), 0 where it is not defined; "auroc", one class against the others, the mean over
        the classes, from probabilities in bins (NaN with one class alone, left out with more than 100 classes);
        "ece", the expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation (3)); "loss", the mean.
    """
    confusion, examples = sums["confusion"], float(sums["examples"])
    right, of_class, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    there = of_class > 0
    f1 = 2 * right / np.maximum(of_class + guessed, 1)
    figures = {
        "accuracy": float(right.sum() / examples),
        "balanced_accuracy": float(np.mean(right[there] / of_class[there])),
        "majority_share": float(of_class.max() / examples),
        "macro_f1": float(np.mean(f1[of_class + guessed > 0])),
        "weighted_f1": float(f1 @ of_class / examples),
        "mcc": _matthews(right.sum(), of_class, guessed, examples),
        "ece": calibration_error(sums["calibration"]),
        "loss": float(sums["loss"] / examples),
    }
    if "scores" in sums:
        figures["auroc"] = mean_auroc(sums["scores"])
    return figures


def figures_by_class(
    names: Sequence[str], counts: Float[np.ndarray, "c 3"], scores: Float[np.ndarray, "c 2 h"] | None = None
) -> dict[str, dict[str, float]]:
    """Figures of each class; of more than 100 classes none.

    Args:
        names: of the classes.
        counts: for each class what has it, what it was predicted for, and what both.
        scores: see `class_sums`.

    Returns:
        Class -> "examples", "precision", "recall", "f1" (0 where they would be divided by 0) and with scores "auroc".
    """
    if len(names) > MOST_CLASSES:
        return {}
    found = {}
    for place, (name, (own, guessed, both)) in enumerate(zip(names, counts.tolist(), strict=True)):
        figures = {
            "precision": both / max(guessed, 1),
            "recall": both / max(own, 1),
            "f1": 2 * both / max(own + guessed, 1),
        }
        if scores is not None:
            figures["auroc"] = mean_auroc(scores[place : place + 1])
        found[name] = {"examples": own, **figures}
    return found


def _bins(values: np.ndarray, number: int) -> np.ndarray:
    """Places of probabilities in so many bins; those of a diverged model, which are none, go to the first."""
    return np.minimum((np.nan_to_num(values) * number).astype(np.int64), number - 1)


def _matthews(
    right: float, of_class: Float[np.ndarray, "c"], guessed: Float[np.ndarray, "c"], examples: float
) -> float:
    spread = (examples**2 - guessed @ guessed) * (examples**2 - of_class @ of_class)
    return float((right * examples - of_class @ guessed) / np.sqrt(spread)) if spread > 0 else 0.0


def calibration_error(calibration: Float[np.ndarray, "h 3"]) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation (3))."""
    count, confidence, hits = calibration.T
    return float(np.abs(confidence - hits).sum() / max(count.sum(), 1.0))


def mean_auroc(scores: Float[np.ndarray, "c 2 h"]) -> float:
    """Probability that an example of a class has more of its probability than another; a tie of bins counts half.

    The mean over the classes; NaN where each of them has all examples or none.
    """
    others, own = scores[:, 0], scores[:, 1]
    pairs = own.sum(axis=1) * others.sum(axis=1)
    below = np.cumsum(others, axis=1) - others / 2
    areas = (own * below).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    return float(np.mean(areas)) if len(areas) else float("nan")
