"""PEFT's tuners that are no LoRA: what they train by name, what they keep frozen, and what they make of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedlora.errors import ModelError
from fedlora.hashing import tensors_digest

ADAPTER = "default"  # the name under which PEFT keeps the only adapter


def trained_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Parameter]:
    """What a tuner trains, fresh from PEFT: the parameter's name without PEFT's word for the adapter -> parameter.

    Args:
        model: with the tuner's layers, as PEFT leaves it: nothing else but whole modules is trained.
        dtype: that the parameters get.
    """
    found: dict[str, Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".modules_to_save." not in name:
            parameter.data = parameter.data.to(dtype)
            found[name.replace(f".{ADAPTER}", "")] = parameter
    return found


def magnitudes(layers: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Parameter]:
    """DoRA's magnitudes, by the names that PEFT saves them under."""
    found = {}
    for name, layer in layers.items():
        parameter = layer.lora_magnitude_vector[ADAPTER].weight
        parameter.data = parameter.data.to(dtype)
        found[f"{name}.lora_magnitude_vector"] = parameter
    return found


def frozen_digest(model: nn.Module, targets: Sequence[str]) -> str:
    """SHA-256 of what the tuner's layers hold and nobody trains: random projections, masks, indices.

    Each machine draws these for itself; two that differ must not meet in one federation.
    """
    held = {
        f"{target}.{name}": value
        for target in targets
        for name, value in sorted(_frozen(model.get_submodule(target)), key=lambda entry: entry[0])
    }
    return tensors_digest(held)


def merged_weights(model: nn.Module, targets: Sequence[str]) -> dict[str, Tensor]:
    """The weights (and biases) of the adapted layers with the adapter in them, by the plain model's names.

    PEFT's own merge, undone by putting the old weights back: subtracting again would leave its rounding.

    Raises:
        ModelError: the method cannot be merged.
    """
    out: dict[str, Tensor] = {}
    for target in targets:
        layer: Any = model.get_submodule(target)
        inner: nn.Module = layer.get_base_layer()
        before = {name: value.detach().clone() for name, value in inner.state_dict().items()}
        try:
            layer.merge(adapter_names=[ADAPTER])
            out |= {f"{target}.{name}": value.detach().cpu().clone() for name, value in inner.state_dict().items()}
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"PEFT cannot merge this adapter into {target!r}: export the adapter instead", code="not-mergeable"
            ) from error
        finally:
            inner.load_state_dict(before)
            layer.merged_adapters.clear()
    return out


def saved_tensors(peft_model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` of PEFT would write, by its names."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False))


def _frozen(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    base = "base_layer."
    for kind in (layer.named_parameters(), layer.named_buffers()):
        yield from ((name, value) for name, value in kind if not (name.startswith(base) or _is_trained(value)))
    for name, module in layer.named_modules():
        if name == "base_layer" or name.startswith(base):
            continue
        for key, value in vars(module).items():  # indices of some tuners are in plain dicts, which torch does not list
            if isinstance(value, dict) and not key.startswith("_"):
                yield from ((f"{name}.{key}.{k}", v) for k, v in value.items() if isinstance(v, Tensor))


def _is_trained(value: Tensor) -> bool:
    return isinstance(value, Parameter) and value.requires_grad
