"""`fedlora run`: train a federation in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import MaybeConfig, Overrides, app, open_console, open_workspace, stops_in_one_line
from fedlora.errors import ConfigError, RunDirError

if TYPE_CHECKING:
    from rich.console import Console

    from fedlora.config import RunConfig
    from fedlora.runs.rundir import RunDir
    from fedlora.terminal import Terminal


@app.command()
def run(
    config_path: MaybeConfig = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="DIR", help="Go on with the run in this folder, to round N if --set rounds=N."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also train each client alone, and on all data in one place (slow).")
    ] = False,
    baseline_clients: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Train only N clients alone, taken evenly from the domains."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="DIR",
            help="In each round only those clients answer that did in the run in this folder.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the table at the end.")] = False,
) -> None:
    """Train a federation in this process and write everything to runs/NAME."""
    from fedlora.api import train
    from fedlora.report import write_report
    from fedlora.terminal import Terminal

    console = open_console()
    config, run_dir = _which_run(config_path, overrides or [], resume, overwrite)
    if baselines and config.privacy is not None:
        raise ConfigError(
            "--baselines trains without privacy on data that [privacy] protects: use a config without [privacy]",
            code="baselines-not-private",
        )

    def go_on() -> str:
        path = run_dir.path if run_dir else Path(config.output) / config.name
        kept = (path / "config.toml").is_file()
        return f"go on with: fedlora run --resume {path}" if kept else "nothing was kept"

    with stops_in_one_line(go_on), Terminal(console, quiet=quiet) as terminal:
        terminal.doing(f"loading {config.model.name} and {config.data.source}")
        if baselines and run_dir is not None:
            _require_start(config, run_dir)
        run_dir = train(config, terminal, folder=run_dir, overwrite=overwrite, replay=replay)
        if baselines:
            _baselines(config, run_dir, baseline_clients, terminal)
            write_report(run_dir)
    _show_outcome(console, run_dir)


def _which_run(
    config_path: Path | None, overrides: list[str], resume: Path | None, overwrite: bool
) -> tuple[RunConfig, RunDir | None]:
    """The config, and the run to go on with, if any."""
    from fedlora.config import load_config
    from fedlora.runs.rundir import RunDir

    if resume is None:
        if config_path is None:
            raise ConfigError(
                "no config is named: use fedlora run CONFIG, or fedlora run --resume runs/NAME", code="no-config-file"
            )
        return load_config(config_path, overrides), None
    if overwrite:
        raise ConfigError(
            "--resume continues a run and --overwrite starts it again: give only one of them",
            code="resume-and-overwrite",
        )
    RunDir.open(resume)  # says if there is no run, before anything is said about its config
    config = load_config(config_path or resume / "config.toml", overrides)
    return config, RunDir.open(resume, config)


def _require_start(config: RunConfig, run_dir: RunDir) -> None:
    """Raise, before a run goes on, unless the adapter that it began with is still there for the baselines."""
    from fedlora.federation.given_adapter import pins_of, read_start

    if config.adapter.start is None:
        return
    workspace = open_workspace(config)
    try:
        pins = pins_of(workspace, read_start(workspace))
        run_dir.require(pins.only(("start",)), "put it back, or resume without --baselines")
    except RunDirError as error:
        if error.code != "not-an-adapter":
            raise
        raise RunDirError(
            f"--baselines begin with the adapter in {config.adapter.start!r}, which is not there: put it back, or "
            "resume without --baselines",
            code="not-an-adapter",
        ) from None


def _baselines(config: RunConfig, run_dir: RunDir, number: int | None, terminal: Terminal) -> None:
    from fedlora.data.describe import main_domains
    from fedlora.evaluation.baselines import centralised, local_only, spread_over_domains
    from fedlora.federation.given_adapter import pins_of, read_start

    workspace = open_workspace(config)
    run_dir.require(pins_of(workspace, read_start(workspace)))  # of a run that was finished before
    everyone = len(workspace.data.clients)
    chosen = spread_over_domains(main_domains(workspace.data), everyone, number or everyone)
    if len(chosen) < everyone:
        terminal.message(f"local-only: {len(chosen)} of {everyone} clients: {', '.join(map(str, chosen))}")
    terminal.doing("training clients alone")
    alone = local_only(workspace, chosen, report=terminal.message)
    terminal.doing("training on all data in one place")
    seen = [row.get("examples_seen") for record in run_dir.read_metrics() for row in record.get("clients", {}).values()]
    known = int(sum(seen)) if seen and None not in seen else None
    run_dir.write_json(
        "baselines.json", {"local_only": alone, "centralised": centralised(workspace, known, report=terminal.message)}
    )


def _show_outcome(console: Console, run_dir: RunDir) -> None:
    from fedlora.progress import before_training
    from fedlora.terminal import outcome_table, samples_table, totals

    records, result = run_dir.read_metrics(), run_dir.read_json("result.json") or {}
    baselines, before = run_dir.read_json("baselines.json"), before_training(run_dir.config)
    console.print()
    console.print(outcome_table(records, baselines, console.width, result.get("kept_round"), before))
    console.print()
    if samples := run_dir.read_json("samples.json"):
        console.print(samples_table(samples))
    claim = result.get("privacy", {}).get("statement")
    console.out(totals(records, claim))
    console.out(f"files: {run_dir.path} (adapter/ is in PEFT's format)")
    console.out(f"report: {run_dir.report}")
