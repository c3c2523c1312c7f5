"""A run again, in which each round's updates and figures come from the clients that answered then.

Clients that are killed, or are late, make a deployed run another one than its simulation. Which of them answered is in
its metrics: with the same ones in each round the simulation has the same updates and keeps the same round, and must end
with the same bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from fedlora.config import RunConfig, flat_keys
from fedlora.errors import ConfigError, RoundError
from fedlora.federation.client_pool import (
    ClientEvaluation,
    ClientInfo,
    ClientPool,
    ClientReply,
    Failure,
    MeasuringProcesses,
    Reply,
    RoundRequest,
)
from fedlora.runs.rundir import RunDir


def answered_in(records: Iterable[Mapping[str, Any]]) -> dict[int, frozenset[int]]:
    """Round -> the clients whose update was aggregated, by a run's lines of metrics."""
    return {int(record["round"]): frozenset(record["answered"]) for record in records if "answered" in record}


@final
class ReplayPool:
    """A pool in which those clients answer that answered before; the others are left out of the round and its figures.

    Args:
        pool: That trains.
        records: Lines of metrics of the run.
    """

    def __init__(self, pool: ClientPool, records: Iterable[Mapping[str, Any]]) -> None:
        self._pool = pool
        self._records = {int(record["round"]): record for record in records}

    @property
    def left_out(self) -> Mapping[str, str]:
        """See `ClientPool`."""
        return self._pool.left_out

    def available(self, round_number: int, needed: int) -> Mapping[int, ClientInfo]:
        """See `ClientPool`."""
        return self._pool.available(round_number, needed)

    def leave_out(self, client_id: int, why: str) -> None:
        """See `ClientPool`."""
        self._pool.leave_out(client_id, why)

    def train(self, request: RoundRequest) -> Generator[Reply, None, None]:
        """Train the clients that answered in this round."""
        record = self._records.get(request.number, {})
        answered = frozenset(record.get("answered", ()))
        for client_id in request.clients:
            if client_id in record.get("dropped", ()):
                yield ClientReply(client_id).failed(Failure("dropped"))
            elif client_id in record.get("late", ()):
                yield ClientReply(client_id).failed(Failure("late"))
            elif client_id not in answered:
                why = "it did not answer in the run that is replayed"
                yield ClientReply(client_id).failed(Failure("refused", why))
        yield from self._pool.train(replace(request, clients=[k for k in request.clients if k in answered]))

    def evaluate(self, request: RoundRequest, parts: Sequence[str]) -> Generator[ClientEvaluation, None, None]:
        """Ask the clients that reported figures of this round's state; all that are sampled, where none was asked."""
        federated = self._records.get(request.number, {}).get("federated")
        asked = request.clients if federated is None else [int(k) for k in federated["clients"]]
        return self._pool.evaluate(replace(request, clients=asked), parts)

    @property
    def measuring(self) -> MeasuringProcesses | None:
        """See `ClientPool`."""
        return self._pool.measuring


SAMPLING = ("seed", "server.fraction", "server.clients_per_round")
"""Keys by which a round's clients are drawn."""


def require_replayable(run: RunDir, config: RunConfig) -> None:
    """Raise `ConfigError` where a replay would have other rounds or clients than the run, before it is trained."""
    last = max(answered_in(run.read_metrics()), default=0)
    if config.rounds != last:
        raise ConfigError(
            f"a replay has the rounds of its run, which are {last}, and the config asks for {config.rounds}: "
            f"replay it with --set rounds={last}",
            code="replay-rounds-differ",
        )
    then, now = flat_keys(run.config), flat_keys(config)
    for key in SAMPLING:
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"a replay asks the clients of its run, which had {key} = {then.get(key)}, and the config has "
                f"{now.get(key)}: replay it with --set {key}={then.get(key, '')}",
                code="replay-clients-differ",
            )


def require_clients(run: RunDir, number: int) -> None:
    """Raise `ConfigError` where there are more or fewer clients than in the run, as far as it says how many."""
    sizes = (run.read_json("partition.json") or {}).get("sizes")
    then = run.config.partition.fields.get("clients") if sizes is None else len(sizes)
    if then is not None and then != number:
        raise ConfigError(
            f"a replay asks the clients of its run, which had {then}, and the config has {number}: replay it with the "
            "data and the partition of the run",
            code="replay-clients-differ",
        )


def require_same(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> None:
    """Raise `RoundError` where the replay aggregated other clients than the run: a client failed that did not then."""
    then, now = answered_in(before), answered_in(after)
    for number in sorted(then.keys() | now.keys()):
        if then.get(number) != now.get(number):
            here, there = sorted(now.get(number, ())), sorted(then.get(number, ()))
            raise RoundError(
                f"round {number} of the replay has updates of clients {here}, and the run had those of {there}: "
                "replay it with the run's config and data",
                code="replay-differs",
            )
