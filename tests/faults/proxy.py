"""Proxy: a TCP proxy between a part and its peer that delays, throttles, cuts, swallows and resets. For any TCP service.

with Proxy("127.0.0.1", port) as proxy:
    connect to ("127.0.0.1", proxy.port) instead
    proxy.delay_s = 0.2               # before each piece of data, in both directions
    proxy.bytes_per_s = 10_000        # each direction of each connection; 0: as fast as it goes
    proxy.cut_up(1000)                # close the next connection after 1000 bytes from the client; cut_down: to the client
    proxy.black_hole()                # take everything, pass on nothing, on present and new connections
    proxy.refuse()                    # close new connections at once
    proxy.reset()                     # end every present connection with RST
    proxy.heal()                      # pass on everything again (what was swallowed is lost, as on a broken line)
    proxy.connections                 # how many were made so far
    proxy.recorded                    # every byte that passed, when made with record=True (for canary scans)
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_PIECE = 1 << 16


class Proxy:
    """Listens on a port of its own (`port`) and passes on to `host` and `port`; started at once, a context manager."""

    def __init__(self, host: str, port: int, *, record: bool = False) -> None:
        self._target = (host, port)
        self._record = record
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._being_reset: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._swallow = False
        self._refuse = False
        self._cuts: dict[str, list[int]] = {"up": [], "down": []}
        self._ended = threading.Event()
        self.delay_s = 0.0
        self.bytes_per_s = 0
        self.connections = 0
        self.recorded = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # the script

    def cut_up(self, at_byte: int) -> None:
        """Close the next connection when it carried so many bytes from the client."""
        self._cuts["up"].append(at_byte)

    def cut_down(self, at_byte: int) -> None:
        """Close the next connection when it carried so many bytes to the client."""
        self._cuts["down"].append(at_byte)

    def black_hole(self) -> None:
        """Pass on nothing any more and close nothing."""
        self._swallow = True

    def refuse(self) -> None:
        """Close new connections at once."""
        self._refuse = True

    def reset(self) -> None:
        """End every present connection with a reset."""
        with self._lock:
            present = list(self._open)
            self._being_reset.update(present)
        for connection in present:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RD)  # wakes its thread, which closes it: that is what sends the RST

    def heal(self) -> None:
        """Pass on everything again."""
        self.delay_s, self.bytes_per_s = 0.0, 0
        self._swallow = self._refuse = False
        self._cuts["up"].clear()
        self._cuts["down"].clear()

    def close(self) -> None:
        """End everything."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            present = list(self._open)
        for connection in present:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    # the work

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self._refuse:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, timeout=10)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            left = [2]
            self._start(self._carry, client, server, "up", left)
            self._start(self._carry, server, client, "down", left)

    def _carry(self, source: socket.socket, sink: socket.socket, way: str, left: list[int]) -> None:
        cut = self._cuts[way].pop(0) if self._cuts[way] else None
        passed = 0
        try:
            while piece := source.recv(_PIECE):
                if self._swallow:
                    continue
                if self.delay_s:
                    self._ended.wait(self.delay_s)
                if cut is not None:
                    piece = piece[: cut - passed]
                if self.bytes_per_s:
                    self._ended.wait(len(piece) / self.bytes_per_s)
                sink.sendall(piece)
                passed += len(piece)
                if self._record:
                    self.recorded += piece
                if cut is not None and passed >= cut:
                    break
            else:
                if not self._swallow and source not in self._being_reset:
                    sink.shutdown(socket.SHUT_WR)
                    return
        except OSError:
            pass  # one side is gone: so is the other, below
        finally:
            with self._lock:
                left[0] -= 1
                last = left[0] == 0
            if last:
                self._finish(source, sink)
        for end in {source, sink} - self._being_reset:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _finish(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            end.close()
        with self._lock:
            self._being_reset -= set(ends)
