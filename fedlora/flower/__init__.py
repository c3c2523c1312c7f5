"""The only place that imports flwr, with `fedlora.node_worker`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.flower.flower_clients import FlowerClients
    from fedlora.flower.flower_strategy import FedLoraStrategy, evaluate_fn, initial_arrays

__all__ = ["FedLoraStrategy", "FlowerClients", "evaluate_fn", "initial_arrays"]

_HOME = {
    "FedLoraStrategy": "flower_strategy",
    "FlowerClients": "flower_clients",
    "evaluate_fn": "flower_strategy",
    "initial_arrays": "flower_strategy",
}


def __getattr__(name: str) -> object:
    # Flower imports this package to find one app; it should not have to load the other and the engine.
    if name not in _HOME:
        raise AttributeError(f"module 'fedlora.flower' has no attribute {name!r}")
    return getattr(import_module(f"fedlora.flower.{_HOME[name]}"), name)
