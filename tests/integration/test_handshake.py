"""A node that would train something else is refused, and the message says what differs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.errors import raises
from support.on_a_grid import grid_of, serve_on
from support.tiny_federations import MakeConfig

from fedlora.config import DataConfig, OpenTable, RunConfig
from fedlora.errors import ReplyError, RoundError
from fedlora.flower import client_app
from fedlora.flower.handshake import TABLES, question, require_same_config, require_same_ground
from fedlora.provenance import DATA, WORDS, Provenance
from fedlora.training import open_workspace


@pytest.mark.parametrize(
    ("override", "names"),
    [
        (("train.lr=0.02",), "[train] differ"),
        (("seed=1",), "seed differ"),
        (("wire.up=int8", "adapter.rank=2"), "[adapter], [wire] differ"),
        (("strategy.name=ffa",), "[strategy] differ"),
        (("train.schedule=cosine", "rounds=9"), "[train] differ"),
        (("model.dtype=bfloat16",), "[model] differ"),
    ],
)
def test_another_config_is_refused_by_the_names_of_its_tables(
    tiny_config: MakeConfig, override: tuple[str, ...], names: str
) -> None:
    asked = question(tiny_config(), Provenance())
    with raises(ReplyError, "other-config", names):
        require_same_config(asked, tiny_config(*override))


def test_a_schedule_goes_by_the_number_of_rounds(tiny_config: MakeConfig) -> None:
    asked = question(tiny_config("train.schedule=cosine"), Provenance())
    with raises(ReplyError, "other-config", "rounds differ"):
        require_same_config(asked, tiny_config("train.schedule=cosine", "rounds=9"))


@pytest.mark.parametrize(
    "override", ["output=elsewhere", "model.name=/another/folder", "runtime.threads=2", "rounds=9", "server.quorum=0.1"]
)
def test_what_is_a_nodes_own_or_the_servers_alone_is_not_compared(tiny_config: MakeConfig, override: str) -> None:
    require_same_config(question(tiny_config(), Provenance()), tiny_config(override, name="other"))


def test_every_table_that_decides_what_is_trained_is_compared() -> None:
    not_trained_by = {"name", "output", "rounds", "server", "runtime", "tracking"}
    of_the_node = {"data"}
    assert set(TABLES) == set(RunConfig.model_fields) - not_trained_by - of_the_node


def test_a_node_with_another_config_does_not_take_part(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, other = tiny_config(), tiny_config("train.steps=9")
    monkeypatch.setattr(client_app, "config_of", lambda context: other)
    with raises(RoundError, "no-node", "[train] differ"):
        serve_on(grid_of(config), config)


# ---------------------------------------------------------------------------------------------- what it stands on

EVERYTHING = Provenance(**{part: part for part in WORDS})


def own_data(tiny_config: MakeConfig) -> RunConfig:
    data = DataConfig(source="nodes", test="test.csv")
    partition = OpenTable(name="nodes", clients=4)
    return tiny_config().model_copy(update={"data": data, "partition": partition})


@pytest.mark.parametrize("part", sorted(set(WORDS) - {"base", "start"}))
def test_a_node_says_what_of_its_own_is_not_the_servers(tiny_config: MakeConfig, part: str) -> None:
    other = replace(EVERYTHING, **{part: "another"})
    config = tiny_config()
    require_same_ground(question(config, EVERYTHING), config, EVERYTHING)
    require_same_ground(question(config, other), config, replace(EVERYTHING, **{part: None}))  # it has no such thing
    with raises(ReplyError, "other-provenance", WORDS[part]):
        require_same_ground(question(config, EVERYTHING), config, other)


def test_where_a_run_began_is_the_servers_alone(tiny_config: MakeConfig) -> None:
    config, node = tiny_config("adapter.start=/a/folder"), tiny_config("adapter.start=/another")
    asked = question(config, EVERYTHING)
    assert "start" not in json.loads(str(asked.config_records["hello"]["provenance"]))
    require_same_config(asked, node)
    require_same_ground(asked, node, replace(EVERYTHING, start="another"))


@pytest.mark.parametrize("part", DATA)
def test_data_of_the_nodes_own_are_neither_said_nor_compared(tiny_config: MakeConfig, part: str) -> None:
    config, other = own_data(tiny_config), replace(EVERYTHING, **{part: "another"})
    asked = question(config, EVERYTHING)
    assert not set(DATA) & set(json.loads(str(asked.config_records["hello"]["provenance"])))
    require_same_ground(asked, config, other)


def test_no_hash_of_training_data_is_in_a_private_runs_hello(tiny_config: MakeConfig) -> None:
    private = (
        "server.weighting=uniform",
        "privacy.noise_multiplier=1.0",
        "privacy.delta=1e-5",
        "privacy.max_grad_norm=1.0",
        "privacy.public_examples=40",
    )
    workspace = open_workspace(tiny_config(*private))
    found, told = (
        workspace.provenance,
        json.dumps(question(workspace.config, workspace.pins).config_records["hello"]["provenance"]),
    )
    assert found.train_data
    assert found.test_data  # cut from the training source: which those are depends on all of it
    assert found.tokenizer
    assert found.train_data not in told
    assert found.test_data not in told
    assert found.tokenizer in told


def test_a_node_with_another_tokenizer_does_not_take_part(
    tiny_config: MakeConfig, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(tiny_bert, tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "bert")
    config, other = tiny_config(), tiny_config(f"model.name={tmp_path / 'bert'}")
    monkeypatch.setattr(client_app, "config_of", lambda context: other)
    with raises(RoundError, "no-node", "the tokenizer on this node is not the server's"):
        serve_on(grid_of(config), config)
