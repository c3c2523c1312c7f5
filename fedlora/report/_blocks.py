"""What a section of the report is made of; the template knows how each kind of block looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.report._facts import number
from fedlora.report.figures import Chart


@dataclass(frozen=True)
class Table:
    """Cells are text; the first of a row names it.

    Args:
        caption: what it shows.
        head: of the columns; none for a table without a head.
        rows: a cell for each column.
        folded: under which words it has to be unfolded; "": it is open.
        strong: the row in bold.
        words: whether cells are prose, which may be broken.
    """

    caption: str
    head: Sequence[object]
    rows: Sequence[Sequence[object]]
    folded: str = ""
    strong: int = -1
    words: bool = False


@dataclass(frozen=True)
class Listing:
    """A file as it is, to unfold."""

    folded: str
    text: str


Block = str | Table | Listing | Chart
"""What a section is made of; a string is a paragraph."""


def short(value: object) -> str:
    """A figure with four digits, "-" for what was not measured."""
    found = number(value)
    return "-" if found is None else f"{found:.4g}"
