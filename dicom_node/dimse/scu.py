"""C-STORE out: stored instances to a peer, their bytes as they are, one association for a batch.

pynetdicom negotiates and reads; the data sets are written past it, so that none is held whole in memory or on a disk in the clear.

References
----------
DICOM PS3.4 Annex B (Storage Service Class), Table B.2-1 (status), PS3.5 Section 10.1 (the default transfer syntax)
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import decode, encode
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AssociationSocket

from dicom_node.dimse import message
from dicom_node.dimse.calling import TlsSocket
from dicom_node.dimse.connection import Outflow, Pace
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
_MOVE_ORIGINATOR_AE_TITLE, _MOVE_ORIGINATOR_MESSAGE_ID = 0x1030, 0x1031
_LOOK_S, _PATIENCE_S = 0.25, 0.5
_Proposal: TypeAlias = tuple[str, tuple[str, ...]]
DUPLICATE = 0x0111
"""Duplicate SOP Instance: something is stored under this UID there, perhaps other content. What it means the caller has to know."""
_WARNINGS = frozenset({0x0001, 0x0107, 0x0116})


class Sendable(Protocol):
    """One instance to send."""

    @property
    def summary(self) -> Summary:
        """Its identity and transfer syntax."""

    def chunks(self) -> Iterator[bytes]:
        """Its data set bytes as stored."""


@runtime_checkable
class Convertible(Protocol):
    """An instance that converts itself where the receiver lacks its transfer syntax."""

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Transfer syntaxes that it can be had in besides its own, the best first."""

    def converted(self, transfer_syntax_uid: str) -> Iterator[bytes]:
        """Its data set bytes in one of them; raises StorageError where that turns out to be impossible."""


@dataclass(frozen=True, slots=True)
class MoveOriginator:
    """On whose behalf we send: the requestor of a C-MOVE (PS3.7 9.1.1.1.7)."""

    ae_title: str
    message_id: int


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
        self,
        peer: Peer,
        instances: Sequence[Sendable],
        *,
        sent: Callable[[], None] = lambda: None,
        originator: MoveOriginator | None = None,
        resume: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Generator[tuple[Sendable, Outcome], None, None]:
        """Send instances in order; each answer is given as it comes.

        Parameters
        ----------
        peer
            Where to.
        instances
            What; opened one at a time.
        sent
            Called after each instance is on the wire, before its answer.
        originator
            The requestor of the C-MOVE that this is for.
        resume
            Go on after an instance that could not be read, or at which the association broke, on a new one if need be.
        wanted
            Asked often; once it says no, the association is aborted within a second.

        Yields
        ------
        tuple
            The instance, and `Stored`; `Refused`; `PeerUnreachable` when the association broke at it; or the StorageError that
            reading it raised. Unless `resume`, the association is gone after the latter two, and the rest of the batch is not tried.

        Raises
        ------
        PeerUnreachable
            No association could be established.
        """
        errand = _Errand(sent, originator, resume, wanted, Pace())
        for batch in _batches(instances):
            rest = batch
            while rest:
                done, broken = 0, False
                for instance, outcome in self._store_batch(peer, rest, errand):
                    done += 1
                    broken = isinstance(outcome, PeerUnreachable | StorageError)
                    yield instance, outcome
                if (broken and not resume) or not wanted():
                    return
                rest = rest[done:]

    def _store_batch(self, peer: Peer, instances: Sequence[Sendable], errand: _Errand) -> Iterator[tuple[Sendable, Outcome]]:
        """Send until the end, or until the association broke."""
        with self._association(peer, _contexts(instances)) as association:
            _pause(association)
            for number, instance in enumerate(instances, start=1):
                broken = False
                try:
                    prepared = _prepare(association, peer, instance)
                except (DeliveryError, StorageError) as error:
                    outcome: Outcome = error
                    broken = isinstance(error, PeerUnreachable) or (isinstance(error, StorageError) and not errand.resume)
                else:
                    try:
                        with contextlib.closing(prepared):
                            outcome = self._store_one(association, peer, instance, number % 0x10000, prepared, errand)
                    except (DeliveryError, StorageError) as error:
                        outcome = error
                    except OSError as error:
                        outcome = PeerUnreachable(f"{_name(peer)} closed the connection within an instance; look at its log")
                        outcome.__cause__ = error
                    broken = isinstance(outcome, PeerUnreachable | StorageError)
                if broken:
                    association.abort()
                yield instance, outcome
                if broken or not errand.wanted():
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
            raise PeerUnreachable(f"{_name(peer)} is called by TLS, and whom to believe is not configured; set tls.authorities")
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

    def _store_one(
        self, association: Association, peer: Peer, instance: Sendable, message_id: int, prepared: _Prepared, errand: _Errand
    ) -> Stored:
        sock = _socket(association, peer)

        def go_on() -> None:
            if not errand.wanted():
                raise PeerUnreachable(f"the sending to {_name(peer)} was cancelled within an instance")

        command = store_command(instance.summary, message_id, errand.originator)
        write_store(Outflow(sock, errand.pace), prepared, command, association.acceptor.maximum_length or 0, go_on)
        errand.sent()
        status, comment = self._await_answer(association, peer, message_id, errand)
        if is_stored(status):
            return Stored(status, comment)
        raise Refused(status, refusal(_name(peer), status), comment)

    def _await_answer(self, association: Association, peer: Peer, message_id: int, errand: _Errand) -> tuple[int, str]:
        """Return status and Error Comment; once the sending is not wanted any more, it is waited for no longer than half a second."""
        deadline = time.monotonic() + self._answer_s
        answer: Any = None
        while time.monotonic() < deadline:
            try:
                _, answer = association.dimse.msg_queue.get(timeout=min(_LOOK_S, self._answer_s))
                break
            except queue.Empty:
                if not errand.wanted():
                    deadline = min(deadline, time.monotonic() + _PATIENCE_S)
        if answer is None:
            raise PeerUnreachable(f"{_name(peer)} gave no answer within {self._answer_s:g} s, or aborted; look at its log")
        if not isinstance(answer, C_STORE) or not answer.is_valid_response or answer.MessageIDBeingRespondedTo != message_id:
            raise PeerUnreachable(f"{_name(peer)} answered what was not asked; look at its log")
        return int(cast("int", answer.Status)), str(getattr(answer, "ErrorComment", None) or "")


@dataclass(frozen=True, slots=True)
class _Errand:
    """How a batch is sent; see `StorageSCU.store`."""

    sent: Callable[[], None]
    originator: MoveOriginator | None
    resume: bool
    wanted: Callable[[], bool]
    pace: Pace


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An instance whose first bytes have been read: it can be, and it fits a context."""

    context_id: int
    first: bytes
    rest: Iterator[bytes]

    def close(self) -> None:
        """Give back what reading it holds: files, a decoder's turn."""
        if isinstance(self.rest, Generator):
            self.rest.close()


def is_stored(status: int) -> bool:
    """Whether a status of C-STORE says that the peer has the instance: Success, or a warning."""
    return status == 0 or status >> 12 == 0xB or status in _WARNINGS


def refusal(receiver: str, status: int) -> str:
    """Say what a status of C-STORE means that is a failure, or where that is said."""
    if status == DUPLICATE:
        return f"{receiver} has another instance of that UID (0111); compare the two, one of them has to go"
    return f"{receiver} refused the instance with status {status:04X}; PS3.4 Table B.2-1 and its log say why"


def store_command(summary: Summary, message_id: int, originator: MoveOriginator | None = None) -> bytes:
    """Encode a C-STORE-RQ (PS3.7 Table 9.3-1)."""
    elements = {
        message.AFFECTED_SOP_CLASS_UID: message.ui(summary.sop_class_uid),
        message.COMMAND_FIELD: message.us(message.C_STORE_RQ),
        message.MESSAGE_ID: message.us(message_id),
        message.PRIORITY: message.us(0),  # MEDIUM
        message.COMMAND_DATA_SET_TYPE: message.us(0x0001),
        message.AFFECTED_SOP_INSTANCE_UID: message.ui(summary.sop_instance_uid),
    }
    if originator is not None:
        title = originator.ae_title.encode("ascii", "replace")
        elements[_MOVE_ORIGINATOR_AE_TITLE] = title + b" " * (len(title) % 2)
        elements[_MOVE_ORIGINATOR_MESSAGE_ID] = message.us(originator.message_id)
    return message.encode_command(elements)


def prepare(context_id: int, chunks: Iterator[bytes]) -> _Prepared:
    """Read the first bytes of an instance: what cannot be read is found before the peer hears of it.

    Raises
    ------
    StorageError
        As reading it does.
    """
    return _Prepared(context_id, next(chunks, b""), chunks)


def write_store(sock: Any, prepared: _Prepared, command: bytes, maximum_length: int, go_on: Callable[[], None] = lambda: None) -> None:
    """Write a C-STORE-RQ and its data set in P-DATA-TF PDUs of at most `maximum_length` bytes (0: no limit).

    Parameters
    ----------
    go_on
        Called before each PDU of the data set; what it raises ends the writing.

    Raises
    ------
    OSError
        The peer is gone, or does not read.
    StorageError
        The rest could not be read; the association is of no use any more.
    """
    sock.sendall(b"".join(message.pdata(prepared.context_id, message.COMMAND, command, maximum_length)))
    room = min(message.payload_room(maximum_length) or _FRAGMENT, _FRAGMENT)
    for fragment, last in _fragments(itertools.chain((prepared.first,), prepared.rest), room):
        go_on()
        sock.sendall(message.pdata_header(prepared.context_id, message.LAST if last else 0, len(fragment)) + fragment)


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
    proposed: set[_Proposal] = set()
    for instance in instances:
        proposals = _proposals(instance)
        if len(proposed.union(proposals)) > _CONTEXTS:
            yield batch
            batch, proposed = [], set()
        proposed.update(proposals)
        batch.append(instance)
    if batch:
        yield batch


def _contexts(instances: Sequence[Sendable]) -> list[PresentationContext]:
    wanted = dict.fromkeys(proposal for instance in instances for proposal in _proposals(instance))
    return [build_context(sop_class_uid, list(syntaxes)) for sop_class_uid, syntaxes in wanted]


def _proposals(instance: Sendable) -> list[_Proposal]:
    """Propose the class in the syntax it is stored in; and, where it can be converted, in others, in a context of their own."""
    sop_class_uid, syntax = instance.summary.sop_class_uid, instance.summary.transfer_syntax_uid
    if isinstance(instance, Convertible):
        others = instance.alternatives
    else:
        others = tuple(plain for plain in _CONVERTIBLE[:2] if plain != syntax) if syntax in _CONVERTIBLE else ()
    return [(sop_class_uid, (syntax,)), *([(sop_class_uid, others)] if others else [])]


def _prepare(association: Association, peer: Peer, instance: Sendable) -> _Prepared:
    """Choose the accepted context, and the bytes to send in it: as stored if at all possible.

    Raises
    ------
    Refused
        No accepted context fits; the reason names the one that was proposed.
    StorageError
        It cannot be read or converted.
    """
    if not association.is_established and not association.rejected_contexts:
        raise PeerUnreachable(f"{_name(peer)} ended the association; look at its log")
    accepted = {
        str(context.transfer_syntax[0]): cast("int", context.context_id)
        for context in reversed(association.accepted_contexts)
        if context.abstract_syntax == instance.summary.sop_class_uid
    }
    return fit(instance, accepted, _name(peer))


def fit(instance: Sendable, accepted: Mapping[str, int], receiver: str) -> _Prepared:
    """Choose among the accepted transfer syntaxes of its class (syntax -> context); as stored if at all possible.

    Raises
    ------
    Refused
        None of them fits.
    StorageError
        It cannot be read or converted.
    """
    summary = instance.summary
    stored = summary.transfer_syntax_uid
    if stored in accepted:
        return prepare(accepted[stored], instance.chunks())
    if isinstance(instance, Convertible):
        for syntax in instance.alternatives:
            if syntax in accepted:
                return prepare(accepted[syntax], instance.converted(syntax))
    elif stored in _CONVERTIBLE and summary.byte_count <= _CONVERSION_BYTES:
        for syntax, context_id in accepted.items():
            if syntax in _CONVERTIBLE:
                return prepare(context_id, iter((_convert(instance, UID(syntax)),)))
    raise Refused(
        0, f"{receiver} accepts no presentation context for {UID(summary.sop_class_uid).name} in {UID(stored).name}; enable it there"
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


def _pause(association: Association) -> None:
    """Keep the association's own thread from taking the answers, as its send methods do."""
    association._reactor_checkpoint.clear()  # noqa: SLF001 - see library.py
    while association.is_alive() and not association._is_paused:  # noqa: SLF001
        time.sleep(0.001)
