"""A base whose frozen linear layers are held in 4 or 8 bits, quantised by bitsandbytes while it is loaded.

"nf4" is QLoRA's 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3), "int8"
LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339). Heads, which are trained, the output layer, and layers that the
checkpoint does not hold stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fedlora.assets import Checkpoint
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, ModelError
from fedlora.model.targets import in_any

HEADS = ("classifier", "pre_classifier", "score", "cls")
"""What transformers calls the heads of classifiers."""
READ_BY_NAME = ("dt_proj", "DenseReluDense.wo")
"""Layers at whose weight a model's own code looks, past the layer: Mamba's multiplies by it, and LongT5's rounds what
goes in to its dtype, which would be whole numbers."""
SHOWN = 3


def quantization(config: RunConfig, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `model.quantize`; none where nothing is quantised.

    Args:
        config: of the run.
        model: to be loaded; its weights are not looked at.
        dtype: in which the layers compute.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if config.model.quantize is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantize = {config.model.quantize!r} needs bitsandbytes, which is not installed: pip install "
            "'fedlora[quantize]'",
            code="extra-missing",
        )
    from transformers import BitsAndBytesConfig

    output = getattr(model, "get_output_embeddings", lambda: None)()
    trained = tuple(f".{ending}" for ending in config.adapter.modules_to_save or ())
    whole = [*HEADS, *READ_BY_NAME]
    whole += [
        name for name, module in model.named_modules() if module is output or (trained and f".{name}".endswith(trained))
    ]
    if config.model.quantize == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=whole,
        )
    return {"quantization_config": how}


def unquantised(config: RunConfig) -> RunConfig:
    """The config of the same run on the whole weights."""
    return config.model_copy(update={"model": config.model.model_copy(update={"quantize": None})})


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is quantised already."""
    return checkpoint.config_value("quantization_config") is not None


def keep_whole(model: nn.Module, absent: Iterable[str]) -> None:
    """Put ordinary layers, with the weights that were drawn for them, where a model has quantised ones without weights.

    They are named in the model's own config as well, which says how it is loaded the next time.

    Args:
        model: as transformers loaded it, quantised.
        absent: names of the tensors that are not the checkpoint's.
    """
    how: Any = model.config.quantization_config  # type: ignore[union-attr]
    for name in sorted({name.rpartition(".")[0] for name in absent if name.endswith(".weight")}):
        layer = model.get_submodule(name)
        if not _is_quantised(layer):
            continue
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)  # type: ignore[arg-type]
        for inner, value in layer.named_parameters():
            setattr(plain, inner, nn.Parameter(value.data, requires_grad=False))
        model.set_submodule(name, plain)
        how.llm_int8_skip_modules = [*(how.llm_int8_skip_modules or ()), name]


def require_whole_heads(model: nn.Module, heads: Sequence[str], name: str) -> None:
    """Raise `ModelError` for a checkpoint that holds a head in few bits, which cannot be trained.

    Args:
        model: as loaded.
        heads: modules that are trained in full.
        name: of the model, for the message.
    """
    for inner, value in model.named_parameters():
        if in_any(inner, heads) and not value.is_floating_point():
            raise ModelError(
                f"the checkpoint {name!r} holds {inner} as {str(value.dtype).removeprefix('torch.')}, and a head is "
                "trained in full: name the checkpoint that it was made from, with model.quantize = 'nf4', which leaves "
                "heads whole",
                code="head-quantised",
            )


def note_of(config: RunConfig, model: nn.Module) -> str | None:
    """What is to be said where most weights of a model stay whole, such as a mixture's experts; None elsewhere.

    Raises:
        ModelError: nothing is quantised.
    """
    if config.model.quantize is None:
        return None
    small = [name for name, module in model.named_modules() if _is_quantised(module)]
    if not small:
        raise ModelError(
            f"model.quantize = {config.model.quantize!r} holds layers of torch's class Linear in fewer bits, and "
            f"{type(model).__name__} has none beside its head: remove it",
            code="nothing-to-quantise",
        )
    inside, rest = 0, {}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, value in model.named_parameters():
        if name.rpartition(".")[0] in small:
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            inside += layer.in_features * layer.out_features if name.endswith(".weight") else value.numel()
        elif id(value) not in embeddings:
            rest[name] = value.numel()
    if inside >= sum(rest.values()):
        return None
    largest = sorted(rest, key=lambda name: -rest[name])[:SHOWN]
    return (
        f"model.quantize = {config.model.quantize!r} reaches {inside:,} of {inside + sum(rest.values()):,} parameters "
        f"outside of embeddings; whole stay what is no linear layer and the output, such as {', '.join(largest)}"
    )


def holds_int8(model: nn.Module) -> bool:
    """Whether a model has layers of LLM.int8(), be it that its checkpoint was quantised so.

    They compute a column in another way for all rows of a batch where one of them is large (on GPUs).
    """
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from laying weights out anew when they are first used in evaluation on some CPUs.

    It computes in bfloat16 then, whatever was asked for, and has no backward pass any more (as of 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def own_dtype(model: nn.Module, wanted: torch.dtype) -> torch.dtype:
    """The dtype in which a quantised model computes: that of what is whole, whatever was asked for."""
    if not getattr(model, "is_quantized", False):
        return wanted
    whole = (module for module in model.modules() if isinstance(module, nn.Embedding | nn.LayerNorm))
    floating = (value for module in whole for value in module.parameters() if value.is_floating_point())
    return next((value.dtype for value in floating), wanted)
