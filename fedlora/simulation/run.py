"""A federation on this machine, or on a Ray cluster: one call."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.aggregators import Aggregator, Claim
from fedlora.callbacks import Callback, Callbacks
from fedlora.config import RunConfig, settle
from fedlora.federation import checks
from fedlora.federation.adapter_evaluation import evaluate_adapter, require_clients_evaluate
from fedlora.federation.checks import clients_wanted
from fedlora.federation.client_ledger import NOWHERE, LedgerPlace
from fedlora.federation.client_pool import ClientPool
from fedlora.federation.client_store import NOTHING_KEPT, ClientStore
from fedlora.federation.load_rule import load_rule
from fedlora.federation.local_clients import LocalClients, clients_of
from fedlora.federation.run import RunOutcome, run_federation
from fedlora.runs.rundir import PUT_BACK, RunDir
from fedlora.simulation.capacity import (
    ProcessChoice,
    cohort_size,
    expected_tokens,
    modules_of,
    process_count,
    said_of_cohort,
)
from fedlora.simulation.partial_aggregates import sums_suffice
from fedlora.simulation.pool_worker import Begin
from fedlora.simulation.ray_pool import Cluster, open_cluster, require_ray
from fedlora.simulation.replay import ReplayPool, require_same
from fedlora.simulation.worker_pool import WorkerPool, child_processes
from fedlora.training.row_groups import pass_cost
from fedlora.training.workspace import Workspace, open_workspace


def refuse_early(config: RunConfig, workspace: Workspace, *, begun: bool = False) -> None:
    """Raise for a config that cannot be simulated, before a run directory is made or an old one removed.

    Args:
        config: of the run.
        workspace: opened for it.
        begun: see `fedlora.federation.checks.refuse_early`.

    Raises:
        ConfigError: Ray is asked for and missing.
        FedloraError: see `fedlora.federation.checks.refuse_early`.
    """
    require_ray(config)
    checks.refuse_early(config, workspace, begun=begun)


def run_simulation(
    config: RunConfig,
    rundir: RunDir,
    *callbacks: Callback,
    resume: bool = False,
    replay: Sequence[Mapping[str, Any]] | None = None,
) -> RunOutcome:
    """Run a federation in this process, and in others of its own where that is worth it.

    Args:
        config: Of the run.
        rundir: Where it is written.
        callbacks: Told what happens.
        resume: Go on from the run directory's last checkpoint; `config` may ask for more rounds than it did then.
        replay: Lines of metrics of a run: in each round only those clients answer that did then.

    Raises:
        FedloraError: of any kind; the run directory stays intact.
    """
    if resume:
        rundir = RunDir.open(rundir.path, config)  # refuses a config that is not the run's
        config = as_begun(config, rundir)
    require_ray(config)
    workspace, rule = open_workspace(config), load_rule(config)
    ledgers = NOWHERE
    if config.example_privacy is not None:
        # A session is one call: a round that an earlier one began and did not complete was seen by nobody.
        ledgers = LedgerPlace(folder=rundir.privacy_dir.resolve(), session=uuid.uuid4().hex)
    with _pool(config, rule, workspace, rundir, ledgers, replay, Callbacks(*callbacks)) as pool:
        outcome = run_federation(
            pool, config, rule, workspace, rundir, callbacks, resume=resume, ledgers=ledgers.folder
        )
    if replay is not None:
        require_same(replay, outcome.records)
    return outcome


def evaluate_in_simulation(
    config: RunConfig, folder: Path, *callbacks: Callback, run: RunDir | None = None
) -> dict[str, Any]:
    """Let the simulated clients of a config measure an adapter; nothing is trained or written.

    Args:
        config: Of the federation.
        folder: With the adapter in PEFT's format.
        callbacks: Told who reports nothing.
        run: Whose data these are to be: of other data, what clients keep apart may have been trained on.

    Returns:
        See `fedlora.federation.adapter_evaluation.evaluate_adapter`, whose errors these are.

    Raises:
        RunDirError: the run was made with something else.
    """
    require_clients_evaluate(config)
    workspace = open_workspace(config)
    if run is not None:
        run.require(workspace.pins, PUT_BACK)
    refuse_early(config, workspace, begun=True)  # with another adapter than that of `adapter.start`
    told = Callbacks(*callbacks)
    with _pool(config, load_rule(config), workspace, None, NOWHERE, None, told) as pool:
        return evaluate_adapter(pool, config, workspace, folder, told)


@contextmanager
def _pool(
    config: RunConfig,
    rule: Aggregator,
    workspace: Workspace,
    rundir: RunDir | None,
    ledgers: LedgerPlace,
    replay: Sequence[Mapping[str, Any]] | None,
    told: Callback,
) -> Iterator[ClientPool]:
    """The clients of a run, in as many processes as it is worth."""
    kept: tuple[str, LedgerPlace, ClientStore] = "", ledgers, NOTHING_KEPT
    if rundir is not None:
        kept = rundir.run_id, ledgers, ClientStore(rundir.clients_dir.resolve())
    if replay is not None:  # one client at a time, as on machines of their own: to the byte
        yield ReplayPool(LocalClients(config, rule, workspace, 1, *kept), replay)
        return
    asked = clients_wanted(config, len(workspace.data.clients))
    with _cluster(config) as cluster:
        choice = process_count(workspace, asked, cluster.machines if cluster else ())
        cohort = cohort_size(workspace, asked, choice.processes)
        for note in said_of_cohort(config, cohort):
            told.message(note)
        facts: dict[str, Any] = {"processes": choice.processes, "processes_why": choice.reason}
        facts["pass_cost"] = asdict(pass_cost(workspace.base))
        if workspace.base.needs_padding is not None:
            facts["padding_why"] = workspace.base.needs_padding
        if rundir is not None:
            rundir.note_environment(cohort=cohort.clients, cohort_why=cohort.reason, **facts)
        if choice.processes == 1:
            yield LocalClients(config, rule, workspace, cohort.clients, *kept)
            return
        begin = Begin(_of_a_worker(workspace, choice), cohort.clients, *kept, modules_of(workspace))
        environments = [
            choice.environment(place, spread=":" not in config.runtime.device) for place in range(choice.processes)
        ]
        if cluster is None:
            workers: Any = child_processes(environments)
        else:
            gpu = workspace.base.device.type == "cuda"
            keeps = Claim.PERSONAL in rule.claims or config.clients_keep
            shares = rundir is not None and (config.example_privacy is not None or keeps)
            seen = (rundir.path / "run-id").resolve() if rundir is not None and shares else None
            workers = cluster.actors(environments, choice.threads, gpu=gpu, file=seen)
        with workers as hire:
            work, sums = expected_tokens(workspace), sums_suffice(rule)
            clients = clients_of(workspace)
            yield WorkerPool(hire, choice.processes, begin, clients, work, sums=sums, say=told.message)


@contextmanager
def _cluster(config: RunConfig) -> Iterator[Cluster | None]:
    if config.runtime.backend == "ray" and config.runtime.processes != 1:
        with open_cluster() as cluster:
            yield cluster
    else:
        yield None


def _of_a_worker(workspace: Workspace, choice: ProcessChoice) -> RunConfig:
    """The config of one process: its share of the machine or of a cluster, and what "auto" chose here."""
    config = settle(workspace.config, workspace.settled)
    theirs: dict[str, Any] = {
        "processes": 1,
        "threads": choice.threads,
        "backend": "processes",
    }
    if config.runtime.backend == "ray":
        theirs["device"] = workspace.base.device.type  # another machine might choose another; an actor has one GPU
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=theirs)})


def as_begun(config: RunConfig, rundir: RunDir) -> RunConfig:
    """With what "auto" chose when a run began, for a resume or a replay: another choice would round differently."""
    return settle(config, rundir.read_json("environment.json") or {})
