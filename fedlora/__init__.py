"""Federated fine-tuning of foundation models with low-rank adapters.

    import fedlora

    run = fedlora.run("quickstart", rounds=2)

Names are loaded when they are first used: importing fedlora takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.adapter import AdapterState, LoraPair
    from fedlora.aggregators import Aggregator, Claim, ClientPlan, ClientUpdate, GlobalState
    from fedlora.api import Run, evaluate, load_run, partition_table, run
    from fedlora.callbacks import Callback
    from fedlora.config import RunConfig, load_config
    from fedlora.errors import FedloraError

__version__ = "0.1.0"

_HOME = {
    "AdapterState": "adapter",
    "Aggregator": "aggregators",
    "Callback": "callbacks",
    "Claim": "aggregators",
    "ClientPlan": "aggregators",
    "ClientUpdate": "aggregators",
    "FedloraError": "errors",
    "GlobalState": "aggregators",
    "LoraPair": "adapter",
    "Run": "api",
    "RunConfig": "config",
    "evaluate": "api",
    "load_config": "config",
    "load_run": "api",
    "partition_table": "api",
    "run": "api",
}
"""Public name -> module of this package that has it."""

__all__ = [
    "AdapterState",
    "Aggregator",
    "Callback",
    "Claim",
    "ClientPlan",
    "ClientUpdate",
    "FedloraError",
    "GlobalState",
    "LoraPair",
    "Run",
    "RunConfig",
    "evaluate",
    "load_config",
    "load_run",
    "partition_table",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    value = getattr(import_module(f"fedlora.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
