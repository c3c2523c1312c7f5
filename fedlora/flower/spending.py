"""Who keeps account of a private run: each client in its own ledger, and the server of what it can know of them.

A client finds its ledger in this order:

- node config `ledger`: a file of its own, as a real node has. Its attempts are released before the reply leaves, and
  count for ever, whatever the server asks for again. The run config cannot replace it.
- run config `ledger-dir`: a folder with a file for each client, as simulations have. With `run-id` and `session`,
  which `run_local` adds, clients and server end together, nothing leaves them in the middle of a round, and a round
  that a killed run has to repeat counts once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedlora.config import RunConfig
from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Entry, epsilon, merged, statement
from fedlora.privacy.ledger import Ledger
from fedlora.rundir import RunDir
from fedlora.training.private import private_settings, require_privacy


@dataclass(frozen=True)
class Account:
    """A client's ledger in one run.

    Args:
        ledger: the file.
        run: under which name it knows the run.
        releases: whether an attempt is released before the reply is sent (always, but where one process is both ends).
    """

    ledger: Ledger
    run: str
    releases: bool


def account_of(context: Context, client_id: int) -> Account:
    """Where this client keeps account.

    Raises:
        PrivacyError: nowhere.
    """
    own, folder = str(context.node_config.get("ledger", "")), str(context.run_config.get("ledger-dir", ""))
    run, session = (str(context.run_config.get(key, "")) for key in ("run-id", "session"))
    if own:
        return Account(Ledger(own), f"flower-{context.run_id}", True)
    if not folder:
        raise PrivacyError(
            "this node has no privacy ledger, and trains nothing without one: start it with --node-config "
            "'ledger=\"/where/it/is/kept.jsonl\"' (a simulation: --run-config 'ledger-dir=\"...\"')"
        )
    path = ledger_path(Path(folder), client_id)
    if run and session:
        return Account(Ledger(path, session=session), run, False)
    return Account(Ledger(path), f"flower-{context.run_id}", True)


def ledger_path(folder: Path, client_id: int) -> Path:
    """The ledger of a simulated client."""
    return folder / f"client-{client_id}.jsonl"


@dataclass(frozen=True)
class Spending:
    """What the server knows of the clients' spending.

    Args:
        config: of a private run.
        folder: with the simulated clients' ledgers; None: they are out of reach, and what was asked of the clients is
            added up instead.
        run: under which name they know the run, where that outlives a kill (the in-process engine).
    """

    config: RunConfig
    folder: Path | None
    run: str = ""

    def prepare(self, rundir: RunDir) -> None:
        """Before a resume cuts anything back: all completed rounds are in the ledgers, and what was written counts.

        Metrics are written before the checkpoint: a line without one may have been read, and its round is repeated
        with new noise, so both attempts count. (Where clients release what they send, they count anyway.)

        Raises:
            PrivacyError: a ledger lacks a completed round.
        """
        if self.folder is None:
            return
        state = rundir.latest_checkpoint()
        done = -1 if state is None else state.round
        answered: dict[int, set[int]] = {}
        for record in rundir.read_metrics():
            for client_id in record.get("answered", ()):
                answered.setdefault(client_id, set()).add(record["round"])
        for client_id, rounds in sorted(answered.items()):
            ledger = Ledger(ledger_path(self.folder, client_id))
            known = ledger.rounds(self.run) if self.run else rounds if ledger.entries() else frozenset()
            if lacking := rounds - known:
                raise PrivacyError(
                    f"privacy ledger {str(ledger.path)!r} lacks round {min(lacking)}, which was completed: restore it "
                    "from a backup, or start a new run with --set name=...; without it nobody knows what was spent"
                )
        if not self.run:
            return
        for number in sorted({n for rounds in answered.values() for n in rounds if n > done}):
            for path in sorted(self.folder.glob("client-*.jsonl")):
                Ledger(path).seen(self.run, number)

    def largest(self, asked: Counter[int]) -> float:
        """The largest epsilon over the clients.

        Args:
            asked: how often each client was asked to train, for clients whose ledgers are out of reach.
        """
        privacy = require_privacy(self.config)
        spent: set[tuple[Entry, ...]] = set()
        if self.folder is None:
            for client_id, times in asked.items():
                spent.add(merged([private_settings(self.config, client_id).entry] * times))
        else:
            spent = {Ledger(path).entries() for path in self.folder.glob("client-*.jsonl")}
        # RDP is quick and never below the others: who cannot be the largest is not looked at closely.
        best = 0.0
        for bound, entries in sorted(((epsilon(e, privacy.delta, "rdp"), e) for e in spent), reverse=True):
            if bound <= best:
                break
            best = max(best, epsilon(entries, privacy.delta, privacy.accountant))
        return best

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The run's claim, for result.json, with one line that says all of it."""
        privacy = require_privacy(self.config)
        value = self.largest(asked_in(records))
        line = statement(value, privacy.delta, "example", privacy.accountant) + ", the largest over the clients"
        if self.folder is None:
            line += "; by what this run asked of them: each client's own ledger has the last word"
        return {
            "epsilon": value,
            "delta": privacy.delta,
            "unit": "example",
            "accountant": privacy.accountant,
            "source": "plan" if self.folder is None else "ledgers",
            "statement": line,
        }


def asked_in(records: Iterable[Mapping[str, Any]]) -> Counter[int]:
    """How often each client was asked, by a run's lines of metrics."""
    return Counter(client_id for record in records for client_id in record.get("asked", ()))
