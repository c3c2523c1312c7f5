"""Tables as text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.errors import ConfigError, nearest
from fedlora.sanitize import clean_text

GAP = "  "
LONGEST_CELL = 4000
LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"}


FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""With which a cell begins that a spreadsheet computes, in full width too (OWASP, CSV Injection)."""

FORMATS = ("text", "markdown", "csv", "latex")


def require_format(form: str) -> None:
    """Raise `ConfigError` unless `form` is one of `FORMATS`."""
    if form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}; {nearest(form, FORMATS)}")


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column stands at the left, the others at the right.

    Args:
        title: said above it.
        header: names of the columns.
        rows: as long as the header, each.

    What stands in them may be foreign (names in data, configs of other people's runs), and is cleaned.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", clean_text(self.title, LONGEST_CELL))
        object.__setattr__(self, "header", [clean_text(cell, LONGEST_CELL) for cell in self.header])
        object.__setattr__(self, "rows", [[clean_text(cell, LONGEST_CELL) for cell in row] for row in self.rows])

    def render(self, form: str) -> str:
        """The table as one of `FORMATS`; text fits the terminal."""
        require_format(form)
        return self.text(shutil.get_terminal_size((100, 24)).columns) if form == "text" else getattr(self, form)()

    def text(self, width: int = 10**6) -> str:
        """Aligned columns; those that have no room in `width` follow below, beside the first column again."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.header))]
        blocks: list[list[int]] = [[0]]
        for k in range(1, len(widths)):
            used = sum(widths[j] + len(GAP) for j in blocks[-1])
            if len(blocks[-1]) > 1 and used + widths[k] > width:
                blocks.append([0])
            blocks[-1].append(k)
        parts = []
        for block in blocks:
            cells = [
                [line[k].ljust(widths[k]) if k == 0 else line[k].rjust(widths[k]) for k in block] for line in lines
            ]
            parts.append("\n".join(GAP.join(line).rstrip() for line in cells))
        return (f"{self.title}\n" if self.title else "") + "\n\n".join(parts) + "\n"

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (self.header, rule, *self.rows)]
        body = "".join("| " + " | ".join(line) + " |\n" for line in lines)
        return (f"**{self.title}**\n\n" if self.title else "") + body

    def latex(self) -> str:
        """A tabular with the rules of the package booktabs."""
        head, *body = [
            " & ".join("".join(LATEX.get(mark, mark) for mark in cell) for cell in line) + r" \\"
            for line in (self.header, *self.rows)
        ]
        columns = "l" + "r" * (len(self.header) - 1)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
        comment = f"% {self.title}\n" if self.title else ""
        return comment + "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def csv(self) -> str:
        """Comma-separated values, quoted where they must be; no text is one that a spreadsheet would compute."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([map(_inert, row) for row in (self.header, *self.rows)])
        return out.getvalue()


def _inert(cell: str) -> str:
    """A cell that a spreadsheet shows as it is: behind an apostrophe where it would be taken for a formula."""
    if not cell.startswith(FORMULAS) or cell == "-":
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
