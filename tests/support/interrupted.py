"""Runs that are killed when a round begins, and go on in what could be another process: for the tests of resuming."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.aggregators import GlobalState
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.federation.run import RunOutcome
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from support.federations import forget


class _Cut(Callback):
    def __init__(self, number: int) -> None:
        self.number = number

    def round_started(self, number: int, asked: object) -> None:
        if number == self.number:
            raise KeyboardInterrupt


def cut(rundir: RunDir, number: int, *, resume: bool = False) -> None:
    """Run, and be killed when round `number` has begun."""
    with pytest.raises(KeyboardInterrupt):
        run_simulation(rundir.config, rundir, _Cut(number), resume=resume)


def cut_before_checkpoint(rundir: RunDir, number: int, patch: pytest.MonkeyPatch) -> None:
    """Run, and be killed when the line of metrics of round `number` is written and its checkpoint is not."""
    with killed_before_checkpoint(number, patch):
        run_simulation(rundir.config, rundir, Callback())


@contextmanager
def killed_before_checkpoint(number: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs inside is killed when the line of metrics of round `number` is written and its checkpoint is not."""
    real = RunDir.save_checkpoint

    def save(self: RunDir, state: GlobalState) -> Path:
        if state.round == number:
            raise KeyboardInterrupt
        return real(self, state)

    with patch.context() as context:
        context.setattr(RunDir, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            yield


def cut_and_resumed(config: RunConfig, number: int) -> RunOutcome:
    """A run that was killed when round `number` had begun, and went on in a new process."""
    rundir = RunDir.create(config)
    cut(rundir, number)
    forget(config)
    return run_simulation(config, RunDir.open(rundir.path), Callback(), resume=True)
