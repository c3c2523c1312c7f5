"""A private client's ledger in one run.

A client finds its ledger in this order:

- on a node, a file of its own. An attempt is released before the reply leaves, and counts for ever.
- in a simulation, a file for each client in one folder. Clients and server end together, nothing leaves them in the
  middle of a round, and a round that a killed run has to repeat counts once.

A server that was killed asks for its last round again after a resume. A client that releases what it sends keeps its
last answer beside its ledger (`fedlora.flower.kept_answers`): for the same request of the same run it sends the same
bytes again, so that nothing new becomes known and nothing is spent twice. For any other request it trains, which is a
new attempt and counts, whatever the server calls its run and round.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import PrivacyError, ReplyError
from fedlora.federation.client_store import ClientStore
from fedlora.federation.protocol import TrainedReply
from fedlora.privacy.accounting import Budget
from fedlora.privacy.ledger import Attempt, Ledger

_RUN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Account:
    """A client's ledger in one run.

    Args:
        ledger: The file.
        run: Id of the run's directory, by which the ledger knows it.
        release: Called with a reply before it leaves its data's holder, to mark its attempt as released; None where
            one process is client and server, which releases nothing in a round.
        cap: That its site allows over all runs, whatever a run's own budget is.
    """

    ledger: Ledger
    run: str
    release: Callable[[TrainedReply, Attempt], None] | None = None
    cap: Budget | None = None


@dataclass(frozen=True)
class LedgerPlace:
    """Where a client's ledger is.

    Args:
        own: A file of the client's own, as a real node has; it comes first.
        folder: With a file for each client, as simulations have.
        session: Of a simulation: its clients and server end together.
        cap: See `Account`.
    """

    own: Path | None = None
    folder: Path | None = None
    session: str = ""
    cap: Budget | None = None

    @property
    def releases(self) -> bool:
        """Whether what the client sends may be seen before the round is over."""
        return self.own is not None or not self.session

    @property
    def kept(self) -> Path | None:
        """Where the clients keep what they do not send: beside the client's own ledger, or in the folder of all."""
        if self.own is None:
            return None if self.folder is None else self.folder / "kept"
        return self.own.with_name(f"{self.own.name}.kept")

    def store(self, run: str) -> ClientStore:
        """What the clients keep of a run.

        Raises:
            ReplyError: the request names no run.
        """
        return ClientStore(None if self.kept is None else self.kept / _require_run(run))

    def open(
        self, client_id: int, run: object, release: Callable[[TrainedReply, Attempt], None] | None = None
    ) -> Account:
        """A client's account.

        Args:
            client_id: Its number.
            run: What the request says to be the id of the run.
            release: See `Account`; used where the client releases what it sends.

        Raises:
            PrivacyError: there is no ledger.
            ReplyError: the request names no run.
        """
        run = _require_run(run)
        if self.own is None and self.folder is None:
            raise PrivacyError(
                "this node has no privacy ledger, and trains nothing without one: start it with --node-config "
                "'ledger=\"/where/it/is/kept.jsonl\"' (a simulation: --run-config 'ledger-dir=\"...\"')",
                code="no-ledger",
            )
        if self.releases:
            return Account(Ledger(self.path(client_id)), run, release, self.cap)
        return Account(Ledger(self.path(client_id), session=self.session), run)

    def path(self, client_id: int) -> Path:
        """The client's ledger."""
        if self.own is not None:
            return self.own
        assert self.folder is not None
        return ledger_path(self.folder, client_id)


def _require_run(run: object) -> str:
    if not (isinstance(run, str) and _RUN.fullmatch(run)):
        raise ReplyError(
            "the plan does not name its run, without which nothing can be put down in a privacy ledger, or kept",
            code="no-run-id",
        )
    return run


NOWHERE = LedgerPlace()
"""Of clients that keep no ledger."""


def ledger_path(folder: Path, client_id: int) -> Path:
    """The ledger of a simulated client."""
    return folder / f"client-{client_id}.jsonl"
