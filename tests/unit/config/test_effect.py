"""No key is given in vain, and `--set` means the same in every order."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from support.errors import raises

from fedlora.config import load_config, overruled, parse_config
from fedlora.errors import ConfigError
from fedlora.registry import build
from fedlora.tasks.causal_lm import CausalLM

PROFILES = 'clients.profiles=[{name="a",steps=3,batch_size=4},{name="b",epochs=1.0,batch_size=2}]'
EXAMPLE = "privacy={noise_multiplier=1.0, delta=1e-4, max_grad_norm=1.0, public_examples=100}"
CLIENT = "privacy={unit='client', noise_multiplier=1.0, delta=1e-4, clip_norm=1.0}"
CLIENT_SERVER = ("server.aggregation_error=false", "server.max_norm_ratio=off")

IN_VAIN = [
    ("train.momentum=0.9", ("train.optimizer=adamw",), ("train.optimizer=sgd",)),
    ("train.warmup_steps=4", ("train.steps=4",), ("train.steps=5",)),
    ("train.warmup_steps=3", ('clients.profiles=[{name="a",steps=3}]',), ('clients.profiles=[{name="a",steps=4}]',)),
    ("train.warmup_rounds=3", ("rounds=3",), ("rounds=4",)),
    ("train.lr_end=1e-5", ("train.schedule=constant",), ("train.schedule=cosine",)),
    ("train.steps=9", (PROFILES,), ()),
    ("train.epochs=2", (PROFILES,), ()),
    ("train.batch_size=5", (PROFILES,), ()),
    ("data.train_split=all", ("data.source=nodes",), ()),
    ("data.subset=en", ("data.source=nodes",), ()),
    ("data.text=review", ("data.columns.text=body",), ()),
    ("data.label=stars", ("data.columns.label=score",), ()),
    ("server.fraction=0.5", ("server.clients_per_round=3",), ()),
    ("server.max_examples=100", (EXAMPLE, "server.weighting=uniform"), ()),
    ("server.max_weight_ratio=5", ("data.source=vader",), ("data.source=nodes",)),
    ("server.max_weight_ratio=5", ("data.source=nodes", "server.weighting=uniform"), ("data.source=nodes",)),
    ("server.max_weight_ratio=5", ("data.source=nodes", "strategy.name=afl"), ("data.source=nodes",)),
    ("server.weighting=uniform", ("strategy={name='krum',inner='afl'}",), ("data.source=nodes", "strategy.name=afl")),
    ("privacy.quantile=0.9", (CLIENT, *CLIENT_SERVER), (CLIENT, *CLIENT_SERVER, "privacy.adaptive_clipping=true")),
    ("privacy.clip_lr=0.9", (CLIENT, *CLIENT_SERVER), (CLIENT, *CLIENT_SERVER, "privacy.adaptive_clipping=true")),
    ("tracking.project=mine", ("tracking.name=tensorboard",), ("tracking.name=wandb",)),
    ("evaluation.sample=0.5", ("evaluation.on=clients",), ("evaluation.on=both",)),
    ("runtime.backend=ray", ("runtime.processes=1",), ("runtime.processes=2",)),
]


@pytest.mark.parametrize(("key", "others", "cured"), IN_VAIN)
def test_a_key_without_effect_is_refused_by_its_name(key: str, others: tuple[str, ...], cured: tuple[str, ...]) -> None:
    parse_config("", others)
    parse_config("", [key, *cured])
    with raises(ConfigError, "key-without-effect", key.partition("=")[0]):
        parse_config("", [key, *others])


def test_what_a_test_file_overrules_is_said() -> None:
    config = parse_config("", ["data.test=b.csv", "data.group=document", "data.test_fraction=0.3"])
    assert [line.split()[0] for line in overruled(config)] == ["data.test_fraction", "data.group"]
    assert not list(overruled(parse_config("", ["data.group=document", "data.test_fraction=0.3"])))


def test_a_runs_own_config_can_be_read_again() -> None:
    """It writes every key, also those that mean nothing in it."""
    for overrides in ([], ["train.optimizer=sgd"], ["data.test=b.csv"], ["server.clients_per_round=3"]):
        config = parse_config("", overrides)
        assert parse_config(config.to_toml()) == config


def test_fields_of_registries_are_refused_too() -> None:
    from fedlora.aggregators.fair import Fair

    for fields in ({"train_on": "all"}, {"system": "be kind"}):
        with raises(ConfigError, "key-without-effect", f"task.{next(iter(fields))}"):
            build(CausalLM, {"format": "text", **fields}, "task")
        build(CausalLM, {"format": "messages", **fields}, "task")
    with raises(ConfigError, "key-without-effect", "steps and lr", "'cosine'"):
        Fair(lr=0.5)
    Fair(solver="cosine", lr=0.5)


@pytest.mark.parametrize(
    ("overrides", "code", "named"),
    [
        (["train.epochs=1", "train.warmup_steps=23"], "warmup-too-long", "train.warmup_steps"),
        (["adapter.export_rank=4"], "export-rank-not-used", "adapter.export_rank"),
        (["model.revision=main"], "key-without-effect", "model.revision"),
        (["task={name='causal-lm', format='text'}", "data.label=domain"], "key-without-effect", "data.label"),
    ],
)
def test_what_only_data_and_model_tell_is_refused_before_a_run_is_made(
    overrides: list[str], code: str, named: str, tiny_toml: Path, tmp_path: Path
) -> None:
    from fedlora.simulation.run import refuse_early
    from fedlora.training import open_workspace

    config = load_config(tiny_toml, ["train.steps=", "train.batch_size=2", *overrides])
    with raises(ConfigError, code, named):
        refuse_early(config, open_workspace(config))


# ------------------------------------------------------------------------------------------------ --set


def test_the_order_of_overrides_changes_nothing() -> None:
    text = "[partition]\nname = 'dirichlet'\nclients = 4\nalpha = 0.3\n"
    overrides = ["partition.name=natural", "partition.column=site", "partition.min_size=2"]
    for order in permutations(overrides):
        assert parse_config(text, order).partition.model_dump() == {"name": "natural", "column": "site", "min_size": 2}
    for order in permutations(["partition={name='iid', clients=3}", "partition.clients=5", "train={steps=2}"]):
        assert parse_config(text, order).partition.fields == {"clients": 5}


def test_a_key_without_a_value_is_removed() -> None:
    text = (
        "name='a'\n[train]\nepochs=2\n[privacy]\nnoise_multiplier=1.0\ndelta=1e-4\nmax_grad_norm=1\npublic_examples=9"
    )
    config = parse_config(text, ["train.epochs=", "train.steps=3", "privacy=", "data.domain="])
    assert (config.train.epochs, config.train.steps, config.privacy, config.data.domain) == (None, 3, None, None)
    assert parse_config("[privacy]", ["privacy="]).privacy is None
    assert parse_config(text, ['data.domain=""', "server.weighting=uniform"]).data.domain == ""
    with raises(ConfigError, "unknown-key", "'train.epoch'", "'epochs'"):
        parse_config(text, ["train.epoch="])
    with raises(ConfigError, "key-not-set", "partition", "'alpha'"):
        parse_config(text, ["partition.alpha="])


@pytest.mark.parametrize("word", ["2025", "2025-01-01", "1e3", "true", "007", "nan", "1_000"])
def test_what_reads_as_a_number_is_text_where_text_is_wanted(word: str) -> None:
    config = parse_config(
        "", [f"name={word}", f"data.source={word}", f"data.columns.image={word}", f"data.domain={word}"]
    )
    assert (config.name, config.data.source, config.data.domain) == (word, word, word)
    assert parse_config("", ["seed=2025", "runtime.processes=2", "runtime.cohort=auto"]).seed == 2025


def test_one_key_with_two_values_is_refused(tiny_toml: Path) -> None:
    with raises(ConfigError, "key-given-twice", "train.lr", "'1'", "'2'"):
        load_config(tiny_toml, ["train.lr=1", "rounds=2", "train.lr=2"])
    assert load_config(tiny_toml, ["rounds=2", "rounds=2"]).rounds == 2


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("=1", "not-key-value"),
        ("train..lr=1", "not-key-value"),
        ("train.=1", "not-key-value"),
        (".=", "not-key-value"),
        ("rounds", "not-key-value"),
        ("name=\udcff", "not-utf8"),
        ('output="a\\u0000b"', "nul-character"),
    ],
)
def test_an_override_that_is_none_is_one_line(override: str, code: str) -> None:
    with raises(ConfigError, code):
        parse_config("", [override])
