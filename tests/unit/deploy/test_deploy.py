"""Folders, keys and commands of a federation; no program of Flower's is started here."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import subprocess
import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from support.command_line import invoke
from support.errors import raises
from support.other_user import cannot

from fedlora.config import RunConfig, load_config, parse_config
from fedlora.deploy import (
    ENVIRONMENT,
    Address,
    FederationPlan,
    NodePlan,
    commands,
    programs,
    script,
    write_project,
)
from fedlora.deploy.foreground import start, worker_socket
from fedlora.deploy.keys import make_authority, make_node_key, make_server
from fedlora.errors import ConfigError, DeployError, FedloraError
from fedlora.node_worker.gated_app import GatedApp
from fedlora.node_worker.socket import LONGEST
from fedlora.site.policy import Policy, load_policy
from fedlora.training.workspace import open_workspace

ROOT = Path(__file__).parents[3]
PLAN = FederationPlan(("example.org", "10.0.0.1"), (NodePlan("site-a"), NodePlan("site-b")))
CONFIG = parse_config("", ["partition.clients=2"], name="trial")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "federation"
    write_project(folder, CONFIG, PLAN)
    return folder


# ------------------------------------------------------------------------------------------------ keys


def chain_is_valid(certificate: bytes, authority: bytes, host: str) -> bool:
    name: x509.DNSName | x509.IPAddress = x509.DNSName(host)
    with suppress(ValueError):
        name = x509.IPAddress(ipaddress.ip_address(host))
    verifier = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(authority)])).build_server_verifier(name)
    try:
        verifier.verify(x509.load_pem_x509_certificate(certificate), [])
    except VerificationError:
        return False
    return True


def test_a_certificate_holds_for_its_hosts_under_its_authority_and_for_nothing_else() -> None:
    ours, theirs = make_authority("ours"), make_authority("theirs")
    server = make_server(ours, "server", ("example.org", "10.0.0.1"))
    assert chain_is_valid(server.public, ours.public, "example.org")
    assert chain_is_valid(server.public, ours.public, "10.0.0.1")
    assert not chain_is_valid(server.public, ours.public, "example.com")
    assert not chain_is_valid(server.public, theirs.public, "example.org")
    valid_to = x509.load_pem_x509_certificate(server.public).not_valid_after_utc
    assert valid_to > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365)


def test_a_server_cannot_sign_for_others() -> None:
    ours = make_authority("ours")
    server = make_server(ours, "server", ("example.org",))
    forged = make_server(server, "forged", ("example.com",))
    verifier = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(ours.public)]))
    chain = [x509.load_pem_x509_certificate(server.public)]
    with pytest.raises(VerificationError):
        verifier.build_server_verifier(x509.DNSName("example.com")).verify(
            x509.load_pem_x509_certificate(forged.public), chain
        )


def test_a_node_key_is_what_flower_takes() -> None:
    pair = make_node_key("site-a")
    private = serialization.load_ssh_private_key(pair.private, password=None)
    public = serialization.load_ssh_public_key(pair.public)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public
    assert pair.public.endswith(b" site-a\n")
    assert make_node_key("site-a").private != pair.private


# ------------------------------------------------------------------------------------------------ folders


def test_what_is_private_can_be_read_by_its_owner_alone(project: Path) -> None:
    private = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file() and secret(path)}
    assert private == {
        "authority/ca.key",
        *(f"coordinator/{name}" for name in ("server.key", "superexec.secret")),
        *(f"nodes/{node}/supernode/{name}" for node in SITES for name in NODE_SECRETS),
        *(f"nodes/{node}/superexec/superexec.secret" for node in SITES),
    }
    for name in private:
        assert (project / name).stat().st_mode & 0o777 == 0o600
        assert (project / name).parent.stat().st_mode & 0o777 == 0o700


NODE_SECRETS = ("node.key", "runtime.key", "superexec.secret")


def secret(path: Path) -> bool:
    return b"PRIVATE KEY" in path.read_bytes() or path.suffix == ".secret"


def test_a_node_gets_its_own_secrets_and_nobody_elses(project: Path) -> None:
    nodes = [project / "nodes" / site for site in SITES]
    a, b = (node / "supernode" for node in nodes)
    for name in NODE_SECRETS:
        assert (a / name).read_bytes() != (b / name).read_bytes()
    for node in nodes:
        own, app = node / "supernode", node / "superexec"
        assert sorted(path.name for path in app.iterdir()) == ["ca.crt", "state", "superexec.secret"]
        assert (app / "superexec.secret").read_bytes() == (own / "superexec.secret").read_bytes()
        assert (app / "ca.crt").read_bytes() == (project / "coordinator" / "ca.crt").read_bytes()
        assert len((node / "README.md").read_text().splitlines()) == 3
        for closed in (own, app, node / "site", node / "socket"):
            assert closed.stat().st_mode & 0o777 == 0o700
    for node, site in zip((a, b), SITES, strict=True):
        key = serialization.load_ssh_private_key((node / "node.key").read_bytes(), None)
        public = (project / "coordinator" / "nodes" / f"{site}.pub").read_bytes()
        assert key.public_key() == serialization.load_ssh_public_key(public)
        authority = (node / "ca.crt").read_bytes()
        assert chain_is_valid((node / "runtime.crt").read_bytes(), authority, f"supernode-{site}")
        assert not chain_is_valid((node / "runtime.crt").read_bytes(), authority, "example.org")
    server = (project / "coordinator" / "server.crt").read_bytes()
    for host in ("example.org", "10.0.0.1", "localhost", "127.0.0.1", "superlink", "proxy"):
        assert chain_is_valid(server, (project / "coordinator" / "ca.crt").read_bytes(), host)


def test_the_app_carries_the_run_config_and_no_code(project: Path) -> None:
    app_folder = project / "coordinator" / "app"
    assert sorted(path.name for path in app_folder.iterdir()) == ["pyproject.toml", "run.toml"]
    written = load_config(app_folder / "run.toml")
    assert written.server.nodes == tuple(node.name for node in PLAN.nodes)
    assert written.model_copy(update={"server": CONFIG.server}) == CONFIG
    theirs = tomllib.loads((app_folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert theirs["components"] == ours["components"]
    assert theirs["config"].keys() == ours["config"].keys()


def test_a_node_config_says_what_was_asked_for(tmp_path: Path) -> None:
    nodes = (
        NodePlan("a", data="/srv/a.csv", device="cuda:1", rank=4, ledger="/var/a.jsonl"),
        NodePlan("b", data="/srv/b.csv", ledger="/var/b.jsonl"),
    )
    config = parse_config("", [f"data.test='{tmp_path}/test.csv'", "task.labels=['no','yes']"])
    write_project(tmp_path / "f", config, FederationPlan(("127.0.0.1",), nodes))
    sites = [tmp_path / "f" / "nodes" / node.name / "site" for node in nodes]
    read = [tomllib.loads((site / "node-config.toml").read_text()) for site in sites]
    first = {"data": "/srv/a.csv", "device": "cuda:1", "rank": 4, "ledger": "/var/a.jsonl"}
    assert read[0] == {"partition-id": 0, "num-partitions": 2, **first}
    assert read[1] == {"partition-id": 1, "num-partitions": 2, "data": "/srv/b.csv", "ledger": "/var/b.jsonl"}
    for site in sites:
        assert load_policy(site) == Policy()  # what has a name needs no permission
        assert GatedApp(site).policy == Policy()
    run = load_config(tmp_path / "f" / "coordinator" / "app" / "run.toml")
    assert (run.data.source, run.partition.name, run.partition.fields) == ("nodes", "nodes", {"clients": 2})
    ports = [
        tomllib.loads((tmp_path / "f" / "nodes" / node.name / "node.toml").read_text())["runtime-port"]
        for node in nodes
    ]
    assert len(set(ports)) == 2  # on one machine


def test_a_coordinators_folder_can_be_moved(tmp_path: Path) -> None:
    write_project(tmp_path / "f", CONFIG, PLAN)
    moved = tmp_path / "moved"
    (tmp_path / "f" / "coordinator").rename(moved)
    file = moved / "flower" / "config.toml"
    file.write_text(file.read_text() + '[superlink.mine]\naddress = "other:1"\n')
    programs(moved)
    connections = tomllib.loads(file.read_text())["superlink"]
    assert connections["federation"] == {"address": "127.0.0.1:8000", "root-certificates": f"{moved}/ca.crt"}
    assert connections["default"] == "federation"
    assert connections["mine"] == {"address": "other:1"}


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    write_project(folder, CONFIG, PLAN)
    key = (folder / "authority" / "ca.key").read_bytes()
    with raises(DeployError, "federation-exists", folder, "--overwrite"):
        write_project(folder, CONFIG, PLAN)
    assert (folder / "authority" / "ca.key").read_bytes() == key
    write_project(folder, CONFIG, PLAN, overwrite=True)
    assert (folder / "authority" / "ca.key").read_bytes() != key
    foreign = tmp_path / "g"
    foreign.mkdir()
    (foreign / "thesis.md").touch()
    with raises(DeployError, "path-taken", foreign):
        write_project(foreign, CONFIG, PLAN, overwrite=True)
    assert (foreign / "thesis.md").exists()


def nodes(*plans: NodePlan) -> FederationPlan:
    return replace(PLAN, nodes=plans)


A, B = NodePlan("a", data="/srv/a.csv"), NodePlan("b", data="/srv/b.csv")


@pytest.mark.parametrize(
    ("plan", "settings", "error", "code", "named"),
    [
        (nodes(), [], DeployError, "no-nodes", "--node NAME"),
        (nodes(NodePlan("A b")), [], DeployError, "bad-node-name", "'A b'"),
        (nodes(NodePlan("a"), NodePlan("a")), [], DeployError, "node-named-twice", "'a'"),
        (nodes(A, NodePlan("b")), [], DeployError, "node-without-data", "--data b="),
        (nodes(replace(A, data="a.csv"), B), [], DeployError, "path-not-absolute", "data 'a.csv'"),
        (nodes(replace(A, ledger="x"), B), [], DeployError, "path-not-absolute", "ledger 'x'"),
        (nodes(A, B), [], DeployError, "no-test-data", "--set data.test=FILE"),
        (nodes(A, B), ["data.test='t.csv'"], ConfigError, "classes-unknown", "task.labels"),
        (nodes(NodePlan("a"), NodePlan("b"), NodePlan("c")), [], DeployError, "clients-are-not-nodes", "clients=3"),
        (replace(PLAN, hosts=("localhost",)), [], DeployError, "node-without-ledger", "--ledger NAME=PATH"),
    ],
)
def test_plans_that_cannot_work_say_the_cure_and_write_nothing(
    plan: FederationPlan, settings: list[str], error: type[FedloraError], code: str, named: str, tmp_path: Path
) -> None:
    with raises(error, code, named):
        write_project(tmp_path / "f", parse_config("", ["partition.clients=2", *settings]), plan)
    assert not (tmp_path / "f").exists()


def test_a_path_of_the_run_is_listed_in_each_sites_policy(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> None:
    config = parse_config("", ["partition.clients=2", f"model.name='{tiny_bert}'", f"data.source='{tiny_csv}'"])
    write_project(tmp_path / "f", config, PLAN)
    policy = load_policy(tmp_path / "f" / "nodes" / "site-a" / "site")
    assert policy.base_models == {str(tiny_bert): open_workspace(config).base.fingerprint}
    assert policy.sources == (str(tiny_csv),)


@pytest.mark.skipif(bool(cannot()), reason=cannot())
def test_root_starts_each_program_of_a_node_as_its_folders_owner(project: Path) -> None:
    node = project / "nodes" / "site-a"
    for number, part in enumerate(("site", "supernode", "superexec")):
        os.chown(node / part, 42_001 + number, 42_001 + number)
    seen = [
        start(replace(program, command=["id"]), subprocess.PIPE).communicate()[0].decode() for program in programs(node)
    ]
    assert [re.sub("[^0-9=a-z, ]", "", line.split(" groups")[0]) for line in seen] == [
        f"uid={user} gid={user}" for user in (42_001, 42_002, 42_003)
    ]
    assert all("groups=4200" in line and "(root)" not in line for line in seen)


# ------------------------------------------------------------------------------------------------ commands


def test_only_the_proxy_is_reached_from_outside(project: Path) -> None:
    todo = {program.name: list(program.command) for program in programs(project)}
    assert list(todo) == ["superlink", "superexec", "proxy"]
    assert value_of("--host", todo["superlink"]) == "127.0.0.1"
    node = {program.name: list(program.command) for program in programs(project / "nodes" / "site-a")}
    assert value_of("--superlink", node["supernode"]) == "example.org:8443"
    assert value_of("--host", node["supernode"]) == "127.0.0.1"
    caddyfile = (project / "coordinator" / "Caddyfile").read_text()
    assert re.findall(r"handle (\S+) {", caddyfile) == ["/v1/fleet/*", "/health"]
    assert caddyfile.count("reverse_proxy") == 1
    assert ":8443 {" in caddyfile


def value_of(option: str, command: list[str]) -> str:
    return command[command.index(option) + 1]


def test_every_program_is_told_to_keep_quiet_and_to_install_nothing(project: Path) -> None:
    assert ENVIRONMENT["FLWR_TELEMETRY_ENABLED"] == "0"
    assert ENVIRONMENT["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    for folder in (project, project / "nodes" / "site-b"):
        for program in programs(folder):
            assert program.environment.items() >= ENVIRONMENT.items()
            assert "--allow-runtime-dependency-installation" not in program.command
            assert "--insecure" not in program.command


def test_a_worker_listens_where_its_path_is_short_enough_and_every_program_knows_where(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    for folder in (tmp_path / "f", deep):
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_project(folder, CONFIG, PLAN)
    sockets = set()
    for node in (Path("/srv/site-a"), *(deep / "nodes" / name for name in ("site-a", "site-b"))):
        socket = worker_socket(node)
        assert len(os.fsencode(socket)) <= LONGEST
        sockets.add(socket)
    assert len(sockets) == 3
    assert "/srv/site-a/socket/worker.sock" in sockets
    for program in programs(deep / "nodes" / "site-b"):
        assert program.environment["FEDLORA_WORKER"] == worker_socket(deep.resolve() / "nodes" / "site-b")
    assert "FEDLORA_WORKER" not in programs(deep)[0].environment


def test_a_folder_that_is_none_says_so(tmp_path: Path) -> None:
    with raises(DeployError, "not-a-federation", tmp_path):
        programs(tmp_path)
    (tmp_path / "node.toml").write_text("name = 'a'\n")
    with raises(DeployError, "missing-key", "node.toml", "'superlink'"):
        programs(tmp_path)


# ------------------------------------------------------------------------------------------------ docker-compose.yml

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SITES = ("site-a", "site-b")


def defaults(value: str) -> str:
    """What compose puts in place of ${NAME:-default} where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def command_of(service: str) -> list[str]:
    return [defaults(word) for word in (*SERVICES[service]["entrypoint"], *SERVICES[service]["command"])]


def test_compose_runs_the_commands_of_deploy_up() -> None:
    superlink, home = Address("superlink", 8000), "/federation"
    expected = {
        "superlink": commands.superlink(home, f"{home}/state", Address("0.0.0.0", 8000)),
        "superexec": commands.superexec(home, superlink),
        "proxy": commands.proxy(home),
    }
    for site in SITES:
        node = f"supernode-{site}"
        expected[node] = commands.supernode(home, Address("proxy", 8443), Address("0.0.0.0", 9094))
        expected[f"superexec-{site}"] = commands.superexec(home, Address(node, 9094))
        expected[f"worker-{site}"] = commands.worker("/run/fedlora/worker.sock", home)
    assert {service: command_of(service) for service in SERVICES} == expected


def test_compose_checks_the_health_of_every_service() -> None:
    asked = {"superlink": Address("superlink", 8000), "superexec": Address("superlink", 8000)}
    for site in SITES:
        asked[f"superexec-{site}"] = Address(f"supernode-{site}", 9094)
        program = SERVICES[f"supernode-{site}"]["healthcheck"]["test"][-1]
        assert f"time.time() - os.stat('/federation/{commands.REACHED}').st_mtime" in program
        assert f"SystemExit(age > {commands.AWAY_S:g} " in program
    for service, address in asked.items():
        program = SERVICES[service]["healthcheck"]["test"][-1]
        assert "ssl.create_default_context(cafile='/federation/ca.crt')" in program
        assert f"urlopen('https://{address}/health', timeout=5, context=context)" in program
    for site in SITES:
        worker = SERVICES[f"worker-{site}"]
        asks = ["CMD", *commands.worker("/run/fedlora/worker.sock", "/federation"), "--check"]
        assert worker["healthcheck"]["test"] == asks
        assert worker["environment"]["FEDLORA_WORKER"] == SERVICES[f"superexec-{site}"]["environment"]["FEDLORA_WORKER"]
    assert SERVICES["proxy"]["healthcheck"]["test"][-1] == "https://localhost:8443/health"


def test_compose_lets_nodes_reach_the_proxy_alone_and_data_stay() -> None:
    networks = {name: set(service.get("networks", ())) for name, service in SERVICES.items()}
    assert networks["proxy"] == {"coordinator", "fleet"}
    for site in SITES:
        assert networks[f"supernode-{site}"] == {"fleet", site}
        assert networks[f"superexec-{site}"] == {site}  # where the coordinator's app is
        assert COMPOSE["networks"][site] == {"internal": True}
        assert SERVICES[f"worker-{site}"]["network_mode"] == "none"
        data = f"{site.upper().replace('-', '_')}_DATA"
        mounts = {name: [*map(defaults, service.get("volumes", ()))] for name, service in SERVICES.items()}
        assert [name for name, service in SERVICES.items() if data in str(service.get("volumes"))] == [f"worker-{site}"]
        node = f"./federation/nodes/{site}"
        assert mounts[f"supernode-{site}"] == [f"{node}/supernode:/federation"]
        assert mounts[f"superexec-{site}"] == [f"{node}/superexec:/federation", f"{node}/socket:/run/fedlora:ro"]
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports.keys() == {"superlink", "proxy"}
    assert all(port.startswith("127.0.0.1:") for port in ports["superlink"])


def test_compose_restarts_programs_and_keeps_them_quiet(project: Path) -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped"
        assert service["init"] is True
        if name != "proxy":
            assert service["environment"].items() >= ENVIRONMENT.items()
    homes = {program.name: program.environment["FLWR_HOME"] for program in programs(project)}
    for name, home in (("superlink", homes["superlink"]), ("superexec", homes["superexec"])):
        inside = home.replace(str(project.resolve() / "coordinator"), "/federation")
        assert SERVICES[name]["environment"]["FLWR_HOME"] == inside


def test_compose_and_the_images_are_of_the_flower_that_is_pinned() -> None:
    pinned = re.search(r"^flwr==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned is not None
    for name, service in SERVICES.items():
        if name == "superlink":
            assert service["image"].endswith(f":{pinned[1]}")
        elif name != "proxy":
            assert service["build"]["dockerfile"] == "deploy/Dockerfile"
    assert (
        f"ARG FLWR={pinned[1]}\nARG BASE=flwr/superexec:${{FLWR}}\nFROM ${{BASE}}"
        in (ROOT / "deploy" / "Dockerfile").read_text()
    )


# ------------------------------------------------------------------------------------------------ the command line


def fedlora(*arguments: object) -> tuple[int, str]:
    result = invoke(*arguments)
    return result.exit_code, result.output


def test_init_and_print_from_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(CONFIG.to_toml())
    folder = tmp_path / "f"
    arguments = ["deploy", "init", folder, config, "--node", "a", "--node", "b", "--host", "example.org"]
    code, output = fedlora(*arguments, "--rank", "b=2", "--device", "a=cpu")
    assert (code, "nodes connect to example.org:8443" in output) == (0, True)
    assert tomllib.loads((folder / "nodes" / "b" / "site" / "node-config.toml").read_text())["rank"] == 2
    code, output = fedlora("deploy", "up", folder, "--print")
    assert code == 0
    assert output == script(folder)
    for program in programs(folder):
        assert program.shell() in output.splitlines()
    register = [line for line in output.splitlines() if line.startswith("flwr supernode register")]
    assert [Path(line.split()[3]).stem for line in register] == ["a", "b"]
    assert all(Path(line.split()[3]).is_file() for line in register)
    code, output = fedlora(*arguments)
    assert (code, str(folder) in output, "--overwrite" in output) == (1, True, True)
    assert fedlora(*arguments, "--overwrite")[1].startswith(f"replacing {folder}")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", "/srv/a.csv", "NAME=DATA"),
        ("--data", "sitea=/srv/a.csv", "'site-a'"),
        ("--rank", "site-a=0", "--rank site-a=0"),
    ],
)
def test_what_cannot_be_meant_is_refused(option: str, value: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(CONFIG.to_toml())
    code, output = fedlora("deploy", "init", tmp_path / "f", config, "--node", "site-a", option, value)
    assert (code, message in output) == (1, True), output


def test_a_config_stays_the_same_if_the_nodes_have_no_data() -> None:
    from fedlora.deploy.project import run_config

    assert run_config(CONFIG, PLAN) == CONFIG
    assert isinstance(CONFIG, RunConfig)
