"""The nodes that a SuperLink knows, with whoever is away: for who runs the coordinator, not for a run."""

from __future__ import annotations

from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlora.sanitize import clean_text


def registered_nodes(address: str, root_certificates: bytes) -> dict[str, tuple[str, str]]:
    """Name of each registered node -> its status ("online", "offline", "registered": never seen), and since when.

    Args:
        address: Of the SuperLink's control API, as HOST:PORT.
        root_certificates: In PEM, that its certificate is checked against.

    Raises:
        OSError: it cannot be asked.
    """
    import httpx

    version = RuntimeVersionHttpInterceptor(component_name="flwr")
    try:
        with ControlHttpClient.from_server_address(address, False, root_certificates, [version]) as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
    except httpx.HTTPError as error:
        raise OSError(clean_text(error, 200)) from error
    found: dict[str, tuple[str, str]] = {}
    for node in nodes:
        if node.status != "unregistered":
            since = node.last_activated_at if node.status == "online" else node.last_deactivated_at
            found[clean_text(node.name or node.node_id, 80)] = node.status, since
    return found
