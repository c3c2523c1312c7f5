"""`train.loop`: a loop of one's own has what it needs, does what fedlora's does, and is held to what it may."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import own_loops
from support.errors import raises
from support.federations import Said, deploy, simulate
from support.interrupted import killed_and_resumed
from support.states import gap
from support.tiny_federations import WORDS, MakeConfig

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, PrivacyError, TrainingError
from fedlora.federation.checks import refuse_early
from fedlora.federation.discretion import failure_of
from fedlora.training import lent_base
from fedlora.training.job import TrainJob
from fedlora.training.lent_base import FROZEN_CHANGED, lent
from fedlora.training.own_loop import FROZEN_PART_CHANGED, train_by_own_loop
from fedlora.training.workspace import open_workspace

OWN = "train.loop=support.own_loops:"
HERE = ("runtime.processes=1", "train.steps=3", "train.batch_size=8", "model.dropout=0")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    own_loops.SEEN.clear()
    own_loops.DRAWN.clear()


@pytest.fixture
def config(tiny_config: MakeConfig) -> MakeConfig:
    """Without fedlora's rate, which a loop of one's own does not read."""

    def make(*overrides: str, **how: Any) -> RunConfig:
        rate = () if any("train.lr" in one or "optimizer=sgd" in one for one in overrides) else ("train.lr=1e-3",)
        return tiny_config(*rate, *HERE, *overrides, **how)

    return make


@pytest.fixture
def preferences(tiny_llama: Path, tmp_path: Path) -> list[str]:
    """What `config` takes for pairs of completions, on a tiny Llama."""
    rows = [
        {"prompt": word, "chosen": f" {word}", "rejected": f" {WORDS[(n + 3) % len(WORDS)]}"}
        for n, word in enumerate(WORDS * 12)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    return [
        f"model.name='{tiny_llama}'",
        "adapter.targets=['q_proj','v_proj']",
        "task={name='preference'}",
        f"data={{source='{pairs}', test_fraction=0.2}}",
    ]


def a_job(start: AdapterState, rows: np.ndarray) -> TrainJob:
    return TrainJob(adapter=start, trains=ALL_PARTS, indices=rows, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", ["fedavg", "flora", *(pytest.param(rule, marks=pytest.mark.nightly) for rule in ("ffa", "rolora", "fedsa"))]
)
def test_plain_sgd_on_the_same_batches_is_our_own_loop(rule: str, config: MakeConfig) -> None:
    rounds = ("rounds=2", f"strategy.name={rule}", *(("evaluation.on=both",) if rule == "fedsa" else ()))
    ours = simulate(config("train.optimizer=sgd", "train.lr=0.1", "runtime.cohort=1", *rounds))
    told = Said()
    theirs = simulate(config(f"{OWN}sgd", "train.options={lr=0.1}", *rounds), told)
    assert gap(ours.state.adapter, theirs.state.adapter) < 1e-6
    for one, other in zip(ours.records[1:], theirs.records[1:], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-6)
        assert one["accuracy"] == other["accuracy"]
    said = [line for line in told.lines if line.startswith("train.loop")]
    assert len(said) == len(set(said)) == 3


def test_a_loop_gets_what_it_needs(config: MakeConfig) -> None:
    told = simulate(config(f"{OWN}sgd", "rounds=2"))
    workspace = open_workspace(config(f"{OWN}sgd", "rounds=2"))
    for work in own_loops.SEEN:
        rows = workspace.data.clients[work.client_id]
        assert work.dataset.num_rows == len(rows)
        assert set(work.dataset.column_names) == {"text", "label", "domain", "document"}
        assert work.steps == 3
        assert work.batch_size == 8
        assert work.tokenizer(work.dataset[0]["text"])["input_ids"] == [
            int(k) for k in workspace.data.train.inputs["input_ids"][rows[0]]
        ]
        assert work.label_names == ("negative", "positive")
    assert [(work.round, work.rounds) for work in own_loops.SEEN] == [(1, 2)] * 4 + [(2, 2)] * 4
    assert told.records[1]["asked"] == [0, 1, 2, 3]


def test_what_a_loop_leaves_behind_is_put_back(config: MakeConfig) -> None:
    quiet = simulate(config(f"{OWN}counting", "rounds=1"))
    before = open_workspace(config(f"{OWN}messing", "rounds=1")).base.model.config.use_cache
    loud = simulate(config(f"{OWN}messing", "rounds=1"))
    assert gap(quiet.state.adapter, loud.state.adapter) == 0.0
    assert loud.records[1]["accuracy"] == quiet.records[1]["accuracy"]
    base = open_workspace(config(f"{OWN}counting", "rounds=1")).base
    assert base.model.config.use_cache == before
    assert list(base.peft_model.peft_config) == ["default"]
    assert not any("ref" in name for name, _ in base.peft_model.named_modules())


@pytest.mark.parametrize(
    ("loop", "also", "kind", "code", "words"),
    [
        ("unfreezing", (), TrainingError, "frozen-tensor-changed", "LayerNorm.bias"),
        ("changing_A", ("strategy.name=ffa",), TrainingError, "frozen-part-changed", ":A"),
        ("silent", (), FedloraError, "", "'loss'"),
        ("greedy", (), FedloraError, "", "budget of 3"),
        ("diverging", (), FedloraError, "", "not finite"),
    ],
)
def test_a_loop_that_does_something_else_is_named(
    loop: str, also: tuple[str, ...], kind: type[FedloraError], code: str, words: str, config: MakeConfig
) -> None:
    with pytest.raises(kind, match=words) as caught:
        simulate(config(f"{OWN}{loop}", "rounds=1", *also))
    assert not code or caught.value.code == code


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("none", "a NoneType as 'loss': return a finite number"),
        ("words", "a str as 'loss'"),
        ("many", "a Tensor as 'loss'"),
        ("seen", "nan as 'examples_seen'"),
        ("steps", "inf as 'steps'"),
        ("keys", "'1' is none"),
        ("kept", "a int into work.kept under 'number'"),
    ],
)
def test_figures_are_numbers_and_what_is_kept_are_tensors(what: str, words: str, config: MakeConfig) -> None:
    made = config(f"{OWN}returning", f"train.options={{what='{what}'}}", "train.keep_optimizer=true", "rounds=1")
    with pytest.raises(FedloraError, match=words):
        simulate(made)
    workspace = open_workspace(made)
    job = a_job(workspace.base.initial_adapter(0), workspace.data.clients[0])
    with raises(ConfigError, "bad-loop", words):
        train_by_own_loop(workspace.base, workspace.task, workspace.data.train, job, made.train)


def test_a_figure_may_be_a_tensor(config: MakeConfig) -> None:
    made = config(f"{OWN}returning", "train.options={what='tensor'}", "rounds=1")
    assert simulate(made).records[1]["train_loss"] == 0.0


def test_what_a_loop_starts_from_is_a_copy(config: MakeConfig) -> None:
    made = config(f"{OWN}in_place", "rounds=1")
    workspace = open_workspace(made)
    start = workspace.base.initial_adapter(0)
    before = start.clone().tensors()
    train_by_own_loop(
        workspace.base, workspace.task, workspace.data.train, a_job(start, workspace.data.clients[0]), made.train
    )
    assert all(torch.equal(value, before[name]) for name, value in start.tensors().items())


@pytest.mark.parametrize("error", [None, RuntimeError("boom")])
def test_a_loop_that_casts_the_adapter_leaves_nothing(error: Exception | None, config: MakeConfig) -> None:
    base = open_workspace(config(f"{OWN}sgd")).base
    with nullcontext() if error is None else pytest.raises(RuntimeError, match="boom"), lent(base):
        for parameter in base.parameters.values():
            parameter.data = parameter.data.bfloat16()
        if error is not None:
            raise error
    assert {parameter.dtype for parameter in base.parameters.values()} == {base.adapter_dtype}


def test_a_base_that_cannot_be_lent_is_as_it_was(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_workspace(config(f"{OWN}sgd")).base
    ranks = dict(base.peft_model.peft_config["default"].rank_pattern)
    layer = next(iter(base.pair_layers.values()))
    layer.running_mean = torch.zeros(1)  # as a layer with statistics has
    kept = layer.lora_alpha.pop("default")
    with pytest.raises(KeyError), lent(base):
        pass
    layer.lora_alpha["default"] = kept
    assert base.peft_model.peft_config["default"].rank_pattern == ranks
    monkeypatch.setattr(lent_base, "_as_it_is", None)  # no layer's `train` can be replaced
    with pytest.raises(TypeError), lent(base):
        pass
    assert all("train" not in vars(module) for module in base.peft_model.modules())
    assert base.peft_model.peft_config["default"].rank_pattern == ranks
    del layer.running_mean


def test_a_frozen_part_of_the_adapter_leaves_the_base_open(config: MakeConfig) -> None:
    made = config(f"{OWN}sgd")
    workspace = open_workspace(made)
    for code, same in ((FROZEN_PART_CHANGED, True), (FROZEN_CHANGED, False)):
        error = TrainingError("changed", code=code)
        assert failure_of(error, made) is error, "it ends the run"
        assert (open_workspace(made).base is workspace.base) == same


@pytest.mark.slow
def test_the_reference_is_the_start_whenever_batches_are_drawn(config: MakeConfig, preferences: list[str]) -> None:
    for late in ("false", "true"):
        simulate(config(f"{OWN}referring", f"train.options={{late={late}}}", *preferences, "rounds=1"))
    early, late_ones = own_loops.DRAWN[:8], own_loops.DRAWN[8:]
    assert len(late_ones) == 4
    for first, again, late_one in zip(early[::2], early[1::2], late_ones, strict=True):
        assert len(first) == 3
        assert all(map(torch.equal, first, again))
        assert all(map(torch.equal, first, late_one))


@pytest.mark.parametrize(
    ("loop", "code", "words"),
    [("nobody", "class-not-found", "nobody"), ("sgd", "bad-loop", "rate"), ("SEEN", "bad-loop", "no function")],
)
def test_a_loop_that_cannot_be_called_is_said_before_the_run(
    loop: str, code: str, words: str, config: MakeConfig
) -> None:
    made = config(f"{OWN}{loop}", "train.options={rate=1.0}")
    with raises(ConfigError, code, words):
        refuse_early(made, open_workspace(made))


def test_a_changed_base_is_loaded_anew(config: MakeConfig) -> None:
    before = simulate(config(f"{OWN}counting", "rounds=1")).records
    with pytest.raises(TrainingError):
        simulate(config(f"{OWN}unfreezing", "rounds=1"))
    after = simulate(config(f"{OWN}counting", "rounds=1")).records
    assert after[1]["loss"] == before[1]["loss"]


def test_one_changed_bit_of_any_frozen_tensor_is_seen(config: MakeConfig) -> None:
    base = open_workspace(config(f"{OWN}sgd")).base
    mine = {id(parameter) for parameter in base.parameters.values()}
    for _name, tensor in base.peft_model.named_parameters():
        if id(tensor) in mine:
            continue
        kept = tensor.detach().clone()
        with raises(TrainingError, "frozen-tensor-changed", "train.loop"), lent(base), torch.no_grad():
            tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(9.0))
        with torch.no_grad():
            tensor.copy_(kept)


def test_what_it_keeps_goes_on_through_kill_and_resume(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = config(f"{OWN}counting", "train.keep_optimizer=true", "rounds=3", "server.clients_per_round=2")
    whole = simulate(kept)
    counts = [(work.client_id, int(work.kept["rounds"])) for work in own_loops.SEEN]
    for number, (client_id, count) in enumerate(counts):
        assert count == sum(other == client_id for other, _ in counts[: number + 1])
    resumed = killed_and_resumed(kept, 2, monkeypatch)
    assert [line["train_loss"] for line in resumed.records[1:]] == [line["train_loss"] for line in whole.records[1:]]


@pytest.mark.slow
def test_a_deployment_does_the_same(config: MakeConfig) -> None:
    made = config(f"{OWN}sgd", "rounds=2", "runtime.kernels=off")
    assert gap(simulate(made).state.adapter, deploy(made).state.adapter) == 0.0


@pytest.mark.parametrize(
    "private",
    [
        "privacy={noise_multiplier=1.0, delta=1e-4, max_grad_norm=1.0, public_examples=100}",
        "privacy={unit='client', noise_multiplier=1.0, delta=1e-4, clip_norm=1.0}",
    ],
)
def test_no_privacy_is_claimed(private: str, config: MakeConfig) -> None:
    with raises(PrivacyError, "loop-not-private", "[privacy]"):
        config(f"{OWN}sgd", private)


@pytest.mark.parametrize(
    "key", ["train.lr=0.5", "train.optimizer=sgd", "train.proximal_mu=0.1", "train.clip_norm=1.0", "runtime.cohort=4"]
)
def test_keys_that_a_loop_does_not_read_are_refused(key: str, config: MakeConfig) -> None:
    with raises(ConfigError, "key-without-effect", key.partition("=")[0]):
        config(f"{OWN}sgd", key)


def test_options_need_a_loop(config: MakeConfig) -> None:
    with raises(ConfigError, "key-without-effect", "train.options"):
        config("train.options={lr=0.1}")


def test_noise_of_a_partition_is_not_left_out_silently(config: MakeConfig) -> None:
    with raises(ConfigError, "noise-without-effect", "train.loop"):
        simulate(config(f"{OWN}sgd", "partition={name='iid', clients=4, label_noise=0.2}"))


# ------------------------------------------------------------------------------------------------ real Trainers


@pytest.mark.slow
def test_a_transformers_trainer_is_our_own_loop(config: MakeConfig) -> None:
    ours = simulate(config("train.optimizer=sgd", "train.lr=0.1", "runtime.cohort=1", "rounds=2"))
    theirs = simulate(config(f"{OWN}trainer", "rounds=2"))
    assert gap(ours.state.adapter, theirs.state.adapter) < 1e-6
    assert theirs.records[2]["train_loss"] == pytest.approx(ours.records[2]["train_loss"], abs=1e-6)
    assert [figures["steps"] for figures in theirs.records[1]["clients"].values()] == [3.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "mine"),
    [
        ("{optim='sgd', optim_args='momentum=0.9'}", ("train.optimizer=sgd", "train.momentum=0.9", "train.lr=0.1")),
        (
            "{optim='adamw_torch', learning_rate=0.01, adam_epsilon=1e-8, lr_scheduler_type='linear'}",
            ("train.optimizer=adamw", "train.lr=0.01", "train.schedule=linear"),
        ),
    ],
)
def test_its_optimiser_and_schedule_go_on(options: str, mine: tuple[str, ...], config: MakeConfig) -> None:
    """As fedlora's own do, with the same key."""
    rounds = ("rounds=3", "train.keep_optimizer=true")
    theirs = simulate(config(f"{OWN}trainer", f"train.options={options}", *rounds))
    ours = simulate(config(*mine, "runtime.cohort=1", *rounds))
    anew = simulate(config(f"{OWN}trainer", f"train.options={options}", "rounds=3"))
    assert gap(ours.state.adapter, theirs.state.adapter) < 1e-5
    assert gap(anew.state.adapter, theirs.state.adapter) > 1e-3


@pytest.mark.slow
def test_budgets_that_differ_are_refused(config: MakeConfig) -> None:
    with pytest.raises(FedloraError, match=r"max_steps is 7 .* budget 3"):
        simulate(config(f"{OWN}trainer", "train.options={max_steps=7}", "rounds=1"))
    with pytest.raises(FedloraError, match=r"batch has 16 examples and train.batch_size is 8"):
        simulate(config(f"{OWN}trainer", "train.options={gradient_accumulation_steps=2}", "rounds=1"))


@pytest.mark.nightly
@pytest.mark.parametrize("rule", ["fedavg", "ffa", "fedex"])
def test_trls_sft_trainer_learns_in_a_federation(
    rule: str, config: MakeConfig, tasks: dict[str, list[str]], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    made = config(f"{OWN}sft", *tasks["causal-lm"], "train.steps=8", f"strategy.name={rule}")
    found = simulate(made).records
    assert found[-1]["loss"] < found[0]["loss"] - 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", ["", "clients.ranks=[2,4,2,4]"])
def test_trls_dpo_trainer_learns_in_a_federation(ranks: str, config: MakeConfig, preferences: list[str]) -> None:
    """Its reference is a copy of the adapter that the round starts from, in ranks of the client's own too."""
    pytest.importorskip("trl")
    found = simulate(
        config(
            f"{OWN}dpo",
            *preferences,
            "train.steps=8",
            *(("strategy.name=flora", ranks) if ranks else ()),
        )
    ).records
    assert found[-1]["ranking_accuracy"] > found[0]["ranking_accuracy"] + 0.2
