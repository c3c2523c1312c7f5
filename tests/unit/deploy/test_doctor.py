"""`fedlora deploy doctor`: each fault of a folder is one line with its cure, and a sound folder has none."""

from __future__ import annotations

import http.server
import os
import shutil
import ssl
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from support.command_line import invoke

from fedlora.config import parse_config
from fedlora.deploy import FederationPlan, NodePlan, doctor, foreground, keys, write_project
from fedlora.deploy.commands import AWAY_S, REACHED, SUPERNODE
from fedlora.deploy.run_checks import Run
from fedlora.deploy.signing import read_app
from fedlora.flower.app_config import by_itself
from fedlora.hashing import code_digest
from fedlora.privacy.accounting import Entry
from fedlora.privacy.ledger import Ledger
from fedlora.site.audit_log import AuditLog

SITES = ("site-a", "site-b")
Found = Mapping[str, tuple[str, str]]
THERE: Found = dict.fromkeys(SITES, ("online", "2026-01-01"))


class Healthy(http.server.BaseHTTPRequestHandler):
    """As a SuperLink or SuperNode that is asked for its health."""

    late_s = 0.0

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() - self.late_s)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path, str], int]]:
    """Serves with the certificate of a folder; the port."""
    servers = []

    def begin(folder: Path, name: str) -> int:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def project(tmp_path: Path, serve: Callable[[Path, str], int], tiny_bert: Path, tiny_csv: Path) -> Path:
    """A federation on this machine whose SuperLink and first SuperNode answer."""
    folder = tmp_path / "f"
    run = ["task.labels=['negative','positive']", f"model.name='{tiny_bert}'", f"data.test='{tiny_csv}'"]
    for name in SITES:
        (tmp_path / f"{name}.csv").write_bytes(tiny_csv.read_bytes())
    nodes = tuple(NodePlan(name, data=f"{tmp_path}/{name}.csv", ledger=f"{tmp_path}/{name}.jsonl") for name in SITES)
    write_project(folder, parse_config("", run, name="run"), FederationPlan(("127.0.0.1",), nodes))
    control = serve(folder / "coordinator", "server")
    node = folder / "nodes" / "site-a"
    put(folder / "coordinator" / "federation.toml", "8000", str(control))
    put(node / "node.toml", "8000", str(control))
    put(node / "node.toml", "8001", str(serve(node / SUPERNODE, "runtime")))
    (node / SUPERNODE / REACHED).touch()
    return folder


def put(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def read(file: Path) -> Run:
    config, signature = read_app(file)
    return Run(by_itself(config), signature, code_digest())


def faults(folder: Path, found: Found = THERE, run: Path | None = None) -> list[str]:
    findings = list(doctor.examine(folder, lambda address, certificate: found, read, run))
    assert len(findings) > 6
    return [str(finding) for finding in findings if finding.cure]


def test_a_sound_federation_has_no_faults(project: Path) -> None:
    assert faults(project) == []
    assert faults(project / "nodes" / "site-a") == []
    assert faults(project / "nodes" / "site-a", run=project / "coordinator" / "app" / "run.toml") == []


PRIVATE = """
[privacy]
epsilon = 2.0
delta = 1e-3
max_grad_norm = 1.0
public_examples = 40
accountant = "rdp"
"""


def private(site: Path, run: Path) -> None:
    put(run, "[privacy]", "[unused]") if "[privacy]" in run.read_text() else None
    text = run.read_text().replace('weighting = "examples"', 'weighting = "uniform"')
    run.write_text(text.replace("aggregation_error = true", "aggregation_error = false") + PRIVATE)


def spent(site: Path, run: Path) -> None:
    private(site, run)
    ledger = site.parents[3] / "site-a.jsonl"
    for number in range(9):
        Ledger(ledger).spend(Entry(0.5, 1.0, 50), run="r", round=number).close()


def rolled(site: Path, run: Path) -> None:
    private(site, run)
    (site.parents[3] / "site-a.jsonl").write_text('{"event": "started"}\n')


def logged(site: Path, run: Path) -> None:
    log = AuditLog(site)
    log.write("request", {"type": "train"})
    put(log.path, "train", "query")


def policy(text: str) -> Callable[[Path, Path], None]:
    return lambda site, run: (site / "policy.toml").write_text(text + (site / "policy.toml").read_text())


RUN_FAULTS: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "a policy that is none": (policy("max_rnak = 3\n"), ["did you mean 'max_rank'?"]),
    "a run that is none": (
        lambda site, run: put(run, "rounds = ", "ronuds = "),
        ["did you mean 'rounds'?"],
    ),
    "a clause": (
        policy("max_rounds = 1\n"),
        ["allow the run: max_rounds: the number of rounds is"],
    ),
    "an approval": (policy("approval = true\n"), ["the run: approval: config ", "fedlora node approve"]),
    "a signature": (policy("signers = []\n"), ["the run: signers: the run is not signed: fedlora deploy sign does it"]),
    "another model": (
        lambda site, run: put(site / "policy.toml", fingerprint_in(site), "0" * 64),
        ["the run's base model: its fingerprint is ", f"the policy names {'0' * 64}"],
    ),
    "no model": (
        lambda site, run: (put(run, 'name = "/', 'name = "/gone/'), put(site / "policy.toml", '"/', '"/gone/')),
        ["the run's base model: there is no folder", "gone"],
    ),
    "another column": (
        lambda site, run: put(site.parents[3] / "site-a.csv", "label", "lable"),
        ["site-a.csv: ", "'label'"],
    ),
    "no data": (lambda site, run: (site.parents[3] / "site-a.csv").unlink(), ["there is no data file", "site-a.csv"]),
    "another number": (
        lambda site, run: put(site / "node-config.toml", "partition-id = 0", "partition-id = 2"),
        ["its partition-id is 2, and the run has 2 clients"],
    ),
    "a spent budget": (spent, ["the privacy ledger: it stands at epsilon", "the run's 2"]),
    "a ledger without a chain": (rolled, ["the privacy ledger: ", "earlier fedlora"]),
    "a log that was edited": (logged, ["the audit log: ", "line 1 was changed"]),
}


def fingerprint_in(site: Path) -> str:
    (known,) = tomllib.loads((site / "policy.toml").read_text())["base_models"].values()
    return str(known)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FAULTS)
def test_what_of_a_run_would_fail_on_a_node_is_said_before_it_starts(name: str, project: Path) -> None:
    spoil, said = RUN_FAULTS[name]
    node, run = project / "nodes" / "site-a", project / "coordinator" / "app" / "run.toml"
    spoil(node / "site", run)
    (fault,) = faults(node, run=run)
    assert all(words in fault for words in said), fault


def test_what_of_a_run_would_fail_at_the_coordinator_is_said(project: Path, tiny_csv: Path) -> None:
    run = project / "coordinator" / "app" / "run.toml"
    put(run, str(tiny_csv), str(project / "gone.csv"))
    (fault,) = faults(project)
    assert "the server's test file" in fault
    put(run, "rounds = ", "ronuds = ")
    (fault,) = faults(project)
    assert "did you mean 'rounds'?" in fault


def test_nodes_that_are_away_and_not_registered_are_named(project: Path) -> None:
    first, second = faults(project, {"site-a": ("offline", "2026-02-03"), "stranger": ("online", "")})
    assert first.startswith("FAULT  node site-a is away since 2026-02-03: ")
    assert second.startswith("FAULT  node site-b is not registered: let it in: flwr supernode register ")
    (never,) = faults(project, {**THERE, "site-b": ("registered", "")})
    assert "node site-b is registered, and was never there" in never


def short_lived(folder: Path) -> None:
    keys.VALID_DAYS = 20
    authority = keys.make_authority("short")
    pair = keys.make_server(authority, "short", ("127.0.0.1",))
    for name, content in (("ca.crt", authority.public), ("server.crt", pair.public), ("server.key", pair.private)):
        (folder / name).write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "open": (lambda folder: os.chmod(folder / "server.key", 0o644), ["server.key: others can read it: chmod 600"]),
    "gone": (lambda folder: (folder / "superexec.secret").unlink(), ["superexec.secret: ", "is missing"]),
    "damaged": (lambda folder: (folder / "server.crt").write_text("?"), ["server.crt: it cannot be read"]),
    "another pair": (
        lambda folder: shutil.copy(
            folder.parent / "nodes" / "site-a" / "supernode" / "runtime.key", folder / "server.key"
        ),
        ["server.crt with its key: key and certificate are not of one pair"],
    ),
    "another authority": (
        lambda folder: (folder / "ca.crt").write_bytes(keys.make_authority("other").public),
        ["server.crt with its key: it is not of this federation's authority", "somebody else"],
    ),
    "ends soon": (short_lived, ["ca.crt is valid until", "19 days are left", "server.crt is valid until"]),
    "nobody": (
        lambda folder: put(folder / "federation.toml", "control-port = ", "control-port = 1 # "),
        ["SuperLink at 127.0.0.1:1 is not reached", "start it: fedlora deploy up"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.slow
def test_each_fault_of_a_coordinator_is_said_with_its_cure(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "VALID_DAYS", keys.VALID_DAYS)
    spoil, said = FAULTS[name]
    spoil(project / "coordinator")
    text = "\n".join(faults(project))
    assert all(words in text for words in said), text


def test_a_clock_that_is_off_is_said(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Healthy, "late_s", 60.0)
    (fault,) = faults(project)
    assert "the clocks of this machine and 127.0.0.1 agree: set both by NTP" in fault


def test_another_flower_is_said(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "1.42.0")
    (fault,) = faults(project)
    assert "this fedlora needs flwr" in fault


def test_a_node_that_the_superlink_does_not_answer_is_said(project: Path) -> None:
    node = project / "nodes" / "site-a"
    long_ago = time.time() - 2 * AWAY_S
    os.utime(node / SUPERNODE / REACHED, (long_ago, long_ago))
    (fault,) = faults(node)
    assert "the SuperLink last answered this node 120 s ago: " in fault
    (node / SUPERNODE / REACHED).unlink()
    (fault,) = faults(node)
    assert "has never answered it" in fault


def test_the_command_says_every_finding_and_fails_with_the_faults(project: Path) -> None:
    node = project / "nodes" / "site-a"
    sound = invoke("deploy", "doctor", node)
    assert (sound.exit_code, "FAULT" in sound.output) == (0, False), sound.output
    (node / SUPERNODE / REACHED).unlink()
    ill = invoke("deploy", "doctor", node)
    assert ill.exit_code == 1
    assert "1 fault found" in ill.output
    assert ill.output.count("ok     ") == sound.output.count("ok     ") - 1


def test_deploy_up_says_when_the_superlink_no_longer_answers_a_node_and_when_it_does_again(tmp_path: Path) -> None:
    folder, said = tmp_path, list[str]()
    (folder / "node.toml").touch()
    (folder / SUPERNODE / "state").mkdir(parents=True)
    link = foreground._Link(folder)
    link.look(said.append)
    link._since -= 2 * AWAY_S
    link.look(said.append)
    link.look(said.append)
    (folder / SUPERNODE / REACHED).touch()
    link.look(said.append)
    assert [line.split(":")[0] for line in said] == [
        "the SuperLink has not answered this node for 60 s",
        "the SuperLink answers this node again",
    ]
