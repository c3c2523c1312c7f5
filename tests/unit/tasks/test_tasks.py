from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.config import OpenTable
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.tasks import Examples, Table, Task, load_task
from fedlora.tasks._classification import class_ids, class_names
from fedlora.tasks._text import Tokens, load_tokenizer
from fedlora.tasks.text_classification import TextClassification

COLUMNS = {"text": "text", "label": "label"}
TEXTS = ["the film is great", "awful", "a very dull and boring story but it was so", "happy phone"]


def prepare(path: Path, task: Task | None = None, **columns: Any) -> Examples:
    table = Table({"text": TEXTS, "label": ["pos", "neg", "neg", "pos"], "domain": list("aabb")} | columns)
    return (task or TextClassification()).prepare(table, path, COLUMNS, keep=["domain"])


def test_tasks_are_built_from_their_tables() -> None:
    assert load_task(OpenTable(name="text-classification", max_length=32)) == TextClassification(max_length=32)
    with raises(ConfigError, "unknown-name", "'text-clasification'", "'text-classification'"):
        load_task(OpenTable(name="text-clasification"))
    with raises(ConfigError, "unknown-key", "'max_lenght'", "'max_length'"):
        load_task(OpenTable(name="text-classification", max_lenght=32))
    with raises(ConfigError, "bad-value", "max_length", "not 0"):
        load_task(OpenTable(name="text-classification", max_length=0))


def test_tokens_are_the_tokenisers_own(tiny_bert: Path) -> None:
    examples = prepare(tiny_bert)
    tokenizer = load_tokenizer(str(tiny_bert))
    for row, text in zip(examples.inputs["input_ids"], TEXTS, strict=True):
        assert row.dtype == np.int32
        assert row.tolist() == tokenizer(text)["input_ids"]
    assert examples.lengths.tolist() == [len(row) for row in examples.inputs["input_ids"]]
    assert examples.columns["domain"].tolist() == list("aabb")
    assert load_tokenizer(str(tiny_bert)) is tokenizer


def test_long_texts_are_cut_with_their_last_special_token_kept(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_bert))
    examples = prepare(tiny_bert, TextClassification(max_length=5))
    assert examples.lengths.max() == 5
    assert examples.inputs["input_ids"][2][-1] == tokenizer.sep_token_id


def test_a_batch_is_padded_to_its_longest_text(tiny_bert: Path) -> None:
    examples = prepare(tiny_bert)
    batch = TextClassification().collate(examples, np.array([3, 1]))
    assert batch["input_ids"].shape == (2, int(examples.lengths[[3, 1]].max()))
    assert batch["attention_mask"].sum(dim=1).tolist() == examples.lengths[[3, 1]].tolist()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == load_tokenizer(str(tiny_bert)).pad_token_id).all()
    assert batch["labels"].tolist() == [1, 0]
    assert all(values.dtype == torch.int64 for values in batch.values())


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [3], [1], [], [2, 2, 0], [-1, 0]])
def test_a_batch_holds_each_text_and_marks_it(chosen: list[int]) -> None:
    rows = [[5, 6, 7], [], [8], [9, 10]]
    ids, mask = Tokens.join(rows, pad_id=4).pad(np.array(chosen, dtype=np.int64))
    width = max((len(rows[k]) for k in chosen), default=0)
    assert ids.tolist() == [rows[k] + [4] * (width - len(rows[k])) for k in chosen]
    assert mask.tolist() == [[1] * len(rows[k]) + [0] * (width - len(rows[k])) for k in chosen]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_texts_loss_does_not_depend_on_its_batch(tiny_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    task = TextClassification()
    examples = prepare(tiny_bert)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **task.model_kwargs(examples)).double().eval()
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert any(name in dict(model.named_children()) for name in task.head)
    together = task.losses(model, task.collate(examples, range(4)))
    alone = torch.cat([task.losses(model, task.collate(examples, [row])) for row in range(4)])
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone)
    measures = task.measure(model, task.collate(examples, range(4)))
    torch.testing.assert_close(measures["loss"], together)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_classs_weight_multiplies_the_loss_of_its_examples_in_training_alone(
    tiny_bert: Path, smoothing: float
) -> None:
    from transformers import AutoModelForSequenceClassification

    plain = TextClassification(label_smoothing=smoothing)
    weighed = TextClassification(class_weights={"pos": 3.0}, label_smoothing=smoothing)
    examples = prepare(tiny_bert, weighed)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **plain.model_kwargs(examples)).eval()
    batch = plain.collate(examples, range(4))
    wanted = plain.losses(model, batch) * torch.tensor([3.0, 1.0, 1.0, 3.0])
    torch.testing.assert_close(weighed.losses(model, batch), wanted)
    for name, measured in plain.measure(model, batch).items():
        assert torch.equal(weighed.measure(model, batch)[name], measured)


def test_a_weight_that_cannot_be_meant_is_refused(tiny_bert: Path) -> None:
    with raises(ConfigError, "label-not-a-class", "task.class_weights", "'positiv'", "did you mean 'pos'"):
        prepare(tiny_bert, TextClassification(class_weights={"positiv": 2.0}))
    for bad in (0, -1, math.inf, math.nan):
        with raises(ConfigError, "bad-value", "class_weights"):
            load_task(OpenTable(name="text-classification", class_weights={"pos": bad}))
    for none in ("balanced", [1.0, 2.0]):
        for name in ("text-classification", "image-classification"):
            with raises(ConfigError, "not-a-table", repr(none), "class_weights = { fraud = 10.0 }", "scikit-learn"):
                load_task(OpenTable(name=name, class_weights=none))


class Fixed(torch.nn.Module):
    """A model that knows its answers."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_the_means_of_what_was_measured(dtype: torch.dtype) -> None:
    task = TextClassification()
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]], dtype=dtype)
    batch = {"input_ids": torch.zeros(3, 1), "attention_mask": torch.ones(3, 1), "labels": torch.tensor([0, 1, 1])}
    measures = {name: values.numpy() for name, values in task.measure(Fixed(logits), batch).items()}
    assert (measures["predicted"] == measures["label"]).tolist() == [True, True, False]
    right = np.log1p(np.exp(-2.0))
    np.testing.assert_allclose(measures["loss"], [right, right, right + 2], rtol=1e-6)
    figures = task.summarise(measures)
    assert figures[task.metric] == pytest.approx(2 / 3)
    assert figures["loss"] == pytest.approx(right + 2 / 3)


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([3, 10, 2], ("2", "3", "10"), [1, 2, 0]),
        (["10", "9"], ("9", "10"), [1, 0]),
        ([True, False], ("0", "1"), [1, 0]),
        ([1.0, 0.0], ("0", "1"), [1, 0]),
        (list(np.array([1, 0])), ("0", "1"), [1, 0]),
    ],
)
def test_classes_are_numbered_in_sorted_order(values: list[Any], names: tuple[str, ...], ids: list[int]) -> None:
    assert class_names(values, "label") == names
    assert class_ids(values, "label", names).tolist() == ids


def test_known_names_fix_the_numbers_whatever_a_file_lacks() -> None:
    names = class_names(["pos"], "label", ("neg", "pos"))
    assert class_ids(["pos"], "label", names).tolist() == [1]
    assert class_ids([1, 0], "label", names).tolist() == [1, 0]
    with raises(DataError, "label-not-a-class", "row 1, column 'label'", "'poss'", "'pos'"):
        class_ids(["pos", "poss"], "label", names)
    with raises(DataError, "label-not-a-class", "'2'"):
        class_ids([2], "label", names)
    with raises(ConfigError, "class-named-twice", "neg"):
        class_names(["pos"], "label", ("neg", "neg"))
    with raises(DataError, "too-few-classes", "'label'", 1):
        class_names(["pos", "pos"], "label")


@pytest.mark.parametrize("bad", [None, "", "  ", float("nan"), 0.5, ["a"]])
def test_a_bad_label_is_named_with_row_and_column(bad: Any) -> None:
    with raises(DataError, "not-a-label", "row 2, column 'label'"):
        class_names(["a", "b", bad], "label")


@pytest.mark.parametrize("bad", [None, "", " \n", 7])
def test_a_bad_text_is_named_with_row_and_column(bad: Any, tiny_bert: Path) -> None:
    with raises(DataError, "not-a-text", "row 1, column 'text'"):
        prepare(tiny_bert, text=[TEXTS[0], bad, *TEXTS[2:]])


def test_a_folder_without_a_tokeniser_is_said_in_one_line(tmp_path: Path) -> None:
    with raises(ModelError, "tokenizer-not-loadable", tmp_path):
        prepare(tmp_path)


def test_tokens_are_a_sequence_and_can_be_taken() -> None:
    rows = [[5, 6, 7], [8], [], [9, 10]]
    tokens = Tokens.join(rows, pad_id=0)
    assert [row.tolist() for row in tokens] == rows
    assert [row.tolist() for row in tokens.take([3, 0])] == [rows[3], rows[0]]
    assert [row.tolist() for row in tokens[1:3]] == rows[1:3]
    assert tokens[-1].tolist() == rows[-1]
    with pytest.raises(IndexError):
        tokens[4]
    ids, mask = tokens.pad([1, 3])
    assert ids.tolist() == [[8, 0], [9, 10]]
    assert mask.tolist() == [[1, 0], [1, 1]]


def test_examples_are_taken_with_all_that_belongs_to_them(tiny_bert: Path) -> None:
    examples = prepare(tiny_bert)
    some = examples.take([2, 0])
    assert len(some) == 2
    assert [row.tolist() for row in some.inputs["input_ids"]] == [
        examples.inputs["input_ids"][2].tolist(),
        examples.inputs["input_ids"][0].tolist(),
    ]
    assert some.labels is not None
    assert some.labels.tolist() == [0, 1]
    assert some.lengths.tolist() == examples.lengths[[2, 0]].tolist()
    assert some.columns["domain"].tolist() == ["b", "a"]
    assert some.label_names == examples.label_names


def test_noise_changes_about_the_asked_share_of_words_of_the_asked_rows_only() -> None:
    generator = np.random.default_rng(0)
    rows = [[1, *generator.integers(100, 10_000, size=48), 2] for _ in range(200)]
    tokens = Tokens.join(rows, pad_id=0)
    before = tokens.flat.copy()
    noisy = tokens.corrupt(np.arange(100), 0.3, seed=1)
    assert (tokens.flat == before).all()
    changed = (noisy.flat != before).reshape(200, 50)
    assert not changed[100:].any()
    assert not changed[:, [0, -1]].any()
    share = changed[:100, 1:-1].mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4800)
    assert (tokens.corrupt(np.arange(100), 0.3, seed=1).flat == noisy.flat).all()
    assert (tokens.corrupt(np.arange(100), 0.0, seed=1).flat == before).all()
    assert set(noisy.flat) <= set(before)


def measured(label: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    certain = np.eye(int(max(label.max(), predicted.max())) + 1)[predicted.astype(int)]
    return {"loss": label, "label": label, "predicted": predicted, "probabilities": certain}


def test_the_largest_class_and_the_balance_stand_beside_the_accuracy() -> None:
    task = load_task(OpenTable(name="text-classification"))
    label = np.array([0.0] * 96 + [1.0] * 4)
    lazy = task.summarise(measured(label, np.zeros(100)))
    assert (lazy["accuracy"], lazy["balanced_accuracy"], lazy["majority_share"]) == pytest.approx((0.96, 0.5, 0.96))
    even = np.arange(9.0) % 3
    right = np.array([1, 1, 0, 1, 0, 0, 1, 0, 0.0])
    found = task.summarise(measured(even, np.where(right, even, (even + 1) % 3)))
    assert found["balanced_accuracy"] == pytest.approx(found["accuracy"])  # of classes of one size
