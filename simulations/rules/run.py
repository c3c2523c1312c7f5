"""Which aggregation rule, when the clients' data and ranks differ?

    python simulations/rules/run.py            # half an hour of one core; what is done is not repeated

Four rules on the default task under
(a) domain shift: each client sees one of four domains;
(b) domain and label shift: Dirichlet 0.5 over labels inside each domain;
(c) mixed ranks under (a).
Each rule has its own learning rate, the best of the middle ones of RATES on a seed that is not among the five that are
reported; where the best is the largest or the smallest, the next one beyond is tried as well. Rules that cannot take
mixed ranks run (c) with the smallest client's rank on all clients, which is what such a federation would have to do.

The runs are in runs/; writes results.csv, table.md and plot.png beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fedlora.aggregators import Claim, rules
from fedlora.compare import Run, compare_cases, read_run, render_table
from fedlora.sweep import Selection, Sweep, grid, run_sweep
from fedlora.sweep.screen import Screen

HERE = Path(__file__).resolve().parent
RULES = {"fedavg": "FedAvg", "ffa": "FFA-LoRA", "flora": "FLoRA", "fair": "LoRA-FAIR"}
RATES = Selection(
    grid(["train.lr=0.0001,0.0003,0.001,0.003,0.01,0.03,0.1"]), seed=100, start=("lr=0.001", "lr=0.003", "lr=0.01")
)
SEEDS = (0, 1, 2, 3, 4)
RANKS = (32, 16, 8, 8, 4, 4, 2, 2)
SETTINGS = {
    "domain shift": (),
    "domain and label shift": ('partition.within={name="dirichlet", alpha=0.5}',),
    "mixed ranks": ("mixed",),
}


def overrides(rule: str, setting: str) -> tuple[str, ...]:
    """What makes one setting of one rule."""
    extra = SETTINGS[setting]
    if extra == ("mixed",):
        takes = Claim.MIXED_RANKS in rules.get(rule).claims
        extra = (
            (f"clients.ranks={list(RANKS)}", f"adapter.rank={max(RANKS)}") if takes else (f"adapter.rank={min(RANKS)}",)
        )
    return (f"strategy.name={rule}", *extra)


def main() -> None:
    """Choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    cells = {f"{setting}, {rule}": (setting, rule) for setting in SETTINGS for rule in RULES}
    settings = {name: overrides(rule, setting) for name, (setting, rule) in cells.items()}
    with Screen() as screen:
        what = Sweep(HERE / "config.toml", HERE / "runs", settings, SEEDS, RATES, args.processes, keep="metrics")
        outcome = run_sweep(what, screen)
    if outcome.failed:
        raise SystemExit(f"{len(outcome.failed)} runs failed: {outcome.failed}")
    rows = {cells[name]: [read_run(path) for path in cell.runs.values()] for name, cell in outcome.cells.items()}
    rates = {cells[name]: cell.chosen.removeprefix("lr=") for name, cell in outcome.cells.items()}
    text = render_table(table(rows, rates), "markdown")
    (HERE / "table.md").write_text(text)
    cases = {
        setting: [run.path for (where, _), runs in rows.items() if where == setting for run in runs]
        for setting in SETTINGS
    }
    (HERE / "results.csv").write_text(render_table(compare_cases(cases), "csv"))
    print(text)
    draw(rows)


def table(rows: dict[tuple[str, str], list[Run]], rates: dict[tuple[str, str], str]) -> pd.DataFrame:
    """A row for each setting and rule."""

    def share(values: list[float | None]) -> str:
        return "{:.1f} ± {:.1f}".format(*100 * pd.Series(values, dtype=float).agg(["mean", "std"]).fillna(0))

    def mean(values: list[float]) -> float:
        return float(pd.Series(values).mean())

    lines = [
        [
            setting,
            rule,
            rates[setting, rule],
            share([run.final for run in runs]),
            share([run.worst_domain for run in runs]),
            f"{mean([run.by_round('aggregation_error').mean() for run in runs]):.2g}",
            f"{mean([run.by_round('bytes_up').sum() for run in runs]) / 1e6:.1f}",
            f"{mean([run.by_round('bytes_down').sum() for run in runs]) / 1e6:.1f}",
        ]
        for (setting, rule), runs in rows.items()
    ]
    header = ["setting", "rule", "lr", "accuracy, %", "worst domain, %", "aggregation error", "MB up", "MB down"]
    return pd.DataFrame(lines, columns=header)


def draw(rows: dict[tuple[str, str], list[Run]]) -> None:
    """One panel a setting: each seed a dot, the mean a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SETTINGS), figsize=(10, 3.6), sharey=True, layout="constrained")
    colours = dict(zip(RULES, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
    for panel, setting in zip(panels, SETTINGS, strict=True):
        for place, rule in enumerate(RULES):
            values = [100 * run.final for run in rows[setting, rule]]
            mean = sum(values) / len(values)
            panel.plot([place] * len(values), values, "o", color=colours[rule], alpha=0.6)
            panel.plot([place - 0.3, place + 0.3], [mean, mean], color=colours[rule], linewidth=3)
            panel.annotate(f"{mean:.1f}", (place + 0.36, mean), va="center", fontsize=9, color=colours[rule])
        panel.set_title(setting)
        panel.set_xticks(range(len(RULES)), RULES.values(), fontsize=8)
        panel.set_xlim(-0.6, len(RULES) - 0.1)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy after the last round, %")
    figure.suptitle(
        "Which rule is ahead? Each dot a seed, bars the mean of five; every rule at its own best learning rate"
    )
    figure.savefig(HERE / "plot.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
