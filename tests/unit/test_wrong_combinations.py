"""What does not go together says what to change, in the words of the config."""

from __future__ import annotations

import pytest
from support.errors import raises

from fedlora.config import parse_config
from fedlora.data._sources import select
from fedlora.errors import ConfigError, DataError
from fedlora.partition import load_partitioner
from fedlora.tasks import Table


@pytest.mark.parametrize(
    ("name", "fields", "code", "named"),
    [
        ("domain", {}, "bad-value", ("'domain'", "clients")),
        ("iid", {"clients": 4, "label_noise": 1.5}, "bad-value", ("label_noise: ", "1 or a valid tuple", "not 1.5")),
        ("dirichlet", {"clients": 4, "alpah": 0.1}, "unknown-key", ("'alpah'", "'alpha'")),
    ],
)
def test_a_partition_speaks_of_its_keys(
    name: str, fields: dict[str, object], code: str, named: tuple[str, ...]
) -> None:
    with raises(ConfigError, code, *named) as caught:
        load_partitioner(name, fields)
    assert "constrained" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "code", "named"),
    [
        (["server.simulated_deadline_s=5"], "deadline-without-profiles", "clients.profiles"),
        (["clients.profiles=[{name='a', dropout=0.5}]"], "dropout-without-deadline", "server.simulated_deadline_s"),
        (["train.steps=1", "train.epochs=1"], "steps-and-epochs", "train.steps"),
        (["clients.profiles=[{name='a', steps=1, epochs=1}]"], "steps-and-epochs", "clients.profiles"),
        (["clients.ranks=[2]", "clients.profiles=[{name='a', rank=2}]"], "ranks-given-twice", "clients.ranks"),
    ],
)
def test_keys_that_exclude_or_need_each_other_are_named(overrides: list[str], code: str, named: str) -> None:
    with raises(ConfigError, code, named):
        parse_config("", overrides)


def test_data_of_another_task_say_so() -> None:
    table = Table({"image": [1], "label": [0]})
    with raises(DataError, "no-such-column", "data.source 'digits'", "'text'", "(image, label)", "task"):
        select(table, ("text", "label"), "data.source 'digits'")
    with raises(DataError, "no-such-column", "'lable'", "'label'"):
        select(table, ("lable",), "data.source 'digits'")
