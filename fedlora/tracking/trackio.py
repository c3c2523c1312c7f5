"""trackio: a local database (TRACKIO_DIR says where), to look at with `trackio show`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import final

from fedlora.config import RunConfig, flat_keys
from fedlora.tracking._base import Tracker


@final
class Trackio(Tracker):
    """One run of a project; a resumed run goes on in it."""

    package = "trackio"

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        import trackio

        assert config.tracking is not None
        project = config.tracking.project
        with redirect_stdout(io.StringIO()):  # it writes into the middle of the terminal's moving part
            self._run = trackio.init(
                project=project,
                name=run_id or config.name,
                config=flat_keys(config),
                resume="never" if run_id is None else "allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.run_id = self._run.name
        self.where = f"trackio show --project {project}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(figures), step=step)

    def close(self, *, ok: bool) -> None:
        """See `Tracker.close`."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()
