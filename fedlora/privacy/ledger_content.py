"""What the lines of a ledger say: which attempts at rounds there were, and which of them count as spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedlora.errors import PrivacyError
from fedlora.hash_chain import Chain, ChainError
from fedlora.privacy.accounting import Entry, epsilon

Status = Literal["started", "released", "void"]


@dataclass(frozen=True)
class PastAttempt:
    """An attempt at a round, as the ledger knows it.

    Args:
        entry: its private steps.
        run: id of the run.
        round: number of the round.
        session: who could deliver it.
        status: see `fedlora.privacy.ledger`.
    """

    entry: Entry
    run: str
    round: int
    session: str
    status: Status = "started"

    def replaced_by(self, run: str, round: int, session: str) -> bool:  # noqa: A002
        """Whether a new attempt makes this one void: the same round, and nobody is left who could send it."""
        return self.status == "started" and (self.run, self.round) == (run, round) and self.session != session


@dataclass
class Content:
    """A ledger's file, folded.

    Args:
        attempts: by name.
        extra: what stands for lines that could not be read.
        torn: the last line cannot be read, and nothing stands for it yet.
    """

    attempts: dict[str, PastAttempt] = field(default_factory=dict)
    extra: list[Entry] = field(default_factory=list)
    torn: bool = False

    def counted(self, new: tuple[str, int, str] | None = None) -> list[Entry]:
        """What counts; given the run, round and session of a new attempt, what counts once it has begun."""
        live = [a for a in self.attempts.values() if a.status != "void" and not (new and a.replaced_by(*new))]
        return [attempt.entry for attempt in live] + self.extra

    def known(self) -> list[Entry]:
        """All entries that can be read, void ones too."""
        return [attempt.entry for attempt in self.attempts.values()] + self.extra

    def torn_cost(self, planned: Entry | None) -> list[Entry]:
        """What counts for an unreadable last line: the costliest of the entries that are known or planned."""
        candidates = self.known() + ([planned] if planned else [])
        if not self.torn or not candidates:
            return []
        return [max(candidates, key=lambda entry: epsilon([entry], 1e-6, "rdp"))]


def fold(chain: Chain, unit: str, path: str) -> Content:
    """The content of a ledger.

    Args:
        chain: its lines.
        unit: what its figures protect.
        path: of its file, for messages.

    Raises:
        ChainError: a line is none of a ledger's.
        PrivacyError: it keeps another unit.
    """
    content = Content(torn=chain.torn is not None)
    for record in chain.records:
        try:
            if record["event"] == "started" and record["unit"] != unit:
                raise PrivacyError(
                    f"privacy ledger {path!r} accounts for the unit {record['unit']!r}, not {unit!r}: give each unit a "
                    "ledger of its own",
                    code="unit-mismatch",
                )
            _apply(content, record)
        except (KeyError, TypeError, AttributeError, ValueError, PrivacyError) as error:
            if isinstance(error, PrivacyError) and error.code == "unit-mismatch":
                raise
            raise ChainError(record["line"], f"is not a ledger's ({error})") from None
    return content


def _apply(content: Content, line: Mapping[str, Any]) -> None:
    event = line["event"]
    if event == "torn":
        content.extra.append(_entry(line))
    elif event == "started":
        content.attempts[line["attempt"]] = PastAttempt(
            _entry(line), str(line["run"]), int(line["round"]), str(line["session"])
        )
    elif event in ("released", "void"):
        before = content.attempts[line["attempt"]]
        if event == "void" and before.status == "released":
            raise ValueError("it voids what was released")
        content.attempts[line["attempt"]] = replace(before, status=event)
    else:
        raise ValueError(f"unknown event {event!r}")


def amount(entry: Entry) -> dict[str, float | int]:
    """An entry as a line has it."""
    return {
        "sample_rate": entry.sample_rate,
        "noise_multiplier": entry.noise_multiplier,
        "steps": entry.steps,
    }


def _entry(line: Mapping[str, Any]) -> Entry:
    return Entry(line["sample_rate"], line["noise_multiplier"], line["steps"])
