"""`fedlora node`: what a site decides about its own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._common import Debug, app, errors_in_one_line

node = typer.Typer(help="What a site decides about its own machine.", no_args_is_help=True)
app.add_typer(node, name="node")

Site = Annotated[Path, typer.Argument(metavar="SITE", help="The folder with the site's policy.toml.")]


@node.command("show")
def show(folder: Site, debug: Debug = False) -> None:
    """Show the policy as the worker reads it."""
    with errors_in_one_line(debug):
        from fedlora.site.policy import load_policy

        for key, value in load_policy(folder).model_dump(exclude_none=True).items():
            typer.echo(f"{key} = {value}")
