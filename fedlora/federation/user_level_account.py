"""What the server spends of its clients' privacy in a run with user-level privacy: its own ledger.

The server holds the updates, the ledger and the checkpoints: an attempt at a round is written down before the clients
are asked, and is void where the round changed nothing. A run that was killed repeats the round that it did not finish;
of the first attempt nothing is on the disk, so that it counts once (see `fedlora.privacy.ledger`).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

from fedlora.aggregators import GlobalState
from fedlora.config import RunConfig
from fedlora.errors import PrivacyError
from fedlora.federation.client_pool import RoundRequest
from fedlora.privacy.accounting import epsilon, statement
from fedlora.privacy.ledger import Attempt, Ledger
from fedlora.privacy.server_dp import ServerDP
from fedlora.runs.rundir import RunDir


@final
class UserLevelAccount:
    """What the server has spent of its clients' privacy.

    Args:
        config: of a run with privacy.unit = "client".
        rule: what `load_rule` made of it.
        rundir: holds the ledger, privacy/server.jsonl, and the id by which it knows the run.
    """

    def __init__(self, config: RunConfig, rule: ServerDP, rundir: RunDir) -> None:
        assert config.client_privacy is not None
        self._privacy, self._weighting = config.client_privacy, config.server.weighting
        self._rule, self._rundir, self._run = rule, rundir, rundir.run_id
        # A session is one process's go at the run: what an earlier one began and did not write down, nobody saw.
        self._ledger = Ledger(rundir.privacy_dir / "server.jsonl", unit="client", session=uuid.uuid4().hex)
        self._attempt: Attempt | None = None

    def prepare(self) -> None:
        """Before a resume cuts anything back: completed rounds are in the ledger, and what was written counts.

        Raises:
            PrivacyError: the ledger lacks a completed round.
        """
        state = self._rundir.checkpoints.latest()
        done = -1 if state is None else state.round
        written = {r["round"] for r in self._rundir.read_metrics() if r["round"] and not _changed_nothing(r)}
        if lacking := written - self._ledger.rounds(self._run):
            raise PrivacyError(
                f"privacy ledger {str(self._ledger.path)!r} lacks round {min(lacking)}, which was completed: restore "
                "it from a backup, or start a new run with --set name=...; without it nobody knows what was spent",
                code="ledger-lacks-round",
            )
        for number in sorted(n for n in written if n > done):
            self._ledger.seen(self._run, number)

    def base_of(self, state: GlobalState) -> str | None:
        """Not known."""
        return None

    def solvent(self, clients: Iterable[int]) -> list[int]:
        """All: the budget is the server's."""
        return sorted(clients)

    @contextmanager
    def round(self, request: RoundRequest) -> Iterator[None]:
        """Inside, the clients are asked, and what they send is aggregated and written down.

        Raises:
            PrivacyError: the budget does not allow the round.
        """
        with self._ledger.spend(
            self._rule.entry(), run=self._run, round=request.number, budget=self._privacy.budget
        ) as self._attempt:
            try:
                yield
                if self._attempt is not None:
                    self._attempt.release()
            finally:
                self._attempt = None

    def settle(self, record: Mapping[str, Any], spent: Sequence[int] = ()) -> dict[str, Any]:
        """The round's figures for its line of metrics; a round that changed nothing is taken off the account.

        Args:
            record: Its line of metrics so far.
            spent: Nobody.
        """
        if _changed_nothing(record) and self._attempt is not None:
            self._attempt.void("the round changed nothing: too few replies")
            self._attempt = None
        return {"epsilon": self._ledger.epsilon(self._privacy.delta, self._privacy.accountant)}

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The run's claim, for result.json, with one line that says all of it; never less than its rounds cost."""
        privacy = self._privacy
        rounds = sum(bool(record["round"]) and not _changed_nothing(record) for record in records)
        value = max(
            self._ledger.epsilon(privacy.delta, privacy.accountant),
            epsilon([self._rule.entry()] * rounds, privacy.delta, privacy.accountant),
        )
        public = "who answered" + (" and with how many examples" if self._weighting == "examples" else "")
        line = (
            f"{statement(value, privacy.delta, 'client', privacy.accountant)}, as if each took part in every round; it "
            f"holds for the global models and the run's files, against whoever sees them but the server, which is "
            f"trusted; {public} counts as public"
        )
        return {
            "epsilon": value,
            "delta": privacy.delta,
            "unit": "client",
            "accountant": privacy.accountant,
            "source": "server's ledger",
            "rounds_dropped": sum(_changed_nothing(record) for record in records if record["round"]),
            "statement": line,
        }


def _changed_nothing(record: Mapping[str, Any]) -> bool:
    return bool(record.get("lost", False)) or record.get("rule", {}).get("dropped", 0.0) == 1.0
