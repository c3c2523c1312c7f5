"""Rules, partitioners, tasks and data sources of one's own are found, checked and used in one way."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pytest
from support.errors import raises
from support.pages import ROOT, blocks

import fedlora
from fedlora.aggregators import rules
from fedlora.data.source import sources
from fedlora.errors import ConfigError
from fedlora.partition import partitioners
from fedlora.registry import Registry, build
from fedlora.tasks import tasks

REGISTRIES = {
    "fedlora.aggregators": (rules, "fedlora.aggregators", "Aggregator"),
    "fedlora.partition": (partitioners, "fedlora.partition", "Partitioner"),
    "fedlora.tasks": (tasks, "fedlora.tasks", "Task"),
    "fedlora.sources": (sources, "fedlora.data", "DataSource"),
}
OWN = """
from dataclasses import dataclass
from {module} import {base}

class NotFrozen({base}):
    pass


@dataclass(frozen=True)
class Mine({base}):
    strength: int = 1

Mine.__abstractmethods__ = frozenset()
"""
SOURCE = """
from dataclasses import dataclass
from fedlora.data import DataSource, Table

@dataclass(frozen=True)
class Odd(DataSource):
    kind: str

    def read(self, split):
        return {"rows": [1, 2], "none": Table({"text": []}), "ragged": Table({"text": ["a"], "label": []})}[self.kind]
"""


@pytest.fixture(params=sorted(REGISTRIES))
def group(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of entry points, in a folder whose module "of_ones_own" has classes for it."""
    _registry, module, base = REGISTRIES[request.param]
    (tmp_path / "of_ones_own.py").write_text(OWN.format(module=module, base=base))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield request.param
    sys.modules.pop("of_ones_own", None)


def test_a_class_in_a_file_of_this_folder(group: str) -> None:
    registry: Registry[Any] = REGISTRIES[group][0]
    assert "of_ones_own:Mine" in registry
    assert registry.build("of_ones_own:Mine", {"strength": 3}).strength == 3
    for name, code, named in (
        ("of_ones_own:Theirs", "class-not-found", "'Theirs'"),
        ("of_ones_own:Min", "class-not-found", "'Mine'"),
        ("of_nobody:Mine", "class-not-found", "'of_nobody'"),
        ("of_ones_own:", "bad-class-path", registry.kind),
        (".of_ones_own:Mine", "bad-class-path", registry.kind),
        ("of_ones_own:dataclass", "wrong-base-class", REGISTRIES[group][2]),
        ("of_ones_own:NotFrozen", "not-a-dataclass", "NotFrozen"),
    ):
        with raises(ConfigError, code, named):
            registry.get(name)
    with raises(ConfigError, "unknown-key", "'strength'"):
        registry.build("of_ones_own:Mine", {"strenth": 3})


def test_an_installed_package_offers_its_classes(group: str, tmp_path: Path) -> None:
    registry: Registry[Any] = REGISTRIES[group][0]
    with raises(ConfigError, "unknown-name", "'theirs'"):
        registry.get("theirs")
    (info := tmp_path / "theirs-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\ntheirs = of_ones_own:Mine\nodd = of_ones_own:NotFrozen\n")
    sys.path.insert(0, str(tmp_path))
    assert registry.get("theirs").__module__ == "of_ones_own"
    assert "theirs" in list(registry)
    with raises(ConfigError, "unknown-name", "'theirs'"):
        registry.get("theirz")
    with raises(ConfigError, "not-a-dataclass", "'odd'"):
        registry.get("odd")


@pytest.mark.slow
def test_parts_of_ones_own_make_a_run(
    tiny_bert: Path, tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own files."""
    for block in blocks(ROOT / "docs" / "own-data.md", "python", "toml"):
        if block.file in ("my_parts.py", "parts.toml"):
            (tmp_path / block.file).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        few = {"model": {"name": str(tiny_bert)}, "train": {"steps": 2}, "quiet": True}
        run = fedlora.run("parts.toml", **few)
        facts = json.loads((run.path / "partition.json").read_text())
        assert facts["sizes"] == [18] * 4  # 72 of 80, the others being the test's
        assert 0 < run.metrics["confidence"].iloc[-1] < 1
        assert run.metrics["confidence"].tolist() == fedlora.load_run(run.path).metrics["confidence"].tolist()
        degrees = [7 * k % 41 for k in range(80)]
        rows = [{"text": f"It is {d} degrees.", "label": "hot" if d > 20 else "cold"} for d in degrees]
        pandas.DataFrame(rows).to_csv("rows.csv", index=False)
        data = {"source": str(tmp_path / "rows.csv"), "options": {}}
        with raises(fedlora.FedloraError, "key-without-effect", "data.options"):
            fedlora.run("parts.toml", **few, name="file", data={"source": data["source"]})
        config = fedlora.load_config("parts.toml", ["data.options=", f"data.source={data['source']}"])
        same = fedlora.run(config, **few, name="file")
        adapters = [(one.adapter / "adapter_model.safetensors").read_bytes() for one in (run, same)]
        assert adapters[0] == adapters[1]
        with raises(fedlora.FedloraError, "provenance-mismatch", "the training data"):
            fedlora.run("parts.toml", **few, resume=True, rounds=2, data={"options": {"number": 81}})
    finally:
        sys.modules.pop("my_parts", None)


@pytest.mark.parametrize(
    ("kind", "code"), [("rows", "not-a-table"), ("none", "empty-split"), ("ragged", "not-a-table")]
)
def test_a_source_that_reads_no_table_is_refused(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: str
) -> None:
    (tmp_path / "odd_source.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with raises(fedlora.FedloraError, code, "Odd.read('train')"):
        fedlora.partition_table(tiny_toml, data={"source": "odd_source:Odd", "options": {"kind": kind}})
    with raises(fedlora.FedloraError, "key-without-effect", "data.subset"):
        options = {"source": "odd_source:Odd", "options": {"kind": kind}, "subset": "en"}
        fedlora.partition_table(tiny_toml, data=options)


def test_none_is_refused_where_a_file_that_leaves_it_out_would_say_another_value() -> None:
    @dataclass(frozen=True)
    class Entry:
        often: float | None = 0.5
        never: float | None = None
        made: tuple[int, ...] = field(default_factory=tuple)

    @dataclass(frozen=True)
    class Needy:
        clients: int

    assert build(Entry, {"never": None}, "entry") == Entry()
    for name in ("often", "made"):
        with raises(ConfigError, "bad-value", f"entry: {name} cannot be None, which no config file can say: leave it"):
            build(Entry, {name: None}, "entry")
    with raises(ConfigError, "bad-value", "entry: clients cannot be None, which no config file can say: give it a"):
        build(Needy, {"clients": None}, "entry")


def test_true_and_false_are_no_numbers() -> None:
    @dataclass(frozen=True)
    class Entry:
        number: float = 0.5
        flag: bool = False
        either: float | bool = 1.0
        listed: tuple[int, ...] = ()
        named: dict[str, float] = field(default_factory=dict)
        anything: dict[str, Any] = field(default_factory=dict)

    fine = {"flag": True, "either": True, "anything": {"a": [True]}, "number": 1, "listed": [1], "named": {"a": 1}}
    assert build(Entry, fine, "entry") == Entry(1.0, True, True, (1,), {"a": 1.0}, {"a": [True]})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"number": True}, "number cannot be true"),
        ({"listed": [1, False]}, "listed cannot be false"),
        ({"named": {"x": True}}, "named.x cannot be true"),
    ]
    for fields, named in wrong:
        with raises(ConfigError, "bad-value", f"entry: {named}"):
            build(Entry, fields, "entry")
    for registry, name, fields in ((rules, "fedadam", {"lr": True}), (partitioners, "iid", {"clients": True})):
        with raises(ConfigError, "bad-value", "cannot be true"):
            registry.build(name, fields)
