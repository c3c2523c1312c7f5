"""`fedlora sweep`: a grid of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import Config, app, open_console, stops_in_one_line
from fedlora.errors import ConfigError

if TYPE_CHECKING:
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
) -> None:
    """Run a config under every combination of settings and seeds, and compare them. Run it again to go on."""
    from fedlora.cli.compare import show
    from fedlora.compare import compare
    from fedlora.sweep import run_sweep
    from fedlora.sweep.screen import Screen

    what = _what(config_path, sets or [], seeds, select or [], select_seed, processes, out, keep)
    console = open_console()
    with stops_in_one_line(lambda: "the same command goes on"), Screen(console) as screen:
        outcome = run_sweep(what, screen)
    if outcome.runs:
        console.print()
        picture = what.out / "curves.png"
        show(compare(outcome.runs), picture=picture)
    console.out(f"files: {what.out}")
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

    from fedlora.config import dotted, load_config, split_override
    from fedlora.errors import nearest
    from fedlora.runs.rundir import Keep
    from fedlora.sweep import Selection, Sweep, grid

    if keep not in get_args(Keep):
        raise ConfigError(f"unknown --keep {keep!r}; {nearest(keep, get_args(Keep))}", code="unknown-name")
    given = [split_override(text)[0] for text in sets]
    selected = [split_override(f"{key}=") for key in select]
    for key, (keys, rest) in zip(select, selected, strict=True):
        if rest or keys not in given:
            raise ConfigError(
                f"--select {key} has no alternatives: give them as --set {key}=...,...; "
                f"{nearest(key, map(dotted, given))}",
                code="no-alternatives",
            )
    settings = grid([text for keys, text in zip(given, sets, strict=True) if (keys, "") not in selected])
    chosen = grid([text for keys, text in zip(given, sets, strict=True) if (keys, "") in selected])
    base = load_config(config)
    folder = out or Path(base.output) / f"{base.name}-sweep"
    selection = Selection(chosen, select_seed) if select else None
    return Sweep(config, folder, settings, _seeds(seeds), selection, processes, keep)  # type: ignore[arg-type]


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or parts == ["0"]:
        raise ConfigError(
            f"--seeds {text!r} is not a number of seeds such as 5 or a list such as 3,4,7", code="bad-value"
        )
    return tuple(range(int(parts[0]))) if len(parts) == 1 else tuple(int(part) for part in parts)
