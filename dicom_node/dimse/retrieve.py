"""C-MOVE and C-GET: archived instances to a configured peer, or back on the requestor's own association.

An instance goes out as it is stored wherever the receiver takes that; else in a transfer syntax that it takes, when nothing is lost by it;
else the sub-operation is counted as failed and the log says why. Data sets are read from the archive as they are written.

References
----------
DICOM PS3.4 C.4.2 (C-MOVE), C.4.3 (C-GET), C.5.2 and C.5.3 (extended negotiation), Tables C.4-2 and C.4-3 (status); PS3.7 D.3.3.4 (roles)
"""

from __future__ import annotations

import queue
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import structlog
from pydicom.datadict import tag_for_keyword
from pydicom.uid import UID
from pynetdicom.dimse_primitives import C_GET, C_MOVE, C_STORE

from dicom_node.dimse import operation, transcode
from dicom_node.dimse.decoder import Turns
from dicom_node.dimse.identifier import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    TRANSFER_SYNTAXES,
    Identifier,
    InvalidIdentifier,
    read_identifier,
    uid_list,
)
from dicom_node.dimse.information_model import MODELS, UNIQUE_KEYS, InformationModel, uids
from dicom_node.dimse.operation import Operation, SearchEnded, Searches, negotiated_for
from dicom_node.dimse.receive import unobserved
from dicom_node.dimse.scu import MoveOriginator, Outcome, StorageSCU, Stored, fit, is_stored, refusal, store_command, write_store
from dicom_node.errors import DeliveryError, PeerUnreachable, Refused
from storage.admission import actor_of, whence
from storage.errors import StorageError
from storage.records import AuditEvent, Level, Query, Summary
from storage.search import Located, Locating

if TYPE_CHECKING:
    from pynetdicom.presentation import PresentationContext

    from dicom_node.dimse.scp import AcceptedAssociation
    from dicom_node.peers import Peer, Peers
    from storage.archive import Archive
    from storage.audit import AuditTrail
    from storage.database import Database

log = structlog.get_logger(__name__)

CANNOT_COUNT = 0xA701
"""Refused: Out of resources - unable to calculate number of matches."""
CANNOT_PERFORM = 0xA702
"""Refused: Out of resources - unable to perform sub-operations."""
UNKNOWN_DESTINATION = 0xA801
"""Refused: Move Destination unknown."""
SOME_FAILED = 0xB000
"""Warning: sub-operations complete - one or more failures or warnings."""

COUNTABLE: Final = 0xFFFF
"""Sub-operations: Number of Remaining, Completed, Failed and Warning Sub-operations are US."""

_FAILED_SOP_INSTANCE_UID_LIST = 0x00080058
_RELATIONAL, _NEGOTIABLE = 0, 2
_BROKEN_IN_A_ROW = 3
_EVENTS_AT_ONCE = 500
_NAMED_ONE_BY_ONE = 100
_LOOK_S = 0.25
_REASONS = 3
_OBJECT_KEY = re.compile(r" [0-9a-f]{32}\b")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An archived instance on its way out; opened when its turn comes. A `Sendable` and `Convertible` of `dicom_node.dimse.scu`."""

    archive: Archive
    summary: Summary
    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    """What is held while a decoder runs for it."""

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Transfer syntaxes that it can be had in besides its own."""
        return transcode.alternatives(self.summary.transfer_syntax_uid)

    def chunks(self) -> Iterator[bytes]:
        """Its data set as stored."""
        with self.archive.open(self.summary.sop_instance_uid) as stored:
            yield from stored.chunks()

    def converted(self, transfer_syntax_uid: str) -> Iterator[bytes]:
        """Its data set in one of the alternatives."""
        with self.archive.open(self.summary.sop_instance_uid) as stored:
            yield from transcode.transcoded(stored, transfer_syntax_uid, self.turn())


@dataclass(slots=True)
class _Tally:
    """The sub-operations of a retrieval."""

    remaining: int = 0
    completed: int = 0
    warning: int = 0
    failed: list[str] = field(default_factory=list)
    """SOP Instance UIDs."""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, sop_instance_uid: str, outcome: Outcome) -> None:
        """Count one."""
        self.remaining -= 1
        match outcome:
            case Stored(status=0):
                self.completed += 1
            case Stored(status=status):
                self.warning += 1
                self.reasons[f"stored with warning {status:04X}"] += 1
            case error:
                self.failed.append(sop_instance_uid)
                self.reasons[_OBJECT_KEY.sub("", str(error))] += 1  # one reason, however many objects it is of

    def counts(self, *, final: bool) -> tuple[int | None, int, int, int]:
        """Return remaining, completed, failed and warning; what remains is not told at the end."""
        return (None if final else self.remaining, self.completed, len(self.failed), self.warning)

    @property
    def status(self) -> int:
        """Of the final response."""
        if self.failed and not self.completed and not self.warning:
            return CANNOT_PERFORM
        return SOME_FAILED if self.failed or self.warning else operation.SUCCESS


class _Refusal(Exception):
    """Nothing is retrieved.

    Parameters
    ----------
    status
        What the response says.
    reason
        Cause and remedy.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RetrieveSCP:
    """C-MOVE and C-GET of the Patient Root, Study Root and Patient/Study Only models. A `dicom_node.dimse.services.Service`.

    Parameters
    ----------
    database, archive
        Where the index is, and the instances.
    audit
        Told of what a peer is about to be given, before the first sub-operation.
    peers
        Who may be a Move Destination: those with an address, by their AE title.
    sender
        Makes the associations of C-MOVE.
    unknown_peers
        May callers that are no configured peer retrieve? (Those that the door lets in.)
    maximum_instances
        Of one retrieval; then 0xA701. `COUNTABLE` at most.
    answer_s
        Longest wait for the answer to a sub-operation of C-GET.
    search_s
        Longest search for what is asked for, waiting for its turn included.
    searches
        At once; others wait their turn.
    observe
        Told ``retrieve.answered`` with ``service`` (move, get), ``status``, ``completed``, ``failed``, ``warning`` and ``seconds``.
    """

    def __init__(
        self,
        *,
        database: Database,
        archive: Archive,
        audit: AuditTrail,
        peers: Peers,
        sender: StorageSCU,
        unknown_peers: bool = False,
        maximum_instances: int = COUNTABLE,
        answer_s: float = 60.0,
        search_s: float = 25.0,
        searches: int = 4,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._database = database
        self._archive = archive
        self._audit = audit
        self._peers = peers
        self._sender = sender
        self._unknown_peers = unknown_peers
        self._maximum_instances = min(maximum_instances, COUNTABLE)
        self._answer_s = answer_s
        self._searches = Searches(searches, longest_s=search_s)
        self._decoders = Turns()
        self._observe = observe
        self._models = {sop_class_uid: model for model in MODELS for sop_class_uid in (model.move, model.get)}

    @property
    def abstract_syntaxes(self) -> Mapping[str, tuple[str, ...]]:
        """C-MOVE and C-GET of the three models, with Identifiers in Explicit or Implicit VR Little Endian."""
        return dict.fromkeys(self._models, TRANSFER_SYNTAXES)

    @property
    def sends_instances(self) -> bool:
        """C-GET does."""
        return True

    def permitted(self, peer: Peer | None) -> bool:
        """Whether a caller may retrieve."""
        return self._unknown_peers if peer is None else peer.retrieve

    def negotiated(self, abstract_syntax: str, information: bytes) -> bytes:  # noqa: ARG002 - the same for every model
        """Answer SOP Class Extended Negotiation: relational retrieval, no conversion of enhanced multi-frame images."""
        return bytes(int(place == _RELATIONAL and asked == 1) for place, asked in enumerate(information[:_NEGOTIABLE]))

    def serve(self, association: AcceptedAssociation, context: PresentationContext, request: Any) -> None:
        """Answer a C-MOVE-RQ or C-GET-RQ.

        Final status: 0000; B000 some sub-operations failed, or were done with a warning; A701 too many instances; A702 none could be
        done; A801 Move Destination unknown; A900 or C000 the Identifier cannot be answered; 0122 another SOP class than the
        context's; FE00 cancelled. Failed SOP Instance UID List (0008,0058) names what failed.
        """
        service = "move" if str(context.abstract_syntax).endswith("2") else "get"
        if not operation.is_asked(C_MOVE if service == "move" else C_GET, association, context, request):
            return
        began = time.monotonic()
        asking = Operation(association, context, request, operation.C_MOVE_RSP if service == "move" else operation.C_GET_RSP)
        tally = _Tally()
        comment = ""
        try:
            try:
                if service == "move":
                    status = self._move(association, context, request, asking, tally)
                else:
                    status = self._get(association, context, request, asking, tally)
            except SearchEnded:
                status = self._cancelled(asking, tally)
            except InvalidIdentifier as error:
                status, comment = error.status, str(error)
                asking.respond(status, comment=comment, offending=error.offending)
            except _Refusal as refusal:
                status, comment = refusal.status, str(refusal)
                asking.respond(status, comment=comment)
        except (OSError, StorageError) as error:
            log.warning("retrieve.broken_off", service=service, peer=association.origin().peer, reason=str(error) or type(error).__name__)
            association.abort(block=False)
            return
        seconds = time.monotonic() - began
        told = {"status": f"{status:04X}", "completed": tally.completed, "failed": len(tally.failed), "warning": tally.warning}
        reasons = [comment] if comment else [f"{count} x {reason}" for reason, count in tally.reasons.most_common(_REASONS)]
        log.info("retrieve.answered", service=service, peer=association.origin().peer, seconds=round(seconds, 3), reasons=reasons, **told)
        self._observe("retrieve.answered", service=service, seconds=seconds, **told)

    # -- C-MOVE ----------------------------------------------------------------------------------------------------------------------

    def _move(self, association: AcceptedAssociation, context: PresentationContext, request: Any, asking: Operation, tally: _Tally) -> int:
        identifier, model = self._identifier(context, request, asking)
        destination = self._destination(str(request.MoveDestination or "").strip(), association.peer)
        instances = self._instances(association, asking, model, identifier, destination=destination.name)
        tally.remaining = len(instances)

        def wanted() -> bool:
            return not (asking.cancelled or asking.over)

        originator = MoveOriginator(association.origin().calling_ae_title, asking.message_id)
        sending = self._sender.store(destination, instances, originator=originator, resume=True, wanted=wanted)
        broken = 0
        try:
            for instance, outcome in sending:
                tally.add(instance.summary.sop_instance_uid, outcome)
                broken = broken + 1 if isinstance(outcome, PeerUnreachable) else 0
                if not wanted():
                    return self._cancelled(asking, tally)
                if isinstance(outcome, PeerUnreachable) and broken >= _BROKEN_IN_A_ROW:
                    _fail_rest(instances, tally, outcome)
                    break
                asking.respond(operation.PENDING, counts=tally.counts(final=False))
        except PeerUnreachable as error:
            if not wanted():
                return self._cancelled(asking, tally)
            _fail_rest(instances, tally, error)
        finally:
            sending.close()
        return self._finish(asking, tally)

    def _destination(self, ae_title: str, requestor: Peer | None) -> Peer:
        """Return the peer of an AE title that can be called: the requestor itself, if it is one of those of that title; else the only one.

        Guessing among several would give a patient's images to the wrong machine.
        """
        found = [peer for peer in self._peers if ae_title and peer.ae_title.strip() == ae_title and peer.callable and peer.port]
        if not found:
            raise _Refusal(UNKNOWN_DESTINATION, "the Move Destination is no configured peer; add it, with its address, to the peers")
        own = [peer for peer in found if requestor is not None and peer.name == requestor.name]
        if not own and len(found) > 1:
            raise _Refusal(UNKNOWN_DESTINATION, "the Move Destination is ambiguous: several peers bear that AE title; rename one")
        return (own or found)[0]

    # -- C-GET -----------------------------------------------------------------------------------------------------------------------

    def _get(self, association: AcceptedAssociation, context: PresentationContext, request: Any, asking: Operation, tally: _Tally) -> int:
        identifier, model = self._identifier(context, request, asking)
        instances = self._instances(association, asking, model, identifier, destination="")
        tally.remaining = len(instances)
        accepted: dict[str, dict[str, int]] = {}
        for storage in reversed(association.accepted_contexts):
            if storage.as_scu:
                accepted.setdefault(str(storage.abstract_syntax), {})[str(storage.transfer_syntax[0])] = int(storage.context_id or 0)
        for number, instance in enumerate(instances, start=1):
            if asking.cancelled or asking.over:
                return self._cancelled(asking, tally)
            outcome = self._store(association, asking, instance, accepted.get(instance.summary.sop_class_uid, {}), number % 0x10000)
            tally.add(instance.summary.sop_instance_uid, outcome)
            asking.respond(operation.PENDING, counts=tally.counts(final=False))
        return self._finish(asking, tally)

    def _store(
        self, association: AcceptedAssociation, asking: Operation, instance: Outgoing, accepted: Mapping[str, int], message_id: int
    ) -> Outcome:
        """Do one sub-operation on the requestor's association.

        Raises
        ------
        OSError, StorageError
            The association is of no use any more.
        """
        if not accepted:
            name = UID(instance.summary.sop_class_uid).name
            return Refused(0, f"the requestor proposed no presentation context for {name} in which it is the SCP")
        try:
            prepared = fit(instance, accepted, "the requestor")
        except (DeliveryError, StorageError) as error:
            return error
        with closing(prepared):
            write_store(asking.socket(), prepared, store_command(instance.summary, message_id), asking.maximum_length)
        deadline = time.monotonic() + self._answer_s
        messages = association.dimse.msg_queue
        with operation.others_of(messages) as others:  # a C-ECHO, say: it is answered when the operation is done
            while time.monotonic() < deadline:
                try:
                    item = messages.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                answer = item[1]
                if answer is None:
                    raise ConnectionResetError("the association ended within a sub-operation")
                if isinstance(answer, C_STORE) and answer.is_valid_response and answer.MessageIDBeingRespondedTo == message_id:
                    status = int(answer.Status or 0)
                    if is_stored(status):
                        return Stored(status)
                    return Refused(status, refusal("the requestor", status))
                others.keep(item)
        raise TimeoutError(f"the requestor gave no answer to a sub-operation within {self._answer_s:g} s")

    # -- both ------------------------------------------------------------------------------------------------------------------------

    def _identifier(self, context: PresentationContext, request: Any, asking: Operation) -> tuple[Identifier, InformationModel]:
        model = self._models.get(asking.sop_class_uid)
        if model is None or asking.sop_class_uid != str(context.abstract_syntax):
            raise _Refusal(operation.SOP_CLASS_NOT_SUPPORTED, "SOP class is not that of the presentation context")
        encoded = request.Identifier.getvalue() if request.Identifier is not None else b""
        return read_identifier(encoded, asking.transfer_syntax_uid), model

    def _instances(
        self, association: AcceptedAssociation, asking: Operation, model: InformationModel, identifier: Identifier, *, destination: str
    ) -> list[Outgoing]:
        """Find what is asked for, and write down that it is about to be given."""
        relational = negotiated_for(association, asking.sop_class_uid)[_RELATIONAL : _RELATIONAL + 1] == b"\1"
        keys = _unique_keys(model, identifier, relational=relational)
        try:
            locating = Locating(self._database, Query(Level.INSTANCE, keys, limit=self._maximum_instances + 1))
            located = self._searches.run(asking, locating.locate, locating.cancel) if all(keys.values()) else []
        except SearchEnded as ended:
            if not str(ended):
                raise
            raise _Refusal(CANNOT_COUNT, str(ended)) from ended
        except StorageError as error:
            raise _Refusal(CANNOT_COUNT, str(error)) from error
        if len(located) > self._maximum_instances:
            raise _Refusal(CANNOT_COUNT, f"more than {self._maximum_instances} instances; retrieve them in parts")
        if located:
            try:
                self._note(association, identifier.level, located, destination)
            except StorageError as error:
                raise _Refusal(CANNOT_PERFORM, str(error)) from error

        def turn() -> AbstractContextManager[None]:
            return self._decoders.take(lambda: not (asking.cancelled or asking.over))

        return [Outgoing(self._archive, _summary(one), turn) for one in located]

    def _note(self, association: AcceptedAssociation, level: Level, located: Sequence[Located], destination: str) -> None:
        """Write the audit records of what is about to be given; without them nothing is."""
        origin = association.origin()
        one_by_one = level is Level.INSTANCE and len(located) <= _NAMED_ONE_BY_ONE
        subjects: Counter[str] = Counter(
            one.sop_instance_uid
            if one_by_one
            else (one.series_instance_uid if level in {Level.SERIES, Level.INSTANCE} else one.study_instance_uid)
            for one in located
        )
        detail = {**whence(origin), "level": str(level), **({"destination": destination} if destination else {})}
        events = [
            AuditEvent("instance.retrieved", "success", actor_of(origin), subject, {**detail, "instances": count})
            for subject, count in subjects.items()
        ]
        for start in range(0, len(events), _EVENTS_AT_ONCE):
            some = events[start : start + _EVENTS_AT_ONCE]
            self._database.write(lambda connection, some=some: [self._audit.append(connection, event) for event in some])  # type: ignore[misc]

    def _finish(self, asking: Operation, tally: _Tally) -> int:
        status = tally.status
        comment = tally.reasons.most_common(1)[0][0] if status != operation.SUCCESS and tally.reasons else ""
        asking.respond(status, identifier=_failed(asking, tally), counts=tally.counts(final=True), comment=comment)
        return status

    def _cancelled(self, asking: Operation, tally: _Tally) -> int:
        asking.respond(operation.CANCELLED, identifier=_failed(asking, tally), counts=tally.counts(final=False))
        return operation.CANCELLED


def _fail_rest(instances: Sequence[Outgoing], tally: _Tally, error: DeliveryError) -> None:
    for instance in instances[len(instances) - tally.remaining :]:
        tally.add(instance.summary.sop_instance_uid, error)


def _failed(asking: Operation, tally: _Tally) -> bytes | None:
    if not tally.failed:
        return None
    return uid_list(_FAILED_SOP_INSTANCE_UID_LIST, tally.failed, explicit=asking.transfer_syntax_uid == EXPLICIT_VR_LITTLE_ENDIAN)


def _unique_keys(model: InformationModel, identifier: Identifier, *, relational: bool) -> dict[str, str]:
    """Return the keys of what is to be retrieved; an empty one matches nothing.

    Raises
    ------
    InvalidIdentifier
        A key that has to be there is missing, or has a value that it cannot have.
    """
    model.require_level(identifier)
    if not relational:
        model.path(identifier)
    keys: dict[str, str] = {}
    for level in model.levels[: model.levels.index(identifier.level) + 1]:
        keyword = UNIQUE_KEYS[level]
        value = identifier.keys.get(keyword, "")
        if not value and level is not identifier.level:
            continue
        several = "" if level is not Level.PATIENT else "\\"
        if not value or set(value) & set("*?" + several):
            raise InvalidIdentifier(f"{keyword} has to say what is to be retrieved", offending=(tag_for_keyword(keyword) or 0,))
        keys[keyword] = value if level is Level.PATIENT else "\\".join(uids(keyword, value))
    return keys


def _summary(located: Located) -> Summary:
    return Summary(
        sop_class_uid=located.sop_class_uid,
        sop_instance_uid=located.sop_instance_uid,
        study_instance_uid=located.study_instance_uid,
        series_instance_uid=located.series_instance_uid,
        transfer_syntax_uid=located.transfer_syntax_uid,
        byte_count=located.byte_count,
        sha256="",
        attributes={},
    )
