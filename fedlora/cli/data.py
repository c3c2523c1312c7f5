"""`fedlora data`: how a config's examples are read, and what the model sees of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import Config, Overrides, app, open_console
from fedlora.sanitize import clean_lines, clean_text

if TYPE_CHECKING:
    from fedlora.data import FederatedData

BEGIN, END = "⟦", "⟧"
"""Around what counts in the loss."""


@app.command()
def data(
    config_path: Config,
    overrides: Overrides = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print so many training examples as the model sees them, what counts marked.")
    ] = 0,
) -> None:
    """Show how a config's data are read, without training. What it prints stays on this machine."""
    from rich.text import Text

    from fedlora.assets import Checkpoint
    from fedlora.config import load_config
    from fedlora.data import load_data
    from fedlora.tasks import load_task

    console = open_console()
    config = load_config(config_path, overrides or [])
    with console.status(f"loading {config.data.source}"):
        found = load_data(config)
    for line in _summary(found):
        console.out(clean_text(line))
    task, model = load_task(config.task), Checkpoint.of(config.model)
    owners = {int(row): client for client, rows in enumerate(found.clients) for row in rows}
    for row in range(min(show, len(found.train))):
        pieces = task.spans(found.train, row, model)
        whole = "".join(f"{BEGIN}{text}{END}" if counts else text for text, counts in pieces)
        text = Text(clean_lines(whole, 100_000))
        text.highlight_regex(f"{BEGIN}[^{END}]*{END}", "bold green")
        client = owners.get(row)
        whose = "on no client" if client is None else f"client {(found.client_names or range(client + 1))[client]}"
        title = f"training example {row}, {clean_text(whose)}, {found.train.lengths[row]} tokens"
        console.print(f"\n{title}; {BEGIN}{END} counts", style="dim", markup=False)
        console.print(text, soft_wrap=not console.is_terminal)


def _summary(found: FederatedData) -> Iterator[str]:
    yield from found.train.notes
    tested = 0 if found.test is None else len(found.test)
    yield f"{len(found.train)} training examples, {tested} to test, {len(found.clients)} clients"
    lengths = found.train.lengths
    if "input_ids" in found.train.inputs and len(lengths):
        middle = sorted(lengths.tolist())[len(lengths) // 2]
        yield f"an example has {lengths.min()} to {lengths.max()} tokens, half of them at most {middle}"
