"""`fedlora audit`: try to refute a config's privacy claim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import Config, Overrides, app, open_console, open_workspace, plain_table

if TYPE_CHECKING:
    from rich.table import Table


WRAPPED = ("measured", "sound")
"""Columns that may take several lines: they name tensors."""


@app.command()
def audit(
    config_path: Config,
    overrides: Overrides = None,
    canaries: Annotated[
        int, typer.Option(min=1000, metavar="M", help="Of the attack; fewer are quicker, and find less.")
    ] = 4000,
    quick: Annotated[bool, typer.Option("--quick", help="Check the mechanism, and leave out the attacks.")] = False,
) -> None:
    """Check and attack a config's private training: the claim must hold, and broken variants must be caught.

    The checks measure norms, samples, noise and seeds of the run's own training, one after the other; the attacks
    bound epsilon by canaries. Exit status 1 if either refutes the claim, or if the attacks miss a broken step.
    """
    from fedlora.config import load_config

    console = open_console()
    config = load_config(config_path, overrides or [])
    with console.status(f"loading {config.model.name} and {config.data.source}"):
        workspace = open_workspace(config)

    from fedlora.audit.run_audit import attack, check
    from fedlora.federation.checks import clients_wanted
    from fedlora.privacy.checks import FALSE_ALARM
    from fedlora.simulation.run import refuse_early

    refuse_early(config, workspace)
    asked = clients_wanted(config, len(workspace.data.clients))

    table = _table("checked", "verdict", "measured", "sound")
    refuted = missed = False
    with console.status("checking") as status:
        for found in check(workspace, asked, generators=canaries // 4):
            row = (found.what, found.verdict, found.measured, found.bound)
            table.add_row(*row, style="bold red" if found.bad else None)
            refuted |= found.bad
            status.update(f"checking; last: {found.what}: {found.verdict}")
    console.print(table)
    console.out(f"\nA sound mechanism is refuted here with probability {FALSE_ALARM:g} at most.")
    if not quick:
        table = _table("attacked", "claimed>", "at least>", "right>", "verdict")
        with console.status("attacking") as status:
            for finding in attack(workspace, asked, canaries=canaries):
                result = finding.result
                figures = (f"{result.claimed:.2f}", f"{result.lower_bound:.2f}")
                right = f"{result.correct}/{result.guesses}"
                style = "bold red" if finding.bad else None
                table.add_row(finding.what, *figures, right, finding.verdict, style=style)
                refuted |= finding.bad and not finding.broken
                missed |= finding.bad and finding.broken
                status.update(f"attacking; last: {finding.what.strip()}: {finding.verdict}")
        console.print()
        console.print(table)
        console.out(
            "\nepsilon: what is claimed, and what it is at least, with 95% confidence. An audit can refute a claim "
            "and never prove it. Indented lines are broken on purpose."
        )
    if refuted:
        typer.echo("error: a claim is refuted: do not publish what this code trains", err=True)
    elif missed:
        typer.echo(
            "error: the attack missed a broken step, so that what holds proves little: raise --canaries", err=True
        )
    if refuted or missed:
        raise typer.Exit(1)


def _table(*titles: str) -> Table:
    """A table of columns to the left, or to the right where the title ends in ">"."""
    table = plain_table()
    for title in titles:
        table.add_column(
            title.rstrip(">"), justify="right" if title.endswith(">") else "left", no_wrap=title not in WRAPPED
        )
    return table
