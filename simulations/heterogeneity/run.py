"""What does label skew cost each aggregation rule? See README.md.

    fedlora assets digits digits-vit
    python simulations/heterogeneity/run.py    # a quarter of an hour of one core; what is done is not repeated

Accuracy against the alpha of a Dirichlet draw over labels, for four rules, five seeds each. Each rule has one learning
rate for all alphas: the best of RATES at alpha = 0.3, on a seed that is not among the five that are reported; where the
best is the largest or the smallest tried, the next one beyond is tried as well.

The runs are in runs/; writes results.csv, table.md and plot.png beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fedlora.compare import Group, Run, compare_cases, difference, read_run, render_table
from fedlora.sweep import Outcome, Selection, Sweep, grid, run_sweep
from fedlora.sweep.screen import Screen

HERE = Path(__file__).resolve().parent
NAMES = {"fedavg": "FedAvg", "ffa": "FFA-LoRA", "flora": "FLoRA", "fair": "LoRA-FAIR"}
ALPHAS = (0.05, 0.1, 0.3, 1.0, 10.0, 100.0)
RATES = Selection(grid(["train.lr=0.001,0.003,0.01,0.03,0.1"]), seed=100, start=("lr=0.003", "lr=0.01", "lr=0.03"))
RATES_ALPHA = 0.3
SEEDS = (0, 1, 2, 3, 4)
Rows = dict[tuple[str, float], list[Run]]


def overrides(rule: str, alpha: float, *more: str) -> tuple[str, ...]:
    """What makes one setting."""
    return (f"strategy.name={rule}", f"partition.alpha={alpha}", *more)


def main() -> None:
    """Choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    rates = {rule: overrides(rule, RATES_ALPHA) for rule in NAMES}
    others = {f"{rule}, alpha {alpha:g}": (rule, alpha) for rule in NAMES for alpha in ALPHAS if alpha != RATES_ALPHA}
    with Screen() as screen:
        chosen = _sweep("chosen", rates, RATES, args.processes, screen)
        lrs = {rule: cell.chosen for rule, cell in chosen.cells.items()}
        settings = {
            name: overrides(rule, alpha, *RATES.candidates[lrs[rule]]) for name, (rule, alpha) in others.items()
        }
        found = _sweep("others", settings, None, args.processes, screen)
    cells = {(rule, RATES_ALPHA): cell for rule, cell in chosen.cells.items()}
    cells |= {others[name]: cell for name, cell in found.cells.items()}
    rows = {place: [read_run(path) for path in cell.runs.values()] for place, cell in cells.items()}
    text = render_table(table(rows, lrs), "markdown")
    (HERE / "table.md").write_text(text)
    cases = {f"alpha {alpha:g}": [run.path for rule in NAMES for run in rows[rule, alpha]] for alpha in ALPHAS}
    (HERE / "results.csv").write_text(render_table(compare_cases(cases), "csv"))
    print(text)
    draw(rows)


def _sweep(
    folder: str, settings: dict[str, tuple[str, ...]], selection: Selection | None, processes: int, screen: Screen
) -> Outcome:
    what = Sweep(HERE / "config.toml", HERE / "runs" / folder, settings, SEEDS, selection, processes, keep="metrics")
    outcome = run_sweep(what, screen)
    if outcome.failed:
        raise SystemExit(f"{len(outcome.failed)} runs failed: {outcome.failed}")
    return outcome


def final(runs: list[Run]) -> tuple[float, float]:
    """Mean and sample standard deviation of the last accuracy over seeds, in percent."""
    mean, deviation = 100 * pd.Series([run.final for run in runs]).agg(["mean", "std"]).fillna(0)
    return mean, deviation


def table(rows: Rows, lrs: dict[str, str]) -> pd.DataFrame:
    """A row for each rule."""
    lines = []
    for rule, name in NAMES.items():
        cells = ["{:.1f} ± {:.1f}".format(*final(rows[rule, alpha])) for alpha in ALPHAS]
        lines.append([name, lrs[rule].removeprefix("lr="), *cells])
    return pd.DataFrame(lines, columns=["rule", "lr", *(f"alpha {alpha:g}" for alpha in ALPHAS)])


def draw(rows: Rows) -> None:
    """Above: accuracy against alpha. Below: by how much each rule is ahead of FedAvg on the same seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7, 6.4), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
    for place, (rule, name) in enumerate(NAMES.items()):
        # Beside each other, or the bars would hide each other.
        places = [alpha * 1.07 ** (place - 1.5) for alpha in ALPHAS]
        means, deviations = zip(*(final(rows[rule, alpha]) for alpha in ALPHAS), strict=True)
        style = {"color": colours[place], "marker": "os^D"[place], "markersize": 5, "capsize": 2, "label": name}
        upper.errorbar(places, means, yerr=deviations, **style)
        if rule == "fedavg":
            continue
        found = [difference(Group(rule, rows[rule, alpha]), Group("fedavg", rows["fedavg", alpha])) for alpha in ALPHAS]
        means = [100 * one.mean for one in found]
        lower.errorbar(places, means, yerr=[100 * (one.high - one.mean) for one in found], **{**style, "linestyle": ""})
    lower.axhline(0, color=colours[0], linewidth=1.5)
    upper.set_xscale("log")
    upper.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
    upper.minorticks_off()
    upper.set_ylabel("test accuracy, %")
    upper.set_title("What does label skew cost? Mean and standard deviation of five seeds", fontsize=10)
    lower.set_title("Who is ahead of FedAvg? 95% intervals: where one crosses 0, five seeds cannot tell", fontsize=10)
    lower.set_ylabel("ahead of FedAvg\non the same seeds, points")
    lower.set_xlabel("Dirichlet alpha (left: few labels on a client; right: all clients alike)")
    upper.legend(frameon=False)
    for panel in (upper, lower):
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "plot.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
