"""A federation that trains in a second: four clients, a tiny BERT, a tiny file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.config import RunConfig, parse_config

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def tiny_overrides(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> list[str]:
    return [
        f"output='{tmp_path / 'runs'}'",
        f"model.name='{tiny_bert}'",
        "adapter.rank=4",
        "adapter.targets=['query','value']",
        f"data.source='{tiny_csv}'",
        "data.domain='domain'",
        "data.group='document'",
        "data.test_fraction=0.25",
        "task.name=text-classification",
        "partition.clients=4",
        "train.steps=4",
        "train.batch_size=8",
        "train.lr=0.01",
        "runtime.threads=1",
        "runtime.kernels=off",
        "rounds=3",
    ]


@pytest.fixture
def tiny_config(tiny_overrides: list[str]) -> MakeConfig:
    def make(*overrides: str, name: str = "tiny") -> RunConfig:
        return parse_config("", [*tiny_overrides, *overrides], name=name)

    return make
