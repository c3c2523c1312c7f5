"""What "auto" chose, as a config that says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.config._run import RunConfig

SETTLED = ("kernels", "attention", "prefix_cache", "cohort", "processes")
"""Keys of `[runtime]` whose "auto" is decided once a run: its resumes, replays and processes go by the same choice."""


def settle(config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """The config with what each "auto" of `[runtime]` chose, here or where a run was begun.

    Args:
        config: of a run; what it says itself is left as it is.
        chosen: key of `[runtime]` -> the choice, as `Speedups.settled` and environment.json have it.
    """
    said = {key: getattr(config.runtime, key) for key in SETTLED}
    kept = {key: chosen[key] for key in SETTLED if said[key] in ("auto", "measure") and chosen.get(key) is not None}
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=kept)})
