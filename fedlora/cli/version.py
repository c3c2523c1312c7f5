"""`fedlora version`."""

from __future__ import annotations

import sys

import typer

from fedlora import __version__
from fedlora.cli._common import app


@app.command()
def version() -> None:
    """Print the versions of fedlora and of what it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    typer.echo(f"fedlora {__version__}")
    for name in ("torch", "transformers", "peft", "flwr", "opacus"):
        try:
            typer.echo(f"{name} {installed(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    typer.echo(f"python {sys.version.split()[0]}")
