"""Whatever a config, a data file or a model's folder holds, a command ends as a run or as one line.

A seeded generator damages one of the three, or all, and the real command runs in this process on a tiny model. The law:
the exit status is 0, 1 or 2; a failure says one line on standard error, without a traceback, and foresees it (no
"unexpected"); and no folder of a failed start is left in the way of the next.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from support.command_line import invoke

from fedlora.config import flat_keys, parse_config

FEW = 24
MANY = 400

COLUMNS = ("text", "label", "domain", "document")
WORDS = ["", " ", "none", "text", "label", "iid", "nodes", "é\u202e", "a" * 300, "../x", "/proc/x", "1", "true", "*"]
NUMBERS = [0, 1, -1, 2, 7, 1e-30, 1e30, 0.5, 1.0, -0.5, 10**30, float("inf"), float("nan")]
NAMING = [
    *(f"data.{key}" for key in ("text", "label", "domain", "group", "test")),
    "adapter.targets",
    "adapter.method",
]
OPEN: dict[str, list[dict[str, Any]]] = {
    "partition": [
        {"name": "iid", "clients": 2},
        {"name": "domain", "clients": 2},
        {"name": "natural", "column": "document"},
        {"name": "dirichlet", "clients": 2, "alpha": 0.1},
        {"name": "shards", "clients": 300},
        {"name": "classes", "clients": 3, "classes_per_client": 9},
        {"name": "quantity", "clients": 2, "exponent": 1.0, "min_size": 5},
        {"name": "nodes", "clients": 2},
        {"name": "absent.module:Thing"},
        {"name": "fedlora.errors:nearest"},
    ],
    "strategy": [
        {"name": "fedavg"},
        {"name": "ffa"},
        {"name": "flora"},
        {"name": "fair", "solver": "cosine", "steps": 2},
        {"name": "absent.module:Thing"},
        {"name": ":"},
        {"name": "fedlora.errors:nearest"},
    ],
    "task": [
        {"name": "text-classification", "max_length": 8},
        {"name": "text-classification", "max_length": 500},
        {"name": "text-classification", "labels": ["a", "b"]},
        {"name": "causal-lm", "format": "text"},
        {"name": "causal-lm", "format": "messages", "train_on": "answers"},
        {"name": "image-classification"},
    ],
}


def any_value(draw: random.Random) -> Any:
    """A value of any of TOML's types."""
    return draw.choice(
        [
            lambda: draw.choice(WORDS),
            lambda: draw.choice(NUMBERS),
            lambda: draw.random() < 0.5,
            lambda: [draw.choice(WORDS), draw.choice(NUMBERS)][: draw.randrange(3)],
            lambda: {draw.choice(WORDS) or "a": draw.choice(NUMBERS)},
        ]
    )()


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *tables, last = path.split(".")
    for table in tables:
        here = tree.get(table)
        tree[table] = tree = here if isinstance(here, dict) else {}
    tree[last] = value


def broken_config(draw: random.Random, tree: dict[str, Any]) -> None:
    """Some keys get other values: near the right ones, of wrong types, or of names that do not exist."""
    keys = [key for key in flat_keys(parse_config("")) if key not in ("output", "rounds", "runtime.device")]
    for _ in range(draw.randrange(1, 4)):
        kind = draw.randrange(3)
        if kind == 0:
            put(tree, draw.choice(keys), any_value(draw))
        elif kind == 1:
            table = draw.choice(sorted(OPEN))
            tree[table] = dict(draw.choice(OPEN[table]))
            if draw.random() < 0.3:
                tree[table][draw.choice(["clients", "column", "alpha", "steps", "labels", "zzz"])] = any_value(draw)
        else:
            key = draw.choice(
                [
                    "data.text",
                    "data.label",
                    "data.domain",
                    "data.group",
                    "adapter.targets",
                    "adapter.method",
                    "data.test",
                ]
            )
            put(
                tree,
                key,
                draw.choice([*COLUMNS, "dora", "ia3", "all-linear", "query", "absent.csv", draw.choice(WORDS)]),
            )


def flip(draw: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut off or doubled."""
    out = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0 and out:
        for _ in range(draw.randrange(1, 6)):
            out[draw.randrange(len(out))] = draw.randrange(256)
    elif kind == 1:
        del out[draw.randrange(len(out) + 1) :]
    elif kind == 2 and out:
        at = draw.randrange(len(out))
        out[at:at] = out[at : at + draw.randrange(1, 80)]
    else:
        out = bytearray(
            draw.choice([b"", b"\x00", b"<html>", b"version https://git-lfs", b"[]", b"{}", b"\xff\xfe\x00"])
        )
    return bytes(out)


CELLS: list[Any] = ["", None, "good film", 1, 1.0, True, "1", "01", [], {}, "\ud83d", float("nan"), "x" * 5000, " yes "]


def broken_data(draw: random.Random, folder: Path, tree: dict[str, Any]) -> None:
    """Another data file, damaged in its bytes or its cells."""
    source = Path(tree["data"]["source"])
    if draw.random() < 0.5:
        path = folder / draw.choice(["d.csv", "d.tsv", "d.jsonl", "d.json", "d.parquet"])
        path.write_bytes(flip(draw, source.read_bytes()))
    else:
        rows = [
            {"text": f"good film {k}", "label": "ab"[k % 2], "domain": "cd"[k % 2], "document": k} for k in range(30)
        ]
        for _ in range(draw.randrange(1, 4)):
            rows[draw.randrange(len(rows))][draw.choice(COLUMNS)] = draw.choice(CELLS)
        if draw.random() < 0.3:
            del rows[draw.randrange(len(rows))][draw.choice(COLUMNS)]
        path = folder / draw.choice(["d.jsonl", "d.json"])
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    tree["data"]["source"] = str(path)


def broken_model(draw: random.Random, folder: Path, tree: dict[str, Any]) -> None:
    """A copy of the model's folder with one file damaged, gone, or with another value in it."""
    base = folder / "base"
    shutil.copytree(tree["model"]["name"], base)
    path = draw.choice(sorted(base.iterdir()))
    kind = draw.randrange(3)
    if kind == 0:
        path.unlink()
    elif kind == 1 or path.suffix != ".json":
        path.write_bytes(flip(draw, path.read_bytes()))
    else:
        inner = json.loads(path.read_text())
        inner[draw.choice(sorted(inner))] = any_value(draw)
        path.write_text(json.dumps(inner))
    tree["model"]["name"] = str(base)


def attempt(seed: int, folder: Path, model: Path, data: Path) -> tuple[int, str]:
    """One damaged start; the exit status and what it said on standard error.

    Raises:
        AssertionError: the law does not hold.
    """
    draw = random.Random(seed)
    tree: dict[str, Any] = {
        "output": str(folder / "runs"),
        "rounds": 1,
        "model": {"name": str(model)},
        "adapter": {"rank": 2, "targets": ["query"]},
        "data": {"source": str(data), "domain": "domain", "limit": 40},
        "partition": {"name": "iid", "clients": 2},
        "train": {"steps": 1, "batch_size": 4},
        "runtime": {"threads": 1, "kernels": "off", "processes": 1, "attention": "eager"},
    }
    harms: list[Callable[[], None]] = [
        lambda: broken_config(draw, tree),
        lambda: broken_data(draw, folder, tree),
        lambda: broken_model(draw, folder, tree),
    ]
    for harm in draw.sample(harms, draw.choice([1, 1, 1, 2, 3])):
        harm()
    config = folder / "fuzz.toml"
    config.write_text(tomli_w.dumps(tree))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries; they go to standard error, and are no failure
        result = invoke("run", config, "-q")
    said = f"seed {seed}: status {result.exit_code}\n{result.stderr}\n{config.read_text()}"
    assert result.exception is None or isinstance(result.exception, SystemExit), said
    assert result.exit_code in (0, 1, 2), said
    assert "Traceback" not in result.stderr, said
    if result.exit_code:
        lines = result.stderr.splitlines()
        assert len(lines) == 1, said
        assert lines[0].startswith("error: "), said
        assert len(lines[0]) < 1500, said
        assert "unexpected" not in lines[0], said
        for left in (folder / "runs").glob("*/config.toml"):
            # What is left has trained a round, whatever became of it.
            rounds = [json.loads(line)["round"] for line in (left.parent / "metrics.jsonl").read_text().splitlines()]
            assert max(rounds) > 0, said
    return result.exit_code, result.stderr


def fuzz(number: int, folder: Path, model: Path, data: Path) -> list[int]:
    statuses = []
    for seed in range(number):
        place = folder / str(seed)
        place.mkdir()
        statuses.append(attempt(seed, place, model, data)[0])
        shutil.rmtree(place)
    return statuses


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_no_start_ends_in_a_traceback(tmp_path: Path, tiny_bert: Path, tiny_csv: Path) -> None:
    statuses = fuzz(FEW, tmp_path, tiny_bert, tiny_csv)
    assert statuses.count(1) > FEW / 2  # most are damaged beyond use, and all say so


@pytest.mark.nightly
def test_no_start_of_many_does(tmp_path: Path, tiny_bert: Path, tiny_csv: Path) -> None:
    statuses = fuzz(MANY, tmp_path, tiny_bert, tiny_csv)
    assert statuses.count(0) > MANY / 20
    assert statuses.count(1) > MANY / 2
