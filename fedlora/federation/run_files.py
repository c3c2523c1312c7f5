"""What a run writes beside its checkpoints while it goes on: metrics, outcomes by example, generated text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np

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
    """

    def __init__(self, rundir: RunDir, workspace: Workspace) -> None:
        self._rundir, self._workspace = rundir, workspace
        chosen = workspace.config.selection
        self._selects = chosen is not None and chosen.keep == "best"
        self._outcomes: tuple[int, Mapping[str, np.ndarray]] | None = None

    def evaluated(self, state: GlobalState, evaluation: Evaluation) -> None:
        """Keep the outcomes by example of the round whose model is kept; before training, what the model says."""
        self._rundir.measured = frozenset(evaluation.overall)
        if evaluation.rows is not None:
            return
        self._outcomes = state.round, evaluation.measures
        if not self._selects:
            self._write_outcomes()
        if state.round == 0:
            write_samples(self._rundir, self._workspace, "before")

    def measured(self, record: Mapping[str, Any]) -> None:
        """Append the line of metrics."""
        self._rundir.append_metrics(record)

    def best_reached(self, state: GlobalState) -> None:
        """Keep its outcomes by example."""
        if self._selects and self._outcomes is not None and self._outcomes[0] == state.round:
            self._write_outcomes()

    def ended(self, state: GlobalState) -> None:
        """Write what the trained model says, where there are test examples to ask it."""
        if self._workspace.data.test is not None:
            write_samples(self._rundir, self._workspace, "after")

    def _write_outcomes(self) -> None:
        assert self._outcomes is not None
        write_outcomes(self._rundir.path, self._outcomes[0], self._workspace.data.test_digest, self._outcomes[1])
