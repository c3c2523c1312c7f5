"""Regression, multi-label classification and pairs of texts: transformers' own encodings and losses, figures from sums
that add up over any division of the examples, and rows that are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import f1_score, hamming_loss, mean_absolute_error, r2_score, roc_auc_score
from support.errors import raises

from fedlora.config import OpenTable
from fedlora.errors import ConfigError, DataError
from fedlora.federation.evaluator import added
from fedlora.tasks import Examples, Table, load_task
from fedlora.tasks._class_figures import SCORE_BINS
from fedlora.tasks._text import load_tokenizer
from fedlora.tasks._text_head import WholeTextHead
from fedlora.tasks.multi_label_classification import MultiLabelClassification
from fedlora.tasks.text_classification import TextClassification
from fedlora.tasks.text_regression import RANK_BINS, TextRegression

TEXTS = ["the film is great", "awful", "a very dull and boring story but it was so", "happy phone"]
OTHERS = ["it was a great phone and the film was great and so was the story", "film", "awful", "a dull phone"]
LABELS: dict[type[WholeTextHead], list[Any]] = {
    TextClassification: ["a", "b", "c", "b"],
    TextRegression: [0.5, -1, "2.25", 4.0],
    MultiLabelClassification: [["joy"], [], ["joy", "pride"], "pride"],
}
KINDS = [pytest.param(kind, id=kind.__name__) for kind in LABELS]


@pytest.fixture(scope="session")
def typed_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with segments, as BERT's own tokeniser gives them."""
    folder = shutil.copytree(tiny_bert, tmp_path_factory.mktemp("typed") / "bert")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def prepared(path: Path, task: WholeTextHead, labels: list[Any] | None = None, *, pair: bool = False) -> Examples:
    columns = {"text": "one", "label": "wanted"} | ({"text_pair": "two"} if pair else {})
    table = Table({"one": TEXTS, "two": OTHERS, "wanted": LABELS[type(task)] if labels is None else labels})
    return task.prepare(table, path, columns, keep=())


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_own(kind: type[WholeTextHead], pair: bool, typed_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    task = kind()
    examples = prepared(typed_bert, task, pair=pair)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kwargs = task.model_kwargs(examples)
        model = AutoModelForSequenceClassification.from_pretrained(typed_bert, **kwargs).double().eval()
    tokenizer = load_tokenizer(typed_bert)
    given = tokenizer(TEXTS, *([OTHERS] if pair else []), padding=True, return_tensors="pt")
    wanted = {
        TextClassification: torch.tensor([0, 1, 2, 1]),
        TextRegression: torch.tensor([0.5, -1, 2.25, 4.0]).double(),
        MultiLabelClassification: torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]]).double(),
    }[kind]
    theirs = model(**given, labels=wanted).loss
    each = task.losses(model, task.collate(examples, range(4)))
    torch.testing.assert_close(each.mean(), theirs)
    alone = torch.cat([task.losses(model, task.collate(examples, [row])) for row in range(4)])
    torch.testing.assert_close(each, alone)
    torch.testing.assert_close(task.measure(model, task.collate(examples, range(4)))["loss"], each)


def test_a_pair_is_encoded_and_cut_as_the_tokeniser_does(typed_bert: Path) -> None:
    task = TextRegression(max_length=12)
    examples = prepared(typed_bert, task, pair=True)
    theirs = load_tokenizer(typed_bert)(TEXTS, OTHERS, truncation=True, max_length=12)
    for name in ("input_ids", "token_type_ids"):
        assert [row.tolist() for row in examples.inputs[name]] == theirs[name]
    assert [(examples.inputs["token_type_ids"][0] == kind).sum() for kind in (0, 1)] == [6, 6]  # the second was cut
    batch = task.collate(examples, [1, 0])
    assert batch["token_type_ids"][0].tolist()[5:] == [0] * 7
    spans = task.spans(examples, 1, typed_bert)
    assert spans[0][0].count("[SEP]") == 2
    assert spans[1] == ("-1", True)


def test_noise_leaves_what_parts_a_pair(tiny_bert: Path) -> None:
    task = TextRegression()
    examples = prepared(tiny_bert, task, pair=True)
    noisy = task.corrupt(examples, np.arange(4), 1.0, 0)
    separator = load_tokenizer(tiny_bert).sep_token_id
    for before, after in zip(examples.inputs["input_ids"], noisy.inputs["input_ids"], strict=True):
        assert ((before == separator) == (after == separator)).all()
    assert any((a != b).any() for a, b in zip(examples.inputs["input_ids"], noisy.inputs["input_ids"], strict=True))


def test_a_second_text_is_read_where_its_column_is_named() -> None:
    task = TextClassification()
    assert task.roles_of(None, {"text": "one", "label": "label"}) == ("text", "label")
    assert task.roles_of(["text_pair"], {"text_pair": "two"}) == ("text", "text_pair", "label")


def test_no_room_for_words_is_refused(tiny_bert: Path) -> None:
    with raises(ConfigError, "max-length-too-small", "task.max_length = 4", "3 special tokens"):
        prepared(tiny_bert, TextRegression(max_length=4), pair=True)


# ---------------------------------------------------------------------------------------------- figures


def cut(measures: dict[str, np.ndarray], at: int) -> list[dict[str, np.ndarray]]:
    return [{name: values[part] for name, values in measures.items()} for part in (slice(at), slice(at, None))]


@given(seed=st.integers(0, 10**6), n=st.integers(3, 60), at=st.integers(1, 2))
@settings(deadline=None, max_examples=30)
def test_figures_of_a_regression_are_scipys_and_scikit_learns(seed: int, n: int, at: int) -> None:
    draw = np.random.default_rng(seed)
    y = draw.uniform(-4, 4, n).round(1)
    p = 0.5 * y + draw.normal(size=n)
    measures = {"loss": (y - p) ** 2, "label": y, "predicted": p}
    task = TextRegression(label_range=(-4, 4))
    found = task.figures(added([task.sums(part) for part in cut(measures, at)]))
    assert found == pytest.approx(task.summarise(measures), nan_ok=True)
    assert found["mean_absolute_error"] == pytest.approx(mean_absolute_error(y, p))
    assert found["loss"] == pytest.approx(np.mean((y - p) ** 2))
    if len(set(y)) > 1:
        assert found["r2"] == pytest.approx(r2_score(y, p))
        assert found["pearson"] == pytest.approx(pearsonr(y, p).statistic)
        in_bins = [np.clip(np.floor((v + 4) / 8 * RANK_BINS), 0, RANK_BINS - 1) for v in (y, p)]
        if all(len(set(v)) > 1 for v in in_bins):
            assert found["spearman"] == pytest.approx(np.corrcoef(*map(rankdata, in_bins))[0, 1])


def test_what_the_bins_of_ranks_cost_is_small() -> None:
    draw = np.random.default_rng(0)
    y = draw.uniform(0, 5, 2000)
    p = np.clip(y + draw.normal(size=2000), 0, 5)
    found = TextRegression(label_range=(0, 5)).summarise({"loss": (y - p) ** 2, "label": y, "predicted": p})
    assert found["spearman"] == pytest.approx(spearmanr(y, p).statistic, abs=2e-3)


def test_what_does_not_vary_has_no_correlation() -> None:
    same = np.full(7, 0.1)
    found = TextRegression(label_range=(0, 1)).summarise({"loss": same**2, "label": same, "predicted": same + 0.1})
    assert all(math.isnan(found[name]) for name in ("r2", "pearson", "spearman"))
    assert "spearman" not in TextRegression().summarise({"loss": same, "label": same, "predicted": same})


@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), c=st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_figures_of_many_labels_are_scikit_learns(seed: int, n: int, c: int) -> None:
    draw = np.random.default_rng(seed)
    labels = (draw.random((n, c)) < 0.4).astype(float)
    probabilities = np.clip(0.3 * labels + 0.7 * draw.random((n, c)), 0, 1)
    measures = {"loss": draw.random(n), "labels": labels, "probabilities": probabilities}
    task = MultiLabelClassification()
    found = task.figures(added([task.sums(part) for part in cut(measures, 1)]))
    assert found == pytest.approx(task.summarise(measures), nan_ok=True)
    guesses = probabilities >= 0.5
    assert found["micro_f1"] == pytest.approx(f1_score(labels, guesses, average="micro", zero_division=0))
    there = (labels + guesses).any(axis=0)
    each = f1_score(labels, guesses, average=None, zero_division=0)
    assert found["macro_f1"] == pytest.approx(each[there].mean() if there.any() else 0)
    of_class = task.by_class(task.sums(measures), [f"{k}" for k in range(c)])
    assert [row["f1"] for row in of_class.values()] == pytest.approx(list(each))
    assert [row["examples"] for row in of_class.values()] == labels.sum(axis=0).tolist()
    assert found["exact_match"] == pytest.approx((labels == guesses).all(axis=1).mean())
    assert found["hamming_error"] == pytest.approx(hamming_loss(labels, guesses))
    binned = np.floor(np.minimum(probabilities * SCORE_BINS, SCORE_BINS - 1))
    both = [k for k in range(c) if 0 < labels[:, k].sum() < n]
    wanted = np.mean([roc_auc_score(labels[:, k], binned[:, k]) for k in both]) if both else math.nan
    assert found["auroc"] == pytest.approx(wanted, nan_ok=True)


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("bad", ["seven", True, None, math.nan, math.inf, [1.0], {"a": 1}, 10**400, "1e400", -1e39])
def test_a_label_that_is_no_number_is_refused_by_row(bad: Any, tiny_bert: Path) -> None:
    with raises(DataError, "not-a-number", "row 2, column 'wanted'"):
        prepared(tiny_bert, TextRegression(), [1, 2, bad, 3])


def test_a_label_outside_its_range_is_refused_by_row(tiny_bert: Path) -> None:
    with raises(DataError, "label-out-of-range", "row 1, column 'wanted'", "5.5", "0 to 5"):
        prepared(tiny_bert, TextRegression(label_range=(0, 5)), [0, 5.5, 5, 3])
    with raises(ConfigError, "bad-value", "task.label_range"):
        load_task(OpenTable(name="text-regression", label_range=[5, 0]))
    for bad in (0.0, math.inf), (-math.inf, 0.0), (0.0, math.nan), (0.0, 1e300):
        with raises(ConfigError, "bad-value", "task.label_range", "has no end"):
            TextRegression(label_range=bad)


@pytest.mark.parametrize("bad", [3, "", "joy,", "joy,joy", "[joy]", [["joy"]], [True], [None], {"joy": 1}])
def test_a_cell_that_is_no_list_of_classes_is_refused_by_row(bad: Any, tiny_bert: Path) -> None:
    with raises(DataError, "not-a-list-of-classes", "row 3, column 'wanted'"):
        prepared(tiny_bert, MultiLabelClassification(), [["joy"], ["pride"], [], bad])


def test_unknown_and_lone_classes_are_refused(tiny_bert: Path) -> None:
    known = MultiLabelClassification(labels=("joy", "pride"))
    with raises(DataError, "label-not-a-class", "row 1", "'prid'", "'pride'"):
        prepared(tiny_bert, known, [["joy"], ["prid"], [], []])
    with raises(DataError, "label-not-a-class", "row 2", "2"):
        prepared(tiny_bert, known, [[0], [1], [2], []])
    with raises(DataError, "too-few-classes", "1 distinct"):
        prepared(tiny_bert, MultiLabelClassification(), [["joy"], [], [], []])
    with raises(DataError, "label-in-two-spellings", "row 1", "row 3"):
        prepared(tiny_bert, MultiLabelClassification(), [["b"], ["1"], [], ["b", 1]])


@pytest.mark.parametrize(
    "cells",
    [
        [["joy"], ["pride"], ["joy", "pride"], []],
        ["joy", "pride", "joy, pride", "[]"],
        ['["joy"]', "pride", np.array(["pride", "joy"]), ()],
        [[0], [1], [0, 1], []],
    ],
    ids=["lists", "text", "mixed", "places"],
)
def test_classes_of_a_cell_in_every_form(cells: list[Any], tiny_bert: Path) -> None:
    task = MultiLabelClassification(labels=("joy", "pride"))
    examples = prepared(tiny_bert, task, cells)
    assert examples.inputs["targets"].tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert [task.shown(examples, row) for row in range(4)] == ["joy", "pride", "joy, pride", "none"]


def test_numbers_as_names_are_names(tiny_bert: Path) -> None:
    examples = prepared(tiny_bert, MultiLabelClassification(), [[10], [2], [2, 10], []])
    assert examples.label_names == ("2", "10")
    assert examples.inputs["targets"].tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]


def test_classes_keep_the_places_that_a_checkpoints_head_has(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "trained")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "Pride", "1": "joy"}
    (folder / "config.json").write_text(json.dumps(config))
    assert prepared(folder, MultiLabelClassification()).label_names == ("pride", "joy")
