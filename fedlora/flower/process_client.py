"""What a process of a `ProcessGrid` does: the ClientApp's training for some nodes, one group after the other."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from flwr.app import Array, Context, RecordDict
from flwr.app.user_config import UserConfig

from fedlora.aggregators import Merge
from fedlora.errors import FedloraError
from fedlora.flower import client_app
from fedlora.flower.codec import FROZEN, ReceivedPlan
from fedlora.flower.following import follow
from fedlora.flower.settings import config_of
from fedlora.processes import Pipe
from fedlora.training.workbench import Workbench, open_workbench


@dataclass(frozen=True)
class Begin:
    """The first thing that a process is told.

    Args:
        run_id: of the messages.
        run_config: as the ClientApp sees it, with this process's share of the machine.
        node_configs: by node.
    """

    run_id: int
    run_config: Mapping[str, bool | float | int | str]
    node_configs: Mapping[int, Mapping[str, bool | float | int | str]]


@dataclass(frozen=True)
class Hold:
    """Frozen parts of a plan: the server sends them to a node once, and any process may come to answer for that node.

    Args:
        digest: that names them.
        arrays: under the names that they have in the message.
    """

    digest: str
    arrays: Mapping[str, Array]


@dataclass(frozen=True)
class Follow:
    """Bring the base to a version; the fields are those of `fedlora.flower.following.follow`."""

    merges: Sequence[Merge]
    version: int
    target: str
    since: str


@dataclass(frozen=True)
class Train:
    """Answer train messages together.

    Args:
        contents: of the messages, with the nodes that they are for.
    """

    contents: Sequence[tuple[int, RecordDict]]


@dataclass
class Answers:
    """The reply's content to each message of a `Train`, or in what words its app failed.

    Args:
        found: in the messages' order.
        error: why there are none: the process cannot go on.
    """

    found: Sequence[RecordDict | str] = field(default_factory=tuple)
    error: str = ""


def serve(pipe: Pipe) -> None:
    """Do what comes through the pipe, in its order, until nobody is at its other end."""
    jobs: SimpleQueue[Any] = SimpleQueue()
    # Jobs are taken out of the pipe as they come: a server that waits for room in it would not read the answers.
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()
    node: _Nodes | None = None
    while (job := jobs.get()) is not None:
        try:
            if isinstance(job, Begin):
                node = _Nodes(job)
                continue
            assert node is not None
            answers = node.do(job)
        except Exception as error:
            pipe.tell(Answers(error=in_words(error)))
            return
        if answers is not None:
            pipe.tell(answers)


def in_words(error: Exception) -> str:
    """What a reply says of an error: fedlora's own speak for themselves."""
    return str(error) if isinstance(error, FedloraError) else f"{type(error).__name__}: {error}"


def _listen(pipe: Pipe, jobs: SimpleQueue[Any]) -> None:
    try:
        while True:
            jobs.put(pipe.hear())
    except EOFError:
        jobs.put(None)


class _Nodes:
    """The nodes for which this process may come to answer."""

    def __init__(self, begin: Begin) -> None:
        self._contexts = {
            node: Context(begin.run_id, node, UserConfig(config), RecordDict(), UserConfig(begin.run_config))
            for node, config in begin.node_configs.items()
        }
        self._bench: Workbench = open_workbench(config_of(next(iter(self._contexts.values()))))

    def do(self, job: Hold | Follow | Train) -> Answers | None:
        """One job; answers to a `Train`."""
        if isinstance(job, Hold):
            client_app.frozen_store.put(job.digest, ReceivedPlan({}, job.arrays).tensors(FROZEN))
        elif isinstance(job, Follow):
            follow(self._bench.base, job.merges, job.version, job.target, job.since)
        else:
            nodes, contents = zip(*job.contents, strict=True)
            found = client_app.train_rounds(contents, [self._contexts[node] for node in nodes])
            return Answers([one if isinstance(one, RecordDict) else in_words(one) for one in found])
        return None
