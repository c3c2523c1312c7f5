"""Is LoRA-FAIR ahead where its paper measures it? See README.md.

    fedlora assets digits digits-vit digit-domains
    python simulations/features/run.py --results DIR    # what is done is not repeated

Six rules under feature shift, one client for each domain of `digit-domains`, and under feature and label shift, two
clients for each. Each rule has in each setting its own learning rate, the best on a seed that is not reported: of START
and of those beyond for as long as the best is at an end.

Each run adds a row to results.csv in DIR (beside this file, if none is named), and rows that are there are not run
again: remove some to repeat them. Writes table.md and plot.png of what is there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from fedlora.compare import render_table, student_interval
from fedlora.config import load_config
from fedlora.sweep.in_memory import ResultRows, run_in_memory

HERE = Path(__file__).resolve().parent
FAIR, FEDAVG = "LoRA-FAIR", "FedAvg"
RULES = {
    FEDAVG: "name='fedavg'",
    "FLoRA": "name='flora'",
    "FlexLoRA": "name='flexlora'",
    FAIR: "name='fair'",
    "LoRA-FAIR, lambda = 0": "name='fair',regularisation=0.0",
    "LoRA-FAIR of A": "name='fair_of_a:FairOfA'",
}
"""Names -> `strategy`. The last one is in fair_of_a.py beside this file."""
SETTINGS = {
    "feature shift": (),
    "feature and label shift": (
        "partition.clients=12",
        "partition.within={name='dirichlet',alpha=0.5}",
        "train.steps=10",
    ),
    "feature shift, 40 rounds": ("rounds=40",),
}
RATES = (0.0010, 0.0018, 0.0032, 0.0056, 0.010, 0.018, 0.032, 0.056, 0.10)
START, CHOOSES, SEEDS = (2, 3, 4), 100, (0, 1, 2, 3, 4)
KEYS = ["setting", "rule", "seed", "lr"]


def accuracy(results: ResultRows, setting: str, rule: str, seed: int, lr: float) -> float:
    """Of a run, after its last round."""
    (row,) = results.of((setting, rule, seed, lr), lambda: [one_run(setting, rule, seed, lr)])
    return float(row["accuracy"])


def one_run(setting: str, rule: str, seed: int, lr: float) -> dict[str, float]:
    """A run: the last accuracy, the one that was measured before it, the worst domain's, and the mean of the error."""
    changes = [*SETTINGS[setting], f"strategy={{{RULES[rule]}}}", f"train.lr={lr}", f"seed={seed}"]
    config = load_config(HERE / "config.toml", changes)
    lines = run_in_memory(config)
    if len(lines) <= config.rounds:  # the state is not finite any more
        return {"accuracy": 0.0}
    *_, before, last = (line for line in lines if "accuracy" in line)
    errors = [line["aggregation_error"] for line in lines if "aggregation_error" in line]
    return {
        "accuracy": last["accuracy"],
        "before": before["accuracy"],
        "worst domain": min(figures["accuracy"] for figures in last["domains"].values()),
        "aggregation error": sum(errors) / len(errors),
    }


def rate_of(setting: str, rule: str, results: ResultRows) -> float:
    """The best rate of those tried; where that is an end of them, the next one is tried, too."""
    tried = {RATES[k]: accuracy(results, setting, rule, CHOOSES, RATES[k]) for k in START}
    while True:
        best = max(tried, key=tried.__getitem__)
        place = RATES.index(best) + {min(tried): -1, max(tried): 1}.get(best, 0)
        if not 0 <= place < len(RATES) or RATES[place] in tried:
            return best
        tried[RATES[place]] = accuracy(results, setting, rule, CHOOSES, RATES[place])


def run_all(results: ResultRows) -> None:
    """Every run that is not there yet."""
    for setting in SETTINGS:
        rates = {rule: rate_of(setting, rule, results) for rule in RULES}
        for seed in SEEDS:
            for rule, rate in rates.items():
                accuracy(results, setting, rule, seed, rate)


def main() -> None:
    """Choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of results.csv; beside this file, if not given")
    parser.add_argument("--no-runs", action="store_true", help="tables and plot of the rows that are there")
    args = parser.parse_args()
    folder = args.results or HERE
    folder.mkdir(parents=True, exist_ok=True)
    results = ResultRows(folder / "results.csv", KEYS)
    if not args.no_runs:
        run_all(results)
    everything = pd.DataFrame(results.rows)
    there = dict(iter(everything.groupby("setting", sort=False)))
    text = "\n".join(
        f"{setting}{what}:\n\n{render_table(make(rows), 'markdown')}"
        for make, what in ((table, ""), (tried, ", accuracy by learning rate on the seed that chooses, %"))
        for setting, rows in there.items()
    )
    (folder / "table.md").write_text(text)
    print(text)
    draw(there, folder / "plot.png")


# ------------------------------------------------------------------------------------------------ what is written


def by_seed(rows: pd.DataFrame, rule: str) -> pd.DataFrame:
    """A rule's rows of the seeds that are reported."""
    return rows[(rows.rule == rule) & (rows.seed != CHOOSES)].set_index("seed").sort_index()


def interval(values: pd.Series) -> str:
    """Mean and half of the 95% interval by Student's t, in points."""
    if values.empty:
        return ""
    mean, half = student_interval(values)
    return f"{100 * mean:z.1f}" + (f" ± {100 * half:.1f}" if math.isfinite(half) else "")


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each rule; differences are those on the same seeds."""
    lines = []
    base, fair = by_seed(rows, FEDAVG), by_seed(rows, FAIR)
    for rule in RULES:
        mine = by_seed(rows, rule)
        if mine.empty:
            continue
        lines.append(
            [
                rule,
                "".join(f"{rate:g}" for rate in mine.lr.unique()),
                interval(mine.accuracy),
                interval(mine["worst domain"]),
                "" if rule == FEDAVG else interval((mine.accuracy - base.accuracy).dropna()),
                "" if rule == FAIR else interval((fair.accuracy - mine.accuracy).dropna()),
                interval(mine.accuracy - mine.before),
                f"{mine['aggregation error'].mean():.2g}",
            ]
        )
    header = ["rule", "lr", "accuracy, %", "worst domain, %", "ahead of FedAvg", "LoRA-FAIR is ahead"]
    return pd.DataFrame(lines, columns=[*header, "gained at the end", "aggregation error"])


def tried(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each rule: accuracy at each learning rate on the seed that chooses, the chosen one in bold."""
    chooses = rows[rows.seed == CHOOSES]
    found = chooses.pivot(index="rule", columns="lr", values="accuracy")
    found = found.reindex([rule for rule in RULES if rule in found.index])
    lines = [
        [
            rule,
            *(
                "" if math.isnan(value) else f"**{100 * value:.1f}**" if value == line.max() else f"{100 * value:.1f}"
                for value in line
            ),
        ]
        for rule, line in found.iterrows()
    ]
    return pd.DataFrame(lines, columns=["rule", *(f"{rate:g}" for rate in found.columns)])


def draw(there: Mapping[str, pd.DataFrame], path: Path) -> None:
    """A panel for each setting: by how much each rule is ahead of FedAvg, seed by seed, and with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(there), figsize=(12, 3.4), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    others = [rule for rule in RULES if rule != FEDAVG]
    for panel, (setting, rows) in zip(panels[0], there.items(), strict=True):
        for place, rule in enumerate(others):
            ahead = (by_seed(rows, rule).accuracy - by_seed(rows, FEDAVG).accuracy).dropna()
            colour = "#D55E00" if rule == FAIR else "#0072B2"
            panel.plot(100 * ahead, [-place] * len(ahead), "o", color=colour, alpha=0.35, markersize=4)
            if len(ahead) > 1:
                mean, half = student_interval(ahead)
                panel.errorbar(100 * mean, -place, xerr=100 * half, color=colour, marker="D", capsize=3, markersize=5)
        panel.axvline(0, color="black", linewidth=1)
        panel.set_yticks([-place for place in range(len(others))], others, fontsize=9)
        panel.set_title(setting, fontsize=10)
        panel.set_xlabel("ahead of FedAvg on the same seeds, points")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Each dot a seed, bars 95% intervals; every rule at its own best learning rate", fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
