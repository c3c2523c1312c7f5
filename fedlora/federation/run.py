"""A whole run on a pool of clients: its folder, its rounds, and what it leaves."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.aggregators import Aggregator, GlobalState, equivalent_adapter
from fedlora.callbacks import Callback, Callbacks
from fedlora.config import RunConfig, overruled
from fedlora.data.describe import describe_partition
from fedlora.data.own import brought_by_nodes
from fedlora.errors import ExportError, FedloraError, RunDirError
from fedlora.federation.client_pool import ClientPool
from fedlora.federation.given_adapter import pins_of, read_start
from fedlora.federation.privacy_account import PrivacyAccount, open_account
from fedlora.federation.run_files import RunFiles
from fedlora.federation.selection import Best, Selection
from fedlora.federation.server import FederatedServer
from fedlora.model.model_card import Origin
from fedlora.provenance import MODEL
from fedlora.report import write_report
from fedlora.runs.rundir import PROVENANCE, RunDir
from fedlora.tracking import tracked
from fedlora.training.export import export_adapter
from fedlora.training.origin import origin_of
from fedlora.training.own_loop import said_of_loops
from fedlora.training.workspace import Workspace, open_workspace

OF_THIS_RUN = (
    "; it covers the data that this run trained on, and not what the adapter that it began with (adapter.start) was "
    "trained on: that is public, or has a claim of its own, and where that is on the same examples the two add up"
)
"""What a private run's claim leaves out where the run began with an adapter."""


@dataclass(frozen=True)
class RunOutcome:
    """What a finished run leaves.

    Args:
        state: After the last round.
        adapter: The exported adapter, equivalent to `state` on the original base.
        records: Lines of metrics.jsonl.
        rundir: The folder.
        refusal: Why the exported adapter was not verified, and where it is kept; None: it was.
    """

    state: GlobalState
    adapter: AdapterState
    records: list[dict[str, Any]]
    rundir: RunDir
    refusal: ExportError | None = None


def run_federation(
    pool: ClientPool,
    config: RunConfig,
    rule: Aggregator,
    workspace: Workspace,
    rundir: RunDir,
    callbacks: Sequence[Callback],
    *,
    resume: bool,
    ledgers: Path | None = None,
) -> RunOutcome:
    """All that is left of a run, and its artefacts.

    Args:
        pool: The clients.
        config: Of the run.
        rule: That aggregates.
        workspace: The server's.
        rundir: The folder, which this call alone writes.
        callbacks: Told what happens, after the folder was written.
        resume: Go on from the last checkpoint.
        ledgers: Of a private simulation: the folder with the clients' ledgers.

    Raises:
        ExportError: all rounds are done, and the adapter does not say without us what it said in training.
        FedloraError: of any other kind; the run directory is then as it was after the last finished round.
    """
    account = open_account(config, rule, rundir, ledgers)
    told = Callbacks(*callbacks)
    with rundir.writing():
        if resume:
            account.prepare()
            if rundir.rounds_done and not rundir.provenance.known:
                told.message(
                    f"{rundir.path / PROVENANCE} is missing: whether base and data are still those that the run was "
                    "made with is not known"
                )
        start = None if resume and rundir.begun else read_start(workspace)
        rundir.pin(pins_of(workspace, start))
        state = rundir.resume() if resume else None
        rundir.note_environment(
            **workspace.machine.facts,
            **(workspace.speedups.choices | workspace.settled),
            new_weights=workspace.base.notes,
        )
        of_start = () if start is None else start.notes
        for note in (*overruled(config), *said_of_loops(config), *workspace.base.notes, *of_start):
            told.message(note)
        if config.privacy is None and not brought_by_nodes(config):  # sizes and label counts are the clients' own
            rundir.write_json("partition.json", describe_partition(workspace.data))
            for note in workspace.data.train.notes:
                told.message(note)
        with tracked(told, config, rundir) as trackers:
            everybody = Callbacks(rundir.checkpoints, RunFiles(rundir, workspace), *callbacks, *trackers)
            server = FederatedServer(pool, config, rule, workspace, account, everybody, str(rundir.path))
            state = server.run(state, rundir.read_metrics(), start)
            outcome = _finish(state, config, workspace, rundir, account)
    claim = (rundir.read_json("result.json") or {}).get("privacy")
    if claim is not None:
        told.message(claim["statement"])
    try:
        write_report(rundir)
    except (FedloraError, OSError) as error:  # the run is complete without it
        told.message(f"no report: {error}; try again with: fedlora report {rundir.path}")
    if outcome.refusal is not None:
        raise outcome.refusal
    return outcome


def _finish(
    state: GlobalState, config: RunConfig, workspace: Workspace, rundir: RunDir, account: PrivacyAccount
) -> RunOutcome:
    """Write the adapter that plain PEFT loads, and the file that says that the run is finished."""
    records, last_state = rundir.read_metrics(), state
    selection = None if config.selection is None else Selection(config, workspace.task, records)
    if config.selection is not None and config.selection.keep == "best" and selection is not None and selection.best:
        state = _best(rundir, selection.best)
    adapter, error = equivalent_adapter(state, config.adapter.export_rank or sys.maxsize)
    claim = account.summary(records)
    if claim.get("epsilon") is not None and config.adapter.start is not None:
        claim["statement"] += OF_THIS_RUN
    kept = next(record for record in records if record["round"] == state.round)
    began = rundir.provenance.start
    origin = origin_of(config, kept, claim.get("statement"), began)
    refusal: ExportError | None = None
    checked: dict[str, Any] = {}
    facts: dict[str, Any] = {
        "strategy": config.strategy.name,
        "rounds": str(state.round),
        "base": config.model.name,
        "provenance": replace(workspace.pins.only(MODEL), start=began).known,
    }
    try:
        checked["logits_difference"] = export_adapter(
            workspace, state, adapter, error, rundir.adapter_dir, facts, origin
        )
    except ExportError as unlike:  # what was measured is told all the same
        refusal, checked["error"] = unlike, str(unlike)
    shutil.rmtree(rundir.last_adapter_dir, ignore_errors=True)
    if state.round != last_state.round:
        final = next(record for record in records if record["round"] == last_state.round)
        origin = origin_of(config, final, claim.get("statement"), began)
        checked |= _export_last(last_state, config, rundir, facts, origin)
    last = {key: value for key, value in kept.items() if key not in ("clients", "asked", "answered")}
    result = {"rounds": last_state.round, "relative_error": error, "export": checked, "last": last}
    if selection is not None:
        best = None if selection.best is None else asdict(selection.best)
        stopped = selection.stopped if last_state.round < config.rounds else None
        result |= {"kept_round": state.round, "best": best, "stopped": stopped}
    rundir.write_json("result.json", result | ({"privacy": claim} if claim else {}))
    return RunOutcome(last_state, adapter, records, rundir, refusal)


def _best(rundir: RunDir, best: Best) -> GlobalState:
    """The state of the best round; `RunDirError` where it is lost."""
    state = rundir.checkpoints.best()
    if state is None or state.round != best.round:
        raise RunDirError(
            f"the state after round {best.round}, the best, is not in {str(rundir.path)!r}: set "
            "selection.keep = 'last' and resume",
            code="best-round-lost",
        )
    return state


def _export_last(
    state: GlobalState, config: RunConfig, rundir: RunDir, facts: dict[str, Any], origin: Origin
) -> dict[str, str]:
    """Write the last round's adapter beside that of the best; what is said if it could not be verified."""
    adapter, error = equivalent_adapter(state, config.adapter.export_rank or sys.maxsize)
    workspace = open_workspace(config)  # again, if the base made way for the verification of the best
    try:
        facts = facts | {"rounds": str(state.round)}
        export_adapter(workspace, state, adapter, error, rundir.last_adapter_dir, facts, origin)
    except ExportError as unlike:
        return {"last_error": str(unlike)}
    return {}
