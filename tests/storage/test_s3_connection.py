"""Connections to an S3 service: any framing is read as the library reads it, and a connection that is not sound is not used again."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, HTTPClientError, ReadTimeoutError, SSLError
from hypothesis import given
from hypothesis import strategies as st

from storage.s3_connection import Answer, Connections
from tests.certificates import Authority
from tests.ports import free_port


class Service:
    """Takes requests and answers each with the next of `answers`, each a list of pieces; None: it closes the connection."""

    def __init__(self, *answers: list[bytes] | None, tls: ssl.SSLContext | None = None) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[bytes, bytes]] = []
        self.accepted = 0
        self.pause = threading.Event()
        self.pause.set()
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listening.getsockname()[1])

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            with suppress(OSError), connection:
                if self._tls is not None:
                    with self._tls.wrap_socket(connection, server_side=True) as sealed:
                        self._converse(sealed)
                else:
                    self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        while self.answers:
            taken = connection.makefile("rb")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = taken.readline()
                if not line:
                    return
                head += line
            length = int(head.partition(b"content-length: ")[2].partition(b"\r")[0] or 0)
            self.pause.wait()
            self.requests.append((head, taken.read(length)))
            answer = self.answers.pop(0)
            if answer is None:
                return
            for piece in answer:
                connection.sendall(piece)
            if b"close" in b"".join(answer).lower():
                return

    def close(self) -> None:
        """Stop."""
        self.pause.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


@contextmanager
def serving(*answers: list[bytes] | None, read_timeout_s: float = 30.0) -> Iterator[tuple[Service, Connections]]:
    """Serve answers, and connections to them."""
    service = Service(*answers)
    try:
        yield service, connections_to(service.port, read_timeout_s=read_timeout_s)
    finally:
        service.close()


def connections_to(port: int, *, tls: ssl.SSLContext | None = None, read_timeout_s: float = 30.0) -> Connections:
    """Return connections to this machine."""
    endpoint = f"http://127.0.0.1:{port}"
    return Connections(endpoint_url=endpoint, host="127.0.0.1", port=port, tls=tls, connect_timeout_s=30.0, read_timeout_s=read_timeout_s)


def ask(connections: Connections, body: bytes = b"") -> Answer:
    """Ask anything."""
    return connections.ask("PUT", "/bucket/key", {"host": "127.0.0.1", "content-length": str(len(body))}, body)


def whole(status: str, body: bytes, *headers: bytes) -> bytes:
    """Return an answer of known length."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status.encode(), len(body), lines, body)


def chunked(status: str, body: bytes) -> bytes:
    """Return an answer in chunks."""
    parts = b"".join(b"%x\r\n%s\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7))
    return b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n\r\n%s0\r\n\r\n" % (status.encode(), parts)


def ending(status: str, body: bytes) -> bytes:
    """Return an answer that ends with its connection."""
    return b"HTTP/1.1 %s\r\nConnection: close\r\n\r\n%s" % (status.encode(), body)


def continued(status: str, body: bytes) -> bytes:
    """Return an answer after one that is none yet."""
    return b"HTTP/1.1 100 Continue\r\n\r\n" + whole(status, body, b'ETag:  "x" ', b"x-amz-meta: a", b"x-amz-meta: b")


class _Read:
    """A socket of which everything was received."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, _mode: str) -> BytesIO:
        return BytesIO(self._content)


FRAMINGS = st.sampled_from([whole, chunked, ending, continued])
STATUSES = st.sampled_from(["200 OK", "206 Partial Content", "404 Not Found", "412 No", "503 Slow Down", "307 Elsewhere"])


@given(FRAMINGS, STATUSES, st.binary(max_size=200), st.lists(st.integers(0, 400), max_size=6), st.integers(1, 300))
def test_as_the_library_reads(framing: Callable[[str, bytes], bytes], status: str, body: bytes, cuts: list[int], size: int) -> None:
    """Any framing, cut anywhere, read in pieces of any size: the same status, headers and body; the next request is answered, too."""
    answer = framing(status, body)
    edges = sorted({0, len(answer), *(cut for cut in cuts if cut < len(answer))})
    pieces = [answer[start:end] for start, end in pairwise(edges)]
    expected = HTTPResponse(cast("Any", _Read(answer)), method="PUT")
    expected.begin()
    with serving(pieces, [whole("200 OK", b"next")]) as (service, connections):
        found = ask(connections)
        assert (found.status, found.headers.get("etag")) == (expected.status, expected.headers.get("etag"))
        read = b""
        while piece := found.body.read(size):
            assert len(piece) == size or len(read) + len(piece) == len(body)
            read += piece
        found.body.close()
        assert read == expected.read() == body
        assert ask(connections).body.read() == b"next"
        assert [head.split(b" ")[0] for head, _ in service.requests] == [b"PUT", b"PUT"]
        assert (service.accepted == 1) == (framing is whole and status[0] != "3")


@pytest.mark.parametrize("size", [0, 100, 40_000, 20 << 20])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_body_goes_whole(tmp_path: Path, size: int, sealed: bool) -> None:
    """Small and large, in the clear and over TLS, to a service that lets it wait: what arrives is what was sent."""
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    ours = theirs = None
    if sealed:
        authority = Authority(tmp_path)
        pair = authority.issue("service")
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        theirs.load_cert_chain(pair.certificate, pair.key)
        ours = ssl.create_default_context(cafile=str(authority.file))
    service = Service([whole("200 OK", b"taken")], tls=theirs)
    try:
        service.pause.clear()
        threading.Timer(0.2, service.pause.set).start()
        assert ask(connections_to(service.port, tls=ours), body).body.read() == b"taken"
        assert service.requests[0][1] == body
    finally:
        service.close()


def test_a_connection_that_was_closed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the service closed while it rested is seen to be, and another is made."""
    monkeypatch.setattr("storage.s3_connection._TRUSTED_S", 0.0)
    with serving([whole("200 OK", b"one")]) as (service, connections):
        ask(connections).body.read()
        assert connections.at_rest == 1
        for _ in range(500):
            if not connections._resting[0].alive():
                break
            threading.Event().wait(0.01)
        service.answers += [[whole("200 OK", b"two")]]
        assert ask(connections).body.read() == b"two"
        assert service.accepted == 2


def test_a_connection_that_closes_when_asked() -> None:
    """Closed a moment after its last use, it is found out by the request: a broken connection, which the caller repeats."""
    with serving([whole("200 OK", b"one")], None, [whole("200 OK", b"two")]) as (_, connections):
        ask(connections).body.read()
        with pytest.raises(ConnectionClosedError):
            ask(connections)
        assert ask(connections).body.read() == b"two"


def test_a_body_that_is_not_read() -> None:
    """What is closed, or dropped, with bytes still to come ends its connection; what had come whole already does not."""
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nbeginning"
    with serving([long], [long], [whole("200 OK", b"short")], [whole("200 OK", b"last")]) as (service, connections):
        ask(connections).body.close()
        assert connections.at_rest == 0
        ask(connections)  # dropped
        ask(connections).body.close()
        assert connections.at_rest == 1
        assert ask(connections).body.read() == b"last"
        assert service.accepted == 3


@pytest.mark.parametrize(
    "answer", [whole("200 OK", b"one", b"Connection: Close"), whole("200 OK", b"one") + b"stray", b"HTTP/1.0" + whole("200 OK", b"one")[8:]]
)
def test_a_connection_that_shall_not_last(answer: bytes) -> None:
    """The service says that it closes, is of the old version, or sends more than its answer: the connection is not kept."""
    with serving([answer]) as (_, connections):
        assert ask(connections).body.read() == b"one"
        assert connections.at_rest == 0


@pytest.mark.parametrize(
    "answer",
    [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", b"close"],
        [b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\nContent-Length: 12\r\n\r\nhalf"],
        [b"HTTP/1.1 200 OK\r\n" + b"x: close\r\n" * 7000],
        [b"no HTTP at all, close\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nno header, close\r\n\r\n"],
        [b"HTTP/1.1 two close\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nclose"],
        None,
    ],
)  # fmt: skip
def test_what_is_no_answer(answer: list[bytes] | None) -> None:
    """Half answers, endless heads, other protocols: a broken connection, whatever it is, and it is not used again."""
    with serving(answer, [whole("200 OK", b"next")]) as (service, connections):
        with pytest.raises(ConnectionClosedError):
            ask(connections).body.read()
        assert connections.at_rest == 0
        assert ask(connections).body.read() == b"next"
        assert service.accepted == 2


def test_a_silent_service() -> None:
    """No answer, or none any more in the middle of one, is a time-out."""
    with serving([whole("200 OK", b"late")], read_timeout_s=0.3) as (service, connections):
        service.pause.clear()
        with pytest.raises(ReadTimeoutError):
            ask(connections)
    with serving([b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"], [], read_timeout_s=0.3) as (_, connections):
        with pytest.raises(ReadTimeoutError):
            ask(connections).body.read()
        assert connections.at_rest == 0


def test_a_service_that_takes_nothing() -> None:
    """A body that nobody takes is a time-out, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ReadTimeoutError):
        ask(connections_to(silent.getsockname()[1], read_timeout_s=0.3), bytes(64 << 20))


def test_no_service() -> None:
    """Nobody listens: said so, and it is no time-out."""
    with pytest.raises(EndpointConnectionError):
        ask(connections_to(free_port()))


def test_whom_to_trust(tmp_path: Path) -> None:
    """A certificate of another authority is told as such, and is not tried again; a handshake that breaks off is a broken connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = Authority(tmp_path / "theirs").issue("service")
    context.load_cert_chain(pair.certificate, pair.key)
    ours = ssl.create_default_context(cafile=str(Authority(tmp_path / "ours").file))
    service = Service(tls=context)
    try:
        with pytest.raises(SSLError):
            ask(connections_to(service.port, tls=ours))
    finally:
        service.close()
    with socket.create_server(("127.0.0.1", 0)) as hasty:

        def hang_up() -> None:
            hasty.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(HTTPClientError) as broken:
            ask(connections_to(hasty.getsockname()[1], tls=ours))
        thread.join()
        assert not isinstance(broken.value, SSLError)
