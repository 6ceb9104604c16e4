"""A certificate authority of the tests' own: good certificates, and every kind of bad one."""

from __future__ import annotations

import datetime as dt
import ipaddress
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)
CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)
LOCAL = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key in files."""

    certificate: Path
    key: Path
    x509: x509.Certificate

    @property
    def fingerprint(self) -> str:
        """SHA-256, 64 hexadecimal digits."""
        return self.x509.fingerprint(hashes.SHA256()).hex()

    def copy_to(self, certificate: Path, key: Path) -> None:
        """Put it where another was, key first; each file is replaced whole."""
        for source, target in ((self.key, key), (self.certificate, certificate)):
            new = target.with_suffix(".new")
            new.write_bytes(source.read_bytes())
            new.replace(target)


class Authority:
    """An authority, its own certificate in ``<folder>/<name>.pem``; `parent` makes it an intermediate one."""

    def __init__(self, folder: Path, name: str = "authority", *, parent: Authority | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.parent = folder, name, parent
        self.key: Key = ec.generate_private_key(ec.SECP256R1())
        self.subject = _subject(name)
        signer = parent or self
        self.x509 = (
            _builder(self.subject, signer.subject, self.key, signer.key, -1.0, 365.0)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .sign(signer.key, hashes.SHA256())
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(_pem(self.x509))

    def issue(
        self,
        name: str,
        *,
        purposes: Sequence[x509.ObjectIdentifier] | None = BOTH,
        hosts: Iterable[str] = LOCAL,
        uris: Iterable[str] = (),
        begins_days: float = -1.0,
        ends_days: float = 90.0,
        rsa_bits: int = 0,
        digest: hashes.HashAlgorithm | None = None,
        self_signed: bool = False,
        chain: bool = True,
    ) -> Pair:
        """Issue a certificate; the defaults make a good one for both directions on this machine."""
        key: Key = (
            rsa.generate_private_key(public_exponent=65537, key_size=rsa_bits) if rsa_bits else ec.generate_private_key(ec.SECP256R1())
        )
        subject = _subject(name)
        issuer, signer = (subject, key) if self_signed else (self.subject, self.key)
        alternative: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        for host in hosts:
            try:
                alternative.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                alternative.append(x509.DNSName(host))
        builder = _builder(subject, issuer, key, signer, begins_days, ends_days).add_extension(_usage(authority=False), critical=True)
        if alternative:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        if purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        certificate = builder.sign(signer, digest or hashes.SHA256())  # type: ignore[arg-type]
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key", certificate)
        pair.certificate.write_bytes(_pem(certificate) + (_pem(self.x509) if self.parent is not None and chain else b""))
        pair.key.write_bytes(_key_pem(key))
        return pair

    def revoke(self, *pairs: Pair, path: Path | None = None, ends_days: float = 7.0) -> Path:
        """Write a revocation list."""
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.subject)
        # a list without dates of its own order is not the newest: each one begins later than any before
        builder = builder.last_update(now - dt.timedelta(days=14) + dt.timedelta(seconds=len(pairs)))
        builder = builder.next_update(now + dt.timedelta(days=ends_days))
        for pair in pairs:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(pair.x509.serial_number).revocation_date(now - dt.timedelta(days=1)).build()
            )
        path = path or self.folder / f"{self.name}.crl"
        new = path.with_suffix(".new")
        new.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        new.replace(path)
        return path


def weak_signature(folder: Path, authority: Authority, name: str) -> Pair:
    """A certificate signed with SHA-1, which `cryptography` no longer makes; OpenSSL's command does."""
    good = authority.issue(name)
    request, signer, out = folder / f"{name}.csr", folder / f"{name}-signer.key", folder / f"{name}-sha1.crt"
    signer.write_bytes(_key_pem(authority.key))
    subprocess.run(["openssl", "req", "-new", "-key", good.key, "-subj", f"/CN={name}", "-out", request], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "x509", "-req", "-in", request, "-CA", authority.file, "-CAkey", signer, "-sha1", "-days", "30", "-out", out],
        check=True,
        capture_output=True,
    )
    return Pair(out, good.key, x509.load_pem_x509_certificate(out.read_bytes()))


def encrypted_key(pair: Pair) -> Path:
    """The same key under a password."""
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    path = pair.key.with_suffix(".encrypted")
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret"))
    )
    return path


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, signer: Key, begins_days: float, ends_days: float) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + dt.timedelta(days=begins_days))
        .not_valid_after(now + dt.timedelta(days=ends_days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: Key) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
