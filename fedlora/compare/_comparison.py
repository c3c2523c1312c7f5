"""Groups of runs side by side: what they reached, what it cost, and whether one is really better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from fedlora.compare._difference import Difference, difference
from fedlora.compare._groups import Group, differing_keys, group_runs, silently_changed
from fedlora.compare._runs import ALONE, OWN_MODEL, SHARED_MODEL, Run, read_runs
from fedlora.compare._tables import render_table, require_format
from fedlora.errors import ConfigError, nearest
from fedlora.progress import format_bytes, format_metric, format_seconds
from fedlora.provenance import in_words
from fedlora.sanitize import clean_text

COSTS: Mapping[str, tuple[Callable[[float], str], str]] = {
    "sent": (format_bytes, " (bytes)"),
    "received": (format_bytes, " (bytes)"),
    "bytes": (format_bytes, " (bytes)"),
    "rounds": ("{:.3g}".format, ""),
    "aggregation": ("{:.2g}".format, ""),
    "epsilon": ("{:.3g}".format, ""),
    "Gini": ("{:z.3f}".format, ""),
    "time": (format_seconds, " (seconds)"),
}
"""First word of a cost's name -> how its mean is shown, and its unit in tables of plain numbers."""

CLIMBS = 0.05
"""Share of all that a setting gained from which on what the last quarter of its rounds brought is said."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that `fedlora compare` says.

    Args:
        groups: settings with their runs.
        reference: the group that the others are measured against.
        differences: label -> the group's difference to the reference; without the reference.
        notes: a line on each thing that the reader must know: runs that were left out, other test examples.
        reach: a value of the main figure; the tables tell what it took to get there. None: they do not.
    """

    groups: Sequence[Group]
    reference: Group
    differences: Mapping[str, Difference]
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
            return render_table(self.raw(), form)
        unit = " in points" if _is_share(self.metric) else ""
        title = f"against {self.reference.label}: difference of the final {self.metric}{unit}, with a 95% interval"
        settings = differing_keys(self.groups).rename_axis("key").reset_index()
        own = f"{self.metric} on each client's own examples, over the clients"
        tables = {
            "": self.figures(),
            title: self.verdicts(),
            own: self.at_clients(),
            "what differs in the configs": settings,
        }
        mark = {"text": "note: ", "markdown": "Note: ", "latex": "% Note: "}[form]
        notes = [f"{mark}{clean_text(note)}\n" for note in self.notes]
        return "\n".join([render_table(table, form, title) for title, table in tables.items() if len(table)] + notes)

    def runs(self) -> pd.DataFrame:
        """The figures of each run, NaN where it has no such figure; the index is the setting."""
        labels = [group.label for group in self.groups for _ in group.runs]
        rows = [_figures(run, self.reach) for group in self.groups for run in group.runs]
        table = pd.DataFrame(rows, index=labels, dtype=float)
        asked = " to "  # what was asked for has its column even where nobody got there
        return table[[name for name in table if name == self.metric or asked in name or table[name].notna().any()]]

    def figures(self) -> pd.DataFrame:
        """A row for each group as text: mean, and sample standard deviation over its seeds."""
        table = self.runs().groupby(level=0, sort=False).agg(self._shown)
        table.insert(0, "seeds", [str(len(group.runs)) for group in self.groups])
        return table.rename_axis("setting").reset_index()

    def at_clients(self) -> pd.DataFrame:
        """Rows for each group as text, one for each model that its clients measured: the mean over the clients, the
        mean over the worst tenth of them, and Gini's coefficient; empty where no run has models of the clients' own."""
        rows, metric = [], self.metric
        found = {group.label: [run.at_clients for run in group.runs] for group in self.groups}
        if any(OWN_MODEL in run for runs in found.values() for run in runs):
            for label, runs in found.items():
                for model in (OWN_MODEL, SHARED_MODEL, ALONE):
                    spreads = [run[model] for run in runs if model in run]
                    if len(spreads) == len(runs):
                        figures = {
                            metric: [one.mean for one in spreads],
                            f"{metric}, worst tenth": [one.worst_decile for one in spreads],
                            "Gini": [one.gini for one in spreads],
                        }
                        shown = [self._shown(pd.Series(each, name=name)) for name, each in figures.items()]
                        rows.append([label, model, *shown])
        return pd.DataFrame(rows, columns=["setting", "model", metric, f"{metric}, worst tenth", "Gini"])

    def verdicts(self) -> pd.DataFrame:
        """A row for each group but the reference, as text."""
        rows = []
        for label, found in self.differences.items():
            interval = "-" if math.isnan(found.low) else f"{self._points(found.low)} to {self._points(found.high)}"
            verdict = found.verdict
            if verdict == "undecided" and interval != "-":
                verdict = f"{len(found.seeds)} seed{'s' * (len(found.seeds) > 1)} cannot decide"
            rows.append((label, self._points(found.mean), interval, verdict, found.why))
        return pd.DataFrame(rows, columns=["setting", "difference", "interval", "verdict", "from"])

    def raw(self) -> pd.DataFrame:
        """A row for each group: mean and standard deviation of each figure, differences, and the keys that differ."""
        groups = self.runs().rename(columns=_with_unit).groupby(level=0, sort=False)
        table = groups.agg([("mean", _mean), ("sd", _deviation)])
        table.columns = [" ".join(column) for column in table]
        table.insert(0, "seeds", [" ".join(str(run.seed) for run in group.runs) for group in self.groups])
        names = {"mean": "difference", "low": "difference low", "high": "difference high", "verdict": "verdict"}
        found = {label: [getattr(one, field) for field in names] for label, one in self.differences.items()}
        verdicts = pd.DataFrame.from_dict(found, orient="index", columns=list(names.values()))
        table = table.join(verdicts).fillna({"verdict": "reference"}).join(differing_keys(self.groups).T)
        return table.rename_axis("setting").reset_index()

    def _shown(self, values: pd.Series) -> str:
        """The values of a group's runs as a cell."""
        name, there = str(values.name), int(values.notna().sum())
        if " to " in name and there < len(values):  # a mean over those that got there would praise whoever rarely does
            return f"{there} of {len(values)} got there"
        mean, deviation = _mean(values), _deviation(values)
        if math.isnan(mean) and self.metric not in name:
            return "-"
        if self.metric not in name and name != "worst domain":
            return COSTS[name.split()[0]][0](mean)
        if len(values) == 1:
            return format_metric(self.metric, mean)
        if _is_share(self.metric):
            return f"{100 * mean:.1f} ± {100 * deviation:.1f}%"
        return f"{mean:.4g} ± {deviation:.2g}"

    def _points(self, value: float) -> str:
        if math.isnan(value):
            return "-"
        return f"{100 * value:+.1f}" if _is_share(self.metric) else f"{value:+.3g}"


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
        raise ConfigError(
            f"there is no setting {against!r} to compare with; {nearest(against, known)}", code="unknown-name"
        )
    if reach is not None and not (0 < reach <= 1 if _is_share(runs[0].metric) else reach > 0):
        raise ConfigError(
            f"--reach {reach:g} is not a value of {runs[0].metric}: give one as in metrics.jsonl, such as 0.8",
            code="out-of-range",
        )
    reference = known[against] if against is not None else groups[0]
    found = {group.label: difference(group, reference) for group in groups if group is not reference}
    changed = [f"{str(run.path)!r} changed {change}" for run in runs for change in run.changes]
    sizes = sorted({int(record["sample"]) for run in runs for record in run.records if "sample" in record})
    if sizes:
        changed.append(
            f"between the first and the last round {', '.join(map(str, sizes))} test examples were measured "
            f"(evaluation.sample): what is said of the best round, or of getting to a figure, is of these"
        )
    notes = [f"left out: {line}" for line in left_out] + [*changed, *_other_ground(groups), *_one_rate(groups)]
    notes += _climbing(groups)
    return Comparison(groups, reference, found, notes, reach)


def compare_cases(cases: Mapping[str, Iterable[str | Path]]) -> pd.DataFrame:
    """Compare within each case, against the case's first setting, and put the cases below each other.

    Args:
        cases: name -> folders of its runs; across cases nothing is compared.

    Returns:
        A row for each setting of each case: the case, and what `Comparison.raw` says; NaN where a case has no such
        figure, or one value of a key for all its settings.

    Raises:
        RunDirError: a path is no run, or a case has no finished run.
        ConfigError: the runs of a case have different tasks.
    """
    tables = {case: compare(paths).raw() for case, paths in cases.items()}
    return pd.concat(tables, names=["case"]).reset_index(level="case")


def _figures(run: Run, reach: float | None) -> dict[str, float | None]:
    """What a run reached and what it cost, by the name of the column."""
    found: dict[str, float | None] = {
        run.metric: run.final,
        f"best {run.metric}": run.best,
        "worst domain": run.worst_domain,
        "sent": run.by_round("bytes_up").sum(),
        "received": run.by_round("bytes_down").sum(),
    }
    if reach is not None:
        number, traffic = run.reach(reach) or (None, None)
        to = format_metric(run.metric, reach)
        found |= {f"bytes to {to}": traffic, f"rounds to {to}": number}
    return found | {
        "aggregation error": run.by_round("aggregation_error").mean(),
        "epsilon": run.epsilon,
        "time": run.by_round("seconds").sum() or None,
    }


def _other_ground(groups: Sequence[Group]) -> Iterator[str]:
    """What one name stood for at different times, and what makes figures of different kinds."""
    for one, other in combinations(groups, 2):
        pairs = one.pairs(other)
        if any(mine.test and yours.test and mine.test != yours.test for mine, yours in pairs):
            yield f"{one.label} and {other.label} were not tested on the same examples: mind that in the figures"
        if changed := silently_changed(*pairs):
            yield (
                f"{in_words(changed)} changed between {one.label} and {other.label}, though their configs name the "
                "same: there is no verdict"
            )
        elif one.runs[0].metric == "perplexity" and any(
            "tokenizer" in mine.provenance.changed(yours.provenance) for mine, yours in pairs
        ):
            yield f"{one.label} and {other.label} have different tokenizers, and a perplexity counts their tokens"


def _one_rate(groups: Sequence[Group]) -> Iterator[str]:
    """Which rule is best at one learning rate says little of which is best."""
    rules = {group.runs[0].keys["strategy.name"] for group in groups}
    rates = {group.runs[0].keys["train.lr"] for group in groups}
    if len(rules) > 1 and len(rates) == 1:
        yield (
            f"all {len(rules)} rules trained at one learning rate ({rates.pop():g}), and each has a best one of its "
            "own: fedlora sweep over train.lr finds it"
        )


def _climbing(groups: Sequence[Group]) -> Iterator[str]:
    """Settings that were stopped on their way, which are behind those that learn in fewer rounds."""
    found = {group.label: [gain for run in group.runs if (gain := _late_gain(run)) is not None] for group in groups}
    climbing = [label for label, gains in found.items() if gains and sum(gains) / len(gains) >= CLIMBS]
    if climbing and len(groups) > 1:
        yield (
            f"still climbing: {'; '.join(climbing)}. The last quarter of the rounds brought {100 * CLIMBS:g}% or more "
            "of all that was gained: compare after more rounds"
        )


def _late_gain(run: Run) -> float | None:
    """The mean of the main figure over the last quarter of the rounds without that over the quarter before, as a share
    of what was gained from the first evaluation to the last; None where one of them has no value."""
    curve = run.curve.sort_index()
    rounds = curve.index / curve.index[-1] if curve.index[-1] else curve.index
    last, before = curve[rounds > 0.75], curve[(rounds > 0.5) & (rounds <= 0.75)]
    sign = 1 if run.higher_is_better else -1
    gained = float(curve.iloc[-1] - curve.iloc[0]) * sign
    if before.empty or not np.isfinite(curve).all() or gained <= 0:
        return None
    return float(last.mean() - before.mean()) * sign / gained


def _with_unit(name: str) -> str:
    return name + COSTS.get(name.split()[0], (None, ""))[1]


def _mean(values: pd.Series) -> float:
    return float(values.mean(skipna=False))


def _deviation(values: pd.Series) -> float:
    return float(values.std(skipna=False))


def _is_share(metric: str) -> bool:
    return format_metric(metric, 0.5).endswith("%")
