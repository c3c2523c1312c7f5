"""The in-process engine: the same two apps on a grid without processes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from fedlora.config import RunConfig
from fedlora.errors import RoundError
from fedlora.flower import client_app, server_app
from fedlora.flower.local_grid import LocalGrid, task_identity
from fedlora.flower.process_grid import ProcessGrid, children_for
from fedlora.flower.replay import ReplayGrid, answered_in, require_same
from fedlora.flower.servable import clients_wanted
from fedlora.flower.server_app import RunOutcome, Session
from fedlora.progress import Progress
from fedlora.rundir import RunDir
from fedlora.training.sizing import cohort_size, expected_tokens, process_count
from fedlora.training.workbench import Workbench, open_workbench


def run_local(
    config: RunConfig,
    rundir: RunDir,
    progress: Progress,
    *,
    resume: bool = False,
    replay: Sequence[Mapping[str, Any]] | None = None,
) -> RunOutcome:
    """Run a federation in this process.

    Args:
        config: of the run.
        rundir: where it is written.
        progress: is told what happens.
        resume: go on from the run directory's last checkpoint; `config` may ask for more rounds than it did then.
        replay: lines of metrics of a run: in each round only those clients answer that did then.

    Returns:
        The final state, the exported adapter and the metrics.

    Raises:
        FedloraError: of any kind; the run directory stays intact.
    """
    if resume:
        rundir = RunDir.open(rundir.path, config)  # refuses a config that is not the run's
        config = _as_before(config, rundir)
    bench = open_workbench(config)
    run_config: dict[str, bool | float | int | str] = {"toml": config.to_toml()}
    if config.example_privacy is not None:
        # A session is one call: a round that an earlier one began and did not complete was seen by nobody.
        run_config |= {
            "ledger-dir": str(rundir.privacy_dir.resolve()),
            "run-id": rundir.run_id,
            "session": uuid.uuid4().hex,
        }
    context = Context(1, 1, UserConfig(), RecordDict(), UserConfig(run_config))
    with (
        _grid(bench, run_config, rundir, replay) as grid,
        server_app.session(Session(rundir, progress, resume)) as session,
        task_identity(run_id=1),
    ):
        server_app.app(grid, context)
    if session.outcome is None:
        raise RoundError("the server app ended without a result: run again with --debug")
    if replay is not None:
        require_same(replay, session.outcome.records)
    return session.outcome


@contextmanager
def _grid(
    bench: Workbench,
    run_config: Mapping[str, bool | float | int | str],
    rundir: RunDir,
    replay: Sequence[Mapping[str, Any]] | None,
) -> Iterator[LocalGrid]:
    """The grid of a run, and with it the processes that it wants."""
    config, number = bench.config, len(bench.data.clients)
    nodes = [{"partition-id": k, "num-partitions": number} for k in range(number)]
    if replay is not None:  # one client at a time, as on machines of their own: to the byte
        yield ReplayGrid(client_app.app, nodes, run_config, answered=answered_in(replay))
        return
    asked = clients_wanted(config, number)
    choice = process_count(bench, asked)
    cohort = cohort_size(bench, asked, choice.processes)
    facts = {"processes": choice.processes, "processes_why": choice.reason}
    rundir.note_environment(cohort=cohort.clients, cohort_why=cohort.reason, **facts)
    if choice.processes == 1:
        grid = LocalGrid(client_app.app, nodes, run_config)
        grid.window, grid.together = cohort.clients, client_app.train_rounds
        yield grid
        return
    theirs = {**bench.settled, "processes": 1, "threads": choice.threads}
    toml = config.model_copy(update={"runtime": config.runtime.model_copy(update=theirs)}).to_toml()
    with children_for([choice.environment(place) for place in range(choice.processes)]) as children:
        yield ProcessGrid(
            client_app.app,
            nodes,
            run_config,
            children=children,
            cohort=cohort.clients,
            work=expected_tokens(bench),
            their_run_config={**run_config, "toml": toml},
        )


def _as_before(config: RunConfig, rundir: RunDir) -> RunConfig:
    """What "auto" chose at the start is kept: another choice would round differently."""
    chosen = rundir.read_json("environment.json") or {}
    kept = {
        key: chosen[key]
        for key in ("kernels", "attention", "prefix_cache", "cohort", "processes")
        if getattr(config.runtime, key) == "auto" and chosen.get(key) is not None
    }
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=kept)})
