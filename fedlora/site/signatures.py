"""Signatures of runs: somebody whom a site trusts says that this config may run, on this fedlora, until a day.

What is signed is a statement: the config's hash (`fedlora.site.approvals.config_hash`), a digest of fedlora's own
source (an app carries no code; every machine runs the fedlora that it has installed), and a last day. The signature is
Ed25519, as `ssh-keygen -t ed25519` makes keys, and travels in the run config. It can be used again until that day:
it says what may run, not how often.

A site names whom it trusts as lines of OpenSSH's allowed_signers:
`ada@hub valid-before="20270131" ssh-ed25519 AAAA...`.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedlora.errors import ConfigError, DeployError

PURPOSE = b"a fedlora run\n"
"""Comes before a statement when it is signed, so that no other signature of the key is one of a run."""
MAX_SIGNATURE = 2_000
"""Characters."""
_LINE = re.compile(r'(\S+) +(?:valid-before="?(\d{8})"? +)?(ssh-ed25519 [A-Za-z0-9+/=]+)(?: .*)?')


class NotSignedError(ValueError):
    """A run has no signature that counts; the text says why."""


@dataclass(frozen=True)
class Statement:
    """What is signed.

    Args:
        config: Hash of the config.
        code: Digest of fedlora's source.
        until: Last day.
    """

    config: str
    code: str
    until: datetime.date

    def encode(self) -> bytes:
        """The bytes that are signed, but for `PURPOSE`."""
        facts = {"config": self.config, "code": self.code, "until": self.until.isoformat()}
        return json.dumps(facts, sort_keys=True).encode()


@dataclass(frozen=True)
class Signer:
    """Whom a site trusts.

    Args:
        name: For people.
        key: Public.
        before: First day on which the key is no longer trusted; None: it always is.
    """

    name: str
    key: Ed25519PublicKey
    before: datetime.date | None = None

    @classmethod
    def read(cls, line: str) -> Signer:
        """Of a line of allowed_signers, with no option but valid-before="YYYYMMDD".

        Raises:
            ConfigError: it is none.
        """
        found = _LINE.fullmatch(line.strip())
        try:
            if found is None:
                raise ValueError
            key = load_ssh_public_key(found[3].encode())
            before = None if found[2] is None else datetime.datetime.strptime(found[2], "%Y%m%d").date()
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigError(
                f'signer {line[:80]!r} is no line NAME [valid-before="YYYYMMDD"] ssh-ed25519 KEY: take the key from '
                "the file that ssh-keygen -t ed25519 wrote with the ending .pub",
                code="not-a-signer",
            ) from None
        assert isinstance(key, Ed25519PublicKey)
        return cls(found[1], key, before)


def sign(statement: Statement, key: Ed25519PrivateKey) -> str:
    """The signature, as text for a run config."""
    text = statement.encode()
    return ".".join(base64.urlsafe_b64encode(part).decode() for part in (text, key.sign(PURPOSE + text)))


def require_signed(signers: Sequence[Signer], signature: str, config: str, code: str, today: datetime.date) -> Signer:
    """Who signed a run.

    Args:
        signers: Whom the site trusts.
        signature: As it came with the run.
        config: Hash of the run's config.
        code: Digest of the source of the fedlora that is to run it.
        today: In UTC.

    Raises:
        NotSignedError: the signature is missing or damaged, of another key, config or fedlora, or of the past.
    """
    if not signature:
        raise NotSignedError("the run is not signed: fedlora deploy sign does it")
    text, signed = _decoded(signature)
    signer = next((one for one in signers if _made(one.key, signed, PURPOSE + text)), None)
    if signer is None:
        raise NotSignedError("the signature is by none of the signers, or was changed")
    if signer.before is not None and today >= signer.before:
        raise NotSignedError(f"the key of {signer.name!r} is valid before {signer.before} only")
    said = json.loads(text)
    if said["config"] != config:
        raise NotSignedError(f"{signer.name!r} signed another config ({said['config']}) than this one ({config})")
    if said["code"] != code:
        raise NotSignedError(f"{signer.name!r} signed for another fedlora (source {said['code']}) than this ({code})")
    if today > datetime.date.fromisoformat(said["until"]):
        raise NotSignedError(f"the signature of {signer.name!r} is valid until {said['until']}")
    return signer


def _decoded(signature: str) -> tuple[bytes, bytes]:
    parts = signature[:MAX_SIGNATURE].split(".")
    try:
        text, signed = (base64.b64decode(part, b"-_", validate=True) for part in parts)
    except (ValueError, binascii.Error):
        raise NotSignedError("what came as a signature is none") from None
    return text, signed


def _made(key: Ed25519PublicKey, signed: bytes, data: bytes) -> bool:
    try:
        key.verify(signed, data)
    except InvalidSignature:
        return False
    return True


def read_key(path: Path) -> Ed25519PrivateKey:
    """A private key as `ssh-keygen -t ed25519` writes it.

    Raises:
        DeployError: there is none, it is of another kind, or it has a passphrase.
    """
    cure = f"make one: ssh-keygen -t ed25519 -N '' -f {path}"
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise DeployError(f"{str(path)!r} cannot be read ({error.strerror}): {cure}", code="no-such-key") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DeployError(
            f"{str(path)!r} is no OpenSSH private key without a passphrase ({error}): {cure}", code="key-not-usable"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DeployError(f"{str(path)!r} is no Ed25519 key: {cure}", code="key-not-usable")
    return key


def public_line(key: Ed25519PrivateKey) -> str:
    """The public half, as in a line of allowed_signers."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
