"""`fedlora deploy sign` signs the config that the nodes will read, and a config that was changed since is another."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, RecordDict
from support.command_line import invoke
from support.errors import raises

from fedlora.config import parse_config
from fedlora.deploy import FederationPlan, NodePlan, write_project
from fedlora.deploy.signing import app_of, write_signature
from fedlora.errors import ConfigError, DeployError
from fedlora.flower.app_config import config_of
from fedlora.hashing import code_digest
from fedlora.site.approvals import config_hash
from fedlora.site.policy import load_policy
from fedlora.site.signatures import NotSignedError, Signer, public_line, require_signed

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
TODAY = datetime.datetime.now(datetime.UTC).date()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "f"
    nodes = tuple(NodePlan(name, ledger=f"/tmp/{name}.jsonl") for name in ("site-a", "site-b"))
    write_project(folder, parse_config("", ["partition.clients=2"]), FederationPlan(("127.0.0.1",), nodes))
    (tmp_path / "key").write_bytes(
        KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    return folder


def sign(project: Path, *options: str) -> tuple[int, str]:
    result = invoke("deploy", "sign", project, "--key", project.parent / "key", *options)
    return result.exit_code, result.output


def as_a_node_reads_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The signature and the hash of the config that reach a site's worker."""
    folder = project / "coordinator" / "app"
    monkeypatch.syspath_prepend(str(folder))
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    read = config_of(Context(1, 1, {}, RecordDict(), config))
    return config["signature"], config_hash(parse_config(read.to_toml()))


@pytest.mark.parametrize("change", ["", "rounds=3 train.lr=0.5"])
def test_a_site_that_trusts_the_key_takes_what_was_signed(
    project: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    put(project, 'set = ""', f'set = "{change}"')
    status, said = sign(project)
    assert status == 0, said
    (project / "policy.toml").write_text(said[said.index("signers = [") :].replace("NAME", "ada"))
    signers = [Signer.read(line) for line in load_policy(project).signers or ()]
    found = as_a_node_reads_it(project, monkeypatch)
    assert require_signed(signers, *found, code_digest(), TODAY).name == "ada"
    put(project, 'set = "', 'set = "seed=9 ')
    with pytest.raises(NotSignedError, match="another config"):
        require_signed(signers, *as_a_node_reads_it(project, monkeypatch), code_digest(), TODAY)
    assert sign(project)[0] == 0
    require_signed(signers, *as_a_node_reads_it(project, monkeypatch), code_digest(), TODAY)


def put(project: Path, old: str, new: str, name: str = "pyproject.toml") -> None:
    file = project / "coordinator" / "app" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_signature_ends_when_it_was_said_to(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signers = [Signer.read(f"ada {public_line(KEY)}")]
    assert str(TODAY + datetime.timedelta(days=3)) in sign(project, "--days", "3")[1]
    found = as_a_node_reads_it(project, monkeypatch)
    require_signed(signers, *found, code_digest(), TODAY + datetime.timedelta(days=3))
    with pytest.raises(NotSignedError, match="valid until"):
        require_signed(signers, *found, code_digest(), TODAY + datetime.timedelta(days=4))


def test_what_cannot_be_signed_is_said(project: Path) -> None:
    (project / "coordinator" / "app" / "more.csv").write_text("text,label\n")
    put(project, "[data]", '[data]\ntest = "more.csv"', "run.toml")
    status, said = sign(project)
    assert (status, "data.test" in said, said.count("\n")) == (1, True, 1), said
    put(project, 'signature = ""', "# none")
    with raises(DeployError, "no-place", 'signature = ""'):
        write_signature(app_of(project), "x")
    with raises(DeployError, "not-a-federation", project.parent):
        app_of(project.parent)
    (project.parent / "key").unlink()
    status, said = sign(project)
    assert (status, "ssh-keygen" in said) == (1, True)


def test_a_policy_with_a_signer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("signers = ['ada']\n")
    with raises(ConfigError, "not-a-signer", "'ada'"):
        load_policy(tmp_path)
