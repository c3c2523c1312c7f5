"""The ledger tells what was spent through rounds, runs, crashes and torn lines, and never less."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.errors import raises

from fedlora.errors import PrivacyError
from fedlora.hash_chain import ChainWriter
from fedlora.privacy import ledger as ledger_module
from fedlora.privacy.accounting import Budget, Entry, epsilon
from fedlora.privacy.ledger import Ledger

ROUND = Entry(0.25, 2.0, 4)
DELTA = 1e-5


def rdp(steps: int) -> float:
    return epsilon([Entry(0.25, 2.0, steps)], DELTA, "rdp") if steps else 0.0


def spent_steps(path: Path) -> int:
    return sum(entry.steps for entry in Ledger(path).entries())


@pytest.mark.slow
def test_rounds_and_runs_add_up_in_one_ledger(tmp_path: Path) -> None:
    for run in ("one", "two"):
        for number in (1, 2, 3):
            with Ledger(tmp_path / "c.jsonl").spend(ROUND, run=run, round=number) as attempt:
                attempt.release()
    ledger = Ledger(tmp_path / "c.jsonl")
    assert ledger.entries() == (Entry(0.25, 2.0, 24),)
    assert ledger.epsilon(DELTA) == epsilon([Entry(0.25, 2.0, 24)], DELTA)
    assert ledger.rounds("one") == {1, 2, 3}
    assert "one example" in ledger.statement(DELTA, "rdp")


def test_spending_is_on_the_disk_before_the_data_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "c.jsonl"
    monkeypatch.setattr(ledger_module.os, "fsync", lambda fd: synced.append(path.read_bytes()))
    with Ledger(path).spend(ROUND, run="r", round=1) as attempt:
        assert b'"started"' in synced[-1]
        assert spent_steps(path) == 4
        attempt.release()
        assert b'"released"' in synced[-1]


SESSION = """
import os, sys
from fedlora.privacy.accounting import Entry
from fedlora.privacy.ledger import Ledger
path, first, last, kill, wire = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5] == "wire"
for number in range(first, last + 1):
    dying = number == last
    with Ledger(path).spend(Entry(0.25, 2.0, 4), run="run", round=number) as attempt:
        if dying and kill == "training":
            os._exit(9)
        if wire:
            attempt.release()
        if dying and kill == "released":
            os._exit(9)
"""


def session(path: Path, first: int, last: int, kill: str, mode: str) -> int:
    return subprocess.run([sys.executable, "-c", SESSION, str(path), str(first), str(last), kill, mode]).returncode


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["simulation", "wire"])
@pytest.mark.parametrize("kill", ["training", "released"])
def test_a_killed_and_resumed_run_spends_again_what_was_seen_alone(tmp_path: Path, kill: str, mode: str) -> None:
    path = tmp_path / "c.jsonl"
    assert session(path, 1, 3, kill, mode) == 9
    assert spent_steps(path) == 12  # until the round is repeated, the killed attempt counts
    assert session(path, 3, 5, "never", mode) == 0
    sent_twice = mode == "wire" and kill == "released"  # its noise was seen, and the repetition has another
    assert spent_steps(path) == (24 if sent_twice else 20)


def test_a_round_whose_figures_were_seen_counts_beside_its_repetition(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    Ledger(path, session="killed").spend(ROUND, run="r", round=1).close()
    Ledger(path, session="resumed").seen("r", 1)
    Ledger(path, session="resumed").spend(ROUND, run="r", round=1).close()
    assert spent_steps(path) == 8


def test_a_released_round_that_is_trained_again_counts_twice(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    for name in ("before the crash", "after"):
        with Ledger(path, session=name).spend(ROUND, run="r", round=1) as attempt:
            attempt.release()
    assert spent_steps(path) == 8


def test_a_second_attempt_of_the_same_session_counts_too(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    for _ in range(2):
        Ledger(path).spend(ROUND, run="r", round=1).close()
    assert spent_steps(path) == 8


def test_only_the_same_round_of_the_same_run_makes_an_attempt_void(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    Ledger(path, session="a").spend(ROUND, run="r", round=1).close()
    Ledger(path, session="b").spend(ROUND, run="r", round=2).close()
    Ledger(path, session="c").spend(ROUND, run="other", round=1).close()
    assert spent_steps(path) == 12
    Ledger(path, session="d").spend(ROUND, run="r", round=1).close()
    assert spent_steps(path) == 12


def test_an_attempt_is_resolved_once_and_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with Ledger(path).spend(ROUND, run="r", round=1) as attempt:
        attempt.void("the cohort was too small")
        with raises(PrivacyError, "attempt-closed"):
            attempt.release()
    assert spent_steps(path) == 0
    attempt = Ledger(path).spend(ROUND, run="r", round=2)
    attempt.close()
    with raises(PrivacyError, "attempt-closed"):
        attempt.release()


def test_one_client_trains_one_round_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    attempt = Ledger(path).spend(ROUND, run="r", round=1)
    with raises(PrivacyError, "file-in-use", path):
        Ledger(path).spend(ROUND, run="r", round=1)
    attempt.close()
    Ledger(path).spend(ROUND, run="r", round=1).close()


def test_what_does_not_fit_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    budget = Budget(rdp(8), DELTA, "rdp")
    for number in (1, 2):
        assert Ledger(path).affords(ROUND, budget)
        Ledger(path).spend(ROUND, run="r", round=number, budget=budget).close()
    before = path.read_bytes()
    assert not Ledger(path).affords(ROUND, budget)
    with raises(PrivacyError, "budget-spent", path):
        Ledger(path).spend(ROUND, run="r", round=3, budget=budget)
    assert path.read_bytes() == before
    # Repeating the killed round is not a third round.
    assert Ledger(path, session="resumed").affords(ROUND, budget, run="r", round=2)
    Ledger(path, session="resumed").spend(ROUND, run="r", round=2, budget=budget).close()
    assert Ledger(path).epsilon(DELTA, "rdp") <= budget.epsilon


@pytest.mark.slow
def test_a_file_cut_at_any_byte_never_shows_less_than_was_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module.os, "fsync", lambda fd: None)  # 1,600 of them
    whole = tmp_path / "whole.jsonl"
    for number in (1, 2):
        with Ledger(whole).spend(ROUND, run="r", round=number) as attempt:
            attempt.release()
    data = whole.read_bytes()
    path = tmp_path / "c.jsonl"
    for length in [*range(1, len(data), 3), len(data) - 2, len(data) - 1]:
        kept = data[:length]
        begun = kept.count(b'"started"')
        path.write_bytes(kept)
        torn_first = b"}" not in kept
        assert Ledger(path).epsilon(DELTA, "rdp") >= (math.inf if torn_first else rdp(4 * begun))
        with Ledger(path, session="later").spend(ROUND, run="r", round=3) as attempt:
            attempt.release()
        after = spent_steps(path)
        whole_lines = all(line.endswith(b"}") for line in kept.splitlines())
        assert after == 4 * begun + 4 if whole_lines else after >= 4 * begun + 4
        assert json.loads(path.read_bytes().splitlines()[-1])["event"] == "released"


def test_a_torn_line_counts_as_the_costliest_entry(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    for number, entry in enumerate((Entry(0.25, 2.0, 4), Entry(0.25, 1.0, 4), Entry(0.25, 3.0, 4))):
        Ledger(path).spend(entry, run="r", round=number).close()
    with path.open("ab") as file:
        file.write(b'{"attempt": "0')
    assert Entry(0.25, 1.0, 8) in Ledger(path).entries()


@pytest.mark.parametrize(
    "text", ["nonsense\n", '{"event": "released", "attempt": "unknown"}\n', '{"event": "paid"}\n', "3\n"]
)
def test_damage_before_the_end_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.jsonl"
    Ledger(path).spend(ROUND, run="r", round=1).close()
    path.write_text(text + path.read_text())
    with raises(PrivacyError, "ledger-damaged", path, "line 1"):
        Ledger(path).epsilon(DELTA)


@pytest.mark.parametrize("record", [{"event": "released", "attempt": "unknown"}, {"event": "paid"}, {}])
def test_a_chained_line_that_is_no_ledgers_is_an_error(tmp_path: Path, record: dict[str, str]) -> None:
    path = tmp_path / "c.jsonl"
    Ledger(path).spend(ROUND, run="r", round=1).close()
    with closing(ChainWriter(path, "ledger", PrivacyError)) as writer:
        writer.append([record])
    with raises(PrivacyError, "ledger-damaged", path, "line 2"):
        Ledger(path).epsilon(DELTA)


def test_a_ledger_without_a_chain_is_said_to_be_an_earlier_fedloras(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"attempt": "a", "event": "started", "round": 1}\n{"attempt": "a", "event": "released"}\n')
    for read in (lambda: Ledger(path).epsilon(DELTA), lambda: Ledger(path).spend(ROUND, run="r", round=1)):
        with raises(PrivacyError, "ledger-of-earlier-version", path, "privacy.epsilon"):
            read()


def spent(path: Path, rounds: range) -> list[str]:
    """Spend some rounds; the ledger's head after each."""
    heads = []
    for number in rounds:
        with Ledger(path).spend(ROUND, run="r", round=number) as attempt:
            attempt.release()
        heads.append(Ledger(path).head())
    return heads


def test_a_ledger_goes_on_from_every_head_that_it_had(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    assert Ledger(path).head() == ""
    heads = spent(path, range(1, 4))
    assert len(set(heads)) == 3
    with Ledger(path).spend(ROUND, run="r", round=4) as attempt:
        heads.append(Ledger(path).head())
        attempt.release()
        assert Ledger(path).head() == attempt.head
    heads.append(attempt.head)
    before = path.read_bytes()
    for head in ("", *heads):
        Ledger(path).require_head(head)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [2, 0, None])
def test_a_ledger_that_was_rolled_back_is_known_by_the_head_that_was_seen(tmp_path: Path, kept: int | None) -> None:
    path = tmp_path / "c.jsonl"
    *_, seen = spent(path, range(1, 4))
    if kept is None:
        path.unlink()
    else:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    with raises(PrivacyError, "ledger-rolled-back", path):
        Ledger(path).require_head(seen)
    spent(path, range(4, 8))  # and going on from there does not hide it
    with raises(PrivacyError, "ledger-rolled-back", path):
        Ledger(path).require_head(seen)


def test_a_head_that_a_ledger_never_had_changes_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    spent(path, range(1, 3))
    before = path.read_bytes()
    for lie in ("f" * 64, "x"):
        with raises(PrivacyError, "ledger-rolled-back", path):
            Ledger(path).require_head(lie)
    assert path.read_bytes() == before


def test_figures_for_examples_and_for_clients_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "server.jsonl"
    Ledger(path, unit="client").spend(Entry(1.0, 2.0, 1), run="r", round=1).close()
    with raises(PrivacyError, "unit-mismatch", path, "'client'", "'example'"):
        Ledger(path).entries()
    with raises(PrivacyError, "unknown-name", "'person'"):
        Ledger(path, unit="person")


def test_a_ledger_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    Ledger(tmp_path / "new" / "c.jsonl").spend(ROUND, run="r", round=1).close()
    assert os.stat(tmp_path / "new" / "c.jsonl").st_mode & 0o077 == 0
