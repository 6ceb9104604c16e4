"""A TLS connection that one thread reads while another writes, with the calls of a socket that the upper layer uses.

OpenSSL does not allow two threads in one connection at once, and a blocking read would hold the lock that a writer needs. The socket
below is therefore non-blocking: `recv_into` takes what is there, `send` waits for room by itself.

References
----------
DICOM PS3.15 Annex B (secure transport connection profiles)
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from typing import Any

from dicom_node.security import PeerCertificate, peer_certificate


class PlainConnection(socket.socket):
    """A connection without TLS: what two threads send does not mix, since each call sends all of it."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection.family, connection.type, connection.proto, fileno=connection.detach())
        self._sending = threading.Lock()

    def send(self, data: Any, flags: int = 0) -> int:
        """Send all of `data`. Returns its length."""
        self.sendall(data, flags)
        return len(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of `data`."""
        with self._sending:
            super().sendall(data, flags)


class Pace:
    """Judges a peer by how much of what we write it takes while we wait for it.

    One that takes a few bytes now and then would hold a thread and a slot without end, and no single write would take long.

    Parameters
    ----------
    judged_s
        After how much waiting it is judged, each time anew.
    minimum_bytes_per_s
        What it has to take in that time.
    """

    def __init__(self, *, judged_s: float = 60.0, minimum_bytes_per_s: float = 1024.0) -> None:
        self._judged_s = judged_s
        self._minimum = minimum_bytes_per_s
        self._waited_s = 0.0
        self._went = 0

    def note(self, waited_s: float, count: int) -> None:
        """Count what went, and how long it was waited for.

        Raises
        ------
        TimeoutError
            The peer is too slow.
        """
        self._waited_s += waited_s
        self._went += count
        if self._waited_s >= self._judged_s:
            slow = self._went < self._waited_s * self._minimum
            self._waited_s, self._went = 0.0, 0
            if slow:
                raise TimeoutError("the peer reads slower than the minimum rate")


class Outflow:
    """Writes all it is given to a connection, at the peer's pace as long as that is one.

    Parameters
    ----------
    connection
        A blocking socket with SO_SNDTIMEO, or a `TlsConnection`.
    pace
        Of this peer, for all that is written to it.
    """

    def __init__(self, connection: Any, pace: Pace) -> None:
        self._connection = connection
        self._pace = pace

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        """Write.

        Raises
        ------
        OSError
            The peer is gone, or does not read, or too slowly.
        """
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                began = time.monotonic()
                count = self._connection.send(view[sent:])
                sent += count
                self._pace.note(time.monotonic() - began, count)


class TlsConnection:
    """A TLS connection whose handshake is over.

    Parameters
    ----------
    connection
        Non-blocking.
    send_s
        Longest wait for a peer that does not read.
    pace
        Judges one that reads slowly.
    """

    def __init__(self, connection: ssl.SSLSocket, *, send_s: float, pace: Pace | None = None) -> None:
        self._connection = connection
        self._pace = pace or Pace()
        self._send_s = send_s
        self._lock = threading.Lock()
        self._sending = threading.Lock()  # OpenSSL takes the next buffer for the rest of one that waits for room

    def recv_into(self, view: memoryview) -> int:
        """Read what is there into `view`, as much as fits. Returns the number of bytes, 0 at the end.

        Raises
        ------
        BlockingIOError
            Nothing is there yet.
        OSError
            The connection broke, or what came is no TLS.
        """
        count = 0
        with self._lock:
            try:
                while count < len(view):
                    came = self._connection.recv_into(view[count:])
                    if not came:
                        break
                    count += came
            except ssl.SSLWantReadError:
                if not count:
                    raise BlockingIOError from None
            except ssl.SSLWantWriteError:  # an answer of the protocol's own waits for room; the next write sends it
                if not count:
                    raise BlockingIOError from None
            except ssl.SSLEOFError:  # no close_notify: the upper layer's own release and abort say whether the end was lawful
                pass
        return count

    def send(self, data: bytes | memoryview) -> int:
        """Send all of `data`. Returns its length.

        Raises
        ------
        OSError
            The connection broke; TimeoutError, the peer does not read, or too slowly.
        """
        view, sent, deadline = memoryview(data), 0, time.monotonic() + self._send_s
        with self._sending:
            while sent < len(view):
                try:
                    with self._lock:
                        count = self._connection.send(view[sent:])
                    sent += count
                    self._pace.note(0.0, count)
                    deadline = time.monotonic() + self._send_s
                except ssl.SSLWantWriteError:
                    self._wait(select.POLLOUT, deadline)
                except ssl.SSLWantReadError:
                    self._wait(select.POLLIN, deadline)
        return sent

    sendall = send

    @property
    def certificate(self) -> PeerCertificate | None:
        """What the peer showed; None: nothing."""
        return peer_certificate(self._connection)

    def pending(self) -> int:
        """Return how many bytes are decrypted and not read, which no poll tells of."""
        with self._lock:
            return self._connection.pending()

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._connection.fileno()

    def shutdown(self, how: int) -> None:
        """Say close_notify once nothing more is sent, and shut the socket below."""
        with self._lock:
            if how != socket.SHUT_RD:
                with contextlib.suppress(OSError, ValueError):
                    self._connection.unwrap()  # raises for the peer's close_notify, which is not waited for
            socket.socket.shutdown(self._connection, how)  # SSLSocket.shutdown would forget its TLS and read ciphertext as data

    def close(self) -> None:
        """Close the socket below."""
        self._connection.close()

    def setsockopt(self, *arguments: Any) -> None:
        """As of a socket."""
        self._connection.setsockopt(*arguments)

    def getsockname(self) -> tuple[Any, ...]:
        """As of a socket."""
        return tuple(self._connection.getsockname())

    def _wait(self, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._connection.fileno(), event)
        began = time.monotonic()
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("the peer does not read")
        self._pace.note(time.monotonic() - began, 0)
