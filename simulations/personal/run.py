"""One model for all, or one for each client? See README.md.

    fedlora assets digits digits-vit all-MiniLM-L6-v2 vader
    python simulations/personal/run.py --results DIR    # hours of one core; what is done is not repeated

Nine methods under label skew (Dirichlet 0.1 and 1) and under domain shift. Each method has in each setting the learning
rate with which its validation examples, which lie with the clients, are predicted best, on a seed that is not reported:
of three neighbours on a ladder, and of those beyond for as long as the best is at an end.

The runs are in DIR (runs/ beside this file, if none is named), setting by setting; a setting whose runs are all there
gets its rows. Writes table.md and results.csv beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedlora.compare import Run, read_run, render_table, student_interval
from fedlora.fairness import Fairness
from fedlora.sweep import Sweep, run_sweep
from fedlora.sweep.screen import Screen

HERE = Path(__file__).resolve().parent
LADDER = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ADAMW, SGD = (0.001, 0.003, 0.01), (0.03, 0.1, 0.3)
CHOOSES, SEEDS = 100, (0, 1, 2, 3, 4)
OWN, SHARED = "each client's own", "shared"
"""As `fedlora.compare` calls the models."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        overrides: that make it.
        rates: learning rates to begin with, neighbours on the ladder in ascending order.
    """

    overrides: tuple[str, ...]
    rates: Sequence[float] = ADAMW


METHODS = {
    "FedAvg": Method(()),
    "local only": Method(("train.personal=0",)),
    "FedSA-LoRA": Method(("strategy.name=fedsa",)),
    "FedPer": Method(("strategy.name=fedper",)),
    "FedRep": Method(("strategy.name=fedrep",)),
    "Ditto": Method(("train.personal=0.1",)),
    "SCAFFOLD": Method(("strategy.name=scaffold", "train.optimizer=sgd"), SGD),
    "FedDyn": Method(("strategy={name='feddyn',alpha=0.1}",)),
    "Fed-SB": Method(("strategy.name=fedsb", "adapter.rank=32", "adapter.alpha=32")),
}
TEXTS = (
    'model={name="all-MiniLM-L6-v2", dtype="float32", dropout=0.0}',
    'adapter={rank=8, alpha=16, targets=["query","value"], layers="top:2"}',
    'task={name="text-classification", max_length=40}',
    'data={source="vader", limit=2000, domain="domain", test_fraction=0.3, validation_fraction=0.1}',
    'partition={name="domain", clients=20}',
    "train={steps=4, batch_size=8}",
)
SETTINGS = {
    "label skew 0.1": ("partition.alpha=0.1",),
    "label skew 1": ("partition.alpha=1.0",),
    "domain shift": TEXTS,
}


@dataclass(frozen=True)
class Row:
    """A method in a setting.

    Args:
        rate: its learning rate.
        runs: of the seeds that are reported.
    """

    rate: float
    runs: tuple[Run, ...]

    def clients(self, model: str) -> list[Fairness]:
        """For each seed how accurate a model is at the clients."""
        return [run.at_clients[model] for run in self.runs]

    @property
    def has_own(self) -> bool:
        """Whether clients have a model of their own."""
        return all(OWN in run.at_clients for run in self.runs)


def main() -> None:
    """Choose, run and tabulate, one setting after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "runs")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    rows: dict[tuple[str, str], Row] = {}
    for setting, overrides in SETTINGS.items():
        with Screen() as screen:
            found = one_setting(overrides, args.results / setting.replace(" ", "-"), args.processes, screen)
        rows |= {(setting, method): row for method, row in found.items()}
        write(rows)


def one_setting(overrides: Sequence[str], folder: Path, processes: int, screen: Screen) -> dict[str, Row]:
    """All methods in one setting."""

    def cells(rates: Mapping[str, Sequence[float]]) -> dict[tuple[str, float], tuple[str, ...]]:
        return {
            (name, rate): (*overrides, *METHODS[name].overrides, f"train.lr={rate:g}")
            for name, those in rates.items()
            for rate in those
        }

    tried: dict[str, dict[float, float]] = {name: {} for name in METHODS}
    wanted = {name: list(method.rates) for name, method in METHODS.items()}
    while wanted:
        found = _sweep(folder / "chosen", cells(wanted), (CHOOSES,), processes, screen)
        for (name, rate), (path, *_) in found.items():
            tried[name][rate] = validated(path)
        wanted = {name: [rate] for name, values in tried.items() if (rate := beyond(values)) is not None}
    best = {name: max(values, key=values.__getitem__) for name, values in tried.items()}
    runs = _sweep(folder / "reported", cells({name: [rate] for name, rate in best.items()}), SEEDS, processes, screen)
    return {name: Row(rate, tuple(map(read_run, runs[name, rate]))) for name, rate in best.items()}


def beyond(tried: Mapping[float, float]) -> float | None:
    """The next rate of the ladder where the best is at an end of those that were tried."""
    best = max(tried, key=tried.__getitem__)
    place = LADDER.index(best) + {min(tried): -1, max(tried): 1}.get(best, 0)
    return LADDER[place] if 0 <= place < len(LADDER) and LADDER[place] not in tried else None


def _sweep(
    folder: Path,
    tried: Mapping[tuple[str, float], tuple[str, ...]],
    seeds: Sequence[int],
    processes: int,
    screen: Screen,
) -> dict[tuple[str, float], list[Path]]:
    names = {f"{name}, lr {rate:g}": (name, rate) for name, rate in tried}
    settings = {name: tried[key] for name, key in names.items()}
    outcome = run_sweep(Sweep(HERE / "config.toml", folder, settings, seeds, None, processes, keep="metrics"), screen)
    # A rate with which a run diverges is not the best one; of the runs that are reported none may fail.
    if outcome.failed and seeds == SEEDS:
        raise SystemExit(f"{len(outcome.failed)} runs failed: {outcome.failed}")
    return {names[name]: list(cell.runs.values()) or [folder / "failed"] for name, cell in outcome.cells.items()}


def validated(path: Path) -> float:
    """Accuracy at the end on the clients' validation examples, with their own models where they have some."""
    if not path.exists():
        return -math.inf
    last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    return float(last["validation"]["accuracy"])


# ------------------------------------------------------------------------------------------------ what is written


def write(rows: Mapping[tuple[str, str], Row]) -> None:
    """The tables of what is done."""
    text = "\n\n".join(
        f"{setting}:\n\n{render_table(table({m: row for (s, m), row in rows.items() if s == setting}), 'markdown')}"
        for setting in dict.fromkeys(setting for setting, _ in rows)
    )
    (HERE / "table.md").write_text(text + "\n")
    lines = [
        [setting, method, row.rate, run.seed, model, one.mean, one.worst_decile, one.gini]
        for (setting, method), row in rows.items()
        for model in ((OWN, SHARED) if row.has_own else (SHARED,))
        for run, one in zip(row.runs, row.clients(model), strict=True)
    ]
    columns = ["setting", "method", "lr", "seed", "model", "mean", "worst tenth", "gini"]
    (HERE / "results.csv").write_text(pd.DataFrame(lines, columns=columns).to_csv(index=False))
    print(text)


def table(rows: Mapping[str, Row]) -> pd.DataFrame:
    """A row for each method, in points: 95% intervals are over seeds, those of a lead over another's same seeds."""
    lines = []
    base, alone = rows["FedAvg"].clients(SHARED), rows["local only"].clients(OWN)
    for name, row in rows.items():
        shared = [] if name == "local only" else row.clients(SHARED)
        own = row.clients(OWN) if row.has_own else shared
        lines.append(
            [
                name,
                f"{row.rate:g}",
                interval([one.mean for one in shared]) if shared else "",
                interval([one.mean for one in own]) if row.has_own else "",
                interval([one.worst_decile for one in own]),
                "" if name == "FedAvg" else ahead(own, base),
                "" if name == "local only" else ahead(own, alone),
            ]
        )
    columns = ["method", "lr", "shared, %", "own, %", "worst tenth, %", "ahead of FedAvg", "ahead of local only"]
    return pd.DataFrame(lines, columns=columns)


def ahead(mine: Sequence[Fairness], others: Sequence[Fairness]) -> str:
    """By how much one worst tenth is ahead of another on the same seeds."""
    return interval([a.worst_decile - b.worst_decile for a, b in zip(mine, others, strict=True)])


def interval(values: Sequence[float]) -> str:
    """Mean and half of the 95% interval by Student's t, in percent."""
    mean, half = student_interval([100 * value for value in values])
    return f"{mean:.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
