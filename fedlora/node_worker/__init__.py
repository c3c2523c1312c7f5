"""A long-lived process beside a node that keeps the base model loaded between messages.

Flower starts a new process for every message; most of its time goes into imports and into loading the model. A worker
answers in its place, over a Unix socket that only its own user can reach:

    node_app (one process a message) -> client.ask -> socket -> server.Worker -> client_app, as in the node's process

When no worker is there, or it dies, the node's process does the work itself, with the same bytes as a result.
"""
