"""Token classification: transformers' own word numbers and loss, seqeval's figures over any division, refused rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import raises

from fedlora.config import OpenTable
from fedlora.errors import ConfigError, DataError
from fedlora.federation.evaluator import added
from fedlora.tasks import Examples, Table, load_task
from fedlora.tasks._text import load_tokenizer
from fedlora.tasks._token_loss import IGNORED
from fedlora.tasks.token_classification import TokenClassification, count_entities

WORDS = [["the", "great", "phone"], ["awful", "film"], ["happyphone", "and", "dullfilm"], ["story"]]
TAGS = [["O", "B-ART", "I-ART"], ["B-PER", "B-ART"], ["B-ART", "O", "O"], ["O"]]
NAMES = ("O", "B-ART", "I-ART", "B-PER", "I-PER")
TYPES = ("ART", "PER")


def prepared(path: Path, task: TokenClassification | None = None, **columns: list[Any]) -> Examples:
    table = Table({"words": WORDS, "ner": TAGS} | columns)
    return (task or TokenClassification()).prepare(table, path, {"tokens": "words", "tags": "ner"}, keep=())


def test_the_first_token_of_each_word_is_tagged(tiny_bert: Path) -> None:
    examples = prepared(tiny_bert)
    assert examples.label_names == NAMES
    tokenizer = load_tokenizer(tiny_bert)
    for row, (words, tags) in enumerate(zip(WORDS, TAGS, strict=True)):
        found = tokenizer(words, is_split_into_words=True)
        owners = found.word_ids()
        wanted = [
            NAMES.index(tags[word]) if word is not None and word != before else IGNORED
            for word, before in zip(owners, [None, *owners], strict=False)
        ]
        assert examples.inputs["input_ids"][row].tolist() == found["input_ids"]
        assert examples.inputs["targets"][row].tolist() == wanted
    assert (examples.inputs["targets"][2] != IGNORED).sum() == 3 < len(examples.inputs["targets"][2]) - 2
    spans = TokenClassification().spans(examples, 1, tiny_bert)
    assert [text.strip() for text, counts in spans if counts] == ["awful/B-PER", "film/B-ART"]


def test_the_loss_is_transformers_own(tiny_bert: Path) -> None:
    from transformers import AutoModelForTokenClassification

    task = TokenClassification()
    examples = prepared(tiny_bert)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kwargs = task.model_kwargs(examples)
        model = AutoModelForTokenClassification.from_pretrained(tiny_bert, **kwargs).double().eval()
    together = task.losses(model, task.collate(examples, range(4)))
    for row in range(4):
        theirs = model(**task.collate(examples, [row])).loss
        torch.testing.assert_close(together[row], theirs)
    measures = {
        name: value.detach().numpy() for name, value in task.measure(model, task.collate(examples, range(4))).items()
    }
    np.testing.assert_allclose(measures["loss"], together.detach().numpy())
    figures = task.figures(added([task.sums({n: v[part] for n, v in measures.items()}) for part in ([0, 1], [2, 3])]))
    assert figures == pytest.approx(task.summarise(measures))
    assert sums_of_tags(measures) == [4, 3, 1, 1, 0]  # O, B-ART, I-ART, B-PER, I-PER


def sums_of_tags(measures: dict[str, np.ndarray]) -> list[int]:
    return [int(count) for count in measures["tags"][..., 0].sum(axis=0)]


def drawn(seed: int, n: int) -> tuple[list[list[str]], list[list[str]]]:
    """Tags of IOB2, and predictions of any tags."""
    draw = np.random.default_rng(seed)
    labels, guesses = [], []
    for size in draw.integers(1, 9, n):
        row: list[str] = []
        for _ in range(size):
            before = row[-1] if row else "O"
            row.append(str(draw.choice(["O", "B-ART", "B-PER", *([f"I-{before[2:]}"] * 2 if before != "O" else [])])))
        labels.append(row)
        guesses.append([tag if draw.random() < 0.6 else str(draw.choice(NAMES)) for tag in row])
    return labels, guesses


@given(seed=st.integers(0, 10**6), n=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_entities_are_seqevals(seed: int, n: int) -> None:
    from seqeval.metrics import classification_report, f1_score, precision_score, recall_score

    labels, guesses = drawn(seed, n)
    rows = np.repeat(np.arange(n), [len(row) for row in labels])
    flat = [np.asarray([NAMES.index(tag) for row in some for tag in row]) for some in (labels, guesses)]
    tags = np.zeros((n, len(NAMES), 2))
    np.add.at(tags, (rows, flat[0], 0), 1)
    measures = {"loss": np.zeros(n), "tags": tags, "entities": count_entities(*flat, rows, NAMES, n)}
    task = TokenClassification()
    found = task.summarise(measures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["f1"] == pytest.approx(f1_score(labels, guesses))
        assert found["precision"] == pytest.approx(precision_score(labels, guesses))
        assert found["recall"] == pytest.approx(recall_score(labels, guesses))
        if any(tag != "O" for some in (labels, guesses) for row in some for tag in row):
            assert found["macro_f1"] == pytest.approx(f1_score(labels, guesses, average="macro"))
            report = classification_report(labels, guesses, output_dict=True, zero_division=0)
            each = {name: report[name]["f1-score"] if name in report else 0.0 for name in TYPES}
            found = task.by_class(task.sums(measures), NAMES)
            assert {name: row["f1"] for name, row in found.items()} == pytest.approx(each)


def test_long_texts_are_cut_and_it_is_said(tiny_bert: Path) -> None:
    examples = prepared(tiny_bert, TokenClassification(max_length=4))
    assert examples.lengths.max() == 4
    assert "2 of 4 examples" in examples.notes[0]


@pytest.mark.parametrize(
    ("code", "words", "tags"),
    [
        ("words-without-tags", ["a", "film"], ["O"]),
        ("not-a-list-of-words", [], ["O"]),
        ("not-a-list-of-words", ["a", 7], ["O", "O"]),
        ("not-a-list-of-words", ["a"], [None]),
        ("not-a-text", ["a", " "], ["O", "O"]),
        ("unknown-tag", ["a", "film"], ["O", "NOUN"]),
        ("unknown-tag", ["a", "film"], ["O", 1]),
        ("not-iob2", ["a", "film"], ["O", "I-ART"]),
        ("not-iob2", ["a", "film"], ["B-PER", "I-ART"]),
        ("not-iob2", ["a"], ["I-ART"]),
    ],
)
def test_a_bad_row_is_refused_by_its_number(code: str, words: Any, tags: Any, tiny_bert: Path) -> None:
    with raises(DataError, code, "row 1"):
        prepared(tiny_bert, words=[WORDS[0], words], ner=[TAGS[0], tags])


def test_words_and_tags_may_be_texts_and_tags_places(tiny_bert: Path) -> None:
    task = TokenClassification(labels=NAMES)
    lists = prepared(tiny_bert, task)
    texts = prepared(tiny_bert, task, words=[" ".join(row) for row in WORDS], ner=[" ".join(row) for row in TAGS])
    places = prepared(tiny_bert, task, ner=[[NAMES.index(tag) for tag in row] for row in TAGS])
    for other in (texts, places):
        for name in lists.inputs:
            assert [row.tolist() for row in lists.inputs[name]] == [row.tolist() for row in other.inputs[name]]


@pytest.mark.parametrize("labels", [["O"], ["O", "B-PER"], ["B-PER", "I-PER"], ["O", "B-", "I-"], ["O", "PER", "LOC"]])
def test_names_that_are_no_iob2_are_refused(labels: list[str]) -> None:
    with raises(ConfigError, "not-iob2", "task.labels"):
        load_task(OpenTable(name="token-classification", labels=labels))


def test_texts_without_any_entity_are_refused(tiny_bert: Path) -> None:
    with raises(DataError, "no-entities", "'ner'"):
        prepared(tiny_bert, words=[["film"]], ner=[["O"]])
