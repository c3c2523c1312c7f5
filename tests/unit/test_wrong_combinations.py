"""What does not go together says what to change, in the words of the config."""

from __future__ import annotations

import pytest

from fedlora.config import parse_config
from fedlora.data._sources import select
from fedlora.errors import ConfigError, DataError
from fedlora.partition import load_partitioner
from fedlora.tasks import Table


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("domain", {}, "partitioner 'domain': clients is missing: set it"),
        (
            "iid",
            {"clients": 4, "label_noise": 1.5},
            "label_noise: Input should be less than or equal to 1 or a valid tuple, not 1.5",
        ),
        ("dirichlet", {"clients": 4, "alpah": 0.1}, "did you mean 'alpha'?"),
    ],
)
def test_a_partition_speaks_of_its_keys(name: str, fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_partitioner(name, fields)
    assert words in str(caught.value)
    assert "constrained" not in str(caught.value)


def test_a_table_as_a_whole_has_no_key_before_its_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("", ["server.simulated_deadline_s=5"])
    assert "server.simulated_deadline_s needs clients.profiles" in str(caught.value)
    assert ": :" not in str(caught.value)
    assert "Value error" not in str(caught.value)


def test_data_of_another_task_say_so() -> None:
    table = Table({"image": [1], "label": [0]})
    with pytest.raises(
        DataError, match=r"no column 'text'; name one of its columns .* \(image, label\), or change task"
    ):
        select(table, ("text", "label"), "data.source 'digits'")
    with pytest.raises(DataError, match="did you mean 'label'"):
        select(table, ("lable",), "data.source 'digits'")
