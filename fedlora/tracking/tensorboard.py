"""TensorBoard: event files in the run's folder, to look at with `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

from fedlora.config import RunConfig
from fedlora.tracking._base import Tracker


@final
class TensorBoard(Tracker):
    """One folder of event files; a resumed run adds a file to it."""

    package = "tensorboard"

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {folder.parent}"
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        if run_id is None:
            self._writer.add_text("config", f"```\n{config.to_toml()}\n```")
        self.run_id = config.name

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, ok: bool) -> None:
        """See `Tracker.close`."""
        self._writer.close()
