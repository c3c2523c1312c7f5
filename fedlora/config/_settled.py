"""What "auto" chose, as a config that says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.config._run import RunConfig

SETTLED = ("kernels", "attention", "prefix_cache", "cohort", "processes")
"""Keys of `[runtime]` whose "auto" is decided once a run, as that of model.dtype is: its resumes, replays and processes
go by the same choice."""


def settle(config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """The config with what each "auto" chose, here or where a run was begun.

    Args:
        config: of a run; what it says itself is left as it is.
        chosen: key of `[runtime]`, or "dtype" -> the choice, as `Workspace.settled` and environment.json have it.
    """
    said = {key: getattr(config.runtime, key) for key in SETTLED}
    kept = {key: chosen[key] for key in SETTLED if said[key] in ("auto", "measure") and chosen.get(key) is not None}
    if config.model.dtype == "auto" and chosen.get("dtype") is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": chosen["dtype"]})})
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=kept)})
