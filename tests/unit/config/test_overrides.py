"""Changes of a config say the same as texts of `--set`, as a tree of Python's, and as the tables of a file."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.api import resolve_config
from fedlora.config import RunConfig, load_config, parse_config
from fedlora.errors import ConfigError
from fedlora.evaluation.pretrained_adapter import find_adapter

PROFILES = [
    {"name": "a phone that is often away", "share": 0.5, "steps": 4, "examples_per_s": 10.0, "availability": 0.25},
    {"name": "a laptop that is always there", "share": 0.5, "steps": 8, "examples_per_s": 99.0},
]


@pytest.mark.parametrize(
    ("tree", "toml"),
    [
        ({"rounds": 3, "train": {"lr": 0.5}}, "rounds = 3\n[train]\nlr = 0.5"),
        ({"adapter": {"rank_pattern": {"0.query": 4}}}, "[adapter.rank_pattern]\n'0.query' = 4"),
        ({"task": {"class_weights": {"v. good": 2.0, "a=b": 1.0}}}, "[task.class_weights]\n'v. good'=2.0\n'a=b'=1.0"),
        ({"data": {"group_names": {"ward": {7: "St. Mary's"}}}}, '[data.group_names.ward]\n7 = "St. Mary\'s"'),
        ({"clients": {"profiles": PROFILES}}, None),
        ({"clients": {"ranks": (4, 8)}}, "[clients]\nranks = [4, 8]"),
        ({"selection": {}}, "[selection]"),
        ({"strategy": {"name": "keep", "keep": "head", "inner": {"name": "fedadam", "lr": 0.1}}}, None),
        ({"task": {"labels": ["a  b", "c\n\td"]}}, 'task = {labels = ["a  b", "c\\n\\td"]}'),
    ],
)
def test_a_tree_says_what_a_file_says(tree: dict[str, Any], toml: str | None) -> None:
    file = RunConfig.model_validate(tree) if toml is None else parse_config(toml)
    assert parse_config("", tree) == file
    assert parse_config(RunConfig().model_dump(mode="json"), tree) == file
    assert parse_config(file.to_toml()) == file


@pytest.mark.parametrize("key", ["'layer.0=a'", '"layer.0=a"', '"layer\\u002e0=a"'])
def test_a_part_of_a_key_in_quotes_may_have_any_letters(key: str) -> None:
    assert parse_config("", [f" adapter . rank_pattern . {key} = 4"]).adapter.rank_pattern == {"layer.0=a": 4}
    with raises(ConfigError, "not-key-value", "key=value"):
        parse_config("", ["adapter.rank_pattern.'layer.0=4"])


def test_tables_are_merged_and_values_are_replaced() -> None:
    text = "[adapter]\nrank = 2\nrank_pattern = {a = 1}\n[task]\nclass_weights = {no = 2.0}\nmax_length = 9"
    config = parse_config(text, {"adapter": {"rank_pattern": {"b": 3}}, "task": {"class_weights": {"yes": 1.0}}})
    assert (config.adapter.rank, config.adapter.rank_pattern) == (2, {"b": 3})
    assert config.task.fields == {"class_weights": {"yes": 1.0}, "max_length": 9}
    assert parse_config(text, {"adapter": {"rank_pattern": {}}}).adapter.rank_pattern == {}
    assert parse_config(text, {"adapter": {}, "task": {}}) == parse_config(text)


def test_none_is_the_default_where_a_key_may_be_none_and_refused_elsewhere() -> None:
    text = "[train]\nepochs = 2\n[privacy]\nnoise_multiplier=1.0\ndelta=1e-4\nmax_grad_norm=1\npublic_examples=9"
    config = parse_config(text, {"train": {"epochs": None, "steps": 3}, "privacy": None})
    assert (config.train.epochs, config.train.steps, config.privacy) == (None, 3, None)
    assert parse_config(config.model_dump(), {"train": {"steps": None}}).train.steps is None
    for tree, named in (({"rounds": None}, "rounds"), ({"train": None}, "'train'")):
        with pytest.raises(ConfigError, match=named):
            parse_config(text, tree)


@pytest.mark.parametrize("inner", ["'fedadam'", "{name='fedadam', lr=0.1}"])
def test_another_name_removes_the_fields_of_a_rule_within_a_rule_too(inner: str) -> None:
    text = f"[strategy]\nname = 'keep'\ninner = {inner}"
    named = parse_config(text, {"strategy": {"inner": {"beta_1": 0.5}}}).strategy.fields["inner"]
    assert named["name"] == "fedadam"
    assert named == parse_config(text, ["strategy.inner.beta_1=0.5"]).strategy.fields["inner"]
    for other in ({"strategy": {"inner": {"name": "fedavgm"}}}, ["strategy.inner.name=fedavgm"]):
        assert parse_config(text, other).strategy.fields == {"inner": {"name": "fedavgm"}}
    assert parse_config(text, {"strategy": {"inner": "fedavgm"}}).strategy.fields == {"inner": "fedavgm"}


def test_another_partition_has_as_many_clients_where_it_is_told_their_number() -> None:
    text = "[partition]\nname = 'dirichlet'\nclients = 12\nalpha = 0.3"
    for name, fields in (("iid", {"clients": 12}), ("classes", {"clients": 12}), ("natural", {})):
        assert parse_config(text, [f"partition.name={name}"]).partition.fields == fields
        assert parse_config(text, {"partition": {"name": name}}).partition.fields == fields
    assert parse_config(text, {"partition": {"clients": 3, "name": "iid"}}).partition.fields == {"clients": 3}
    # Code of somebody's own is not loaded to know its fields.
    assert parse_config(text, ["partition.name=not_there:Mine"]).partition.fields == {}


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_numbers_of_numpy_and_torch_are_numbers(number: Any) -> None:
    tree = {"rounds": number, "task": {"max_length": number}, "clients": {"ranks": np.array([4, 8])}}
    found = parse_config("", tree)
    assert found == parse_config("rounds=3\ntask.max_length=3\nclients.ranks=[4, 8]")
    assert parse_config(found.to_toml()) == found


def test_other_objects_are_text_or_refused_by_key_and_kind(tmp_path: Path) -> None:
    kind = enum.StrEnum("kind", {"SGD": "sgd"})
    tree = {"train": {"optimizer": kind.SGD, "lr": np.float64(0.1)}, "data": {"source": tmp_path / "x.csv"}}
    found = parse_config("", tree)
    assert (found.train.optimizer, found.train.lr, found.data.source) == ("sgd", 0.1, str(tmp_path / "x.csv"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"adapter": {"targets": {"query", "value"}}}, "adapter.targets is a set"),
        ({"train": {"lr": 1j}}, "train.lr is a complex"),
        ({"train": {"loop": parse_config}}, 'train.loop is a function: name it, as "my_module:name"'),
        ({"strategy": {"name": Path}}, 'strategy.name is a type: name it, as "my_module:name"'),
        ({"task": {"labels": [b"no", b"yes"]}}, "task.labels is a bytes"),
        ({"task": {"class_weights": {True: 1.0}}}, "True"),
        ({"train": {None: 1.0}}, "train has None as a key"),
        ({"data": {"options": {"na_values": [None]}}}, "data.options.na_values has None in a list"),
        ({"task": {"labels": ["a", None]}}, "task.labels has None in a list"),
        ({"adapter": {"options": {"init_lora_weights": None}}}, "adapter.options.init_lora_weights cannot be None"),
    ]
    for tree, named in wrong:
        with raises(ConfigError, "bad-value", named):
            parse_config("", tree)
    with raises(ConfigError, "not-utf8", "data.text"):
        parse_config("", {"data": {"text": "\udcff"}})


@pytest.mark.parametrize("config", ["quickstart", RunConfig()])
def test_who_wrote_python_is_not_told_of_the_command_line(config: str | RunConfig) -> None:
    half = {"privacy": {"noise_multiplier": 1.0}}
    for changes in (half, {"train": {"lr": -1}}, {"rounds": {"a": 1}}, {"train": 3}, {"train.lr": 1}, {"privacy": {}}):
        with pytest.raises(ConfigError) as refused:
            resolve_config(config, changes)
        assert "--set" not in str(refused.value)
        assert "quickstart" not in str(refused.value)  # nor is the file to blame


def test_paths_of_a_tree_and_of_a_whole_table_are_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("configs", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.csv").write_text("text,label\n")
    path = tmp_path / "configs" / "run.toml"
    path.write_text("[data]\nsource = 'd.csv'")
    monkeypatch.chdir(tmp_path / "here")
    for given in ({"data": {"test": "d.csv"}}, {"data": {"test": Path("d.csv")}}, ["data.test=d.csv"]):
        data = load_config(path, given).data
        assert (data.source, data.test) == (str(tmp_path / "configs" / "d.csv"), str(tmp_path / "here" / "d.csv"))
    assert load_config(path, ["data={source='d.csv'}"]).data.source == str(tmp_path / "here" / "d.csv")


def test_a_tree_is_left_as_it_was() -> None:
    tree: dict[str, Any] = {"task": {"class_weights": {"a": 1.0}}, "adapter": {"targets": ["query"]}}
    base = RunConfig().model_dump(mode="json")
    before = (repr(tree), repr(base))
    parse_config(base, tree)
    assert (repr(tree), repr(base)) == before


def test_what_an_adapter_says_of_its_task_is_taken_as_it_is(tmp_path: Path) -> None:
    facts = {"base_model_name_or_path": "all-MiniLM-L6-v2", "revision": "abc", "peft_type": "LORA"}
    task = {"name": "text-classification", "class_weights": {"v. bad": 2.0}, "max_length": 9}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    (tmp_path / "fedlora.json").write_text(json.dumps({"task": task, "class_names": ["v. bad", "good"]}))
    found = find_adapter(tmp_path, {"data": {"text": "review"}}).config
    assert found.task.model_dump() == task | {"labels": ["v. bad", "good"]}
    assert (found.model.name, found.model.revision, found.data.text) == ("all-MiniLM-L6-v2", "abc", "review")
    assert find_adapter(tmp_path, ["task.max_length=5"]).config.task.fields["max_length"] == 5
    assert find_adapter(tmp_path, ["task.name=causal-lm"]).config.task.fields == {}


@pytest.mark.parametrize(("tree", "key"), [({1: 2}, "'1'"), ({"train": {1: 2}}, "'train.1'")])
def test_a_key_that_is_a_number_is_an_unknown_key(tree: dict[Any, Any], key: str) -> None:
    with raises(ConfigError, "unknown-key", f"unknown key {key}"):
        parse_config("", tree)


def test_a_profiles_key_may_be_none_as_a_tables() -> None:
    config = parse_config("", {"clients": {"profiles": [PROFILES[0] | {"rank": None}]}})
    assert config.clients.profiles[0].rank is None
    assert parse_config(config.to_toml()) == config


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        (["data={text='review'}"], "source ('none')"),
        (["data.source="], "source ('none')"),
        (["model={name='all-MiniLM-L6-v2'}"], "quantize ('nf4'), revision ('abc')"),
        (["model={name='all-MiniLM-L6-v2', quantize='nf4'}"], "revision ('abc')"),
        (["model={quantize='nf4', revision='abc'}"], "name ('all-MiniLM-L6-v2')"),
    ],
)
def test_what_is_known_of_an_adapter_is_kept_or_named(tmp_path: Path, changes: list[str], known: str) -> None:
    facts = {"base_model_name_or_path": "all-MiniLM-L6-v2", "revision": "abc", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    task = {"name": "text-classification", "labels": ["bad", "good"]}
    (tmp_path / "fedlora.json").write_text(json.dumps({"task": task, "quantize": "nf4"}))
    with raises(ConfigError, "known-key-left-out", f"is given without {known}"):
        find_adapter(tmp_path, changes)
    single = find_adapter(tmp_path, ["data.text=review", "model.dtype=float32", "model.revision="]).config
    assert (single.data.source, single.data.text) == ("none", "review")
    assert (single.model.quantize, single.model.revision, single.model.dtype) == ("nf4", None, "float32")
    whole = ["data={source='x.csv'}", "model={name='m', quantize='int8', revision='r'}"]
    found = find_adapter(tmp_path, whole).config
    assert (found.data.source, found.model.name, found.model.revision) == ("x.csv", "m", "r")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with raises(ConfigError, "adapter-without-base", "set model.name"):
        find_adapter(tmp_path, ["model={dtype='float32'}"])


def test_a_whole_table_of_a_text_names_its_entry() -> None:
    with raises(ConfigError, "table-without-name", "--set task=", "task.max_length="):
        parse_config("task.name = 'token-classification'", ["task={max_length=5}"])
    config = parse_config("task.name = 'token-classification'", {"task": {"max_length": 5}})
    assert config.task.name == "token-classification", "a table of Python is merged"
