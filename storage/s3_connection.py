"""Connections to an S3 service, kept and used again: a request goes in one piece, and of its answer only what is needed is looked at.

The common answer, 200 or 206 with a Content-Length, is read here, with one system call where the bytes come together. Any other framing
is left to ``http.client``, and its connection is not used again.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
import weakref
from collections import deque
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from io import BufferedReader, RawIOBase
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import (
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
    SSLError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HEAD_BYTES: Final = 1 << 16
"""Most that the head of an answer may have."""
_PIECE: Final = 256 << 10
_TOGETHER: Final = 32 << 10
"""Up to so many bytes head and body are one piece; joining more costs more than the second buffer."""
_TRUSTED_S: Final = 0.5
"""How long a connection that rests is taken for alive unseen."""
_KEPT: Final = 64
"""Connections at rest."""


class Connections:
    """Connections to one place, for any number of threads.

    Parameters
    ----------
    endpoint_url
        For errors.
    host, port
        Where.
    tls
        How to verify the service; None: plain HTTP.
    connect_timeout_s, read_timeout_s
        Until a connection is made, and between two pieces of data.
    """

    def __init__(
        self, *, endpoint_url: str, host: str, port: int, tls: ssl.SSLContext | None, connect_timeout_s: float, read_timeout_s: float
    ) -> None:
        self.endpoint_url = endpoint_url
        self._address = (host, port)
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._resting: deque[Connection] = deque()
        weakref.finalize(self, _close_all, self._resting)

    def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send a request and return its answer, of which the body is still to be read or closed.

        Raises
        ------
        botocore.exceptions.HTTPClientError
            Or one of its kinds: no connection, a time-out, one that broke. The service has carried the request out, or not.
        botocore.exceptions.SSLError
            The service cannot be verified.
        """
        lines = [f"{method} {target} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in headers.items()), "\r\n"]
        connection = self._connection()
        try:
            connection.send("".join(lines).encode("ascii"), body)
            return self._answer(connection, method)
        except (HTTPException, OSError) as error:
            connection.close()
            raise self.described(error) from error
        except BaseException:
            connection.close()
            raise

    def _answer(self, connection: Connection, method: str) -> Answer:
        head, rest = connection.head()
        status, headers = _parsed(head)
        length = headers.get("content-length", "")
        if not (status in (200, 206) or 400 <= status < 600) or not length.isdecimal() or "transfer-encoding" in headers:
            return self._unusual(connection, method, head + rest)
        lasting = headers.get("connection", "").lower() != "close" and not head.startswith(b"HTTP/1.0")
        return Answer(status, headers, Body(self, connection, rest, int(length), lasting=lasting))

    def _unusual(self, connection: Connection, method: str, begun: bytes) -> Answer:
        """Have the library read an answer of which we have the first bytes."""
        response = HTTPResponse(_Begun(begun, connection), method=method)  # type: ignore[arg-type]  # it asks for makefile alone
        response.begin()
        told = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, told, _LibraryBody(self, connection, response))

    def described(self, error: HTTPException | OSError) -> HTTPClientError:
        """Return the error that botocore would have given."""
        if isinstance(error, TimeoutError | BlockingIOError):  # the latter: SO_RCVTIMEO
            return ReadTimeoutError(endpoint_url=self.endpoint_url, error=error)
        return ConnectionClosedError(endpoint_url=self.endpoint_url, error=error)

    def _connection(self) -> Connection:
        while True:
            try:
                connection = self._resting.pop()
            except IndexError:
                break
            if connection.alive():
                return connection
            connection.close()
        try:
            plain = socket.create_connection(self._address, self._connect_timeout_s)
        except TimeoutError as error:
            raise ConnectTimeoutError(endpoint_url=self.endpoint_url, error=error) from error
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=self.endpoint_url, error=error) from error
        try:
            return Connection(plain, self._tls, self._address[0], self._read_timeout_s)
        except OSError as error:
            plain.close()
            broken = not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
            raise self.described(error) if broken else SSLError(endpoint_url=self.endpoint_url, error=error) from error

    def rest(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        if len(self._resting) < _KEPT:
            connection.used_at = time.monotonic()
            self._resting.append(connection)
        else:
            connection.close()

    @property
    def at_rest(self) -> int:
        """How many are kept."""
        return len(self._resting)


def _close_all(connections: deque[Connection]) -> None:
    while connections:
        connections.pop().close()


class Connection:
    """One connection, used by one thread at a time."""

    __slots__ = ("_buffer", "_peeking", "_socket", "used_at")

    def __init__(self, plain: socket.socket, tls: ssl.SSLContext | None, host: str, read_timeout_s: float) -> None:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket: Any = plain
        if tls is None:
            # The kernel's own time-outs: Python's would ask before each call whether it would wait, and give up the interpreter for that.
            plain.settimeout(None)
            patience = struct.pack("ll", int(read_timeout_s), int(read_timeout_s % 1 * 1e6) or int(read_timeout_s < 1))
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        else:
            self._socket = tls.wrap_socket(plain, server_hostname=host)
            self._socket.settimeout(read_timeout_s)
        self._peeking = select.poll()
        self._peeking.register(self._socket, select.POLLIN)
        self._buffer = bytearray(_HEAD_BYTES)
        self.used_at = 0.0

    def alive(self) -> bool:
        """Whether it may be used: the other end did not close it, nor send what nobody asked for."""
        return time.monotonic() - self.used_at < _TRUSTED_S or not self._peeking.poll(0)

    def send(self, head: bytes, body: bytes) -> None:
        """Send both, in one piece where that can be."""
        if len(body) <= _TOGETHER:
            self._socket.sendall(head + body)
        elif isinstance(self._socket, ssl.SSLSocket):
            self._socket.sendall(head)
            self._socket.sendall(body)
        else:
            sent = self._socket.sendmsg([head, body])
            if sent < len(head):
                self._socket.sendall(head[sent:])
                sent = len(head)
            if sent < len(head) + len(body):
                self._socket.sendall(memoryview(body)[sent - len(head) :])

    def head(self) -> tuple[bytes, bytes]:
        """Return the head of an answer, with the empty line at its end, and what came with it."""
        view, have = memoryview(self._buffer), 0
        while True:
            got = self._socket.recv_into(view[have:])
            if not got:
                raise ConnectionResetError("the service closed the connection instead of answering")
            end = self._buffer.find(b"\r\n\r\n", max(have - 3, 0), have + got)
            have += got
            if end >= 0:
                return bytes(view[: end + 4]), bytes(view[end + 4 : have])
            if have == len(self._buffer):
                raise HTTPException("the head of the answer does not end")

    def receive(self, most: int) -> bytes:
        """Return what comes next, at most so many bytes; empty at the end."""
        piece: bytes = self._socket.recv(most)
        return piece

    def receive_into(self, buffer: memoryview) -> int:
        """As `receive`."""
        return int(self._socket.recv_into(buffer))

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def __del__(self) -> None:
        """End it: the answer was dropped unread."""
        self._socket.close()


class Answer:
    """An answer's status, its headers with names in lower case, and its body."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], body: Body | _LibraryBody) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class Body:
    """A body of known length. Its connection is used again when it was read to its end, and closed otherwise."""

    __slots__ = ("_connection", "_connections", "_lasting", "_left", "_rest")

    def __init__(self, connections: Connections, connection: Connection, rest: bytes, length: int, *, lasting: bool) -> None:
        self._connections = connections
        self._connection: Connection | None = connection
        self._rest = rest[:length]
        self._left = length
        self._lasting = lasting and len(rest) <= length
        if not length:
            self.close()

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes (negative: all that are left), fewer only at the end.

        Raises
        ------
        botocore.exceptions.HTTPClientError
            The connection broke, or ended before the body did.
        """
        wanted = min(size, self._left) if size >= 0 else self._left
        pieces: list[bytes] = []
        while wanted:
            piece = self._piece(min(wanted, _PIECE))
            pieces.append(piece)
            wanted -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, most: int) -> bytes:
        if self._rest:
            piece, self._rest = self._rest[:most], self._rest[most:]
        else:
            try:
                piece = self._connection.receive(most) if self._connection is not None else b""
                if not piece:
                    raise ConnectionResetError("the answer ended before its length")
            except OSError as error:
                self.close()
                raise self._connections.described(error) from error
        self._left -= len(piece)
        if not self._left:
            self.close()
        return piece

    def close(self) -> None:
        """Give the connection back, or end it when bytes are still to come; may be called twice."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._left > len(self._rest) or not self._lasting:  # what came already need not be read
            connection.close()
        else:
            self._connections.rest(connection)


class _LibraryBody:
    """A body as ``http.client`` reads it. The connection ends with it."""

    def __init__(self, connections: Connections, connection: Connection, response: HTTPResponse) -> None:
        self._connections = connections
        self._connection = connection
        self._response = response

    def read(self, size: int = -1) -> bytes:
        """As `Body.read`."""
        try:
            return self._response.read(None if size < 0 else size)
        except (HTTPException, OSError) as error:
            self.close()
            raise self._connections.described(error) from error

    def close(self) -> None:
        """End the connection; may be called twice."""
        self._response.close()
        self._connection.close()


class _Begun(RawIOBase):
    """What is left of an answer whose first bytes were taken already; stands for the socket of an ``HTTPResponse``."""

    def __init__(self, begun: bytes, connection: Connection) -> None:
        self._begun = begun
        self._connection = connection

    def makefile(self, _mode: str) -> BufferedReader:
        return BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        if self._begun:
            piece, self._begun = self._begun[: len(view)], self._begun[len(view) :]
            view[: len(piece)] = piece
            return len(piece)
        return self._connection.receive_into(view)


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    """Return status and headers; of a header that comes twice the values joined."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
        raise HTTPException("the answer is not HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, mark, value = line.partition(":")
        name = name.lower()
        if not mark:
            raise HTTPException("a line in the head of the answer is no header")
        if name == "content-length" and name in headers:
            raise HTTPException("the answer has two lengths")
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    return int(rest[:3]), headers
