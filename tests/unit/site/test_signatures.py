"""A run is signed by a key that the site names, for this config and this fedlora, until a day; nothing else counts."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.errors import raises

from fedlora.errors import ConfigError, DeployError
from fedlora.site.signatures import (
    PURPOSE,
    NotSignedError,
    Signer,
    Statement,
    public_line,
    read_key,
    require_signed,
    sign,
)

TODAY = datetime.date(2027, 1, 15)
CONFIG, CODE = "c" * 64, "d" * 16
ADA, EVE = Ed25519PrivateKey.from_private_bytes(b"a" * 32), Ed25519PrivateKey.from_private_bytes(b"e" * 32)
SIGNERS = [Signer.read(f"ada@hub {public_line(ADA)}"), Signer.read(f"ben {public_line(EVE)} old key")]
SIGNED = sign(Statement(CONFIG, CODE, TODAY), ADA)


def signer_of(signature: str, signers: list[Signer] = SIGNERS[:1], **other: object) -> str:
    facts = {"config": CONFIG, "code": CODE, "today": TODAY, **other}
    return require_signed(signers, signature, **facts).name  # type: ignore[arg-type]


def test_a_signature_counts_until_its_last_day() -> None:
    assert signer_of(SIGNED) == "ada@hub"
    assert signer_of(SIGNED, SIGNERS[::-1]) == "ada@hub"
    assert signer_of(SIGNED, today=datetime.date(2026, 1, 1)) == "ada@hub"
    with pytest.raises(NotSignedError, match="until 2027-01-15"):
        signer_of(SIGNED, today=TODAY + datetime.timedelta(days=1))


@pytest.mark.parametrize(
    ("signature", "other", "why"),
    [
        ("", {}, "not signed"),
        (SIGNED, {"config": "e" * 64}, "another config"),
        (SIGNED, {"code": "f" * 16}, "another fedlora"),
        (SIGNED, {"signers": SIGNERS[1:]}, "none of the signers"),
        (SIGNED, {"signers": []}, "none of the signers"),
        (sign(Statement(CONFIG, CODE, TODAY), EVE), {}, "none of the signers"),
        (SIGNED.partition(".")[0], {}, "is none"),
        (f"{SIGNED}.{SIGNED}", {}, "is none"),
        ("ä.ö", {}, "is none"),
        (".", {}, "none of the signers"),
        ("x" * 10_000, {}, "is none"),
    ],
)
def test_no_other_signature_counts(signature: str, other: dict[str, object], why: str) -> None:
    with pytest.raises(NotSignedError, match=why):
        signer_of(signature, **other)  # type: ignore[arg-type]


def test_no_signature_with_a_changed_byte_counts() -> None:
    parts = [base64.urlsafe_b64decode(part) for part in SIGNED.split(".")]
    for which, part in enumerate(parts):
        for place in range(len(part)):
            changed = [*parts]
            changed[which] = part[:place] + bytes([part[place] ^ 1]) + part[place + 1 :]
            with pytest.raises(NotSignedError):
                signer_of(".".join(base64.urlsafe_b64encode(one).decode() for one in changed))


def test_a_statement_cannot_be_given_another_signature_of_the_key() -> None:
    text = Statement(CONFIG, CODE, TODAY).encode()
    for data in (text, PURPOSE, PURPOSE.strip() + text):
        signature = ".".join(base64.urlsafe_b64encode(part).decode() for part in (text, ADA.sign(data)))
        with pytest.raises(NotSignedError):
            signer_of(signature)


def test_a_key_counts_before_its_day() -> None:
    signer = Signer.read(f'ada valid-before="20270115" {public_line(ADA)}')
    assert signer.before == TODAY
    assert signer_of(SIGNED, [signer], today=datetime.date(2027, 1, 14)) == "ada"
    with pytest.raises(NotSignedError, match="the key of 'ada'"):
        signer_of(SIGNED, [signer])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ada",
        public_line(ADA),
        f'ada valid-before="tomorrow" {public_line(ADA)}',
        f'ada valid-before="20271332" {public_line(ADA)}',
        f"ada cert-authority {public_line(ADA)}",
        "ada ssh-ed25519 AAAA",
        "ada ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQC7",
    ],
)
def test_a_line_that_names_no_signer_is_refused(line: str) -> None:
    with raises(ConfigError, "not-a-signer", "ssh-keygen"):
        Signer.read(line)


def ssh(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def test_a_key_of_openssh_is_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(ssh(ADA))
    assert public_line(read_key(path)) == public_line(ADA)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: ssh(ec.generate_private_key(ec.SECP384R1())), "key-not-usable"),
        (lambda: b"no key", "key-not-usable"),
        (lambda: public_line(ADA).encode(), "key-not-usable"),
        (lambda: None, "no-such-key"),
    ],
)
def test_another_key_is_refused_with_the_command_that_makes_one(
    tmp_path: Path, make: Callable[[], bytes | None], code: str
) -> None:
    path = tmp_path / "key"
    if (content := make()) is not None:
        path.write_bytes(content)
    with raises(DeployError, code, path, "ssh-keygen -t ed25519"):
        read_key(path)


def test_what_is_signed_can_be_read() -> None:
    text = json.loads(base64.urlsafe_b64decode(SIGNED.partition(".")[0]))
    assert text == {"config": CONFIG, "code": CODE, "until": "2027-01-15"}
