"""`fedlora chat`: talk with an adapter's model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import Adapter, Overrides, app

if TYPE_CHECKING:
    from rich.text import Text

    from fedlora.evaluation.chat import Chat

NAMES = {False: "base", True: "tuned"}
PROMPT = "> "


@app.command()
def chat(
    adapter: Adapter,
    compare: Annotated[bool, typer.Option("--compare", help="The base model answers beside it.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message; else as in training.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", min=0.0, help="0: no chance; else as the model's settings say.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 0,
    overrides: Overrides = None,
) -> None:
    """Talk with an adapter's model; piped lines are answered one after the other."""
    from fedlora.evaluation.chat import Sampling, open_chats
    from fedlora.evaluation.pretrained_adapter import find_adapter

    source = find_adapter(adapter, overrides or [])
    sampling = Sampling(max_new_tokens, temperature, seed)
    typer.echo(f"loading {source.config.model.name} with the adapter in {source.folder}", err=True)
    chats = open_chats(source, compare=compare, system=system, sampling=sampling)
    if sys.stdin.isatty():
        typer.echo("Ctrl-C stops an answer; Ctrl-D, or Ctrl-C here, ends the conversation", err=True)
    for said in _lines():
        if sys.stdout.isatty() and len(chats) > 1:
            _side_by_side(chats, said)
        else:
            _one_by_one(chats, said)


def _lines() -> Iterator[str]:
    """What a person types, with a prompt and the arrow keys; or the lines of a pipe."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401 `input` uses it once it is there
    while True:
        try:
            line = input(PROMPT) if asks else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            typer.echo("")
            return
        if not asks and not line:
            return
        if line.strip():
            yield line.strip()


def _one_by_one(chats: list[Chat], said: str) -> None:
    """Each one's answer as it comes, after its name where there are two."""
    for one in chats:
        if len(chats) > 1:
            typer.echo(f"{NAMES[one.tuned]}: ", nl=False)
        one.answer(said, _write)
        typer.echo("")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _side_by_side(chats: list[Chat], said: str) -> None:
    """Two columns, which fill one after the other."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    texts = [""] * len(chats)

    def table() -> Table:
        out = Table(*(NAMES[one.tuned] for one in chats), expand=True)
        for column in out.columns:
            column.ratio = 1
        out.add_row(*(_plain(text) for text in texts))
        return out

    console = Console()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for number, one in enumerate(chats):

            def write(text: str, number: int = number) -> None:
                texts[number] += text
                live.update(table(), refresh=True)

            one.answer(said, write)
    console.print(table())


def _plain(text: str) -> Text:
    """As it is, without rich's markup."""
    from rich.text import Text

    return Text(text.strip())
