"""Runs that are killed when a round begins, and go on in what could be another process: for the tests of resuming."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import RecordDict

from fedlora.aggregators import GlobalState
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.federation.protocol import TrainedReply
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.runs.checkpoints import Checkpoints
from fedlora.runs.place import path_of
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from support.federations import deploy, forget


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
    real = Checkpoints.save

    def save(self: Checkpoints, state: GlobalState) -> Path:
        if state.round == number:
            raise KeyboardInterrupt
        return real(self, state)

    with patch.context() as context:
        context.setattr(Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            yield


def killed_and_resumed(config: RunConfig, number: int, patch: pytest.MonkeyPatch) -> RunOutcome:
    """A run that was killed before the checkpoint of round `number`, and went on in a new process."""
    rundir = RunDir.create(config, overwrite=True)
    cut_before_checkpoint(rundir, number, patch)
    return resumed(rundir)


def killed_and_redeployed(config: RunConfig, number: int, ledgers: Path, patch: pytest.MonkeyPatch) -> RunOutcome:
    """As `killed_and_resumed`, of a run by Flower messages whose nodes keep their own in `ledgers`."""
    with killed_before_checkpoint(number, patch):
        deploy(config, ledgers=ledgers)
    return deploy(config, rundir=RunDir.open(path_of(config)), ledgers=ledgers)


def deployed_without_a_reply(config: RunConfig, ledgers: Path | None, patch: pytest.MonkeyPatch) -> RunOutcome:
    """A run by Flower messages in which client 1 trains in round 2, and its reply is lost on the way."""
    real = client_app.encode_reply

    def lost(reply: TrainedReply, seed: int) -> RecordDict:
        if (reply.request.client_id, reply.request.round) == (1, 2):
            raise ConfigError("the line was cut", code="lost")
        return real(reply, seed)

    with patch.context() as context:
        context.setattr(client_app, "encode_reply", lost)
        return deploy(config, ledgers=ledgers)


def resumed(rundir: RunDir) -> RunOutcome:
    """A run that goes on in a new process."""
    forget(rundir.config)
    return run_simulation(rundir.config, RunDir.open(rundir.path), Callback(), resume=True)


def cut_and_resumed(config: RunConfig, number: int) -> RunOutcome:
    """A run that was killed when round `number` had begun, and went on in a new process."""
    rundir = RunDir.create(config)
    cut(rundir, number)
    return resumed(rundir)
