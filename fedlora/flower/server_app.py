"""The server: one ServerApp for Flower's simulation and a SuperLink."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.callbacks import Callback, Callbacks
from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.federation.adapter_evaluation import (
    EVALUATION,
    evaluate_adapter,
    evaluation_dir,
    require_clients_evaluate,
)
from fedlora.federation.given_adapter import adapter_folder
from fedlora.federation.load_rule import load_rule
from fedlora.federation.run import RunOutcome, run_federation
from fedlora.files import write_atomically
from fedlora.flower import patience
from fedlora.flower.app_config import config_of
from fedlora.flower.flower_clients import FlowerClients
from fedlora.progress import LONGEST_LINE, PlainProgress
from fedlora.runs.rundir import RunDir
from fedlora.sanitize import clean_text
from fedlora.training.workspace import open_workspace
from fedlora.unexpected import describe_exception

app = ServerApp()
logger = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; resume where the run config says `resume = true`."""
    patience.install()
    patience.bound(grid)
    try:
        _main(grid, context)
    except Exception as error:
        # Flower logs a traceback: before it, the line that matters.
        known = str(error) if isinstance(error, FedloraError) else patience.in_words(error)
        line = known or describe_exception(error)
        logger.error("error: %s", clean_text(line, LONGEST_LINE))
        raise


def _main(grid: Grid, context: Context) -> None:
    config, resume = config_of(context), bool(context.run_config.get("resume", False))
    if adapter := str(context.run_config.get("evaluate", "")):
        logger.info("figures: %s", evaluate(grid, config, Path(adapter), PlainProgress(logger.info)))
        return
    folder = Path(config.output) / config.name
    rundir = RunDir.open(folder, config) if resume else RunDir.create(config)
    ledgers = str(context.run_config.get("ledger-dir", ""))
    try:
        serve(
            grid, config, rundir, PlainProgress(logger.info), resume=resume, ledgers=Path(ledgers) if ledgers else None
        )
    except Exception:
        if not resume:
            rundir.discard_if_untrained()
        raise
    logger.info("report: %s", rundir.report)


def serve(
    grid: Grid, config: RunConfig, rundir: RunDir, *callbacks: Callback, resume: bool, ledgers: Path | None = None
) -> RunOutcome:
    """`fedlora.federation.run.run_federation` with the nodes of a grid as its clients."""
    rule, workspace = load_rule(config), open_workspace(config)

    def say(text: str) -> None:
        for one in callbacks:
            one.message(text)

    pool = FlowerClients(grid, config, rule, workspace, rundir, say)
    return run_federation(pool, config, rule, workspace, rundir, callbacks, resume=resume, ledgers=ledgers)


def evaluate(grid: Grid, config: RunConfig, adapter: Path, *callbacks: Callback) -> Path:
    """Let the nodes of a grid measure an adapter, without training.

    Args:
        grid: The nodes.
        config: Of the federation.
        adapter: Folder of the adapter, or of its run, on this machine.
        callbacks: Told who reports nothing.

    Returns:
        The file with what `fedlora.federation.adapter_evaluation.evaluate_adapter` gives, whose errors these are.
    """
    require_clients_evaluate(config)
    workspace, told, folder = open_workspace(config), Callbacks(*callbacks), evaluation_dir(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.path / "run-id", uuid.uuid4().hex.encode())
    pool = FlowerClients(grid, config, load_rule(config), workspace, folder, told.message)
    found = evaluate_adapter(pool, config, workspace, adapter_folder(adapter), told)
    return folder.write_json(EVALUATION, {"adapter": str(adapter), **found})
