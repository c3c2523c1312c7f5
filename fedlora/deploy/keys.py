"""A federation's keys: its own certificate authority, server certificates, node keys and shared secrets.

All keys are ECDSA on NIST's P-384, a curve that Flower takes for its nodes.
"""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 3650
"""How long authority and certificates are valid: a federation that lasts longer makes new ones."""


@dataclass(frozen=True)
class Pair:
    """A key in PEM, and its certificate or public half.

    Args:
        private: secret.
        public: a certificate in PEM, or a public key in OpenSSH's format.
    """

    private: bytes
    public: bytes


def make_authority(name: str) -> Pair:
    """A certificate authority that signs for this federation alone, and cannot make further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    builder = _builder(subject, subject, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    return Pair(_pem(key), builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def make_server(authority: Pair, name: str, hosts: Sequence[str]) -> Pair:
    """A key and a certificate for a TLS server.

    Args:
        authority: that signs.
        name: of the server, for people.
        hosts: names and addresses under which it is reached; the only ones for which clients take it.
    """
    issuer = x509.load_pem_x509_certificate(authority.public)
    signer = serialization.load_pem_private_key(authority.private, password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise TypeError("the authority's key is no ECDSA key")
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_name(name), issuer.subject, key.public_key())
    builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
    )
    return Pair(_pem(key), builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def make_node_key(comment: str) -> Pair:
    """A node's key as `ssh-keygen -t ecdsa -b 384` makes it; the public half carries a comment."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return Pair(private, public + b" " + comment.encode() + b"\n")


def make_secret() -> bytes:
    """What a SuperExec shows to the SuperLink or SuperNode beside it: 32 random bytes as text, without a newline."""
    return secrets.token_hex(32).encode()


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    # An hour back, for machines whose clocks are a little slow.
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
