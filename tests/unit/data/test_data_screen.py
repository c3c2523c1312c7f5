"""A private node's own file: a row that cannot be used costs itself, and no other row is read otherwise for it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.errors import raises

from fedlora.assets import Checkpoint
from fedlora.config import ModelConfig, OpenTable
from fedlora.data._screen import invented, require_header, screened
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import Examples, Task, load_task
from fedlora.tasks._chat_formats import FORMATS

LABELS = ("negative", "positive")
ROWS = [
    {"text": "warm and bright", "label": "positive"},
    {"text": "a text\nof two lines, with a comma", "label": "negative"},
    {"text": 'it said "great"', "label": "positive"},
    {"text": "dull", "label": "negative"},
    {"text": "caf\u00e9", "label": "positive"},
]


def csv_of(rows: list[dict[str, str]], delimiter: str = ",") -> list[bytes]:
    """The lines of the header and of each row."""
    out = []
    for cells in [("text", "label"), *((row["text"], row["label"]) for row in rows)]:
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter).writerow(cells)
        out.append(file.getvalue().encode())
    return out


def jsonl_of(rows: list[dict[str, str]]) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]


BAD_CSV = [
    b"patient,HIV\r\n",
    b"caf\xe9,positive\r\n",
    b"one field\r\n",
    b"three,of,them\r\n",
    b",positive\r\n",
    b"   ,positive\r\n",
    b"warm,\r\n",
    b'"never closed,positive\r\n',
    b'"closed" twice",positive\r\n',
    b"\x00\xff\r\n",
]
BAD_JSON = [
    b'{"text": "warm"}\n',
    b'{"text": "warm", "label": null}\n',
    b'{"text": 7, "label": "positive"}\n',
    b'{"text": "warm", "label": ["positive"]}\n',
    b'{"text": "\\ud800", "label": "positive"}\n',
    b'{"text": "caf\xe9", "label": "positive"}\n',
    b"not json\n",
    b"[1, 2]\n",
    b"7\n",
    b'{"text": "warm", "label": NaN}\n',
    b"[" * 100_000 + b"\n",
]


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(OpenTable(name="text-classification", labels=list(LABELS)))  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def read(task: Task, tiny_bert: Path) -> Callable[[Path], Examples]:
    model = Checkpoint.of(ModelConfig(name=str(tiny_bert)))
    return lambda path: screened(path, task, model, {"text": "text", "label": "label"})


def same(one: Examples, other: Examples) -> bool:
    return (
        np.array_equal(one.labels, other.labels)  # type: ignore[arg-type]
        and np.array_equal(one.lengths, other.lengths)
        and all(np.array_equal(a, b) for a, b in zip(one.inputs["input_ids"], other.inputs["input_ids"], strict=True))
    )


@pytest.mark.parametrize("bad", BAD_CSV)
@pytest.mark.parametrize("place", [0, 1, 3, len(ROWS)])
def test_a_record_that_cannot_be_used_costs_itself_alone(
    read: Callable[[Path], Examples], tmp_path: Path, bad: bytes, place: int
) -> None:
    header, *rows = csv_of(ROWS)
    file = tmp_path / "mine.csv"
    file.write_bytes(header + b"".join(rows))
    wanted = read(file)
    assert wanted.labels is not None
    assert wanted.labels.tolist() == [1, 0, 1, 0, 1]
    file.write_bytes(header + b"".join([*rows[:place], bad, *rows[place:]]))
    assert same(read(file), wanted)


@pytest.mark.parametrize("bad", BAD_JSON)
def test_a_line_that_cannot_be_used_costs_itself_alone(
    read: Callable[[Path], Examples], tmp_path: Path, bad: bytes
) -> None:
    rows = jsonl_of(ROWS)
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"".join(rows))
    wanted = read(file)
    assert len(wanted) == len(ROWS)
    for place in (0, 2, len(rows)):
        file.write_bytes(b"".join([*rows[:place], bad, *rows[place:]]))
        assert same(read(file), wanted)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_is_read_as_without_privacy(
    read: Callable[[Path], Examples], task: Task, tiny_bert: Path, tmp_path: Path, kind: str
) -> None:
    import pandas

    from fedlora.config import parse_config
    from fedlora.data import load_local

    file = tmp_path / f"mine.{kind}"
    if kind == "parquet":
        pandas.DataFrame(ROWS).to_parquet(file)
    elif kind == "json":
        file.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        file.write_bytes(b"".join(jsonl_of(ROWS)))
    else:
        file.write_bytes(b"".join(csv_of(ROWS, {"csv": ",", "tsv": "\t"}[kind])))
    config = parse_config("", [f"model.name='{tiny_bert}'", f"task.labels={list(LABELS)}"], name="x")
    assert same(read(file), load_local(config, file))


def test_what_a_label_means_does_not_depend_on_other_rows(read: Callable[[Path], Examples], tmp_path: Path) -> None:
    """A column is read by all of its labels where nothing is secret: as names, or as places."""
    file = tmp_path / "mine.jsonl"
    labels: list[Any] = ["positive", 0, "1", "negative ", True, 1.0, 2, -1, "Positive", 0.5, float("inf"), [1], None]
    file.write_text("".join(json.dumps({"text": "warm", "label": label}) + "\n" for label in labels))
    found = read(file).labels
    assert found is not None
    assert found.tolist() == [1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("data", [b"", b"[", b"[]", b"{}", b'{"text": ["a"], "label": []}', b"\xff\xfe"])
def test_a_file_without_rows_is_a_node_without_examples(
    read: Callable[[Path], Examples], tmp_path: Path, data: bytes
) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(data)
    found = read(file)
    assert len(found) == 0
    assert found.label_names == LABELS


def test_what_holds_for_all_rows_is_refused(read: Callable[[Path], Examples], tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(b"txt,label\r\nwarm,positive\r\n")
    with raises(DataError, "no-such-column", file, "'text'"):
        read(file)
    (tmp_path / "mine.doc").write_bytes(b"")
    with raises(DataError, "unknown-file-type", "mine.doc"):
        require_header(tmp_path / "mine.doc", ["text"])


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("text-classification", {"labels": list(LABELS)}),
        ("multi-label-classification", {"labels": list(LABELS)}),
        ("text-regression", {"label_range": [1, 5]}),
        ("token-classification", {"labels": ["O", "B-PER", "I-PER"]}),
        *(("causal-lm", {"format": name}) for name in FORMATS),
    ],
)
def test_examples_can_be_made_up_for_every_task_on_texts(tiny_bert: Path, name: str, roles: dict[str, Any]) -> None:
    task = load_task(OpenTable(name=name, **roles))
    found = invented(task, Checkpoint.of(ModelConfig(name=str(tiny_bert))), {role: role for role in task.roles})
    assert len(found) == 4
    assert len(found.take([])) == 0
    assert name != "text-classification" or len(set(found.lengths.tolist())) > 1


def test_a_task_of_somebody_elses_is_refused_and_not_guessed_at(tiny_bert: Path, task: Task) -> None:
    with raises(ConfigError, "role-without-example", "'sound'"):
        invented(task, Checkpoint.of(ModelConfig(name=str(tiny_bert))), {"sound": "sound", "label": "label"})
