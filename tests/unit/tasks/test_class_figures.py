"""Figures of a classifier, from sums that add up: against scikit-learn, and over any division of the examples."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import (
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

from fedlora.federation.evaluator import added
from fedlora.tasks._class_figures import (
    CALIBRATION_BINS,
    MOST_CLASSES,
    SCORE_BINS,
    class_figures,
    class_sums,
    figures_by_class,
)
from fedlora.tasks.multi_label_classification import MultiLabelClassification
from fedlora.tasks.text_classification import TextClassification
from fedlora.tasks.token_classification import TokenClassification


def drawn(seed: int, n: int, c: int, *, skew: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Losses, labels, predictions and probabilities of a classifier that is right now and then."""
    generator = np.random.default_rng(seed)
    label = generator.choice(c, size=n, p=generator.dirichlet(np.full(c, skew)))
    logits = generator.normal(size=(n, c)) + 1.5 * np.eye(c)[label] * generator.random((n, 1))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(n), label])
    return loss, label.astype(float), probabilities.argmax(axis=1).astype(float), probabilities


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), n=st.integers(1, 200), c=st.integers(2, 7), skew=st.sampled_from([0.1, 1.0]))
@settings(deadline=None, max_examples=60)
def test_figures_are_those_of_scikit_learn(seed: int, n: int, c: int, skew: float) -> None:
    loss, label, predicted, probabilities = drawn(seed, n, c, skew=skew)
    found = class_figures(class_sums(loss, label, predicted, probabilities))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        assert found["accuracy"] == pytest.approx((label == predicted).mean())
        assert found["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
        assert found["weighted_f1"] == pytest.approx(f1_score(label, predicted, average="weighted"))
        assert found["mcc"] == pytest.approx(matthews_corrcoef(label, predicted), abs=1e-9)
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, predicted))
    assert found["loss"] == pytest.approx(loss.mean())
    assert found["majority_share"] == pytest.approx(np.bincount(label.astype(int)).max() / n)


@pytest.mark.parametrize("c", [2, 5])
def test_auroc_is_scikit_learns_on_binned_probabilities(c: int) -> None:
    loss, label, predicted, probabilities = drawn(3, 2000, c)
    binned = np.floor(probabilities * SCORE_BINS)
    wanted = np.mean([roc_auc_score(label == k, binned[:, k]) for k in range(c)])
    found = class_figures(class_sums(loss, label, predicted, probabilities))["auroc"]
    assert found == pytest.approx(wanted)
    exact = np.mean([roc_auc_score(label == k, probabilities[:, k]) for k in range(c)])
    assert found == pytest.approx(exact, abs=0.003)  # what the bins cost


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_each_class_are_scikit_learns(seed: int) -> None:
    names = ("a", "b", "c", "d")
    loss, label, predicted, probabilities = drawn(seed, 60, 4, skew=0.3)
    task = TextClassification()
    found = task.by_class(class_sums(loss, label, predicted, probabilities), names)
    assert tuple(found) == names
    wanted = precision_recall_fscore_support(label, predicted, labels=range(4), zero_division=0)
    for place, row in enumerate(found.values()):
        assert [row["precision"], row["recall"], row["f1"], row["examples"]] == pytest.approx(
            [column[place] for column in wanted]
        )
        own = label == place
        if own.any() and not own.all():
            assert row["auroc"] == pytest.approx(roc_auc_score(own, np.floor(probabilities[:, place] * SCORE_BINS)))
        else:
            assert np.isnan(row["auroc"])


def test_many_labels_and_entities_have_figures_by_class_too() -> None:
    draw = np.random.default_rng(0)
    labels, probabilities = draw.random((50, 3)) < 0.3, draw.random((50, 3))
    many = MultiLabelClassification()
    sums = many.sums({"loss": np.zeros(50), "labels": labels * 1.0, "probabilities": probabilities})
    wanted = precision_recall_fscore_support(labels, probabilities >= 0.5)
    for place, row in enumerate(many.by_class(sums, ("x", "y", "z")).values()):
        assert [row["precision"], row["recall"], row["f1"], row["examples"]] == pytest.approx(
            [column[place] for column in wanted]
        )
    tags = TokenClassification()
    entities = {"entities": np.asarray([[4.0, 2.0, 1.0], [0.0, 0.0, 0.0]])}
    found = tags.by_class(entities, ("O", "B-PER", "I-PER", "B-ART", "I-ART"))
    assert found["ART"] == pytest.approx({"examples": 4.0, "precision": 0.5, "recall": 0.25, "f1": 1 / 3})
    assert found["PER"] == {"examples": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert figures_by_class(("a",) * (MOST_CLASSES + 1), np.zeros((MOST_CLASSES + 1, 3))) == {}


def test_calibration_error_is_that_of_its_definition() -> None:
    loss, label, predicted, probabilities = drawn(4, 500, 3)
    confidence, right = probabilities.max(axis=1), label == predicted
    place = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [(place == h).mean() * abs(confidence[place == h].mean() - right[place == h].mean()) for h in set(place)]
    assert class_figures(class_sums(loss, label, predicted, probabilities))["ece"] == pytest.approx(sum(gaps))


@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 119), max_size=4, unique=True))
@settings(deadline=None, max_examples=40)
def test_sums_of_parts_are_those_of_the_whole_to_the_last_count(seed: int, cuts: list[int]) -> None:
    columns = drawn(seed, 120, 3)
    whole = class_sums(*columns)
    parts = zip(*(np.split(column, sorted(cuts)) for column in columns), strict=True)
    pooled = added([class_sums(*part) for part in parts])
    for name in ("examples", "confusion", "scores"):
        np.testing.assert_array_equal(pooled[name], whole[name])
    assert class_figures(pooled) == pytest.approx(class_figures(whole), rel=1e-12)


def test_a_model_that_diverged_and_many_classes_give_figures_all_the_same() -> None:
    nan = np.full((4, 3), np.nan)
    found = class_figures(class_sums(nan[:, 0], np.array([0.0, 1, 2, 2]), np.zeros(4), nan))
    assert found["accuracy"] == 0.25
    assert np.isnan(found["loss"])
    many = drawn(5, 50, MOST_CLASSES + 1)
    assert "auroc" not in class_figures(class_sums(*many))
