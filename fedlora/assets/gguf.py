"""A Llama-like model from a GGUF file, written as the folder that `from_pretrained` reads.

Reads what the named models need and refuses the rest. NumPy alone: the result is the same bytes on every machine, so
that the folder has hashes of its own.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Block formats as in ggml-quants.c
(`dequantize_row_q4_1`, `dequantize_row_q8_0`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
BLOCK = 32  # values that share a scale


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds.

    Args:
        facts: its key-value part.
        tensors: name -> values in float32, of the shape that torch would give them.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Array]


def read_gguf(path: Path) -> GgufFile:
    """Read a whole file.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, or holds a tensor format other than F32, F16, Q4_1 and Q8_0.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _scalar(file, "<I") not in (2, 3):
            raise ValueError("it is no GGUF file of version 2 or 3")
        tensor_count, fact_count = _scalar(file, "<Q"), _scalar(file, "<Q")
        facts = {_string(file): _value(file, _scalar(file, "<I")) for _ in range(fact_count)}
        entries = []
        for _ in range(tensor_count):
            name = _string(file)
            shape = tuple(_scalar(file, "<Q") for _ in range(_scalar(file, "<I")))[::-1]  # innermost comes first
            entries.append((name, shape, _scalar(file, "<I"), _scalar(file, "<Q")))
        alignment = facts.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    return GgufFile(facts, {name: _values(raw, start + at, shape, kind, name) for name, shape, kind, at in entries})


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "<Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, count = _scalar(file, "<I"), _scalar(file, "<Q")
        return [_value(file, inner) for _ in range(count)]
    if kind not in _SCALARS:
        raise ValueError(f"a GGUF value of the unknown type {kind}")
    return _scalar(file, _SCALARS[kind])


def _values(raw: Array, start: int, shape: tuple[int, ...], kind: int, name: str) -> Array:
    count = int(np.prod(shape))

    def part(bytes_per_block: int) -> Array:
        blocks = count // BLOCK
        return raw[start : start + blocks * bytes_per_block].reshape(blocks, bytes_per_block)

    if kind == 0:
        return raw[start : start + 4 * count].view("<f4").reshape(shape).astype(np.float32)
    if kind == 1:
        return raw[start : start + 2 * count].view("<f2").reshape(shape).astype(np.float32)
    if kind == 3:  # Q4_1: scale d and minimum m in half precision, then 32 four-bit numbers q: d q + m
        block = part(20)
        scale, least = (block[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
        numbers = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], axis=1)
        return (numbers.astype(np.float32) * scale + least).reshape(shape)
    if kind == 8:  # Q8_0: scale d in half precision, then 32 signed bytes q: d q
        block = part(34)
        scale = block[:, :2].copy().view("<f2").astype(np.float32)
        return (block[:, 2:].copy().view(np.int8).astype(np.float32) * scale).reshape(shape)
    raise ValueError(f"tensor {name!r} has the GGUF format {kind}, which is not read here")


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_llama(source: GgufFile, folder: Path) -> None:
    """Write config, weights (bfloat16) and tokeniser of a Llama with a byte-level BPE tokeniser into a folder.

    Raises:
        ValueError: the file holds another architecture or tokeniser.
    """
    facts = source.facts
    kind = (facts["general.architecture"], facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"it holds {'/'.join(kind)}, and only llama/gpt2/smollm is read here")
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    weights = {}
    for name, value in source.tensors.items():
        part, values = name.removesuffix(".weight"), value
        if part.startswith("blk."):
            _, layer, inner = part.split(".")
            if inner in ("attn_q", "attn_k"):
                values = _halves(value, heads if inner == "attn_q" else kv_heads)
            weights[f"model.layers.{layer}.{_LAYER_NAMES[inner]}.weight"] = values
        else:
            weights[f"{_NAMES[part]}.weight"] = values
    ids = {role: facts[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos")}
    ids["pad"] = facts.get("tokenizer.ggml.padding_token_id", ids["eos"])
    _write_json(folder / "config.json", _llama_config(facts, ids, tied="lm_head.weight" not in weights))
    token_ids = {f"{role}_token_id": number for role, number in ids.items()}
    _write_json(folder / "generation_config.json", token_ids)
    write_safetensors(weights, folder / "model.safetensors")
    _write_tokenizer(facts, folder)


def _halves(value: Array, heads: int) -> Array:
    """GGUF interleaves the two halves of each head's rotary dimensions; transformers keeps one after the other."""
    rows, columns = value.shape
    return value.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _llama_config(facts: Mapping[str, Any], ids: Mapping[str, int], *, tied: bool) -> dict[str, Any]:
    hidden, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts.get("llama.rope.dimension_count", hidden // heads),
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        **{f"{role}_token_id": number for role, number in ids.items()},
    }


def _write_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    special = [number for number, kind in enumerate(kinds) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_again = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": number, "content": tokens[number], **flags} for number in special],
            "normalizer": None,
            # What llama.cpp calls "smollm": digits one by one, then GPT-2's splits.
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_again],
            },
            "post_processor": None,
            "decoder": {**bytes_again, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: number for number, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in facts["tokenizer.ggml.merges"]],
            },
        },
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{role}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": facts["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            **named,
        },
    )
    (folder / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], encoding="utf-8", newline="\n")


def write_safetensors(weights: Mapping[str, Array], path: Path) -> None:
    """Write float32 values as bfloat16, rounded to the nearest; tensors in the order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(weights):
        begin, end = end, end + 2 * weights[name].size
        header[name] = {"dtype": "BF16", "shape": list(weights[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in (_bfloat16(weights[name]) for name in sorted(weights)):
            file.write(part.tobytes())


def _bfloat16(values: Array) -> Array:
    """The upper halves of float32 values, rounded to the nearest with ties to even; of finite values."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded: Array = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype("<u2")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
