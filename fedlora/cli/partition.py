"""`fedlora partition`: look at who holds what before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.cli._common import Config, Overrides, app, open_console, plain_table
from fedlora.errors import ConfigError
from fedlora.sanitize import clean_text

MOST_LABELS = 8
"""With more there is no column for each."""


@app.command()
def partition(
    config_path: Config,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", "-o", metavar="PNG", help="Draw the clients' labels here.")
    ] = None,
) -> None:
    """Show how a config divides the data over the clients, without training."""
    from rich.text import Text

    from fedlora.config import load_config
    from fedlora.data import load_data
    from fedlora.data.describe import clients_table, describe_partition, draw_labels

    console = open_console()
    config = load_config(config_path, overrides or [])
    with console.status(f"loading {config.data.source}"):
        data = load_data(config)
    clients = clients_table(data)
    counts = [column for column in clients if column.startswith("labels.")]
    if len(counts) > MOST_LABELS:
        clients = clients.drop(columns=counts)
    table = plain_table()
    table.add_column("client", justify="right")
    for column in clients:
        title = column.removeprefix("labels.") if column in counts else column.replace("_", " ")
        table.add_column(Text(clean_text(title)), justify="left" if column in ("name", "domain") else "right")
    for row in clients.itertuples(name=None):
        cells = (f"{value:.2f} bits" if isinstance(value, float) else clean_text(str(value)) for value in row)
        table.add_row(*map(Text, cells))
    console.print(table)
    lines = [clean_text(line) for line in _summary(describe_partition(data))]
    console.out("\n" + "\n".join(lines))
    if picture is not None:
        if not draw_labels(data, picture):
            raise ConfigError("this task has no labels to draw: leave out --picture", code="no-labels")
        console.out(f"picture: {picture}")


def _summary(facts: Mapping[str, Any]) -> Iterator[str]:
    sizes = facts["sizes"]
    spread = f"{min(sizes)} to {max(sizes)} on a client"
    yield f"{len(sizes)} clients, {sum(sizes)} training examples ({spread}), {facts['test_size']} to test"
    if facts["dropped"]:
        yield f"{facts['dropped']} examples are on no client: {facts['note']}"
    if facts["test_note"]:
        yield facts["test_note"]
    for what in ("label", "domain"):
        if f"{what}_js_divergence" in facts:
            yield f"mean Jensen-Shannon divergence of the {what}s: {facts[f'{what}_js_divergence']:.3f} bits"
