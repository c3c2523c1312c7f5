"""`fedlora assets`: fetch and list named models and corpora."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora.cli._common import app, open_console, plain_table
from fedlora.errors import AssetError, FedloraError, nearest


@app.command()
def assets(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which; the quickstart's if none is named.", show_default=False)
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Fetch nothing, only show what there is.")] = False,
) -> None:
    """Fetch the named models and corpora (those of the quickstart if none is named), and list them."""
    from fedlora.assets import ASSETS, fetch, resolve_corpus, resolve_model
    from fedlora.progress import format_bytes

    for name in names or ():
        if name not in ASSETS:
            raise AssetError(f"there is no asset {name!r}; {nearest(name, ASSETS)}", code="unknown-name")
    for name in [] if list_only else (names or [name for name, asset in ASSETS.items() if asset.needed]):
        fetch(name, report=lambda line: typer.echo(line, err=True))
    table = plain_table()
    for title in ("name", "kind", "size", "here", "about"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=title != "about")
    for name in names or ASSETS:
        asset = ASSETS[name]
        try:
            resolve_model(name) if asset.kind == "model" else resolve_corpus(name)
            here = "yes"
        except FedloraError:
            here = "no"
        table.add_row(name, asset.kind, format_bytes(asset.download_bytes), here, asset.about)
    open_console().print(table)
