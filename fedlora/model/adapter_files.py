"""An adapter from PEFT's files as a state of a base, to be sent to clients: the inverse of `save_adapter`."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.errors import ModelError
from fedlora.model.base_model import Base
from fedlora.model.export import PREFIX
from fedlora.model.peft_tuners import ADAPTER, saved_tensors
from fedlora.model.targets import suffixes
from fedlora.sanitize import clean_text

WEIGHTS = "adapter_model.safetensors"

OF_EXPORT = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
}
"""Fields of PEFT's configs that do not say what an adapter computes, and those that the names of its tensors say."""
OF_PAIRS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_dropout"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "megatron_config", "megatron_core", "ensure_weight_tying", "qalora_group_size"),
}
"""More of them in the config of a LoRA variant: what the pairs say, what matters in training alone, and how they were
drawn, where that left the base as it was (`BASE_CHANGES`)."""
BASE_CHANGES = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of PEFT's `init_lora_weights` by which the base gives up what the adapter starts with."""
CURES = {
    "peft_type": "set adapter.method to the one that it was trained by",
    "use_dora": "set adapter.method = 'dora', or 'lora' for one without",
    "use_rslora": "set adapter.method = 'rslora', or 'lora' for one without",
    "bias": "biases stay frozen here: name an adapter that was trained with bias = 'none'",
}
AGAIN = "save it again with PEFT's save_pretrained, or name another"


def read_adapter(base: Base, folder: Path) -> AdapterState:
    """The adapter in a folder, of any ranks.

    Args:
        base: Whose modules it is for, with the method that the adapter was trained by.
        folder: With adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: the files cannot be read or hold what PEFT would not write, are of another method, hold other
            tensors than the base trains or values that are not finite in the federation's dtype, or go with weights
            that the base does not have.
    """
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"the adapter in {str(folder)!r} is a pickle, which may run code: load it with PEFT where you trust it, "
            "and save it again with safe_serialization=True",
            code="adapter-not-loadable",
        )
    try:
        given: dict[str, Any] = dict(json.loads((folder / "adapter_config.json").read_bytes()))
        _require_sound(given, folder)
        _require_base_as_it_was(given, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields that this PEFT does not know: `_require_method` looks at them
            config: Any = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the adapter in {str(folder)!r} cannot be read: {clean_text(error, 200)}",
            code="adapter-not-loadable",
        ) from None
    _require_method(base, given | config.to_dict(), folder)
    _require_finite(tensors, base.adapter_dtype, folder)
    own = saved_tensors(base.peft_model) | {PREFIX + name: value for name, value in base.random_tensors().items()}
    names = {value.data_ptr(): name for name, value in own.items()}  # some are saved under another name than they have
    if base.method.pairs:
        _require_targets(base, tensors, folder)

    def taken(name: str, parameter: Tensor | None = None) -> Tensor:
        key = PREFIX + name if parameter is None else names.get(parameter.data_ptr(), PREFIX + name)
        if (value := tensors.pop(key, None)) is None:
            raise ModelError(
                f"the adapter in {str(folder)!r} lacks {name!r}, which the federation's config trains: name in "
                "adapter.modules_to_save what the adapter holds, or train it with that module",
                code="tensors-missing",
            )
        return value.to(base.adapter_dtype)

    pairs: dict[str, LoraPair] = {}
    for name in base.pair_layers:
        A, B = taken(f"{name}.lora_A.weight"), taken(f"{name}.lora_B.weight")
        if A.ndim != 2 or B.ndim != 2 or not len(A) or len(A) != B.shape[1]:
            raise ModelError(
                f"the adapter in {str(folder)!r} has lora_A {list(A.shape)} and lora_B {list(B.shape)} at {name!r}, "
                f"which must be [rank, in] and [out, rank]: {AGAIN}",
                code="adapter-not-loadable",
            )
        alphas = config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
        pairs[name] = LoraPair(A, B, alpha / (len(A) ** 0.5 if base.method.root_scale else len(A)))
    dense = {name: taken(name, base.parameters[name]) for name in base.tensor_names(("dense",))}
    state = AdapterState(pairs, dense)
    base.require_fit(state)
    for name in base.random_tensors():
        if PREFIX + name not in tensors:
            raise ModelError(
                f"{base.config.name!r} holds no {name!r}, and the adapter in {str(folder)!r} not the one that it was "
                "trained over: name the model that it was trained on, or train it with that module in modules_to_save",
                code="tensors-missing",
            )
    for name, value in tensors.items():  # what nobody trains: drawn by the tuner, or new beside the checkpoint
        if name not in own or not torch.equal(own[name].cpu().to(value.dtype), value):
            raise ModelError(
                f"the adapter in {str(folder)!r} holds {name.removeprefix(PREFIX)!r}, which is not so in the "
                "federation's model: name the adapter's modules in adapter.targets and adapter.modules_to_save",
                code="tensors-differ",
            )
    return state


def _require_sound(theirs: Mapping[str, Any], folder: Path) -> None:
    """Raise `ModelError` unless PEFT knows the type, and every alpha is a finite positive number."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    def require(held: bool, field: str, value: object, wanted: str) -> None:
        if not held:
            raise ModelError(
                f"the adapter in {str(folder)!r} has {field} = {clean_text(repr(value), 80)} in its "
                f"adapter_config.json, which must be {wanted}: {AGAIN}",
                code="adapter-not-loadable",
            )

    kind, known = theirs.get("peft_type"), sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    require(kind in known, "peft_type", kind, "a method that the installed PEFT knows")
    if "lora_alpha" in theirs:
        require(_is_positive(theirs["lora_alpha"]), "lora_alpha", theirs["lora_alpha"], "a finite positive number")
    patterns = theirs.get("alpha_pattern")
    require(patterns is None or isinstance(patterns, dict), "alpha_pattern", patterns, "a table of module names")
    for name, alpha in (patterns or {}).items():
        require(_is_pattern(name), "alpha_pattern", name, "a table whose names are regular expressions")
        require(_is_positive(alpha), f"alpha_pattern[{clean_text(name)!r}]", alpha, "a finite positive number")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_pattern(name: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({name})$")  # as PEFT matches it
    except re.error:
        return False
    return True


def _require_base_as_it_was(theirs: Mapping[str, Any], folder: Path) -> None:
    """Raise `ModelError` for an adapter whose first values PEFT took out of the base."""
    kind = theirs.get("init_lora_weights")
    if isinstance(kind, str) and kind.lower().startswith(BASE_CHANGES):
        cure = (
            "save the base that it was trained on and name that in model.name, with init_lora_weights = true in "
            "adapter_config.json"
            if kind.lower() == "loftq"
            else "save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which "
            "makes it one of the base as it was"
        )
        raise ModelError(
            f"the adapter in {str(folder)!r} has init_lora_weights = {kind!r}, by which PEFT changed the base under "
            f"it: {cure}",
            code="base-changed",
        )


def _require_method(base: Base, theirs: Mapping[str, Any], folder: Path) -> None:
    """Raise `ModelError` unless PEFT's config says what the base's own says, up to what the tensors say."""
    mine, method = base.peft_model.peft_config[ADAPTER].to_dict(), base.method
    passed = OF_EXPORT | (OF_PAIRS if method.pairs else set())
    usual = "set adapter.method and adapter.options as it was trained"
    if method.pairs:
        usual = f"method {method.name!r} has nothing like it: name an adapter without it"
    for key in sorted((mine.keys() | theirs.keys()) - passed, key=lambda key: (key != "peft_type", key)):
        own, other = _plain(mine.get(key)), _plain(theirs.get(key))
        if own != other and (own or other):  # a field that a version of PEFT lacks is off there
            raise ModelError(
                f"the adapter in {str(folder)!r} has {key} = {other!r}, and the federation's method {method.name!r} "
                f"has {own!r}: {CURES.get(key, usual)}",
                code="method-differs",
            )


def _require_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Raise `ModelError` unless all values are finite in the dtype of the federation's adapter."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value.to(dtype)).all()):
            raise ModelError(
                f"the adapter in {str(folder)!r} holds values in {name.removeprefix(PREFIX)!r} that are not finite in "
                f"{str(dtype).removeprefix('torch.')}: name one whose training went well",
                code="adapter-not-finite",
            )


def _require_targets(base: Base, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise `ModelError` unless the adapter's pairs are on the base's adapted modules."""
    mark = ".lora_A.weight"
    theirs = {name.removeprefix(PREFIX).removesuffix(mark): None for name in tensors if name.endswith(mark)}
    lacking, odd = (
        next((name for name in one if name not in other), None)
        for one, other in ((base.pair_layers, theirs), (theirs, base.pair_layers))
    )
    one, other = sorted(suffixes(theirs)), sorted(suffixes(base.pair_layers))
    cure = f"set adapter.targets = {one}" if one != other else "set adapter.layers and model.name as it was trained"
    said = f"the adapter in {str(folder)!r} has pairs on {', '.join(one) or 'nothing'}"
    config = f"and the federation's config puts them on {', '.join(other)}: {cure}"
    if lacking is not None:
        raise ModelError(f"{said} (no {lacking + mark!r}), {config}", code="tensors-missing")
    if odd is not None:
        raise ModelError(f"{said} (also {odd + mark!r}), {config}", code="tensors-differ")


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, set | frozenset | tuple | list):
        return sorted(map(str, value))
    return getattr(value, "value", value)
