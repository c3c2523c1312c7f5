"""Which aggregation rule, when the clients' data and ranks differ? See README.md.

    fedlora assets digits digits-vit
    python simulations/rules/run.py    # what is done is not repeated

Each rule has in each setting a learning rate of its own, chosen on a seed that is not reported: see `rate_of`. Robust
rules are in simulations/attacks, those that make a model for each client in simulations/personal.

Each run adds a row to results.csv in DIR (beside this file, if none is named), and rows that are there are not run
again: remove some to repeat them. Writes table.md and plot.png of what is there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedlora.compare import render_table, student_interval
from fedlora.config import load_config
from fedlora.sweep.in_memory import ResultRows, run_in_memory

HERE = Path(__file__).resolve().parent
LADDER = tuple(float(f"{digit}e{power}") for power in range(-5, 3) for digit in (1, 1.8, 3.2, 5.6))
CHOOSES, SEEDS = 100, (0, 1, 2, 3, 4)
WINDOW = 5
"""Evaluations, four rounds apart, over which an accuracy is averaged."""
CLIMBS = 0.01
"""Gain over the last WINDOW evaluations, which with an interval above zero is called climbing."""
RANKS = (32, 32, 16, 16, 8, 8, 4, 4, 2, 2)
KEYS = ["setting", "rule", "lr", "seed"]
BASE = "FedAvg"


@dataclass(frozen=True)
class Rule:
    """A row of a table.

    Args:
        strategy: fields of `[strategy]`.
        group: of `fedlora strategies`.
        around: a rate of the ladder: the search begins with it and those two steps below and above.
        changes: other keys that make it.
        servers: whether the rate is the server's; the clients then have FedAvg's.
    """

    strategy: str
    group: str
    around: float = 0.0056
    changes: tuple[str, ...] = ()
    servers: bool = False


SGD = ("train.optimizer=sgd",)
RULES = {
    BASE: Rule("name='fedavg'", "baseline"),
    "FFA-LoRA": Rule("name='ffa'", "exact", 0.01),
    "FLoRA": Rule("name='flora'", "exact", 0.01),
    "LoRA-FAIR": Rule("name='fair'", "baseline"),
    "FedAvg, SGD": Rule("name='fedavg'", "SGD", 0.18, SGD),
    "SCAFFOLD, SGD": Rule("name='scaffold'", "SGD", 0.18, SGD),
    "FedDyn": Rule("name='feddyn'", "drift", 0.0032),
    "RoLoRA": Rule("name='rolora'", "exact", 0.01),
    "FlexLoRA": Rule("name='flexlora'", "mixed ranks"),
    "FedSVD": Rule("name='fedsvd'", "exact", 0.01),
    "Fed-SB, rank 32": Rule("name='fedsb'", "exact", 0.01, ("adapter.rank=32", "adapter.alpha=64")),
    "RAVAN, rank 64": Rule("name='ravan'", "exact", 0.01, ("adapter.rank=64", "adapter.alpha=128")),
    "FedAvgM": Rule("name='fedavgm'", "server optimiser", 0.0018),
    "FedAdam": Rule("name='fedadam'", "server optimiser", 0.018, servers=True),
    "FedEx-LoRA": Rule("name='fedex'", "exact"),
    "FedMomentum": Rule("name='fedmomentum'", "mixed ranks"),
    "FLoRIST": Rule("name='florist'", "mixed ranks", 0.01),
    "FRLoRA": Rule("name='frlora'", "baseline"),
    "FedRot-LoRA": Rule("name='fedrot'", "baseline"),
    "q-FedAvg": Rule("name='qfedavg'", "fairness"),
    "AFL": Rule("name='afl'", "fairness"),
    "raFLoRA": Rule("name='raflora'", "mixed ranks"),
    "HetLoRA": Rule("name='hetlora'", "mixed ranks"),
    "FedYogi": Rule("name='fedyogi'", "server optimiser", 0.018, servers=True),
    "FedAdagrad": Rule("name='fedadagrad'", "server optimiser", 0.056, servers=True),
}
MIXED = (f"clients.ranks={list(RANKS)}", f"adapter.rank={max(RANKS)}", f"adapter.alpha={2 * max(RANKS)}")
MIXED_RULES = {
    BASE: Rule("name='fedavg'", "baseline", changes=("adapter.rank=2", "adapter.alpha=4")),
    "FedAvg, rank 32": Rule("name='fedavg'", "baseline", 0.0032, ("adapter.rank=32", "adapter.alpha=64")),
    **{
        name: Rule(rule.strategy, rule.group, rule.around, MIXED)
        for name, rule in RULES.items()
        if name in ("FFA-LoRA", "RoLoRA", "FedSVD", "FLoRA") or rule.group == "mixed ranks"
    },
    "FSLoRA, one scale": Rule("name='fslora'", "mixed ranks", changes=MIXED),
    "FSLoRA": Rule("name='fslora'", "mixed ranks", changes=(*MIXED, "adapter.alpha_scaling=fixed")),
}
"""FSLoRA is FedAvg where all ranks are equal; its paper has one alpha for all, so that a sketch of k units is scaled by
1 / k."""
SETTINGS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Rule]]] = {
    "label shift": (("partition.alpha=0.1",), RULES),
    "mixed ranks": (("partition.alpha=1.0",), MIXED_RULES),
}
"""Names -> keys, and the rules that are compared, in the order in which they are run; BASE has the smallest client's
rank where ranks differ."""

# ---------------------------------------------------------------------------------------------------------- the runs


class Results:
    """The rows of results.csv, one for each run; what is missing is run and added."""

    def __init__(self, path: Path) -> None:
        self.path, self._kept = path, ResultRows(path, KEYS)
        self.rows = self._kept.rows

    def accuracy(self, setting: str, rule: str, lr: float, seed: int) -> float:
        """Of a run, at its end."""
        (row,) = self._kept.of((setting, rule, lr, seed), lambda: [one_run(self._changes(setting, rule, lr, seed))])
        return float(row["accuracy"])

    def _changes(self, setting: str, rule: str, lr: float, seed: int) -> list[str]:
        changes, rules = SETTINGS[setting]
        one, clients = rules[rule], lr
        strategy = one.strategy
        if one.servers:
            strategy, clients = f"{strategy},lr={lr}", self.rate_of(setting, BASE)
        return [*changes, *one.changes, f"strategy={{{strategy}}}", f"train.lr={clients}", f"seed={seed}"]

    def tried(self, setting: str, rule: str) -> dict[float, float]:
        """The rates that were tried, ascending, and the accuracy of each."""
        rows = [row for row in self.rows if (row["setting"], row["rule"], row["seed"]) == (setting, rule, CHOOSES)]
        return dict(sorted((row["lr"], row["accuracy"]) for row in rows))

    def best(self, setting: str, rule: str) -> float:
        """The best of the rates that were tried, the smallest of equals; NaN if there are none."""
        tried = self.tried(setting, rule)
        return max(tried, key=tried.__getitem__, default=math.nan)

    def rate_of(self, setting: str, rule: str) -> float:
        """The best rate of those tried: three two steps apart, as many beyond an end as it takes, and both neighbours
        of the best."""
        start = LADDER.index(SETTINGS[setting][1][rule].around)
        wanted = [start - 2, start, start + 2]
        tried: dict[int, float] = {}
        while wanted:
            tried |= {k: self.accuracy(setting, rule, LADDER[k], CHOOSES) for k in wanted}
            best = max(sorted(tried), key=tried.__getitem__)
            ends = {min(tried): [best - 2], max(tried): [best + 2]}
            wanted = [k for k in ends.get(best, [best - 1, best + 1]) if k not in tried]
        return LADDER[best]


def beside(rate: float) -> tuple[float, float]:
    """The rates of the ladder below and above."""
    place = LADDER.index(rate)
    return LADDER[place - 1], LADDER[place + 1]


def one_run(changes: Sequence[str]) -> dict[str, float]:
    """A run: the accuracy over the last WINDOW evaluations (0 where it ended early), that over those before, the last
    one, and the bytes that a client sends and receives in a round."""
    config = load_config(HERE / "config.toml", changes)
    lines = run_in_memory(config)
    rounds = len(lines) - 1
    found = [line["accuracy"] for line in lines if "accuracy" in line]
    done = rounds == config.rounds  # or the state was not finite any more
    clients = rounds * config.partition.fields["clients"]
    return {
        "accuracy": float(np.mean(found[-WINDOW:])) if done else 0.0,
        "before": float(np.mean(found[-2 * WINDOW : -WINDOW])) if done else 0.0,
        "last": found[-1],
        "rounds": rounds,
        "up": sum(line.get("bytes_up", 0) for line in lines) / max(1, clients),
        "down": sum(line.get("bytes_down", 0) for line in lines) / max(1, clients),
    }


# ------------------------------------------------------------------------------------------------ what is written


def is_above_zero(values: Sequence[float]) -> bool:
    """Whether the interval is."""
    mean, half = student_interval(values)
    return mean > half


def points(values: Sequence[float], sign: str = "") -> str:
    """Mean and 95% interval, times 100."""
    mean, half = student_interval(values)
    text = f"{100 * mean:{sign}z.1f}"
    return f"{text} ± {100 * half:.1f}" if math.isfinite(half) else text


def at_rate(results: Results, setting: str, rule: str, rate: float) -> pd.DataFrame:
    """The runs of the reported seeds, by seed."""
    rows = pd.DataFrame(results.rows)
    rows = rows[(rows.setting == setting) & (rows.rule == rule) & (rows.lr == rate) & (rows.seed != CHOOSES)]
    return rows.set_index("seed").sort_index()


def reported(results: Results, setting: str) -> dict[str, pd.DataFrame]:
    """The runs of the reported seeds at a rule's best rate, the best rule first; of rules with all seeds of BASE."""
    found = {rule: at_rate(results, setting, rule, results.best(setting, rule)) for rule in SETTINGS[setting][1]}
    seeds = set(found[BASE].index)
    found = {rule: mine for rule, mine in found.items() if seeds and set(mine.index) == seeds}
    return dict(sorted(found.items(), key=lambda row: -row[1].accuracy.mean()))


def table(results: Results, setting: str) -> pd.DataFrame:
    """A row for each rule: bold where the interval of its lead over FedAvg leaves 0 out."""
    rows = reported(results, setting)
    lines = []
    for rule, mine in rows.items():
        lead = mine.accuracy - rows[BASE].accuracy
        mean, half = student_interval(lead)
        late, late_half = student_interval(gain := mine.accuracy - mine.before)
        climbs = " (climbs)" if late > max(late_half, CLIMBS) else ""
        text = "" if rule == BASE else points(lead, "+")
        low, *_, high = results.tried(setting, rule).items()
        lines.append(
            [
                SETTINGS[setting][1][rule].group,
                rule,
                f"{mine.lr.iloc[0]:g}",
                points(mine.accuracy),
                f"**{text}**" if abs(mean) > half and text else text,
                points(gain, "+") + climbs,
                *(f"{rate:g}: {100 * accuracy:.1f}" for rate, accuracy in (low, high)),
                f"{mine.up.mean() / 1e3:.1f}",
                f"{mine.down.mean() / 1e3:.1f}",
            ]
        )
    header = ["group", "rule", "lr", "accuracy, %", "ahead of FedAvg", "gain in the last 20 rounds"]
    return pd.DataFrame(lines, columns=[*header, "smallest lr tried", "largest lr tried", "kB up", "kB down"])


def tables(results: Results, setting: str) -> str:
    """The table, and a line on FedAvg at the rates beside its own, and on who is ahead of it there, too."""
    text, rows = render_table(table(results, setting), "markdown"), reported(results, setting)
    others = {rate: at_rate(results, setting, BASE, rate) for rate in beside(results.best(setting, BASE))}
    if any(set(other.index) != set(rows[BASE].index) for other in others.values()):
        return text
    ahead = [
        rule
        for rule, mine in rows.items()
        if all(is_above_zero(mine.accuracy - base.accuracy) for base in (rows[BASE], *others.values()))
    ]
    said = " and ".join(f"{points(other.accuracy)} at {rate:g}" for rate, other in others.items())
    return f"{text}\nOn the same seeds FedAvg has {said}. Ahead of it at all three rates: {'; '.join(ahead)}.\n"


def draw(results: Results) -> None:
    """A panel for each setting: leads over FedAvg, best above; each seed a dot, and the 95% interval of the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there = {setting: rows for setting in SETTINGS if (rows := reported(results, setting))}
    figure, panels = plt.subplots(1, len(there), figsize=(5.2 * len(there), 6.4), layout="constrained", squeeze=False)
    groups = list(dict.fromkeys(rule.group for rule in RULES.values()))
    shades = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00")
    colours = dict(zip(groups, shades, strict=True))
    for panel, (setting, rows) in zip(panels.flat, there.items(), strict=True):
        base, order = rows[BASE].accuracy, list(reversed(rows))
        for place, rule in enumerate(order):
            colour, leads = colours[SETTINGS[setting][1][rule].group], 100 * (rows[rule].accuracy - base)
            mean, half = student_interval(leads)
            panel.plot(leads, [place] * len(leads), "o", color=colour, alpha=0.3, markersize=4)
            panel.plot([mean - half, mean + half], [place, place], color=colour, linewidth=2)
            panel.plot(mean, place, "|", color=colour, markersize=12, markeredgewidth=2.5)
        panel.set_yticks(range(len(order)), order, fontsize=8)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"{setting} (FedAvg: {100 * base.mean():.1f}%)", fontsize=10)
        panel.set_xlabel("ahead of FedAvg on the same seed, points")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    marks = [plt.Line2D([], [], color=colour, linewidth=2) for colour in colours.values()]
    figure.legend(marks, list(colours), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    title = "Each rule at its own best learning rate:\nseeds, and the 95% interval of their mean"
    figure.suptitle(title, fontsize=10)
    figure.savefig(results.path.parent / "plot.png", dpi=150, metadata={"Software": None})


def main() -> None:
    """Choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results.csv, table.md and plot.png")
    parser.add_argument("--no-runs", action="store_true", help="tables and plot of the rows that are there")
    args = parser.parse_args()
    results = Results(args.results / "results.csv")
    for setting in () if args.no_runs else SETTINGS:
        for rule in SETTINGS[setting][1]:
            rate = results.rate_of(setting, rule)
            for lr in (rate, *(beside(rate) if rule == BASE else ())):
                for seed in SEEDS:
                    results.accuracy(setting, rule, lr, seed)
    there = [setting for setting in SETTINGS if reported(results, setting)]
    text = "\n".join(f"{setting}:\n\n{tables(results, setting)}" for setting in there)
    (args.results / "table.md").write_text(text)
    print(text)
    draw(results)


if __name__ == "__main__":
    main()
