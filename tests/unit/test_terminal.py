from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console
from support.waiting import until

from fedlora.config import RunConfig, parse_config
from fedlora.progress import (
    Columns,
    PlainProgress,
    activity,
    before_training,
    format_bytes,
    format_metric,
    format_seconds,
    main_metric,
)
from fedlora.terminal import SHOWN_SAMPLES, Terminal, outcome_table, samples_table, totals


def make_record(number: int, domains: int = 4, **more: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"round": number, "accuracy": 0.5 + number / 100, "loss": 0.6}
    record["domains"] = {f"domain{k}": {"accuracy": 0.4 + k / 100} for k in range(domains)}
    if number:
        record |= {"train_loss": 0.5, "bytes_up": 1_000_000, "bytes_down": 2_000_000, "seconds": 61.0}
    return {**record, **more}


def make_console(width: int, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, no_color=True, legacy_windows=False), file


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("domains", [0, 1, 4, 30])
def test_rows_stand_under_their_header_and_inside_the_width(width: int, domains: int) -> None:
    columns = Columns.of(make_record(0, domains), width)
    lines = [columns.header(), columns.row(make_record(0, domains)), columns.row(make_record(123, domains))]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= width
    assert len(columns.domains) + columns.hidden == domains
    assert (f"(+{columns.hidden} more)" in lines[0]) == bool(columns.hidden)


def test_what_was_not_measured_is_a_dash() -> None:
    columns = Columns.of(make_record(0, 1), 80)
    assert columns.row({"round": 3, "train_loss": 0.25}).split() == ["3", "-", "-", "0.250", "-", "-"]


def test_the_main_metric_is_found() -> None:
    assert main_metric(make_record(3, seconds_train=1.0, aggregation_error=0.1)) == "accuracy"
    assert main_metric({"round": 0, "loss": 2.0, "perplexity": 7.4, "asked": [1]}) == "perplexity"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_940, "999.9 kB"), (999_960, "1.0 MB"), (5e12, "5000.0 GB")],
)
def test_bytes_are_decimal(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (99.94, "99.9 s"), (99.96, "1 min 40 s"), (3599.6, "1 h 00 min"), (7260, "2 h 01 min")],
)
def test_seconds_carry_over(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_shares_are_percentages_and_others_are_not() -> None:
    assert format_metric("accuracy", 0.8349) == "83.5%"
    assert format_metric("perplexity", 12.34567) == "12.35"
    assert format_metric("accuracy", None) == "-"


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def play(progress: PlainProgress | Terminal) -> None:
    progress.started(RunConfig(), 3, 2)
    progress.round_ended(make_record(0, 2))
    for number in (1, 2):
        progress.round_started(number, [0, 1, 2])
        progress.reply(number, 0, True, "")
        progress.reply(number, 1, number == 1, "its norm is 1e9")
        progress.round_ended(make_record(number, 2))
    progress.message("done")


def test_plain_lines_are_the_same_with_and_without_rich() -> None:
    lines: list[str] = []
    play(PlainProgress(lines.append, width=100))
    console, file = make_console(100)
    with Terminal(console) as terminal:
        play(terminal)
    assert file.getvalue().splitlines() == lines
    assert lines[0] == "run: fedavg, all-MiniLM-L6-v2, 3 clients (iid), 2 rounds"
    assert [line.split()[0] for line in lines[1:]] == ["round", "0", "1", "round", "2", "done"]
    assert lines[4] == "round 2: client 1 left out: its norm is 1e9"


def test_a_terminal_gets_the_same_lines_above_the_moving_part() -> None:
    lines: list[str] = []
    play(PlainProgress(lines.append, width=100))
    console, file = make_console(100, terminal=True)
    with Terminal(console) as terminal:
        play(terminal)
        moving = terminal._clients(100).plain
    shown = without_escapes(file.getvalue())
    assert [line for line in lines if line not in shown] == []
    assert moving == "clients ●✗· 1 of 3 answered, 1 left out"
    hides, shows = (file.getvalue().rfind(f"\x1b[?25{mark}") for mark in "lh")
    assert -1 < hides < shows  # the cursor is back at the end


def test_quiet_says_nothing() -> None:
    console, file = make_console(100, terminal=True)
    with Terminal(console, quiet=True) as terminal:
        play(terminal)
    assert file.getvalue() == ""


@pytest.mark.parametrize("clients", [1, 30, 5000])
@pytest.mark.parametrize("width", [80, 120])
def test_the_moving_part_fits(clients: int, width: int) -> None:
    console, _ = make_console(width, terminal=True)
    terminal = Terminal(console)
    terminal.started(RunConfig(), clients, 2000)
    terminal.round_started(1999, range(clients))
    for k in range(0, clients, 2):
        terminal.reply(1999, k, k % 4 == 0, "x")
    with console.capture() as captured:
        console.print(terminal._now())
    lines = without_escapes(captured.get()).splitlines()
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)


def test_the_outcome_has_a_row_for_each_baseline_and_fits() -> None:
    records = [make_record(0), make_record(1), {"round": 2, "train_loss": 0.1}]
    row = make_record(5)
    baselines = {
        "local_only": {"clients": [1, 2], "of": 8, "best": row, "mean": row, "worst": row},
        "centralised": row,
    }
    for width in (60, 80, 120):
        console, file = make_console(width)
        console.print(outcome_table(records, baselines, width))
        lines = file.getvalue().splitlines()
        assert len(lines) == 7
        assert all(len(line) <= width for line in lines)
    assert re.search(r"^base model +50\.0% +40\.0%", file.getvalue(), re.MULTILINE)
    assert re.search(r"^federated, round 1 +51\.0% ", file.getvalue(), re.MULTILINE)  # the last evaluated one
    assert re.search(r"^all data in one place +55\.0% ", file.getvalue(), re.MULTILINE)


def test_the_base_model_is_not_what_a_run_with_an_adapter_began_with() -> None:
    config = parse_config("", ["adapter.start=/of/another"])
    console, file = make_console(200)
    with Terminal(console, silence_s=0.02) as terminal:
        terminal.started(config, 3, 2)
        until(lambda: "evaluating the starting adapter (" in file.getvalue())
    console.print(outcome_table([make_record(0), make_record(1)], before=before_training(config)))
    assert re.search(r"^starting adapter +50\.0% +40\.0%", file.getvalue(), re.MULTILINE)
    assert "base model" not in file.getvalue()


@pytest.mark.parametrize("of", [3, 9])
def test_models_trained_alone_are_read_beside_the_clients_own_figures(of: int) -> None:
    """On the same clients: one that reported nothing of the run's model counts in neither."""
    row, alone = make_record(5), {0: 0.9, 1: 0.5, 2: 0.1}
    clients = {"0": {"accuracy": 0.8}, "1": {"accuracy": 0.4}}
    federated = {"clients": clients, "macro": {"accuracy": 0.6}, "worst_tenth": {"accuracy": 0.4}}
    each = [{"client": k, "own": {"accuracy": value}} for k, value in alone.items()]
    baselines = {"local_only": {"clients": each, "of": of, "best": row, "mean": row, "worst": row}}
    console, file = make_console(120)
    console.print(outcome_table([make_record(0), make_record(1, federated=federated)], baselines, 120))
    few = "" if of == 3 else " of 3 tried"
    assert re.search(rf"^trained alone, mean over the clients{few} +70\.0%", file.getvalue(), re.MULTILINE)
    assert re.search(rf"^trained alone, worst tenth of the clients{few} +50\.0%", file.getvalue(), re.MULTILINE)
    console, file = make_console(120)
    console.print(outcome_table([make_record(0), make_record(1)], baselines, 120))
    assert "trained alone" not in file.getvalue()


def test_without_round_0_there_is_no_base_model() -> None:
    console, file = make_console(80)
    console.print(outcome_table([make_record(1), make_record(2)], None, 80))
    assert [line.split()[0] for line in file.getvalue().splitlines()] == ["accuracy", "federated,"]


def test_totals_add_up() -> None:
    records = [make_record(0), make_record(1), make_record(2)]
    assert totals(records) == "2 rounds in 2 min 02 s; clients sent 2.0 MB and received 4.0 MB"


@pytest.mark.parametrize("width", [60, 120])
def test_samples_are_cut_short_inside_the_width(width: int) -> None:
    text = "[bold]start[/bold] " + "word " * 200 + "end"
    samples = [dict.fromkeys(("prompt", "reference", "before", "after"), text)] * (SHOWN_SAMPLES + 1)
    console, file = make_console(width)
    console.print(samples_table(samples))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if line.startswith("prompt")]) == SHOWN_SAMPLES
    assert "end" in file.getvalue()  # of the prompt, which is what is answered
    assert "[bold]start" in file.getvalue()  # of an answer, and as it stands


def test_a_pipe_hears_what_is_done_before_long() -> None:
    console, file = make_console(200)
    with Terminal(console, silence_s=0.02) as terminal:
        activity.info("tokenising %d examples", 1200)
        until(lambda: file.getvalue().count("tokenising 1200 examples (") >= 3)
        terminal.started(RunConfig(), 3, 2)
        terminal.round_started(1, [0, 1, 2])
        terminal.reply(1, 0, True, "")
        activity.info("training: step 3 of 40")
        until(lambda: file.getvalue().count("round 1 of 2: 1 of 3 clients answered; training: step 3 of 40 (") >= 3)
    said = file.getvalue().splitlines()
    activity.info("nobody listens")
    time.sleep(0.1)
    assert file.getvalue().splitlines() == said


def test_what_is_done_moves_on_a_screen_and_leaves_no_line() -> None:
    console, file = make_console(100, terminal=True)
    with Terminal(console, silence_s=0.02):
        activity.info("loading a model")
        until(lambda: "loading a model" in file.getvalue())
        time.sleep(0.1)
    assert file.getvalue().count("\n") <= 1


def test_where_not_all_domains_have_room_those_in_trouble_have_it() -> None:
    last = make_record(1, domains=30)
    last["domains"]["domain17"]["accuracy"] = 0.01
    last["domains"]["domain3"]["accuracy"] = 0.02
    shown = [str(column.header) for column in outcome_table([make_record(0, domains=30), last], width=60).columns]
    assert {"domain3", "domain17"} <= set(shown)
    assert len(shown) < 30
