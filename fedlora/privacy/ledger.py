"""One ledger for each client (or for the server), through all its rounds, runs and crashes.

A ledger is an append-only file of hash-chained JSON lines (`fedlora.hash_chain`), kept by whoever holds the data; each
line is on the disk (fsync) before what it announces happens:

```
started    before a private step touches the data        counts as spent from here on
released   before the update leaves the data's holder    counts for ever
void       an attempt of which nothing left              does not count
torn       for an unreadable line above it               counts
```

What is true of a round that is asked for twice, as after a crash:

- An attempt that was *released* may have been seen, and a new attempt draws new noise: both count.
- An attempt that was *started and not released* was seen by nobody: its line would be on the disk before anything
  left, and the noise died with its session, the only one that could have sent it (an attempt holds the ledger's lock
  while it lives). A new attempt at the same round of the same run in a later session therefore makes it void. In the
  same session both count, and so does an attempt at a round that is never asked for again: a crash can only
  over-count.

A deployed client calls `release` before it sends, and keeps what it sent: asked for the same again, after a crash of
the server, it sends the very same bytes, under the attempt that stands in the ledger (`reissue`). A simulation, where
clients and server are one process, never calls it: an update leaves that process only through what is written at the
end of a round, so a killed round is void when the resumed run repeats it, and a completed round is never repeated.
Either way a killed and resumed run reports the epsilon of an uninterrupted one. (Should figures of a round be on the
disk without its checkpoint, somebody may have read them: the resume says so with `seen`, before it repeats the round,
and both attempts count.)

`run` names one run directory for ever (a random id kept in it), not a config: two runs of the same config that
shared an id would make each other's unreleased rounds void. Nobody has to be trusted with it: whatever a server says,
only an attempt of which nothing left is ever made void.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.hash_chain import START, Chain, ChainError, ChainWriter, read_chain
from fedlora.privacy.accounting import UNITS, Budget, Entry, epsilon, merged, statement
from fedlora.privacy.ledger_content import Content, amount, fold

_PROCESS = uuid.uuid4().hex


class Ledger:
    """One holder's spending.

    Args:
        path: the file; it and its folder are made at the first `spend`.
        unit: what the figures protect, "example" or "client" (see `accounting.UNITS`).
        session: whoever could still deliver an attempt of this object: this process if not given. A simulation that
            can be resumed inside one process gives each call of its engine a random one.

    Raises:
        PrivacyError: by every method that reads, if the file is damaged or keeps another unit.
    """

    def __init__(self, path: str | Path, *, unit: str = "example", session: str | None = None) -> None:
        if unit not in UNITS:
            raise PrivacyError(f"a ledger's unit must be one of {', '.join(UNITS)}, not {unit!r}", code="unknown-name")
        self.path = Path(path)
        self.unit = unit
        self.session = session if session is not None else f"{_PROCESS}-{os.getpid()}"

    def entries(self) -> tuple[Entry, ...]:
        """What counts as spent, merged; an unreadable last line counts as the costliest entry known."""
        content = self._read()
        return merged([*content.counted(), *content.torn_cost(None)])

    def epsilon(self, delta: float, accountant: str = "prv") -> float:
        """Epsilon of all that was spent; infinite if the only line cannot be read."""
        content = self._read()
        if content.torn and not content.known():
            return math.inf
        return epsilon(self.entries(), delta, accountant)

    def affords(self, entry: Entry, budget: Budget, *, run: str | None = None, round: int | None = None) -> bool:  # noqa: A002
        """Whether `entry` on top of all that was spent stays within the budget.

        Args:
            entry: of the next round.
            budget: over everything in this ledger.
            run: with `round`, the round that it is for: an earlier attempt at it that nobody saw does not count.
            round: see `run`.
        """
        content = self._read()
        key = None if run is None or round is None else (run, round, self.session)
        return budget.holds([*content.counted(key), *content.torn_cost(entry), entry])

    def attempts(self, run: str) -> int:
        """How many attempts at rounds of a run count."""
        return sum(a.run == run and a.status != "void" for a in self._read().attempts.values())

    def reissue(self, attempt: str) -> bool:
        """Write down that what an earlier attempt made is sent (again), if it counts.

        Args:
            attempt: `Attempt.name` of the one that made it.

        Returns:
            Whether it may be sent: not so if the ledger does not know the attempt or has made it void.

        Raises:
            PrivacyError: another process or thread is using the ledger.
        """
        with closing(self._writer()) as writer:
            content = self._fold(writer.chain)
            found = content.attempts.get(attempt)
            if found is None or found.status == "void":
                return False
            if found.status == "started":
                self._append(writer, content, [{"event": "released", "attempt": attempt}])
            return True

    def rounds(self, run: str) -> frozenset[int]:
        """Rounds of a run that have an entry: a run that resumes after round k without them has lost its ledger."""
        attempts = self._read().attempts.values()
        return frozenset(a.round for a in attempts if a.run == run and a.status != "void")

    def statement(self, delta: float, accountant: str = "prv") -> str:
        """One line with the epsilon spent and what it protects."""
        return statement(self.epsilon(delta, accountant), delta, self.unit, accountant)

    def seen(self, run: str, round: int) -> None:  # noqa: A002
        """Write down that something of a round became known, so that no later attempt at it makes it void.

        Raises:
            PrivacyError: another process or thread is using the ledger.
        """
        with closing(self._writer()) as writer:
            content = self._fold(writer.chain)
            lines = [
                {"event": "released", "attempt": name}
                for name, attempt in content.attempts.items()
                if attempt.status == "started" and (attempt.run, attempt.round) == (run, round)
            ]
            if lines or content.torn:
                self._append(writer, content, lines)

    def spend(
        self,
        entry: Entry,
        *,
        run: str,
        round: int,  # noqa: A002
        budget: Budget | None = None,
        cap: Budget | None = None,
    ) -> Attempt:
        """Write down that `entry` is being spent, then return: only now may the data be touched.

        Args:
            entry: all private steps of this round.
            run: id of the run (see above).
            round: number of the round.
            budget: refused with `PrivacyError` if the entry does not fit.
            cap: a second one, of whoever holds the data.

        Returns:
            The attempt, which holds the ledger's lock until it is closed; a context manager.

        Raises:
            PrivacyError: the budget does not allow it, or another process or thread is using the ledger.
        """
        writer = self._writer()
        try:
            content = self._fold(writer.chain)
            torn_cost = content.torn_cost(entry)
            before = [*content.counted((run, round, self.session)), *torn_cost]
            budget = next((b for b in (cap, budget) if b is not None and not b.holds([*before, entry])), None)
            if budget is not None:
                spent = epsilon(before, budget.delta, budget.accountant)
                raise PrivacyError(
                    f"the privacy budget is spent: ledger {str(self.path)!r} is at epsilon {spent:.3f}, and one more "
                    f"round would exceed {budget.epsilon:g}; stop here, raise epsilon, or plan fewer rounds",
                    code="budget-spent",
                )
            lines: list[Mapping[str, Any]] = []
            for name, attempt in content.attempts.items():
                if attempt.replaced_by(run, round, self.session):
                    why = "never released; the round is tried again"
                    lines.append({"event": "void", "attempt": name, "why": why})
            name = uuid.uuid4().hex
            key = {"unit": self.unit, "run": run, "round": round, "session": self.session}
            lines.append({"event": "started", "attempt": name, **key, **amount(entry)})
            self._append(writer, content, lines, entry)
        except BaseException:
            writer.close()
            raise
        return Attempt(writer, name)

    def head(self) -> str:
        """The hash of the last line, by which an older copy of the file or a changed one is known; "" before the first.

        See `require_head`.
        """
        return self._chain().head

    def require_head(self, seen: str) -> None:
        """Raise unless this ledger goes on from a head that somebody has seen of it.

        Nothing is written, made void or believed on the strength of what is asked: who asks with a head that this
        ledger never had gets a refusal, and nothing else.

        Args:
            seen: A `head` that it had at some time; "" or `fedlora.hash_chain.START` for none.

        Raises:
            PrivacyError: it never had that head: it was replaced by an older copy, or was changed.
        """
        if seen not in ("", START) and not self._chain().holds(seen):
            raise PrivacyError(
                f"privacy ledger {str(self.path)!r} was rolled back or changed: it lacks a line that it had when its "
                "head was last seen; put the file back as it was, without which what was spent on this data is not "
                "known",
                code="ledger-rolled-back",
            )

    def _writer(self) -> ChainWriter:
        try:
            return ChainWriter(self.path, "privacy ledger", PrivacyError)
        except ChainError as error:
            raise self._damaged(error) from None

    def _chain(self) -> Chain:
        try:
            return read_chain(self.path.read_bytes())
        except FileNotFoundError:
            return Chain()
        except ChainError as error:
            raise self._damaged(error) from None

    def _append(
        self,
        writer: ChainWriter,
        content: Content,
        lines: Sequence[Mapping[str, Any]],
        planned: Entry | None = None,
    ) -> str:
        """Write lines, and before them one that counts for an unreadable end; the new head."""
        cost = content.torn_cost(planned)
        return writer.append(lines, amount(cost[0]) if cost else None)

    def _read(self) -> Content:
        return self._fold(self._chain())

    def _fold(self, chain: Chain) -> Content:
        try:
            return fold(chain, self.unit, str(self.path))
        except ChainError as error:
            raise self._damaged(error) from None

    def _damaged(self, broken: ChainError) -> PrivacyError:
        if broken.earlier:
            return PrivacyError(
                f"privacy ledger {str(self.path)!r} was written by an earlier fedlora, without a hash chain, and "
                "cannot be continued: move it away, and lower privacy.epsilon by what the fedlora that wrote it says "
                "was spent",
                code="ledger-of-earlier-version",
            )
        return PrivacyError(
            f"privacy ledger {str(self.path)!r} is damaged: {broken}; restore it from a backup, without which nobody "
            "can say how much privacy was spent on this data",
            code="ledger-damaged",
        )


class Attempt:
    """One round's spending while it happens; made by `Ledger.spend`, and holds the ledger's lock until `close`.

    Attributes:
        name: a random one, by which the ledger knows it.
        head: the ledger's head once the attempt is released; what leaves can name it before it leaves.
    """

    def __init__(self, writer: ChainWriter, name: str) -> None:
        self._writer = writer
        self.name = name
        self._released = {"event": "released", "attempt": name}
        self.head = writer.head_after([self._released])
        self._done = False

    def release(self) -> None:
        """Write down that the update leaves; call it before anything is sent.

        Raises:
            PrivacyError: if the attempt is closed, void or released.
        """
        self._require_open("released")
        self._writer.append([self._released])
        self._done = True

    def void(self, why: str) -> None:
        """Write down that nothing left and nothing ever will (a round dropped for its small cohort).

        Never for an error that depends on the data: the error itself is something that is seen.

        Raises:
            PrivacyError: if the attempt is closed, void or released.
        """
        self._require_open("made void")
        self._writer.append([{"event": "void", "attempt": self.name, "why": why}])
        self._done = True

    def close(self) -> None:
        """Give the lock back; an attempt that was not released goes on counting (see the module's notes)."""
        self._done = True
        self._writer.close()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self, what: str) -> None:
        if self._done:
            raise PrivacyError(
                f"an attempt can be {what} only once, and only before it is closed: ask the ledger for a new one",
                code="attempt-closed",
            )
