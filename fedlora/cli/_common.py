"""What all commands share: the app, argument types, and how an error is said."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperOption
from typer.models import CommandFunctionType

from fedlora import __version__
from fedlora.errors import FedloraError
from fedlora.sanitize import clean_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedlora.config import RunConfig
    from fedlora.training import Workspace

WIDE = 240
"""Columns of a line where no terminal shows it."""
DEBUG = "Show the whole traceback of an error."


class _Command(TyperCommand):
    """A command with the option --debug, of which whatever goes wrong is said in one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params.append(TyperOption(param_decls=["--debug"], is_flag=True, default=False, help=DEBUG))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command's function, which is not told of --debug."""
        with errors_in_one_line(ctx.params.pop("debug")):
            return super().invoke(ctx)


class App(typer.Typer):
    """Commands that share --debug and the way in which an error is said."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """Add a command, as `typer.Typer.command` does."""
        return super().command(name, **{"cls": _Command, **options})


app = App(
    name="fedlora",
    help="Federated fine-tuning of foundation models with low-rank adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedlora {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which fedlora this is.")
    ] = False,
) -> None:
    """Federated fine-tuning of foundation models with low-rank adapters."""


Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a shipped one: quickstart.")
]
MaybeConfig = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="A TOML file, or the name of a shipped one.", show_default=False),
]
Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="A run's folder, or an adapter's in PEFT's format.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. train.lr=0.001. Repeatable."),
]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""
READER_LEFT = 141
"""Exit status of training that stopped because nobody reads its output any more: 128 + SIGPIPE."""


def _reader_left(error: BaseException) -> bool:
    """Whether the reader of standard output, such as `head`, is gone; rich makes an exit with status 1 of it."""
    return isinstance(error, BrokenPipeError) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    )


@contextmanager
def stops_in_one_line(go_on: Callable[[], str]) -> Iterator[None]:
    """Training inside that is stopped before its end, by Ctrl-C or by a reader that leaves, is no success.

    Args:
        go_on: how it can go on, for people; asked when it has stopped.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; {go_on()}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (BrokenPipeError, SystemExit) as error:
        if not _reader_left(error):
            raise
        _ignore_closed_output()
        typer.echo(f"stopped, since nobody reads the output any more; {go_on()}", err=True)
        raise typer.Exit(READER_LEFT) from None


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Whatever is raised inside becomes one line on standard error and an exit status: 1, or 130 after Ctrl-C.

    A `FedloraError` says its own line. Any other exception is described by `fedlora.unexpected`, which keeps the
    traceback of one that nobody foresaw in a file. What Flower and PEFT tell on standard error is of use to find an
    error alone.

    Args:
        debug: tell everything, and raise errors as they are.
    """
    if not debug:
        for name in ("flwr", "datasets", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
        sys.stdout.flush()  # a reader that is gone is noticed here, not by the interpreter at its end
    except (click.exceptions.Exit, click.exceptions.Abort, click.ClickException):
        raise
    except (BrokenPipeError, SystemExit) as error:
        if not _reader_left(error):
            raise
        _ignore_closed_output()  # what `head` has not read was not wanted
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except FedloraError as error:
        if debug:
            raise
        typer.echo(f"error: {clean_text(error, 4000)}", err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            raise
        from fedlora.unexpected import describe_exception

        typer.echo(f"error: {describe_exception(error)}", err=True)
        raise typer.Exit(1) from None


def _ignore_closed_output() -> None:
    """So that the interpreter's last flush of standard output does not complain either."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file behind it, as in a test
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 it lives as long as the process


def open_console() -> Console:
    """Standard output: as wide as the terminal or as COLUMNS says; in a file or pipe wide enough for any table, whose
    lines have no blanks at their ends there.

    What is printed has no highlights; `out` writes a line as it is, and `print` with `soft_wrap`.
    """
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)

    class Piped(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            if options.get("soft_wrap"):
                super().print(*objects, **options)
                return
            with self.capture() as captured:
                super().print(*objects, **options)
            self.file.write(re.sub(r" +(?=\n)", "", captured.get()))  # a line may go on in the next call
            self.file.flush()

    return Piped(width=None if "COLUMNS" in os.environ else WIDE, highlight=False)


def plain_table(**options: Any) -> Table:
    """A table without lines."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), **options)


def open_workspace(config: RunConfig) -> Workspace:
    """The workspace of a config, after its names were checked."""
    from fedlora.aggregators import load_aggregator
    from fedlora.training import open_workspace

    load_aggregator(config.strategy.name, config.strategy.fields)  # a wrong name is said before anything is loaded
    return open_workspace(config)
