"""Where connections wait until their association request is whole: one thread for all of them, no thread and no slot for any.

A connection costs its socket and the bytes that it sent, at most the length of a handshake PDU. Whoever has not finished the request (and
the TLS handshake before it) within the handshake time, counted from the connection, is closed. When too many wait, the one that waits
longest of the address that has most goes.

References
----------
DICOM PS3.8 Section 9.2 (Sta1, Sta2 and the ARTIM timer), Table 9-26 (A-ABORT)
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import ssl
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from dicom_node.dimse.connection import PlainConnection, TlsConnection
from dicom_node.dimse.crowds import Crowds
from dicom_node.dimse.receive import Waker

log = structlog.get_logger(__name__)

_HEADER: Final = 6
_A_ASSOCIATE_RQ, _A_ABORT = 0x01, 0x07
_LINGER_S: Final = 2.0
_ACCEPTS: Final = 64
_CHUNK: Final = 16384

_FIXED: Final = 74
"""Bytes of an A-ASSOCIATE-RQ before its items (PS3.8 Table 9-11)."""
_CONTEXTS: Final = 128
_SYNTAXES: Final = 4096
_USER_ITEMS: Final = 512

_CONGESTION: Final = struct.pack(">BxLBBBB", 0x03, 4, 0, 2, 3, 1)
"""A-ASSOCIATE-RJ: transient, presentation layer, temporary congestion (PS3.8 Table 9-21)."""
TOO_MANY_REQUESTS: Final = "too many association requests a second of this address"

Connection = socket.socket | TlsConnection


def request_fault(request: bytes | bytearray) -> str:
    """Say why an A-ASSOCIATE-RQ is not worth decoding: lengths that do not add up, or more than any sender proposes. Empty: it is.

    The library takes such a request apart in time that grows with the square of what it holds, before anybody knows who calls.
    """
    contexts = syntaxes = user_items = 0
    for kind, begin, end in _items(request, _FIXED, len(request)):
        if end > len(request):
            return "association request with lengths that do not add up"
        if kind == 0x20:
            contexts += 1
            for inner, _, inner_end in _items(request, begin + 4, end):
                if inner_end > end:
                    return "association request with lengths that do not add up"
                syntaxes += inner == 0x40
        elif kind == 0x50:
            for _, _, inner_end in _items(request, begin, end):
                if inner_end > end:
                    return "association request with lengths that do not add up"
                user_items += 1
        if contexts > _CONTEXTS or syntaxes > _SYNTAXES or user_items > _USER_ITEMS:
            return "association request with more contexts, transfer syntaxes or negotiation items than allowed"
    return ""


def titles(request: bytes | bytearray) -> tuple[bytes, bytes]:
    """Return the called and the calling AE title of a whole request, as they stand there."""
    return bytes(request[10:26]), bytes(request[26:42])


def _items(request: bytes | bytearray, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Walk items or sub-items: type, where the value begins, where it ends."""
    while position < end:
        if end - position < 4:
            yield 0, position, len(request) + 1
            return
        kind, length = request[position], int.from_bytes(request[position + 2 : position + 4], "big")
        yield kind, position + 4, position + 4 + length
        position += 4 + length


def _has_gone(connection: socket.socket) -> bool:
    """Whether the peer has closed its end, or the connection broke."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLRDHUP)
    return bool(poller.poll(0))


@dataclass(slots=True, eq=False)
class Caller:
    """A connection that waits."""

    socket: socket.socket
    address: tuple[Any, ...]
    deadline: float
    secured: bool
    """False while the TLS handshake is under way."""
    request: bytearray = field(default_factory=bytearray)
    waits_as: Hashable = None
    """Its request is whole, and its turn comes later; as one of these."""
    leaving: bool = False
    """It was answered, and what it still sends is read past until it closes."""


@dataclass(frozen=True, slots=True)
class Turned:
    """A connection that was turned away before any association."""

    address: str
    reason: str
    error: OSError | None = None
    """Of a TLS handshake."""


class Vestibule:
    """Accepts connections and gives those on whose request is whole.

    Parameters
    ----------
    listener
        Listening.
    enter
        Takes over a connection, the peer's address as ``socket.accept`` gave it, and the A-ASSOCIATE-RQ PDU. Returns what to answer
        instead when it does not take it: a PDU, after which the connection ends.
    tls
        Gives the context of the next handshake; None: no TLS.
    handshake_s, handshake_pdu_length
        As `ReceiveLimits`.
    send_s
        Longest wait for a peer that does not read.
    waiting, waiting_bytes
        Most connections that wait at once, and most bytes of requests that they sent so far.
    requests_per_s, burst
        Whole requests of one address that are given on in a second, and at once after a pause; others wait for their turn, as long again as
        for the request. 0 a second: nobody waits.
    caller
        Whose request it is, of those behind one address that take turns; by default the calling AE title.
    turned
        Told who is turned away.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        enter: Callable[[Connection, tuple[Any, ...], bytes], bytes | None],
        tls: Callable[[], ssl.SSLContext] | None = None,
        handshake_s: float = 10.0,
        handshake_pdu_length: int = 131_072,
        send_s: float = 60.0,
        waiting: int = 8192,
        waiting_bytes: int = 32 * 1024**2,
        requests_per_s: float = 100.0,
        burst: int = 200,
        caller: Callable[[bytes], Hashable] = lambda request: titles(request)[1],
        turned: Callable[[Turned], None] = lambda _: None,
    ) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._enter = enter
        self._tls = tls
        self._handshake_s = handshake_s
        self._handshake_pdu_length = handshake_pdu_length
        self._send_s = send_s
        self._most = waiting
        self._most_bytes = waiting_bytes
        self._bytes = 0
        self._crowds: Crowds[Caller] = Crowds(rate=requests_per_s, burst=burst)
        self._caller = caller
        self._turned = turned
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._waiting: OrderedDict[Caller, None] = OrderedDict()  # by deadline: it is the same time for all
        self._parked: OrderedDict[Caller, None] = OrderedDict()
        self._leaving: OrderedDict[Caller, None] = OrderedDict()
        self._by_address: dict[str, OrderedDict[Caller, None]] = {}
        self._paused_until = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dimse-vestibule", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._waker.descriptor, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more, close who waits."""
        self._stopping = True
        self._waker.wake()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting) + len(self._parked)

    # The thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception:  # an edge: one connection must not end the door
                log.exception("dimse.vestibule_failed")
                time.sleep(0.1)
        self._listener.close()
        for caller in [*self._waiting, *self._parked, *self._leaving]:
            self._forget(caller)
        self._selector.close()
        self._waker.close()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._patience()):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, Caller):
                self._serve(key.data, events)
            else:
                self._waker.clear()
        now = time.monotonic()
        for caller in self._crowds.ready(now):
            self._waiting[caller] = self._parked.pop(caller)  # until the end of this round
            if _has_gone(caller.socket):
                self._crowds.give_back(str(caller.address[0]))
                self._forget(caller)
            else:
                self._give_on(caller)
        for queue in (self._waiting, self._leaving):
            while queue and (caller := next(iter(queue))).deadline <= now:
                if not caller.leaving and (caller.request or not caller.secured):
                    self._tell(caller, "no whole association request within the handshake time")
                self._forget(caller)
        while self._parked and (caller := next(iter(self._parked))).deadline <= now:
            self._tell(caller, TOO_MANY_REQUESTS)
            self._selector.register(caller.socket, selectors.EVENT_READ, caller)
            self._answer(caller, _CONGESTION)
        if self._paused_until and self._paused_until <= now:
            self._paused_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _patience(self) -> float | None:
        times = [next(iter(queue)).deadline for queue in (self._waiting, self._parked, self._leaving) if queue]
        if self._paused_until:
            times.append(self._paused_until)
        if (turn := self._crowds.next_at()) is not None:
            times.append(turn)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                connection, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if self._stopping:
                    return
                # Out of descriptors: let some who wait go, and look again in a moment
                log.warning("dimse.accept_failed", reason=str(error.strerror))
                for caller in list(self._waiting)[:_ACCEPTS]:
                    self._forget(caller)
                self._selector.unregister(self._listener)
                self._paused_until = time.monotonic() + 0.1
                return
            try:
                self._take_in(connection, address)
            except OSError as error:
                self._turned(Turned(str(address[0]), f"the connection broke ({error})"))
                connection.close()

    def _take_in(self, connection: socket.socket, address: tuple[Any, ...]) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            connection = self._tls().wrap_socket(connection, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False)
        caller = Caller(connection, address, time.monotonic() + self._handshake_s, secured=self._tls is None)
        if self.waiting >= self._most:
            crowd = max(self._by_address.values(), key=len)
            oldest = next(iter(crowd))
            self._tell(oldest, "too many connections wait for their association request")
            self._forget(oldest)
        self._waiting[caller] = None
        self._by_address.setdefault(str(address[0]), OrderedDict())[caller] = None
        self._selector.register(connection, selectors.EVENT_READ, caller)
        self._serve(caller, selectors.EVENT_READ)  # what came with the connection

    def _serve(self, caller: Caller, _events: int) -> None:
        try:
            if caller.leaving:
                while caller.socket.recv(_CHUNK):
                    pass
                self._forget(caller)
                return
            if not caller.secured:
                assert isinstance(caller.socket, ssl.SSLSocket)  # noqa: S101 - by construction
                caller.socket.do_handshake()
                caller.secured = True
                self._selector.modify(caller.socket, selectors.EVENT_READ, caller)
            self._read(caller)
        except ssl.SSLWantWriteError:
            self._selector.modify(caller.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, caller)
        except (ssl.SSLWantReadError, BlockingIOError):
            if not caller.secured:
                self._selector.modify(caller.socket, selectors.EVENT_READ, caller)
        except OSError as error:
            if not caller.secured:
                self._tell(caller, "TLS handshake failed", error)
            self._forget(caller)

    def _read(self, caller: Caller) -> None:
        request = caller.request
        while True:
            length = _HEADER if len(request) < _HEADER else _HEADER + int.from_bytes(request[2:6], "big")
            missing = length - len(request)
            if not missing and length > _HEADER:
                if reason := request_fault(request):
                    self._refuse(caller, reason, 6)
                else:
                    self._queue_up(caller)
                return
            came = caller.socket.recv(min(missing, _CHUNK))
            if not came:
                self._forget(caller)  # a health check, or one that changed its mind
                return
            request += came
            self._bytes += len(came)
            if self._bytes > self._most_bytes:
                self._make_room()
                if caller not in self._waiting:
                    return
            if len(request) >= _HEADER and (fault := self._fault(request)) is not None:
                self._refuse(caller, *fault)
                return

    def _queue_up(self, caller: Caller) -> None:
        """Give a whole request on if it is its turn, else let it wait for that."""
        whose, now = self._caller(bytes(caller.request)), time.monotonic()
        self._selector.unregister(caller.socket)  # what else it sends is read when it is given on
        if self._crowds.enter(caller, address=str(caller.address[0]), caller=whose, now=now):
            self._give_on(caller)
            return
        caller.waits_as, caller.deadline = whose, now + self._handshake_s
        del self._waiting[caller]
        self._parked[caller] = None

    def _make_room(self) -> None:
        """Let the longest request go, of the address that has sent most."""
        crowd = max(self._by_address.values(), key=lambda crowd: sum(len(caller.request) for caller in crowd))
        longest = max(crowd, key=lambda caller: len(caller.request))
        self._tell(longest, "too many bytes of association requests wait")
        self._forget(longest)

    def _fault(self, header: bytearray) -> tuple[str, int] | None:
        """Judge the header of the first PDU: what is wrong, and the Reason/Diag. of the A-ABORT (PS3.8 Table 9-26)."""
        kind, length = header[0], int.from_bytes(header[2:6], "big")
        if kind == _A_ASSOCIATE_RQ:
            if 0 < length <= self._handshake_pdu_length:
                return None
            return "association request longer than allowed" if length else "association request without content", 6
        if kind == _A_ABORT:
            return "abort instead of an association request", 0
        if kind in range(2, 7):
            return "PDU before any association", 2
        if kind == 0x16 and header[1] == 0x03:  # a record of TLS
            return "TLS handshake on a port without TLS", 1
        if header[:4].isalpha() or bytes(header[:4]) in (b"GET ", b"PUT "):
            return "HTTP on the DICOM port", 1
        return "unrecognised PDU type", 1

    def _refuse(self, caller: Caller, reason: str, diagnostic: int) -> None:
        self._tell(caller, reason)
        if diagnostic == 0:
            self._forget(caller)
        else:
            self._answer(caller, struct.pack(">BxLBBBB", _A_ABORT, 4, 0, 0, 2, diagnostic))

    def _answer(self, caller: Caller, pdu: bytes) -> None:
        """Send a last PDU and read past what still comes, so that the peer sees it and not a reset."""
        self._drop(caller)
        caller.leaving, caller.deadline = True, time.monotonic() + _LINGER_S
        self._leaving[caller] = None
        with contextlib.suppress(OSError):
            caller.socket.send(pdu)
            if isinstance(caller.socket, ssl.SSLSocket):
                with contextlib.suppress(OSError, ValueError):
                    caller.socket.unwrap()  # its answer is not waited for
            socket.socket.shutdown(caller.socket, socket.SHUT_WR)

    def _give_on(self, caller: Caller) -> None:
        self._drop(caller)
        connection: Connection
        if isinstance(caller.socket, ssl.SSLSocket):
            connection = TlsConnection(caller.socket, send_s=self._send_s)
        else:
            caller.socket = connection = PlainConnection(caller.socket)
            connection.setblocking(True)
            # A peer that does not read our answers must not hold the thread; SO_SNDTIMEO leaves reading alone
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(self._send_s), 0))
        answer = self._enter(connection, caller.address, bytes(caller.request))
        if answer is not None:
            if isinstance(connection, socket.socket):
                connection.setblocking(False)
            self._selector.register(caller.socket, selectors.EVENT_READ, caller)
            self._answer(caller, answer)

    def _tell(self, caller: Caller, reason: str, error: OSError | None = None) -> None:
        self._turned(Turned(str(caller.address[0]), reason, error))

    def _drop(self, caller: Caller) -> None:
        """Take it out of the books; its socket stays."""
        if caller in self._waiting or caller in self._parked:
            self._bytes -= len(caller.request)
        address = str(caller.address[0])
        if caller in self._parked:
            self._crowds.leave(caller, address=address, caller=caller.waits_as)
        for queue in (self._waiting, self._parked, self._leaving):
            queue.pop(caller, None)
        if (crowd := self._by_address.get(address)) is not None:
            crowd.pop(caller, None)
            if not crowd:
                del self._by_address[address]

    def _forget(self, caller: Caller) -> None:
        self._drop(caller)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(caller.socket)
        caller.socket.close()
