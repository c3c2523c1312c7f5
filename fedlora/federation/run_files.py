"""What a run writes while it goes on, as callbacks: metrics, checkpoints, outcomes by example, generated text.

In a round the line of metrics is written first and the checkpoint after it, so that a checkpoint is never ahead of the
metrics; a resume cuts the metrics back to its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from fedlora.aggregators import GlobalState
from fedlora.callbacks import Callback, Evaluation
from fedlora.federation.generations import write_samples
from fedlora.runs.outcomes import write_outcomes
from fedlora.runs.rundir import RunDir
from fedlora.training.workspace import Workspace


@final
class RunFiles(Callback):
    """Writes a run's folder.

    Args:
        rundir: The folder.
        workspace: With the test examples.
        rounds: Of the whole run.
    """

    def __init__(self, rundir: RunDir, workspace: Workspace, rounds: int) -> None:
        self._rundir, self._workspace, self._rounds = rundir, workspace, rounds

    def evaluated(self, state: GlobalState, evaluation: Evaluation) -> None:
        """Keep the last round's outcomes by example; before training, what the model says."""
        self._rundir.measured = frozenset(evaluation.overall)
        if state.round == self._rounds:
            digest = self._workspace.data.test_digest
            write_outcomes(self._rundir.path, state.round, digest, evaluation.measures)
        if state.round == 0:
            write_samples(self._rundir, self._workspace, "before")

    def measured(self, record: Mapping[str, Any]) -> None:
        """Append the line of metrics."""
        self._rundir.append_metrics(record)

    def state_reached(self, state: GlobalState) -> None:
        """Save a checkpoint."""
        self._rundir.save_checkpoint(state)

    def ended(self, state: GlobalState) -> None:
        """Write what the trained model says."""
        write_samples(self._rundir, self._workspace, "after")
