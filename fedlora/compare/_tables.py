"""Data frames as text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import shutil
from typing import Any

import pandas as pd

from fedlora.errors import ConfigError, nearest
from fedlora.sanitize import clean_text

LONGEST_CELL = 4000
FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""With which a cell begins that a spreadsheet computes, in full width too (OWASP, CSV Injection)."""

FORMATS = ("text", "markdown", "csv", "latex")


def require_format(form: str) -> None:
    """Raise `ConfigError` unless `form` is one of `FORMATS`."""
    if form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}; {nearest(form, FORMATS)}", code="unknown-name")


def render_table(table: pd.DataFrame, form: str = "text", title: str = "", *, width: int | None = None) -> str:
    """A table without its index: its first column stands at the left, the others at the right.

    What stands in it may be foreign (names in data, configs of other people's runs), and is cleaned.

    Args:
        table: numbers are written with all their digits, those that are missing as an empty cell.
        form: one of `FORMATS`.
        title: a line above the table; left out as CSV.
        width: for text, the largest number of characters in a line; columns that have no room follow below, beside the
            first column again. None: the terminal's width.

    Raises:
        ConfigError: there is no such format.
    """
    require_format(form)
    table, title = table.rename(columns=_cell).map(_cell), clean_text(title, LONGEST_CELL)
    if form == "csv":
        return str(table.rename(columns=_inert).map(_inert).to_csv(index=False, lineterminator="\n"))
    if form == "markdown":
        rule = ["---"] + ["---:"] * (table.shape[1] - 1)
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (table.columns, rule, *table.to_numpy())]
        return (f"**{title}**\n\n" if title else "") + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if form == "latex":
        text = str(table.to_latex(index=False, escape=True, column_format="l" + "r" * (table.shape[1] - 1)))
        return (f"% {title}\n" if title else "") + text.replace("±", r"$\pm$").replace("−", "$-$")
    width = width or shutil.get_terminal_size((100, 24)).columns
    body = table.iloc[:, 1:].set_axis(table.iloc[:, 0].rename(None)).rename_axis(columns=table.columns[0])
    text = body.to_string(line_width=width + 1, col_space=[len(name) + 1 for name in body])
    lines = [line.rstrip(" \\") + "\n" for line in text.splitlines()]
    return (f"{title}\n" if title else "") + "".join(lines)


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return "" if cell != cell else repr(float(cell))
    return clean_text(cell, LONGEST_CELL)


def _inert(cell: str) -> str:
    """A cell that a spreadsheet shows as it is: behind an apostrophe where it would be taken for a formula."""
    if not cell.startswith(FORMULAS) or cell == "-":
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
