"""Assets that are made from what was downloaded: GGUF files, conversations, digits, a pre-trained transformer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.assets import ASSETS, fetch
from fedlora.assets._made import chitchat_rows, digits_rows
from fedlora.assets.gguf import GgufFile, read_gguf, write_llama, write_safetensors
from fedlora.assets.vit import pretrain

DRAW = np.random.default_rng(0)


def gguf(path: Path, facts: dict[str, tuple[int, Any]], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Path:
    """A GGUF file of version 3; shapes innermost first, as in the file."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(kind: int, what: Any) -> bytes:
        if kind == 8:
            return text(what)
        if kind == 9:
            return struct.pack("<IQ", 8, len(what)) + b"".join(text(item) for item in what)
        return struct.pack({4: "<I", 6: "<f", 7: "<?"}[kind], what)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    for name, (kind, what) in facts.items():
        head += text(name) + struct.pack("<I", kind) + value(kind, what)
    body = b""
    for name, (shape, kind, raw) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


def test_block_formats_are_read_as_their_definition_says(tmp_path: Path) -> None:
    blocks, expected = {"Q4_1": b"", "Q8_0": b""}, {"Q4_1": [], "Q8_0": []}
    for _ in range(4):
        scale, least = (np.float16(x) for x in DRAW.normal(size=2))
        numbers = DRAW.integers(0, 16, 32)
        # Byte j holds value j in its low half and value j + 16 in its high half.
        packed = bytes(int(numbers[j]) | int(numbers[j + 16]) << 4 for j in range(16))
        blocks["Q4_1"] += scale.tobytes() + least.tobytes() + packed
        expected["Q4_1"] += [float(scale) * int(q) + float(least) for q in numbers]
        signed = DRAW.integers(-128, 128, 32).astype(np.int8)
        blocks["Q8_0"] += scale.tobytes() + signed.tobytes()
        expected["Q8_0"] += [float(scale) * int(q) for q in signed]
    plain = DRAW.normal(size=6).astype(np.float32)
    tensors = {
        "a": ((32, 4), 3, blocks["Q4_1"]),
        "b": ((64, 2), 8, blocks["Q8_0"]),
        "c": ((3, 2), 0, plain.tobytes()),
        "d": ((3, 2), 1, plain.astype(np.float16).tobytes()),
    }
    file = gguf(tmp_path / "x.gguf", {"name": (8, "é"), "on": (7, True), "words": (9, ["a", "b"])}, tensors)
    found = read_gguf(file)
    assert found.facts == {"name": "é", "on": True, "words": ["a", "b"]}
    np.testing.assert_allclose(found.tensors["a"], np.reshape(expected["Q4_1"], (4, 32)), atol=1e-6)
    np.testing.assert_allclose(found.tensors["b"], np.reshape(expected["Q8_0"], (2, 64)), atol=1e-6)
    np.testing.assert_array_equal(found.tensors["c"], plain.reshape(2, 3))
    np.testing.assert_allclose(found.tensors["d"], plain.reshape(2, 3), atol=2e-3)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ValueError, match="no GGUF file"):
        read_gguf(tmp_path / "x")
    with pytest.raises(ValueError, match="format 12"):
        read_gguf(gguf(tmp_path / "y", {}, {"a": ((256,), 12, bytes(144))}))
    facts = {"general.architecture": "gemma", "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    with pytest.raises(ValueError, match="gemma/llama/default"):
        write_llama(GgufFile(facts, {}), tmp_path)


def test_safetensors_hold_the_nearest_bfloat16(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    values = DRAW.normal(size=(7, 5)).astype(np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0], dtype=np.float32)  # halfway between two neighbours
    write_safetensors({"b": values, "a": ties}, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    for name, given in (("a", ties), ("b", values)):
        assert torch.equal(found[name], torch.from_numpy(given).to(torch.bfloat16))


def test_a_llama_comes_back_from_gguf(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(str, range(10)), "Ġ", "a", "b", "ab", "Ġab"]
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, rope_theta=1e4, initializer_range=0.3,
        rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {}
    for name, value in model.state_dict().items():
        part, array = name.removesuffix(".weight"), value.numpy()
        if part.startswith("model.layers."):
            _, _, layer, inner = part.split(".", 3)
            if inner.endswith(("q_proj", "k_proj")):  # llama.cpp's own order: the halves of a head interleaved
                heads = 4 if inner.endswith("q_proj") else 2
                array = array.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(array.shape)
            part = f"blk.{layer}.{names[inner]}"
        elif part == "lm_head":
            continue
        else:
            part = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[part]
        tensors[f"{part}.weight"] = (array.shape[::-1], 0, np.ascontiguousarray(array).tobytes())
    kinds = [3, 3, 3] + [1] * (len(words) - 3)
    facts: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 64, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 1e4, "llama.rope.dimension_count": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }  # fmt: skip

    def typed(value: Any) -> tuple[int, Any]:
        return ({str: 8, list: 9, int: 4, float: 6}[type(value)], value)

    file = gguf(tmp_path / "x.gguf", {name: typed(value) for name, value in facts.items()}, tensors)
    read = read_gguf(file)
    write_llama(GgufFile({**read.facts, "tokenizer.ggml.token_type": kinds}, read.tensors), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[3, 5, 14, 16, 2, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>ab ab12b<|im_end|>")["input_ids"]) == [
        "<|im_start|>", "ab", "Ġab", "1", "2", "b", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("ab ab12b")["input_ids"]) == "ab ab12b"
    assert tokenizer.chat_template == facts["tokenizer.chat_template"]


def test_an_answer_is_what_the_next_turn_says() -> None:
    def turn(person: str, *texts: str) -> list[dict[str, str]]:
        return [{"text": text, "sender": person * 9} for text in texts]

    talk = [turn("a", "Hello", "How are  you?"), turn("b", "fine\n"), turn("a", " "), turn("b", "so"), turn("a", "x")]
    long = [turn("a", "y" * 2001), turn("b", "no"), turn("a", "yes")]
    rows = list(chitchat_rows({"c" * 9: {"messages": talk}, "d" * 9: {"messages": long}}))
    common = {"conversation": "c" * 8}
    assert rows == [
        {"prompt": "Hello How are you?", "answer": "fine", "person": "b" * 8, **common},
        {"prompt": "so", "answer": "x", "person": "a" * 8, **common},
        {"prompt": "no", "answer": "yes", "person": "a" * 8, "conversation": "d" * 8},
    ]


def test_pictures_for_pretraining_are_kept_from_everything_else() -> None:
    lines = [
        ",".join([*(str((number + place) % 256) for place in range(784)), str(number % 10)]) for number in range(2500)
    ]
    seen, rest = (list(digits_rows(lines, seen=flag)) for flag in (True, False))
    assert [sum(row["label"] == digit for row in seen) for digit in range(10)] == [200] * 5 + [0] * 5
    assert [sum(row["label"] == digit for row in rest) for digit in range(10)] == [50] * 5 + [250] * 5
    assert np.array(seen[0]["image"]).reshape(-1).tolist() == [place % 256 for place in range(784)]


def test_pretraining_learns_and_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.assets import vit

    monkeypatch.setattr(vit, "EPOCHS", 6)
    labels = [number % 2 for number in range(40)]
    images = DRAW.integers(0, 60, (40, 28, 28))
    images[np.array(labels) == 1, 5:15] += 150
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(files))
        assert pretrain(list(images), labels, tmp_path / name) < 0.3
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.json"} <= files[0].keys()
    assert json.loads(files[0]["recipe.json"])["pictures"] == 40


def test_only_small_assets_are_fetched_unasked() -> None:
    assert {name for name, asset in ASSETS.items() if asset.needed} == {"all-MiniLM-L6-v2", "vader"}


@pytest.mark.slow
def test_the_chat_model_says_what_the_capital_of_france_is() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = fetch("SmolLM2-135M-Instruct")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])


@pytest.mark.slow
def test_the_small_transformer_knows_digits_that_it_has_not_seen() -> None:
    from transformers import AutoModelForImageClassification

    from fedlora.tasks import Table
    from fedlora.tasks.image_classification import ImageClassification

    rows = [json.loads(line) for line in fetch("digits").read_text().splitlines()]
    rows = [row for row in rows if row["label"] < 5]
    assert len(rows) == 1500
    path, task = fetch("digits-vit"), ImageClassification()
    table = Table({name: [row[name] for row in rows] for name in ("image", "label")})
    examples = task.prepare(table, path, {"image": "image", "label": "label"}, keep=())
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    with torch.no_grad():
        found = task.measure(model, task.collate(examples, range(len(rows))))
    assert float(found["correct"].mean()) > 0.9
