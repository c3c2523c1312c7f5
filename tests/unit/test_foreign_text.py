"""Names in data, errors of clients and configs of other people's runs can neither command a screen nor forge a line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from rich.console import Console

from fedlora.cli._common import errors_in_one_line
from fedlora.compare import render_table
from fedlora.errors import DataError
from fedlora.progress import PlainProgress
from fedlora.report import plot_accuracy, plot_labels
from fedlora.report.page import visible
from fedlora.terminal import Terminal, outcome_table, samples_table

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\ud800\r\nround 9: client 0 answered [/] [link=x]$\\foo_$"
RECORDS = [
    {"round": number, "accuracy": 0.5, "loss": 0.5, "domains": {EVIL: {"accuracy": 0.5}, "b": {"accuracy": 0.5}}}
    for number in range(2)
]


def require_harmless(shown: str) -> None:
    shown.encode()
    assert all(line.isprintable() for line in shown.split("\n")), ascii(shown)
    assert not any(line.startswith("round 9: client 0 answered") for line in shown.split("\n"))


def test_the_lines_of_a_run() -> None:
    lines: list[str] = []
    progress = PlainProgress(lines.append)
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=100)
    with Terminal(console) as terminal:
        for told in (progress, terminal):
            told.reply(1, 2, False, EVIL)
            told.message(EVIL)
            told.round_ended(RECORDS[0])
            told.round_ended(RECORDS[1])
        console.print(outcome_table(RECORDS, width=100))
        console.print(samples_table([dict.fromkeys(("prompt", "reference", "before", "after"), EVIL)]))
    assert all("\n" not in line for line in lines)
    for shown in (*lines, out.getvalue()):
        require_harmless(shown)


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex"])
def test_tables(form: str) -> None:
    table = pd.DataFrame([[EVIL, "1"]], columns=pd.Index(["setting", EVIL], dtype=object), dtype=object)
    require_harmless(render_table(table, form, EVIL))


def test_a_report() -> None:
    assert all(line.isprintable() for line in str(visible(EVIL)).split("\n"))  # in HTML a line break is a blank
    assert visible("def f():\n    return 1") == "def f():\n    return 1"


def test_pictures(tmp_path: Path) -> None:
    for path in (
        plot_accuracy(RECORDS, tmp_path / "a.png"),
        plot_labels(np.ones((2, 2), int), [EVIL, "$5"], tmp_path / "b.png", domains=[EVIL, "$"]),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_error_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), errors_in_one_line(debug=False):
        raise DataError(EVIL)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    require_harmless(said)


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ('=HYPERLINK("http://x","y")', '\'=HYPERLINK("http://x","y")'),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("-1+1", "'-1+1"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'=1"),
        ("\r=1", "'=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("-", "-"),
        ("-inf", "-inf"),
        ("a=1", "a=1"),
    ],
)
def test_no_cell_of_a_csv_file_is_a_formula(cell: str, written: str) -> None:
    rows = list(csv.reader(io.StringIO(render_table(pd.DataFrame([[cell, "b"]], columns=["a", cell]), "csv"))))
    assert rows == [["a", written], [written, "b"]]
