"""The ClientApp of a deployment: the node's worker answers, or, where there is none, this process.

A node without a number (`partition-id`) in its config knows nothing of itself: its worker is the site's gate, which
alone has the data, and is waited for.

It imports next to nothing, so that a message that a worker answers costs no import of torch.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import final

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.errors import WorkerError
from fedlora.node_worker import socket

logger = logging.getLogger("flwr")
PATIENCE_S, PAUSE_S = 60.0, 1.0
"""How long a gate that is away is waited for, and between two tries."""
AWAY = ("no-socket", "no-answer", "worker-stopping")
"""Codes of the errors of a worker that may be back soon."""


@final
class NodeApp(ClientApp):
    """Passes every message on, whatever its type; what can be answered is up to `client_app`."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        path = socket.named_by(context.node_config)
        own = {key: value for key, value in context.node_config.items() if key != socket.KEY}
        context = Context(context.run_id, context.node_id, own, context.state, context.run_config)
        if path is not None and "partition-id" not in own:
            return Message(_ask_gate(path, message, context), reply_to=message)
        if path is not None:
            from fedlora.node_worker.client import ask

            try:
                return Message(ask(path, message, context), reply_to=message)
            except WorkerError as error:
                logger.warning("%s; this process does the work", error)
        from fedlora.flower import client_app

        return client_app.app(message, context)


def _ask_gate(path: Path, message: Message, context: Context) -> RecordDict:
    """The gate's answer; one that is being started again is asked once more, and says the same of the same request."""
    from fedlora.node_worker.client import ask

    end = min(time.time() + PATIENCE_S, message.metadata.created_at + message.metadata.ttl)
    while True:
        try:
            return ask(path, message, context, gate=True)
        except WorkerError as error:
            logger.warning("%s", error)
            if error.code in AWAY and time.time() < end:
                time.sleep(PAUSE_S)
                continue
            from fedlora.flower.messages import encode_note

            return encode_note("error", error=f"its site's worker does not answer ({error.code}): see the node's log")
        except RuntimeError as error:
            from fedlora.flower.messages import encode_note

            logger.warning("%s", error)
            return encode_note("error", error="its site's worker failed: see its log")


app = NodeApp()
