"""The in-process engine: the same two apps on a grid without processes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from fedlora.config import RunConfig, settle
from fedlora.errors import RoundError
from fedlora.federation.load_rule import load_rule
from fedlora.flower import client_app, server_app
from fedlora.flower.crew import WorkerPool, children_for
from fedlora.flower.local_grid import LocalGrid, task_identity
from fedlora.flower.ray_crew import Cluster, open_cluster, require_ray
from fedlora.flower.replay import ReplayGrid, answered_in, require_same
from fedlora.flower.servable import clients_wanted
from fedlora.flower.server_app import RunOutcome, Session
from fedlora.flower.share import Begin, cohort_grid, simulated_nodes
from fedlora.flower.sums import sums_suffice
from fedlora.progress import Progress
from fedlora.runs.rundir import RunDir
from fedlora.simulation.capacity import (
    CohortChoice,
    ProcessChoice,
    cohort_size,
    expected_tokens,
    modules_of,
    process_count,
)
from fedlora.training.step_scheduler import step_budget
from fedlora.training.workspace import Workspace, open_workspace


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
        config = as_begun(config, rundir)
    require_ray(config)
    workspace = open_workspace(config)
    run_config: dict[str, bool | float | int | str] = {"toml": settle(config, workspace.settled).to_toml()}
    if config.example_privacy is not None:
        # A session is one call: a round that an earlier one began and did not complete was seen by nobody.
        run_config |= {
            "ledger-dir": str(rundir.privacy_dir.resolve()),
            "run-id": rundir.run_id,
            "session": uuid.uuid4().hex,
        }
    number = len(workspace.data.clients)
    context = Context(1, 1, UserConfig(), RecordDict(), UserConfig(run_config))
    with ExitStack() as stack:
        crew: WorkerPool | None = None
        if replay is not None:  # one client at a time, as on machines of their own: to the byte
            grid: LocalGrid = ReplayGrid(
                client_app.app, simulated_nodes(number), run_config, answered=answered_in(replay)
            )
        else:
            asked = clients_wanted(config, number)
            cluster = None
            if config.runtime.backend == "ray" and config.runtime.processes != 1:
                cluster = stack.enter_context(open_cluster())
            choice = process_count(workspace, asked, cluster.machines if cluster else ())
            cohort = cohort_size(workspace, asked, choice.processes)
            facts: dict[str, Any] = {"processes": choice.processes, "processes_why": choice.reason}
            facts["step_tokens"] = step_budget(workspace.base).tokens
            rundir.note_environment(cohort=cohort.clients, cohort_why=cohort.reason, **facts)
            grid = cohort_grid(run_config, number, cohort.clients)
            if choice.processes > 1:
                seen = (rundir.path / "run-id").resolve() if config.example_privacy is not None else None
                crew = stack.enter_context(_crew(workspace, run_config, choice, cohort, cluster, seen))
        session = stack.enter_context(server_app.session(Session(rundir, progress, resume, crew)))
        stack.enter_context(task_identity(run_id=1))
        server_app.app(grid, context)
    if session.outcome is None:
        raise RoundError("the server app ended without a result: run again with --debug")
    if replay is not None:
        require_same(replay, session.outcome.records)
    return session.outcome


@contextmanager
def _crew(
    workspace: Workspace,
    run_config: Mapping[str, bool | float | int | str],
    choice: ProcessChoice,
    cohort: CohortChoice,
    cluster: Cluster | None,
    seen: Path | None,
) -> Iterator[WorkerPool]:
    """The processes of a run; each has its share of the machine or of a cluster, and what "auto" chose here."""
    theirs = {**workspace.settled, "processes": 1, "threads": choice.threads}
    spread = ":" not in workspace.config.runtime.device
    environments = [choice.environment(place, spread=spread) for place in range(choice.processes)]
    if cluster is not None:
        device = workspace.base.device.type  # a machine of the cluster might choose another, and an actor has one GPU
        theirs["device"] = device
        helpers: Any = cluster.helpers(environments, choice.threads, gpu=device == "cuda", file=seen)
    else:
        helpers = children_for(environments)
    config = workspace.config.model_copy(update={"runtime": workspace.config.runtime.model_copy(update=theirs)})
    toml = config.to_toml()
    begin = Begin({**run_config, "toml": toml}, len(workspace.data.clients), cohort.clients, modules_of(workspace))
    with helpers as those:
        yield WorkerPool(those, begin, expected_tokens(workspace), sums=sums_suffice(load_rule(config)))


def as_begun(config: RunConfig, rundir: RunDir) -> RunConfig:
    """With what "auto" chose when a run began, for a resume or a replay: another choice would round differently."""
    return settle(config, rundir.read_json("environment.json") or {})
