"""What is wrong with a coordinator's or a node's folder, on its machine: files, certificates, versions, who is reached,
and what of a run would fail there.

Nothing is changed and nothing is started. Each finding is one line, and says the cure where there is a fault.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import os
import re
import shutil
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib.metadata import requires, version
from pathlib import Path

from fedlora.deploy.commands import AWAY_S, REACHED, SITE, SUPERNODE, Address
from fedlora.deploy.foreground import environment_of, home_of, programs
from fedlora.deploy.project import read_toml
from fedlora.deploy.run_checks import Finding, Run, at_coordinator, at_site
from fedlora.errors import FedloraError

SOON_DAYS = 30
"""Before a certificate's end, from which on it is a fault."""
CLOCK_S = 5.0
"""Between the clocks of two machines; Flower's node signatures carry the time."""

Nodes = Callable[[str, bytes], Mapping[str, tuple[str, str]]]


def examine(folder: Path, nodes: Nodes, run: Callable[[Path], Run], file: Path | None = None) -> Iterator[Finding]:
    """All findings for a folder, one after the other.

    Args:
        folder: A coordinator's or a node's; a federation's is its coordinator's.
        nodes: `fedlora.flower.node_list.registered_nodes`.
        run: Reads a run.toml, with what is in the app beside it.
        file: The run.toml of a run that is to be looked at on a node; a coordinator's is in its app.

    Raises:
        DeployError: it is neither.
    """
    folder, todo = home_of(folder), programs(folder)
    yield from _versions()
    for program in todo:
        name = next((word for word in program.command if word.startswith("flower-")), program.command[0])
        missing = shutil.which(name, path=environment_of(program)["PATH"]) is None
        yield Finding(f"program {name} of {program.name}", "it is not installed on this machine" if missing else "")
    server = (folder / "federation.toml").is_file()
    yield from _files(folder if server else folder / SUPERNODE, "server" if server else "runtime")
    if server:
        yield from _coordinator(folder, nodes)
        file = folder / "app" / "run.toml"
    else:
        yield from _node(folder)
    try:
        found = None if file is None else run(file)
    except FedloraError as error:
        yield Finding(f"the run in {str(file)!r}", str(error))
        return
    if not server:
        yield from at_site(folder / SITE, found)
    elif found is not None:
        yield from at_coordinator(found)


def _versions() -> Iterator[Finding]:
    there = version("flwr")
    wanted = next(line for line in requires("fedlora") or () if re.match("flwr[<>=]", line))
    series = wanted.partition(">=")[2].partition(",")[0]  # as in flwr>=1.41,<1.42
    cure = "" if there.startswith(f"{series}.") else f"this fedlora needs {wanted}: pip install '{wanted}'"
    yield Finding(f"fedlora {version('fedlora')} with flwr {there}", cure)


def _files(folder: Path, server: str) -> Iterator[Finding]:
    """Secrets that others can read, and certificates."""
    secrets = [f"{server}.key", "superexec.secret", *(["node.key"] if server == "runtime" else [])]
    for name in secrets:
        path = folder / name
        if not path.is_file():
            yield Finding(name, f"{str(path)!r} is missing: fedlora deploy init writes it")
        elif stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Finding(name, f"others can read it: chmod 600 {path}")
        else:
            yield Finding(f"{name} can be read by its owner alone")
    yield from _certificates(folder, server)


def _certificates(folder: Path, server: str) -> Iterator[Finding]:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    def public(key: object) -> bytes:
        return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]

    loaded: dict[str, x509.Certificate] = {}
    for name in ("ca.crt", f"{server}.crt"):
        try:
            loaded[name] = x509.load_pem_x509_certificate((folder / name).read_bytes())
        except (OSError, ValueError) as error:
            yield Finding(name, f"it cannot be read ({error}): take it from where fedlora deploy init wrote it")
            continue
        end = loaded[name].not_valid_after_utc
        left = (end - datetime.datetime.now(datetime.UTC)).days
        cure = f"{left} days are left: fedlora deploy init makes new ones" if left < SOON_DAYS else ""
        yield Finding(f"{name} is valid until {end:%Y-%m-%d}", cure)
    if len(loaded) < 2:
        return
    authority, certificate = loaded.values()
    try:
        certificate.verify_directly_issued_by(authority)
        key = serialization.load_pem_private_key((folder / f"{server}.key").read_bytes(), password=None)
        fits = public(key.public_key()) == public(certificate.public_key())
        cure = "" if fits else "key and certificate are not of one pair: copy both from where they were made"
    except (InvalidSignature, ValueError, TypeError, OSError) as error:
        cure = f"it is not of this federation's authority, or its key is damaged ({error or type(error).__name__})"
    yield Finding(f"{server}.crt with its key", cure)


def _coordinator(folder: Path, nodes: Nodes) -> Iterator[Finding]:
    facts = read_toml(folder / "federation.toml", ("host", "port", "control-port", "proxied", "nodes"))
    control = Address("127.0.0.1", int(facts["control-port"]))
    here = list(_reached("SuperLink", control, folder, f"start it: fedlora deploy up {folder}"))
    yield from here
    if facts["proxied"]:
        public = Address(str(facts["host"]), int(facts["port"]))
        cure = "is the proxy up, does the name lead to this machine, and does its firewall let the port through?"
        yield from _reached("the nodes' way in", public, folder, cure)
    if any(finding.cure for finding in here):
        return
    try:
        found = nodes(str(control), (folder / "ca.crt").read_bytes())
    except OSError as error:
        yield Finding("registered nodes", f"the SuperLink does not say who they are ({error}): see its log")
        return
    for name in dict.fromkeys([*facts["nodes"], *found]):
        status, since = found.get(name, ("", ""))
        if status == "online":
            yield Finding(f"node {name} is there since {since}")
        elif status:
            when = f"away since {since}" if since else "registered, and was never there"
            yield Finding(f"node {name} is {when}", "look there: fedlora deploy doctor, and its SuperNode's log")
        else:
            key = folder / "nodes" / f"{name}.pub"
            cure = f"let it in: flwr supernode register {key} federation --name {name}"
            yield Finding(f"node {name} is not registered", cure)


def _node(folder: Path) -> Iterator[Finding]:
    facts = read_toml(folder / "node.toml", ("superlink", "runtime-port"))
    host, _, port = str(facts["superlink"]).rpartition(":")
    away = "is the coordinator up, and does this machine's firewall let connections out?"
    own = folder / SUPERNODE
    yield from _reached("SuperLink", Address(host.strip("[]"), int(port)), own, away)
    runtime = Address("127.0.0.1", int(facts["runtime-port"]))
    yield from _reached("SuperNode", runtime, own, f"start it: fedlora deploy up {folder}")
    try:
        age = time.time() - (own / REACHED).stat().st_mtime
    except OSError:
        yield Finding("this node", "the SuperLink has never answered it: start it, and register its key")
        return
    cure = "is its SuperNode running? See its log" if age > AWAY_S else ""
    yield Finding(f"the SuperLink last answered this node {age:.0f} s ago", cure)


def _reached(who: str, address: Address, folder: Path, cure: str) -> Iterator[Finding]:
    """Ask a server's /health over TLS, and compare the clocks."""
    try:
        context = ssl.create_default_context(cafile=os.fspath(folder / "ca.crt"))
        with closing(http.client.HTTPSConnection(address.host, address.port, timeout=10, context=context)) as link:
            link.request("GET", "/health")
            response = link.getresponse()
            response.read()
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, ssl.SSLCertVerificationError):
            cure = f"somebody else, or a certificate without this name: {error.verify_message}"
        yield Finding(f"{who} at {address} is not reached ({error})", cure)
        return
    status = response.status
    yield Finding(f"{who} at {address} answers", "" if status == 200 else f"with status {status}: see its log")
    if said := response.headers.get("date"):
        apart = abs(time.time() - email.utils.parsedate_to_datetime(said).timestamp())
        late = f"set both by NTP: signatures that are {apart:.0f} s off are refused" if apart > CLOCK_S else ""
        yield Finding(f"the clocks of this machine and {address.host} agree", late)
