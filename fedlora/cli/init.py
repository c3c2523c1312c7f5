"""`fedlora init`: a small project to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._common import app
from fedlora.errors import ConfigError

TEMPLATE = Path(__file__).parents[1] / "templates" / "project"


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or an empty one.")]) -> None:
    """Write a small project: a config, made-up data, a rule of your own with its test. Needs no network."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} already exists and is not empty: name a new folder", code="path-taken")
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(TEMPLATE.iterdir()):
        name = source.name.removesuffix(".in")  # Python files of the template are no modules of fedlora
        (folder / name).write_bytes(source.read_bytes())
        typer.echo(str(folder / name))
    typer.echo(f"next: cd {folder}, then as README.md says")
