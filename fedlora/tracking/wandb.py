"""Weights & Biases, as its environment variables say: WANDB_MODE=offline keeps everything in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

from fedlora.config import RunConfig, flat_keys
from fedlora.tracking._base import Tracker


@final
class WandB(Tracker):
    """One run of a project; a resumed run goes on in it."""

    package = "wandb"

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        import wandb

        assert config.tracking is not None
        self._run = wandb.init(
            project=config.tracking.project,
            name=config.name,
            config=flat_keys(config),
            dir=str(folder),
            id=run_id,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        self.run_id = self._run.id
        self.where = self._run.url or f"wandb sync {folder / 'wandb' / 'latest-run'}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(figures), step=step)

    def close(self, *, ok: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=0 if ok else 1)
