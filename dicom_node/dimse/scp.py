"""The DIMSE door: accepts associations, answers C-ECHO, streams C-STORE data sets into the archive, and hands other requests to services.

References
----------
DICOM PS3.4 Annex A (Verification) and B (Storage), PS3.8 Section 9.3.4 (A-ASSOCIATE-RJ)
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import structlog
from pydicom._uid_dict import UID_dictionary
from pynetdicom import AE, evt
from pynetdicom._globals import DEFAULT_TRANSFER_SYNTAXES, MODE_ACCEPTOR
from pynetdicom.acse import ACSE
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE, UserIdentityNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import _NON_PATIENT_OBJECT_CLASSES, _STORAGE_CLASSES
from pynetdicom.transport import AddressInformation, AssociationSocket

from dicom_node.dimse.connection import TlsConnection
from dicom_node.dimse.library import quiet
from dicom_node.dimse.message import ProtocolViolation, StoreRequest
from dicom_node.dimse.receive import LINGER_S, BellQueue, ReceiveLimits, RequestQueue, Room, Turnstile, UpperLayer, unobserved
from dicom_node.dimse.refusing import Words
from dicom_node.dimse.services import Negotiating
from dicom_node.dimse.slots import Held, Slots
from dicom_node.dimse.transcode import in_order_of_use
from dicom_node.dimse.vestibule import Connection, Turned, Vestibule, titles
from dicom_node.identity import Identities, IdentityRefused, Principal
from dicom_node.peers import Peer, Peers, normal_address
from dicom_node.security import PeerCertificate, matches
from storage.errors import MismatchedInstance, StorageError
from storage.iod import TRANSFER_SYNTAXES
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from storage.records import Announced, Origin
from storage.refusals import Diary, NoDiary

if TYPE_CHECKING:
    from dicom_node.dimse.services import Service
    from storage.archive import Archive, Intake
    from storage.intake import Vessel

log = structlog.get_logger(__name__)

SUCCESS = 0x0000
CANNOT_UNDERSTAND = 0xC000
PROCESSING_FAILURE = 0x0110
NOT_AUTHORISED = 0x0124
VERIFICATION = "1.2.840.10008.1.1"
_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."
_APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_BACKLOG = 1024
_SAY_AGAIN_S = 60.0
_SAID = 1000
_LOOKED_AT = 256
"""Associations beyond the limit that are open for as long as it takes to decide about them."""
_WAITED_FOR = 32
"""Rejected callers that are waited for to hang up; more of them, and the door does."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Result, Source and Reason/Diag. of an A-ASSOCIATE-RJ (PS3.8 Table 9-21)."""

    result: int
    source: int
    diagnostic: int
    reason: str
    remedy: str = ""
    """Empty: it follows from the numbers."""

    @property
    def pdu(self) -> bytes:
        """The A-ASSOCIATE-RJ PDU (PS3.8 Section 9.3.4)."""
        return struct.pack(">BxLBBBB", 0x03, 4, 0, self.result, self.source, self.diagnostic)


OTHER_APPLICATION = Rejection(
    1, 1, 2, "application context name not supported", "the caller proposes another application than DICOM's; look what calls from there"
)
UNKNOWN_CALLED = Rejection(1, 1, 7, "called AE title not recognised")
UNKNOWN_CALLING = Rejection(1, 1, 3, "calling AE title not recognised")
OTHER_CERTIFICATE = Rejection(
    1,
    1,
    3,
    "the certificate is not the one of that peer",
    "compare its SHA-256 fingerprint with that of the peer's entry",
)
ANONYMOUS = Rejection(
    1, 1, 1, "no user identified itself", "let the caller negotiate User Identity, or set identities.mode to optional or ignore"
)
LOCAL_LIMIT = Rejection(2, 3, 2, "local limit exceeded")
UNKNOWN_FOR_NOW = Rejection(2, 3, 1, "who calls is not known for now", "it may try again; look at the database and the name service")


def is_storage(sop_class_uid: str, *, unknown: bool) -> bool:
    """Whether an abstract syntax is one that C-STORE stores composite instances of patients under.

    Current and retired storage SOP classes are, whatever the library's list of them; hanging protocols, implant templates
    and the like belong to no patient and are not. `unknown` decides of what PS3.6 does not name, private classes included.
    """
    if sop_class_uid in _STORAGE_CLASSES.values():
        return True
    named = UID_dictionary.get(sop_class_uid)
    if named is None:
        return unknown
    return sop_class_uid.startswith(_STORAGE_ROOT) and "Storage" in named[0] and sop_class_uid not in _NON_PATIENT_OBJECT_CLASSES.values()


def _title(padded: bytes) -> str | None:
    """Return an AE title of an association request; None where it is none that the library would understand."""
    return padded.decode("ascii").strip() if padded.isascii() and padded.decode("ascii").isprintable() else None


class StorageSCP:
    """Listens, and keeps one thread pair per association.

    Parameters
    ----------
    archive
        Where instances go.
    peers
        Who may call.
    ae_title
        Ours; an association that calls another is rejected (1,1,7).
    host, port
        Where to listen; port 0 for any free one.
    maximum_associations
        Established ones, rejected as transient (2,3,2) beyond; connections still in their handshake are not counted.
    accept_unknown_peers
        Accept callers that are no configured peer; else they are rejected (1,1,3).
    unknown_sop_classes
        Accept abstract syntaxes that PS3.6 does not name, private ones included.
    association_requests_per_s, association_request_burst
        Association requests of one address that are looked at in a second, and at once after a pause; others wait. 0 a second: all.
    limits
        Limits on one association.
    message_bytes
        Most bytes of one data set, stored or refused, before the association is aborted.
    services
        What else is answered: query, retrieve, storage commitment.
    slots
        Counts associations together with other processes that listen on the same port; None: this one listens alone.
    tls
        Gives the TLS context of the next connection; None: no TLS.
    certificate_ended
        Says why a certificate that was accepted would be no longer; empty: it is still good. Asked for open associations.
    identities
        Verifies who identifies by User Identity Negotiation (PS3.7 D.3.3.7); None: that is not looked at.
    identity_required
        Reject who does not.
    refusals
        Takes note of what is refused; None: nobody does.
    visited
        Told the name and address of each peer whose association is accepted.
    observe
        Told what happens, for metrics: ``observe(event, **labels)``. Events: ``association.accepted`` (peer),
        ``association.rejected`` (reason), ``association.violation`` (reason), ``association.failed``, ``association.ended`` (peer),
        ``instance.received`` (peer, outcome, byte_count, seconds), ``instance.refused`` (peer, status), ``instance.aborted`` (peer).
    """

    def __init__(
        self,
        *,
        archive: Archive,
        peers: Peers,
        ae_title: str,
        host: str = "127.0.0.1",
        port: int = 11112,
        maximum_associations: int = 200,
        accept_unknown_peers: bool = False,
        unknown_sop_classes: bool = True,
        association_requests_per_s: float = 100.0,
        association_request_burst: int = 200,
        limits: ReceiveLimits | None = None,
        message_bytes: int = 2 * 1024**3 + 64 * 1024**2,
        services: Sequence[Service] = (),
        slots: Slots | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
        certificate_ended: Callable[[PeerCertificate], str] | None = None,
        identities: Identities | None = None,
        identity_required: bool = False,
        refusals: Diary | None = None,
        visited: Callable[[str, str], None] = lambda _name, _address: None,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        quiet()
        self._certificate_ended = certificate_ended
        self._identities = identities
        self._identity_required = identity_required
        self._services = {abstract_syntax: service for service in services for abstract_syntax in service.abstract_syntaxes}
        self._archive = archive
        self._peers = peers
        self._address = (host, port)
        self._shared = slots is not None
        self._slots = slots or Slots(total=maximum_associations)
        self._tls = tls
        self._accept_unknown_peers = accept_unknown_peers
        self._unknown_sop_classes = unknown_sop_classes
        self._message_bytes = message_bytes
        self._requests_per_s = association_requests_per_s
        self._request_burst = association_request_burst
        self.limits = limits or ReceiveLimits()
        self.room = Room(self.limits.foreign_bytes_of_all)
        self.observe = observe
        self.visited = visited
        self.words = Words(refusals or NoDiary(), peers=peers, ae_title=ae_title)
        self.entity = AE(ae_title=ae_title)
        self.entity.maximum_pdu_size = self.limits.maximum_pdu_length
        self.entity.acse_timeout = self.limits.handshake_s
        self.entity.network_timeout = self.limits.idle_s
        self.entity.dimse_timeout = self.limits.idle_s
        self.entity.maximum_associations = 1_000_000  # ours is counted in `admit`; the library's counts half-open ones
        self.entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        self.entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._open: set[AcceptedAssociation] = set()
        self._rejected: set[AcceptedAssociation] = set()
        self._admitted: dict[AcceptedAssociation, Held] = {}
        self._draining = False
        self._stopping = threading.Event()
        self._vestibule: Vestibule | None = None
        self._said: dict[tuple[str, str, str], tuple[float, int]] = {}
        self._said_lock = threading.Lock()

    def start(self) -> tuple[str, int]:
        """Listen and accept in a thread. Returns the address bound.

        Raises
        ------
        OSError
            The address cannot be bound.
        """
        family, kind, _, _, address = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        host, port = listener.getsockname()[:2]
        self._vestibule = Vestibule(
            listener,
            enter=self._enter,
            tls=self._tls,
            handshake_s=self.limits.handshake_s,
            handshake_pdu_length=self.limits.handshake_pdu_length,
            send_s=self.limits.idle_s,
            requests_per_s=self._requests_per_s,
            burst=self._request_burst,
            caller=self._turn_of,
            turned=self._turned,
        )
        self._vestibule.start()
        threading.Thread(target=self._watch, name="dimse-watch", daemon=True).start()
        return host, port

    def stop(self, drain_s: float = 10.0) -> None:
        """Accept no more, let the open associations end for `drain_s` seconds, abort the rest."""
        with self._lock:
            self._draining = True
        self._stopping.set()
        if self._vestibule is not None:
            self._vestibule.stop()
        if not self._wait_closed(drain_s):
            with self._lock:
                left = [*self._open, *self._rejected]
            log.warning("dimse.aborting", associations=len(left))
            for association in left:
                association.abort(block=False)
            self._wait_closed(self.limits.handshake_s)

    @property
    def identifies(self) -> bool:
        """Whether User Identity is looked at."""
        return self._identities is not None

    @property
    def associations(self) -> int:
        """How many associations are established now."""
        with self._lock:
            return len(self._admitted)

    def admit(self, association: AcceptedAssociation, calling_ae_title: str, called_ae_title: str) -> Rejection | None:
        """Decide about an association request, and count it in. None: accepted."""
        if str(association.proposal.application_context_name) != _APPLICATION_CONTEXT:
            return OTHER_APPLICATION
        peer = association.caller = self._peers.by_calling(calling_ae_title, association.address)
        if called_ae_title.strip() != self.entity.ae_title.strip():
            return UNKNOWN_CALLED
        if not (peer.accept or peer.retrieve or peer.commit if peer is not None else self._accept_unknown_peers):
            unknown_for_now = peer is None and self._peers.unknown_for_now(calling_ae_title)
            return UNKNOWN_FOR_NOW if unknown_for_now else UNKNOWN_CALLING
        if peer is not None and peer.certificate:
            certificate = association.certificate
            if certificate is None or not matches(peer.certificate, certificate):
                return OTHER_CERTIFICATE
        if (rejection := self._identify(association)) is not None:
            return rejection
        caller = f"peer {peer.name}" if peer is not None else f"address {association.address}"
        # one caller alone may not take the place of all others, unless it is told that it may
        quota = (peer.max_associations if peer is not None else 0) or max(1, self._slots.total * 3 // 4)
        with self._lock:
            if self._draining or (held := self._slots.take(caller, quota)) is None:
                return LOCAL_LIMIT
            self._admitted[association] = held
        association.peer = peer
        return None

    def _identify(self, association: AcceptedAssociation) -> Rejection | None:
        """Verify the user identity of a request, if that is looked at."""
        if self._identities is None:
            return None
        item = association.requestor.user_identity
        if item is None:
            return ANONYMOUS if self._identity_required else None
        try:
            association.principal = self._identities.verify(
                item.primary_field or b"",
                item.secondary_field or b"",
                item.user_identity_type or 0,
                association.address,
                secured=association.secured,
            )
        except IdentityRefused as refused:
            return Rejection(2 if refused.retry_after_s else 1, 1, 1, refused.reason, refused.remedy)
        return None

    def supported(self, proposed: list[PresentationContext], peer: Peer | None, receives: Container[str] = ()) -> list[PresentationContext]:
        """Return what to support of the proposed contexts: each storage class, with every syntax that can be stored, retired ones too.

        In the proposer's order: the library takes the acceptor's first syntax that was proposed, thus the proposer's own first choice.
        Where the peer offers to receive (C-GET), a plain syntax comes first, in which each instance can be had.

        Parameters
        ----------
        receives
            SOP classes that the peer proposes to be the SCP of.
        """
        wanted: dict[str, list[str]] = {}
        served = {syntax: service for syntax, service in self._services.items() if service.permitted(peer)}
        gives = any(service.sends_instances for service in served.values())
        for context in proposed:
            abstract_syntax = str(context.abstract_syntax)
            if abstract_syntax in served:
                known: Container[str] = served[abstract_syntax].abstract_syntaxes[abstract_syntax]
            elif is_storage(abstract_syntax, unknown=self._unknown_sop_classes) and (gives or peer is None or peer.accept):
                known = TRANSFER_SYNTAXES
            else:
                continue
            syntaxes = [str(syntax) for syntax in context.transfer_syntax if syntax in known]
            wanted.setdefault(abstract_syntax, []).extend(in_order_of_use(syntaxes) if abstract_syntax in receives else syntaxes)
        supported = [build_context(abstract, list(dict.fromkeys(syntaxes))) for abstract, syntaxes in wanted.items() if syntaxes]
        for context in supported:
            if getattr(served.get(str(context.abstract_syntax)), "takes_reports", False):  # the peer may be the SCP: storage commitment
                context.scu_role = context.scp_role = True
        if gives:
            for context in supported:
                if context.abstract_syntax not in served:
                    context.scu_role = context.scp_role = True
        return [build_context(VERIFICATION, DEFAULT_TRANSFER_SYNTAXES), *supported]

    def note_contexts(self, association: AcceptedAssociation) -> None:
        """Take note of the contexts of an association that were rejected."""
        rejected = association.rejected_contexts
        if not rejected:
            return
        self.words.contexts(
            association.proposal.presentation_context_definition_list,
            rejected,
            origin=association.origin(),
            takes=lambda uid: uid == VERIFICATION or uid in self._services or is_storage(uid, unknown=self._unknown_sop_classes),
            permits=lambda uid: self._permits(uid, association.peer),
        )

    def _permits(self, abstract_syntax: str, peer: Peer | None) -> bool:
        """Whether a caller may use a SOP class that is served."""
        if abstract_syntax in self._services:
            return self._services[abstract_syntax].permitted(peer)
        return abstract_syntax == VERIFICATION or peer is None or peer.accept

    def service_of(self, context: PresentationContext) -> Service | None:
        """Return what answers requests in a context; None: pynetdicom does."""
        return self._services.get(str(context.abstract_syntax))

    def extended(self, proposed: Mapping[str, bytes], peer: Peer | None) -> dict[str, bytes]:
        """Answer SOP Class Extended Negotiation: SOP class -> application information, of the services that take part in it."""
        answers: dict[str, bytes] = {}
        for abstract_syntax, information in proposed.items():
            service = self._services.get(str(abstract_syntax))
            if isinstance(service, Negotiating) and service.permitted(peer):
                answers[str(abstract_syntax)] = service.negotiated(str(abstract_syntax), information)
        return {abstract_syntax: information for abstract_syntax, information in answers.items() if information}

    def vessels(self) -> Vessels:
        """Make the place for the vessel of an association's next instance."""
        return Vessels(self._archive)

    def begin_store(self, association: AcceptedAssociation, context: PresentationContext, request: StoreRequest) -> StoreReception:
        """Open the intake for a C-STORE-RQ."""
        return StoreReception(
            archive=self._archive,
            origin=association.origin(),
            transfer_syntax_uid=str(context.transfer_syntax[0]),
            abstract_syntax=str(context.abstract_syntax),
            request=request,
            message_bytes=self._message_bytes,
            permitted=association.peer is None or association.peer.accept,
            vessels=association.vessels,
            words=self.words,
            observe=self.observe,
        )

    def rejected(self, association: AcceptedAssociation) -> None:
        """Count an association no longer, although the caller did not hang up yet."""
        with self._lock:
            self._open.discard(association)
            self._rejected.add(association)

    def linger_s(self, association: AcceptedAssociation) -> float:
        """How long to wait for the caller to hang up."""
        return 0.0 if association in self._rejected and len(self._rejected) > _WAITED_FOR else LINGER_S

    def ended(self, association: AcceptedAssociation) -> None:
        """Forget an association whose threads end."""
        with self._idle:
            self._open.discard(association)
            self._rejected.discard(association)
            held = self._admitted.pop(association, None)
            if held is not None:
                self._slots.give(held)
            self._idle.notify_all()
        if held is not None:
            self.observe("association.ended", peer=association.peer.name if association.peer is not None else "")

    def _watch(self) -> None:
        """Abort associations that would not be admitted any more: certificate, token or peer ended since (threat 81)."""
        while not self._stopping.wait(self.limits.credentials_s):
            with self._lock:
                admitted = list(self._admitted)
            for association in admitted:
                try:
                    if reason := self._no_longer(association):
                        log.warning("association.no_longer_admitted", reason=reason, address=association.address)
                        self.observe("association.expired", reason=reason)
                        association.abort(block=False)
                except Exception:  # an edge: one association must not end the watch over the others
                    log.exception("dimse.watch_failed")

    def _no_longer(self, association: AcceptedAssociation) -> str:
        certificate, principal = association.certificate, association.principal
        if certificate is not None and self._certificate_ended is not None and (reason := self._certificate_ended(certificate)):
            return reason
        if principal is not None and principal.expires_at is not None and principal.expires_at <= datetime.now(UTC):
            return "the token ended"
        if association.peer is not None and self._peers.get(association.peer.name) != association.peer:
            return "the peer was removed or changed"
        return ""

    def _wait_closed(self, timeout_s: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._open and not self._rejected, timeout_s)

    def _turn_of(self, request: bytes) -> Hashable:
        """Say as who a request waits for its turn: peers by their AE title, all strangers of an address as one."""
        calling = _title(titles(request)[1])
        return calling if calling is not None and self._peers.known_title(calling) else None

    def _at_a_glance(self, request: bytes, address: str) -> Rejection | None:
        """Reject who bears the AE title of no peer, as far as that is known without looking anything up.

        A request whose PDU is decoded and that gets a thread costs twenty times that.
        """
        called, calling = (_title(one) for one in titles(request))
        if called is None or calling is None or not request[7] & 1 or self._peers.known_title(calling) is not False:
            return None
        if called != self.entity.ae_title.strip():
            rejection = UNKNOWN_CALLED
        elif not self._accept_unknown_peers:
            rejection = UNKNOWN_CALLING
        else:
            return None
        self.note_rejection(rejection, address=address, calling_ae_title=calling, called_ae_title=called, named=False)
        return rejection

    def note_rejection(
        self,
        rejection: Rejection,
        *,
        address: str,
        calling_ae_title: str,
        called_ae_title: str,
        peer: Peer | None = None,
        named: bool = True,
    ) -> None:
        """Log, count and note a rejected association."""
        titles = {"calling_ae_title": calling_ae_title, "called_ae_title": called_ae_title}
        self.warn("association.rejected", reason=rejection.reason, address=address, **titles)
        self.observe("association.rejected", reason=rejection.reason)
        self.words.association(
            rejection, peer=peer, named=named, address=address, calling_ae_title=calling_ae_title, called_ae_title=called_ae_title
        )

    def _enter(self, connection: Connection, address: tuple[Any, ...], request: bytes) -> bytes | None:
        """Take over a connection whose association request is whole; the PDU to answer when it is rejected at once."""
        if (rejection := self._at_a_glance(request, normal_address(str(address[0])))) is not None:
            return rejection.pdu
        association = None
        with self._lock:
            if not self._draining and len(self._open) < self._slots.total + _LOOKED_AT:
                association = AcceptedAssociation(self, connection, address, request)
                self._open.add(association)
        if association is None:  # no look-up of who it is: this is the only thread of all connections
            self.observe("association.rejected", reason=LOCAL_LIMIT.reason)
            self.words.connection("too many associations at once, or the node is stopping", address=normal_address(str(address[0])))
            return LOCAL_LIMIT.pdu
        try:
            association.start()
        except RuntimeError:  # no more threads
            self.ended(association)
            connection.close()
            raise
        return None

    def _turned(self, turned: Turned) -> None:
        self.observe("association.refused", reason=turned.reason)
        address = normal_address(turned.address)
        self.words.connection(turned.reason, address=address, error=turned.error)
        self.warn("connection.refused", address=address, reason=turned.reason)

    def warn(self, event: str, *, address: str, reason: str, **details: str) -> None:
        """Log what a caller did wrong, once a minute for the same; strangers must not fill the disk."""
        with self._said_lock:
            said_at, silent = self._said.get((event, address, reason), (-_SAY_AGAIN_S, 0))
            if time.monotonic() - said_at < _SAY_AGAIN_S:
                self._said[event, address, reason] = said_at, silent + 1
                return
            if len(self._said) >= _SAID:
                self._said.clear()
            self._said[event, address, reason] = time.monotonic(), 0
        log.warning(event, reason=reason, address=address, before=silent, **details)


class AdmittingACSE(ACSE):
    """Association control that asks the door who may come in, before pynetdicom negotiates."""

    assoc: AcceptedAssociation

    def _negotiate_as_acceptor(self) -> None:
        request = self.assoc.proposal
        titles: Any = {"calling_ae_title": request.calling_ae_title, "called_ae_title": request.called_ae_title}
        rejection = self.assoc.door.admit(self.assoc, request.calling_ae_title, request.called_ae_title)
        if rejection is not None:
            self.assoc.door.note_rejection(rejection, address=self.assoc.address, peer=self.assoc.caller, **titles)
            self.send_reject(rejection.result, rejection.source, rejection.diagnostic)
            self.assoc.door.rejected(self.assoc)
            self.assoc.is_rejected = True
            self.assoc.kill()
            return
        name = self.assoc.peer.name if self.assoc.peer is not None else ""
        user = {"user": self.assoc.principal.name} if self.assoc.principal is not None else {}
        log.info("association.accepted", peer=name, address=self.assoc.address, secured=self.assoc.secured, **user, **titles)
        self.assoc.door.observe("association.accepted", peer=name)
        if name:
            self.assoc.door.visited(name, self.assoc.address)
        self.acceptor.supported_contexts = self.assoc.door.supported(
            request.presentation_context_definition_list,
            self.assoc.peer,
            receives={str(uid) for uid, item in self.requestor.role_selection.items() if item.scp_role},
        )
        super()._negotiate_as_acceptor()
        self.assoc.door.note_contexts(self.assoc)

    def _check_user_identity(self) -> tuple[bool, UserIdentityNegotiation | None]:
        """Say to who asked for it that his identity was verified, at admission (PS3.7 D.3.3.7.2); the library does so for tokens alone."""
        item = self.requestor.user_identity
        if item is None or not self.assoc.door.identifies or not item.positive_response_requested:
            return True, None
        response = UserIdentityNegotiation()
        response.server_response = b""
        return True, response


class AcceptedAssociation(Association):
    """pynetdicom's acceptor with our upper layer reader and our admission.

    Parameters
    ----------
    door
        Where it was accepted.
    connection, address
        The connection, and the peer's address as ``socket.accept`` gave it.
    request
        The A-ASSOCIATE-RQ PDU, which was read of it already.
    """

    def __init__(self, door: StorageSCP, connection: Connection, address: tuple[Any, ...], request: bytes) -> None:
        super().__init__(door.entity, MODE_ACCEPTOR)
        self.door = door
        self.caller: Peer | None = None
        """Who calls, admitted or not."""
        self.peer: Peer | None = None
        self.principal: Principal | None = None
        """Who identified; None: nobody did, or it was not looked at."""
        self.address = normal_address(str(address[0]))
        self.vessels = door.vessels()
        self._connection = connection
        self._certificate = connection.certificate if isinstance(connection, TlsConnection) else None
        self.acse = AdmittingACSE(self)
        self.dul = UpperLayer(
            self,
            limits=door.limits,
            received=request,
            begin_store=lambda context, request: door.begin_store(self, context, request),
            observe=self._observed,
            room=door.room,
            linger_s=lambda: door.linger_s(self),
        )
        turnstile = Turnstile()
        self._reactor_checkpoint = turnstile
        self.dul.to_user_queue = BellQueue(turnstile.ring)
        self.dimse.msg_queue = RequestQueue(turnstile.ring)
        self.acse_timeout = door.entity.acse_timeout  # their setters reach into the provider, which is a new one
        self.network_timeout = door.entity.network_timeout
        self.set_socket(AssociationSocket(self, client_socket=cast("socket.socket", connection)))
        self.name = "AcceptorThread"
        self.acceptor.maximum_length = door.entity.maximum_pdu_size
        self.acceptor.ae_title = door.entity.ae_title
        self.acceptor.address_info = AddressInformation.from_tuple(connection.getsockname())
        self.acceptor.implementation_class_uid = door.entity.implementation_class_uid
        self.acceptor.implementation_version_name = door.entity.implementation_version_name
        self.requestor.address_info = AddressInformation.from_tuple(address)
        self.bind(evt.EVT_SOP_EXTENDED, lambda event: self.door.extended(event.app_info, self.peer))

    @property
    def secured(self) -> bool:
        """Whether it came by TLS."""
        return isinstance(self._connection, TlsConnection)

    @property
    def certificate(self) -> PeerCertificate | None:
        """The verified certificate that the peer showed; None: it showed none."""
        return self._certificate

    @property
    def proposal(self) -> A_ASSOCIATE:
        """The association request."""
        return cast("A_ASSOCIATE", self.requestor.primitive)

    def run_reactor(self) -> None:
        """Run until the association is over, then tell the door."""
        try:
            super().run_reactor()
        except Exception:  # an edge: the association's own thread
            log.exception("association.failed")
            self.abort(block=False)
        finally:
            self.dul.kill_dul()
            with contextlib.suppress(RuntimeError):  # it was never started: no more threads
                self.dul.join()
            self.vessels.close()
            self._connection.close()  # the library leaves it open when the peer was the first to go
            self.door.ended(self)

    def _serve_request(self, msg: Any, context_id: int) -> None:
        """Let the service of the context answer; pynetdicom what has none (C-ECHO)."""
        try:
            self._serve(msg, context_id)
        finally:
            cast("UpperLayer", self.dul).relieve()
            if not self.dimse.msg_queue.empty():  # the library takes one in each turn of its loop
                cast("Turnstile", self._reactor_checkpoint).ring()

    def _serve(self, msg: Any, context_id: int) -> None:
        context = self._accepted_cx.get(context_id)
        service = None if context is None else self.door.service_of(context)
        if context is None or service is None or not msg.is_valid_request:
            super()._serve_request(msg, context_id)
            return
        for message_id in set(self.dimse.cancel_req) - {msg.MessageID}:  # a cancel of this one may be quicker than this thread
            self.dimse.cancel_req.pop(message_id, None)
        try:
            service.serve(self, context, msg)
        except Exception:  # an edge: a fault of ours ends this association and no more
            log.exception("service.failed", service=type(service).__name__)
            self.abort(block=False)
        self.dimse.cancel_req.pop(msg.MessageID, None)
        self.dul._idle_timer.restart()  # noqa: SLF001 - it measures the peer's silence, not our work

    def _observed(self, event: str, **labels: object) -> None:
        self.door.observe(event, **labels)
        if event == "association.violation" and self.requestor.primitive is not None:
            self.door.words.violation(str(labels["reason"]), self.origin())

    def origin(self) -> Origin:
        """Say who sent what arrives now."""
        request = self.proposal
        return Origin(
            door="dimse",
            received_at=datetime.now(UTC),
            address=self.address,
            calling_ae_title=request.calling_ae_title.strip(),
            called_ae_title=request.called_ae_title.strip(),
            peer=self.peer.name if self.peer is not None else "",
            user=self.principal.name if self.principal is not None else "",
        )


class Vessels:
    """The vessel of an association's next instance, made while nobody waits for it. For one thread.

    Parameters
    ----------
    archive
        Whose landing folder it lies in.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._ready: Vessel | None = None

    def fill(self) -> None:
        """Have one ready; none when the disk takes nothing, which the next instance will be told."""
        if self._ready is None:
            with contextlib.suppress(StorageError):
                self._ready = self._archive.vessel()

    def take(self) -> Vessel | None:
        """Give the one that is ready, if there is one."""
        ready, self._ready = self._ready, None
        return ready

    def close(self) -> None:
        """Remove the one that nobody took."""
        if (ready := self.take()) is not None:
            ready.discard()


class StoreReception:
    """One C-STORE operation: data set fragments in, a status out. Implements `dicom_node.dimse.message.StoreOperation`.

    Once something is wrong the rest of the data set is read past, and the status tells what it was.
    """

    def __init__(
        self,
        *,
        archive: Archive,
        origin: Origin,
        transfer_syntax_uid: str,
        abstract_syntax: str,
        request: StoreRequest,
        message_bytes: int,
        permitted: bool,
        vessels: Vessels,
        words: Words,
        observe: Callable[..., None],
    ) -> None:
        self._observe = observe
        self._vessels = vessels
        self._words = words
        self._origin = origin
        self._peer = origin.peer
        self._message_bytes = message_bytes
        self._count = 0
        self._began = time.monotonic()
        self._failure: tuple[int, str] | None = None
        self._intake: Intake | None = None
        self._committed: Intake | None = None
        if not permitted:
            self._failure = (NOT_AUTHORISED, "this peer may not store here (accept = false)")
        elif not request.has_data_set:
            self._failure = (CANNOT_UNDERSTAND, "C-STORE request without a data set")
        elif not request.sop_class_uid or not request.sop_instance_uid:
            self._failure = (CANNOT_UNDERSTAND, "C-STORE request without Affected SOP Class or Instance")
        elif request.sop_class_uid != abstract_syntax:
            self._failure = (MismatchedInstance.failure_reason, "SOP class is not that of the presentation context")
        else:
            announced = Announced(sop_class_uid=request.sop_class_uid, sop_instance_uid=request.sop_instance_uid)
            with self._failing():
                self._intake = archive.receive(origin, transfer_syntax_uid=transfer_syntax_uid, announced=announced, vessel=vessels.take())

    def write(self, fragment: memoryview) -> None:
        """Stream on a fragment.

        Raises
        ------
        ProtocolViolation
            The data set is longer than anything that could be stored.
        """
        self._count += len(fragment)
        if self._count > self._message_bytes:
            raise ProtocolViolation("data set longer than the limit")
        if self._intake is not None:
            with self._failing():
                self._intake.write(fragment)

    def finish(self) -> tuple[int, str]:
        """Commit; Success only when the instance is durable."""
        if self._intake is not None:
            with self._failing():
                receipt = self._intake.commit()
                self._committed, self._intake = self._intake, None
                self._observe(
                    "instance.received",
                    peer=self._peer,
                    outcome=receipt.outcome.value,
                    byte_count=self._count,
                    seconds=time.monotonic() - self._began,
                )
                return SUCCESS, ""
        status, reason = self._failure or (PROCESSING_FAILURE, "processing failure")
        log.warning("instance.refused", peer=self._peer, status=f"{status:04X}", reason=reason)
        self._observe("instance.refused", peer=self._peer, status=status)
        self._words.instance(status, reason, self._origin)
        return status, reason

    def settle(self) -> None:
        """Tidy up, and prepare for the next instance, while the peer deals with the answer."""
        if self._committed is not None:
            self._committed.settle()
            self._vessels.fill()

    def abort(self) -> None:
        """Drop what arrived: the association ended within the data set."""
        self._drop()
        log.warning("instance.aborted", peer=self._peer, byte_count=self._count)
        self._observe("instance.aborted", peer=self._peer)

    @contextlib.contextmanager
    def _failing(self) -> Any:
        """Turn what the archive raises into the status of the operation; the partial instance is dropped."""
        try:
            yield
        except StorageError as error:
            self._failure = (error.failure_reason, str(error))
            self._drop()
        except Exception:  # an edge: the peer learns that we failed, the log learns how
            log.exception("instance.failed", peer=self._peer)
            self._failure = (PROCESSING_FAILURE, "internal error of the node, see its log")
            self._drop()

    def _drop(self) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.abort()
