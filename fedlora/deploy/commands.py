"""Flower's own programs of a federation, with their options: `fedlora deploy up`, docker-compose.yml and the demo all
run these.

A SuperLink serves everything on one port: /v1/fleet is for the nodes, /v1/control for whoever starts runs (and so can
run code on every node), /v1/runtime for the SuperExec. It therefore listens on loopback, and a proxy hands the nodes
/v1/fleet alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONNECTION = "federation"
"""Name of the Flower connection in the coordinator's config.toml."""

ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What every program gets: nothing is told to Flower's makers, and nothing is installed while a run goes on."""

PATIENT = ("python", "-m", "fedlora.flower.program")
"""Before those of Flower's programs that call a SuperLink: what it could not do at once is asked of it again."""

SUPERNODE, SUPEREXEC, SITE, SOCKET = "supernode", "superexec", "site", "socket/worker.sock"
"""In a node's folder: those of its programs (the worker's is SITE), each of which may belong to a user of its own, and
where the worker listens."""
REACHED = "state/reached"
"""In a SuperNode's folder: the file whose time is when the SuperLink last answered the node."""
AWAY_S = 60.0
"""Seconds without an answer after which a node counts as away: it asks every 3 s, and in training every 30 s."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, or is reached.

    Args:
        host: name or IP address.
        port: TCP.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def superlink(folder: str, state: str, listen: Address) -> list[str]:
    """The SuperLink: TLS, only registered nodes, apps in processes that a SuperExec starts, its state in a file.

    Args:
        folder: with the coordinator's certificates and secret.
        state: folder of the database; a SuperLink that finds it again goes on with its runs and knows its nodes.
        listen: where; keep it from everybody but this machine and the proxy.
    """
    return [
        "flower-superlink",
        *("--isolation", "process"),
        *("--database", f"{state}/superlink.db"),
        "--enable-supernode-auth",
        *("--ssl-ca-certfile", f"{folder}/ca.crt"),
        *("--ssl-certfile", f"{folder}/server.crt"),
        *("--ssl-keyfile", f"{folder}/server.key"),
        *("--superexec-auth-secret-file", f"{folder}/superexec.secret"),
        "--disable-runtime-dependency-installation",
        *("--host", listen.host),
        *("--port", str(listen.port)),
    ]


def superexec(folder: str, runtime: Address) -> list[str]:
    """The SuperExec, which starts the app's processes beside a SuperLink or a SuperNode.

    Args:
        folder: of the coordinator, or the SuperExec's own.
        runtime: address of the SuperLink, or of the SuperNode.
    """
    return [
        *PATIENT,
        "flower-superexec",
        *("--root-certificates", f"{folder}/ca.crt"),
        *("--runtime-api-address", str(runtime)),
        *("--superexec-auth-secret-file", f"{folder}/superexec.secret"),
    ]


def supernode(folder: str, superlink_address: Address, listen: Address) -> list[str]:
    """A SuperNode, which fetches messages for its node and sends replies: it opens connections and takes none.

    Args:
        folder: its own.
        superlink_address: of the coordinator's proxy.
        listen: where the SuperExec beside it finds it.
    """
    return [
        *PATIENT,
        *("--reached", f"{folder}/{REACHED}"),
        "flower-supernode",
        *("--isolation", "process"),
        *("--superlink", str(superlink_address)),
        *("--root-certificates", f"{folder}/ca.crt"),
        *("--auth-supernode-private-key", f"{folder}/node.key"),
        *("--ssl-ca-certfile", f"{folder}/ca.crt"),
        *("--ssl-certfile", f"{folder}/runtime.crt"),
        *("--ssl-keyfile", f"{folder}/runtime.key"),
        *("--superexec-auth-secret-file", f"{folder}/superexec.secret"),
        *("--host", listen.host),
        *("--port", str(listen.port)),
    ]


def worker(socket: str, site: str) -> list[str]:
    """A node's worker, which alone has the data, and answers what the site's policy allows.

    Args:
        socket: path of its Unix socket; FEDLORA_WORKER names it to the app.
        site: folder of the site.
    """
    return ["fedlora", "worker", "--socket", socket, "--site", site]


def proxy(folder: str) -> list[str]:
    """Caddy before the SuperLink: TLS for the nodes, and no route but /v1/fleet."""
    return ["caddy", "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


def register(folder: str, node: str) -> list[str]:
    """Let a node in: from then on the SuperLink takes its key (run with FLWR_HOME, as `run` is)."""
    return ["flwr", "supernode", "register", f"{folder}/nodes/{node}.pub", CONNECTION, "--name", node]


def run(folder: str, *overrides: str) -> list[str]:
    """Start a run.

    Args:
        folder: the coordinator's.
        overrides: of the app's run config, such as "resume=true".
    """
    config = ["--run-config", " ".join(overrides)] if overrides else []
    return ["flwr", "run", f"{folder}/app", CONNECTION, "--stream", *config]


def caddyfile(public: int, upstream: Address) -> str:
    """The proxy's configuration; its certificates are in the folder in which it runs.

    Args:
        public: port for the nodes.
        upstream: of the SuperLink, unless the environment has another in SUPERLINK.
    """
    return CADDYFILE.replace("PUBLIC", str(public)).replace("UPSTREAM", str(upstream))


CADDYFILE = """\
# What the nodes can reach: /v1/fleet, and nothing else that a SuperLink serves.

{
	admin off
	auto_https disable_redirects
	default_sni localhost
}

https://:PUBLIC {
	tls server.crt server.key
	handle /v1/fleet/* {
		reverse_proxy https://{$SUPERLINK:UPSTREAM} {
			transport http {
				tls_trusted_ca_certs ca.crt
			}
		}
	}
	handle /health {
		respond 200
	}
	handle {
		respond 404
	}
}
"""
