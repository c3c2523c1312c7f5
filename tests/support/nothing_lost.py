"""The law of every fault: each finished round is in metrics and checkpoint, each reply that was left out in metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.callbacks import Callback
from fedlora.runs.rundir import RunDir

LeftOut = Mapping[tuple[int, int], str]
"""(round, client) -> why its reply was not used."""


def require_nothing_lost(rundir: RunDir, left_out: LeftOut) -> None:
    """Of a run's files after its last finished round, or after its end.

    Args:
        rundir: of the run.
        left_out: what the server said when it left a reply out.
    """
    records = rundir.read_metrics()
    assert [record["round"] for record in records] == list(range(len(records)))
    state = rundir.checkpoints.latest()
    assert state is not None
    assert state.round == records[-1]["round"]
    for record in records[1:]:
        books = [*record["answered"], *map(int, record["refused"]), *record["missing"]]
        assert sorted([*books, *record.get("dropped", ()), *record.get("late", ())]) == sorted(record["asked"])
    for (number, client_id), why in left_out.items():
        if number < len(records) and client_id not in records[number]["missing"]:
            assert records[number]["refused"][str(client_id)] == why


class Witness(Callback):
    """Sees, whenever a round is said to have ended, that nothing of it is lost."""

    def __init__(self, rundir: RunDir) -> None:
        self.rundir = rundir
        self.left_out: dict[tuple[int, int], str] = {}
        self.rounds: list[int] = []
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def round_started(self, number: int, asked: Sequence[int]) -> None:
        self.left_out = {key: why for key, why in self.left_out.items() if key[0] != number}  # of one that was cut

    def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
        if not ok:
            self.left_out[number, client_id] = note

    def round_ended(self, record: Mapping[str, Any]) -> None:
        self.rounds.append(record["round"])
        assert self.rundir.read_metrics()[-1]["round"] == record["round"]
        require_nothing_lost(self.rundir, self.left_out)
