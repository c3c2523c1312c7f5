"""`selection.keep = "best"`: adapter and outcomes by example are of one round, wherever a run is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.federations import simulate
from support.interrupted import resumed
from support.tiny_federations import MakeConfig

from fedlora.compare import read_run
from fedlora.config import RunConfig
from fedlora.federation.run_files import RunFiles
from fedlora.runs.checkpoints import Checkpoints
from fedlora.runs.outcomes import read_outcomes
from fedlora.runs.place import path_of
from fedlora.runs.rundir import RunDir

SELECTS = ("selection.metric=loss", "data.validation_fraction=0.3", "train.steps=1", "rounds=2")


def require_of_one_round(path: Path) -> None:
    """What `compare` resamples is what the line of metrics says of the kept round."""
    run = read_run(path)
    assert run.outcomes is not None
    assert run.task.summarise(run.outcomes)["loss"] == pytest.approx(run.by_round("loss")[run.kept_round], rel=1e-5)


def killed(config: RunConfig, number: int, owner: type, name: str, patch: pytest.MonkeyPatch) -> RunDir:
    """A run that was killed before `owner` was told that round `number` is the best."""
    real = getattr(owner, name)

    def dies(self: object, state: object) -> None:
        if state.round == number:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        real(self, state)

    with patch.context() as context:
        context.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            simulate(config)
    return RunDir.open(path_of(config))


@pytest.mark.parametrize(
    "owner", [Checkpoints, pytest.param(RunFiles, marks=pytest.mark.slow)], ids=lambda owner: owner.__name__
)
def test_killed_between_the_states_of_the_best_round_both_are_of_it(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, owner: type
) -> None:
    run = killed(tiny_config(*SELECTS), 2, owner, "best_reached", monkeypatch)
    assert resumed(run).rundir.kept_round == 2
    require_of_one_round(run.path)
    assert not list(run.path.glob("*waiting*"))


def test_outcomes_of_another_round_than_the_kept_one_are_nobodys(tiny_config: MakeConfig) -> None:
    config = tiny_config(*SELECTS, "selection.keep=last")
    run = simulate(config).rundir
    assert read_outcomes(run.path, 2) is not None
    assert read_outcomes(run.path, 1) is None
