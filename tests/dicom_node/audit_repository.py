"""An Audit Record Repository in a thread of its own: syslog over TLS (RFC 5425), which behaves as it is told."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from xml.etree import ElementTree as ET

from tests.certificates import Authority, Pair
from tests.ports import free_port

_HEADER = re.compile(
    rb"<(?P<pri>\d{1,3})>1 (?P<at>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) (?P<host>[\x21-\x7e]{1,255}) dicom-node - DICOM\+RFC3881 "
    rb'\[meta sequenceId="(?P<number>\d+)"\] \xef\xbb\xbf(?P<xml><\?xml.*)',
    re.DOTALL,
)


@dataclass(frozen=True)
class Message:
    """One syslog message that came whole."""

    pri: int
    number: int
    xml: bytes

    @property
    def root(self) -> ET.Element:
        """The AuditMessage."""
        return ET.fromstring(self.xml)  # noqa: S314 - our own

    def detail(self, kind: str) -> str:
        """Value of a ParticipantObjectDetail."""
        found = [one for one in self.root.iter("ParticipantObjectDetail") if one.get("type") == kind]
        return base64.b64decode(found[-1].get("value", "")).decode() if found else ""

    @property
    def record(self) -> dict[str, Any]:
        """The record of the trail in it."""
        names = ("seq", "at", "action", "outcome", "actor", "subject", "detail")
        return dict(zip(names, json.loads(self.detail("audit record")), strict=True))


def message_of(content: bytes) -> Message:
    """Parse a syslog message."""
    found = _HEADER.fullmatch(content)
    assert found, content[:200]
    return Message(int(found["pri"]), int(found["number"]), found["xml"])


def frames_of(content: bytes) -> tuple[list[bytes], bytes]:
    """Take a stream apart as RFC 5425 4.3 says: the whole messages, and what is left of one that broke off."""
    messages = []
    while content:
        length, space, rest = content.partition(b" ")
        if not space:
            return messages, content
        assert re.fullmatch(rb"[1-9][0-9]*", length), content[:40]
        if len(rest) < int(length):
            return messages, content
        messages.append(rest[: int(length)])
        content = rest[int(length) :]
    return messages, b""


class AuditRepository:
    """A context manager.

    Parameters
    ----------
    pair
        Certificate and key; None: it speaks plain TCP.
    clients
        Who may vouch for callers; with it they must show a certificate.
    script
        What to do with the first connections, one after the other: ``reset`` (after the first bytes, as when its process is killed),
        ``close`` (in order, by itself, after the first bytes), ``mute`` (read all, never close), ``deaf`` (read nothing). Later ones
        are read to their end, and closed in answer.
    port
        Where it listens; a new one without it.
    """

    def __init__(self, pair: Pair | None, *script: str, clients: Authority | None = None, port: int = 0) -> None:
        self.port = port or free_port()
        self.connections: list[bytes] = []
        """What came by each connection; handshakes that failed made none."""
        self.broken: list[bytes] = []
        """What was left of messages that broke off."""
        self._script = list(script)
        self._arrived = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._context: ssl.SSLContext | None = None
        if pair is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(pair.certificate, pair.key)
        if clients is not None and self._context is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(clients.file)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.settimeout(0.05)
        self._acceptor = threading.Thread(target=self._accept, name="repository")
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._acceptor.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    @property
    def messages(self) -> list[Message]:
        """All that came whole, in order."""
        with self._arrived:
            return [message_of(one) for content in self.connections for one in frames_of(content)[0]]

    @property
    def numbers(self) -> list[int]:
        """Of the records that came."""
        return [message.number for message in self.messages]

    def await_numbers(self, wanted: Sequence[int]) -> None:
        """Wait until each of these records has come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: set(wanted) <= set(self.numbers), 120), f"{self.numbers} came of {wanted}"

    def await_connections(self, count: int) -> None:
        """Wait until so many connections were made."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.connections) >= count, 120)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="repository")
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with suppress(OSError), connection:
            if self._context is None:
                self._read(connection, "plain", self._number())
                return
            with self._context.wrap_socket(connection, server_side=True) as secured:
                number = self._number()
                action = self._script.pop(0) if self._script else ""
                self._read(secured, action, number)

    def _number(self) -> int:
        with self._arrived:
            self.connections.append(b"")
            self._arrived.notify_all()
            return len(self.connections) - 1

    def _read(self, connection: socket.socket, action: str, number: int) -> None:
        connection.settimeout(0.05)
        while not self._stop.is_set():
            if action == "deaf":
                self._stop.wait(0.05)
                continue
            try:
                content = connection.recv(65536)
            except TimeoutError:
                continue
            with self._arrived:
                self.connections[number] += content
                self._arrived.notify_all()
            if action == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
                return
            if not content and action == "mute":
                self._stop.wait()
            if not content or action == "close":
                connection.settimeout(10)
                if isinstance(connection, ssl.SSLSocket):
                    connection.unwrap()
                return
