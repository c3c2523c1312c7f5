"""A whole model as one GGUF file, for llama.cpp and what is built on it.

Layout as in llama.cpp's convert_hf_to_gguf.py, which its own packages do not have: names by the package `gguf`, query
and key rows of Llama in the order of interleaved rotary pairs. Families and tokenizers that are not here are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import ExportError

GGUF = "model.gguf"
PERMUTED = {"llama": True, "qwen2": False}
"""model_type -> whether rows of queries and keys change places; the architectures that are known here."""
INSTEAD = "export it with --format merged and run llama.cpp's convert_hf_to_gguf.py on the folder"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS = {_WORDS[0] + r"\p{N}" + _WORDS[1]: "qwen2", _WORDS[0] + r"\p{N}{1,3}" + _WORDS[1]: "llama-bpe"}
"""Regular expression of a tokenizer's first split -> llama.cpp's name of it."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


def to_gguf(folder: Path) -> None:
    """Write `model.gguf` out of a folder of transformers' files, and remove these.

    Args:
        folder: With config.json, *.safetensors and tokenizer.json.

    Raises:
        ExportError: The architecture or the tokenizer is not known here.
    """
    import gguf

    config = json.loads((folder / "config.json").read_bytes())
    kind = config["model_type"]
    if kind not in PERMUTED:
        raise ExportError(
            f"no GGUF is written of {kind!r} models here, but of {', '.join(PERMUTED)}: {INSTEAD}", code="no-gguf"
        )
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ExportError(f"no GGUF is written of scaled rotary positions here: {INSTEAD}", code="no-gguf")
    writer = gguf.GGUFWriter(folder / GGUF, kind)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    per_head = config.get("head_dim") or width // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(per_head)
    writer.add_vocab_size(config["vocab_size"])
    if per_head * heads != width:
        writer.add_key_length(per_head)
        writer.add_value_length(per_head)
    _add_tokenizer(writer, folder, config)
    _add_tensors(writer, folder, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != GGUF:
            path.unlink()


def _add_tensors(writer: Any, folder: Path, config: Mapping[str, Any], kind: str) -> None:
    import gguf

    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, value in _tensors(folder):
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ExportError(f"GGUF has no name for the tensor {name!r}: {INSTEAD}", code="no-gguf")
        layer = name.split(".")[-2]
        if PERMUTED[kind] and layer in heads:
            value = _interleaved(value, heads[layer])
        exact = value.to(torch.float32).contiguous().numpy()
        to = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(value.dtype, "F32") if value.ndim > 1 else "F32"
        form = gguf.GGMLQuantizationType[to]
        writer.add_tensor(mapped, gguf.quants.quantize(exact, form), raw_dtype=form)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def _interleaved(value: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves, as transformers rotates them, to neighbours, as llama.cpp does."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _add_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Tokens with their kinds, merges, special tokens and chat template."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ExportError(f"the model's tokenizer is none of the package tokenizers: {INSTEAD}", code="no-gguf")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())  # as it was used: its class may add to tokenizer.json
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(whole))
    tokens = {number: token for token, number in whole["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for added in whole.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    every = range(max(config["vocab_size"], max(tokens) + 1))
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in every])
    writer.add_token_types([kinds.get(number, UNUSED) for number in every])
    merges = whole["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            add(number)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split_of(whole: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer cuts a text before its merges."""
    before = whole.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if whole["model"]["type"] == "BPE" and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(parts[0]["pattern"].get("Regex"))) is not None:
            return name
    raise ExportError(f"llama.cpp's name of this tokenizer is not known here: {INSTEAD}", code="no-gguf")
