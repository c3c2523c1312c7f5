"""The one cleaner of foreign text: whatever somebody else wrote passes here before it reaches a screen, log or file.

Foreign is all that a client's message says (errors, names, versions, keys), what data files hold (class names, cells,
column names, generated text), and what run directories of other people say. A terminal obeys control characters,
bidirectional controls make a line read as another one, and a lone surrogate cannot be encoded at all.
"""

from __future__ import annotations

import unicodedata

REPLACEMENT = "\ufffd"
"""Stands for each character that was taken out and could have been seen or obeyed."""


def clean_text(text: object, limit: int = 400) -> str:
    """One line of printable text in Unicode's normal form C.

    White space of any kind, line breaks too, becomes single spaces. Format characters (category Cf: bidirectional
    controls, zero-width characters, tags) are dropped; control characters, surrogates, private and unassigned code
    points become U+FFFD. Cleaning twice changes nothing.

    Args:
        text: of any type; what is no string is converted.
        limit: largest number of characters of the result; a longer text ends with an ellipsis.

    Example:
        >>> clean_text("a\\r\\nround 2:\\x1b[2J \\u202egnp.exe")
        'a round 2:�[2J gnp.exe'
    """
    return _fit(" ".join(_printable(_as_text(text)[: 8 * limit]).split()), limit)


def clean_lines(text: object, limit: int = 20_000) -> str:
    """As `clean_text`, for text of several lines: line breaks and indentation stay, a tab becomes four blanks; empty
    lines at the end are dropped."""
    lines = _as_text(text)[: 2 * limit].expandtabs(4).splitlines()
    return _fit("\n".join(map(_printable, lines)).rstrip("\n"), limit)


def _as_text(text: object) -> str:
    if isinstance(text, str):
        return text
    try:
        return str(text)
    except (RecursionError, ValueError):  # a list of lists of lists ...; a whole number of 5000 digits
        return f"({type(text).__name__})"


def _printable(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return unicodedata.normalize("NFC", "".join(map(_seen, text)))


def _seen(character: str) -> str:
    if character.isspace():
        return " "
    if character.isprintable():
        return character
    return "" if unicodedata.category(character) == "Cf" else REPLACEMENT


def _fit(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
