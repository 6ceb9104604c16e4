"""Ports for servers of the tests, kept from all others for as long as the tests run."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 20_000, 32_000

_reservations: list[socket.socket] = []


def free_port() -> int:
    """Return a TCP port of this machine that nothing uses, and that no outgoing connection and no other call will be given.

    A server takes the port with SO_REUSEADDR, as all of them do. A socket that is bound to it and never listens keeps it meanwhile: an
    outgoing connection, even of the server's own clients, would else be given the port between choice and use or while the server restarts.
    """
    while True:
        port = random.randrange(_FIRST, _LAST)
        reservation = socket.socket()
        try:
            # without SO_REUSEADDR: fails where any other socket has the port, another process's reservation too
            reservation.bind(("", port))
        except OSError:
            reservation.close()
            continue
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _reservations.append(reservation)
        return port
