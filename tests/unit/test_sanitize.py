"""Foreign text cannot command a terminal, forge a line, or break an encoder."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.sanitize import REPLACEMENT, clean_lines, clean_text

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
"""Of all code points, surrogates too."""


@settings(deadline=None)
@given(ANY_TEXT, st.integers(1, 80))
def test_one_line_of_what_can_be_printed_and_encoded(text: str, limit: int) -> None:
    clean = clean_text(text, limit)
    assert clean.isprintable()
    assert len(clean) <= limit
    assert clean.encode().decode() == clean
    assert clean == unicodedata.normalize("NFC", clean)
    assert not {unicodedata.category(c) for c in clean} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@settings(deadline=None)
@example("a\n\n", 1)
@example("\x1e\r", 1)
@example("a\n\u200b", 9)
@given(ANY_TEXT, st.integers(1, 80))
def test_cleaning_twice_changes_nothing(text: str, limit: int) -> None:
    assert clean_text(clean_text(text, limit), limit) == clean_text(text, limit)
    assert clean_lines(clean_lines(text)) == clean_lines(text)


@settings(deadline=None)
@given(ANY_TEXT)
def test_lines_keep_their_breaks_and_nothing_else_that_a_terminal_obeys(text: str) -> None:
    clean = clean_lines(text)
    assert all(line.isprintable() for line in clean.split("\n"))
    assert " ".join(clean.split()) == clean_text(text, 20_000)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Grüße, 你好, हिन्दी, עברית", "Grüße, 你好, हिन्दी, עברית"),
        ("e\u0301", "é"),
        ("a\r\nround 2: client 0 left out: forged\rX", "a round 2: client 0 left out: forged X"),
        ("\x1b]0;owned\x07\x1b[2J", f"{REPLACEMENT}]0;owned{REPLACEMENT}{REPLACEMENT}[2J"),
        ("\x9b31m", f"{REPLACEMENT}31m"),
        ("\u202e\u2066gnp.exe\u200b", "gnp.exe"),
        ("\ud800 oops", f"{REPLACEMENT} oops"),
        ("  many \t\u2028 blanks\x85 ", "many blanks"),
        (["a", "\x1b"], "['a', '\\x1b']"),
        (None, "None"),
    ],
)
def test_examples(text: object, clean: str) -> None:
    assert clean_text(text) == clean


def test_what_is_too_long_or_too_deep_is_cut() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert clean_text(deep) == "(list)"
    assert clean_text(9**9999) == "(int)"
    assert clean_text("x" * 10_000_000, 10) == "xxxxxxxxx…"
    assert clean_lines("a\tb\n    c\r\nd") == "a   b\n    c\nd"
