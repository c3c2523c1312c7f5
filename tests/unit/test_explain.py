from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.errors import raises

from fedlora.config import RunConfig, load_config, parse_config
from fedlora.errors import ConfigError
from fedlora.explain import REQUIRED, args_docs, entries, find_keys, json_schema, keys

jsonschema = pytest.importorskip("jsonschema", reason="the schema is checked with jsonschema: pip install jsonschema")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

CLIENT_PRIVACY = "[privacy]\nunit = 'client'\nepsilon = 1\ndelta = 1e-5\nclip_norm = 1.0"


def errors(tree: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(tree)]


def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in tree.items():
        # An empty table is one of the user's own keys.
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key}
    return found


# ---------------------------------------------------------------------------------------------- keys


def test_every_key_of_the_models_is_explained_and_no_other() -> None:
    known = {key.path for key in keys() if not key.entry or key.table == "privacy"}
    claim = {"epsilon": 1, "delta": 1e-5}
    units = [{"max_grad_norm": 1, "public_examples": 9}, {"unit": "client", "clip_norm": 1}]
    dumped: set[str] = set()
    for unit in units:
        server = {"weighting": "uniform", "aggregation_error": False}
        tables = {"server": server, "tracking": {"name": "wandb"}, "selection": {}}
        config = RunConfig.model_validate({"privacy": claim | unit, **tables})
        dumped |= leaves(config.model_dump(mode="json")) - {"partition.clients"}
    assert {path for path in known if not path.startswith("clients.profiles.")} == dumped


def test_every_key_has_words() -> None:
    assert [key.path for key in keys() if not key.doc] == []


def test_a_key_is_explained_by_the_string_under_it() -> None:
    (key,) = find_keys("train.clip_norm")
    assert key.kind == "number, > 0"
    assert key.default == "none"
    assert key.doc == "Largest L2 norm of a step's gradient over all trained parameters."
    assert find_keys("privacy.delta")[0].default == REQUIRED
    assert [(key.entry, key.chooser) for key in find_keys("privacy.clip_norm")] == [("client", "privacy.unit")]
    assert find_keys("model.dtype")[0].kind == "one of: auto, float32, bfloat16, float16, float64"


def test_defaults_are_those_of_the_models() -> None:
    for key in keys():
        if not key.entry and key.default not in (REQUIRED, "none") and "profiles" not in key.path:
            table, _, name = key.path.rpartition(".")
            if table in ("privacy", "selection", "tracking"):  # none by default
                continue
            given = getattr(RunConfig(), table) if table else RunConfig()
            value = getattr(given, name)
            assert tomllib.loads(f"x = {key.default}")["x"] == (list(value) if isinstance(value, tuple) else value), key


def test_a_key_of_an_open_table_is_found_for_each_entry_that_has_it() -> None:
    found = {key.entry: key for key in find_keys("partition.alpha")}
    assert set(found) == {"dirichlet", "quantity"}
    assert found["dirichlet"].default == "0.5"
    clients = {key.entry: key.default for key in find_keys("partition.clients")}
    assert (clients["iid"], clients["dirichlet"]) == ("8", REQUIRED)  # 8 is that of a config without [partition]
    assert find_keys("strategy.name")[0].kind.startswith("one of: " + ", ".join(entries("strategy")))


def test_a_table_stands_for_its_keys_and_a_wrong_name_for_the_nearest() -> None:
    assert {key.table for key in find_keys("train")} == {"train"}
    with raises(ConfigError, "unknown-key", "'train.lrr'", "'train.lr'"):
        find_keys("train.lrr")


def test_the_words_of_rules_come_from_args_inherited_ones_too() -> None:
    @dataclass
    class Base:
        """Something.

        Args:
            one, two: of both
                and more.
            three: old.
        """

        one: int = 0
        two: int = 0
        three: int = 0

    @dataclass
    class Derived(Base):
        """Something else.

        Args:
            three: a new one.
        """

        four: int = 0

    assert args_docs(Base) == {"one": "Of both and more.", "two": "Of both and more.", "three": "Old."}
    assert args_docs(Derived) == {**args_docs(Base), "three": "A new one."}


def test_words_on_several_lines_become_one() -> None:
    (key,) = find_keys("privacy.epsilon")
    assert key.doc == (
        "Epsilon that all rounds together may spend; the noise is calibrated to it. Give either this or "
        "`noise_multiplier`."
    )


# ---------------------------------------------------------------------------------------------- schema


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_fits_the_models_and_the_schema(path: Path) -> None:
    load_config(path)
    assert errors(tomllib.loads(path.read_text())) == []


@pytest.mark.parametrize(
    ("toml", "valid"),
    [
        ("", True),
        ("[strategy]\nname = 'fair'\nsolver = 'closed'", True),
        ("[strategy]\nname = 'my_module:MyRule'\nanything = 1", True),
        ("[partition]\nclients = 3", True),
        ("[partition]\nname = 'dirichlet'\nclients = 3\nalpha = 0.1", True),
        ("[adapter]\ntargets = 'query'", True),
        ("[adapter]\nrank_pattern = { query = 4 }", True),
        ("[[clients.profiles]]\nname = 'phone'\nshare = 2", True),
        ("round = 3", False),
        ("rounds = 0", False),
        ("[train]\nlrr = 0.1", False),
        ("[train]\nlr = 'much'", False),
        ("[strategy]\nname = 'fedavgg'", False),
        ("[strategy]\nname = 'fair'\nalpha = 1", False),
        ("[partition]\nname = 'dirichlet'", False),
        ("[partition]\nname = 'dirichlet'\nclients = 3\nalpha = -1", False),
        ("[[clients.profiles]]\nname = 'phone'\nspeed = 2", False),
        ("[model]\ndtype = 'int8'", False),
        (
            f"server = {{ aggregation_error = false }}\n{CLIENT_PRIVACY}",
            True,
        ),
        ("[privacy]\nunit = 'client'\nepsilon = 1\ndelta = 1e-5\nmax_grad_norm = 1.0", False),
        ("[privacy]\nunit = 'nobody'\nepsilon = 1\ndelta = 1e-5\nclip_norm = 1.0", False),
    ],
)
def test_the_schema_and_the_models_agree(toml: str, valid: bool) -> None:
    from fedlora.aggregators import load_aggregator
    from fedlora.partition import load_partitioner

    tree = tomllib.loads(toml)
    assert (errors(tree) == []) == valid
    try:
        config = parse_config(toml)
        load_partitioner(config.partition.name, config.partition.fields)
        if ":" not in config.strategy.name:
            load_aggregator(config.strategy.name, config.strategy.fields)
    except (ConfigError, ValidationError):
        assert not valid
    else:
        assert valid


def test_the_schema_says_what_the_keys_mean() -> None:
    schema = json_schema()
    assert schema["$defs"]["TrainConfig"]["properties"]["clip_norm"]["description"].startswith("Largest L2 norm")
    fair = next(branch for branch in schema["properties"]["strategy"]["anyOf"] if branch["title"] == "fair")
    assert fair["properties"]["solver"]["description"]
