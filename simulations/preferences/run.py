"""Does DPO rank more held-out pairs right than SFT on the same data? See README.md.

    fedlora assets SmolLM2-135M-Instruct chitchat-pairs
    python simulations/preferences/run.py    # some ten minutes of one core; what is done is not repeated

configs/chat_dpo.toml as it stands, against SFT on the chosen answers of the same pairs in the same batches. DPO has the
config's learning rate; SFT is run at each of RATES.

The runs are in runs/; writes results.csv and table.md beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fedlora.compare import Group, Run, compare, difference, read_run, render_table
from fedlora.sweep import Sweep, run_sweep
from fedlora.sweep.screen import Screen

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "chat_dpo.toml"
RATES = (0.003, 0.01)
SEEDS = (0,)


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    settings: dict[str, tuple[str, ...]] = {"DPO": ()}
    settings |= {f"SFT, lr {rate:g}": ("task.loss_type=sft", f"train.lr={rate}") for rate in RATES}
    with Screen() as screen:
        what = Sweep(CONFIG, HERE / "runs", settings, SEEDS, processes=args.processes, keep="metrics")
        outcome = run_sweep(what, screen)
    if outcome.failed:
        raise SystemExit(f"{len(outcome.failed)} runs failed: {outcome.failed}")
    rows = {name: [read_run(path) for path in cell.runs.values()] for name, cell in outcome.cells.items()}
    text = render_table(table(rows), "markdown")
    (HERE / "table.md").write_text(text)
    paths = [run.path for runs in rows.values() for run in runs]
    (HERE / "results.csv").write_text(render_table(compare(paths).raw(), "csv"))
    print(text)


def table(rows: dict[str, list[Run]]) -> pd.DataFrame:
    """A row for each setting, and by how much DPO is ahead of it."""

    def mean(values: list[float]) -> float:
        return float(pd.Series(values).mean())

    dpo = Group("DPO", tuple(rows["DPO"]))
    before = mean([float(run.curve.iloc[0]) for run in rows["DPO"]])
    lines = [
        [
            "the base",
            f"{100 * before:.1f}",
            f"{mean([run.by_round('chosen_loss').iloc[0] for run in rows['DPO']]):.3f}",
            "",
        ]
    ]
    for name, runs in rows.items():
        found = difference(dpo, Group(name, tuple(runs)))
        ahead = "" if name == "DPO" else f"{100 * found.mean:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"
        loss = mean([run.by_round("chosen_loss").iloc[-1] for run in runs])
        lines.append([name, f"{100 * mean([run.final for run in runs]):.1f}", f"{loss:.3f}", ahead])
    return pd.DataFrame(
        lines, columns=["", "ranked right, %", "loss of the chosen, nats a token", "DPO ahead by, points"]
    )


if __name__ == "__main__":
    main()
