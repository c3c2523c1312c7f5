"""A base with an adapter from PEFT's files on it, to be used and not trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

from fedlora.config import RunConfig
from fedlora.errors import ModelError
from fedlora.model.device import seeded
from fedlora.model.dtype import choose_dtype
from fedlora.model.loading import _from_pretrained
from fedlora.model.peft_tuners import merged_weights
from fedlora.model.placement import first_device
from fedlora.model.targets import in_any, is_transposed
from fedlora.rng import derive


def load_adapted(
    config: RunConfig, folder: Path, auto_class: str, model_kwargs: Mapping[str, Any], device: torch.device
) -> PeftModel:
    """The model of a config with the adapter of a folder, by plain transformers and PEFT.

    Args:
        config: of which `[model]` matters.
        folder: with adapter_config.json and its tensors.
        auto_class: name of the transformers class.
        model_kwargs: for `from_pretrained`, such as `num_labels`.
        device: to compute on.

    Raises:
        ModelError: the base cannot be loaded, or the adapter does not fit it or lacks tensors.
    """
    from peft import PeftModel

    dtype = choose_dtype(config)
    with seeded(derive(0, "base"), torch.device("cpu")):
        model, absent = _from_pretrained(config, auto_class, model_kwargs, dtype, device)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False, torch_device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"the adapter does not fit {config.model.name!r}: {first}", code="adapter-not-loadable"
        ) from error
    if lacking := [str(entry.message) for entry in said if "missing adapter keys" in str(entry.message)]:
        raise ModelError(
            f"the adapter does not fit {config.model.name!r}: {lacking[0].splitlines()[0][:200]}",
            code="tensors-missing",
        )
    held = tuple(name for name, module in adapted.get_base_model().named_modules() if _is_saved(module))
    if left := sorted(tensor for tensor in absent if not in_any(tensor, held)):
        raise ModelError(
            f"neither {config.model.name!r} nor the adapter holds {left[0]}, which would be random: use the model "
            "that the adapter was trained on, or export the adapter again",
            code="tensors-missing",
        )
    if not getattr(model, "is_quantized", False) and not first_device(config, model, device)[1]:
        adapted.to(device)
    return adapted


def _is_saved(module: nn.Module) -> bool:
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def changed_weights(model: nn.Module) -> Iterator[tuple[str, Float[Tensor, "o i"], Float[Tensor, "o i"]]]:
    """The name of each adapted linear layer, its weight without the adapter and with it, in double precision.

    Args:
        model: as `load_adapted` gives it; is left on the CPU, in double precision.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.cpu().double()  # so that the difference of the two is the update, and not its rounding
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        inner: Any = layer.get_base_layer()
        before = inner.weight.detach().cpu().clone()
        if before.ndim != 2:
            continue
        after = merged_weights(model, [name])[f"{name}.weight"]
        yield (name, before.T, after.T) if is_transposed(inner) else (name, before, after)
