"""Flower's `Grid` without processes, for tests: the ClientApp runs here, when a reply is pulled.

The same ServerApp and ClientApp objects run on this grid, on Ray and on a SuperLink. Each side gets its own copy of a
message (array bodies are immutable bytes and are shared). A client's exception becomes an error reply, as in Flower.

flwr keeps `TaskIdentity`, `Run` and the message id private; whatever is needed of them is touched in this file alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedlora.errors import in_words
from fedlora.flower.task_identity import task_identity

logger = logging.getLogger(__name__)


class LoopbackGrid(Grid):
    """A grid of virtual nodes in this process.

    Args:
        client_app: what each node runs.
        node_configs: one an entry for each node: `{"partition-id": 0, "num-partitions": 8}`.
        run_config: the run's config, as both apps see it.
        run_id: any positive number.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Iterable[Mapping[str, bool | float | int | str]],
        run_config: Mapping[str, bool | float | int | str],
        run_id: int = 1,
    ) -> None:
        self._client_app = client_app
        self._run = Run.create_empty(run_id)
        self._contexts = {
            node_id: Context(run_id, node_id, UserConfig(config), RecordDict(), UserConfig(run_config))
            for node_id, config in enumerate(node_configs, start=2)
        }
        self._waiting: dict[str, Message] = {}
        self._answers: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message of this run (Flower's older way to make one)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all virtual nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages over; each runs when its reply is pulled."""
        ids = []
        for message in messages:
            self._sent += 1
            message_id = f"local-{self._sent}"
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = _copy(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the messages of these ids, in this order, and return their replies."""
        return [self._pull(key) for key in message_ids if key in self._waiting or key in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until all are answered or the time is up."""
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        for message_id in self.push_messages(messages):
            if end is not None and time.monotonic() >= end:
                break
            replies.extend(self.pull_messages([message_id]))
        return replies

    def _pull(self, key: str) -> Message:
        if key not in self._answers:
            self._answers[key] = self._answer(self._waiting.pop(key))
        return self._answers.pop(key)

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        context = self._contexts.get(node_id)
        if context is None:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, f"there is no node {node_id}"), reply_to=message)
        with task_identity(self._run.run_id, node_id):
            try:
                return _copy(self._client_app(message, context))
            except Exception as error:
                return self._raised(error, message)

    def _raised(self, error: Exception, message: Message) -> Message:
        """A client's failure as a reply that names it, as on any other grid."""
        logger.debug("client on node %s failed", message.metadata.dst_node_id, exc_info=error)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, in_words(error)), reply_to=message)


def _copy(message: Message) -> Message:
    make: Any = Message  # its `metadata` argument is for internal use and in no public signature
    if message.has_error():
        return make(error=message.error, metadata=message.metadata)
    content = RecordDict()
    for key, record in message.content.items():
        own = record.copy()
        if isinstance(own, ArrayRecord):
            own.update({name: copy(array) for name, array in own.items()})  # each array, all but its bytes
        content[key] = own
    return make(content=content, metadata=message.metadata)
