"""What an adapter must look like: shape and scale of each pair by the config, and whether one fits a model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedlora.adapter import AdapterState, PairShape
from fedlora.config import AdapterConfig
from fedlora.errors import ModelError, nearest
from fedlora.model.peft_methods import Method
from fedlora.model.targets import matching


def pair_shape(config: AdapterConfig, method: Method, name: str, layer: tuple[int, int], rank: int) -> PairShape:
    """Shape and scale of one pair.

    Args:
        config: The adapter's table.
        method: Of the adapter.
        name: Of the module.
        layer: Its d_out and d_in.
        rank: Of the client.
    """
    own = matching(config.rank_pattern, name) or config.rank
    alpha = float(matching(config.alpha_pattern, name) or config.alpha)
    scaled = own if rank == config.rank else max(1, round(own * rank / config.rank))
    if config.alpha_scaling == "proportional" and scaled != own:
        alpha = alpha * scaled / own
    return PairShape(*layer, scaled, alpha / (math.sqrt(scaled) if method.root_scale else scaled))


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The alpha from which PEFT computes exactly this scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    alpha = scale * rank can miss by a rounding; then a neighbouring float is taken.
    """
    divisor = math.sqrt(rank) if rslora else float(rank)
    if not rank:
        return scale
    alpha = scale * divisor
    near = (alpha, float(round(alpha)), math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / divisor == scale), alpha)


def require_fit(state: AdapterState, layers: Mapping[str, tuple[int, int]], dense: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` unless an adapter has a model's modules, parameters and shapes, of any ranks.

    Args:
        state: The adapter.
        layers: Adapted module -> its d_out and d_in.
        dense: The model's other trained tensors.
    """
    wanted = (("pair", state.pairs.keys(), layers.keys()), ("dense tensor", state.dense.keys(), dense.keys()))
    for what, given, own in wanted:
        if given != own:
            odd = min(given ^ own)
            which = f"the {what} {odd!r}"
            lacks = f"the model lacks {which}; {nearest(odd, own)}" if odd in given else f"it lacks {which}"
            raise ModelError(f"the adapter does not fit the model: {lacks}", code="tensors-differ")
    for name, pair in state.pairs.items():
        shape = (pair.B.shape[0], pair.A.shape[1])
        if shape != layers[name]:
            raise ModelError(
                f"the adapter does not fit the model: pair {name!r} is for a layer of {list(shape)}, and the "
                f"model's is {list(layers[name])}: server and client must load the same base",
                code="shape-mismatch",
            )
    for name, value in state.dense.items():
        if value.shape != dense[name].shape:
            raise ModelError(
                f"the adapter does not fit the model: {name!r} is {list(value.shape)}, and the model's is "
                f"{list(dense[name].shape)}: server and client must have the same labels",
                code="shape-mismatch",
            )
