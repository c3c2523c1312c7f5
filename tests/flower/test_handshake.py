"""A node that would train something else is refused, and the message says what differs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ReplyError, RoundError
from fedlora.flower import client_app, run_local
from fedlora.flower.handshake import TABLES, question, require_same_config
from fedlora.progress import NoProgress
from fedlora.rundir import RunDir

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("override", "names"),
    [
        (("train.lr=0.02",), r"\[train\] differ"),
        (("seed=1",), "seed differ"),
        (("wire.up=int8", "adapter.rank=2"), r"\[adapter\], \[wire\] differ"),
        (("strategy.name=ffa",), r"\[strategy\] differ"),
        (("model.dtype=bfloat16",), r"\[model\] differ"),
    ],
)
def test_another_config_is_refused_by_the_names_of_its_tables(
    tiny_config: MakeConfig, override: tuple[str, ...], names: str
) -> None:
    asked = question(tiny_config())
    with pytest.raises(ReplyError, match=names):
        require_same_config(asked, tiny_config(*override))


@pytest.mark.parametrize(
    "override", ["output=elsewhere", "model.name=/another/folder", "runtime.threads=2", "rounds=9", "server.quorum=0.1"]
)
def test_what_is_a_nodes_own_or_the_servers_alone_is_not_compared(tiny_config: MakeConfig, override: str) -> None:
    require_same_config(question(tiny_config()), tiny_config(override, name="other"))


def test_every_table_that_decides_what_is_trained_is_compared() -> None:
    not_trained_by = {"name", "output", "rounds", "server", "runtime", "tracking"}
    of_the_node = {"data"}
    assert set(TABLES) == set(RunConfig.model_fields) - not_trained_by - of_the_node


def test_a_node_with_another_config_does_not_take_part(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, other = tiny_config(), tiny_config("train.steps=9")
    monkeypatch.setattr(client_app, "config_of", lambda context: other)
    with pytest.raises(RoundError, match=r"no node can take part.*\[train\] differ: give server and nodes the same"):
        run_local(config, RunDir.create(config), NoProgress())
