"""`fedlora worker`: keeps the base model loaded beside a node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._common import app

Socket = Annotated[
    Path, typer.Option("--socket", metavar="PATH", help="A Unix socket, in a folder that is the user's alone.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Compute on this one, such as cuda:1, whatever configs say.", show_default=False),
]


Site = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Be the gate of the site in this folder: its policy.toml and node-config.toml say all of the node.",
        show_default=False,
    ),
]


@app.command()
def worker(
    socket: Socket,
    device: Device = None,
    site: Site = None,
    supervise: Annotated[bool, typer.Option("--supervise", help="Start it again when it dies.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say whether one serves there, by exit status.")] = False,
) -> None:
    """Answer a node's messages from one process that keeps the base model loaded, instead of a new one for each."""
    path = socket.absolute()
    if check:
        from fedlora.node_worker.client import check as ask_health

        ask_health(path, gate=site is not None)
        typer.echo(f"a worker serves {path}")
        return

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if supervise:
        from fedlora.node_worker.socket import make_folder
        from fedlora.node_worker.supervisor import supervise as keep
        from fedlora.node_worker.supervisor import worker_command

        make_folder(path, for_a_group=site is not None)
        raise typer.Exit(keep(worker_command(str(path), device=device, site=site), say))
    from fedlora.node_worker.server import run

    if status := run(path, device, site, say):
        raise typer.Exit(status)
