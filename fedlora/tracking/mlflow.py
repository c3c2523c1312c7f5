"""MLflow. MLFLOW_TRACKING_URI says where; without it, MLflow's own default."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

from fedlora.config import RunConfig, flat_keys
from fedlora.tracking._base import Tracker

MOST_PARAMS, LONGEST = 100, 500
"""What one request may hold, and how long a value may be (MLflow's limits)."""


@final
class MLflow(Tracker):
    """One run of an experiment; a resumed run goes on in it."""

    package = "mlflow"

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        import mlflow
        from mlflow.entities import Param

        assert config.tracking is not None
        project = config.tracking.project
        self._client = mlflow.MlflowClient()
        if run_id is None:
            known = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if known is None else known.experiment_id
            run_id = str(self._client.create_run(experiment, run_name=config.name).info.run_id)
            params = [Param(name, str(value)[:LONGEST]) for name, value in flat_keys(config).items()]
            for start in range(0, len(params), MOST_PARAMS):
                self._client.log_batch(run_id, params=params[start : start + MOST_PARAMS])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        self._id = run_id
        self.where = f"experiment {project!r} in {mlflow.get_tracking_uri()}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(self, *, ok: bool) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._id, status="FINISHED" if ok else "FAILED")
