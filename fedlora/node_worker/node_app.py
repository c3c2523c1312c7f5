"""The ClientApp of a deployment: the node's worker answers, or, where there is none, this process.

It imports next to nothing, so that a message that a worker answers costs no import of torch.
"""

from __future__ import annotations

import logging
from typing import final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.errors import WorkerError
from fedlora.node_worker import socket

logger = logging.getLogger("flwr")


@final
class NodeApp(ClientApp):
    """Passes every message on, whatever its type; what can be answered is up to `client_app`."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        path = socket.named_by(context.node_config)
        own = {key: value for key, value in context.node_config.items() if key != socket.KEY}
        context = Context(context.run_id, context.node_id, own, context.state, context.run_config)
        if path is not None:
            from fedlora.node_worker.client import ask

            try:
                return Message(ask(path, message, context), reply_to=message)
            except WorkerError as error:
                logger.warning("%s; this process does the work", error)
        from fedlora.flower import client_app

        return client_app.app(message, context)


app = NodeApp()
