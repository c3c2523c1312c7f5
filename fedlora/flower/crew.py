"""A simulated round in several processes: each has a base of its own, and asks its share of the clients.

Clients go out in waves, in the order of their numbers: a group for each process, shared out by the work that they are
expected to be. So the company in which a client trains, and with it every bit, is a function of the config alone and
never of time; and where the same clients are asked again, each process has what it keeps of their examples.

For a rule that needs sums alone, each process keeps one, and sends it once a round. For any other, updates are handed
on in the order of the clients' numbers, a few waves ahead of the rule at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, final

from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.errors import PoolError, in_words
from fedlora.federation.round_record import Round
from fedlora.flower.node_registry import Node
from fedlora.flower.share import Asked, AskThese, Begin, Doing, Failed, GiveSums, Stand, serve
from fedlora.flower.sums import Sums
from fedlora.progress import Progress, activity
from fedlora.simulation.processes import Child, Helper, listen

AHEAD = 2
"""Waves that are under way at once: one that trains, and one that waits for it to be done."""


@dataclass
class _Member:
    helper: Helper
    answers: SimpleQueue[Asked | Sums | Failed | Exception | None]
    owed: int = 0  # answers that it has still to give
    work: float = 0.0  # that it was given in this round


@final
class WorkerPool:
    """Processes that ask clients; see the module.

    Args:
        helpers: that do `fedlora.flower.share.serve`.
        begin: what they are told first.
        work: for each client, how much it is expected to be, in any unit.
        sums: whether the rule needs sums alone.
    """

    def __init__(self, helpers: Sequence[Helper], begin: Begin, work: Sequence[float], *, sums: bool) -> None:
        self._members = [_Member(helper, listen(helper.pipe)) for helper in helpers]
        self._cohort, self._work, self._sums = begin.cohort, work, sums
        for member in self._members:
            self._tell(member, begin)

    def updates(
        self, state: GlobalState, base_digest: str, books: Round, nodes: Mapping[int, Node], progress: Progress
    ) -> Generator[ClientUpdate, None, None]:
        """Ask the clients in `books.asked`; yield what they sent, or of rules that need no more, sums of it.

        Args:
            state: on which they train.
            base_digest: names the base of the state.
            books: what becomes of each is written there.
            nodes: by client; what each holds is written there.
            progress: is told of each reply.

        Raises:
            CrewError: a process is gone, or cannot go on.
        """
        for member in self._members:
            while member.owed:  # of a round that the rule broke off
                self._answer(member)
            member.work = 0.0
            self._tell(member, Stand(books.number, state, base_digest, books.median_change))
        size = self._cohort * len(self._members)
        todo = deque(books.asked[start : start + size] for start in range(0, len(books.asked), size))
        under_way: deque[list[_Member]] = deque()
        try:
            while todo or under_way:
                while todo and len(under_way) < AHEAD:
                    under_way.append(self._send(todo.popleft(), nodes))
                answered: list[Asked] = [self._answer(member) for member in under_way.popleft()]
                books.add([share.books for share in answered])
                for share in answered:
                    _take_over(share, books.number, nodes, progress)
                yield from sorted((u for share in answered for u in share.updates), key=lambda u: u.client_id)
        except GeneratorExit:  # the rule breaks the round off: nobody else answers, and what was spent is spent
            for member in (member for wave in under_way for member in wave):
                books.add_cost(self._answer(member).books)
            raise
        if self._sums:
            for member in self._members:
                self._ask(member, GiveSums())
            for member in self._members:
                sums: Sums = self._answer(member)
                books.ideal.extend(sums.ideal)
                yield from sums.updates

    def _send(self, wave: Sequence[int], nodes: Mapping[int, Node]) -> list[_Member]:
        """Share some clients out, the largest first, to whoever has least to do; who got any."""
        groups: list[list[int]] = [[] for _ in self._members]
        for client_id in sorted(wave, key=lambda k: -self._work[k]):
            free = [place for place, group in enumerate(groups) if len(group) < self._cohort]
            chosen = min(free, key=lambda place: self._members[place].work)
            groups[chosen].append(client_id)
            self._members[chosen].work += self._work[client_id]
        busy = []
        for member, group in zip(self._members, groups, strict=True):
            if group:
                self._ask(member, AskThese([nodes[client_id] for client_id in sorted(group)]))
                busy.append(member)
        return busy

    def _tell(self, member: _Member, job: Any) -> None:
        try:
            member.helper.pipe.tell(job)
        except OSError:
            while not isinstance(answer := member.answers.get(), Failed | Exception | None):
                pass  # what it said while it could
            raise self._ended(member, answer) from None

    def _ask(self, member: _Member, job: AskThese | GiveSums) -> None:
        self._tell(member, job)
        member.owed += 1

    def _answer(self, member: _Member) -> Any:
        """The next answer of a process, in the order in which it was asked."""
        while isinstance(answer := member.answers.get(), Doing):
            activity.info("%s", answer.text)
        if answer is None or isinstance(answer, Failed | Exception):
            raise self._ended(member, answer)
        member.owed -= 1
        return answer

    def _ended(self, member: _Member, last: Failed | Exception | None) -> PoolError:
        if last is not None:
            why = last.why if isinstance(last, Failed) else f"its answer cannot be read: {in_words(last)}"
            return PoolError(f"a process that trains clients cannot go on: {why}")
        return PoolError(
            f"a process that trains clients {member.helper.wait()}: resume the run; where memory ran out (-9), with a "
            "lower runtime.processes or runtime.cohort"
        )


def _take_over(share: Asked, number: int, nodes: Mapping[int, Node], progress: Progress) -> None:
    """Write into the server's nodes what stands in those of a process, and tell of the replies."""
    for node in share.nodes:
        vars(nodes[node.client_id]).update(vars(node))
    for client_id in share.books.asked:
        if client_id in share.books.clients:
            progress.reply(number, client_id, True, "")
        elif client_id in share.books.refused:
            progress.reply(number, client_id, False, share.books.refused[client_id])


@contextmanager
def children_for(environments: Sequence[Mapping[str, str]]) -> Iterator[list[Child]]:
    """Processes for a crew, one for each environment; they end with the context."""
    children: list[Child] = []
    try:
        children.extend(Child(serve, environment) for environment in environments)
        yield children
    finally:
        for child in children:
            child.end()
