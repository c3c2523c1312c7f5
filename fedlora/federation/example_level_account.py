"""What a server can know of its clients' spending, and what a private run may claim by it.

Clients keep the ledgers. The server keeps a record of its own of whom it asked for what, `privacy/asked.jsonl` in the
run directory: a line is on the disk before the first client of a round is asked, so that no crash makes it forget. A
round that is asked for again on the same state with the same config is the same question, which a client answers once
(see `fedlora.federation.client_ledger`); each client also states how many attempts its ledger counts for this run.
What a run claims is the largest epsilon over what it asked, what clients stated, and the ledgers that it can read:
never less than what it asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from fedlora.aggregators import GlobalState
from fedlora.config import RunConfig
from fedlora.errors import PrivacyError, ReplyError
from fedlora.federation.client_ledger import ledger_path
from fedlora.federation.client_pool import RoundRequest
from fedlora.federation.protocol import plan_config
from fedlora.hash_chain import TORN, ChainError, ChainWriter, read_chain
from fedlora.hashing import tensors_digest
from fedlora.privacy.accounting import Entry, epsilon, merged, statement
from fedlora.privacy.ledger import Ledger
from fedlora.runs.rundir import RunDir
from fedlora.state_io import flatten_base_update, flatten_state
from fedlora.training.dp_settings import PrivateSettings, private_settings, require_privacy

Key = tuple[int, str]
"""Number of a round, and the digest of the state and config on which it was asked for."""


@dataclass(frozen=True)
class _Question:
    """What a round asked for.

    Args:
        key: the round.
        base: names the base of the state.
        entries: what it costs each client that is asked.
    """

    key: Key
    base: str
    entries: Mapping[int, Entry]

    @classmethod
    def read(cls, line: Any) -> _Question:
        """The inverse of `line`; ValueError, KeyError, TypeError or PrivacyError for anything else."""
        entries: dict[int, Entry] = {}
        for group in line["asked"]:
            entry = Entry(group["sample_rate"], group["noise_multiplier"], group["steps"])
            entries |= {int(client_id): entry for client_id in group["clients"]}
        return cls((int(line["round"]), str(line["state"])), str(line["base"]), entries)

    def line(self) -> dict[str, Any]:
        """As JSON, with the clients of one cost together."""
        groups: dict[Entry, list[int]] = {}
        for client_id, entry in self.entries.items():
            groups.setdefault(entry, []).append(client_id)
        asked = [
            {"sample_rate": e.sample_rate, "noise_multiplier": e.noise_multiplier, "steps": e.steps, "clients": ids}
            for e, ids in groups.items()
        ]
        return {"round": self.key[0], "state": self.key[1], "base": self.base, "asked": asked}


@final
class ExampleLevelAccount:
    """What the server knows of the clients' spending in a run with privacy.unit = "example".

    Args:
        config: of the run.
        rundir: holds the record of what was asked, and the id by which the ledgers know the run.
        folder: with clients' ledgers that can be read here, as a simulation's; None: they are out of reach.

    Raises:
        PrivacyError: the record of what was asked is damaged.
        RunDirError: the run's id is lost.
    """

    def __init__(self, config: RunConfig, rundir: RunDir, folder: Path | None = None) -> None:
        self._config, self._folder, self._rundir, self._run = config, folder, rundir, rundir.run_id
        # A simulation's: whatever lacks there is lost, and not kept by somebody else.
        self._ours = folder is not None and folder.resolve() == rundir.privacy_dir.resolve()
        self._path = rundir.privacy_dir / "asked.jsonl"
        self._asked: dict[Key, dict[int, Entry]] = {}
        self._bases: dict[Key, str] = {}
        self._latest: dict[int, Key] = {}
        self._by_client: defaultdict[int, Counter[Entry]] = defaultdict(Counter)
        self._more: dict[int, int] = {}
        self._answered: dict[int, set[int]] = {}
        questions: defaultdict[int, list[_Question]] = defaultdict(list)
        for question in self._read():
            questions[question.key[0]].append(question)
        records = {record["round"]: record for record in rundir.read_metrics()}
        for number in sorted(questions.keys() | records.keys()):
            for question in questions[number]:
                self._note(question)
            if number in records:
                self._settle(records[number])
        kept = [record for number, record in records.items() if number <= rundir.rounds_done]
        self._spent: set[int] = set(kept[-1].get("spent", ())) if kept else set()

    # ------------------------------------------------------------------------------------------ before and in a run

    def prepare(self) -> None:
        """Before a resume cuts anything back: all completed rounds are on record, and what was written counts.

        Metrics are written before the checkpoint: a line without one may have been read, and its round is repeated
        with new noise, so both attempts count. (Where clients release what they send, they count anyway.)

        Raises:
            PrivacyError: a ledger, or the record of what was asked, lacks a completed round.
        """
        cure = (
            "which was completed: restore it from a backup, or start a new run with --set name=...; without it nobody "
            "knows what was spent"
        )
        written = {record["round"] for record in self._rundir.read_metrics() if record.get("asked")}
        if lacking := written - self._latest.keys():
            raise PrivacyError(f"{str(self._path)!r} lacks round {min(lacking)}, {cure}", code="ledger-incomplete")
        if self._folder is None or not (self._ours or self._known_here()):
            return
        for client_id, rounds in sorted(self._answered.items()):
            ledger = Ledger(ledger_path(self._folder, client_id))
            if lacking := rounds - ledger.rounds(self._run):
                raise PrivacyError(
                    f"privacy ledger {str(ledger.path)!r} lacks round {min(lacking)}, {cure}", code="ledger-incomplete"
                )
        state = self._rundir.checkpoints.latest()
        done = -1 if state is None else state.round
        for number in sorted(n for n in written if n > done):
            for path in sorted(self._folder.glob("client-*.jsonl")):
                Ledger(path).seen(self._run, number)

    @contextmanager
    def round(self, request: RoundRequest) -> Iterator[None]:
        """Write down, before they are asked, who is asked for a private round; on the disk before anything else."""
        entries = {client_id: private_settings(self._config, client_id).entry for client_id in request.clients}
        key = request.number, self._digest(request.state, request.base_digest)
        question = _Question(key, request.base_digest, entries)
        try:
            with closing(ChainWriter(self._path, "the record of what was asked", PrivacyError)) as writer:
                writer.append([question.line()])
        except ChainError as error:
            raise self._damaged(error) from None
        self._note(question)
        yield

    def solvent(self, clients: Iterable[int]) -> list[int]:
        """Those that have not said that their budget is spent."""
        return sorted(set(clients) - self._spent)

    def base_of(self, state: GlobalState) -> str | None:
        """How a state's base was named when its next round was asked for before; None if it was not.

        (A log of changes that was compacted since would have another name, and the question be another one.)
        """
        for number, name in self._asked:
            base = self._bases[number, name]
            if number == state.round + 1 and self._digest(state, base) == name:
                return base
        return None

    def settle(self, record: Mapping[str, Any], spent: Sequence[int]) -> dict[str, Any]:
        """Take note of the outcome of a round.

        Args:
            record: Its line of metrics so far.
            spent: Clients that said that their budget is spent.
        """
        self._spent.update(spent)
        self._settle(record)
        return {"spent": sorted(self._spent), "epsilon": self.largest()}

    def _settle(self, record: Mapping[str, Any]) -> None:
        key = self._latest.get(record["round"])
        if key is not None:  # devices that dropped out or would be late were never sent the plan
            for client_id in (*record.get("dropped", ()), *record.get("late", ())):
                entry = self._asked[key].pop(client_id, None)
                if entry is not None:
                    self._by_client[client_id][entry] -= 1
        for client_id in record.get("answered", ()):
            self._answered.setdefault(client_id, set()).add(record["round"])
        for name, row in record.get("clients", {}).items():
            client_id, stated = int(name), int(row.get("attempts", 0))
            asked = sum(self._by_client[client_id].values())
            self._more[client_id] = max(self._more.get(client_id, 0), stated - asked)

    # ------------------------------------------------------------------------------------------ figures

    def largest(self) -> float:
        """The largest epsilon over the clients that were asked."""
        privacy = require_privacy(self._config)
        spent: set[tuple[Entry, ...]] = set()
        for client_id, entries in self._by_client.items():
            times = {entry: count for entry, count in entries.items() if count}
            if times and (more := self._more.get(client_id, 0)) > 0:
                times[max(times, key=lambda entry: epsilon([entry], 1e-6, "rdp"))] += more
            spent.add(merged([replace(entry, steps=entry.steps * count) for entry, count in times.items()]))
            if self._folder is not None:
                spent.add(Ledger(ledger_path(self._folder, client_id)).entries())
        # RDP is quick and never below the others: who cannot be the largest is not looked at closely.
        best = 0.0
        for bound, total in sorted(((epsilon(e, privacy.delta, "rdp"), e) for e in spent), reverse=True):
            if bound <= best:
                break
            best = max(best, epsilon(total, privacy.delta, privacy.accountant))
        return best

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The run's claim, for result.json, with one line that says all of it.

        Args:
            records: the run's lines of metrics.

        Returns:
            "epsilon" is None, and the statement says why, where it cannot be known.
        """
        privacy = require_privacy(self._config)
        known = {"delta": privacy.delta, "unit": "example", "accountant": privacy.accountant}
        if lacking := {r["round"] for r in records if r.get("asked")} - self._latest.keys():
            line = f"no epsilon can be stated: the record of what round {min(lacking)} asked of the clients is lost"
            return {"epsilon": None, **known, "source": "unknown", "statement": line}
        source = "ledgers" if self._folder is not None and self._all_here(self._folder) else "plan"
        value = self.largest()
        line = statement(value, privacy.delta, "example", privacy.accountant) + ", the largest over the clients"
        if source == "plan":
            line += "; by what this run asked of them: each client's own ledger has the last word"
        return {"epsilon": value, **known, "source": source, "statement": line}

    # ------------------------------------------------------------------------------------------ inside

    def _digest(self, state: GlobalState, base: str) -> str:
        tensors, meta = flatten_state(state, base_updates=False)
        for base_update in state.base_updates[-1:]:  # the one that no compaction touches
            tensors |= flatten_base_update(base_update, "merge/")[0]
        facts = [meta["adapter"], state.base_version, base, tensors_digest(tensors), plan_config(self._config)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _note(self, question: _Question) -> None:
        number = question.key[0]
        self._latest[number], self._bases[question.key] = question.key, question.base
        known = self._asked.setdefault(question.key, {})
        for client_id, entry in question.entries.items():
            if client_id not in known:
                known[client_id] = entry
                self._by_client[client_id][entry] += 1

    def _read(self) -> Iterator[_Question]:
        """The lines of the record; one that was cut short was of a round in which nobody had been asked yet."""
        try:
            records = read_chain(self._path.read_bytes()).records
        except FileNotFoundError:
            return
        except ChainError as error:
            raise self._damaged(error) from None
        for record in records:
            if record.get("event") == TORN:
                continue
            try:
                yield _Question.read(record)
            except (ValueError, KeyError, TypeError, PrivacyError):
                raise self._damaged(ChainError(record["line"], "is no question")) from None

    def _damaged(self, broken: ChainError) -> PrivacyError:
        return PrivacyError(
            f"{str(self._path)!r} is damaged: {broken}; restore it from a backup, without which nobody knows what this "
            "run asked of its clients",
            code="ledger-damaged",
        )

    def _known_here(self) -> bool:
        """Whether any of the ledgers that can be read knows this run; otherwise the nodes have ledgers of their own."""
        assert self._folder is not None
        return any(Ledger(path).rounds(self._run) for path in self._folder.glob("client-*.jsonl"))

    def _all_here(self, folder: Path) -> bool:
        """Whether the ledgers of a folder hold all rounds that the clients answered."""
        return all(
            rounds <= Ledger(ledger_path(folder, client_id)).rounds(self._run)
            for client_id, rounds in self._answered.items()
        )


def check_stated(metrics: Mapping[str, float], settings: PrivateSettings) -> None:
    """Raise `ReplyError` for a private update that does not say that it was made as was asked.

    Args:
        metrics: of the reply.
        settings: of the client, by the config.
    """
    entry = settings.entry
    asked = {
        "sample_rate": entry.sample_rate,
        "noise_multiplier": entry.noise_multiplier,
        "steps": float(entry.steps),
        "max_grad_norm": settings.max_grad_norm,
    }
    for name, value in asked.items():
        if metrics.get(name) != value:
            stated = f"{metrics[name]:g}" if name in metrics else "nothing"
            raise ReplyError(
                f"it states {name} = {stated}, and was asked to train with {value:g}", code="stated-otherwise"
            )
    if not metrics.get("attempts", 0.0) >= 1:
        raise ReplyError(
            "it does not state how many attempts its ledger counts for this run", code="attempts-not-stated"
        )
