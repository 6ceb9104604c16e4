"""C-FIND: the index asked by DIMSE, as QIDO-RS asks it.

Matched are the attributes of the index; of sequences there are none in it, so that they come back empty and the status says so. Rows go
out as they are read, a page at a time. A query of more matches than the limit gets that many, then 0xA700: never a short answer that looks
whole.

References
----------
DICOM PS3.4 Annex C: C.2.2 (matching), C.4.1 (C-FIND), C.5.1 (extended negotiation)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import structlog
from pydicom.datadict import tag_for_keyword
from pynetdicom.dimse_primitives import C_FIND

from dicom_node.dimse import operation
from dicom_node.dimse.identifier import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    QUERY_RETRIEVE_LEVEL,
    TRANSFER_SYNTAXES,
    Identifier,
    InvalidIdentifier,
    read_identifier,
    text_value,
    write_identifier,
)
from dicom_node.dimse.information_model import DEPTH, MODELS, InformationModel, uids
from dicom_node.dimse.operation import Operation, SearchEnded, Searches, negotiated_for
from dicom_node.dimse.receive import unobserved
from dicomweb.dataset import dictionary_vr
from storage.admission import actor_of, whence
from storage.errors import InvalidQuery, StorageError
from storage.records import INDEXED, AuditEvent, Level, Match, Query
from storage.search import Finding

if TYPE_CHECKING:
    from pynetdicom.presentation import PresentationContext

    from dicom_node.dimse.scp import AcceptedAssociation
    from dicom_node.peers import Peer
    from storage.audit import AuditTrail
    from storage.database import Database

log = structlog.get_logger(__name__)

_COMPUTED: Mapping[str, Level] = MappingProxyType(
    {
        "NumberOfPatientRelatedStudies": Level.PATIENT,
        "NumberOfPatientRelatedSeries": Level.PATIENT,
        "NumberOfPatientRelatedInstances": Level.PATIENT,
        "ModalitiesInStudy": Level.STUDY,
        "SOPClassesInStudy": Level.STUDY,
        "NumberOfStudyRelatedSeries": Level.STUDY,
        "NumberOfStudyRelatedInstances": Level.STUDY,
        "NumberOfSeriesRelatedInstances": Level.SERIES,
    }
)
_NO_KEYS = frozenset({"TimezoneOffsetFromUTC"})
"""Of the index, but not matched: they say how others are meant (PS3.4 C.4.1.1.3.1)."""
_RETRIEVE_AE_TITLE, _INSTANCE_AVAILABILITY = 0x00080054, 0x00080056
_TEXT_LENGTH = 1024
"""Characters of a key that is no list of UIDs: more than the longest value of any indexed VR."""
_MODALITIES = 64
_AUDITED_LENGTH = 1024
_RELATIONAL, _COMBINED_DATETIME, _NEGOTIABLE = 0, 1, 7


@dataclass(frozen=True, slots=True)
class _Final:
    """The last response."""

    status: int
    comment: str = ""
    offending: tuple[int, ...] = ()


class _GivenUp(Exception):
    """The search ends before its end.

    Parameters
    ----------
    final
        The response that says why.
    """

    def __init__(self, final: _Final) -> None:
        super().__init__(final.comment)
        self.final = final


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request asks for: the search, and how its rows are answered."""

    query: Query
    returned: tuple[tuple[int, str, str], ...]
    """Tag, VR and keyword of each attribute that rows give, in the order of the tags."""
    fixed: Mapping[int, bytes]
    """Tag -> value that is the same in each row."""
    status: int
    """Of rows."""
    impossible: bool
    """Nothing can match."""


class QuerySCP:
    """C-FIND of the Patient Root, Study Root and Patient/Study Only models. A `dicom_node.dimse.services.Service`.

    Parameters
    ----------
    database
        Where the index is.
    audit
        Told of every search before the first match is sent.
    ae_title
        Retrieve AE Title of every answer: ours.
    unknown_peers
        May callers that are no configured peer ask? (Those that the door lets in.)
    maximum_rows
        Matches that one query is given; then 0xA700.
    search_s
        Longest search, waiting for its turn included.
    answers_s
        Longest operation.
    searches
        At once; others wait their turn.
    observe
        Told ``query.answered`` with ``level``, ``status``, ``matches`` and ``seconds``.
    """

    def __init__(
        self,
        *,
        database: Database,
        audit: AuditTrail,
        ae_title: str,
        unknown_peers: bool = False,
        maximum_rows: int = 10_000,
        search_s: float = 25.0,
        answers_s: float = 300.0,
        searches: int = 4,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._database = database
        self._audit = audit
        self._ae_title = ae_title
        self._unknown_peers = unknown_peers
        self._maximum_rows = maximum_rows
        self._answers_s = answers_s
        self._searches = Searches(searches, longest_s=search_s)
        self._observe = observe
        self._models = {model.find: model for model in MODELS}

    @property
    def abstract_syntaxes(self) -> Mapping[str, tuple[str, ...]]:
        """The three models, with Identifiers in Explicit or Implicit VR Little Endian."""
        return dict.fromkeys(self._models, TRANSFER_SYNTAXES)

    @property
    def sends_instances(self) -> bool:
        """It does not."""
        return False

    def permitted(self, peer: Peer | None) -> bool:
        """Whether a caller may ask."""
        return self._unknown_peers if peer is None else peer.retrieve

    def negotiated(self, abstract_syntax: str, information: bytes) -> bytes:  # noqa: ARG002 - the same for every model
        """Answer SOP Class Extended Negotiation: relational queries and combined date-time matching, no fuzzy names, no time zones."""
        return bytes(
            int(place in {_RELATIONAL, _COMBINED_DATETIME} and asked == 1) for place, asked in enumerate(information[:_NEGOTIABLE])
        )

    def serve(self, association: AcceptedAssociation, context: PresentationContext, request: Any) -> None:
        """Answer a C-FIND-RQ.

        Final status: 0000; A700 out of resources, rows or time; A900 or C000 the Identifier cannot be answered; 0122 another SOP
        class than the context's; FE00 cancelled.
        """
        if not operation.is_asked(C_FIND, association, context, request):
            return
        began = time.monotonic()
        asking = Operation(association, context, request, operation.C_FIND_RSP)
        rows = _Rows(asking)
        try:
            try:
                final = self._answer(association, context, request, rows, began)
            except InvalidIdentifier as error:
                final = _Final(error.status, str(error), error.offending)
            except InvalidQuery as error:
                final = _Final(error.failure_reason, str(error), _offending(str(error)))
            except StorageError as error:
                final = _Final(operation.OUT_OF_RESOURCES, str(error))
            except _GivenUp as given_up:
                final = given_up.final
            asking.respond(final.status, comment=final.comment, offending=final.offending)
        except OSError as error:
            log.warning("query.broken_off", peer=association.origin().peer, matches=rows.count, reason=type(error).__name__)
            association.abort(block=False)
            return
        seconds = time.monotonic() - began
        told = {"status": f"{final.status:04X}", "matches": rows.count}
        log.info("query.answered", peer=association.origin().peer, seconds=round(seconds, 3), reason=final.comment, **told)
        self._observe("query.answered", seconds=seconds, **told)

    def _answer(self, association: AcceptedAssociation, context: PresentationContext, request: Any, rows: _Rows, began: float) -> _Final:
        asking = rows.asking
        model = self._models.get(asking.sop_class_uid)
        if model is None or asking.sop_class_uid != str(context.abstract_syntax):
            return _Final(operation.SOP_CLASS_NOT_SUPPORTED, "SOP class is not that of the presentation context")
        encoded = request.Identifier.getvalue() if request.Identifier is not None else b""
        identifier = read_identifier(encoded, asking.transfer_syntax_uid)
        asked = self._read(model, identifier, negotiated_for(association, asking.sop_class_uid))
        finding = Finding(self._database, asked.query)
        count = 0 if asked.impossible else self._find(asking, finding)
        given = min(count, self._maximum_rows)
        self._note(association, asked.query, given)
        for page in finding.pages() if count else ():
            for match in page[: self._maximum_rows - rows.count]:
                rows.give(asked, match)
                _require_wanted(asking)
            if time.monotonic() - began > self._answers_s:
                return _Final(
                    operation.OUT_OF_RESOURCES, f"over {self._answers_s:g} s for {rows.count} of {given} matches; narrow the query"
                )
        if count > self._maximum_rows:
            return _Final(operation.OUT_OF_RESOURCES, f"more than {self._maximum_rows} matches, the first are given; narrow the query")
        return _Final(operation.SUCCESS)

    # -- the search ------------------------------------------------------------------------------------------------------------------

    def _find(self, asking: Operation, finding: Finding) -> int:
        try:
            return self._searches.run(asking, finding.find, finding.cancel)
        except SearchEnded as ended:
            reason = str(ended)
            raise _GivenUp(_Final(operation.OUT_OF_RESOURCES, reason) if reason else _Final(operation.CANCELLED)) from ended

    def _note(self, association: AcceptedAssociation, wanted: Query, matches: int) -> None:
        """Write the audit record of what a peer is about to see; without it nothing is shown."""
        origin = association.origin()
        keys = {keyword: value[:_AUDITED_LENGTH] for keyword, value in wanted.keys.items() if value}
        study = wanted.keys.get("StudyInstanceUID", "")
        event = AuditEvent(
            action="study.searched",
            outcome="success",
            actor=actor_of(origin),
            subject="" if "\\" in study else study,
            detail={**whence(origin), "level": str(wanted.level), "keys": keys, "matches": matches},
        )
        self._audit.record(event)

    # -- the request -----------------------------------------------------------------------------------------------------------------

    def _read(self, model: InformationModel, identifier: Identifier, negotiated: bytes) -> _Asked:
        """Divide the keys into what is matched and what is returned.

        Raises
        ------
        InvalidIdentifier
            Level or path are not of the model; a key is longer than any value.
        """
        model.require_level(identifier)
        if negotiated[_RELATIONAL : _RELATIONAL + 1] != b"\1":
            model.path(identifier)
        returned: dict[int, tuple[str, str]] = {QUERY_RETRIEVE_LEVEL: ("CS", ""), _RETRIEVE_AE_TITLE: ("AE", "")}
        returned |= dict.fromkeys(identifier.sequences, ("SQ", ""))
        fixed = {
            QUERY_RETRIEVE_LEVEL: identifier.level.value.encode("ascii"),
            _RETRIEVE_AE_TITLE: self._ae_title.encode("ascii", "replace"),
        }
        fixed |= dict.fromkeys(identifier.sequences, b"")
        keys: dict[str, str] = {}
        optional = identifier.beyond or bool(identifier.sequences)
        impossible = False
        for keyword, value in identifier.keys.items():
            tag = tag_for_keyword(keyword) or 0
            indexed, computed = INDEXED.get(keyword), _COMPUTED.get(keyword)
            of = indexed[0] if indexed is not None else computed
            if tag == _RETRIEVE_AE_TITLE:
                continue
            if tag == _INSTANCE_AVAILABILITY:
                returned[tag], fixed[tag] = ("CS", ""), b"ONLINE"
                continue
            if computed is Level.PATIENT and identifier.level is not Level.PATIENT:
                of = None  # counted where patients are asked for
            if of is None or DEPTH[of] > DEPTH[identifier.level]:
                optional = True
                continue
            returned[tag] = (indexed[1] if indexed is not None else dictionary_vr(tag), keyword)
            if not value.strip("*") or keyword in _NO_KEYS:
                continue
            if computed is not None and keyword != "ModalitiesInStudy":
                optional = True  # it is given, not matched
                continue
            keys[keyword] = _key(keyword, indexed[1] if indexed is not None else "CS", value)
            impossible |= not keys[keyword]
        combined = negotiated[_COMBINED_DATETIME : _COMBINED_DATETIME + 1] == b"\1"
        wanted = Query(identifier.level, keys, limit=self._maximum_rows + 1, combined_datetime=combined)
        status = operation.PENDING_WITHOUT_OPTIONAL if optional else operation.PENDING
        return _Asked(wanted, tuple((tag, *of) for tag, of in sorted(returned.items())), fixed, status, impossible)


class _Rows:
    """Sends matches, and counts them."""

    def __init__(self, asking: Operation) -> None:
        self.asking = asking
        self.count = 0
        self._explicit = asking.transfer_syntax_uid == EXPLICIT_VR_LITTLE_ENDIAN

    def give(self, asked: _Asked, match: Match) -> None:
        """Send one, perhaps together with the next.

        Raises
        ------
        OSError
            The peer is gone, or does not read.
        """
        known, fixed = match.attributes, asked.fixed
        elements = [
            (tag, vr, fixed[tag] if tag in fixed else text_value(vr, known.get(keyword, ()))) for tag, vr, keyword in asked.returned
        ]
        self.asking.respond(asked.status, identifier=write_identifier(elements, explicit=self._explicit), hold=True)
        self.count += 1


def _require_wanted(asking: Operation) -> None:
    if asking.cancelled or asking.over:
        raise _GivenUp(_Final(operation.CANCELLED))


def _key(keyword: str, vr: str, value: str) -> str:
    """Return a matching value within bounds; empty when nothing can match it."""
    tag = tag_for_keyword(keyword) or 0
    if vr == "UI":
        return "\\".join(uids(keyword, value))
    if len(value) > _TEXT_LENGTH:
        raise InvalidIdentifier(f"{keyword} is longer than any value of its VR", offending=(tag,))
    if keyword == "ModalitiesInStudy":
        members = sorted({part.strip() for part in value.replace(",", "\\").split("\\")} - {""})
        if len(members) > _MODALITIES:
            raise InvalidIdentifier(f"more than {_MODALITIES} modalities", offending=(tag,))
        return "\\".join(members)
    return value


def _offending(reason: str) -> tuple[int, ...]:
    """Return the attribute that a message of the index begins with."""
    tag = tag_for_keyword(reason.partition(":")[0])
    return () if tag is None else (tag,)
