"""Takes over the reading of an association's socket from pynetdicom, so that data sets flow on in pieces as they arrive.

pynetdicom keeps negotiation, state machine, release, abort and every message but C-STORE. What changes, all in `UpperLayer`:

- PDUs are read into one buffer, their lengths judged at the 6-byte header, before anything is buffered;
- the thread waits in ``poll`` instead of looking every millisecond, and is woken when something is to be sent;
- data-set fragments of C-STORE requests go straight to a `StoreOperation`, whose status is answered here;
- segments are acknowledged at once (``TCP_QUICKACK``): DCMTK's senders leave Nagle on and wait 40 ms twice an instance otherwise.

References
----------
DICOM PS3.8 Section 9.2 (state machine), 9.3 (PDU structure), Table 9-26 (A-ABORT)
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_CANCEL
from pynetdicom.dul import DULServiceProvider
from pynetdicom.fsm import StateMachine
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AssociationSocket

from dicom_node.dimse.connection import TlsConnection
from dicom_node.dimse.message import COMMAND, LAST, MessageReader, ProtocolViolation, StoreOperation, StoreRequest, pdata

log = structlog.get_logger(__name__)

A_ASSOCIATE_RQ_TYPE, P_DATA_TYPE, A_RELEASE_RQ_TYPE, A_RELEASE_RP_TYPE, A_ABORT_TYPE = 0x01, 0x04, 0x05, 0x06, 0x07
_HEADER = 6
_READ_AHEAD = 16384
_POLL_MS = 250
LINGER_S = 2.0
_REQUESTS_AHEAD = 16
_BYTES_AHEAD = 1024**2
_OVER = frozenset({"Sta1", "Sta13"})
_LOCAL_EVENTS = frozenset({"Evt7", "Evt8", "Evt9", "Evt11", "Evt14", "Evt15"})


def unobserved(_event: str, **_labels: object) -> None:
    """Count nothing: nobody asked for metrics."""


@dataclass(frozen=True, slots=True)
class ReceiveLimits:
    """What one association may cost before it is aborted."""

    maximum_pdu_length: int = 262_144
    """Announced to the peer; a longer P-DATA-TF is a violation."""
    handshake_pdu_length: int = 131_072
    """Of every PDU that is not P-DATA."""
    handshake_s: float = 10.0
    """From connection to A-ASSOCIATE-RQ complete, absolute."""
    idle_s: float = 60.0
    """Without a whole PDU from the peer, thus also a minimum rate within one."""
    minimum_bytes_per_s: int = 1024
    """Of a message that has begun, over `idle_s` of waiting for the peer."""
    credentials_s: float = 30.0
    """How often it is looked whether the certificates and tokens of open associations are still good."""
    command_bytes: int = 65_536
    foreign_bytes: int = 16 * 1024**2
    """Data set (identifier) of a message other than C-STORE."""
    foreign_bytes_of_all: int = 32 * 1024**2
    """Data sets of messages other than C-STORE that all associations of the process hold at once; the library needs twice as much."""


class Waker:
    """Wakes a thread that waits in ``poll``; closing it while others wake it is safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def descriptor(self) -> int:
        """The file descriptor to poll for reading."""
        if self._descriptor is None:
            raise ValueError("the waker is closed")
        return self._descriptor

    def wake(self) -> None:
        """Let the waiting thread go on; nothing once closed."""
        with self._lock:
            if self._descriptor is not None:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Forget the calls to `wake` so far."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


class Room:
    """Counts what all associations of a process hold in memory together.

    Parameters
    ----------
    byte_count
        The most.
    """

    def __init__(self, byte_count: int) -> None:
        self._free = byte_count
        self._lock = threading.Lock()

    def take(self, byte_count: int) -> bool:
        """Take room; False when there is not so much."""
        with self._lock:
            if byte_count > self._free:
                return False
            self._free -= byte_count
            return True

    def give(self, byte_count: int) -> None:
        """Give room back."""
        with self._lock:
            self._free += byte_count


class Machine(StateMachine):
    """pynetdicom's state machine, but what our side still wants to say when the association is over goes nowhere, and is no error.

    The association's own thread may answer, accept or abort at the moment at which the peer breaks the protocol or goes away.
    """

    def do_action(self, event: str) -> None:
        """Do what an event asks for in the current state."""
        if event in _LOCAL_EVENTS and self.current_state in _OVER:
            with contextlib.suppress(queue.Empty):
                self.dul.to_provider_queue.get(block=False)
            return
        super().do_action(event)


class Turnstile(threading.Event):
    """The event at which pynetdicom's association thread passes in each turn of its loop; here it waits for news, not a millisecond.

    Two hundred idle associations would keep a processor busy otherwise. A turn comes at least every quarter second: the thread
    also looks at its idle timer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._news = threading.Event()
        self.set()

    def ring(self) -> None:
        """Tell the thread that something came."""
        self._news.set()

    def set(self) -> None:
        """Open; whoever waits passes."""
        super().set()
        self._news.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for news, then as long as the turnstile is closed."""
        self._news.wait(_POLL_MS / 1000)
        self._news.clear()
        return super().wait(timeout)


class BellQueue(queue.Queue[Any]):
    """A queue that rings when something is put in."""

    def __init__(self, ring: Callable[[], None]) -> None:
        super().__init__()
        self._ring = ring

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put, and ring."""
        super().put(item, block, timeout)
        self._ring()


class RequestQueue(BellQueue):
    """Messages that wait to be served; C-CANCEL-RQs wait elsewhere, and those that the library has no place for there come here."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put, and ring.

        Raises
        ------
        ProtocolViolation
            More than ten C-CANCEL-RQs since the last request.
        """
        if isinstance(item[1], C_CANCEL):
            raise ProtocolViolation("too many cancellations of nothing")
        super().put(item, block, timeout)


class PDUBuffer:
    """One growing buffer that PDUs are read into; the views it gives out are valid until the next `fill`.

    Parameters
    ----------
    check
        Judges a PDU by type and length as soon as its header is there; raises ProtocolViolation.
    received
        What was read of the connection before.
    """

    def __init__(self, check: Callable[[int, int], None], received: bytes = b"") -> None:
        self._check = check
        self._buffer = bytearray(max(_READ_AHEAD, len(received)))
        self._buffer[: len(received)] = received
        self._start = 0
        self._end = len(received)

    def take(self) -> memoryview | None:
        """Return the next whole PDU, header included; None when more bytes are needed.

        Raises
        ------
        ProtocolViolation
            The header is of no PDU that may come now.
        """
        total = self._wanted()
        if total is None or self._end - self._start < total:
            return None
        pdu = memoryview(self._buffer)[self._start : self._start + total]
        self._start += total
        return pdu

    def fill(self, sock: socket.socket) -> int:
        """Read once what the socket has, towards the next PDU. Returns the number of bytes; 0 when the peer closed.

        Raises
        ------
        BlockingIOError
            It has no whole record of TLS yet.
        OSError
            The connection broke.
        """
        have = self._end - self._start
        wanted = self._wanted() or _HEADER
        if self._start and (have == 0 or self._start + max(wanted, _READ_AHEAD) > len(self._buffer)):
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
        if len(self._buffer) < wanted:
            # room for the next one too: of a large data set each read takes what the kernel has
            self._buffer = self._buffer[:have] + bytearray(2 * wanted - have)
        with memoryview(self._buffer) as view:
            count = sock.recv_into(view[self._end :])
        self._end += count
        return count

    def discard(self) -> None:
        """Forget what was read, and give the memory back."""
        self._buffer = bytearray(_READ_AHEAD)
        self._start = self._end = 0

    def _wanted(self) -> int | None:
        if self._end - self._start < _HEADER:
            return None
        kind, length = struct.unpack_from(">BxL", self._buffer, self._start)
        self._check(kind, length)
        return _HEADER + int(length)


class UpperLayer(DULServiceProvider):
    """The upper layer provider of an association, of either role; runs in a thread of its own, as its parent does.

    The library's own waits for ever for the rest of a PDU that never comes, and takes its thread's caller with it.

    Parameters
    ----------
    assoc
        The association it serves.
    limits
        See `ReceiveLimits`.
    begin_store
        Opens a `StoreOperation` for a C-STORE-RQ received in an accepted presentation context; does not raise StorageError.
        None where we are the sender.
    received
        What was read of the connection before.
    observe
        Told ``association.violation`` with ``reason``.
    room
        For data sets of messages other than C-STORE, shared by associations; None: each has all that its limits allow.
    linger_s
        How long to wait for a peer to hang up after our last PDU.
    """

    def __init__(
        self,
        assoc: Association,
        *,
        limits: ReceiveLimits,
        received: bytes = b"",
        begin_store: Callable[[PresentationContext, StoreRequest], StoreOperation] | None = None,
        observe: Callable[..., None] = unobserved,
        room: Room | None = None,
        linger_s: Callable[[], float] = lambda: LINGER_S,
    ) -> None:
        super().__init__(assoc)
        self.state_machine = Machine(self)
        self.socket: AssociationSocket
        self._limits = limits
        self._observe = observe
        self._waker = Waker()
        self._poller = select.poll()
        self._poller.register(self._waker.descriptor, select.POLLIN)
        self._polled: int | None = None
        self._buffer = PDUBuffer(self._check_header, received)
        self._waited_s = 0.0
        self._came = 0
        self._diagnostic = 0
        self._linger_s = linger_s
        self._room = room or Room(limits.foreign_bytes * (_REQUESTS_AHEAD + 2))
        self._holding = threading.Lock()
        self._held = self._held_of_last = 0
        self._closing_since: float | None = None
        self._messages = MessageReader(
            known_context=lambda context_id: context_id in assoc._accepted_cx,  # noqa: SLF001 - see library.py
            begin_store=None if begin_store is None else lambda number, request: begin_store(assoc._accepted_cx[number], request),  # noqa: SLF001
            answer=self._answer,
            hand_on=self._hand_on,
            command_bytes=limits.command_bytes,
            foreign_bytes=limits.foreign_bytes,
        )

    # What other threads call

    def send_pdu(self, primitive: Any) -> None:
        """Queue a primitive for the peer and wake the reader, which is also the writer."""
        super().send_pdu(primitive)
        self._waker.wake()

    def kill_dul(self) -> None:
        """End the thread at its next turn."""
        super().kill_dul()
        self._waker.wake()

    def relieve(self) -> None:
        """Give back the room of requests that were served, when no other waits; read on, if reading paused."""
        with self._holding:
            if self.assoc.dimse.msg_queue.empty():
                self._room.give(self._held - self._held_of_last)
                self._held = self._held_of_last
        self._waker.wake()

    # The thread

    def run_reactor(self) -> None:
        """Run until the association is over; nothing of an unfinished C-STORE remains, however it ended."""
        try:
            super().run_reactor()
        except Exception:  # an edge: whatever pynetdicom's state machine raises ends this association and no more
            log.exception("association.failed")
            self._observe("association.failed")
            self.socket.send(bytes((A_ABORT_TYPE, 0)) + struct.pack(">L", 4) + bytes((0, 0, 2, 0)))
            self.assoc.is_aborted = True
            self.assoc.is_established = False
            self.assoc._kill = True  # noqa: SLF001 - as pynetdicom does itself for an exception while reading
        finally:
            self._abandon()
            self._kill_thread = True
            with self._holding:
                self._room.give(self._held)
                self._held = self._held_of_last = 0
            self._waker.close()
            self._buffer.discard()
            self.socket._shutdown_socket()  # noqa: SLF001
            self.assoc.dimse.msg_queue.put((None, None))  # whoever waits for an answer
            self.to_user_queue.put(None)  # type: ignore[arg-type] # else the association's thread waits out the handshake time for a peer that is gone

    def _is_transport_event(self) -> bool:
        """Wait for bytes, something to send, or a quarter second; deal with what came. True when the peer sent a whole PDU."""
        sock = self.socket.socket
        if sock is None or not self.socket._is_connected:  # noqa: SLF001
            return False
        if self.state_machine.current_state == "Sta13":
            return self._await_close(sock)
        progressed = False
        while True:
            try:
                pdu = self._buffer.take()
            except ProtocolViolation as violation:
                self._violated(violation)
                return True
            if pdu is not None:
                progressed = True
                with pdu:
                    if not self._receive(pdu):
                        return True
                self._idle_timer.restart()
            elif self._readable(sock):
                try:
                    came = self._fill(sock)
                except BlockingIOError:
                    continue
                if not came:
                    self._abandon()
                    self.event_queue.put("Evt17")  # Transport connection closed
                    return True
                self._came += came
                if self.state_machine.current_state != "Sta6":
                    return progressed  # the ARTIM timer is looked at between reads
            else:
                return progressed

    def _read_pdu_data(self) -> None:
        """Unused: `_is_transport_event` was its only caller."""
        raise NotImplementedError

    def _send(self, pdu: Any) -> None:
        """Send a PDU; the A-ABORT after a violation says what the violation was (the state machine's own says nothing)."""
        if isinstance(pdu, A_ABORT_RQ) and self._diagnostic:
            pdu.source, pdu.reason_diagnostic = 2, self._diagnostic
        super()._send(pdu)

    # Parts of it

    def _readable(self, sock: socket.socket) -> bool:
        """Wait until the socket has bytes (or its end): True. False when there is something else to do, or nothing."""
        if self._kill_thread or self.to_provider_queue.queue or not self.event_queue.empty():
            return False
        if self._crowded():
            select.select([self._waker.descriptor], [], [], _POLL_MS / 1000)
            self._waker.clear()
            return False
        if isinstance(sock, TlsConnection) and sock.pending():
            return True
        if self._polled is None:
            self._polled = sock.fileno()
            self._poller.register(self._polled, select.POLLIN)
        began = time.monotonic()
        ready = [descriptor for descriptor, _ in self._poller.poll(_POLL_MS)]
        self._waited_s += time.monotonic() - began
        if self._waker.descriptor in ready:
            self._waker.clear()
            return False
        return self._fast_enough() and bool(ready)

    def _crowded(self) -> bool:
        """Whether requests wait that must be served before another is read: who sends more than he may is not read meanwhile.

        PS3.7 D.3.3.3: one at a time unless more are negotiated, which we never do. C-CANCEL waits in no queue.
        """
        waiting = self.assoc.dimse.msg_queue.qsize()
        return waiting >= _REQUESTS_AHEAD or (waiting > 0 and self._held >= _BYTES_AHEAD)

    def _fast_enough(self) -> bool:
        """Judge the peer by what came while it was waited for: a message that trickles in holds a slot and a place in the archive."""
        if self._waited_s < self._limits.idle_s:
            return True
        slow = self._messages.busy and self._came < self._waited_s * self._limits.minimum_bytes_per_s
        self._waited_s, self._came = 0.0, 0
        if slow:
            self._violated(ProtocolViolation("message slower than the minimum rate"))
        return not slow

    def _fill(self, sock: socket.socket) -> int:
        try:
            count = self._buffer.fill(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # the kernel forgets it after each use
        except BlockingIOError:
            raise
        except OSError:
            return 0
        return count

    def _check_header(self, kind: int, length: int) -> None:
        """Judge a PDU by its header (PS3.8 Section 9.3), before its body is read."""
        if not A_ASSOCIATE_RQ_TYPE <= kind <= A_ABORT_TYPE:
            raise ProtocolViolation("unrecognised PDU type", 1)
        established = self.state_machine.current_state == "Sta6"
        limit = self._limits.maximum_pdu_length if kind == P_DATA_TYPE and established else self._limits.handshake_pdu_length
        if length > limit:
            raise ProtocolViolation("PDU longer than announced or allowed")
        if kind in (A_RELEASE_RQ_TYPE, A_RELEASE_RP_TYPE, A_ABORT_TYPE) and length != 4:
            raise ProtocolViolation("release or abort PDU of a length other than 4")

    def _receive(self, pdu: memoryview) -> bool:
        """Deal with a whole PDU. False when an event waits for the state machine."""
        kind = pdu[0]
        try:
            if kind == P_DATA_TYPE and self.state_machine.current_state == "Sta6":
                self._idle_timer.stop()  # it measures the peer's silence, not our work
                if not self._messages.busy:
                    self._waited_s, self._came = 0.0, 0
                self._messages.feed(pdu[_HEADER:])
                return self.event_queue.empty()
            decoded, event = self._decode(pdu)
        except ProtocolViolation as violation:
            self._violated(violation)
            return False
        self._abandon()
        self.event_queue.put(event)
        self._recv_pdu.put(decoded)
        return False

    def _decode(self, pdu: memoryview) -> tuple[Any, str]:
        """Let pynetdicom decode a PDU; what it cannot is a violation (its decoders raise anything)."""
        if pdu[0] == A_RELEASE_RQ_TYPE and self._messages.busy:
            raise ProtocolViolation("release within a message", 2)
        try:
            decoded, event = self._decode_pdu(bytearray(pdu))
            contexts = decoded.to_primitive().presentation_context_definition_list if isinstance(decoded, A_ASSOCIATE_RQ) else None
        except Exception as error:  # an edge: bytes of a stranger in a library's decoder
            raise ProtocolViolation("PDU cannot be decoded") from error
        if contexts is not None and not 0 < len({context.context_id for context in contexts}) == len(contexts):
            raise ProtocolViolation("A-ASSOCIATE-RQ without, or with repeated, presentation contexts")
        return decoded, event

    def _hand_on(self, context_id: int, control: int, fragment: bytes) -> None:
        """Give a fragment of a message other than C-STORE to pynetdicom's DIMSE provider, as its state machine does (DT-2)."""
        if not control & COMMAND:
            with self._holding:
                if not self._room.take(len(fragment)):
                    raise ProtocolViolation("no room for the data set of another request; all associations together hold too many", 0)
                self._held += len(fragment)
                self._held_of_last = 0 if control & LAST else self._held_of_last + len(fragment)
        primitive = P_DATA()
        primitive.presentation_data_value_list.append((context_id, bytes((control,)) + fragment))
        try:
            self.assoc.dimse.receive_primitive(primitive)
        except ProtocolViolation:
            raise
        except Exception as error:  # an edge: see _decode
            raise ProtocolViolation("message cannot be decoded") from error

    def _answer(self, context_id: int, command: bytes) -> None:
        for pdu in pdata(context_id, COMMAND, command, self.assoc.requestor.maximum_length or 0):
            self.socket.send(pdu)

    def _violated(self, violation: ProtocolViolation) -> None:
        self._abandon()
        self._diagnostic = violation.diagnostic
        log.warning("association.violation", reason=str(violation))
        self._observe("association.violation", reason=str(violation))
        self.event_queue.put("Evt19")  # Unrecognized or invalid PDU received

    def _await_close(self, sock: socket.socket) -> bool:
        """Sta13: read past what still comes until the peer closes, so that it sees our last PDU and not a reset."""
        if self._closing_since is None:
            self._closing_since = time.monotonic()
            self._buffer.discard()
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        if time.monotonic() - self._closing_since > self._linger_s():
            self.socket.close()
            return False
        if self._readable(sock):
            self._buffer.discard()
            with contextlib.suppress(BlockingIOError):
                if not self._fill(sock):
                    self.socket.close()
        return False

    def _abandon(self) -> None:
        try:
            self._messages.abandon()
        except Exception:  # an edge: the association is ending, and must end
            log.exception("intake.abort_failed")
