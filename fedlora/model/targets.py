"""Which modules get low-rank pairs and which are trained in full; what cannot be is refused here, with the cure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fedlora.config import AdapterConfig
from fedlora.errors import ConfigError, ModelError, nearest

ALL_LINEAR = "all-linear"


def resolve_targets(
    model: nn.Module, adapter: AdapterConfig, heads: Sequence[str], without: Sequence[str] = ()
) -> tuple[str, ...]:
    """Full names of the modules that get a pair, in the model's order.

    Args:
        model: the plain base model.
        adapter: whose `targets` are module names or their endings, or "all-linear"; empty for PEFT's default.
        heads: modules that are trained in full; nothing in them gets a pair.
        without: other modules in which nothing gets one: their weights are random, and no base to adapt.

    Raises:
        ModelError: a target names no module, or one that cannot carry a pair.
    """
    closed = (*heads, *without)
    outside = {n: m for n, m in model.named_modules() if n and not in_any(n, closed)}
    linear = [name for name, module in outside.items() if is_linear(module)]
    targets = adapter.targets or _default_targets(model, linear)
    if targets == (ALL_LINEAR,):
        output = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [name for name in linear if outside[name] is not output]
    elif isinstance(targets, str):  # PEFT's default is a regular expression for some architectures
        chosen = [name for name in outside if re.fullmatch(targets, name)]
    else:
        for target in targets:
            if not any(ends_with(name, target) for name in outside):
                if new := [n for n, _ in model.named_modules() if ends_with(n, target) and in_any(n, without)]:
                    raise ModelError(
                        f"adapter.targets names {target!r}, and the checkpoint holds no weights of {new[0]!r} to "
                        f"adapt: train it in full, with {target!r} in adapter.modules_to_save",
                        code="weights-missing",
                    )
                raise ModelError(
                    f"adapter.targets names {target!r}, and the model has no such module outside its head; "
                    f"{nearest(target, suffixes(linear))}",
                    code="no-such-module",
                )
        chosen = [name for name in outside if any(ends_with(name, target) for target in targets)]
    if adapter.layers is not None:
        chosen = _in_layers(model, chosen, adapter.layers)
    if not chosen:
        raise ModelError(
            f"no module would get an adapter: set adapter.targets; {nearest('', suffixes(linear))}", code="no-targets"
        )
    for name in chosen:
        _refuse_unfit(name, outside[name], linear)
    _refuse_tied(model, chosen, "adapter.targets")
    return tuple(chosen)


def resolve_heads(model: nn.Module, adapter: AdapterConfig, candidates: Sequence[str]) -> tuple[str, ...]:
    """Full names of the modules that are trained in full.

    Args:
        model: the plain base model.
        adapter: whose `modules_to_save` are module names or their endings; None takes the candidates that exist.
        candidates: the task's.

    Raises:
        ModelError: a name is no module, or the module cannot be trained in full.
    """
    modules = dict(model.named_modules())
    wanted = candidates if adapter.modules_to_save is None else adapter.modules_to_save
    found = {name: [n for n in modules if ends_with(n, name)] for name in wanted}
    if adapter.modules_to_save is None and candidates and not any(found.values()):
        raise ModelError(
            f"the model has no head named {' or '.join(map(repr, candidates))}; set adapter.modules_to_save to one of "
            f"its modules ({', '.join(n for n, _ in model.named_children())}), or to [] to train none",
            code="no-head",
        )
    for name, matches in found.items():
        if not matches and adapter.modules_to_save is not None:
            raise ModelError(
                f"adapter.modules_to_save names {name!r}, and the model has no such module; "
                f"{nearest(name, suffixes(modules))}",
                code="no-such-module",
            )
    every = sorted({match for matches in found.values() for match in matches}, key=list(modules).index)
    heads = tuple(n for n in every if not in_any(n, [other for other in every if other != n]))
    for name in heads:
        if any(getattr(module, "running_mean", None) is not None for module in modules[name].modules()):
            raise ModelError(
                f"module {name!r} keeps running statistics, which are not parameters and cannot be averaged: leave "
                "it out of adapter.modules_to_save",
                code="running-statistics",
            )
        if not any(True for _ in modules[name].parameters()):
            raise ModelError(
                f"module {name!r} has no parameters to train: leave it out of adapter.modules_to_save",
                code="nothing-to-train",
            )
    _refuse_tied(model, heads, "adapter.modules_to_save")
    return heads


def layer_of(model: nn.Module, name: str) -> tuple[str, int] | None:
    """Name of the outermost list of layers in which a module is, and in which of them; None for one outside of all."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        owner = ".".join(parts[:depth])
        if parts[depth].isdecimal() and isinstance(model.get_submodule(owner), nn.ModuleList):
            return owner, int(parts[depth])
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a pair can stand beside the module: a (possibly quantised) linear layer or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def beyond_layers(model: nn.Module) -> str | None:
    """What is to be said of a mixture whose experts are stacked in tensors of three dimensions, which no adapter
    reaches, where these are most of its weights; None elsewhere."""
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
    every = {name: value for name, value in model.named_parameters() if name.rpartition(".")[0] not in convolutions}
    stacked = {name: value.numel() for name, value in every.items() if value.ndim == 3}
    if 2 * sum(stacked.values()) <= sum(value.numel() for value in every.values()):
        return None
    return (
        f"adapters sit on linear layers, and {sum(stacked.values()):,} parameters are in none, such as "
        f"{next(iter(stacked))}: these experts stay as they are (PEFT's target_parameters are not used)"
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, which stores its weight as [d_in, d_out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer; from its declared features, because a quantised weight has another shape."""
    if is_transposed(module):
        d_in, d_out = module.weight.shape  # type: ignore[misc]
        return int(d_out), int(d_in)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def ends_with(name: str, ending: str) -> bool:
    """Whether a module's name is `ending` or ends with its dotted parts, as PEFT matches targets."""
    return name == ending or name.endswith(f".{ending}")


def matching(pattern: Mapping[str, Any], name: str) -> Any | None:
    """The value of the first key of a `rank_pattern` or `alpha_pattern` that matches a module, as PEFT matches them."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def check_patterns(adapter: AdapterConfig, names: Sequence[str]) -> None:
    """Raise `ConfigError` if a pattern is no regular expression, matches nothing, or gives a value that is not > 0."""
    for what in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(adapter, what).items():
            try:
                used = any(matching({key: value}, name) is not None for name in names)
            except re.error as error:
                raise ConfigError(
                    f"adapter.{what}: {key!r} is not a regular expression: {error}", code="bad-pattern"
                ) from None
            if not used:
                raise ConfigError(
                    f"adapter.{what}: {key!r} matches no adapted module; {nearest(key, suffixes(names))}",
                    code="pattern-without-match",
                )
            if not value > 0:
                raise ConfigError(f"adapter.{what}: {key!r} must be above 0, not {value!r}", code="out-of-range")


def in_any(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor or module is one of some modules, or within one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def suffixes(names: Sequence[str] | Mapping[str, Any]) -> set[str]:
    """The last dotted parts of module names."""
    return {name.rpartition(".")[2] for name in names if name} - {""}


def _default_targets(model: nn.Module, linear: Sequence[str]) -> tuple[str, ...] | str:
    from peft.utils import constants

    defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind not in defaults:
        raise ModelError(
            f"PEFT has no default targets for {kind!r} models: set adapter.targets; {nearest('', suffixes(linear))}",
            code="no-targets",
        )
    found = defaults[kind]
    return found if isinstance(found, str) else tuple(found)


def _in_layers(model: nn.Module, names: Sequence[str], layers: str | tuple[int, ...]) -> list[str]:
    places = {name: place for name in names if (place := layer_of(model, name)) is not None}
    lists = sorted({owner for owner, _ in places.values()})
    if len(lists) != 1:
        found = f"has several ({', '.join(lists)})" if lists else "has none with its targets"
        raise ModelError(
            f"adapter.layers needs a model with one list of layers, and this model {found}: name modules in "
            "adapter.targets instead",
            code="no-layer-list",
        )
    depth = len(model.get_submodule(lists[0]))  # type: ignore[arg-type]
    wanted = range(depth - int(layers[4:]), depth) if isinstance(layers, str) else layers
    if missing := [number for number in wanted if not 0 <= number < depth]:
        raise ModelError(
            f"adapter.layers asks for layer {missing[0]}, and {lists[0]!r} has layers 0 to {depth - 1}: "
            f'name some of these, or "top:{min(2, depth)}"',
            code="no-such-layer",
        )
    return [name for name in names if name in places and places[name][1] in wanted]


def _refuse_unfit(name: str, module: nn.Module, linear: Sequence[str]) -> None:
    if isinstance(module, nn.Embedding):
        raise ModelError(
            f"target {name!r} is an embedding, and only linear layers get an adapter: take it out of "
            "adapter.targets, or train it in full with adapter.modules_to_save",
            code="target-not-linear",
        )
    if not is_linear(module):
        raise ModelError(
            f"target {name!r} is a {type(module).__name__}, and only linear layers get an adapter; "
            f"{nearest('', suffixes(linear))}",
            code="target-not-linear",
        )


def _refuse_tied(model: nn.Module, names: Sequence[str], key: str) -> None:
    owners: dict[int, list[str]] = {}
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(owner)
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            others = [owner for owner in owners[id(parameter)] if not in_any(owner, [name])]
            if others:
                raise ModelError(
                    f"{name!r} shares its weight with {others[0]!r}, and training it would untie them: take it out of "
                    f"{key}, or use a model whose config has tie_word_embeddings = false",
                    code="tied-weights",
                )
