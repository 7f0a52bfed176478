"""A root of our own, a certificate for the SuperLink, a key for each node. `cryptography` comes with Flower."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm_sec.errors import FedError, reason

ANEW = "Copy it again, or remove the folder tls to have all made anew: devices then need the new ca.pem."
DAYS = 365  # that root and certificate are valid


def make_certificates(folder: Path, hosts: Sequence[str] = ()) -> None:
    """ca.pem, ca.key, server.pem and server.key; the certificate names localhost, 127.0.0.1 and `hosts`.

    What is there is kept, so that devices which have the root stay able to connect; the certificate is made anew where
    it does not name every host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    names = list(dict.fromkeys(["localhost", "127.0.0.1", *hosts]))
    if not (folder / "ca.pem").exists():
        key = ec.generate_private_key(ec.SECP384R1())
        name = _named("fedllm_sec deployment root")
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        made = (
            _begun(name, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(folder / "ca.key", _pem(key), 0o600)
        _write(folder / "ca.pem", made.public_bytes(serialization.Encoding.PEM), 0o644)
    if (folder / "server.pem").exists() and set(names) <= set(named_in(folder / "server.pem")):
        return
    root = certificate(folder / "ca.pem")
    signer = _signer(folder / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    made = (
        _begun(_named("superlink"), root.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write(folder / "server.key", _pem(key), 0o600)
    _write(folder / "server.pem", made.public_bytes(serialization.Encoding.PEM), 0o644)


def named_in(path: Path) -> list[str]:
    """The hosts that a certificate is for; none where it has expired."""
    found = certificate(path)
    if found.not_valid_after_utc <= datetime.datetime.now(datetime.timezone.utc):
        return []
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def certificate(path: Path) -> x509.Certificate:
    """The certificate that a file holds, or an error that names the file."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FedError(f"{path}: is no certificate that can be read ({reason(error)}). {ANEW}") from error


def _signer(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise FedError(f"{path}: is no key that can be read ({reason(error)}). {ANEW}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FedError(f"{path}: is a key of another kind than ECDSA. {ANEW}")
    return key


def make_key(folder: Path, client: str) -> Path:
    """A node's private key, made where there is none, with its public half beside it; gives the private one's path."""
    private, public = folder / f"{client}.key", folder / f"{client}.pub"
    if not private.exists():
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP384R1())
        _write(
            private,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            ),
            0o600,
        )
        openssh = serialization.PublicFormat.OpenSSH
        _write(public, key.public_key().public_bytes(serialization.Encoding.OpenSSH, openssh) + b"\n", 0o644)
    return private


def _begun(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _named(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """A file that nobody else can read in between."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
