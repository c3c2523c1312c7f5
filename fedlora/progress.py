"""How a run tells its watcher what it is doing, and the lines of text that say it."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.fairness import fairness
from fedlora.passed_in import shown
from fedlora.sanitize import clean_text

activity = logging.getLogger("fedlora.activity")
"""What is being done right now, in a few words, for whoever watches: `activity.info("loading %s", name)`.

It is off unless a `Terminal`, or an application, listens; a message may come many times a second.
"""
activity.propagate = False


class Watcher(logging.Handler):
    """While it is entered, each message of `activity` goes to a function.

    Args:
        tell: is given the text.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def __enter__(self) -> Watcher:
        self._level = activity.level
        activity.setLevel(logging.INFO)
        activity.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        activity.removeHandler(self)
        activity.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the text on."""
        self._tell(record.getMessage())


LONGEST_LINE = 2000
"""Characters of one message; what is longer was not written to be read in a line."""


def _to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class PlainProgress(Callback):
    """One line a round, for logs and for servers.

    Args:
        write: takes each line, without its newline; None: standard output.
        width: columns that a line may have.
    """

    def __init__(self, write: Callable[[str], None] | None = None, width: int = 100) -> None:
        self._write = write or _to_stdout
        self._width = width
        self._columns: Columns | None = None

    def started(self, config: RunConfig, clients: int, rounds: int) -> None:
        """One line on what runs."""
        self._write(headline(config, clients, rounds))

    def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
        """A line for a reply that was not used."""
        if not ok:
            self._write(f"round {number}: client {client_id} left out: {clean_text(note)}")

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """The round's line, under a header before the first."""
        if self._columns is None:
            self._columns = Columns.of(record, self._width)
            self._write(self._columns.header())
        self._write(self._columns.row(record))

    def message(self, text: str) -> None:
        """The text."""
        self._write(clean_text(text, LONGEST_LINE))


def headline(config: RunConfig, clients: int, rounds: int) -> str:
    """What runs, in one line."""
    split = f"{clients} client{'s' * (clients != 1)} ({config.partition.name})"
    return clean_text(f"{config.name}: {config.strategy.name}, {shown(config.model.name)}, {split}, {rounds} rounds")


def before_training(config: RunConfig) -> str:
    """What round 0 measures: the base model, or the adapter that the run began with."""
    return "base model" if config.adapter.start is None else "starting adapter"


# ---------------------------------------------------------------------------------------------- figures as text


NOT_METRICS = {
    *("round", "asked", "answered", "refused", "missing", "clients", "rule", "domains", "aggregation_error"),
    *("loss", "train_loss", "bytes_up", "bytes_down", "seconds", "seconds_train", "seconds_evaluate"),
    *("epsilon", "spent", "sample"),
}


SHARES = {
    *("accuracy", "balanced_accuracy", "token_accuracy", "majority_share", "exact_match"),
    *("f1", "precision", "recall", "micro_f1", "macro_f1", "weighted_f1", "rouge1", "rouge2", "rougeL"),
}
"""Figures that are shown as percentages."""


SAMPLED = "~"
"""Before figures of a sample of the test examples."""


def main_metric(record: Mapping[str, Any]) -> str:
    """The name of the figure that an evaluated round reports: accuracy where there is one."""
    names = [name for name, value in record.items() if name not in NOT_METRICS and isinstance(value, int | float)]
    return "accuracy" if "accuracy" in names or not names else names[0]


def beside_accuracy(metric: str, record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What a figure is read against, as rows of a table: a name, and a record that has the figure as `metric`.

    The classes' balance and the largest class beside an accuracy, and the clients' own figures where they evaluate.
    """
    rows = {"the same, balanced over classes": "balanced_accuracy", "always the largest class": "majority_share"}
    domains: Mapping[str, Mapping[str, Any]] = record.get("domains") or {}
    beside = [
        (words, {metric: record[key], "domains": {name: {metric: of.get(key)} for name, of in domains.items()}})
        for words, key in rows.items()
        if metric == "accuracy" and key in record
    ]
    federated: Mapping[str, Mapping[str, Any]] = record.get("federated") or {}
    at_clients = {"macro": "mean over the clients", "worst_tenth": "worst tenth of the clients"}
    if domains and federated:  # the server has a test set of its own
        at_clients = {"figures": "on the clients' own examples", **at_clients}
    found = beside + [(words, dict(federated[key])) for key, words in at_clients.items() if federated.get(key)]
    shared = federated.get("shared") or {}  # where each client has a model of its own, whose figures stand above
    return found + [
        (f"shared model, {at_clients[key]}", dict(shared[key])) for key in ("macro", "worst_tenth") if shared.get(key)
    ]


def beside_baselines(
    metric: str, record: Mapping[str, Any], baselines: Mapping[str, Any]
) -> list[tuple[str, Mapping[str, Any]]]:
    """The baselines that were trained, as rows like `beside_accuracy`'s.

    Where clients keep examples apart, models trained alone are also measured each on its own client's, and read beside
    the same clients' figures in the record.

    Args:
        metric: The figure.
        record: A line of metrics.jsonl.
        baselines: What baselines.json holds.
    """
    rows: list[tuple[str, Mapping[str, Any]]] = []
    if alone := baselines.get("local_only"):
        few = "" if len(alone["clients"]) == alone["of"] else f" of {len(alone['clients'])} tried"
        rows += [(f"one client alone, {which}{few}", alone[which]) for which in ("best", "mean", "worst")]
        measured = (record.get("federated") or {}).get("clients") or {}
        own = [row for row in alone["clients"] if measured and "own" in row and str(row["client"]) in measured]
        known = [float(row["own"][metric]) for row in own if row["own"].get(metric) is not None]
        if known and all(map(math.isfinite, known)):
            spread = fairness(known, higher_is_better=not lower_is_better(metric))
            rows.append((f"trained alone, mean over the clients{few}", {metric: spread.mean}))
            rows.append((f"trained alone, worst tenth of the clients{few}", {metric: spread.worst_decile}))
    if together := baselines.get("centralised"):
        rows.append(("all data in one place", together))
    return rows


def format_metric(name: str, value: float | None) -> str:
    """Shares as percentages, everything else with four digits; "-" for what was not measured."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if name in SHARES else f"{value:.4g}"


def trouble(metric: str, value: float | None) -> float:
    """By what the worst come first when sorted; what was not measured comes last."""
    if value is None:
        return float("inf")
    return -value if lower_is_better(metric) else value


def lower_is_better(metric: str) -> bool:
    """Losses, perplexities and errors, that of calibration ("ece") among them."""
    return "loss" in metric or "perplexity" in metric or metric.endswith("error") or metric == "ece"


def format_bytes(count: float) -> str:
    """With a decimal unit: 1.2 MB is 1 200 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class Columns:
    """The columns of the table of rounds.

    Args:
        metric: name of the main figure.
        domains: those that have a column.
        hidden: how many had no room.
    """

    metric: str
    domains: tuple[str, ...] = ()
    hidden: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any], width: int) -> Columns:
        """Columns for an evaluated round, as many domains as `width` has room for."""
        metric, domains = main_metric(record), list(record.get("domains", {}))
        shown = len(domains)
        while shown and len(cls(metric, tuple(domains[:shown]), len(domains) - shown).header()) > width:
            shown -= 1
        return cls(metric, tuple(domains[:shown]), len(domains) - shown)

    def header(self) -> str:
        """The names over the columns."""
        more = [f"(+{self.hidden} more)"] if self.hidden else []
        names = [*more, "train loss", "traffic", "time"]
        return self._join(["round", self.metric, *self.domains, *names])

    def row(self, record: Mapping[str, Any]) -> str:
        """One round's line."""
        domains = record.get("domains", {})
        shares = [record.get(self.metric), *(domains.get(name, {}).get(self.metric) for name in self.domains)]
        mark = SAMPLED if "sample" in record else ""
        cells = [str(record["round"]), *(mark + format_metric(self.metric, share) for share in shares)]
        cells += [""] if self.hidden else []
        loss, seconds = record.get("train_loss"), record.get("seconds")
        traffic = record.get("bytes_up", 0) + record.get("bytes_down", 0)
        cells.append("-" if loss is None else f"{loss:.3f}")
        cells.append(format_bytes(traffic) if "bytes_up" in record else "-")
        cells.append("-" if seconds is None else format_seconds(seconds))
        return self._join(cells)

    def _join(self, cells: Sequence[str]) -> str:
        more = [len(f"(+{self.hidden} more)")] if self.hidden else []
        widths = [5, max(6, len(self.metric)), *(max(6, len(name)) for name in self.domains), *more, 10, 8, 8]
        return "  ".join(clean_text(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
