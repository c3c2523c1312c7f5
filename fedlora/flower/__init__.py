"""The only place that imports flwr."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.flower.flower_strategy import FedLoraStrategy, evaluate_fn, initial_arrays
    from fedlora.flower.local import run_local
    from fedlora.flower.servable import refuse_early
    from fedlora.flower.server_app import RunOutcome

__all__ = ["FedLoraStrategy", "RunOutcome", "evaluate_fn", "initial_arrays", "refuse_early", "run_local"]

_HOME = {
    "FedLoraStrategy": "flower_strategy",
    "RunOutcome": "server_app",
    "evaluate_fn": "flower_strategy",
    "initial_arrays": "flower_strategy",
    "refuse_early": "servable",
    "run_local": "local",
}


def __getattr__(name: str) -> object:
    # Flower imports this package to find one app; it should not have to load the other and the engine.
    if name not in _HOME:
        raise AttributeError(f"module 'fedlora.flower' has no attribute {name!r}")
    return getattr(import_module(f"fedlora.flower.{_HOME[name]}"), name)
