"""`fedlora audit`: try to refute a config's privacy claim."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora.cli._common import Config, Debug, Overrides, app, calm_loggers, errors_in_one_line, open_workbench


@app.command()
def audit(
    config_path: Config,
    overrides: Overrides = None,
    canaries: Annotated[
        int, typer.Option(min=1000, metavar="M", help="Of the attack; fewer are quicker, and find less.")
    ] = 4000,
    quick: Annotated[
        bool, typer.Option("--quick", help="Attack the private steps without the model: seconds, but it sees less.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Attack a config's private training: the claim must hold, and broken variants must be caught.

    Exit status 1 if a claim is refuted, or if the attack is too weak to catch a broken step.
    """
    with errors_in_one_line(debug):
        from rich.console import Console
        from rich.table import Table

        from fedlora.config import load_config

        calm_loggers(debug)
        console = Console()
        config = load_config(config_path, overrides or [])
        with console.status(f"loading {config.model.name} and {config.data.source}"):
            bench = open_workbench(config)

        from fedlora.flower import refuse_early
        from fedlora.flower.servable import clients_wanted
        from fedlora.training.audit import audit as attack

        refuse_early(config, bench)
        asked = clients_wanted(config, len(bench.data.clients))

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for title in ("attacked", "claimed", "at least", "right", "verdict"):
            table.add_column(title, justify="left" if title in ("attacked", "verdict") else "right", no_wrap=True)
        failed, mutants = [], 0
        with console.status("attacking") as status:
            for finding in attack(bench, asked, canaries=canaries, with_model=not quick):
                result = finding.result
                figures = (
                    ("", "", "")
                    if result is None
                    else (f"{result.claimed:.2f}", f"{result.lower_bound:.2f}", f"{result.correct}/{result.guesses}")
                )
                table.add_row(finding.what, *figures, finding.verdict, style="bold red" if finding.bad else None)
                mutants += finding.broken
                failed += [finding] if finding.bad else []
                status.update(f"attacking; last: {finding.what.strip()}: {finding.verdict}")
        console.print(table, highlight=False)
        console.print(
            "\nepsilon: what is claimed, and what it is at least, with 95% confidence. An audit can refute a claim and "
            "never prove it. Indented lines are broken on purpose.",
            highlight=False,
            soft_wrap=True,
        )
        if failed:
            refuted = [finding for finding in failed if not finding.broken]
            typer.echo(
                "error: a claim is refuted: do not publish what this code trains"
                if refuted
                else "error: the attack missed a broken step, so that what holds proves little: raise --canaries",
                err=True,
            )
            raise typer.Exit(1)
