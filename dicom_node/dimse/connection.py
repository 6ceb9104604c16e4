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


class TlsConnection:
    """A TLS connection whose handshake is over.

    Parameters
    ----------
    connection
        Non-blocking.
    send_s
        Longest wait for a peer that does not read.
    """

    def __init__(self, connection: ssl.SSLSocket, *, send_s: float) -> None:
        self._connection = connection
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
            The connection broke; TimeoutError, the peer does not read.
        """
        view, sent, deadline = memoryview(data), 0, time.monotonic() + self._send_s
        with self._sending:
            while sent < len(view):
                try:
                    with self._lock:
                        sent += self._connection.send(view[sent:])
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
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("the peer does not read")
