"""Runs in memory, and the rows that keep their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.errors import raises
from support.federations import simulate
from support.tiny_federations import MakeConfig

from fedlora.errors import DataError, PrivacyError
from fedlora.sweep.in_memory import ResultRows, run_in_memory


def test_a_run_in_memory_learns_what_a_run_with_a_folder_learns(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config("rounds=2")
    wanted = simulate(config).records
    before = set(tmp_path.rglob("*"))
    lines = run_in_memory(config)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["accuracy"] for line in lines] == [line["accuracy"] for line in wanted]
    losses = [[line["train_loss"] for line in run[1:]] for run in (lines, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "keys",
    [
        ("train.keep_optimizer=true",),
        pytest.param(("train.personal=0.1", "evaluation.on=both"), marks=pytest.mark.slow),
        ("wire.up=topk", "wire.fraction=0.2"),
        pytest.param(("strategy.name=fedper", "evaluation.on=both"), marks=pytest.mark.slow),
        pytest.param(("strategy.name=fedsa", "evaluation.on=both"), marks=pytest.mark.slow),
    ],
    ids=lambda keys: keys[0],
)
def test_its_clients_keep_what_they_keep_in_a_run_with_a_folder(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    """And when it is over nothing of it is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    config = tiny_config("rounds=2", "train.steps=1", "model.dropout=0.0", *keys)
    lines, wanted = run_in_memory(config), simulate(config).records
    for line, same in zip(lines, wanted, strict=True):
        assert (line["accuracy"], line.get("answered")) == (same["accuracy"], same.get("answered"))
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-5)
        if "federated" in same:
            assert line["federated"]["figures"] == pytest.approx(same["federated"]["figures"], rel=1e-5)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_round_that_fails_ends_it_with_the_reason(tiny_config: MakeConfig) -> None:
    said: list[str] = []
    config = tiny_config("rounds=3", "train.lr=1e30", "train.optimizer=sgd")
    assert len(run_in_memory(config, say=said.append)) < 4
    assert "not finite" in said[0]


def test_a_private_run_keeps_ledgers_and_so_a_folder(tiny_config: MakeConfig) -> None:
    private = "privacy={unit='client', noise_multiplier=1.0, clip_norm=1.0, delta=0.01}"
    more = ("server.aggregation_error=false", "server.weighting=uniform")
    with raises(PrivacyError, "no-ledger-kept"):
        run_in_memory(tiny_config(private, *more))


def test_a_run_whose_rows_are_there_is_not_repeated(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def rows_of(rows: ResultRows, *run: Any) -> list[dict[str, Any]]:
        def make() -> list[dict[str, Any]]:
            asked.append(run)
            return [{"round": k, "accuracy": 0.1 * k if k else None} for k in range(3)]

        return rows.of(run, make)

    first = ResultRows(tmp_path / "results.csv", ["attack", "lr"], say=str)
    wanted = [rows_of(first, "NaN", 0.0056), rows_of(first, "none", 0.01)]
    again = ResultRows(tmp_path / "results.csv", ["attack", "lr"], say=str)
    found = [rows_of(again, "NaN", 0.0056), rows_of(again, "none", 0.01)]
    assert asked == [("NaN", 0.0056), ("none", 0.01)]
    for one, other in zip(wanted, found, strict=True):
        assert [row["accuracy"] for row in other][1:] == pytest.approx([row["accuracy"] for row in one][1:])
        assert other[0]["accuracy"] != other[0]["accuracy"], "what is missing stays so, whatever a key is called"
    rows_of(again, "none", 0.0056)
    assert len(asked) == 3


KEYS: tuple[Any, ...] = (None, "None", "NaN", "nan", "01", 1, "1.0", "1e3", 1e-7, 1 / 3, 0.333333, 2**63 + 1, 0.1 + 0.2)
"""Values that a file of comma-separated text does not keep by itself."""


def test_any_key_is_known_again_however_often_the_file_is_read(tmp_path: Path) -> None:
    asked: list[Any] = []
    for _ in range(3):
        rows = ResultRows(tmp_path / "results.csv", ["key", "other"], say=str)
        for key in KEYS:
            (row,) = rows.of((key, 1), lambda key=key: asked.append(key) or [{"accuracy": 0.5}])  # type: ignore[misc]
            assert (row["key"], row["accuracy"]) == (key, 0.5)
            assert type(row["key"]) is type(key)
        assert len(rows.rows) == len(KEYS)
    assert asked == list(KEYS)


def test_a_file_that_another_wrote_keeps_its_keys(tmp_path: Path) -> None:
    text = "rule,lr,accuracy\nFedAvg,0.0056,0.5\n01,1e-05,\n"
    (tmp_path / "results.csv").write_text(text)
    rows = ResultRows(tmp_path / "results.csv", ["rule", "lr"], say=str)
    assert [row["lr"] for row in rows.rows] == [0.0056, 1e-5]
    rows.of(("new", 100.0), lambda: [{"accuracy": 0.25}])
    assert (tmp_path / "results.csv").read_text() == text + "new,100,0.25\n"


@pytest.mark.parametrize("beside", ["FedAvg", 0.5, 3, None, "nan", float("nan")])
def test_none_is_known_again_beside_keys_of_one_kind(tmp_path: Path, beside: Any) -> None:
    asked: list[Any] = []
    for _ in range(2):
        rows = ResultRows(tmp_path / "results.csv", ["key"], say=str)
        for key, accuracy in ((None, 0.25), (beside, 0.5 if beside is not None else 0.25)):
            (row,) = rows.of((key,), lambda key=key, a=accuracy: asked.append(key) or [{"accuracy": a}])  # type: ignore[misc]
            assert row["accuracy"] == accuracy
    assert asked == [None] if beside is None else [None, beside]
    again = ResultRows(tmp_path / "results.csv", ["key"], say=str)
    assert again.rows[0]["key"] is None


def test_a_key_that_came_later_is_not_answered_with_the_row_of_none(tmp_path: Path) -> None:
    first = ResultRows(tmp_path / "results.csv", ["key"], say=str)
    for key in (None, 0.5):
        first.of((key,), lambda: [{"accuracy": 0.25}])
    for later in ("nan", float("nan")):
        (row,) = ResultRows(first.path, ["key"], say=str).of((later,), lambda: [{"accuracy": 0.75}])
        assert row["accuracy"] == 0.75


def test_a_file_that_lacks_a_column_of_a_key_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("rule,accuracy\nfedavg,0.5\n")
    with raises(DataError, "no-such-column", "'lr'"):
        ResultRows(tmp_path / "results.csv", ["rule", "lr"], say=str)
