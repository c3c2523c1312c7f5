"""Trackers by one key, `[tracking] name = "tensorboard"`: a few lines around each package, and never in the way.

A tracker sees what is in metrics.jsonl and nothing else. If it fails (a server that is gone, a full disk), the run says
so once and goes on without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, final

from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.runs.rundir import RunDir
from fedlora.sanitize import clean_text
from fedlora.tracking._base import Tracker, figures_of

__all__ = ["TRACKERS", "Tracker", "figures_of", "require_tracker", "tracked"]

TRACKERS = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}
"""Name in a config, which is that of the module here and of the extra too -> class."""

NOTES = "tracking.json"
"""File of the run's folder that says under which id a tracker knows the run."""


def require_tracker(config: RunConfig) -> None:
    """Raise if the package of the run's tracker is missing, before anything is loaded.

    Raises:
        ConfigError: naming what to install.
    """
    if config.tracking is not None and find_spec(_class(config.tracking.name).package) is None:
        name = config.tracking.name
        raise ConfigError(
            f"tracking.name = {name!r} needs a package that is not installed: pip install 'fedlora[{name}]'",
            code="package-not-installed",
        )


@contextmanager
def tracked(told: Callback, config: RunConfig, rundir: RunDir) -> Iterator[list[Callback]]:
    """Inside, the result holds a callback for the config's tracker, if it names one.

    Args:
        told: Told where the tracker is, and once if it fails.
        config: Of the run.
        rundir: Of the run.

    Raises:
        ConfigError: the tracker's package is missing.
    """
    if config.tracking is None:
        yield []
        return
    require_tracker(config)
    known: dict[str, str] = rundir.read_json(NOTES) or {}
    tracking = _Tracking(told)
    with tracking.guarded():
        tracker = _class(config.tracking.name)(config, rundir.path, known.get(config.tracking.name))
        tracking.tracker = tracker
        rundir.write_json(NOTES, {**known, config.tracking.name: tracker.run_id or config.name})
        told.message(f"tracking: {tracker.where}")
    ok = False
    try:
        yield [tracking]
        ok = True
    finally:
        if tracking.tracker is not None:
            with tracking.guarded():
                tracking.tracker.close(ok=ok)


@final
class _Tracking(Callback):
    """Passes the figures of each round to a tracker."""

    def __init__(self, told: Callback) -> None:
        self._told = told
        self.tracker: Tracker | None = None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever a tracker raises ends the tracking and not the run: hours of training are worth more."""
        try:
            yield
        except Exception as error:
            self.tracker = None
            words = clean_text(error, 300)
            self._told.message(f"tracking stopped: {type(error).__name__}: {words}; the run goes on without it")

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """Log the round's figures."""
        if self.tracker is not None:
            with self.guarded():
                self.tracker.log(figures_of(record), int(record["round"]))


def _class(name: str) -> type[Tracker]:
    found: type[Tracker] = getattr(import_module(f"{__name__}.{name}"), TRACKERS[name])
    return found
