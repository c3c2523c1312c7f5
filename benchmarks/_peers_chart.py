"""Draw docs/peers.png from the table in docs/benchmarks.md.

python benchmarks/_peers_chart.py
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = {
    "encoder": "encoder, 6 layers of 384",
    "encoder, bf16": "the same, bf16 base",
    "tiny": "tiny, 2 layers of 64",
}
ROWS = (
    "Flower on Ray, base built for each message",
    "Flower on Ray, base kept",
    "pfl-research",
    "fedlora, torch's kernels",
    "fedlora",
)


def table() -> dict[str, dict[str, float]]:
    """Framework -> model -> milliseconds of a client by the clock."""
    lines = re.findall(r"^\| (.*) \|$", (DOCS / "benchmarks.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    (head,) = [row for row in rows if "encoder, bf16" in row]
    return {
        row[0]: {name: float(cell.split()[0]) for name, cell in zip(head[1:], row[1:], strict=True) if cell}
        for row in rows
        if row[0] in ROWS
    }


def draw(path: Path) -> None:
    """One panel for each model, shorter bars are better."""
    figures = table()
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for axes, (column, title) in zip(panels, COLUMNS.items(), strict=True):
        values = [figures[name][column] for name in ROWS]
        bars = axes.barh(ROWS, values, color=["#b8bec7" if "fedlora" not in name else "#1f6feb" for name in ROWS])
        axes.bar_label(bars, [f"{value:g}" for value in values], padding=3, fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlim(0, 1.18 * max(values))
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
    panels[0].invert_yaxis()
    title = "Milliseconds of one client by the clock, two cores (less is better)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(DOCS / "peers.png")
