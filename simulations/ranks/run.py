"""Does the rank of a mixed federation collapse? See README.md.

    fedlora assets digits digits-vit
    python simulations/ranks/run.py    # what is done is not repeated

Clients of several ranks train together. After each round the global change of weights (adapter and changes of the base,
one sum) is decomposed, and what its singular values hold beyond a rank is written down. All rules have one learning
rate: what is measured is where the energy goes, and which rule is more accurate is another question.

Each run adds its rows to results.csv beside this file, and runs that are there are not run again: remove some rows to
repeat them. Writes table.md and plot.png of what is there.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair, PairShape
from fedlora.aggregators import ClientSpec, ClientUpdate, GlobalState, load_aggregator
from fedlora.callbacks import Callback
from fedlora.compare import render_table
from fedlora.config import load_config
from fedlora.sweep.in_memory import ResultRows, run_in_memory

HERE = Path(__file__).resolve().parent
RULES = {
    "FlexLoRA": "name='flexlora'",
    "raFLoRA": "name='raflora'",
    "zero padding": "name='hetlora',weights='examples'",
    "HetLoRA": "name='hetlora'",
    "FLoRA": "name='flora'",
    "FLoRIST": "name='florist'",
}
MIXES = {
    "one of rank 32": (32, *[2] * 9),
    "two of each rank": (32, 32, 16, 16, 8, 8, 4, 4, 2, 2),
    "all of rank 32": (32,) * 10,
}
ADDS_UP = ("FLoRA", "FLoRIST")
"""Rules whose clients start anew from zero, so that without training nothing happens."""
BEYOND = (2, 4, 8, 16)
RATE, SEEDS = 0.0056, (0, 1, 2)
KEYS = ["mix", "rule", "seed", "lr"]


class Spectra(Callback):
    """Of each state the share of |D|^2, over all modules, that lies beyond each rank of BEYOND."""

    def __init__(self) -> None:
        self.shares: dict[int, list[float]] = {}
        self._base: dict[str, Tensor] = {}
        self._version = 0

    def state_reached(self, state: GlobalState) -> None:
        """Decompose the global change of weights; the modules are small enough for dense ones."""
        for update in state.base_updates:
            if update.version > self._version:
                for name, pair in update.change.pairs.items():
                    self._base[name] = self._base.get(name, 0.0) + pair.delta().double()
                self._version = update.version
        changes = {
            name: pair.delta().double() + self._base.get(name, 0.0) for name, pair in state.adapter.pairs.items()
        }
        if any(change.any() for change in changes.values()):
            self.shares[state.round] = beyond(list(changes.values()))


def beyond(changes: Sequence[Tensor]) -> list[float]:
    """The share of sum sigma_i^2 beyond each rank of BEYOND, of all changes together."""
    energies = [torch.linalg.svdvals(change).square() for change in changes]
    total = float(sum(energy.sum() for energy in energies))
    return [float(sum(energy[rank:].sum() for energy in energies)) / total for rank in BEYOND]


ROUNDING = 1e-20
"""Percent of an energy below which it is what rounding leaves, other digits on each processor."""


def untrained(mix: str, rule: str, rounds: int) -> list[float]:
    """The share beyond rank 2 where clients send back what they were sent, from 32 equal singular values; by round."""
    fields = tomllib.loads(f"x={{{RULES[rule]}}}")["x"]
    aggregator = load_aggregator(fields.pop("name"), fields)
    A, B = (torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(k))).Q for k in (0, 1))
    state, shares = aggregator.init(AdapterState({"layer": LoraPair(A.T.contiguous(), B, 1.0)})), []
    for _ in range(rounds):
        updates = []
        for client, rank in enumerate(MIXES[mix]):
            plan = aggregator.plan(
                state, ClientSpec(client, {"layer": PairShape(64, 64, rank, 1.0)}, state.base_version)
            )
            updates.append(ClientUpdate(client, plan.adapter, 1.0, plan.base_version))
        state = aggregator.aggregate(state, updates)
        shares.append(beyond([state.adapter.pairs["layer"].delta().double()])[0])
    return shares


def one_run(mix: str, rule: str, seed: int, lr: float) -> list[dict[str, Any]]:
    """A run: for each round its shares, and the accuracy where it was measured."""
    changes = [f"strategy={{{RULES[rule]}}}", f"clients.ranks={list(MIXES[mix])}", f"train.lr={lr}", f"seed={seed}"]
    config = load_config(HERE / "config.toml", changes)
    spectra = Spectra()
    lines = run_in_memory(config, spectra)
    if len(lines) <= config.rounds:
        raise SystemExit(f"{rule}, {mix}, seed {seed}: the run failed")
    accuracy = {line["round"]: line["accuracy"] for line in lines if "accuracy" in line}
    return [
        {"round": number, "accuracy": accuracy.get(number)}
        | {f"beyond {rank}": share for rank, share in zip(BEYOND, shares, strict=True)}
        for number, shares in spectra.shares.items()
    ]


def main() -> None:
    """Choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-runs", action="store_true", help="table and plot of the rows that are there")
    args = parser.parse_args()
    results = ResultRows(HERE / "results.csv", KEYS)
    for seed in () if args.no_runs else SEEDS:
        for mix in MIXES:
            for rule in RULES:
                results.of((mix, rule, seed, RATE), partial(one_run, mix, rule, seed, RATE))
    reported = pd.DataFrame(results.rows)
    text = "\n".join(f"{mix}:\n\n{render_table(table(reported, mix), 'markdown')}" for mix in MIXES)
    (HERE / "table.md").write_text(text)
    print(text)
    draw(reported)


def table(reported: pd.DataFrame, mix: str) -> pd.DataFrame:
    """A row for each rule: accuracy (mean and standard deviation over the seeds), and the shares at the end."""
    lines = []
    for rule in RULES:
        mine = reported[(reported.mix == mix) & (reported.rule == rule)]
        first, last = mine[mine["round"] == 1], mine[mine["round"] == mine["round"].max()]
        if last.empty:
            continue
        shares = [f"{100 * first['beyond 2'].mean():.2g}", *(f"{100 * last[f'beyond {r}'].mean():.2g}" for r in BEYOND)]
        accuracy = f"{100 * last.accuracy.mean():.1f}"
        if len(last) > 1:
            accuracy += f" ± {100 * last.accuracy.std():.1f}"
        left = 0.0 if rule in ADDS_UP else 100 * untrained(mix, rule, int(last["round"].max()))[-1]
        alone = "" if rule in ADDS_UP else "0" if left < ROUNDING else f"{left:.2g}"
        lines.append([rule, accuracy, len(last), *shares, alone])
    header = ["rule", "accuracy, %", "seeds", "beyond 2 after round 1, %"]
    ends = [f"beyond {rank} at the end, %" for rank in BEYOND]
    return pd.DataFrame(lines, columns=[*header, *ends, "beyond 2, untrained, %"])


def draw(reported: pd.DataFrame) -> None:
    """A panel for each mix: the share of the energy beyond rank 2, round by round; each seed a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MIXES), figsize=(11, 3.8), sharey=True, layout="constrained")
    rounds = int(reported["round"].max())
    colours = dict(zip(RULES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"), strict=True))
    for panel, mix in zip(panels, MIXES, strict=True):
        for rule, colour in colours.items():
            mine = reported[(reported.mix == mix) & (reported.rule == rule)]
            for _, run in mine.groupby("seed"):
                panel.plot(run["round"], 100 * run["beyond 2"], color=colour, linewidth=0.6, alpha=0.4)
            mean = 100 * mine.groupby("round")["beyond 2"].mean()
            panel.plot(mean.index, mean, color=colour, linewidth=2, label=rule)
            if rule not in ADDS_UP:
                shares = [100 * share for share in untrained(mix, rule, rounds)]
                panel.plot(range(1, rounds + 1), shares, color=colour, linewidth=1, linestyle=":")
        panel.set_title(mix, fontsize=10)
        panel.set_xlabel("round")
        panel.set_yscale("log")
        panel.set_ylim(1e-3, 120)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of |D|² beyond rank 2, %")
    panels[-1].legend(fontsize=8, frameon=False)
    title = (
        "What is left of the global change of weights beyond its two largest singular values (dotted: nobody trains)"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(HERE / "plot.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
