"""TLS contexts: the profile, who is let in, files that change, faults in words."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from dicom_node import security
from dicom_node.errors import PeerUnreachable, StartError
from dicom_node.security import ClientTls, PeerCertificate, ServerTls, certificate_setting, matches, peer_certificate
from dicom_node.tls_faults import handshake_fault
from tests.certificates import CLIENT, SERVER, Authority, Pair, encrypted_key, weak_signature


@dataclass
class Hospital:
    """An authority, a server's pair and a client's pair."""

    folder: Path
    authority: Authority
    server: Pair
    client: Pair

    def server_tls(self, **settings: object) -> ServerTls:
        """TLS of a door, files looked at on every context."""
        arguments: dict[str, object] = {"authorities": self.authority.file, "watch_s": 0.0}
        arguments.update(settings)
        return ServerTls(self.server.certificate, self.server.key, **arguments)  # type: ignore[arg-type]

    def client_tls(self, pair: Pair | None = None) -> ClientTls:
        """TLS of a caller; with the good certificate unless another is given."""
        pair = pair or self.client
        return ClientTls(self.authority.file, pair.certificate, pair.key, watch_s=0.0)


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    """Good certificates."""
    authority = Authority(tmp_path)
    return Hospital(tmp_path, authority, authority.issue("door"), authority.issue("scanner", purposes=CLIENT, uris=["urn:scanner:1"]))


@dataclass
class Outcome:
    """How a handshake went: what the server saw, and what either side raised."""

    certificate: PeerCertificate | None = None
    version: str | None = None
    server_error: OSError | None = None
    client_error: OSError | None = None
    session_reused: bool = False


def free_context(pair: Pair | None = None, *, ciphers: str = "ALL:@SECLEVEL=0", newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A caller that heeds no rule at all, as a hostile or ancient one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers(ciphers)
    if newest is not None:
        context.maximum_version = newest
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname(), timeout=20)
        accepted, _ = listener.accept()
    accepted.settimeout(20)
    return accepted, caller


def meet(server: ssl.SSLContext, call: Callable[[socket.socket], ssl.SSLSocket | None]) -> Outcome:
    """Let a caller meet a door, each in a thread; a byte goes both ways when the handshake succeeds."""
    accepted, caller = connected()
    outcome = Outcome()

    def serve() -> None:
        try:
            with server.wrap_socket(accepted, server_side=True) as secured:
                outcome.certificate, outcome.version = peer_certificate(secured), secured.version()
                outcome.session_reused = bool(secured.session_reused)
                secured.sendall(b"!")
                secured.recv(1)
        except OSError as error:
            outcome.server_error = error
        finally:
            accepted.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        secured = call(caller)
        if secured is not None:
            with secured:
                secured.settimeout(20)
                assert secured.recv(1) in (b"!", b"")
                secured.sendall(b"?")
    except OSError as error:
        outcome.client_error = error
    finally:
        caller.close()
        thread.join()
    return outcome


def by(context: ssl.SSLContext) -> Callable[[socket.socket], ssl.SSLSocket]:
    """Call with a context."""
    return lambda connection: context.wrap_socket(connection, server_hostname="localhost")


# Who is let in


def test_mutual_tls_by_default(hospital: Hospital) -> None:
    """Both sides show certificates, TLS 1.3 is spoken, and the door knows who called."""
    client = hospital.client_tls()
    outcome = meet(hospital.server_tls().context(), lambda connection: client.secure(connection, host="localhost"))
    assert outcome.server_error is None
    assert outcome.client_error is None
    assert outcome.version == "TLSv1.3"
    assert outcome.certificate is not None
    assert outcome.certificate.fingerprint_sha256 == hospital.client.fingerprint
    assert outcome.certificate.names == ("urn:scanner:1", "localhost", "scanner")
    assert "commonName=scanner" in outcome.certificate.subject
    assert outcome.certificate.not_after == hospital.client.x509.not_valid_after_utc


def bad_callers(folder: Path, authority: Authority) -> dict[str, tuple[Pair | None, str]]:
    """Every kind of caller that must not come in, with a word of why."""
    stranger = Authority(folder / "stranger", "stranger")
    return {
        "no certificate": (None, "showed no certificate"),
        "self-signed": (authority.issue("self", self_signed=True), "self-signed"),
        "unknown authority": (stranger.issue("other"), "authority we do not know"),
        "expired": (authority.issue("expired", begins_days=-9, ends_days=-1), "expired"),
        "not yet valid": (authority.issue("early", begins_days=1, ends_days=9), "not valid yet"),
        "wrong purpose": (authority.issue("purpose", purposes=SERVER), "Extended Key Usage"),
        "short RSA key": (authority.issue("short", rsa_bits=1024), "too short"),
        "SHA-1": (weak_signature(folder, authority, "sha1"), "SHA-1"),
    }


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_bad_certificates_are_refused(hospital: Hospital, newest: ssl.TLSVersion) -> None:
    """No, self-signed, foreign, expired, early, wrong purpose, RSA 1024, SHA-1: the handshake is refused, and words say why (row 84)."""
    server = hospital.server_tls()
    for kind, (pair, word) in bad_callers(hospital.folder, hospital.authority).items():
        outcome = meet(server.context(), by(free_context(pair, newest=newest)))
        assert outcome.server_error is not None, kind
        reason, remedy = handshake_fault(outcome.server_error)
        assert word in reason, (kind, reason, outcome.server_error)
        assert remedy
        assert outcome.certificate is None


def test_revoked_certificate_is_refused(hospital: Hospital) -> None:
    """A certificate on the revocation list is refused, others of the authority are let in; a new list counts at once (row 84, 81)."""
    other = hospital.authority.issue("other", purposes=CLIENT)
    revocations = hospital.authority.revoke(other)
    server = hospital.server_tls(revocations=revocations)
    assert meet(server.context(), by(free_context(hospital.client))).server_error is None
    outcome = meet(server.context(), by(free_context(other)))
    assert outcome.server_error is not None
    assert "revoked" in handshake_fault(outcome.server_error).reason
    hospital.authority.revoke(other, hospital.client, path=revocations)
    assert meet(server.context(), by(free_context(hospital.client))).server_error is not None


def test_end_of_a_certificate_that_is_in_use(hospital: Hospital) -> None:
    """Of a caller that was let in, the door can tell later that its certificate expired or was revoked (row 81)."""
    other = hospital.authority.issue("other")
    revocations = hospital.authority.revoke(other)
    server = hospital.server_tls(revocations=revocations)
    certificate = meet(server.context(), by(free_context(hospital.client))).certificate
    assert certificate is not None
    assert server.ended(certificate) == ""
    assert "expired" in server.ended(certificate, datetime.now(UTC) + timedelta(days=91))
    hospital.authority.revoke(other, hospital.client, path=revocations)
    assert "revoked" in server.ended(certificate)
    hospital.server.key.write_text("no key")
    hospital.authority.revoke(hospital.client, path=revocations)
    assert "revoked" in server.ended(certificate)
    foreign = Authority(hospital.folder / "foreign", "foreign")
    foreign.revoke(hospital.client, path=revocations)
    assert server.ended(certificate) == ""


@pytest.mark.parametrize("damage", ["stale", "gone", "garbage", "half", "foreign"])
def test_bad_revocation_list_closes_the_door(hospital: Hospital, damage: str) -> None:
    """A list that is stale, gone, broken or of another authority lets nobody in, and a good one opens again (fault 44)."""
    revocations = hospital.authority.revoke()
    server = hospital.server_tls(revocations=revocations)
    assert meet(server.context(), by(free_context(hospital.client))).server_error is None
    good = revocations.read_bytes()
    if damage == "stale":
        hospital.authority.revoke(path=revocations, ends_days=-1)
    elif damage == "gone":
        revocations.unlink()
    elif damage == "garbage":
        revocations.write_bytes(b"no list at all")
    elif damage == "half":
        revocations.write_bytes(good[: len(good) // 2])
    else:
        Authority(hospital.folder / "foreign", "foreign").revoke(path=revocations)
    outcome = meet(server.context(), by(free_context(hospital.client)))
    assert outcome.server_error is not None
    assert "revocation list" in handshake_fault(outcome.server_error).reason
    hospital.authority.revoke(path=revocations)
    assert meet(server.context(), by(free_context(hospital.client))).server_error is None


def test_new_revocations_count_although_the_new_pair_is_bad(hospital: Hospital) -> None:
    """A pair that is refused does not keep a newer revocation list from its work."""
    revocations = hospital.authority.revoke()
    server = hospital.server_tls(revocations=revocations)
    assert meet(server.context(), by(free_context(hospital.client))).server_error is None
    hospital.server.key.write_text("no key")
    hospital.authority.revoke(hospital.client, path=revocations)
    outcome = meet(server.context(), by(free_context(hospital.client)))
    assert outcome.server_error is not None
    assert "revoked" in handshake_fault(outcome.server_error).reason
    revocations.unlink()
    assert meet(server.context(), by(free_context(hospital.authority.issue("another")))).server_error is not None


def test_client_certificates_by_setting(hospital: Hospital) -> None:
    """Optional: no certificate is let in, a bad one is not. None: nobody is asked."""
    optional = hospital.server_tls(client="optional")
    assert meet(optional.context(), by(free_context())).server_error is None
    assert meet(optional.context(), by(free_context(hospital.client))).certificate is not None
    stranger = Authority(hospital.folder / "s", "s").issue("x")
    assert meet(optional.context(), by(free_context(stranger))).server_error is not None
    nobody = hospital.server_tls(client="none", authorities=None)
    outcome = meet(nobody.context(), by(free_context(stranger)))
    assert outcome.server_error is None
    assert outcome.certificate is None


def test_intermediate_authorities(tmp_path: Path) -> None:
    """A chain through an intermediate works with the root's file, and the intermediate alone may be named."""
    root = Authority(tmp_path, "root")
    middle = Authority(tmp_path, "middle", parent=root)
    door, caller = middle.issue("door"), middle.issue("caller")
    for file in (root.file, middle.file):
        server = ServerTls(door.certificate, door.key, authorities=file)
        client = ClientTls(file, caller.certificate, caller.key)
        outcome = meet(server.context(), lambda connection, client=client: client.secure(connection, host="127.0.0.1"))  # type: ignore[misc]
        assert (outcome.server_error, outcome.client_error) == (None, None)
    bare = middle.issue("bare", chain=False)
    outcome = meet(ServerTls(door.certificate, door.key, authorities=root.file).context(), by(free_context(bare)))
    assert outcome.server_error is not None


# The profile

WEAK = {
    "TLS 1.0": ["-tls1"],
    "TLS 1.1": ["-tls1_1"],
    "CBC": ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256:ECDHE-RSA-AES128-SHA256:AES128-SHA:@SECLEVEL=0"],
    "no forward secrecy": ["-tls1_2", "-cipher", "AES128-GCM-SHA256:AES256-GCM-SHA384:@SECLEVEL=0"],
    "finite field": ["-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256:@SECLEVEL=0"],
    "anonymous": ["-tls1_2", "-cipher", "aNULL:@SECLEVEL=0"],
    "no encryption": ["-tls1_2", "-cipher", "eNULL:@SECLEVEL=0"],
}


@contextmanager
def listening(server: ServerTls) -> Iterator[tuple[int, list[OSError | str]]]:
    """A door that makes handshakes and echoes; what came of each."""
    listener = socket.create_server(("127.0.0.1", 0))
    results: list[OSError | str] = []

    def serve(connection: socket.socket) -> None:
        connection.settimeout(20)
        try:
            with server.context().wrap_socket(connection, server_side=True) as secured:
                results.append(str(secured.cipher()))
                while data := secured.recv(1024):
                    secured.sendall(data)
        except OSError as error:
            results.append(error)
        finally:
            connection.close()

    def accept() -> None:
        with ThreadPoolExecutor(4) as pool:
            while True:
                try:
                    pool.submit(serve, listener.accept()[0])
                except OSError:
                    return

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1], results
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def s_client(port: int, *arguments: object, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Call with OpenSSL's own client."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.fail("openssl is missing; install it (apt install openssl)")
    command = [openssl, "s_client", "-connect", f"127.0.0.1:{port}", *map(str, arguments)]
    return subprocess.run(command, input=said, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("kind", list(WEAK))
def test_weak_protocols_and_suites_are_refused(hospital: Hospital, kind: str) -> None:
    """TLS 1.0 and 1.1, CBC, no forward secrecy, anonymous and NULL suites find nothing in common (row 85)."""
    with listening(hospital.server_tls()) as (port, results):
        done = s_client(port, "-cert", hospital.client.certificate, "-key", hospital.client.key, *WEAK[kind])
        assert done.returncode != 0
    assert all(isinstance(result, OSError) for result in results)
    for result in results:
        assert isinstance(result, OSError)
        assert handshake_fault(result).reason in {"it speaks only TLS 1.1 or older", "no cipher suite in common"} or "closed" in str(
            handshake_fault(result)
        )


def test_no_compression_no_renegotiation_no_tickets(hospital: Hospital) -> None:
    """A good client of TLS 1.2 gets an AEAD suite, no compression and no ticket; its renegotiation is refused (row 85)."""
    pair = ["-cert", hospital.client.certificate, "-key", hospital.client.key]
    with listening(hospital.server_tls()) as (port, results):
        done = s_client(port, *pair, "-tls1_2", "-comp", "-legacy_server_connect", said=b"hello")
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *map(str, pair), "-tls1_2"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stderr is not None
            process.stdin.write(b"R\n")  # its command for renegotiation, as long as its input stays open
            process.stdin.flush()
            refusal = process.stderr.read().decode()
    output = done.stdout.decode()
    assert "Compression: NONE" in output
    assert "TLS session ticket:" not in output
    assert "no renegotiation" in refusal
    assert isinstance(results[0], str)
    assert "GCM" in results[0] or "CHACHA20" in results[0]


def test_only_suites_of_the_profile() -> None:
    """Every suite offered has ephemeral keys and authenticated encryption."""
    names = [suite["name"] for suite in security._context(ssl.PROTOCOL_TLS_SERVER).get_ciphers()]
    assert names
    for name in names:
        assert name.startswith(("TLS_AES", "TLS_CHACHA20", "ECDHE-")), name
        assert "GCM" in name or "CHACHA20" in name, name


def test_no_session_outlives_a_revocation(hospital: Hospital) -> None:
    """A session of TLS 1.2 cannot be resumed once the revocation list has changed; TLS 1.3 gives none (row 81)."""
    revocations = hospital.authority.revoke()
    server = hospital.server_tls(revocations=revocations)
    context = free_context(hospital.client, newest=ssl.TLSVersion.TLSv1_2)
    sessions: list[ssl.SSLSession | None] = []

    def resume(connection: socket.socket) -> ssl.SSLSocket:
        secured = context.wrap_socket(connection, server_hostname="localhost", session=sessions[-1] if sessions else None)
        sessions.append(secured.session)
        return secured

    assert meet(server.context(), resume).server_error is None
    hospital.authority.revoke(hospital.client, path=revocations)
    outcome = meet(server.context(), resume)
    assert not outcome.session_reused
    assert outcome.server_error is not None
    with listening(hospital.server_tls()) as (port, _), socket.create_connection(("127.0.0.1", port)) as connection:
        secured = free_context(hospital.client).wrap_socket(connection, server_hostname="localhost")
        secured.sendall(b"x")
        assert secured.recv(1) == b"x"  # tickets of TLS 1.3 come with the first data
        assert secured.version() == "TLSv1.3"
        assert secured.session is None or not secured.session.has_ticket
        secured.close()


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (b"\x01\x00\x00\x00\x00\xcd\x00\x01\x00\x00DERM_NODE       SCANNER         ", "no TLS"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
        (b"\x00" * 64, "no TLS"),
        (b"\x16\x03\x01", "closed"),
        (b"", "closed"),
    ],
    ids=["DICOM", "HTTP", "zeros", "half", "nothing"],
)
def test_what_is_no_tls(hospital: Hospital, said: bytes, word: str) -> None:
    """Plain DICOM, HTTP, garbage and silence on the TLS port are refused, and words say what came (row 85)."""

    def call(connection: socket.socket) -> None:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(20)
        while connection.recv(100):
            pass

    outcome = meet(hospital.server_tls().context(), call)
    assert outcome.server_error is not None
    assert word in handshake_fault(outcome.server_error).reason, outcome.server_error


# Files that change


def test_new_pair_is_taken_up(hospital: Hospital) -> None:
    """The next handshake shows the new certificate; a connection made with the old one goes on."""
    server = hospital.server_tls()
    accepted, caller = connected()
    before = server.context()
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(before.wrap_socket, accepted, server_side=True)
        old = hospital.client_tls().context().wrap_socket(caller, server_hostname="localhost")
        serving_socket = serving.result()
    renewed = hospital.authority.issue("renewed", ends_days=200)
    renewed.copy_to(hospital.server.certificate, hospital.server.key)
    shown: list[bytes | None] = []

    def call(connection: socket.socket) -> ssl.SSLSocket:
        secured = hospital.client_tls().secure(connection, host="localhost", certificate=renewed.fingerprint)
        shown.append(secured.getpeercert(binary_form=True))
        return secured

    with capture_logs() as logs:
        outcome = meet(server.context(), call)
    assert (outcome.server_error, outcome.client_error) == (None, None)
    assert [entry["event"] for entry in logs] == ["tls.reloaded"]
    assert server.expires_at() == renewed.x509.not_valid_after_utc
    old.sendall(b"still here")
    assert serving_socket.recv(100) == b"still here"
    old.close()
    serving_socket.close()


def spoil(hospital: Hospital, kind: str) -> None:
    """Put something in place of the server's pair that cannot be used."""
    certificate, key = hospital.server.certificate, hospital.server.key
    if kind == "gone":
        certificate.unlink()
    elif kind == "garbage":
        certificate.write_text("garbage")
    elif kind == "other key":
        key.write_bytes(hospital.client.key.read_bytes())
    elif kind == "encrypted key":
        key.write_bytes(encrypted_key(hospital.server).read_bytes())
    elif kind == "expired":
        hospital.authority.issue("late", ends_days=-0.1).copy_to(certificate, key)
    elif kind == "early":
        hospital.authority.issue("soon", begins_days=1).copy_to(certificate, key)
    elif kind == "short":
        hospital.authority.issue("short", rsa_bits=1024).copy_to(certificate, key)
    elif kind == "purpose":
        hospital.authority.issue("use", purposes=CLIENT).copy_to(certificate, key)
    elif kind == "no authorities":
        hospital.authority.file.write_text("")
    elif kind == "past authorities":
        old = Authority(hospital.folder / "old").issue("old", ends_days=-0.5)
        hospital.authority.file.write_bytes(old.certificate.read_bytes())


BAD_FILES = {
    "gone": "cannot be read",
    "garbage": "PEM",
    "other key": "not that of the certificate",
    "encrypted key": "encrypted",
    "expired": "ended on",
    "early": "begins on",
    "short": "1024 bits",
    "purpose": "serverAuth",
    "no authorities": "PEM",
    "past authorities": "has ended",
}


@pytest.mark.parametrize("kind", list(BAD_FILES))
def test_bad_new_files_are_refused_and_the_old_kept(hospital: Hospital, kind: str) -> None:
    """A pair that cannot be used is an error in the log, handshakes go on with the one before; at a start it is a sentence."""
    server = hospital.server_tls()
    good = hospital.server.certificate.read_bytes(), hospital.server.key.read_bytes(), hospital.authority.file.read_bytes()
    spoil(hospital, kind)
    with capture_logs() as logs:
        outcome = meet(server.context(), by(free_context(hospital.client)))
        meet(server.context(), by(free_context(hospital.client)))
    assert outcome.server_error is None
    assert [entry["log_level"] for entry in logs if entry["event"] == "tls.files_refused"] == ["error"], logs
    assert BAD_FILES[kind] in logs[0]["reason"]
    with pytest.raises(StartError, match=BAD_FILES[kind]):
        hospital.server_tls()
    for path, data in zip((hospital.server.certificate, hospital.server.key, hospital.authority.file), good, strict=True):
        path.write_bytes(data)
    with capture_logs():
        assert meet(server.context(), by(free_context(hospital.client))).server_error is None


def test_refused_files_stay_refused_when_the_context_is_renewed(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context is made anew after many handshakes; an expired pair that was refused before is refused then too."""
    monkeypatch.setattr(security, "_CONTEXT_USES", 2)
    server = hospital.server_tls()
    spoil(hospital, "expired")
    contexts = []
    with capture_logs() as logs:
        for _ in range(10):
            contexts.append(server.context())
    assert len(set(contexts)) == 1
    assert {entry["event"] for entry in logs} == {"tls.files_refused"}
    hospital.authority.issue("fresh").copy_to(hospital.server.certificate, hospital.server.key)
    assert server.context() is not contexts[0]
    assert len({id(context) for context in [server.context() for _ in range(10)]}) >= 3


def test_settings_that_do_not_fit_are_sentences(hospital: Hospital) -> None:
    """Asking for certificates without authorities, lists without asking, a certificate without its key: the start is refused."""
    with pytest.raises(StartError, match="no authorities are named"):
        hospital.server_tls(authorities=None)
    with pytest.raises(StartError, match="revocation list"):
        hospital.server_tls(client="none", revocations=hospital.authority.revoke())
    with pytest.raises(StartError, match="private key"):
        ClientTls(hospital.authority.file, hospital.client.certificate)
    with pytest.raises(StartError, match="no revocation list"):
        hospital.server_tls(revocations=hospital.authority.file)


def test_expiry_is_warned_of(hospital: Hospital) -> None:
    """From 30 days ahead a sentence comes once a day, and again when the certificate ended; a renewed one ends it."""
    hospital.authority.issue("near", ends_days=40).copy_to(hospital.server.certificate, hospital.server.key)
    server = hospital.server_tls(revocations=hospital.authority.revoke(ends_days=300))
    now = datetime.now(UTC)
    assert server.warnings(now) == []
    first = server.warnings(now + timedelta(days=11))
    assert len(first) == 1
    assert "ends in 28 days" in first[0]
    assert server.warnings(now + timedelta(days=11, hours=23)) == []
    assert len(server.warnings(now + timedelta(days=12, minutes=1))) == 1
    assert "ended on" in server.warnings(now + timedelta(days=41))[0]
    hospital.authority.issue("renewed", ends_days=80).copy_to(hospital.server.certificate, hospital.server.key)
    server.context()
    assert server.warnings(now + timedelta(days=42, hours=2)) == []


# Our own calls


def test_bad_servers_are_refused(hospital: Hospital) -> None:
    """Self-signed, other host, expired, wrong purpose, foreign: our call is refused in words that name the remedy (row 95)."""
    stranger = Authority(hospital.folder / "stranger", "stranger")
    authority = hospital.authority
    servers = {
        "self-signed": authority.issue("self", self_signed=True),
        "another address": authority.issue("elsewhere", hosts=["192.0.2.1"]),
        "expired": authority.issue("expired", begins_days=-9, ends_days=-1),
        "Extended Key Usage": authority.issue("use", purposes=CLIENT),
        "authority we do not know": stranger.issue("foreign"),
        "too short": authority.issue("short", rsa_bits=1024),
        "SHA-1": weak_signature(hospital.folder, authority, "weak"),
    }
    client = hospital.client_tls()
    for word, pair in servers.items():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.load_cert_chain(pair.certificate, pair.key)
        with pytest.raises(PeerUnreachable, match=word) as caught:
            raise_client_error(meet(context, lambda connection: caught_as_os(client, connection, "127.0.0.1")))
        assert ";" in str(caught.value)


class Carried(OSError):
    """Carries what a call raised through `meet`."""


def caught_as_os(client: ClientTls, connection: socket.socket, host: str, **settings: str) -> ssl.SSLSocket:
    """Call; what it raises goes on as OSError."""
    try:
        return client.secure(connection, host=host, **settings)  # type: ignore[arg-type]
    except PeerUnreachable as error:
        raise Carried from error


def raise_client_error(outcome: Outcome) -> None:
    """Raise what the caller met."""
    if isinstance(outcome.client_error, Carried) and outcome.client_error.__cause__ is not None:
        raise outcome.client_error.__cause__


def test_other_host_name_and_no_common_name(hospital: Hospital) -> None:
    """The host's name must stand in the Subject Alternative Name; a common name does not count."""
    pair = hospital.authority.issue("localhost", hosts=[])
    pair.copy_to(hospital.server.certificate, hospital.server.key)
    client = hospital.client_tls()
    with pytest.raises(PeerUnreachable, match="another host name"):
        raise_client_error(meet(hospital.server_tls().context(), lambda connection: caught_as_os(client, connection, "localhost")))


def test_pinned_certificate_of_a_peer(hospital: Hospital) -> None:
    """Where a peer's certificate is configured, another one of the same authority and host is refused, and the words give the new one."""
    client = hospital.client_tls()
    server = hospital.server_tls().context()
    pinned = hospital.server.fingerprint
    raise_client_error(meet(server, lambda connection: caught_as_os(client, connection, "localhost", certificate=pinned)))
    with pytest.raises(PeerUnreachable, match=pinned):
        raise_client_error(meet(server, lambda connection: caught_as_os(client, connection, "localhost", certificate="00" * 32)))


def test_calling_what_speaks_no_tls(hospital: Hospital) -> None:
    """A plain port, one that closes, one that is silent: refused in words, within the time given."""
    client = hospital.client_tls()

    def call(answer: bytes | None) -> str:
        accepted, caller = connected()
        with accepted:
            if answer is not None:
                accepted.sendall(answer)
                accepted.shutdown(socket.SHUT_WR)
            with pytest.raises(PeerUnreachable) as caught:
                client.secure(caller, host="localhost", timeout_s=1.0)
        return str(caught.value)

    assert "no TLS" in call(b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x01")
    assert "plain DICOM" in call(b"")
    assert "in time" in call(None)


def test_peer_that_wants_a_certificate(hospital: Hospital) -> None:
    """A caller without a certificate learns that one is wanted: in TLS 1.3 from the first read, in TLS 1.2 from the handshake."""
    client = ClientTls(hospital.authority.file)
    outcome = meet(hospital.server_tls().context(), lambda connection: client.secure(connection, host="localhost"))
    assert outcome.client_error is not None
    assert "wants a certificate" in handshake_fault(outcome.client_error, calling=True).reason


def test_certificate_for_servers_alone_is_not_shown(hospital: Hospital) -> None:
    """A pair for servers alone does not keep us from calling peers that ask for none; the log says why it is not shown."""
    pair = hospital.authority.issue("server-only", purposes=SERVER)
    with capture_logs() as logs:
        client = hospital.client_tls(pair)
    assert [entry["event"] for entry in logs] == ["tls.no_client_certificate"]
    assert "clientAuth" in logs[0]["reason"]
    asking_none = hospital.server_tls(client="none", authorities=None)
    outcome = meet(asking_none.context(), lambda connection: client.secure(connection, host="localhost"))
    assert (outcome.server_error, outcome.client_error) == (None, None)
    assert meet(hospital.server_tls().context(), by(client.context())).server_error is not None


# Who it is


def test_matches(hospital: Hospital) -> None:
    """A fingerprint in every spelling, a DNS name, URI or common name match; anything else does not."""
    fingerprint = hospital.client.fingerprint
    certificate = PeerCertificate(fingerprint, "commonName=scanner", ("ct.example.org", "urn:ct:1", "scanner"), datetime.now(UTC))
    colons = ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2))
    for configured in (fingerprint, colons, colons.upper(), f"sha256:{fingerprint}", f"SHA256 Fingerprint={colons}", "CT.example.org"):
        assert matches(configured, certificate), configured
    assert matches("urn:ct:1", certificate)
    assert matches("scanner", certificate)
    for configured in ("", " ", "ct", "example.org", "*.example.org", fingerprint[:-2], "00" * 32, "scanner\n x", fingerprint[::-1]):
        assert not matches(configured, certificate), configured


@pytest.mark.parametrize("value", ["ab" * 20, "ab" * 31, "sha1:" + "ab" * 20, "two words", "SHA256 Fingerprint=ab", "ab:" * 31 + "a"])
def test_malformed_setting_is_a_sentence(value: str) -> None:
    """What is meant as a fingerprint and is none, or has spaces, is refused at the start."""
    with pytest.raises(ValueError, match="fingerprint"):
        certificate_setting(value)
