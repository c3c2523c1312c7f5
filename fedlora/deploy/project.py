"""The folders of a federation, written once: one for the coordinator, one to hand to each node.

```
DIR/
  README.md                    what to do, in order
  authority/ca.key             signs certificates; belongs offline
  coordinator/
    federation.toml            addresses and names of the nodes
    ca.crt server.crt server.key superexec.secret Caddyfile
    nodes/NAME.pub             keys that are let in
    flower/config.toml         the Flower connection: FLWR_HOME=.../flower flwr run app federation
    app/pyproject.toml run.toml  what a run is: no code, every machine runs the fedlora that it has installed
  nodes/NAME/
    README.md node.toml        addresses, and what to do
    site/                      the worker's: policy.toml and node-config.toml, which say all of the node
    socket/                    where the worker listens
    supernode/                 ca.crt node.key runtime.crt runtime.key superexec.secret
    superexec/                 ca.crt superexec.secret: all that the coordinator's app finds
```
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import tomli_w

from fedlora.config import OpenTable, RunConfig
from fedlora.deploy import texts
from fedlora.deploy.commands import CONNECTION, SITE, SOCKET, SUPEREXEC, SUPERNODE, Address, caddyfile
from fedlora.deploy.keys import Pair, make_authority, make_node_key, make_secret, make_server
from fedlora.errors import DeployError, nearest
from fedlora.site import NODE_CONFIG

RUNTIME_PORT = 9094
"""Where a SuperExec finds the SuperNode beside it."""

UNKNOWN = "the worker's log says it when a run asks"
"""In a policy: the fingerprint of a model that is not on the machine where the policy is first written."""

INSIDE = ("localhost", "127.0.0.1", "superlink", "proxy")
"""Names under which the coordinator's own programs, and the services of docker-compose.yml, reach the SuperLink."""


@dataclass(frozen=True)
class NodePlan:
    """One node.

    Args:
        name: of its folder; small letters, digits and hyphens.
        data: absolute path, on its machine, of the file with its examples; None: it takes its share of the run's data.
        device: what it trains on, such as "cuda:0"; None: as the run config says.
        rank: of its adapter; None: as the run config says.
        ledger: absolute path, on its machine, of its privacy ledger.
    """

    name: str
    data: str | None = None
    device: str | None = None
    rank: int | None = None
    ledger: str = "/var/lib/fedlora/ledger.jsonl"


@dataclass(frozen=True)
class FederationPlan:
    """Everything that `write_project` needs to know.

    Args:
        hosts: names and addresses of the coordinator, the first is the one that nodes use.
        nodes: client k is the k-th.
        port: that nodes connect to.
        control_port: of the SuperLink, on the coordinator's loopback.
    """

    hosts: tuple[str, ...]
    nodes: tuple[NodePlan, ...]
    port: int = 8443
    control_port: int = 8000

    @property
    def proxied(self) -> bool:
        """Whether a proxy stands between SuperLink and nodes: always, unless all of them are on one machine."""
        return not is_loopback(self.hosts[0])

    @property
    def control(self) -> Address:
        """Where the SuperLink listens."""
        return Address("127.0.0.1", self.control_port)

    @property
    def public(self) -> Address:
        """Where the nodes connect to."""
        return Address(self.hosts[0], self.port) if self.proxied else self.control

    def runtime_port(self, place: int) -> int:
        """Of a node's SuperNode; nodes on one machine must not share it."""
        return RUNTIME_PORT if self.proxied else self.control_port + 1 + place


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host of that name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run_config(config: RunConfig, plan: FederationPlan) -> RunConfig:
    """The run's config, fitted to the nodes: with their own data there is nothing to divide.

    Raises:
        DeployError: only some nodes have data of their own, the server would have no test data, or the config is for
            another number of clients.
    """
    own, number = [node.name for node in plan.nodes if node.data], len(plan.nodes)
    if own and len(own) < number:
        lacking = next(node.name for node in plan.nodes if not node.data)
        raise DeployError(
            f"node {lacking!r} has no data of its own but {own[0]!r} does: give --data {lacking}=/path/on/its/machine",
            code="node-without-data",
        )
    if not own:
        there = config.partition.fields.get("clients")
        if there is not None and there != number:
            raise DeployError(
                f"the config divides its data among {there} clients, but there are {number} nodes: add "
                f"--set partition.clients={number}, or give each node its own file with --data NAME=PATH",
                code="clients-are-not-nodes",
            )
        return config
    test = config.data.test
    if test is None and config.evaluation.at_server:
        raise DeployError(
            "the nodes keep their data, so the server needs test data of its own: --set data.test=FILE, or let the "
            "nodes evaluate: --set evaluation.on=clients",
            code="no-test-data",
        )
    found = None if test is None else str(Path(test).expanduser().resolve())
    data = config.data.model_copy(update={"source": "nodes", "test": found})
    partition = OpenTable(name="nodes", clients=number)  # type: ignore[call-arg]
    fitted = config.model_copy(update={"data": data, "partition": partition})
    from fedlora.data.own import require_labels  # reads the task's class, and so imports torch

    require_labels(fitted)
    return fitted


def write_project(folder: Path, config: RunConfig, plan: FederationPlan, *, overwrite: bool = False) -> None:
    """Write all folders of a federation.

    Args:
        folder: is made; private files in it can be read by their owner alone.
        config: of the run; see `run_config`.
        plan: addresses and nodes.
        overwrite: replace an earlier project there, and with it its keys.

    Raises:
        DeployError: the folder is there, or the plan is not usable.
    """
    _check(plan)
    config = run_config(config, plan)
    _make_way(folder, overwrite)
    authority = make_authority(f"fedlora federation {folder.name}")
    _private(folder / "authority" / "ca.key", authority.private)
    _public(folder / "README.md", texts.project(plan))
    _write_coordinator(folder.resolve() / "coordinator", config, plan, authority)
    for place, node in enumerate(plan.nodes):
        key = make_node_key(node.name)
        _public(folder / "coordinator" / "nodes" / f"{node.name}.pub", key.public)
        _write_node(folder / "nodes" / node.name, config, plan, place, authority, key)


def _write_coordinator(folder: Path, config: RunConfig, plan: FederationPlan, authority: Pair) -> None:
    server = make_server(authority, "superlink", tuple(dict.fromkeys((*plan.hosts, *INSIDE))))
    _public(folder / "ca.crt", authority.public)
    _public(folder / "server.crt", server.public)
    _private(folder / "server.key", server.private)
    _private(folder / "superexec.secret", make_secret())
    _make_private(folder / "state")
    facts = {
        "host": plan.hosts[0],
        "port": plan.port,
        "control-port": plan.control_port,
        "proxied": plan.proxied,
        "nodes": [node.name for node in plan.nodes],
    }
    _public(folder / "federation.toml", tomli_w.dumps(facts))
    _public(folder / "Caddyfile", caddyfile(plan.port, plan.control))
    write_connection(folder, plan.control)
    _public(folder / "app" / "pyproject.toml", texts.APP)
    names = tuple(node.name for node in plan.nodes)  # under which their keys are registered: nobody else is client k
    pinned = config.model_copy(update={"server": config.server.model_copy(update={"nodes": names})})
    _public(folder / "app" / "run.toml", texts.RUN_HEAD + pinned.to_toml())


def _write_node(folder: Path, config: RunConfig, plan: FederationPlan, place: int, authority: Pair, key: Pair) -> None:
    node = plan.nodes[place]
    runtime = make_server(authority, f"supernode {node.name}", ("localhost", "127.0.0.1", f"supernode-{node.name}"))
    secret, supernode, superexec, site = make_secret(), folder / SUPERNODE, folder / SUPEREXEC, folder / SITE
    for place_of_it in (supernode, superexec):
        _private(place_of_it / "superexec.secret", secret)
        _public(place_of_it / "ca.crt", authority.public)
    _private(supernode / "node.key", key.private)
    _public(supernode / "runtime.crt", runtime.public)
    _private(supernode / "runtime.key", runtime.private)
    for own in (supernode, superexec, site):
        _make_private(own / "state")
    _make_private(site)
    _make_private((folder / SOCKET).parent)
    facts = {"name": node.name, "superlink": str(plan.public), "runtime-port": plan.runtime_port(place)}
    _public(folder / "node.toml", tomli_w.dumps(facts))
    _public(site / NODE_CONFIG, texts.NODE_CONFIG_HEAD + tomli_w.dumps(node_config(plan, place)))
    _public(site / "policy.toml", texts.POLICY + tomli_w.dumps(first_policy(config, node)))
    _public(folder / "README.md", texts.node(node, plan))


def node_config(plan: FederationPlan, place: int) -> dict[str, Any]:
    """What a node tells the app of itself: see `fedlora.flower.app_config`."""
    node = plan.nodes[place]
    config: dict[str, Any] = {"partition-id": place, "num-partitions": len(plan.nodes), "ledger": node.ledger}
    return config | {k: v for k, v in (("data", node.data), ("device", node.device), ("rank", node.rank)) if v}


def first_policy(config: RunConfig, node: NodePlan) -> dict[str, Any]:
    """What a site's policy must list for the run: paths on its machine, which no run may choose unlisted."""
    from fedlora.assets import Checkpoint
    from fedlora.model.fingerprint import fingerprint

    model, policy = config.model.name, dict[str, Any]()
    if node.data is None:
        sources = [name for name in (config.data.source, config.data.test) if name is not None]
        policy |= {"sources": sources} if any(PurePosixPath(name).is_absolute() for name in sources) else {}
    if PurePosixPath(model).is_absolute():
        known = fingerprint(Checkpoint.of(config.model)) if Path(model).is_dir() else UNKNOWN
        policy["base_models"] = {model: known}
    return policy


def write_connection(folder: Path, control: Address) -> None:
    """Tell `flwr` where the SuperLink is and whose certificates to trust; again after the folder was moved.

    Args:
        folder: the coordinator's, absolute.
        control: of the SuperLink.
    """
    path = folder / "flower" / "config.toml"
    tree = read_toml(path, ()) if path.is_file() else {}
    wanted = {"address": str(control), "root-certificates": str(folder / "ca.crt")}
    connections = {"default": CONNECTION, **tree.get("superlink", {})}
    if connections.get(CONNECTION) != wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps({**tree, "superlink": {**connections, CONNECTION: wanted}}), encoding="utf-8")


def read_toml(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A file that `write_project` wrote.

    Raises:
        DeployError: it is missing or damaged.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeployError(f"{str(path)!r} is missing: fedlora deploy init writes it", code="no-such-file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeployError(f"{str(path)!r} cannot be read: {error}", code="file-not-readable") from None
    for key in keys:
        if key not in tree:
            raise DeployError(f"{str(path)!r} lacks the key {key!r}; {nearest(key, tree)}", code="missing-key")
    return tree


def _check(plan: FederationPlan) -> None:
    if not plan.nodes:
        raise DeployError("a federation needs nodes: give --node NAME for each", code="no-nodes")
    names = [node.name for node in plan.nodes]
    for name in names:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", name):
            raise DeployError(
                f"node {name!r}: use at most 32 lower-case letters, digits and hyphens for a node's name",
                code="bad-node-name",
            )
    if len(set(names)) < len(names):
        raise DeployError(
            f"two nodes are named {max(names, key=names.count)!r}: give each a name of its own",
            code="node-named-twice",
        )
    for node in plan.nodes:
        for what, path in (("data", node.data), ("ledger", node.ledger)):
            if path is not None and not PurePosixPath(path).is_absolute():
                raise DeployError(
                    f"node {node.name!r}: {what} {path!r} must be an absolute path on the node's machine",
                    code="path-not-absolute",
                )
    if not plan.proxied and len({node.ledger for node in plan.nodes}) < len(names):
        raise DeployError(
            "nodes on one machine need their own ledgers: give --ledger NAME=PATH for each", code="node-without-ledger"
        )


def _make_way(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "coordinator" / "federation.toml").is_file():
        raise DeployError(
            f"{str(folder)!r} holds files that are not a federation: choose another folder", code="path-taken"
        )
    if not overwrite:
        raise DeployError(
            f"{str(folder)!r} holds a federation: choose another folder, or --overwrite it with its keys and database",
            code="federation-exists",
        )
    shutil.rmtree(folder)


def _private(path: Path, content: bytes) -> None:
    _make_private(path.parent)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _public(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
