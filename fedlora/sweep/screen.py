"""What a sweep looks like in a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console

from fedlora.progress import LONGEST_LINE, format_seconds
from fedlora.sanitize import clean_text
from fedlora.sweep._sweep import Watcher


class Screen(Watcher):
    """A `Watcher` for people: finished runs scroll up, and below them one line says how far the whole is.

    Use it as a context manager, so that the terminal is left in order whatever happens.

    Args:
        console: where to write; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console = console or Console()
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

    def more(self, runs: int, rounds: int) -> None:
        """There is more to do than it seemed."""
        self._runs, self._rounds = self._runs + runs, self._rounds + rounds

    def round_ended(self, name: str, number: int) -> None:
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
        self._console.print(clean_text(text, LONGEST_LINE), highlight=False, soft_wrap=True, markup=False)
