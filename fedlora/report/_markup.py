"""Building HTML and SVG as text. Whatever is no `Html` is escaped on its way in, so that data stays data."""

from __future__ import annotations

import html
from collections.abc import Iterable

from fedlora.sanitize import clean_lines

MOST_TEXT = 1_000_000
"""Characters of one text; what is longer nobody reads in a report."""
VOID = frozenset({"meta", "br", "hr", "img", "link"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = Html | str | float | None


def text(value: object) -> Html:
    """`value` as text, without characters that are not seen or that change how others are read."""
    return Html(html.escape(clean_lines(value, MOST_TEXT), quote=True))


def el(name: str, /, *children: Child, **attributes: object) -> Html:
    """One element.

    Args:
        name: of the tag.
        children: `Html` as it is, everything else escaped; None is left out.
        attributes: `class_` is class, `aria_label` is aria-label; None is left out.
    """
    given = "".join(f' {_attribute(key)}="{_value(value)}"' for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{given}>" + ("" if name in VOID else f"{join(children)}</{name}>"))


def join(children: Iterable[Child]) -> Html:
    """Children one after the other."""
    return Html("".join(child if isinstance(child, Html) else text(child) for child in children if child is not None))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], caption: str) -> Html:
    """A table whose first column names the rows; it scrolls by itself where it is too wide for the page."""
    titles = el("tr", *(el("th", cell, scope="col") for cell in head))
    body = []
    for first, *others in rows:
        body.append(el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in others)))
    inner = el("table", el("caption", caption), el("thead", titles), el("tbody", *body))
    # What scrolls must be reachable by keyboard, and then needs a name.
    return el("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *children: Child) -> Html:
    """Something to unfold."""
    return el("details", el("summary", summary), *children)


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else text(value)
