"""The base model's own dropout: one probability for all of it, or the places where there is some.

transformers' models drop in three ways: by `nn.Dropout` modules, by a number that a module keeps (or reads from the
config) and hands to its attention function, and by leaving out whole layers or paths.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

PATHS = ("drop_prob", "drop_path", "drop_path_rate", "drop_path_prob", "layerdrop", "layer_drop")
"""Stochastic depth: no dropout of activations, so that no probability of it is carried over, but off when off."""


def set_dropout(model: nn.Module, p: float) -> None:
    """Gives all dropout in a plain base model one probability; the model is changed in place.

    With 0 nothing is random any more, stochastic depth neither.

    Args:
        model: before adapters are injected: their dropout is theirs.
        p: the probability of a zero.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = p
        owners: list[Any] = [module]
        if (config := getattr(module, "config", None)) is not None and hasattr(config, "to_dict"):
            owners.append(config)
        for owner in owners:
            for name, value in list(vars(owner).items()):
                # What it is already is left alone: some configs take whole numbers alone for a 0.
                if _is_probability(name, value) and (_drops(name) or not p) and value != p:
                    setattr(owner, name, p)


def dropout_in(modules: Iterable[nn.Module]) -> float:
    """The largest probability with which modules drop anything in training (their own, not their children's)."""
    largest = 0.0
    for module in modules:
        if isinstance(module, _DropoutNd):
            largest = max(largest, module.p)
        largest = max([largest, *(float(v) for name, v in vars(module).items() if _is_probability(name, v))])
    return largest


def _is_probability(name: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= 1 and (_drops(name) or name in PATHS)


def _drops(name: str) -> bool:
    return name == "dropout" or name.endswith(("_dropout", "_pdrop", "_dropout_prob", "dropout_p", "dropout_rate"))
