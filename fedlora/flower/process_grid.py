"""The in-process grid with its clients in processes of their own: each holds the base and trains a cohort at a time.

Train messages go out in waves, in the order in which they were pushed: a group for each process, shared out by the work
that they are expected to be. So the company in which a client trains, and with it every bit, is a function of the
config alone and never of time; and where the same clients are asked again, each process has what it keeps of their
examples. Replies are handed out when they are pulled, as on every grid, while the processes work on.

What a wave trains on (frozen parts, changes of the base) goes to all processes before it, so that to the server a node
is a node, whichever process answers for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, final

from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedlora.aggregators import Merge
from fedlora.errors import RoundError
from fedlora.flower.codec import FROZEN, decode_plan
from fedlora.flower.local_grid import LocalGrid
from fedlora.flower.process_client import Answers, Begin, Follow, Hold, Train, serve
from fedlora.processes import Child

AHEAD = 2
"""Waves that are under way at once: one that trains, and one that waits for it to be done."""


@dataclass
class _Process:
    child: Child
    groups: deque[list[str]] = field(default_factory=deque)  # ids of the messages that it has
    work: float = 0.0  # that it was given in this round


@final
class ProcessGrid(LocalGrid):
    """See the module; made by `open_process_grid`.

    Args:
        client_app: what answers the messages that ask for no training, in this process.
        node_configs: as of `LocalGrid`.
        run_config: as of `LocalGrid`.
        children: processes that do `fedlora.flower.process_client.serve`.
        cohort: most messages of a group.
        work: for each of `node_configs`, how much a message is expected to be, in any unit.
        their_run_config: `run_config` with a process's share of the machine.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Iterable[Mapping[str, bool | float | int | str]],
        run_config: Mapping[str, bool | float | int | str],
        *,
        children: Sequence[Child],
        cohort: int,
        work: Sequence[float],
        their_run_config: Mapping[str, bool | float | int | str],
    ) -> None:
        super().__init__(client_app, node_configs, run_config)
        self.window = AHEAD * cohort * len(children)
        self._cohort = cohort
        self._processes = [_Process(child) for child in children]
        self._work = dict(zip(self._contexts, work, strict=True))
        self._queue: list[str] = []  # train messages that are in no group yet
        self._held: set[str] = set()
        self._heard: SimpleQueue[tuple[_Process, Answers | None]] = SimpleQueue()
        configs = {node: dict(context.node_config) for node, context in self._contexts.items()}
        for process in self._processes:
            self._tell(process, Begin(self.run.run_id, their_run_config, configs))
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def follow(self, merges: Sequence[Merge], version: int, target: str, since: str) -> None:
        """Bring the bases of all processes to a version (see `fedlora.flower.following.follow`)."""
        for process in self._processes:
            self._tell(process, Follow(merges, version, target, since))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages over; as soon as they make a wave, those that train are on their way."""
        if not (self._waiting or self._answers):
            for process in self._processes:
                process.work = 0.0
        ids = list(super().push_messages(messages))
        for key in ids:
            if self._trains(self._waiting[key]):
                self._share_frozen(self._waiting[key])
                self._queue.append(key)
        while len(self._queue) >= self._cohort * len(self._processes):
            self._send_wave()
        return ids

    def _pull(self, key: str) -> Message:
        if key not in self._answers and not self._trains(self._waiting[key]):
            return super()._pull(key)
        while key not in self._answers:
            if key in self._queue:
                self._send_wave()
            else:
                self._collect()
        return self._answers.pop(key)

    def _send_wave(self) -> None:
        """Send what waits, as far as the processes take it at once: the largest first, to whoever has least to do."""
        size = self._cohort * len(self._processes)
        wave, self._queue = self._queue[:size], self._queue[size:]
        work = {key: self._work[self._waiting[key].metadata.dst_node_id] for key in wave}
        groups: list[list[str]] = [[] for _ in self._processes]
        for key in sorted(wave, key=lambda key: -work[key]):
            free = [k for k, group in enumerate(groups) if len(group) < self._cohort]
            chosen = min(free, key=lambda k: self._processes[k].work)
            groups[chosen].append(key)
            self._processes[chosen].work += work[key]
        for process, group in zip(self._processes, groups, strict=True):
            if group:
                group.sort(key=wave.index)
                process.groups.append(group)
                messages = [self._waiting[key] for key in group]
                self._tell(process, Train([(message.metadata.dst_node_id, message.content) for message in messages]))

    def _share_frozen(self, message: Message) -> None:
        arrays = {
            name: array for name, array in message.content.array_records["arrays"].items() if name.startswith(FROZEN)
        }
        if not arrays:
            return
        digest = decode_plan(message.content).head["frozen"]
        if digest not in self._held:
            self._held.add(digest)
            for process in self._processes:
                self._tell(process, Hold(digest, arrays))

    def _collect(self) -> None:
        """Wait for the answers to one group, of whichever process."""
        process, answers = self._heard.get()
        if answers is None or answers.error:
            self._stopped(process, answers)
        assert answers is not None
        for key, found in zip(process.groups.popleft(), answers.found, strict=True):
            message = self._waiting.pop(key)
            if isinstance(found, str):
                error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, found)
                self._answers[key] = Message(error, reply_to=message)
            else:
                self._answers[key] = self._reply(message, found)

    def _tell(self, process: _Process, job: Any) -> None:
        try:
            process.child.pipe.tell(job)
        except OSError:
            self._stopped(process, None)

    def _stopped(self, process: _Process, answers: Answers | None) -> None:
        """Raise `RoundError`: what a process had in hand is lost, and the run can be resumed."""
        if answers is not None:
            raise RoundError(f"a process that trains clients cannot go on: {answers.error}")
        raise RoundError(
            f"a process that trains clients ended with status {process.child.wait()}, as it does when memory runs out: "
            "lower runtime.processes or runtime.cohort, then resume the run"
        )

    def _listen(self, process: _Process) -> None:
        """Take answers out of the pipe as they come, so that the process can go on with its next group."""
        try:
            while True:
                self._heard.put((process, process.child.pipe.hear()))
        except EOFError:
            self._heard.put((process, None))


@contextmanager
def children_for(environments: Sequence[Mapping[str, str]]) -> Iterator[list[Child]]:
    """Processes that train clients, one for each environment; they end with the context."""
    children: list[Child] = []
    try:
        children.extend(Child(serve, environment) for environment in environments)
        yield children
    finally:
        for child in children:
            child.end()
