"""C-STORE out: stored instances to a peer, their bytes as they are, one association for a batch.

pynetdicom negotiates and reads; the data sets are written past it, so that none is held whole in memory or on a disk in the clear.

References
----------
DICOM PS3.4 Annex B (Storage Service Class), Table B.2-1 (status), PS3.5 Section 10.1 (the default transfer syntax)
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol, cast

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dsutils import decode, encode
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AssociationSocket

from dicom_node.dimse import message
from dicom_node.dimse.calling import TlsSocket
from dicom_node.dimse.library import quiet
from dicom_node.dimse.receive import ReceiveLimits, UpperLayer
from dicom_node.errors import DeliveryError, PeerUnreachable, Refused
from dicom_node.peers import Peer
from dicom_node.security import ClientTls
from storage.errors import StorageError
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from storage.records import Summary

log = structlog.get_logger(__name__)

_VERIFICATION = "1.2.840.10008.1.1"
_CONTEXTS = 128  # PS3.8 9.3.2.2: odd numbers of one byte
_FRAGMENT = 131_060
_CONVERTIBLE = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian), str(DeflatedExplicitVRLittleEndian))
_CONVERSION_BYTES = 64 * 1024**2
_DUPLICATE = 0x0111  # Duplicate SOP Instance: the peer has it, from a delivery whose answer was lost
_WARNINGS = frozenset({0x0001, 0x0107, 0x0116, _DUPLICATE})


class Sendable(Protocol):
    """One instance to send."""

    @property
    def summary(self) -> Summary:
        """Its identity and transfer syntax."""

    def chunks(self) -> Iterator[bytes]:
        """Its data set bytes as stored."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The peer has it."""

    status: int
    """Status (0000,0900): 0000, or a warning (0xBxxx and the general ones)."""
    comment: str = ""
    """Error Comment (0000,0902), the peer's words: for the encrypted index, never for a log."""


Outcome = Stored | DeliveryError | StorageError


class Caller(AE):
    """An application entity for one association, read by our `UpperLayer`.

    It keeps the association's socket, which the library leaves open when a call fails. With `tls` it calls `peer` by TLS.
    """

    def __init__(self, ae_title: str, *, connect_s: float, answer_s: float, peer: Peer | None = None, tls: ClientTls | None = None) -> None:
        super().__init__(ae_title=ae_title)
        self.connection_timeout = connect_s
        self.acse_timeout = connect_s
        self.dimse_timeout = answer_s
        self.network_timeout = None
        self.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        self.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        self._answer_s = answer_s
        self._limits = ReceiveLimits(maximum_pdu_length=self.maximum_pdu_size)
        self._peer = peer
        self._tls = tls
        self._connections: list[socket.socket] = []
        self._secured: TlsSocket | None = None

    def _create_socket(self, *arguments: Any, **settings: Any) -> AssociationSocket:
        association: Association = arguments[0]
        association.dul = UpperLayer(association, limits=self._limits)
        association.acse_timeout = self.acse_timeout  # their setters reach into the provider, which is a new one
        association.network_timeout = self.network_timeout
        if self._tls is not None and self._peer is not None:
            wrapper: AssociationSocket = TlsSocket(
                association, arguments[1], tls=self._tls, peer=self._peer, send_s=max(self._answer_s, 1.0)
            )
            self._secured = cast("TlsSocket", wrapper)
        else:
            wrapper = super()._create_socket(*arguments, **settings)
        connection = cast("socket.socket", wrapper.socket)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", max(int(self._answer_s), 1), 0))
        self._connections.append(connection)
        return wrapper

    def close(self, association: Association) -> None:
        """Release, or abort what cannot be released; threads and sockets are gone on return."""
        association._reactor_checkpoint.set()  # noqa: SLF001 - see library.py
        if association.is_established:
            association.release()
        if not association.is_released and not association.is_aborted and not association.is_rejected:
            association.abort()
        association.dul.kill_dul()
        for thread in (association, association.dul):
            with contextlib.suppress(RuntimeError):  # never started: the call failed before
                thread.join()
        for connection in self._connections:
            connection.close()
        if self._secured is not None:
            self._secured.release()

    @property
    def tls_fault(self) -> str:
        """What was wrong with TLS, and the remedy; empty: nothing."""
        return self._secured.fault if self._secured is not None else ""


class StorageSCU:
    """Sends by C-STORE.

    Parameters
    ----------
    ae_title
        Ours.
    connect_s, answer_s
        Longest wait for connection and association, and for each answer.
    tls
        Whom we believe and what we show, for peers that are called by TLS. None: these cannot be called.
    """

    def __init__(self, *, ae_title: str, connect_s: float = 10.0, answer_s: float = 30.0, tls: ClientTls | None = None) -> None:
        quiet()
        self._tls = tls
        self._ae_title = ae_title
        self._connect_s = connect_s
        self._answer_s = answer_s

    def echo(self, peer: Peer) -> None:
        """Verify the way to a peer (C-ECHO).

        Raises
        ------
        PeerUnreachable
            It does not answer, or not with Success.
        """
        with self._association(peer, [build_context(_VERIFICATION)]) as association:
            status = association.send_c_echo() if association.is_established else Dataset()
            if "Status" not in status or status.Status != 0:
                raise PeerUnreachable(f"{_name(peer)} accepted the association but did not answer C-ECHO with Success")

    def store(
        self, peer: Peer, instances: Sequence[Sendable], *, sent: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Sendable, Outcome]]:
        """Send instances in order; each answer is given as it comes.

        Parameters
        ----------
        peer
            Where to.
        instances
            What; opened one at a time.
        sent
            Called after each instance is on the wire, before its answer.

        Yields
        ------
        tuple
            The instance, and `Stored`; `Refused`; `PeerUnreachable` when the association broke at it; or the StorageError that
            reading it raised. After the latter two the association is gone and the rest of the batch is not tried.

        Raises
        ------
        PeerUnreachable
            No association could be established.
        """
        for batch in _batches(instances):
            for instance, outcome in self._store_batch(peer, batch, sent):
                yield instance, outcome
                if isinstance(outcome, PeerUnreachable | StorageError):
                    return

    def _store_batch(self, peer: Peer, instances: Sequence[Sendable], sent: Callable[[], None]) -> Iterator[tuple[Sendable, Outcome]]:
        with self._association(peer, _contexts(instances)) as association:
            _pause(association)
            for number, instance in enumerate(instances, start=1):
                try:
                    outcome: Outcome = self._store_one(association, peer, instance, number % 0x10000, sent)
                except (DeliveryError, StorageError) as error:
                    outcome = error
                except OSError as error:
                    outcome = PeerUnreachable(f"{_name(peer)} closed the connection within an instance; look at its log")
                    outcome.__cause__ = error
                broken = isinstance(outcome, PeerUnreachable | StorageError)
                if broken:
                    association.abort()
                yield instance, outcome
                if broken:
                    return

    @contextlib.contextmanager
    def _association(self, peer: Peer, contexts: list[PresentationContext], **settings: Any) -> Iterator[Association]:
        """Associate for the length of a block. The association is not established where the peer accepted none of the contexts.

        `settings` go to pynetdicom's ``associate``: negotiation items, handlers of what the peer asks.

        Raises
        ------
        PeerUnreachable
            No connection, or a rejection.
        """
        if not peer.callable or not peer.port:
            raise PeerUnreachable(f"{_name(peer)} has no address; give its [[peers]] entry a host and a port")
        if peer.tls and self._tls is None:
            raise PeerUnreachable(f"{_name(peer)} is called by TLS, and whom to believe is not configured; set authorities in [dimse] tls")
        try:
            found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise PeerUnreachable(f"{_name(peer)}: the host name {peer.host} does not resolve; correct it or the name service") from error
        fault = ""
        for address in dict.fromkeys(str(entry[4][0]) for entry in found):
            tls = self._tls if peer.tls else None
            caller = Caller(self._ae_title, connect_s=self._connect_s, answer_s=self._answer_s, peer=peer, tls=tls)
            association = caller.associate(
                address, peer.port, contexts=contexts, ae_title=peer.ae_title, max_pdu=caller.maximum_pdu_size, **settings
            )
            try:
                if association.is_established or association.rejected_contexts:
                    yield association
                    return
                if association.is_rejected:
                    answer = cast("A_ASSOCIATE", association.acceptor.primitive)
                    raise PeerUnreachable(
                        f"{_name(peer)} rejected the association ({answer.reason_str}); "
                        f"let it know our AE title {self._ae_title}, and check the AE title we call it by, {peer.ae_title}"
                    )
                fault = caller.tls_fault or fault
            finally:
                caller.close(association)
        if fault:
            raise PeerUnreachable(f"{_name(peer)}: {fault}")
        raise PeerUnreachable(f"{_name(peer)} did not answer at {peer.host} port {peer.port}; is it running, and is the port open?")

    def _store_one(self, association: Association, peer: Peer, instance: Sendable, message_id: int, sent: Callable[[], None]) -> Stored:
        context, chunks = _fit(association, peer, instance)
        maximum_length = association.acceptor.maximum_length or 0
        room = min(message.payload_room(maximum_length) or _FRAGMENT, _FRAGMENT)
        fragments = _fragments(chunks, room)
        first = next(fragments)  # unreadable instances are found before the peer hears of them
        sock = _socket(association, peer)
        context_id = cast("int", context.context_id)
        command = message.encode_command(
            {
                message.AFFECTED_SOP_CLASS_UID: message.ui(instance.summary.sop_class_uid),
                message.COMMAND_FIELD: message.us(message.C_STORE_RQ),
                message.MESSAGE_ID: message.us(message_id),
                message.PRIORITY: message.us(0),  # MEDIUM
                message.COMMAND_DATA_SET_TYPE: message.us(0x0001),
                message.AFFECTED_SOP_INSTANCE_UID: message.ui(instance.summary.sop_instance_uid),
            }
        )
        sock.sendall(b"".join(message.pdata(context_id, message.COMMAND, command, maximum_length)))
        _send_fragment(sock, context_id, *first)
        for fragment in fragments:
            _send_fragment(sock, context_id, *fragment)
        sent()
        _, answer = association.dimse.get_msg(block=True)
        if answer is None:
            raise PeerUnreachable(f"{_name(peer)} gave no answer within {self._answer_s:g} s, or aborted; look at its log")
        if not answer.is_valid_response or answer.MessageIDBeingRespondedTo != message_id:
            raise PeerUnreachable(f"{_name(peer)} answered what was not asked; look at its log")
        status = int(cast("int", answer.Status))
        comment = str(getattr(answer, "ErrorComment", None) or "")
        if status == 0 or status >> 12 == 0xB or status in _WARNINGS:
            return Stored(status, comment)
        raise Refused(
            status, f"{_name(peer)} refused the instance with status {status:04X}; PS3.4 Table B.2-1 and its log say why", comment
        )


def _socket(association: Association, peer: Peer) -> socket.socket:
    sock = association.dul.socket.socket if association.dul.socket is not None else None
    if sock is None:
        raise PeerUnreachable(f"{_name(peer)} closed the connection")
    return sock


def _name(peer: Peer) -> str:
    return f"peer {peer.name or peer.ae_title}"


def _batches(instances: Sequence[Sendable]) -> Iterator[list[Sendable]]:
    """Cut a batch where its presentation contexts would not fit one association."""
    batch: list[Sendable] = []
    pairs: set[tuple[str, str]] = set()
    for instance in instances:
        pair = (instance.summary.sop_class_uid, instance.summary.transfer_syntax_uid)
        if pair not in pairs and 2 * (len(pairs) + 1) > _CONTEXTS:
            yield batch
            batch, pairs = [], set()
        pairs.add(pair)
        batch.append(instance)
    if batch:
        yield batch


def _contexts(instances: Sequence[Sendable]) -> list[PresentationContext]:
    """Propose each class in the syntax it is stored in; and, where we could convert, in the plain ones, in a context of their own."""
    wanted: dict[tuple[str, tuple[str, ...]], None] = {}
    for instance in instances:
        sop_class_uid, syntax = instance.summary.sop_class_uid, instance.summary.transfer_syntax_uid
        wanted[sop_class_uid, (syntax,)] = None
        if syntax in _CONVERTIBLE:
            wanted[sop_class_uid, tuple(plain for plain in _CONVERTIBLE[:2] if plain != syntax)] = None
    return [build_context(sop_class_uid, list(syntaxes)) for sop_class_uid, syntaxes in wanted]


def _fit(association: Association, peer: Peer, instance: Sendable) -> tuple[PresentationContext, Iterator[bytes]]:
    """Choose the accepted context, and the bytes to send in it: as stored if at all possible.

    Raises
    ------
    Refused
        No accepted context fits; the reason names the one that was proposed.
    """
    summary = instance.summary
    accepted = [context for context in association.accepted_contexts if context.abstract_syntax == summary.sop_class_uid]
    for context in accepted:
        if context.transfer_syntax[0] == summary.transfer_syntax_uid:
            return context, instance.chunks()
    if summary.transfer_syntax_uid in _CONVERTIBLE and summary.byte_count <= _CONVERSION_BYTES:
        for context in accepted:
            if context.transfer_syntax[0] in _CONVERTIBLE:
                return context, iter((_convert(instance, context.transfer_syntax[0]),))
    raise Refused(
        0,
        f"{_name(peer)} accepts no presentation context for {UID(summary.sop_class_uid).name} "
        f"in {UID(summary.transfer_syntax_uid).name}; enable it there",
    )


def _convert(instance: Sendable, wanted: UID) -> bytes:
    """Re-encode a small data set between the little endian syntaxes; its values stay."""
    stored = UID(instance.summary.transfer_syntax_uid)
    data_set = decode(BytesIO(b"".join(instance.chunks())), stored.is_implicit_VR, True, stored.is_deflated)
    encoded = encode(data_set, wanted.is_implicit_VR, True, wanted.is_deflated)
    if encoded is None:
        raise Refused(0, f"the instance could not be converted to {wanted.name}; enable {stored.name} at the peer")
    return bytes(encoded)


def _fragments(chunks: Iterator[bytes], room: int) -> Iterator[tuple[bytes, bool]]:
    """Cut a stream of bytes into fragments of `room` bytes, the last shorter; each with whether it is the last."""
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        start = 0
        while len(pending) - start > room:
            yield bytes(pending[start : start + room]), False
            start += room
        del pending[:start]
    yield bytes(pending), True


def _send_fragment(sock: socket.socket, context_id: int, fragment: bytes, last: bool) -> None:
    sock.sendall(message.pdata_header(context_id, message.LAST if last else 0, len(fragment)) + fragment)


def _pause(association: Association) -> None:
    """Keep the association's own thread from taking the answers, as its send methods do."""
    association._reactor_checkpoint.clear()  # noqa: SLF001 - see library.py
    while association.is_alive() and not association._is_paused:  # noqa: SLF001
        time.sleep(0.001)
