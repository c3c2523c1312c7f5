"""SCAFFOLD and FedDyn in whole runs: the same bytes wherever the clients are, after a kill, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.errors import raises
from support.federations import deploy, require_same, simulate
from support.interrupted import deployed_without_a_reply, killed_and_resumed
from support.tiny_federations import MakeConfig

from fedlora.errors import ConfigError, PrivacyError, RuleError

SCAFFOLD = ("strategy.name=scaffold", "train.optimizer=sgd", "train.lr=0.1")
FEDDYN = ("strategy={name='feddyn',alpha=0.5}",)
ALIKE = ("runtime.cohort=1", "runtime.prefix_cache=off", "server.fraction=0.75", "rounds=4")
BOTH = pytest.mark.parametrize(
    "rule", [SCAFFOLD, pytest.param(FEDDYN, marks=pytest.mark.slow)], ids=["scaffold", "feddyn"]
)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("wire", ["int8", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_on_a_grid_with_rounded_replies_it_comes_to_the_same(
    tiny_config: MakeConfig, rule: tuple[str, ...], wire: str
) -> None:
    """Bytes are counted, too; those whose replies are lost keep their variates."""
    keys = (*rule, *ALIKE, f"wire.up={wire}")
    here = simulate(tiny_config(*keys, name="here"))
    require_same(here, deploy(tiny_config(*keys, name="grid")))
    answered = {str(k) for record in here.records[1:] for k in record["answered"]}
    assert {key.split("/")[1] for key in here.state.memory if key.startswith("client/")} == answered
    plain = simulate(tiny_config(*(key for key in keys if "strategy" not in key), name="plain"))
    assert here.records[1]["bytes_down"] - plain.records[1]["bytes_down"] < 100  # nobody has a variate yet
    names = here.state.adapter.tensors()
    assert here.records[-1]["bytes_down"] > plain.records[-1]["bytes_down"] + sum(v.nbytes for v in names.values())


@pytest.mark.slow
@BOTH
def test_killed_and_resumed_it_comes_to_the_same(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, rule: tuple[str, ...]
) -> None:
    straight = simulate(tiny_config(*rule, *ALIKE, name="straight"))
    again = killed_and_resumed(tiny_config(*rule, *ALIKE, name="killed"), 3, monkeypatch)
    require_same(straight, again, "bytes_down")


@pytest.mark.slow
def test_a_reply_that_is_lost_changes_no_variate(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the client had not been asked: a replay of the run without it is the same."""
    run = deployed_without_a_reply(tiny_config(*SCAFFOLD, "rounds=4", *ALIKE[:2], name="run"), None, monkeypatch)
    assert run.records[2]["answered"] == [0, 2, 3]
    again = simulate(tiny_config(*SCAFFOLD, "rounds=4", *ALIKE[:2], name="again"), replay=run.records)
    mine, theirs = (one.state.adapter.tensors() | dict(one.state.memory) for one in (run, again))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_would_make_it_another_algorithm_is_refused(tiny_config: MakeConfig) -> None:
    for key in ("train.optimizer=adamw", "train.momentum=0.5", "train.clip_norm=1.0", "train.proximal_mu=0.1"):
        with raises(ConfigError, "no-plain-steps", key.partition("=")[0], "feddyn"):
            simulate(tiny_config(*SCAFFOLD, key, name="refused"))
    with raises(ConfigError, "no-plain-steps", "topk", "feddyn"):
        simulate(tiny_config(*SCAFFOLD, "wire.up=topk", name="refused"))
    with raises(ConfigError, "proximal-term-twice", "remove train.proximal_mu"):
        simulate(tiny_config(*FEDDYN, "train.proximal_mu=0.1", name="refused"))
    private = "privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}"
    with raises(PrivacyError, "rule-not-linear", "LINEAR"):
        simulate(tiny_config(*FEDDYN, private, "server.aggregation_error=false", name="refused"))
    with raises(RuleError, "mixed-ranks"):
        simulate(tiny_config(*FEDDYN, "clients.ranks=[2,4]", name="refused"))
