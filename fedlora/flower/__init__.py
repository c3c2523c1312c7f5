"""The only place that imports flwr."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.flower.local import run_local
    from fedlora.flower.servable import refuse_early
    from fedlora.flower.server_app import RunOutcome

__all__ = ["RunOutcome", "refuse_early", "run_local"]


def __getattr__(name: str) -> object:
    # Flower imports this package to find one app; it should not have to load the other and the engine.
    if name == "run_local":
        from fedlora.flower.local import run_local

        return run_local
    if name == "refuse_early":
        from fedlora.flower.servable import refuse_early

        return refuse_early
    if name == "RunOutcome":
        from fedlora.flower.server_app import RunOutcome

        return RunOutcome
    raise AttributeError(name)
