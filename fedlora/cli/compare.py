"""`fedlora compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import app

if TYPE_CHECKING:
    from fedlora.compare import Comparison

Form = Annotated[str, typer.Option("--format", "-f", metavar="FORMAT", help="text, markdown, csv or latex.")]


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of sweeps, which stand for their runs.")
    ],
    reach: Annotated[
        float | None,
        typer.Option("--reach", metavar="VALUE", help="What did it take to get there? E.g. 0.8 for 80% accuracy."),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="SETTING", help="Measure against this row; else the first.")
    ] = None,
    form: Form = "text",
    picture: Annotated[
        Path | None, typer.Option("--picture", "-o", metavar="PNG", help="Draw the curves by round here.")
    ] = None,
) -> None:
    """Set runs side by side: figures over seeds, what they cost, and whether one is really better."""
    from fedlora.compare import compare as compare_runs

    show(compare_runs(runs, reach=reach, against=against), form, picture)


def show(comparison: Comparison, form: str = "text", picture: Path | None = None) -> None:
    """Print a comparison, and draw it where a picture is asked for."""
    from fedlora.compare import plot_curves

    text = comparison.render(form)
    if picture is not None:
        plot_curves(comparison.groups, picture)
    typer.echo(text, nl=False)
    if picture is not None:
        typer.echo(f"picture: {picture}", err=form != "text")
