"""TLS of the DIMSE door and of our own calls: contexts that follow their files, who stands behind a certificate, faults in words.

The profile is BCP 195: TLS 1.3, and TLS 1.2 with ephemeral keys and authenticated encryption alone; no compression, no renegotiation, no
resumption that would skip a revocation list. Nothing here can switch verification off.

References
----------
DICOM PS3.15 Annex B (BCP 195 RFC 8996, 9325 TLS Secure Transport Connection Profile), RFC 9325 (BCP 195), RFC 5280 (certificates, CRLs)
"""

from __future__ import annotations

import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, NamedTuple

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from dicom_node.errors import PeerUnreachable, StartError
from dicom_node.tls_faults import REASONS, VERIFICATION, handshake_fault

__all__ = [
    "ClientTls",
    "PeerCertificate",
    "ServerTls",
    "certificate_setting",
    "handshake_fault",
    "matches",
    "peer_certificate",
]

log = structlog.get_logger(__name__)

CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL:!eNULL@SECLEVEL=2"
"""Suites of TLS 1.2. Security level 2 of OpenSSL also refuses RSA below 2048 bits and SHA-1 in certificates."""
WARNED_AHEAD: Final = timedelta(days=30)
_WARNED_AGAIN: Final = timedelta(hours=24)
_CONTEXT_USES: Final = 1_000
_CONTEXT_S: Final = 600.0
_PEM_BYTES: Final = 16 * 1024**2
_SUBJECT: Final = 256
_FINGERPRINT: Final = re.compile(r"(?:sha-?256(?:[ _]fingerprint)?[:=])?((?:[0-9a-f]{2}[: ]?){31}[0-9a-f]{2})", re.IGNORECASE)
_ANY_PURPOSE: Final = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE

ClientCertificate = Literal["required", "optional", "none"]
Stamp = tuple[int, int, int] | None


class UnusableFile(Exception):
    """A certificate, key or revocation list cannot be used; the message names the file, the fault and the remedy."""


class ServerTls:
    """TLS of a door: the certificate it shows and whose certificates it asks for.

    The files are looked at again every `watch_s` seconds when a context is asked for. A pair that cannot be used is refused with an
    error in the log, and the one before stays; connections made with that go on as they are. A revocation list that cannot be read,
    or is past its next update, closes the door to every certificate until it is replaced.

    Parameters
    ----------
    certificate, key
        PEM: our certificate with its intermediates, leaf first; its private key, not encrypted.
    authorities
        PEM: who may vouch for callers.
    client
        Whether a caller must, may or need not show a certificate.
    revocations
        PEM: certificate revocation lists, one for each authority of every chain. None: revocation is not checked.
    watch_s
        How often to look at the files, in seconds.

    Raises
    ------
    StartError
        The files cannot be used, or do not fit `client`.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        *,
        authorities: Path | None = None,
        client: ClientCertificate = "required",
        revocations: Path | None = None,
        watch_s: float = 1.0,
    ) -> None:
        self._certificate, self._key, self._authorities, self._revocations, self._client = (
            certificate,
            key,
            authorities,
            revocations,
            client,
        )
        if client != "none" and authorities is None:
            raise StartError("TLS asks callers for certificates, and no authorities are named that may vouch for them; name their file")
        if client == "none" and revocations is not None:
            raise StartError("a revocation list is named, and callers are asked for no certificates; ask for them, or name no list")
        self._started = False
        self._files = _Files((certificate, key, authorities, revocations), self._build, watch_s=watch_s, keep=self._keep)
        self._started = True
        self._calendar = _Calendar()

    def context(self) -> ssl.SSLContext:
        """Return the context for the next handshake: that of the newest usable files."""
        return self._files.current(used=True).context

    def expires_at(self) -> datetime:
        """Return when our certificate ends."""
        return self._files.current().expires_at

    def warnings(self, now: datetime | None = None) -> list[str]:
        """Say what ends within 30 days or has ended, as sentences; each again after 24 hours. To be asked for now and then."""
        return self._calendar.due(self._files.current().ends, now or datetime.now(UTC))

    def ended(self, certificate: PeerCertificate, now: datetime | None = None) -> str:
        """Say why a certificate that was accepted would be no longer: it expired or was revoked since. Empty: it is still good.

        For associations that go on; cheap enough to ask now and then.
        """
        if certificate.not_after <= (now or datetime.now(UTC)):
            return VERIFICATION[10].reason
        for revocations in self._files.current().revocations:
            if revocations.issuer.rfc4514_string() != certificate.issuer:
                continue
            if revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
                return VERIFICATION[23].reason
        return ""

    def _build(self, changed: bool) -> _Secured:
        chain = _certificates(self._certificate)
        _check_own(self._certificate, chain[0], expired=changed)
        if fault := _wrong_purpose(self._certificate, chain[0], ExtendedKeyUsageOID.SERVER_AUTH, "serverAuth"):
            raise UnusableFile(fault)
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        _load_pair(context, self._certificate, self._key)
        ends = [_End(f"our certificate {self._certificate}", chain[0].not_valid_after_utc)]
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        if self._client != "none" and self._authorities is not None:
            context.verify_mode = ssl.CERT_REQUIRED if self._client == "required" else ssl.CERT_OPTIONAL
            ends += _trust(context, self._authorities)
        revocations: list[x509.CertificateRevocationList] = []
        if self._revocations is not None:
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN
            try:
                revocations = _revoke(context, self._revocations)
                ends += [_End(f"the revocation list of {_issuer(each)}", _next_update(each)) for each in revocations]
            except UnusableFile as fault:
                if not self._started:
                    raise
                # The list decides who is let in: without it, nobody. OpenSSL refuses what it finds no list for.
                log.error("tls.revocations_unusable", reason=f"{fault}. Until then no certificate is accepted")  # noqa: TRY400
        return _Secured(context, chain[0].not_valid_after_utc, tuple(ends), tuple(revocations))

    def _keep(self, made: _Secured) -> _Secured:
        """Keep the context before, since the new files cannot be used; but never against a newer revocation list."""
        if self._revocations is not None:
            try:
                return replace(
                    made, revocations=tuple(_revoke(made.context, self._revocations))
                )  # OpenSSL takes the newest list that it holds of an authority
            except UnusableFile as fault:
                log.error("tls.revocations_unusable", reason=f"{fault}. Until then nobody is let in")  # noqa: TRY400
                return replace(made, context=_context(ssl.PROTOCOL_TLS_SERVER))  # without a certificate: every handshake fails
        return made


class ClientTls:
    """TLS of our calls: whom we believe, and the certificate we show. The files are followed as `ServerTls` does.

    Parameters
    ----------
    authorities
        PEM: who may vouch for peers; a peer's own self-signed certificate is its own authority.
    certificate, key
        PEM: ours, for peers that ask for one. None, or not for clients by its Extended Key Usage: we show none.
    watch_s
        How often to look at the files, in seconds.

    Raises
    ------
    StartError
        The files cannot be used.
    """

    def __init__(self, authorities: Path, certificate: Path | None = None, key: Path | None = None, *, watch_s: float = 1.0) -> None:
        if (certificate is None) != (key is None):
            raise StartError("a certificate needs its private key, and a key its certificate; name both files, or none")
        self._authorities, self._certificate, self._key = authorities, certificate, key
        self._files = _Files((authorities, certificate, key), self._build, watch_s=watch_s)
        self._calendar = _Calendar()

    def context(self) -> ssl.SSLContext:
        """Return the context for the next call."""
        return self._files.current(used=True).context

    def expires_at(self) -> datetime | None:
        """Return when the certificate we show ends; None when we show none."""
        return self._files.current().expires_at if self._certificate is not None else None

    def warnings(self, now: datetime | None = None) -> list[str]:
        """As `ServerTls.warnings`."""
        return self._calendar.due(self._files.current().ends, now or datetime.now(UTC))

    def secure(self, connection: socket.socket, *, host: str, certificate: str = "", timeout_s: float = 10.0) -> ssl.SSLSocket:
        """Make the handshake on a connected socket. Returns the TLS socket, non-blocking.

        Parameters
        ----------
        connection
            Connected; closed when the handshake fails.
        host
            The name or address that the peer's certificate must bear.
        certificate
            What else it must be, see `matches`; empty: nothing.
        timeout_s
            Longest time for the whole handshake.

        Raises
        ------
        PeerUnreachable
            The handshake failed: why, and what to do.
        """
        deadline = time.monotonic() + timeout_s
        connection.setblocking(False)
        try:
            secured = self.context().wrap_socket(
                connection, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except (OSError, ValueError) as error:
            connection.close()
            raise PeerUnreachable(f"TLS with {host} cannot begin ({error}); correct the host of its [[peers]] entry") from error
        try:
            _shake_hands(secured, deadline)
        except OSError as error:
            secured.close()
            raise PeerUnreachable(f"TLS with {host}: {handshake_fault(error, calling=True)}") from error
        shown = peer_certificate(secured)
        if certificate and (shown is None or not matches(certificate, shown)):
            secured.close()
            found = "none" if shown is None else shown.fingerprint_sha256
            raise PeerUnreachable(
                f"TLS with {host}: its certificate is not the configured one; "
                f"if it was renewed, set certificate of its [[peers]] entry to {found}"
            )
        return secured

    def _build(self, changed: bool) -> _Secured:
        context = _context(ssl.PROTOCOL_TLS_CLIENT)  # verifies, and compares the host name, from the start
        context.hostname_checks_common_name = False
        ends = _trust(context, self._authorities)
        expires_at = datetime.max.replace(tzinfo=UTC)
        if self._certificate is not None and self._key is not None:
            own = _certificates(self._certificate)[0]
            _check_own(self._certificate, own, expired=changed)
            if fault := _wrong_purpose(self._certificate, own, ExtendedKeyUsageOID.CLIENT_AUTH, "clientAuth"):
                # Public authorities issue no others to servers any more, and many peers ask for none: those can still be called
                log.warning("tls.no_client_certificate", reason=f"{fault}. Until then we show peers none")
            else:
                _load_pair(context, self._certificate, self._key)
            expires_at = own.not_valid_after_utc
            ends.append(_End(f"our certificate {self._certificate}", expires_at))
        return _Secured(context, expires_at, tuple(ends))


def _shake_hands(secured: ssl.SSLSocket, deadline: float) -> None:
    poller = select.poll()
    while True:
        try:
            secured.do_handshake()
        except ssl.SSLWantReadError:
            poller.register(secured, select.POLLIN)
        except ssl.SSLWantWriteError:
            poller.register(secured, select.POLLOUT)
        else:
            return
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError("no end of the TLS handshake in time")


# Who is on the other side


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """A certificate that the other side showed and that was verified."""

    fingerprint_sha256: str
    """64 lower-case hexadecimal digits."""
    subject: str
    """For people: at most 256 characters."""
    names: tuple[str, ...]
    """DNS names and URIs of the Subject Alternative Name, then common names."""
    not_after: datetime
    issuer: str = ""
    """As RFC 4514 writes it."""
    serial_number: int = 0


def peer_certificate(connection: ssl.SSLSocket) -> PeerCertificate | None:
    """Return the certificate that the peer of a finished handshake showed; None when it showed none."""
    encoded = connection.getpeercert(binary_form=True)
    decoded = connection.getpeercert()
    if not encoded or not decoded:
        return None
    digest = hashes.Hash(hashes.SHA256())
    digest.update(encoded)
    subject = [pair for rdn in _pairs(decoded.get("subject")) for pair in _pairs(rdn)]
    alternative = [pair for pair in _pairs(decoded.get("subjectAltName")) if pair[0] in ("DNS", "URI")]
    try:
        parsed = x509.load_der_x509_certificate(encoded)
        issuer, serial_number = parsed.issuer.rfc4514_string(), parsed.serial_number
    except ValueError:  # stricter than OpenSSL, which has verified it
        issuer, serial_number = "", 0
    names = [str(pair[1]) for pair in alternative] + [str(pair[1]) for pair in subject if pair[0] == "commonName"]
    return PeerCertificate(
        fingerprint_sha256=digest.finalize().hex(),
        subject=", ".join(f"{name}={value}" for name, value in subject)[:_SUBJECT],
        names=tuple(dict.fromkeys(names)),
        not_after=datetime.fromtimestamp(ssl.cert_time_to_seconds(str(decoded["notAfter"])), UTC),
        issuer=issuer,
        serial_number=serial_number,
    )


def _pairs(value: object) -> tuple[tuple[str, str], ...]:
    return value if isinstance(value, tuple) else ()


def certificate_setting(value: str) -> str:
    """Return what `matches` compares with, in one spelling: a fingerprint as 64 lower-case digits, a name as it is.

    Raises
    ------
    ValueError
        It can be neither.
    """
    text = value.strip()
    found = _FINGERPRINT.fullmatch(text)
    if found:
        return re.sub(r"[: ]", "", found[1]).lower()
    compact = re.sub(r"[: ]", "", text)
    if (len(compact) >= 32 and re.fullmatch(r"[0-9A-Fa-f]+", compact)) or text.lower().startswith(("sha256", "sha-256", "sha1", "sha-1")):
        raise ValueError("a fingerprint is SHA-256, 64 hexadecimal digits: openssl x509 -noout -fingerprint -sha256 -in certificate.pem")
    if any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError("give the SHA-256 fingerprint of the certificate, or one of its names without spaces")
    return text


def matches(configured: str, certificate: PeerCertificate) -> bool:
    """Whether a certificate is the one that the configuration means.

    Parameters
    ----------
    configured
        SHA-256 fingerprint, with or without colons; or a DNS name, URI or common name of the certificate, without regard to case.
        Empty, or malformed: matches nothing.
    certificate
        A verified one.
    """
    try:
        wanted = certificate_setting(configured)
    except ValueError:
        return False
    if not wanted:
        return False
    return wanted == certificate.fingerprint_sha256 or any(wanted.casefold() == name.casefold() for name in certificate.names)


# Files and what is made of them


class _End(NamedTuple):
    what: str
    when: datetime


@dataclass(frozen=True, slots=True)
class _Secured:
    context: ssl.SSLContext
    expires_at: datetime
    ends: tuple[_End, ...]
    revocations: tuple[x509.CertificateRevocationList, ...] = ()


class _Files:
    """Keeps what was made of files, and makes it anew when they change.

    Also after so many uses and so much time: a context of OpenSSL remembers sessions of TLS 1.2, which Python cannot forbid.
    """

    def __init__(
        self,
        files: Iterable[Path | None],
        build: Callable[[bool], _Secured],
        *,
        watch_s: float,
        keep: Callable[[_Secured], _Secured] = lambda made: made,
    ) -> None:
        self._watched = [path for path in files if path is not None]
        self._build = build
        self._keep = keep
        self._watch_s = watch_s
        self._lock = threading.Lock()
        self._seen = self._taken = self._look()
        try:
            self._made = build(True)
        except UnusableFile as fault:
            raise StartError(str(fault)) from fault
        self._looked_at = self._made_at = time.monotonic()
        self._uses = 0

    def current(self, *, used: bool = False) -> _Secured:
        """Return what the newest usable files make; `used`: for a handshake."""
        with self._lock:
            now = time.monotonic()
            changed = False
            if now - self._looked_at >= self._watch_s:
                self._looked_at = now
                seen = self._look()
                changed, self._seen = seen != self._seen, seen
            self._uses += used
            if changed or self._uses > _CONTEXT_USES or now - self._made_at > _CONTEXT_S:
                self._uses, self._made_at = 0, now
                self._make()
            return self._made

    def _make(self) -> None:
        changed = self._seen != self._taken
        try:
            self._made = self._build(changed)
        except UnusableFile as fault:
            log.error("tls.files_refused", reason=f"{fault}. What was loaded before stays in use")  # noqa: TRY400 - the fault is the file's
            self._made = self._keep(self._made)
            return
        self._taken = self._seen
        if changed:
            log.info("tls.reloaded", expires_at=self._made.expires_at.isoformat())

    def _look(self) -> list[Stamp]:
        return [_stamp(path) for path in self._watched]


class _Calendar:
    """Remembers of which end was warned when."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warned: dict[_End, datetime] = {}

    def due(self, ends: Iterable[_End], now: datetime) -> list[str]:
        """Return a sentence for each end that is near and was not told of within a day."""
        near = [end for end in ends if end.when - now <= WARNED_AHEAD]
        with self._lock:
            due = [end for end in near if end not in self._warned or now - self._warned[end] >= _WARNED_AGAIN]
            self._warned = {end: now if end in due else self._warned[end] for end in near}
        return [_sentence(end, now) for end in due]


def _sentence(end: _End, now: datetime) -> str:
    day = f"{end.when:%Y-%m-%d %H:%M} UTC"
    if end.when <= now:
        return f"{end.what} ended on {day}; replace the file, it is taken up without a restart"
    left = end.when - now
    when = f"in {left.days} days" if left.days > 1 else f"in {int(left.total_seconds() // 3600)} hours"
    return f"{end.what} ends {when}, on {day}; replace the file, it is taken up without a restart"


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # an issuing authority may be named without its root
    return context


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnusableFile(f"{path} cannot be read ({error.strerror}); correct its path or permissions") from error
    if len(data) > _PEM_BYTES:
        raise UnusableFile(f"{path} is larger than certificates or lists are; name the right file")
    return data


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise UnusableFile(f"{path} holds no certificates in PEM form; convert it: openssl x509 -inform DER -in ... -out {path}") from error


def _check_own(path: Path, certificate: x509.Certificate, *, expired: bool) -> None:
    """Refuse a certificate of ours that every peer would refuse, in words; `expired`: also one that has ended."""
    now = datetime.now(UTC)
    if expired and certificate.not_valid_after_utc <= now:
        raise UnusableFile(f"the certificate {path} ended on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; put a new one there")
    if certificate.not_valid_before_utc > now:
        raise UnusableFile(f"the certificate {path} begins on {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; correct the clock")
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < 2048:
        raise UnusableFile(f"the certificate {path} has an RSA key of {key.key_size} bits; peers refuse less than 2048")
    if isinstance(key, ec.EllipticCurvePublicKey) and key.key_size < 224:
        raise UnusableFile(f"the certificate {path} has an elliptic curve of {key.key_size} bits; use P-256 or larger")


def _wrong_purpose(path: Path, certificate: x509.Certificate, purpose: x509.ObjectIdentifier, name: str) -> str:
    """Say that a certificate of ours is not for a use; empty: it is."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return ""
    if purpose in usage or _ANY_PURPOSE in usage:
        return ""
    return f"the certificate {path} is not for this use: its Extended Key Usage lacks {name}; have it issued with that"


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def no_password() -> str:
        raise UnusableFile(f"the key {key} is encrypted; put it there without a password, readable by the node alone")

    _read(key)
    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason == "KEY_VALUES_MISMATCH":
            raise UnusableFile(f"the key {key} is not that of the certificate {certificate}; put both of one pair there") from error
        if reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            raise UnusableFile(f"the certificate {certificate} is too weak: {REASONS[reason].reason}") from error
        raise UnusableFile(f"{certificate} and {key} cannot be loaded ({reason or error}); both must be PEM") from error
    except OSError as error:
        raise UnusableFile(f"{certificate} or {key} cannot be read ({error.strerror}); correct path or permissions") from error


def _trust(context: ssl.SSLContext, path: Path) -> list[_End]:
    authorities = _certificates(path)
    now = datetime.now(UTC)
    if all(authority.not_valid_after_utc <= now for authority in authorities):
        raise UnusableFile(f"every authority in {path} has ended; put the current ones there")
    try:
        context.load_verify_locations(cadata=_read(path).decode("ascii", "ignore"))
    except ssl.SSLError as error:
        raise UnusableFile(f"the authorities in {path} cannot be loaded ({error.reason}); they must be certificates in PEM form") from error
    return [_End(f"authority {_brief(authority)} in {path}", authority.not_valid_after_utc) for authority in authorities]


def _revoke(context: ssl.SSLContext, path: Path) -> list[x509.CertificateRevocationList]:
    blocks = re.findall(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", _read(path), re.DOTALL)
    if not blocks:
        raise UnusableFile(f"{path} holds no revocation list in PEM form; convert it: openssl crl -inform DER -in ... -out {path}")
    try:
        found = [x509.load_pem_x509_crl(block) for block in blocks]
        undated = [_issuer(revocations) for revocations in found if revocations.next_update_utc is None]
    except ValueError as error:
        raise UnusableFile(f"a revocation list in {path} cannot be read; fetch it anew from its authority") from error
    if undated:
        raise UnusableFile(f"the revocation list of {undated[0]} in {path} has no next update; whether it is current cannot be told")
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError) as error:
        raise UnusableFile(f"the revocation lists in {path} cannot be loaded; fetch them anew from their authorities") from error
    return found


def _issuer(revocations: x509.CertificateRevocationList) -> str:
    return revocations.issuer.rfc4514_string()[:_SUBJECT]


def _next_update(revocations: x509.CertificateRevocationList) -> datetime:
    return revocations.next_update_utc or datetime.min.replace(tzinfo=UTC)


def _brief(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()[:_SUBJECT]
