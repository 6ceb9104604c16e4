"""Ports for servers of the tests: below those of outgoing connections, which would take one between choice and use."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 20_000, 32_000


def free_port() -> int:
    """Return a TCP port of this machine that nothing uses now."""
    while True:
        port = random.randrange(_FIRST, _LAST)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
