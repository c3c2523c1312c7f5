"""`fedlora report`: everything about a run in one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._common import app


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, finished or not: runs/NAME.")],
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write a run's report: one HTML file that needs nothing else, in the run's folder."""
    from fedlora.report import write_report
    from fedlora.runs.rundir import RunDir

    path = write_report(RunDir.open(run))
    typer.echo(f"report: {path}")
    if show:
        typer.launch(path.resolve().as_uri())
