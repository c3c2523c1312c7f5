"""An export says what was trained when transformers and PEFT load it alone, and one that does not is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from support.command_line import invoke
from support.errors import raises
from support.tiny import write_tiny_toml
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import BaseUpdate
from fedlora.config import AdapterConfig, ModelConfig, RunConfig, RuntimeConfig
from fedlora.errors import ExportError
from fedlora.model import Base, Reference, load_base, plain, save_adapter, save_merged, verify_adapter, verify_merged
from fedlora.runs.rundir import RunDir
from fedlora.speedups.last_layer import skip_unread
from fedlora.training import export as exporting
from fedlora.training import workspace

pytestmark = pytest.mark.verified


CPU = torch.device("cpu")
IDS = torch.tensor([[2, 9, 30, 41, 3, 0], [2, 50, 51, 52, 53, 3]])
TOKENS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
WORDS = {"vocab_size": 60, "max_position_embeddings": 32}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"initializer_range": 0.3}


def load(path: Path, dtype: str = "float32", auto_class: str = "SequenceClassification", **adapter: Any) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(path), dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(**{"rank": 4, **adapter}),
        runtime=RuntimeConfig(device="cpu"),
    )
    kwargs: dict[str, Any] = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}
    head: tuple[str, ...] = ("classifier", "score")
    if auto_class == "SequenceClassification":
        kwargs["pad_token_id"] = 0
    if auto_class == "CausalLM":
        kwargs, head = {}, ()
    kind = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}.get(auto_class)
    return load_base(config, f"AutoModelFor{auto_class}", head, kwargs, kind)


def trained(base: Base) -> AdapterState:
    """An adapter that changes the logits a lot."""
    generator = torch.Generator().manual_seed(0)

    def like(value: Tensor) -> Tensor:
        return value + torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3

    first = base.initial_adapter(0)
    pairs = {name: LoraPair(like(pair.A), like(pair.B), pair.scale) for name, pair in first.pairs.items()}
    return AdapterState(pairs, {name: like(value) for name, value in first.dense.items()})


def reference(
    base: Base, state: AdapterState, inputs: dict[str, Tensor] = TOKENS, log: tuple[BaseUpdate, ...] = ()
) -> Reference:
    base.rebase(len(log), log)
    base.write(state, frozenset())
    base.train_mode(False)
    found = Reference.of(base.model, [inputs, {name: value[:1] for name, value in inputs.items()}], CPU)
    base.rebase(0, ())
    return found


def saved(kind: str, path: Path, **config: Any) -> Path:
    """A random model of a family that transformers saved."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        name, _, what = kind.partition("/")
        model = getattr(transformers, f"{name}{what}")(getattr(transformers, f"{name}Config")(**config))
        model.save_pretrained(path)
    return path


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert/ForMaskedLM": ("SequenceClassification", {**WORDS, **SMALL, **WIDE}),  # lacks the pooler
    "DebertaV2/Model": ("SequenceClassification", {**WORDS, **SMALL, **WIDE, "relative_attention": True}),  # too
    "Electra/Model": ("SequenceClassification", {**WORDS, **SMALL, **WIDE, "embedding_size": 16}),
    "ModernBert/Model": (
        "SequenceClassification",
        {**WORDS, **SMALL, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "GPT2/Model": ("SequenceClassification", {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, **WIDE}),
    "Llama/ForCausalLM": ("SequenceClassification", {**WORDS, **SMALL, **WIDE}),
    "Qwen2/ForCausalLM": (
        "CausalLM",
        {**WORDS, **SMALL, **WIDE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "ViT/Model": ("ImageClassification", {**SMALL, **WIDE, "image_size": 8, "patch_size": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_exports_what_it_trained(kind: str, dtype: str, tmp_path: Path) -> None:
    auto_class, config = FAMILIES[kind]
    base = load(saved(kind, tmp_path / "base", **config), dtype, auto_class, targets=("all-linear",))
    state = trained(base)
    images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    wanted = reference(base, state, images if "ViT" in kind else TOKENS)
    save_adapter(base, state, tmp_path / "adapter", {})
    verify_adapter(tmp_path / "adapter", base.recipe, wanted, CPU)
    save_merged(base, state, (), tmp_path / "merged")
    verify_merged(tmp_path / "merged", base.recipe, wanted, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "pissa", "rslora", "ia3", "vera", "randlora"])
def test_other_methods_export_what_they_trained(tiny_bert: Path, tmp_path: Path, method: str) -> None:
    base = load(tiny_bert, method=method, **({} if method not in ("ia3",) else {"rank": 8}))
    first = base.initial_adapter(0)
    log = base.initial_base_updates(first)
    state = trained(base)
    wanted = reference(base, state, log=log)
    save_merged(base, state, log, tmp_path / "merged")
    verify_merged(tmp_path / "merged", base.recipe, wanted, CPU)
    if not log:
        save_adapter(base, state, tmp_path / "adapter", {})
        assert verify_adapter(tmp_path / "adapter", base.recipe, wanted, CPU) < 1e-5


# ---------------------------------------------------------------------------------------------- what is refused


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


BROKEN: dict[str, Callable[[Path], None]] = {
    "another scale": lambda folder: change_config(folder, lora_alpha=1),
    "no pooler": lambda folder: (
        change_tensors(folder, without("pooler")),
        change_config(folder, modules_to_save=["classifier"]),
    )[0],
    "no classifier": lambda folder: change_tensors(folder, without("classifier")),
    "one pair less": lambda folder: change_tensors(folder, without("layer.1.attention.self.query")),
    "a pair that nobody uses": lambda folder: change_config(folder, target_modules=["query"]),
    "classes exchanged": lambda folder: change_tensors(
        folder, lambda tensors: {n: v.flip(0).contiguous() if "classifier" in n else v for n, v in tensors.items()}
    ),
    "numbers that are none": lambda folder: change_tensors(
        folder, lambda tensors: {n: v * float("nan") if "classifier" in n else v for n, v in tensors.items()}
    ),
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
}
CODES = {
    "another scale": "logits-differ",
    "no pooler": "logits-differ",
    "no classifier": "export-not-loadable",
    "one pair less": "tensors-missing",
    "a pair that nobody uses": "tensor-unused",
    "classes exchanged": "logits-differ",
    "numbers that are none": "tensor-unused",
    "no config": "export-not-loadable",
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_faulty_adapter_is_refused(tmp_path: Path, fault: str, dtype: str) -> None:
    base = load(saved("Bert/ForMaskedLM", tmp_path / "base", **WORDS, **SMALL, **WIDE), dtype)
    state = trained(base)
    wanted = reference(base, state)
    folder = tmp_path / "adapter"
    save_adapter(base, state, folder, {})
    verify_adapter(folder, base.recipe, wanted, CPU)
    BROKEN[fault](folder)
    with raises(ExportError, CODES[fault]):
        verify_adapter(folder, base.recipe, wanted, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_told_from_a_fault_by_a_wider_dtype(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plain.TOLERANCE, getattr(torch, dtype), 1e-12)
    base = load(saved("Bert/ForMaskedLM", tmp_path / "base", **WORDS, **SMALL, **WIDE), dtype)
    skip_unread(base.model)  # products of other shapes than the plain model's, which round otherwise
    state = trained(base)
    wanted = reference(base, state)
    save_adapter(base, state, tmp_path / "adapter", {})
    assert verify_adapter(tmp_path / "adapter", base.recipe, wanted, CPU) > 1e-12
    BROKEN["another scale"](tmp_path / "adapter")
    with raises(ExportError, "logits-differ"):
        verify_adapter(tmp_path / "adapter", base.recipe, wanted, CPU)


def test_a_faulty_merged_model_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    base = load(tiny_bert)
    state = trained(base)
    wanted = reference(base, state)
    save_merged(base, AdapterState(dict(base.initial_adapter(0).pairs), state.dense), (), tmp_path / "unmerged")
    with raises(ExportError, "logits-differ"):
        verify_merged(tmp_path / "unmerged", base.recipe, wanted, CPU)
    save_merged(base, state, (), tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if "pooler" not in n}, path, {"format": "pt"})
    with raises(ExportError, "tensors-differ", "pooler"):
        verify_merged(tmp_path / "merged", base.recipe, wanted, CPU)


def test_loading_for_the_comparison_leaves_the_random_numbers_alone(tiny_bert: Path, tmp_path: Path) -> None:
    base = load(tiny_bert)
    state = trained(base)
    wanted = reference(base, state)
    save_adapter(base, state, tmp_path / "adapter", {})
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    verify_adapter(tmp_path / "adapter", base.recipe, wanted, CPU)
    assert torch.equal(torch.rand(4), expected)


def test_the_python_in_the_readme_gives_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(saved("GPT2/ForSequenceClassification", tmp_path / "base", num_labels=5, **FAMILIES["GPT2/Model"][1]))
    assert base.recipe.options["ignore_mismatched_sizes"], "five classes there and three here"
    state = trained(base)
    wanted = reference(base, state)
    save_adapter(base, state, tmp_path / "this folder", {})
    text = (tmp_path / "this folder" / "README.md").read_text()
    assert "0 = a, 1 = b, 2 = c" in text
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert wanted.difference(names["model"], CPU) < 1e-6


# ---------------------------------------------------------------------------------------------- a merged model's rest


def test_a_merged_model_keeps_what_is_no_weight(tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = saved("Llama/ForCausalLM", tmp_path / "base", **WORDS, **SMALL, **WIDE, tie_word_embeddings=True)
    for path in tiny_bert.glob("tokenizer*"):
        shutil.copyfile(path, source / path.name)
    # Not valid together, as many a published file: greedy, with settings for sampling.
    GenerationConfig(eos_token_id=[3, 4], max_new_tokens=7, repetition_penalty=1.3).save_pretrained(source)
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.6, "top_p": 0.9}))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(template + "!")
    base = load(source, "bfloat16", "CausalLM")
    save_merged(base, trained(base), (), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.generation_config.eos_token_id == [3, 4]
    for name in ("generation_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (source / name).read_bytes()
    tokenizer, own = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "merged", source))
    assert tokenizer.get_vocab() == own.get_vocab()
    assert tokenizer.chat_template == own.chat_template
    assert AutoConfig.from_pretrained(tmp_path / "merged").architectures == ["LlamaForCausalLM"]


def test_generation_settings_in_a_models_config_are_kept_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = saved("Llama/ForCausalLM", tmp_path / "base", **WORDS, **SMALL, eos_token_id=5)
    (source / "generation_config.json").unlink(missing_ok=True)
    base = load(source, auto_class="CausalLM")
    wanted = base.model.generation_config.eos_token_id  # type: ignore[union-attr]
    save_merged(base, base.initial_adapter(0), (), tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id
    assert found == wanted == 5


# ---------------------------------------------------------------------------------------------- whole runs


Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, tiny_bert: Path, tiny_csv: Path) -> Cli:
    path = write_tiny_toml(tmp_path, tiny_bert, tiny_csv)

    def call(command: str, *words: object) -> Result:
        given = [path, "--quiet", "--set", "rounds=1", "--set", "train.lr=0.05"] if command == "run" else []
        return invoke(command, *given, *words, env={"COLUMNS": "200"})

    return call


@pytest.mark.slow
def test_a_run_that_cannot_verify_its_adapter_ends_as_an_error_and_keeps_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(base: Base, state: AdapterState, folder: Path, metadata: dict[str, Any], *more: Any) -> None:
        save_adapter(base, state, folder, metadata, *more)
        change_config(folder, lora_alpha=1000)

    monkeypatch.setattr(exporting, "save_adapter", wrong)
    result = cli("run")
    run = RunDir.open(tmp_path / "runs" / "tiny")
    assert result.exit_code == 1, result.output
    assert "adapter.unverified" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not run.adapter_dir.exists()
    assert (run.path / "adapter.unverified" / "adapter_model.safetensors").is_file()
    written = run.read_json("result.json") or {}
    assert written["last"]["accuracy"] == run.read_metrics()[-1]["accuracy"]
    assert "differ" in written["export"]["error"]
    assert run.report.is_file()
    for words in (("evaluate", run.path), ("run", "--resume", run.path)):
        again = invoke(*words)
        assert again.exit_code == 1
        assert "fedlora export" in again.stderr
    refused = cli("export", run.path, tmp_path / "out")
    assert refused.exit_code == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unverified").is_dir()

    monkeypatch.undo()
    cured = cli("export", run.path, tmp_path / "out")
    assert cured.exit_code == 0, cured.output
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "out.unverified").exists()


@pytest.mark.slow
def test_a_run_checks_its_adapter_and_says_how_near_it_is(cli: Cli, tmp_path: Path) -> None:
    assert cli("run").exit_code == 0
    run = RunDir.open(tmp_path / "runs" / "tiny")
    assert 0 <= (run.read_json("result.json") or {})["export"]["logits_difference"] < 1e-5
    assert sorted(path.name for path in run.path.glob("adapter*")) == ["adapter"]
    result = cli("export", run.path, tmp_path / "merged", "--format", "merged")
    assert result.exit_code == 0, result.output
    assert "differ by at most" in result.stdout
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {
        "0": "negative",
        "1": "positive",
    }


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 1])
def test_a_base_that_was_changed_is_part_of_the_adapter_and_a_cut_is_stated(
    cli: Cli, tmp_path: Path, rank: int | None
) -> None:
    cut = ["--set", f"adapter.export_rank={rank}"] if rank else []
    result = cli("run", "--set", "strategy.name=flora", "--set", "clients.ranks=[4, 2, 1]", *cut)
    assert result.exit_code == 0, result.output
    written = RunDir.open(tmp_path / "runs" / "tiny").read_json("result.json") or {}
    assert written["export"]["logits_difference"] < 1e-4
    assert (written["relative_error"] > 1e-3) == (rank is not None)


@pytest.mark.slow
def test_where_two_bases_do_not_fit_the_runs_own_is_given_up(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "free_bytes", lambda _device: 0)
    loads: list[Any] = []
    monkeypatch.setattr(workspace, "load_base", lambda *wanted: (loads.append(wanted), load_base(*wanted))[1])
    workspace.close_workspace()
    assert cli("run", "--baselines").exit_code == 0, "what comes after loads it again"
    assert len(loads) == 2
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_config.json").is_file()
