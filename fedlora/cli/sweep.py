"""`fedlora sweep`: a grid of runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import Config, Debug, app, calm_loggers, errors_in_one_line
from fedlora.cli.run import INTERRUPTED
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fedlora.sweep import Sweep


@app.command()
def sweep(
    config_path: Config,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE,...", help="Alternatives of a key: train.lr=0.001,0.01. Repeatable."),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N", help="How many, from 0; or which, such as 3,4,7.")
    ] = "1",
    select: Annotated[
        list[str] | None,
        typer.Option(
            "--select", metavar="KEY", help="Take each setting's best alternative of this --set key. Repeatable."
        ),
    ] = None,
    select_seed: Annotated[
        int, typer.Option("--select-seed", min=0, metavar="SEED", help="Choose on this seed, which is not reported.")
    ] = 100,
    processes: Annotated[
        int, typer.Option("--processes", "-j", min=1, metavar="N", help="Runs at once, of one thread each.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for the runs; else runs/NAME-sweep.")
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="WHAT", help="Of a finished run: all, adapter (no checkpoints) or metrics.")
    ] = "adapter",
    debug: Debug = False,
) -> None:
    """Run a config under every combination of settings and seeds, and compare them. Run it again to go on."""
    with errors_in_one_line(debug):
        from rich.console import Console

        from fedlora.cli.compare import show
        from fedlora.compare import compare
        from fedlora.sweep import run_sweep

        calm_loggers(debug)
        what = _what(config_path, sets or [], seeds, select or [], select_seed, processes, out, keep)
        console = Console()
        try:
            with Screen(console) as screen:
                outcome = run_sweep(what, screen)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if outcome.runs:
            console.print()
            picture = what.out / "curves.png"
            show(compare(outcome.runs), picture=picture)
        console.print(f"files: {what.out}", highlight=False, soft_wrap=True)
        if outcome.failed:
            typer.echo(f"{len(outcome.failed)} failed; the same command tries them again", err=True)
            raise typer.Exit(1)


def _what(
    config: Path,
    sets: list[str],
    seeds: str,
    select: list[str],
    select_seed: int,
    processes: int,
    out: Path | None,
    keep: str,
) -> Sweep:
    """The options as a sweep."""
    from typing import get_args

    from fedlora.config import load_config
    from fedlora.errors import nearest
    from fedlora.rundir import Keep
    from fedlora.sweep import Selection, Sweep, grid

    if keep not in get_args(Keep):
        raise ConfigError(f"--keep {keep!r} is none of them; {nearest(keep, get_args(Keep))}")
    keys = [text.partition("=")[0].strip() for text in sets]
    for key in select:
        if key not in keys:
            raise ConfigError(f"--select {key} needs its alternatives: --set {key}=...,...; {nearest(key, keys)}")
    settings = grid([text for key, text in zip(keys, sets, strict=True) if key not in select])
    chosen = grid([text for key, text in zip(keys, sets, strict=True) if key in select])
    base = load_config(config)
    folder = out or Path(base.output) / f"{base.name}-sweep"
    selection = Selection(chosen, select_seed) if select else None
    return Sweep(config, folder, settings, _seeds(seeds), selection, processes, keep)  # type: ignore[arg-type]


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or parts == ["0"]:
        raise ConfigError(f"--seeds {text!r}: give a number of seeds, such as 5, or seeds, such as 3,4,7")
    return tuple(range(int(parts[0]))) if len(parts) == 1 else tuple(int(part) for part in parts)


class Screen:
    """Finished runs scroll up, and below them one line says how far the whole is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._runs = self._rounds = self._runs_done = self._rounds_done = self._failed = self._before = 0
        self._started = time.monotonic()
        self._status = console.status("checking the configs", spinner="dots") if console.is_terminal else None

    def __enter__(self) -> Screen:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def begun(self, runs: int, rounds: int, runs_done: int, rounds_done: int) -> None:
        """Say what is to be done."""
        self._runs, self._rounds, self._runs_done, self._rounds_done = runs, rounds, runs_done, rounds_done
        self._before, self._started = rounds_done, time.monotonic()
        self._print(f"{runs} run{'s' * (runs != 1)}, {runs_done} of them done before")
        self._update()

    def round_ended(self, name: str, number: int) -> None:  # noqa: ARG002
        """Move on."""
        self._rounds_done += number > 0
        self._update()

    def run_ended(self, name: str, why: str | None) -> None:
        """A line for each run."""
        if why is None:
            self._runs_done += 1
        else:
            self._failed += 1
        self._print(f"{self.line()}: {name}" + ("" if why is None else f" failed: {why}"))
        self._update()

    def chosen(self, setting: str, candidate: str, tried: Mapping[str, float]) -> None:
        """A line for each choice."""
        found = ", ".join(f"{name} {value:.4g}" for name, value in tried.items())
        self._print(f"{setting or 'the config'}: {candidate} is chosen ({found})")

    def line(self) -> str:
        """How far the whole is, and how long the rest will take."""
        from fedlora.progress import format_seconds

        text = f"{self._runs_done} of {self._runs} runs"
        if self._failed:
            text += f", {self._failed} failed"
        here, spent = self._rounds_done - self._before, time.monotonic() - self._started
        left = self._rounds - self._rounds_done
        if here > 0 and left > 0:
            text += f", about {format_seconds(spent / here * left)} left"
        return text

    def _update(self) -> None:
        if self._status is not None:
            self._status.update(f"{self.line()} (round {self._rounds_done} of {self._rounds} in all)")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
