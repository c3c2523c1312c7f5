"""Trackers by one key, `[tracking] name = "tensorboard"`: a few lines around each package, and never in the way.

A tracker sees what is in metrics.jsonl and nothing else. If it fails (a server that is gone, a full disk), the run says
so once and goes on without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.progress import Progress
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
        raise ConfigError(f"tracking.name = {name!r} needs a package that is not here: pip install 'fedlora[{name}]'")


@contextmanager
def tracked(progress: Progress, config: RunConfig, rundir: RunDir) -> Iterator[Progress]:
    """Inside, what is told to the result is also told to the config's tracker, if it names one.

    Raises:
        ConfigError: the tracker's package is missing.
    """
    if config.tracking is None:
        yield progress
        return
    require_tracker(config)
    known: dict[str, str] = rundir.read_json(NOTES) or {}
    both = _Both(progress)
    with both.guarded():
        tracker = _class(config.tracking.name)(config, rundir.path, known.get(config.tracking.name))
        both.tracker = tracker
        rundir.write_json(NOTES, {**known, config.tracking.name: tracker.run_id or config.name})
        progress.message(f"tracking: {tracker.where}")
    ok = False
    try:
        yield both
        ok = True
    finally:
        if both.tracker is not None:
            with both.guarded():
                both.tracker.close(ok=ok)


class _Both:
    """A `Progress` that passes everything on, and the rounds to a tracker too."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.tracker: Tracker | None = None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever a tracker raises ends the tracking and not the run: hours of training are worth more."""
        try:
            yield
        except Exception as error:
            self.tracker = None
            words = clean_text(error, 300)
            self._progress.message(f"tracking stopped: {type(error).__name__}: {words}; the run goes on without it")

    def started(self, config: RunConfig, clients: int, rounds: int) -> None:
        """Passed on."""
        self._progress.started(config, clients, rounds)

    def round_started(self, number: int, asked: Sequence[int]) -> None:
        """Passed on."""
        self._progress.round_started(number, asked)

    def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
        """Passed on."""
        self._progress.reply(number, client_id, ok, note)

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """Passed on, and logged."""
        self._progress.round_ended(record)
        if self.tracker is not None:
            with self.guarded():
                self.tracker.log(figures_of(record), int(record["round"]))

    def message(self, text: str) -> None:
        """Passed on."""
        self._progress.message(text)


def _class(name: str) -> type[Tracker]:
    found: type[Tracker] = getattr(import_module(f"{__name__}.{name}"), TRACKERS[name])
    return found
