"""What a model has no row for is refused before anything is trained; what its files lack is said by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.command_line import succeeds
from support.errors import raises

from fedlora.assets import Checkpoint
from fedlora.config import RunConfig, parse_config
from fedlora.errors import AssetError, ConfigError, DataError, FedloraError, ModelError
from fedlora.model.reach import embedding_rows, longest_text, position_limit
from fedlora.simulation.run import refuse_early
from fedlora.tasks._base import Table
from fedlora.tasks.causal_lm import CausalLM
from fedlora.training import open_workspace

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "Bert": SMALL | {"intermediate_size": 16, "max_position_embeddings": 12},
    "Roberta": SMALL | {"intermediate_size": 16, "max_position_embeddings": 14, "pad_token_id": 1},
    "DistilBert": {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    | {"max_position_embeddings": 12},
    "GPT2": {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12},
    "OPT": SMALL | {"ffn_dim": 16, "max_position_embeddings": 12, "word_embed_proj_dim": 16},
    "Albert": SMALL | {"intermediate_size": 16, "embedding_size": 16, "max_position_embeddings": 12},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_is_the_longest_text_that_a_model_computes(family: str) -> None:
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**FAMILIES[family])).eval()
    assert embedding_rows(model) == 40
    limit = position_limit(model)
    assert limit == 12
    assert longest_text(model) == 12
    ids = torch.full((1, limit + 1), 5)
    with torch.no_grad():
        model(input_ids=ids[:, :limit], attention_mask=torch.ones_like(ids[:, :limit]))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_computed_positions_have_no_limit() -> None:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=16, num_key_value_heads=1, max_position_embeddings=12)
    model = transformers.LlamaModel(config).eval()
    assert position_limit(model) is None
    assert longest_text(model) == 12
    with torch.no_grad():
        model(input_ids=torch.full((1, 20), 5))


# ------------------------------------------------------------------------------------------------ a run


@pytest.fixture
def make(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str, base: Path = tiny_bert, data: Path = tiny_csv) -> RunConfig:
        text = f"output='{tmp_path}/runs'\nmodel.name='{base}'\ndata.source='{data}'\nadapter.targets=['query']"
        return parse_config(text, ["runtime.threads=1", "runtime.kernels=off", "partition.clients=2", *overrides])

    return make


def one_long(source: Path, folder: Path, words: int) -> Path:
    lines = source.read_text().splitlines()
    lines[17] = " ".join(["great"] * words) + ",positive,films,films-9"
    (folder / "long.csv").write_text("\n".join(lines) + "\n")
    return folder / "long.csv"


def test_one_text_too_long_is_refused_at_the_start(
    make: Callable[..., RunConfig], tiny_csv: Path, tmp_path: Path
) -> None:
    data = one_long(tiny_csv, tmp_path, 70)
    with raises(DataError, "text-too-long", "1 of 240", "72 tokens", "task.max_length = 64"):
        open_workspace(make("task.max_length=128", data=data))
    open_workspace(make("task.max_length=64", data=data))  # the cure
    open_workspace(make("task.max_length=128"))  # nothing is too long


PRIVATE = "privacy={unit='example', noise_multiplier=1.0, delta=1e-4, max_grad_norm=1.0, public_examples=100}"


def test_a_private_run_does_not_fail_by_the_length_of_a_text(make: Callable[..., RunConfig]) -> None:
    config = make("task.max_length=128", PRIVATE, "server.weighting=uniform")
    with raises(ConfigError, "max-length-too-large", 128, "task.max_length = 64"):
        refuse_early(config, open_workspace(config))


def with_token(tiny_bert: Path, folder: Path, **token: str) -> Path:
    base = folder / "base"
    shutil.copytree(tiny_bert, base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if token:
        tokenizer.add_special_tokens(token)
    else:
        tokenizer.add_tokens(["zznew"])
    tokenizer.save_pretrained(base)
    return base


def test_a_token_without_a_row_is_named_if_it_occurs(
    make: Callable[..., RunConfig], tiny_bert: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    base = with_token(tiny_bert, tmp_path)
    open_workspace(make(base=base))
    (tmp_path / "new.csv").write_text(tiny_csv.read_text().replace("great", "zznew", 1))
    with raises(ModelError, "token-without-embedding", "'zznew'"):
        open_workspace(make(base=base, data=tmp_path / "new.csv"))
    private = make(PRIVATE, "server.weighting=uniform", base=base)
    with raises(ModelError, "token-without-embedding", "'zznew'"):  # in a private run whatever the texts are
        refuse_early(private, open_workspace(private))


def test_so_is_a_padding_token(make: Callable[..., RunConfig], tiny_bert: Path, tmp_path: Path) -> None:
    with raises(ModelError, "token-without-embedding", "id 120", "0 to 119"):
        open_workspace(make(base=with_token(tiny_bert, tmp_path, pad_token="<padding>")))


def test_an_answer_has_room_behind_a_prompt_of_all_positions(tiny_bert: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=200, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(config).eval()
    task = CausalLM(max_length=64)
    table = Table({"instruction": ["great film " * 60, "film"], "output": ["so warm", "warm"]})
    examples = task.prepare(table, tiny_bert, {"instruction": "instruction", "output": "output"}, keep=())
    assert len(examples.inputs["input_ids"][0]) == 64
    cut, whole = task.samples(model, examples, [0, 1], tiny_bert)
    assert cut.reference == "so warm"
    assert len(cut.prompt.split()) <= 33
    assert "film" in whole.prompt


def test_pictures_of_another_size_than_the_models(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    vit = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "vit")
    rows = [{"image": np.full((8, 8), 9 * k).tolist(), "label": "ab"[k % 2]} for k in range(20)]
    (tmp_path / "grey.json").write_text(json.dumps(rows))
    config = make(
        "task.name=image-classification", "adapter.targets=q_proj", base=tmp_path / "vit", data=tmp_path / "grey.json"
    )
    with raises(DataError, "examples-not-computable"):
        open_workspace(config)


# ------------------------------------------------------------------------------------------------ a model's files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "pointer": (
        "model.safetensors",
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model-not-loadable",
        "git-lfs",
    ),
    "page": (
        "model.safetensors",
        lambda p: p.write_text("<!DOCTYPE html><html>404</html>"),
        "model-not-loadable",
        "web page",
    ),
    "empty": ("model.safetensors", lambda p: p.write_bytes(b""), "model-not-loadable", "model.safetensors is empty"),
    "cut": ("model.safetensors", cut, "model-not-loadable", "model.safetensors is cut short"),
    "head": ("model.safetensors", flipped, "model-not-loadable", "model.safetensors"),
    "few": ("model.safetensors", lambda p: p.write_bytes(b"abc"), "model-not-loadable", "model.safetensors is damaged"),
    "config": ("config.json", lambda p: p.write_text("{"), "tokenizer-not-loadable", "config.json is no JSON"),
    "config page": (
        "config.json",
        lambda p: p.write_text("<html>"),
        "tokenizer-not-loadable",
        "config.json is a web page",
    ),
    "tokens": ("tokenizer.json", cut, "tokenizer-not-loadable", "tokenizer.json is no JSON"),
    "tokens pointer": (
        "tokenizer.json",
        lambda p: p.write_text("version https://git-lfs.github.com"),
        "tokenizer-not-loadable",
        "git-lfs",
    ),
    "other tokens": ("tokenizer.json", lambda p: p.write_text("{}"), "tokenizer-not-loadable", "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_model_is_named(
    damage: str, make: Callable[..., RunConfig], tiny_bert: Path, tmp_path: Path
) -> None:
    name, harm, code, named = DAMAGES[damage]
    shutil.copytree(tiny_bert, tmp_path / "base")
    harm(tmp_path / "base" / name)
    with raises(FedloraError, code, named):
        open_workspace(make(base=tmp_path / "base"))


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name: str, make: Callable[..., RunConfig]) -> None:
    with raises(AssetError, "no-such-folder", f"'{name}'"):
        Checkpoint.of(make(f"model.name={name}").model)


def test_a_name_that_is_nothing_here_says_so_before_the_hubs_words(make: Callable[..., RunConfig]) -> None:
    with raises(ModelError, "tokenizer-not-loadable", "'all-MiniLM-L6-v2'"):
        open_workspace(make("model.name=all-MiniLM-L6", "data.source=no.csv"))  # before any data are read


@pytest.mark.slow
def test_layers_can_be_chosen_in_models_with_experts(tmp_path: Path, tiny_bert: Path) -> None:
    """PEFT reduces full names of such models to their last parts, and would adapt all layers."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    config = transformers.MixtralConfig(
        vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    (base / "model.safetensors").unlink()
    transformers.MixtralForCausalLM(config).save_pretrained(base)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"great film {'so ' * k}"}) + "\n" for k in range(8)))
    text = f"""name='moe'
    output='{tmp_path}'
    rounds=1
    model.name='{base}'
    adapter={{targets=['q_proj'], layers='top:1'}}
    task={{name='causal-lm', format='text'}}
    data={{source='{tmp_path}/t.jsonl', test_fraction=0.3}}
    partition.clients=2
    train.steps=1
    runtime={{threads=1, kernels='off'}}"""
    (tmp_path / "moe.toml").write_text(text)
    succeeds("run", tmp_path / "moe.toml", "-q")
    assert open_workspace(parse_config(text)).base.targets == ("model.layers.1.self_attn.q_proj",)
