"""What a run looks like in a terminal or notebook: finished rounds, and the round that is going on.

Where standard output is neither, the same lines come without the moving part.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedlora.callbacks import Callback
from fedlora.progress import (
    LONGEST_LINE,
    Columns,
    Watcher,
    before_training,
    beside_accuracy,
    beside_baselines,
    format_bytes,
    format_metric,
    format_seconds,
    headline,
    main_metric,
    trouble,
)
from fedlora.sanitize import clean_text

if TYPE_CHECKING:
    from fedlora.config import RunConfig

WAITING, DONE, LEFT_OUT = "·", "●", "✗"
SILENCE_S = 10.0
"""Where nothing moves on the screen, a line says after so many seconds what is being done."""
MOST_MARKS = 100
"""Above this many clients they are counted instead of drawn."""


class Terminal(Callback):
    """Shows a run to people.

    Use it as a context manager, so that the terminal is left in order whatever happens.

    Args:
        console: where to write.
        quiet: show nothing but the table at the end.
        silence_s: where there is no moving part, the longest time without a line.
    """

    def __init__(self, console: Console, *, quiet: bool = False, silence_s: float = SILENCE_S) -> None:
        self._console = console
        self._quiet = quiet
        self._silence_s = silence_s
        self._watcher = Watcher(self.doing)
        self._ended = threading.Event()
        self._said = time.monotonic()
        self._columns: Columns | None = None
        self._rounds = 0
        self._round = 0
        self._first_round = 1
        self._begin = self._round_begin = time.monotonic()
        self._marks: dict[int, str] = {}
        self._doing = ""
        self._live: Live | None = None
        self._speaker: threading.Thread | None = None

    def __enter__(self) -> Terminal:
        if self._quiet:
            return self
        self._watcher.__enter__()
        if self._console.is_jupyter or not self._console.is_terminal:
            speak = self._show_in_notebook if self._console.is_jupyter else self._break_silence
            self._speaker = threading.Thread(target=speak, daemon=True)
            self._speaker.start()
        else:
            self._live = Live(
                get_renderable=self._now, console=self._console, refresh_per_second=4, transient=True, auto_refresh=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._speaker is not None:
            self._speaker.join()
        if not self._quiet:
            self._watcher.__exit__()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _break_silence(self) -> None:
        while not self._ended.wait(self._silence_s / 20):
            if time.monotonic() - self._said >= 0.95 * self._silence_s:
                self._print(Text(self._status(), style="dim"))

    def _show_in_notebook(self) -> None:
        """Keep an output of the cell up to date; rich's own moving part would need ipywidgets."""
        import IPython.display

        display: Any = IPython.display.display
        shown = display({"text/plain": ""}, raw=True, display_id=True)
        while not self._ended.wait(0.25):
            text = io.StringIO()
            Console(file=text, width=self._console.width, force_jupyter=False).print(self._now())
            shown.update({"text/plain": text.getvalue().rstrip()}, raw=True)
        shown.update({"text/plain": ""}, raw=True)

    # ------------------------------------------------------------------------------------------ Progress

    def doing(self, text: str) -> None:
        """Say what is being done until the next call."""
        self._doing = clean_text(text)

    def started(self, config: RunConfig, clients: int, rounds: int) -> None:
        """One line on what runs."""
        self._rounds = rounds
        self._begin = time.monotonic()
        self._doing = f"evaluating the {before_training(config)}"
        self._print(Text(headline(config, clients, rounds), style="bold"))

    def round_started(self, number: int, asked: Sequence[int]) -> None:
        """Draw the clients as waiting."""
        if self._round == 0:
            self._first_round, self._begin = number, time.monotonic()
        self._round, self._doing, self._round_begin = number, "", time.monotonic()
        self._marks = dict.fromkeys(asked, WAITING)

    def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
        """Mark the client; a line if its reply was not used."""
        self._marks[client_id] = DONE if ok else LEFT_OUT
        if not ok:
            self._print(Text(f"round {number}: client {client_id} left out: {clean_text(note)}", style="yellow"))
        if WAITING not in self._marks.values():
            self._doing = "aggregating and evaluating"

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """The round's line, under a header before the first."""
        if self._columns is None:
            self._columns = Columns.of(record, self._console.width)
            self._print(Text(self._columns.header(), style="dim"))
        self._print(Text(self._columns.row(record)))
        self._doing = ""

    def message(self, text: str) -> None:
        """The text."""
        self._print(Text(clean_text(text, LONGEST_LINE), style="dim"))

    # ------------------------------------------------------------------------------------------ the moving part

    def _print(self, what: RenderableType) -> None:
        if not self._quiet:
            self._said = time.monotonic()
            self._console.print(what, highlight=False, soft_wrap=not self._console.is_terminal)

    def _status(self) -> str:
        """What is going on, in one line."""
        if not self._rounds or self._round == 0:
            spent = format_seconds(time.monotonic() - self._begin)
            return f"{self._doing or 'loading'} ({spent} so far)"
        answered = sum(mark == DONE for mark in self._marks.values())
        words = f"round {self._round} of {self._rounds}: {answered} of {len(self._marks)} clients answered"
        spent = format_seconds(time.monotonic() - self._round_begin)
        return f"{words}; {self._doing} ({spent} so far)" if self._doing else f"{words} ({spent} so far)"

    def _now(self) -> RenderableType:
        if not self._rounds or self._round == 0:
            return Text(self._status(), style="dim")
        width = self._console.width
        done = sum(mark != WAITING for mark in self._marks.values()) / max(1, len(self._marks))
        through = (self._round - 1 + 0.95 * done) / self._rounds
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=through, width=max(10, min(40, width - 50)))
        line.add_row(f"round {self._round} of {self._rounds}", bar, Text(self._time_left(through), style="dim"))
        return Group(line, self._clients(width))

    def _clients(self, width: int) -> Text:
        marks = self._marks
        answered, left_out = (sum(mark == kind for mark in marks.values()) for kind in (DONE, LEFT_OUT))
        text = Text("clients ")
        if len(marks) <= min(MOST_MARKS, width - 40):
            colours = {WAITING: "dim", DONE: "green", LEFT_OUT: "yellow"}
            for _, mark in sorted(marks.items()):
                text.append(mark, style=colours[mark])
            text.append(" ")
        text.append(f"{answered} of {len(marks)} answered")
        if left_out:
            text.append(f", {left_out} left out", style="yellow")
        if self._doing:
            text.append(f"; {self._doing}", style="dim")
        return text

    def _time_left(self, through: float) -> str:
        spent = time.monotonic() - self._begin
        here = through - (self._first_round - 1) / self._rounds
        if here * self._rounds < 0.5:
            return f"{format_seconds(spent)} so far"
        return f"{format_seconds(spent)} so far, about {format_seconds(spent / here * (1 - through))} left"


# ---------------------------------------------------------------------------------------------- at the end


def outcome_table(
    records: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Any] | None = None,
    width: int = 80,
    kept: int | None = None,
    before: str = "base model",
) -> Table:
    """The run in a few rows: before training, federated, and the baselines where they were trained.

    Args:
        records: lines of metrics.jsonl.
        baselines: what baselines.json holds.
        width: columns that the table may take; of the domains those that are worst after the last
            round, as many as have room.
        kept: the round whose model was kept; None: the last that was evaluated.
        before: what round 0 measured; see `fedlora.progress.before_training`.
    """
    metric = main_metric(records[0])
    evaluated = [record for record in records if record.get(metric) is not None]
    if not evaluated:
        return Table("no round was evaluated", box=None, pad_edge=False, header_style="dim")
    rows: list[tuple[str, Mapping[str, Any]]] = [(before, evaluated[0])] if evaluated[0]["round"] == 0 else []
    last = next((record for record in evaluated if record["round"] == kept), evaluated[-1])
    rows.append((f"federated, round {last['round']}", last))
    rows += beside_accuracy(metric, last)
    rows += beside_baselines(metric, last, baselines or {})
    domains = {name: clean_text(name) for name in last.get("domains", {})}
    first = max(len(name) for name, _ in rows)
    worst = sorted(domains, key=lambda name: trouble(metric, last["domains"][name].get(metric)))
    while (
        domains and first + 4 + 2 * len(domains) + sum(max(6, len(name)) for name in ("all", *domains.values())) > width
    ):
        del domains[worst.pop()]  # where not all have room, those that are in trouble have it
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(metric.replace("_", " "), no_wrap=True)
    for name in ("all", *domains.values()):
        table.add_column(Text(name), justify="right", min_width=6, no_wrap=True)
    for name, row in rows:
        cells = [row.get(metric), *(row.get("domains", {}).get(domain, {}).get(metric) for domain in domains)]
        style = "bold" if row is last else ""
        table.add_row(name, *(format_metric(metric, cell) for cell in cells), style=style)
    return table


SHOWN_SAMPLES = 2
SHOWN_CHARACTERS = 240


def samples_table(samples: Sequence[Mapping[str, str]]) -> Table:
    """What the model said to the first prompts before training and after, cut short; samples.json has all of it."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for sample in samples[:SHOWN_SAMPLES]:
        for name in ("prompt", "reference", "before", "after"):
            # The end of a prompt is what is answered; the beginning of an answer is what is said.
            text = clean_text(sample[name], 100_000)
            if len(text) > SHOWN_CHARACTERS:
                text = f"… {text[-SHOWN_CHARACTERS:]}" if name == "prompt" else f"{text[:SHOWN_CHARACTERS]} …"
            table.add_row(name, Text(text))
        table.add_row("", "")
    return table


def totals(records: Sequence[Mapping[str, Any]], claim: str | None = None) -> str:
    """Rounds, traffic and time of a run, in one line; in a second one the claim of a private run, which has no time."""
    up, down = (sum(record.get(name, 0) for record in records) for name in ("bytes_up", "bytes_down"))
    known = [record["seconds"] for record in records if record.get("seconds") is not None]
    time_taken = f" in {format_seconds(sum(known))}" if known else ""
    rounds = sum(record["round"] > 0 for record in records)
    return (
        f"{rounds} round{'s' * (rounds != 1)}{time_taken}; "
        f"clients sent {format_bytes(up)} and received {format_bytes(down)}" + (f"\n{claim}" if claim else "")
    )
