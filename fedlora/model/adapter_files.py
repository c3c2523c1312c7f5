"""An adapter from PEFT's files as a state of a base, to be sent to clients: the inverse of `save_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.errors import ModelError
from fedlora.model.base_model import Base
from fedlora.model.export import PREFIX
from fedlora.model.peft_tuners import ADAPTER, saved_tensors
from fedlora.sanitize import clean_text

OF_EXPORT = {"task_type", "base_model_name_or_path", "revision", "target_modules", "modules_to_save", "inference_mode"}
OF_PAIRS = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "init_lora_weights", "fan_in_fan_out"}
"""Fields of PEFT's config that do not say what an adapter computes, and those that its pairs say."""


def read_adapter(base: Base, folder: Path) -> AdapterState:
    """The adapter in a folder, of any ranks.

    Args:
        base: Whose modules it is for, with the method that the adapter was trained by.
        folder: With adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: the files cannot be read, are of another method, or hold other tensors than the base trains.
    """
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {str(folder)!r} cannot be read: {clean_text(error, 200)}",
            code="adapter-not-loadable",
        ) from None
    _require_method(base, config, folder)

    own = saved_tensors(base.peft_model) | {PREFIX + name: value for name, value in base.random_tensors().items()}
    names = {value.data_ptr(): name for name, value in own.items()}  # some are saved under another name than they have

    def taken(name: str, parameter: Tensor | None = None) -> Tensor:
        key = PREFIX + name if parameter is None else names.get(parameter.data_ptr(), PREFIX + name)
        if (value := tensors.pop(key, None)) is None:
            raise ModelError(
                f"the adapter in {str(folder)!r} lacks {name!r}, which the federation's config trains: name its "
                "modules in adapter.targets and adapter.modules_to_save",
                code="tensors-missing",
            )
        return value.to(base.adapter_dtype)

    pairs: dict[str, LoraPair] = {}
    for name in base.pair_layers:
        A, B = taken(f"{name}.lora_A.weight"), taken(f"{name}.lora_B.weight")
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        pairs[name] = LoraPair(A, B, alpha / (len(A) ** 0.5 if base.method.root_scale else len(A)))
    dense = {name: taken(name, base.parameters[name]) for name in base.tensor_names(("dense",))}
    state = AdapterState(pairs, dense)
    base.require_fit(state)
    for name, value in tensors.items():  # what nobody trains: drawn by the tuner, or new beside the checkpoint
        if name not in own or not torch.equal(own[name].cpu().to(value.dtype), value):
            raise ModelError(
                f"the adapter in {str(folder)!r} holds {name.removeprefix(PREFIX)!r}, which is not so in the "
                "federation's model: name the adapter's modules in adapter.targets and adapter.modules_to_save",
                code="tensors-differ",
            )
    return state


def _require_method(base: Base, config: Any, folder: Path) -> None:
    """Raise `ModelError` unless PEFT's config says what the base's own says, up to what the tensors say."""
    mine, theirs = base.peft_model.peft_config[ADAPTER].to_dict(), config.to_dict()
    passed = OF_EXPORT | OF_PAIRS if base.method.pairs else OF_EXPORT
    for key in sorted(mine.keys() - passed):
        if _plain(mine[key]) != _plain(theirs.get(key)):
            raise ModelError(
                f"the adapter in {str(folder)!r} has {key} = {_plain(theirs.get(key))!r}, and the federation's "
                f"method {base.method.name!r} has {_plain(mine[key])!r}: set adapter.method as it was trained",
                code="method-differs",
            )


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, set | frozenset | tuple | list):
        return sorted(map(str, value))
    return getattr(value, "value", value)
