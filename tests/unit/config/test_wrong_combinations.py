"""What does not go together says what to change, in the words of the config."""

from __future__ import annotations

import pytest
from support.errors import raises

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


def test_data_of_another_task_say_so() -> None:
    table = Table({"image": [1], "label": [0]})
    with raises(DataError, "no-such-column", "data.source 'digits'", "'text'", "(image, label)", "task"):
        select(table, ("text", "label"), "data.source 'digits'")
    with raises(DataError, "no-such-column", "'lable'", "'label'"):
        select(table, ("lable",), "data.source 'digits'")
