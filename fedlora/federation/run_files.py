"""What a run writes beside its checkpoints while it goes on: metrics, outcomes by example, generated text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from fedlora.aggregators import GlobalState
from fedlora.callbacks import Callback, Evaluation
from fedlora.federation.generations import write_samples
from fedlora.runs.outcomes import drop_waiting, keep_waiting, write_outcomes
from fedlora.runs.rundir import RunDir
from fedlora.training.workspace import Workspace


@final
class RunFiles(Callback):
    """Writes a run's folder.

    Args:
        rundir: The folder.
        workspace: With the test examples.
    """

    def __init__(self, rundir: RunDir, workspace: Workspace) -> None:
        self._rundir, self._workspace = rundir, workspace
        chosen = workspace.config.selection
        self._selects = chosen is not None and chosen.keep == "best"

    def evaluated(self, state: GlobalState, evaluation: Evaluation) -> None:
        """Keep the outcomes by example of the round whose model may be kept; before training, what the model says."""
        self._rundir.measured = frozenset(evaluation.overall)
        if evaluation.rows is not None:
            return
        path, test = self._rundir.path, self._workspace.data.test_digest
        write_outcomes(path, state.round, test, evaluation.measures, waiting=self._selects)
        if state.round == 0:
            write_samples(self._rundir, self._workspace, "before")

    def measured(self, record: Mapping[str, Any]) -> None:
        """Append the line of metrics."""
        self._rundir.append_metrics(record)

    def best_reached(self, state: GlobalState) -> None:
        """Keep its outcomes by example."""
        if self._selects:
            keep_waiting(self._rundir.path, state.round)

    def ended(self, state: GlobalState) -> None:
        """Write what the trained model says, where there are test examples to ask it."""
        drop_waiting(self._rundir.path)
        if self._workspace.data.test is not None:
            write_samples(self._rundir, self._workspace, "after")
