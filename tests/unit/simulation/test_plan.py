"""What a plan says, against the measured rows of real shapes and against a model that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.errors import raises
from support.federations import simulate
from support.interrupted import cut_and_resumed
from support.tiny_t5 import write_tiny_t5

from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError
from fedlora.model import load_base
from fedlora.simulation.capacity import COPIES
from fedlora.simulation.plan import Plan, make_plan, read_size
from fedlora.tasks import Table, load_task
from fedlora.wire_formats import header_of, header_of_value

MIB, GIB = 1 << 20, 1 << 30
QWEN = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN |= {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False}
LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"intermediate_size": 14336, "vocab_size": 128256}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {"qwen": ("Qwen2Config", QWEN), "llama": ("LlamaConfig", LLAMA)}


def config_of(name: str, folder: Path, *overrides: str) -> RunConfig:
    """A run on a model of 7 or 8 billion parameters, of which there is a config alone."""
    import transformers

    kind, options = SHAPES[name]
    getattr(transformers, kind)(**options).save_pretrained(folder)
    return parse_config("", [f"model.name='{folder}'", "task.name=causal-lm", "adapter.rank=16", *overrides])


@pytest.mark.parametrize(
    ("name", "targets", "token", "adapter", "base"),
    [
        ("qwen", "['q_proj','v_proj']", 4.45, 20e6, 14.2),
        ("qwen", "all-linear", 5.79, 161e6, 14.2),
        ("llama", "['q_proj','v_proj']", 4.53, 27e6, 15.0),
        ("llama", "all-linear", 5.79, 168e6, 15.0),
    ],
)
@pytest.mark.slow
def test_real_shapes_take_what_was_measured(
    name: str, targets: str, token: float, adapter: float, base: float, tmp_path: Path
) -> None:
    found = make_plan(config_of(name, tmp_path, f"adapter.targets={targets}"), 24 * 10**9, "bfloat16")
    assert found.token == pytest.approx(token * MIB, rel=0.03)
    assert found.adapter == pytest.approx(adapter, rel=0.03)
    assert found.base == pytest.approx(base * GIB, rel=0.01)
    assert found.optimizer == COPIES * found.adapter
    assert found.down == found.up == found.adapter * 8, "eight clients"


FLOWER_TUNE = """
rounds = 100
[model]
name = "{model}"
quantize = "nf4"
[adapter]
rank = 32
alpha = 64.0
targets = ["all-linear"]
[task]
name = "causal-lm"
max_length = 512
[data]
source = "{data}"
[partition]
name = "iid"
clients = 20
[train]
steps = 10
batch_size = 16
micro_batch_size = 4
gradient_checkpointing = true
lr = 5e-5
lr_end = 1e-6
schedule = "cosine"
[server]
fraction = 0.1
"""
"""The federation of FlowerTune's leaderboard: 20 clients, of which a tenth train a model of 7 billion parameters."""


@pytest.mark.slow
def test_a_federation_of_flower_tunes_size_is_planned(tmp_path: Path) -> None:
    import transformers

    transformers.LlamaConfig(**LLAMA | {"vocab_size": 32000}).save_pretrained(tmp_path)
    text = FLOWER_TUNE.format(model=tmp_path, data="chitchat")
    with_all = make_plan(parse_config(text, ["train.gradient_checkpointing=false"]), 24 * 10**9, "bfloat16")
    found = make_plan(parse_config(text), 24 * 10**9, "bfloat16")
    # Llama-3.1-8B's rows for r = 16 are 5.79 MiB a token and 168 MB of adapters; its embeddings are larger.
    assert with_all.token == pytest.approx(5.79 * MIB, rel=0.15)
    assert found.token == pytest.approx(0.25 * MIB, rel=0.15)
    assert found.adapter == pytest.approx(2 * 168e6, rel=0.15)
    assert found.optimizer == pytest.approx(2 * 1.3e9, rel=0.15)
    embeddings = 2 * 2 * 4096 * (128256 - 32000)
    assert found.base == pytest.approx(5.3 * GIB - embeddings, rel=0.15)
    assert found.down == found.up == 2 * found.adapter, "two of twenty clients"
    assert found.verdict.startswith("fits")
    assert found.room > 5 * with_all.room, "by checkpoints"


@pytest.mark.nightly
@pytest.mark.verified
def test_the_same_federation_is_killed_resumed_and_exported_on_a_tiny_model(
    tiny_llama: Path, tiny_chat: Path, tmp_path: Path
) -> None:
    import torch
    from support.command_line import succeeds
    from transformers import AutoModelForCausalLM

    pytest.importorskip("bitsandbytes")
    text = FLOWER_TUNE.format(model=tiny_llama, data=tiny_chat)
    given = ["rounds=4", "model.dtype=float32", "runtime.processes=1", f"output='{tmp_path}'", "train.lr=1e-2"]
    whole = simulate(parse_config(text, [*given, "name=whole"]))
    cut = cut_and_resumed(parse_config(text, [*given, "name=cut"]), 3)
    for name, value in whole.adapter.tensors().items():
        assert torch.equal(cut.adapter.tensors()[name], value), name
    assert whole.records[-1]["perplexity"] < whole.records[0]["perplexity"]
    for more, folder in ((["--format", "merged"], "model"), ([], "adapter")):
        succeeds("export", cut.rundir.path, tmp_path / folder, *more)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not getattr(merged, "is_quantized", False)


def test_a_pair_takes_the_tokens_of_both_its_texts(tiny_llama: Path) -> None:
    given = ["task.name=preference", "task.max_length=32", "train.batch_size=1", f"model.name='{tiny_llama}'"]
    config = parse_config("", [*given, "adapter.targets=all-linear"])
    found = make_plan(config, 24 * 10**9, "float32", "cpu")
    task = load_task(config.task)
    long = {"prompt": ["cat"], "chosen": [" red" * 50], "rejected": [" old" * 50]}
    examples = task.prepare(Table(long), tiny_llama, {name: name for name in long}, keep=())
    assert found.row_tokens == task.tokens(task.collate(examples, [0])) == int(examples.lengths[0]) == 64
    assert (
        found.token
        == make_plan(
            parse_config("", [*given[1:], "task.name=causal-lm", "adapter.targets=all-linear"]),
            24 * 10**9,
            "float32",
            "cpu",
        ).token
    )


def test_a_plan_counts_a_text_and_what_is_written_for_it(tmp_path: Path) -> None:
    t5 = write_tiny_t5(tmp_path, ["old red cat"])
    own = ["max_length=12", "max_target_length=5"]
    config = parse_config(
        "",
        [f"model.name='{t5}'", "task.name=seq2seq-lm", *(f"task.{one}" for one in own), "adapter.targets=all-linear"],
    )
    found, task = make_plan(config, 24 * 10**9, "float32", "cpu"), load_task(config.task)
    long = {"text": ["cat " * 50], "target": ["old red " * 50]}
    examples = task.prepare(Table(long), t5, {name: name for name in long}, keep=())
    assert found.row_tokens == task.tokens(task.collate(examples, [0])) == int(examples.lengths[0]) == 17
    assert 0 < found.token < 24 * 10**4
    assert found.logits > 0


@pytest.mark.slow
def test_checkpoints_keep_the_inputs_of_layers(tmp_path: Path) -> None:
    found = make_plan(config_of("llama", tmp_path, "train.gradient_checkpointing=true"), 24 * 10**9, "bfloat16")
    assert found.token == pytest.approx(32 * 4096 * 2, rel=0.1)


@pytest.mark.parametrize(("quantize", "base"), [("nf4", 5.3), ("int8", 8.5)])
@pytest.mark.slow
def test_a_quantised_base_is_smaller_by_its_bits(quantize: str, base: float, tmp_path: Path) -> None:
    found = make_plan(config_of("llama", tmp_path, f"model.quantize={quantize}"), 24 * 10**9, "bfloat16")
    assert found.base == pytest.approx(base * GIB, rel=0.02)


def test_a_plan_counts_the_weights_that_are_loaded(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config("", [f"model.name='{tiny_bert}'", "wire.up=int8"])
    found = make_plan(config, 10**9, "float32", "cpu")
    task = load_task(config.task)
    base = load_base(config, task.auto_class, task.head, {"num_labels": 2})
    own = {id(parameter) for parameter in base.parameters.values()}
    assert found.base == sum(value.nbytes for value in base.model.parameters() if id(value) not in own)
    assert found.trained == sum(value.numel() for value in base.initial_adapter(0).tensors().values())
    assert found.down == 8 * 4 * found.trained, "to eight clients"
    sent = base.initial_adapter(0).tensors().values()
    assert found.up == 8 * sum(header_of("int8", value.dtype, tuple(value.shape)).nbytes for value in sent)
    for rule in ("{name='scaffold'}", "{name='krum',inner={name='feddyn'}}"):
        tilted = make_plan(parse_config("", [f"model.name='{tiny_bert}'", f"strategy={rule}"]), 10**9, "float32", "cpu")
        assert tilted.down == 2 * found.down, "the tilt is as large as the adapter"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_tilts.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlora.aggregators.ffa import FfaLora\n"
        "@dataclass(frozen=True)\n"
        "class Mine(FfaLora):\n"
        "    tilts = True\n"
    )
    mine = parse_config("", [f"model.name='{tiny_bert}'", "strategy.name=my_tilts:Mine"])
    assert make_plan(mine, 10**9, "float32", "cpu").down == 2 * found.down, "a rule of one's own, too"
    rounded = parse_config("", [f"model.name='{tiny_bert}'", "wire.down=int8"])
    down = sum(header_of_value("int8", value.dtype, tuple(value.shape)).nbytes for value in sent)
    assert make_plan(rounded, 10**9, "float32", "cpu").down == 8 * down < 0.5 * found.down
    topk = parse_config("", [f"model.name='{tiny_bert}'", "wire={up='topk', fraction=0.25}"])
    assert make_plan(topk, 10**9, "float32", "cpu").up == pytest.approx(found.down / 2, rel=0.01)


def test_a_plan_names_the_adapter_that_a_run_begins_with(tiny_toml: Path, tmp_path: Path) -> None:

    from support.command_line import invoke, succeeds

    (tmp_path / "start").mkdir()
    asked = ["plan", str(tiny_toml), "--set", f"adapter.start='{tmp_path / 'start'}'"]
    lacking = invoke(*asked)
    assert lacking.exit_code == 1
    assert "name a folder with adapter_config.json" in lacking.stderr
    (tmp_path / "start" / "adapter_config.json").write_text("{}")
    found = succeeds(*asked, env={"COLUMNS": "300"})
    line = next(line for line in found.stdout.splitlines() if line.startswith("begins with"))
    assert line.split(maxsplit=2)[2].strip() == f"the adapter in {tmp_path / 'start'}"


@pytest.mark.parametrize(
    ("server", "times", "said"), [("fraction=0.5", 1, "to each client"), ("clients_per_round=3", 3, "to clients")]
)
def test_how_many_clients_there_are_is_not_guessed(server: str, times: int, said: str, tiny_bert: Path) -> None:
    natural = ["partition={name='natural', column='author'}", f"server.{server}"]
    found = make_plan(parse_config("", [f"model.name='{tiny_bert}'", *natural]), 10**9, "float32", "cpu")
    assert found.down == times * 4 * found.trained
    assert said in dict(found.lines())["a round"]


def a_plan(room: int, wanted: int, row: int) -> Plan:
    return Plan(1, 1, 0, 0, 0, 10, 0, 10 * room, wanted, row, 1, 0, 0)


def test_the_verdict_says_what_to_change() -> None:
    assert a_plan(100, 100, 50).verdict.startswith("fits:")
    assert a_plan(99, 100, 50).verdict.startswith("fits in smaller passes")
    short = a_plan(49, 100, 50).verdict
    assert short.startswith("does not fit")
    assert "task.max_length" in short
    assert "train.gradient_checkpointing = true" in short


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("16GiB", 16 * GIB), ("80g", 80 * 10**9), ("500 MB", 5 * 10**8)]
)
def test_sizes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "24", "big", "-1GB", "nanGB", "1e99GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with raises(ConfigError, "not-a-size", "24GB"):
        read_size(text)


def test_a_method_without_a_stacked_form_has_no_plan(tiny_bert: Path) -> None:
    with raises(ConfigError, "no-plan", "side by side", "dora"):
        make_plan(parse_config("", [f"model.name='{tiny_bert}'", "adapter.method=dora"]), 10**9, "float32", "cpu")


@pytest.mark.slow
def test_logits_are_there_a_chunk_at_a_time(tmp_path: Path) -> None:
    found = make_plan(config_of("llama", tmp_path), 24 * 10**9, "bfloat16")
    assert found.logits == 16 * 512 * 128_256
    assert found.room == (24 * 10**9 - found.base - found.optimizer - found.logits) // found.token
