"""Which aggregation rule, when the clients' data and ranks differ?

    python simulations/rules/run.py            # about an hour on two cores; what is done is not repeated

Four rules on the default task under
(a) domain shift: each client sees one of four domains;
(b) domain and label shift: Dirichlet 0.5 over labels inside each domain;
(c) mixed ranks under (a).
Each rule has its own learning rate, the best of LRS on a seed that is not among the five that are reported; where the
best is the largest or the smallest, the next one beyond is tried as well. Rules that cannot take mixed ranks run (c)
with the smallest client's rank on all clients, which is what such a federation would have to do.

Writes results.jsonl, table.md and plot.png beside this file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from runner import best, key, results, spread, table  # noqa: E402

from fedlora.aggregators import Claim, rule_class  # noqa: E402
from fedlora.config import RunConfig, load_config  # noqa: E402

RULES = ("fedavg", "ffa", "flora", "fair")
LRS = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2, 3, 4)
SWEEP_SEED = 100
BEYOND = {1e-3: 3e-4, 3e-4: 1e-4, 1e-2: 3e-2, 3e-2: 1e-1}
RANKS = (32, 16, 8, 8, 4, 4, 2, 2)
SETTINGS = {
    "domain shift": (),
    "domain and label shift": ('partition.within={name="dirichlet", alpha=0.5}',),
    "mixed ranks": ("mixed",),
}


def make(rule: str, setting: str, lr: float, seed: int) -> RunConfig:
    """The config of one run."""
    extra = list(SETTINGS[setting])
    if extra == ["mixed"]:
        takes = Claim.MIXED_RANKS in rule_class(rule).claims
        extra = (
            [f"clients.ranks={list(RANKS)}", f"adapter.rank={max(RANKS)}"] if takes else [f"adapter.rank={min(RANKS)}"]
        )
    name = f"{rule}-{setting}-{lr:g}-{seed}".replace(" ", "-")
    return load_config(
        HERE / "config.toml", [f"name={name}", f"strategy.name={rule}", f"train.lr={lr}", f"seed={seed}", *extra]
    )


def main() -> None:
    """Sweep, choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    file = HERE / "results.jsonl"
    cells = [(rule, setting) for setting in SETTINGS for rule in RULES]

    rates = {cell: list(LRS) for cell in cells}
    chosen: dict[tuple[str, str], float] = {}
    while True:
        tried = {(cell, lr): make(*cell, lr, SWEEP_SEED) for cell in cells for lr in rates[cell]}
        swept = results(file, tried.values(), processes=args.processes)
        chosen = {cell: best({lr: swept[key(tried[cell, lr])]["accuracy"] for lr in rates[cell]}) for cell in cells}
        further = {cell: BEYOND.get(lr) for cell, lr in chosen.items()}
        if all(lr is None or lr in rates[cell] for cell, lr in further.items()):
            break
        for cell, lr in further.items():
            if lr is not None and lr not in rates[cell]:
                rates[cell].append(lr)
    found = results(
        file, [make(*cell, chosen[cell], seed) for cell in cells for seed in SEEDS], processes=args.processes
    )
    rows = {cell: [found[key(make(*cell, chosen[cell], seed))] for seed in SEEDS] for cell in cells}

    lines = []
    for (rule, setting), runs in rows.items():
        mean, deviation = spread([run["accuracy"] for run in runs])
        worst, worst_deviation = spread([min(run["domains"].values()) for run in runs])
        error, _ = spread([run["aggregation_error"] for run in runs])
        up, _ = spread([run["bytes_up"] for run in runs])
        down, _ = spread([run["bytes_down"] for run in runs])
        lines.append(
            [
                setting,
                rule,
                f"{chosen[rule, setting]:g}",
                f"{100 * mean:.1f} ± {100 * deviation:.1f}",
                f"{100 * worst:.1f} ± {100 * worst_deviation:.1f}",
                f"{error:.2g}",
                f"{up / 1e6:.1f}",
                f"{down / 1e6:.1f}",
            ]
        )
    header = ["setting", "rule", "lr", "accuracy, %", "worst domain, %", "aggregation error", "MB up", "MB down"]
    text = table(header, lines)
    (HERE / "table.md").write_text(text)
    print(text)
    draw(rows)


def draw(rows: dict[tuple[str, str], list[dict]]) -> None:
    """One panel a setting: each seed a dot, the mean a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SETTINGS), figsize=(10, 3.6), sharey=True, layout="constrained")
    colours = dict(zip(RULES, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
    for panel, setting in zip(panels, SETTINGS, strict=True):
        for place, rule in enumerate(RULES):
            values = [100 * run["accuracy"] for run in rows[rule, setting]]
            mean, _ = spread(values)
            panel.plot([place] * len(values), values, "o", color=colours[rule], alpha=0.6)
            panel.plot([place - 0.3, place + 0.3], [mean, mean], color=colours[rule], linewidth=3)
            panel.annotate(f"{mean:.1f}", (place + 0.32, mean), va="center", fontsize=8)
        panel.set_title(setting)
        panel.set_xticks(range(len(RULES)), RULES)
        panel.set_xlim(-0.6, len(RULES) - 0.2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy after the last round, %")
    figure.suptitle("Each dot a seed, bars the mean of five; every rule at its own best learning rate", fontsize=10)
    figure.savefig(HERE / "plot.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
