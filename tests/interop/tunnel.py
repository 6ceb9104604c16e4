"""A tunnel for programs that speak no TLS themselves: plain on this side, TLS on the other, as stunnel does."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK = 65536


@contextmanager
def tunnel(port: int, context: ssl.SSLContext, *, host: str = "127.0.0.1") -> Iterator[int]:
    """Listen on a port of this machine, given on entry; each connection goes on to `port` by TLS."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=_carry, args=(connection, port, context, host))
            thread.start()
            threads.append(thread)

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for thread in threads:
            thread.join()


def _carry(plain: socket.socket, port: int, context: ssl.SSLContext, host: str) -> None:
    """Carry bytes both ways until either side ends. One thread: OpenSSL allows no two in one connection."""
    with (
        plain,
        contextlib.suppress(OSError),
        socket.create_connection((host, port)) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        while True:
            ready, _, _ = select.select([plain, secured], [], [])
            if plain in ready:
                data = plain.recv(_CHUNK)
                if not data:
                    return
                secured.sendall(data)
            if secured in ready:
                data = secured.recv(_CHUNK)
                while data and secured.pending():
                    data += secured.recv(_CHUNK)
                if not data:
                    return
                plain.sendall(data)
