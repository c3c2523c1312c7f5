"""The server: one ServerApp for the in-process engine, Flower's simulation and a SuperLink."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.adapter import AdapterState
from fedlora.aggregators import GlobalState, equivalent_adapter
from fedlora.config import RunConfig, overruled
from fedlora.data.describe import describe_partition
from fedlora.data.own import brought_by_nodes
from fedlora.errors import ExportError, FedloraError
from fedlora.federation.load_rule import load_rule
from fedlora.flower.app_config import config_of
from fedlora.flower.crew import WorkerPool
from fedlora.flower.server_ledger import ServerLedger
from fedlora.flower.spending import Spending
from fedlora.flower.strategy import Federation
from fedlora.privacy.server_dp import ServerDP
from fedlora.progress import LONGEST_LINE, PlainProgress, Progress
from fedlora.provenance import MODEL
from fedlora.report import write_report
from fedlora.runs.rundir import PROVENANCE, RunDir
from fedlora.sanitize import clean_text
from fedlora.tracking import tracked
from fedlora.training.export import export_adapter
from fedlora.training.runtime import describe
from fedlora.training.workspace import Workspace, open_workspace
from fedlora.unexpected import describe_exception

app = ServerApp()
logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class RunOutcome:
    """What a finished run leaves.

    Args:
        state: after the last round.
        adapter: the exported adapter, equivalent to `state` on the original base.
        records: lines of metrics.jsonl.
        rundir: where the files are.
        refusal: why the exported adapter was not verified, and where it is kept; None: it was.
    """

    state: GlobalState
    adapter: AdapterState
    records: list[dict[str, Any]]
    rundir: RunDir
    refusal: ExportError | None = None


@dataclass
class Session:
    """What the caller of an app in the same process hands in and gets back."""

    rundir: RunDir | None = None
    progress: Progress | None = None
    resume: bool = False
    crew: WorkerPool | None = None
    outcome: RunOutcome | None = None


_session: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def session(value: Session) -> Iterator[Session]:
    """Inside, `app` writes to the session's run directory and leaves its outcome there."""
    token = _session.set(value)
    try:
        yield value
    finally:
        _session.reset(token)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; resume where the run config says `resume = true`."""
    try:
        _main(grid, context)
    except Exception as error:
        if _session.get() is None:  # Flower logs a traceback: before it, the line that matters
            line = str(error) if isinstance(error, FedloraError) else describe_exception(error)
            logger.error("error: %s", clean_text(line, LONGEST_LINE))
        raise


def _main(grid: Grid, context: Context) -> None:
    config = config_of(context)
    here = _session.get() or Session(resume=bool(context.run_config.get("resume", False)))
    rundir = here.rundir or _open(config, here.resume)
    folder = str(context.run_config.get("ledger-dir", ""))
    try:
        here.outcome = run_rounds(
            grid,
            config,
            rundir,
            here.progress or PlainProgress(logger.info),
            resume=here.resume,
            ledgers=Path(folder) if folder else None,
            crew=here.crew,
        )
    except Exception:
        if here.rundir is None and not here.resume:
            rundir.discard_if_untrained()
        raise
    if _session.get() is None:  # otherwise the caller says where it is, after what it has to add
        logger.info("report: %s", rundir.report)


def _open(config: RunConfig, resume: bool) -> RunDir:
    return RunDir.open(Path(config.output) / config.name, config) if resume else RunDir.create(config)


def run_rounds(
    grid: Grid,
    config: RunConfig,
    rundir: RunDir,
    progress: Progress,
    *,
    resume: bool,
    ledgers: Path | None = None,
    crew: WorkerPool | None = None,
) -> RunOutcome:
    """All that is left of a run, and its artefacts.

    Args:
        grid: in-process, Ray or a SuperLink.
        config: of the run.
        rundir: where it is written.
        progress: is told what happens.
        resume: go on from the last checkpoint.
        ledgers: of a private simulation: the folder with the clients' ledgers.
        crew: the processes that ask clients; None: this one does.

    Raises:
        ExportError: all rounds are done, and the adapter does not say without us what it said in training.
        FedloraError: of any other kind; the run directory is then as it was after the last finished round.
    """
    rule = load_rule(config)
    workspace = open_workspace(config)
    spending = None if config.example_privacy is None else Spending(config, rundir, ledgers)
    account = spending or (ServerLedger(config, rule, rundir) if isinstance(rule, ServerDP) else None)
    with rundir.writing():
        if resume and account is not None:
            account.prepare(rundir)
        if resume and rundir.rounds_done and not rundir.provenance.known:
            progress.message(
                f"{rundir.path / PROVENANCE} is missing: whether base and data are still those that the run was made "
                "with is not known"
            )
        rundir.pin(workspace.pins)
        state = rundir.resume() if resume else None
        rundir.note_environment(**describe(), **workspace.choices, new_weights=workspace.base.notes)
        for note in (*overruled(config), *workspace.base.notes):
            progress.message(note)
        if config.privacy is None and not brought_by_nodes(config):  # sizes and label counts are the clients' own
            rundir.write_json("partition.json", describe_partition(workspace.data))
        with tracked(progress, config, rundir) as told:
            state = Federation(grid, config, rule, workspace, rundir, told, spending, crew).run(state)
            outcome = finish(state, config, workspace, rundir, account)
    if account is not None:
        progress.message(rundir.read_json("result.json")["privacy"]["statement"])
    try:
        write_report(rundir)
    except (FedloraError, OSError) as error:  # the run is complete without it
        progress.message(f"no report: {error}; try again with: fedlora report {rundir.path}")
    if outcome.refusal is not None:
        raise outcome.refusal
    return outcome


def finish(
    state: GlobalState,
    config: RunConfig,
    workspace: Workspace,
    rundir: RunDir,
    account: Spending | ServerLedger | None = None,
) -> RunOutcome:
    """Write the adapter that plain PEFT loads, and the file that says that the run is finished."""
    adapter, error = equivalent_adapter(state, config.adapter.export_rank or sys.maxsize)
    refusal: ExportError | None = None
    checked: dict[str, Any] = {}
    facts: dict[str, Any] = {
        "strategy": config.strategy.name,
        "rounds": str(state.round),
        "base": config.model.name,
        "provenance": workspace.pins.only(MODEL).known,
    }
    try:
        checked["logits_difference"] = export_adapter(workspace, state, adapter, error, rundir.adapter_dir, facts)
    except ExportError as unlike:  # what was measured is told all the same
        refusal, checked["error"] = unlike, str(unlike)
    records = rundir.read_metrics()
    last = {key: value for key, value in records[-1].items() if key not in ("clients", "asked", "answered")}
    claim = {} if account is None else {"privacy": account.summary(records)}
    result = {"rounds": state.round, "relative_error": error, "export": checked, "last": last, **claim}
    rundir.write_json("result.json", result)
    return RunOutcome(state, adapter, records, rundir, refusal)
