"""Does FFA-LoRA lose less to the noise of DP-SGD than LoRA?

    python simulations/privacy/run.py            # six minutes of one core; what is done is not repeated

FFA-LoRA (Sun et al. 2024, arXiv 2403.12313) freezes A, so that no product of A's noise and B's noise enters the model.
Both rules on ten digits, example-level privacy at epsilon infinity (no clipping, no noise), 6, 3 and 1. Each rule has
at each epsilon its own learning rate, the best of the middle ones of RATES on a seed that is not among the five that
are reported; where the best is the largest or the smallest, the next one beyond is tried as well.

The runs are in runs/; writes results.csv, table.md and plot.png beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fedlora.compare import Run, compare_cases, read_run, render_table
from fedlora.sweep import Cell, Selection, Sweep, grid, run_sweep
from fedlora.sweep.screen import Screen

HERE = Path(__file__).resolve().parent
RULES = {"fedavg": "LoRA", "ffa": "FFA-LoRA"}
EPSILONS = ("inf", "6", "3", "1")
RATES = Selection(grid(["train.lr=0.01,0.03,0.1,0.3,1.0,3.0"]), seed=100, start=("lr=0.1", "lr=0.3", "lr=1.0"))
SEEDS = (0, 1, 2, 3, 4)
PRIVATE = ("privacy.delta=1e-3", "privacy.max_grad_norm=1.0", "privacy.public_examples=400")


def overrides(rule: str, epsilon: str) -> tuple[str, ...]:
    """What makes one setting."""
    private = () if epsilon == "inf" else (*PRIVATE, f"privacy.epsilon={epsilon}")
    return (f"strategy.name={rule}", *private)


def main() -> None:
    """Choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    cells = {f"epsilon {epsilon}, {rule}": (rule, epsilon) for epsilon in EPSILONS for rule in RULES}
    settings = {name: overrides(*cell) for name, cell in cells.items()}
    with Screen() as screen:
        what = Sweep(HERE / "config.toml", HERE / "runs", settings, SEEDS, RATES, args.processes, keep="metrics")
        outcome = run_sweep(what, screen)
    if outcome.failed:
        raise SystemExit(f"{len(outcome.failed)} runs failed: {outcome.failed}")
    found = {cells[name]: cell for name, cell in outcome.cells.items()}
    rows = {where: [read_run(path) for path in cell.runs.values()] for where, cell in found.items()}
    text = render_table(table(rows, found), "markdown")
    (HERE / "table.md").write_text(text)
    cases = {f"epsilon {epsilon}": [run.path for rule in RULES for run in rows[rule, epsilon]] for epsilon in EPSILONS}
    (HERE / "results.csv").write_text(render_table(compare_cases(cases), "csv"))
    print(text)
    draw(rows)


def table(rows: dict[tuple[str, str], list[Run]], found: dict[tuple[str, str], Cell]) -> pd.DataFrame:
    """A row for each epsilon and rule."""
    lines = []
    for (rule, epsilon), runs in rows.items():
        mean, deviation = 100 * pd.Series([run.final for run in runs]).agg(["mean", "std"]).fillna(0)
        tried = {name.removeprefix("lr="): value for name, value in found[rule, epsilon].tried.items()}
        rates = ", ".join(f"{rate}: {100 * value:.1f}" for rate, value in tried.items())
        chosen = found[rule, epsilon].chosen.removeprefix("lr=")
        accuracy = f"{mean:.1f} ± {deviation:.1f}"
        lines.append([epsilon.replace("inf", "∞"), RULES[rule], chosen, accuracy, rates])
    return pd.DataFrame(
        lines, columns=["epsilon", "rule", "lr", "accuracy, %", "accuracy at each lr tried, one seed, %"]
    )


def draw(rows: dict[tuple[str, str], list[Run]]) -> None:
    """Each seed a dot, the mean a bar; epsilon falls from left to right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for side, (rule, name, colour) in enumerate(zip(RULES, RULES.values(), ("#0072B2", "#E69F00"), strict=True)):
        for column, epsilon in enumerate(EPSILONS):
            place = column + 0.44 * side - 0.24
            values = [100 * run.final for run in rows[rule, epsilon]]
            mean = sum(values) / len(values)
            panel.plot([place] * len(values), values, "o", color=colour, alpha=0.6, markersize=4)
            panel.plot([place - 0.13, place + 0.13], [mean, mean], color=colour, linewidth=3)
            panel.annotate(f"{mean:.1f}", (place + 0.15, mean), va="center", fontsize=8, color=colour)
        panel.plot([], [], color=colour, linewidth=3, label=name)
    panel.set_xticks(range(len(EPSILONS)), [f"ε = {epsilon.replace('inf', '∞')}" for epsilon in EPSILONS])
    panel.set_xlim(right=len(EPSILONS) - 0.4)
    panel.set_ylabel("test accuracy after the last round, %")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("privacy: none at the left, strong at the right")
    panel.grid(axis="y", alpha=0.3)
    panel.legend(frameon=False, loc="lower left")
    panel.set_title(
        "What does the noise of privacy cost?\n"
        "Each dot a seed, bars the mean of five; each rule at its own best learning rate",
        fontsize=10,
    )
    figure.savefig(HERE / "plot.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
