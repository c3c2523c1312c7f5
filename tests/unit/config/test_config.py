from __future__ import annotations

import math
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import raises

from fedlora.assets import ASSETS
from fedlora.config import RunConfig, load_config, parse_config
from fedlora.config._base import OPEN_TABLES
from fedlora.errors import ConfigError
from fedlora.foreign_names import _TABLE, our_word
from fedlora.registry import build
from fedlora.tasks import tasks

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_the_empty_config_is_the_default_one() -> None:
    assert parse_config("") == RunConfig()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_loads_and_opens_with_its_command(path: Path) -> None:
    first, config = path.read_text().splitlines()[0], load_config(path)
    found = re.fullmatch(rf"# (?:fedlora assets (.+) && )?fedlora run configs/{re.escape(path.name)}", first)
    assert found is not None
    needed = {name for name in (config.model.name, config.data.source) if name in ASSETS and not ASSETS[name].needed}
    assert set((found[1] or "").split()) == needed  # what `fedlora assets` alone does not fetch
    assert config.name == path.stem
    assert parse_config(config.to_toml()) == config


OVERRIDES = st.lists(
    st.sampled_from(
        [
            "rounds=3",
            "seed=12",
            "model.dtype=bfloat16",
            "adapter.targets=query",
            "adapter.targets=['q', 'v']",
            "adapter.rank_pattern.query=4",
            "adapter.modules_to_save=[]",
            "clients.ranks=[2, 4]",
            "train.steps=5",
            "train.clip_norm=1.5",
            "train.lr=1e-3",
            "server.fraction=0.5",
            "strategy.name=fair",
            "strategy.regularisation=0.5",
            "partition.name=dirichlet",
            "partition.alpha=0.1",
            "task.name=other",
            "data.source='a b.csv'",
            "runtime.threads=2",
        ]
    ),
    max_size=6,
)


@given(OVERRIDES)
def test_the_resolved_config_means_the_same(overrides: list[str]) -> None:
    config = parse_config("", overrides)
    again = parse_config(config.to_toml())
    assert again == config
    assert again.digest() == config.digest()
    assert again.to_toml() == config.to_toml()


def test_an_override_wins_over_the_file_and_the_last_over_the_first() -> None:
    config = parse_config("rounds = 1\n[train]\nlr = 1.0", ["rounds=2", "train.lr=0.5", "rounds=3"])
    assert (config.rounds, config.train.lr) == (3, 0.5)


def test_a_bare_word_is_a_string_and_toml_is_toml() -> None:
    config = parse_config("", ["name=one", "adapter.targets=['a','b']", "adapter.method=rslora", "data.source='x.csv'"])
    assert config.name == "one"
    assert config.adapter.targets == ("a", "b")
    assert config.adapter.method == "rslora"
    assert config.data.source == "x.csv"


def test_another_name_in_an_open_table_drops_the_other_ones_fields() -> None:
    text = "[strategy]\nname = 'fair'\nregularisation = 0.5"
    assert parse_config(text, ["strategy.name=ffa"]).strategy.fields == {}
    assert parse_config(text, ["strategy.name=fair"]).strategy.fields == {"regularisation": 0.5}
    assert parse_config(text, ["strategy.name=ffa", "strategy.x=1"]).strategy.fields == {"x": 1}


@pytest.mark.parametrize(
    ("override", "code", "named"),
    [
        ("runds=3", "unknown-key", ("'runds'", "'rounds'")),
        ("train.group_by_length=true", "unknown-key", ("'train.group_by_length'", "computed together", "remove it")),
        ("train.padding_free=true", "unknown-key", ("'train.padding_free'", "task.packing = true")),
        ("train.learning_rate=1e-3", "unknown-key", ("'train.learning_rate'", "train.lr here")),
        ("train.per_device_train_batch_size=4", "unknown-key", ("train.batch_size here",)),
        ("train.gradient_accumulation_steps=4", "unknown-key", ("train.micro_batch_size",)),
        ("train.bf16=true", "unknown-key", ("model.dtype = 'bfloat16'",)),
        ("adapter.r=4", "unknown-key", ("adapter.rank here",)),
        ("adapter.use_rslora=true", "unknown-key", ("adapter.method = 'rslora'",)),
        ("adapter.from=a", "unknown-key", ("'adapter.from'", "adapter.start here")),
        ("adapter.adapter_name_or_path=a", "unknown-key", ("adapter.start here",)),
        ("model.lora_model_dir=a", "unknown-key", ("adapter.start here",)),
        ("train.resume_from=a", "unknown-key", ("adapter.start", "--resume")),
        ("num_rounds=4", "unknown-key", ("rounds here",)),
        ("train.batchsize=3", "unknown-key", ("'train.batchsize'", "'batch_size'")),
        ("epochs=3", "unknown-key", ("'epochs'", "it is train.epochs")),
        ("train.rank=3", "unknown-key", ("'train.rank'", "it is adapter.rank")),
        ("train.rounds=3", "unknown-key", ("'train.rounds'", "it is rounds")),
        ("adapter.epsilon=3", "unknown-key", ("it is privacy.epsilon",)),
        ("adapter.rank=true", "bad-value", ("adapter.rank cannot be true: give it a value",)),
        ("train.lr=true", "bad-value", ("train.lr", "true")),
        ("clients.ranks=[4, true]", "bad-value", ("clients.ranks cannot be true",)),
        ("adapter.rank_pattern={x=true}", "bad-value", ("adapter.rank_pattern.x cannot be true",)),
        ("clients.profiles=[{name='a', steps=true}]", "bad-value", ("clients.profiles.steps cannot be true",)),
        ("rounds=0", "bad-value", ("rounds", "0")),
        ("rounds=two", "bad-value", ("rounds", "'two'")),
        ("train.lr=-1", "bad-value", ("train.lr", "-1")),
        ("train.lr=nan", "bad-value", ("train.lr", "nan")),
        ("server.fraction=1.5", "bad-value", ("server.fraction", "1.5")),
        ("model.dtype=int8", "bad-value", ("model.dtype", "'int8'")),
        ("clients.ranks=[0]", "bad-value", ("clients.ranks", "0")),
        ("rounds", "not-key-value", ("'rounds'", "key=value")),
        ("=3", "not-key-value", ("'=3'", "key=value")),
        ("rounds.x=3", "not-a-table", ("rounds.x=3", "'rounds'")),
        ("train=3", "not-a-table", ("'train'", "3", "set its keys")),
        ("strategy=ffa", "not-a-table", ("'strategy'", "set strategy.name = 'ffa'")),
        ("data=x.csv", "not-a-table", ("'data'", "set data.source = 'x.csv'")),
        ("privacy=3", "not-a-table", ("'privacy'", "3")),
        ("'train.lr'=3", "unknown-key", ("'train.lr'", "'lr' in the table 'train'")),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, code: str, named: tuple[str, ...]) -> None:
    with raises(ConfigError, code, *named):
        parse_config("rounds = 2", [override])


def test_steps_and_epochs_exclude_each_other() -> None:
    with raises(ConfigError, "steps-and-epochs", "train.steps", "train.epochs"):
        parse_config("", ["train.steps=1", "train.epochs=1"])


def test_a_config_cannot_be_changed() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 3.0  # type: ignore[misc]


def test_a_missing_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text("")
    with raises(ConfigError, "no-such-file", "quickstrt.toml'", "quickstart.toml'"):
        load_config(tmp_path / "quickstrt.toml")


def test_what_is_no_toml_is_said_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("rounds = \n")
    with raises(ConfigError, "not-toml", path, "line 1"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with raises(ConfigError, "not-utf8", path):
        load_config(path)
    with raises(ConfigError, "file-not-readable", tmp_path):
        load_config(tmp_path)


def test_the_files_name_is_the_runs_unless_it_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("")
    (tmp_path / "other.toml").write_text("name = 'said'")
    assert load_config(tmp_path / "mine.toml").name == "mine"
    assert load_config(tmp_path / "other.toml").name == "said"
    assert load_config(tmp_path / "mine.toml", ["name=set"]).name == "set"


def test_a_digest_sees_its_sections_and_no_others() -> None:
    one, other = parse_config("", ["train.lr=0.1"]), parse_config("", ["train.lr=0.2"])
    assert one.digest() != other.digest()
    assert one.digest("train") != other.digest("train")
    assert one.digest("model", "data") == other.digest("model", "data")
    assert math.isclose(other.train.lr, 0.2)


def test_a_shipped_config_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").name == "quickstart"
    with raises(ConfigError, "no-such-file", "'quickstart'"):
        load_config("quickstrat")
    (tmp_path / "quickstart").write_text('name = "mine"')  # what is there comes first
    assert load_config("quickstart").name == "mine"


def test_all_that_a_key_may_be_is_said() -> None:
    with raises(ConfigError, "bad-value", "runtime.processes", "'auto'", "greater than 0", "not 0"):
        parse_config("[runtime]\nprocesses = 0")


# ---------------------------------------------------------------------------------------------- paths


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a config in one folder, and data and a model in others."""
    for folder in ("configs/bert", "elsewhere/bert"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("configs/d.csv", "elsewhere/d.csv", "elsewhere/only.csv", "data.csv"):
        (tmp_path / file).write_text("text,label\n")
    text = "[model]\nname = 'bert'\n[data]\nsource = 'd.csv'\ntest = '../data.csv'"
    (tmp_path / "configs" / "run.toml").write_text(text)
    return tmp_path


def paths(config: RunConfig) -> tuple[str | None, ...]:
    return config.model.name, config.data.source, config.data.test


@pytest.mark.parametrize("here", [".", "configs", "elsewhere"])
def test_paths_in_a_config_are_relative_to_its_folder(
    project: Path, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / here)
    config = load_config(os.path.relpath(project / "configs" / "run.toml"))
    assert paths(config) == tuple(str(project / path) for path in ("configs/bert", "configs/d.csv", "data.csv"))
    monkeypatch.chdir("/")
    assert parse_config(config.to_toml()).with_absolute_paths() == config


def test_paths_of_set_are_relative_to_the_current_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "elsewhere")
    config = load_config(project / "configs" / "run.toml", ["model.name=bert", "data.source=only.csv"])
    assert paths(config) == (
        str(project / "elsewhere" / "bert"),
        str(project / "elsewhere" / "only.csv"),
        str(project / "data.csv"),
    )


def test_a_path_that_would_follow_the_current_folder_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "elsewhere")
    path = project / "configs" / "run.toml"
    path.write_text("[data]\nsource = 'only.csv'")
    with raises(ConfigError, "path-in-current-folder", "data.source = 'only.csv'", "'../elsewhere/only.csv'"):
        load_config(path)


def test_names_of_assets_and_of_the_hub_are_no_paths(project: Path) -> None:
    path = project / "configs" / "run.toml"
    path.write_text("[model]\nname = 'some-org/some.model'\n[data]\nsource = 'vader'\ntest = 'validation'")
    assert paths(load_config(path)) == ("some-org/some.model", "vader", "validation")
    assert load_config(path).output == "runs"


def test_a_start_is_a_folder_of_its_config_wherever_one_stands_and_decides_nothing_that_is_opened(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project / "configs" / "run.toml"
    for name, there in (("bert", "configs/bert"), ("gone", "configs/gone"), ("runs/gone", "configs/runs/gone")):
        path.write_text(f"[adapter]\nstart = {name!r}")
        config = load_config(path)
        assert config.adapter.start == str(project / there)
        assert config.digest() == load_config(path, ["adapter.start="]).digest()
        assert "/configs/" in config.to_toml()
    monkeypatch.chdir(project / "elsewhere")
    (project / "elsewhere" / "only").mkdir()
    path.write_text("[adapter]\nstart = 'only'")
    with raises(ConfigError, "path-in-current-folder", "adapter.start = 'only'", "'../elsewhere/only'"):
        load_config(path)


def test_a_missing_file_is_named_where_it_was_looked_for(project: Path) -> None:
    path = project / "configs" / "run.toml"
    path.write_text("[data]\nsource = 'missing.csv'")
    assert load_config(path).data.source == str(project / "configs" / "missing.csv")


def test_every_key_that_stands_for_a_foreign_one_is_there() -> None:
    tables = {name: field.default for name, field in RunConfig.model_fields.items() if name not in OPEN_TABLES}
    valid = {*RunConfig.model_fields, "partition.clients", "tracking.name"}
    valid |= {f"{name}.{key}" for name, table in tables.items() for key in getattr(type(table), "model_fields", ())}
    valid |= {f"task.{field.name}" for field in fields(tasks.get("causal-lm"))}
    assert our_word("lr") is None
    for name, answer in _TABLE.items():
        for key in re.findall(r"(?:model|adapter|task|data|train|server|evaluation|runtime)\.\w+", answer):
            assert key in valid, (name, key)
        assert name not in valid


@pytest.mark.parametrize("key", ["model.device_map=auto", "device_map=auto", "train.fsdp=full_shard", "deepspeed=a"])
def test_several_devices_for_one_base_are_answered_and_not_taken_for_another_key(key: str) -> None:
    with raises(ConfigError, "unknown-key", "runtime.device_map"):
        parse_config("", [key])


@pytest.mark.parametrize(
    "beside",
    [
        "runtime.processes=2",
        "privacy={epsilon=8.0, delta=1e-5, max_grad_norm=1.0, public_examples=[100]}",
        "train.loop='a:b'",
    ],
)
def test_a_base_on_several_gpus_is_of_one_process_and_plain_training(beside: str) -> None:
    parse_config("", ["runtime.device_map=auto"])
    with raises(ConfigError, "base-on-several-gpus", "device_map", "remove one of them"):
        parse_config("", ["runtime.device_map=auto", "server.weighting=uniform", beside])


def test_a_foreign_name_in_an_open_table_is_answered_too() -> None:
    with pytest.raises(ConfigError, match=r"it is task.max_length here"):
        build(tasks.get("causal-lm"), {"max_seq_length": 64}, "task 'causal-lm'")


@pytest.mark.parametrize(
    ("text", "overrides", "where"),
    [
        ("[adapter]\nrank = -3", [], "mine.toml: adapter.rank:"),
        ("", ["adapter.rank=-3"], "--set: adapter.rank:"),
        ("[adapter]\nrank = -3", ["train.steps=5"], "mine.toml: adapter.rank:"),
    ],
)
def test_a_bad_value_is_said_to_be_where_it_was_given(text: str, overrides: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(text, overrides, source="mine.toml")
    assert refused.value.code == "bad-value"
    assert str(refused.value).startswith(where)
