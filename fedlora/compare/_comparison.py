"""Groups of runs side by side: what they reached, what it cost, and whether one is really better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fedlora.compare._bootstrap import Difference, difference
from fedlora.compare._ground import in_pairs
from fedlora.compare._groups import Group, differences, group_runs
from fedlora.compare._reading import Run, read_runs
from fedlora.compare._tables import Table, require_format
from fedlora.errors import ConfigError, nearest
from fedlora.progress import format_bytes, format_metric, format_seconds
from fedlora.provenance import in_words
from fedlora.sanitize import clean_text


@dataclass(frozen=True, eq=False)
class Column:
    """One figure of all groups.

    Args:
        title: over the column.
        values: of each group's runs, in the order of its seeds; None where a run has no such figure.
        show: a group's values as a cell.
        unit: of the values, for tables of plain numbers.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    show: Callable[[Sequence[float | None]], str]
    unit: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that `fedlora compare` says.

    Args:
        groups: settings with their runs.
        reference: the group that the others are measured against.
        differences: label -> the group's difference to the reference; without the reference.
        configuration: key -> its value in each group, of the keys that differ.
        notes: a line on each thing that the reader must know: runs that were left out, other test examples.
        reach: the value of the main figure whose price is asked for, or None.
    """

    groups: Sequence[Group]
    reference: Group
    differences: Mapping[str, Difference]
    configuration: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    reach: float | None = None

    @property
    def metric(self) -> str:
        """The name of the main figure."""
        return self.groups[0].runs[0].metric

    def render(self, form: str = "text") -> str:
        """The tables, one below the other, as one of `FORMATS`; as CSV one table with a row for each group.

        Raises:
            ConfigError: there is no such format.
        """
        require_format(form)
        if form == "csv":
            return self.raw().csv()
        tables = [table.render(form) for table in (self.figures(), self.verdicts(), self.settings()) if table.rows]
        mark = {"text": "note: ", "markdown": "Note: ", "latex": "% Note: "}[form]
        return "\n".join([*tables, *(f"{mark}{clean_text(note)}\n" for note in self.notes)])

    # ------------------------------------------------------------------------------------------ the tables

    def columns(self) -> list[Column]:
        """The figures that any of the groups has."""
        metric = self.metric
        shown = [
            Column(metric, self._of(lambda run: run.final), lambda values: _spread(metric, values)),
            Column(f"best {metric}", self._of(lambda run: run.best), lambda values: _spread(metric, values)),
            Column("worst domain", self._of(lambda run: run.worst_domain), lambda values: _spread(metric, values)),
            Column("sent", self._of(lambda run: run.total("bytes_up")), _mean(format_bytes), "bytes"),
            Column("received", self._of(lambda run: run.total("bytes_down")), _mean(format_bytes), "bytes"),
        ]
        if (reach := self.reach) is not None:
            to = format_metric(metric, reach)
            shown += [
                Column(f"bytes to {to}", self._of(lambda run: _bytes(run, reach)), _all_or_few(format_bytes), "bytes"),
                Column(f"rounds to {to}", self._of(lambda run: _round(run, reach)), _all_or_few("{:.3g}".format)),
            ]
        shown += [
            Column("aggregation error", self._of(lambda run: run.mean("aggregation_error")), _mean("{:.2g}".format)),
            Column("epsilon", self._of(lambda run: run.epsilon), _mean("{:.3g}".format)),
            Column("time", self._of(lambda run: run.total("seconds") or None), _mean(format_seconds), "seconds"),
        ]
        asked = " to "  # what was asked for has its column even where nobody got there
        return [c for c in shown if asked in c.title or any(value is not None for row in c.values for value in row)]

    def figures(self) -> Table:
        """A row for each group: mean, and sample standard deviation over its seeds."""
        columns = self.columns()
        rows = [
            [group.label, str(len(group.runs)), *(column.show(column.values[k]) for column in columns)]
            for k, group in enumerate(self.groups)
        ]
        return Table("", ["setting", "seeds", *(column.title for column in columns)], rows)

    def verdicts(self) -> Table:
        """A row for each group but the reference."""
        rows = []
        for label, found in self.differences.items():
            interval = "-" if math.isnan(found.low) else f"{self._points(found.low)} to {self._points(found.high)}"
            rows.append([label, self._points(found.mean), interval, self._verdict(found), found.why])
        unit = " in points" if _is_share(self.metric) else ""
        title = f"against {self.reference.label}: difference of the final {self.metric}{unit}, with a 95% interval"
        return Table(title, ["setting", "difference", "interval", "verdict", "from"], rows)

    def settings(self) -> Table:
        """A row for each key in which the configs differ."""
        rows = [[key, *values] for key, values in self.configuration.items()]
        return Table("what differs in the configs", ["key", *(group.label for group in self.groups)], rows)

    def raw(self) -> Table:
        """Numbers with all their digits: mean and standard deviation of each figure, differences, differing keys."""
        header = ["setting", "seeds"]
        rows = [[group.label, " ".join(str(run.seed) for run in group.runs)] for group in self.groups]
        for column in self.columns():
            name = f"{column.title} ({column.unit})" if column.unit else column.title
            header += [f"{name} mean", f"{name} sd"]
            for row, values in zip(rows, column.values, strict=True):
                row += [_digits(value) for value in mean_and_deviation([] if None in values else values)]
        header += ["difference", "difference low", "difference high", "verdict"]
        for row, group in zip(rows, self.groups, strict=True):
            found = self.differences.get(group.label)
            numbers = (found.mean, found.low, found.high) if found else (None, None, None)
            row += [*(_digits(value) for value in numbers), found.verdict if found else "reference"]
        for key, settings in self.configuration.items():
            header.append(key)
            for row, text in zip(rows, settings, strict=True):
                row.append(text)
        return Table("", header, rows)

    def _of(self, figure: Callable[[Run], float | None]) -> list[list[float | None]]:
        return [[figure(run) for run in group.runs] for group in self.groups]

    def _points(self, value: float) -> str:
        if math.isnan(value):
            return "-"
        return f"{100 * value:+.1f}" if _is_share(self.metric) else f"{value:+.3g}"

    @staticmethod
    def _verdict(found: Difference) -> str:
        if found.verdict != "undecided" or math.isnan(found.low):
            return found.verdict
        number = len(found.seeds)
        return f"{number} seed{'s' * (number > 1)} cannot decide"


def compare(paths: Iterable[str | Path], *, reach: float | None = None, against: str | None = None) -> Comparison:
    """Read runs, group them, and measure the groups against one of them.

    Args:
        paths: folders of runs, or of sweeps.
        reach: a value of the main figure: what did it take to get there?
        against: label of the reference; None: the first group.

    Raises:
        RunDirError: a path is no run, or no finished run is among them.
        ConfigError: the runs have different tasks, or there is no such group.
    """
    runs, left_out = read_runs(paths)
    groups = group_runs(runs)
    known = {group.label: group for group in groups}
    if against is not None and against not in known:
        raise ConfigError(f"there is no setting {against!r} to compare with; {nearest(against, known)}")
    if reach is not None and not (0 < reach <= 1 if _is_share(runs[0].metric) else reach > 0):
        raise ConfigError(f"--reach {reach:g} is no {runs[0].metric}: give one as it is in metrics.jsonl, such as 0.8")
    reference = known[against] if against is not None else groups[0]
    found = {group.label: difference(group, reference) for group in groups if group is not reference}
    changed = [f"{str(run.path)!r} changed {change}" for run in runs for change in run.changes]
    notes = [f"left out: {line}" for line in left_out] + [*changed, *_other_tests(groups), *_other_ground(groups)]
    notes += _one_rate(groups)
    return Comparison(groups, reference, found, differences(groups), notes, reach)


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of the values that are there; None where there are too few."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    mean = sum(known) / len(known)
    if len(known) == 1:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))


def _other_tests(groups: Sequence[Group]) -> Iterable[str]:
    for one, other in combinations(groups, 2):
        both = [(one.seeds[seed], other.seeds[seed]) for seed in sorted(one.seeds.keys() & other.seeds.keys())]
        if any(mine.test and yours.test and mine.test != yours.test for mine, yours in both):
            yield f"{one.label} and {other.label} were not tested on the same examples: mind that in the figures"


def _other_ground(groups: Sequence[Group]) -> Iterable[str]:
    """What one name stood for at different times, and what makes figures of different kinds."""
    for one, other in combinations(groups, 2):
        both = [(one.seeds[seed], other.seeds[seed]) for seed in sorted(one.seeds.keys() & other.seeds.keys())]
        if changed := in_pairs(both):
            yield (
                f"{in_words(changed)} changed between {one.label} and {other.label}, though their configs name the "
                "same: there is no verdict"
            )
        elif one.runs[0].metric == "perplexity" and any(
            "tokenizer" in mine.provenance.changed(yours.provenance) for mine, yours in both
        ):
            yield f"{one.label} and {other.label} have different tokenizers, and a perplexity counts their tokens"


def _one_rate(groups: Sequence[Group]) -> Iterable[str]:
    """Which rule is best at one learning rate says little of which is best."""
    rules = {group.runs[0].keys["strategy.name"] for group in groups}
    rates = {group.runs[0].keys["train.lr"] for group in groups}
    if len(rules) > 1 and len(rates) == 1:
        yield (
            f"all {len(rules)} rules trained at one learning rate ({rates.pop():g}), and each has a best one of its "
            "own: fedlora sweep over train.lr finds it"
        )


def _is_share(metric: str) -> bool:
    return format_metric(metric, 0.5).endswith("%")


def _spread(metric: str, values: Sequence[float | None]) -> str:
    mean, deviation = mean_and_deviation(values)
    if mean is None or deviation is None:
        return format_metric(metric, mean)
    if _is_share(metric):
        return f"{100 * mean:.1f} ± {100 * deviation:.1f}%"
    return f"{mean:.4g} ± {deviation:.2g}"


def _mean(show: Callable[[float], str]) -> Callable[[Sequence[float | None]], str]:
    def cell(values: Sequence[float | None]) -> str:
        mean, _ = mean_and_deviation(values)
        return "-" if mean is None else show(mean)

    return cell


def _all_or_few(show: Callable[[float], str]) -> Callable[[Sequence[float | None]], str]:
    """A mean over those that got there would praise whoever rarely does."""

    def cell(values: Sequence[float | None]) -> str:
        there = sum(value is not None for value in values)
        return _mean(show)(values) if there == len(values) else f"{there} of {len(values)} got there"

    return cell


def _bytes(run: Run, value: float) -> float | None:
    found = run.reach(value)
    return found[1] if found else None


def _round(run: Run, value: float) -> float | None:
    found = run.reach(value)
    return float(found[0]) if found else None


def _digits(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(value)
