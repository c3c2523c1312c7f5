"""Which node may be which client.

A node says itself which client it is, and without more the first who says "client 0" is client 0. What a node cannot
choose is the key that it has registered with the SuperLink, and the name under which the coordinator registered that
key. A run's config may say which node is which client (`server.nodes`, which `fedlora deploy init` writes); where it
does not, the first key that was a client's stays the client's for the whole run, through resumes too. Keys that nodes
register by themselves (a SuperLink that takes anybody) change when a node is started again, and bind nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedlora.errors import ReplyError
from fedlora.flower.bounded_pull import over_a_superlink
from fedlora.sanitize import clean_text


@dataclass(frozen=True)
class Identity:
    """Who a node is by the SuperLink's registry.

    Args:
        name: Name under which the coordinator registered its key; "" for a node that registered itself.
        key: Fingerprint of its public key, as `ssh-keygen -lf` shows it; "" if it has none.
    """

    name: str = ""
    key: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} ({self.key})" if self.name else self.key or "one without a key"


def identities(grid: Grid) -> dict[int, Identity | None]:
    """The nodes that are there, by Flower's id; None for a node of a simulation, which is the server's own."""
    if not over_a_superlink(grid):
        return dict.fromkeys(grid.get_node_ids())
    return {
        node.node_id: Identity(clean_text(node.name, 80), fingerprint(node.public_key)) for node in grid.get_nodes()
    }


def fingerprint(key: bytes) -> str:
    """SHA256:... of a public key in PEM, as OpenSSH writes it; "" for bytes that are no key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        loaded = serialization.load_pem_public_key(key)
        line = loaded.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    except (ValueError, UnsupportedAlgorithm):
        return ""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


class Bindings:
    """Clients and their nodes' identities in one run.

    Args:
        pins: `server.nodes`; the k-th entry is the name or the key fingerprint of client k's node.
        known: Nodes that have been clients of this run so far.
        remember: Called with all known nodes whenever one is added.
    """

    def __init__(
        self,
        pins: Sequence[str] = (),
        known: Mapping[int, Identity] | None = None,
        remember: Callable[[Mapping[int, Identity]], object] | None = None,
    ) -> None:
        self._pins, self._known, self._remember = pins, dict(known or {}), remember

    def name(self, client_id: int) -> str:
        """The registered name of a client's node, or its key's fingerprint; "" if neither is known."""
        if client_id < len(self._pins):
            return self._pins[client_id]
        node = self._known.get(client_id, Identity())
        return node.name or node.key

    def client_of(self, node: Identity | None) -> int | None:
        """The client that a node is by its pin or has been so far, whatever it says; None if that is not known."""
        if node is None or not node.key:
            return None
        if self._pins:
            return next((k for k, pin in enumerate(self._pins) if pin in (node.name, node.key)), None)
        return next((k for k, known in self._known.items() if known.key == node.key), None)

    def bind(self, client_id: int, node: Identity | None) -> None:
        """Let a node be a client, and remember it.

        Args:
            client_id: The client that the node claims to be.
            node: The node's registered identity; None for a node of a simulation.

        Raises:
            ReplyError: another node is that client, or the node is another client.
        """
        if node is None:
            return
        if self._pins:
            pin = self._pins[client_id] if client_id < len(self._pins) else None
            if pin is None or pin not in (node.name, node.key):
                whose = "no node's" if pin is None else f"that of the node {pin!r}"
                raise ReplyError(
                    f"client {client_id} is {whose} (server.nodes), and this node is {node}", code="not-its-node"
                )
        else:
            owner = self._known.get(client_id)
            if owner is not None and owner.key != node.key:
                raise ReplyError(
                    f"client {client_id} is the node {owner} in this run, and this node is {node}: to put it in its "
                    "place, say in server.nodes which node is which client",
                    code="client-has-another-node",
                )
            other = next((k for k, known in self._known.items() if known.key == node.key and k != client_id), None)
            if other is not None:
                raise ReplyError(
                    f"the node {node} is client {other} in this run, and says that it is client {client_id}: correct "
                    "partition-id in its node config, or say in server.nodes which node is which client",
                    code="node-is-another-client",
                )
        if node.name and node.key and self._known.get(client_id) != node:
            self._known[client_id] = node
            if self._remember is not None:
                self._remember(self._known)
