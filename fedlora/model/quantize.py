"""A base whose frozen linear layers are held in 4 or 8 bits, quantised by bitsandbytes while it is loaded.

"nf4" is QLoRA's 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3), "int8"
LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339). Heads, which are trained, and the output layer stay whole.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fedlora.assets import Checkpoint
from fedlora.config import RunConfig
from fedlora.errors import ConfigError

WHOLE = ("lm_head", "embed_out", "output_layer", "classifier", "pre_classifier", "score", "cls", "qa_outputs")
"""What transformers calls heads and output layers."""


def quantization(config: RunConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `model.quantize`; none where nothing is quantised.

    Args:
        config: of the run.
        dtype: in which the layers compute.
        device: on which the weights are quantised, and stay.

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

    whole = [*WHOLE, *(config.adapter.modules_to_save or ())]
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
    return {"quantization_config": how, "device_map": {"": str(device)}}


def on_its_device(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a checkpoint that is quantised already: its weights stay where they are.

    Without them that is the first GPU, whatever `runtime.device` says.
    """
    import transformers

    with suppress(Exception):  # whoever loads the model says what is wrong with its config
        found = transformers.AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options)
        if getattr(found, "quantization_config", None) is not None:
            return {"device_map": {"": str(device)}}
    return {}


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
