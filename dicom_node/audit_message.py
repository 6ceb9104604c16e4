"""A record of the audit trail as the message of the standard: XML of the Audit Trail Message Format, in a syslog message, in a frame.

Each message also carries the record itself, as its hash in the chain was made of: who keeps the messages can prove the trail, and holds
proof against whoever rewrites it here. Patients are named by their ID alone.

References
----------
DICOM PS3.15 A.5.1 (schema), A.5.2, A.5.3 (messages), A.6 (SYSLOG-TLS); PS3.16 CID 400 to 405; RFC 5424 (syslog), RFC 5425 4.3 (frames)
"""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from storage.audit_outbox import OutgoingRecord
    from storage.records import AuditEvent

LONGEST: Final = 32_768
"""Octets of a syslog message that every repository takes (PS3.15 A.6)."""
RECORD, HASH = "audit record", "audit record hash"
"""Types of ParticipantObjectDetail: what the hash was made of besides the hash before it; the hash, hexadecimal."""

_TEXT: Final = 400
"""Characters of a value; escaped and encoded at worst, all of a message together stay below `LONGEST`."""
_FACILITY = 10  # security/authorization
_NOTICE, _WARNING = 5, 4
_SEQUENCE: Final = 2**31 - 1  # RFC 5424 7.3.1
_NOT_XML = re.compile("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NOT_NAME = re.compile(r"[^\x21-\x7e]")
_STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
_OWN_SCHEME = "99DERMNODE"


class _Code(NamedTuple):
    value: str
    meaning: str
    scheme: str = "DCM"


# CID 400 Audit Event ID
ACTIVITY = _Code("110100", "Application Activity")
LOG_USED = _Code("110101", "Audit Log Used")
ACCESSED = _Code("110103", "DICOM Instances Accessed")
TRANSFERRED = _Code("110104", "DICOM Instances Transferred")
DELETED = _Code("110105", "DICOM Study Deleted")
EXPORT = _Code("110106", "Export")
IMPORT = _Code("110107", "Import")
NETWORK_ENTRY = _Code("110108", "Network Entry")
QUERY = _Code("110112", "Query")
ALERT = _Code("110113", "Security Alert")
AUTHENTICATION = _Code("110114", "User Authentication")
# CID 401 Audit Event Type Code
_START, _STOP = _Code("110120", "Application Start"), _Code("110121", "Application Stop")
_LOGIN = _Code("110122", "Login")
_ATTACH, _DETACH = _Code("110124", "Attach"), _Code("110125", "Detach")
_NODE_AUTHENTICATION = _Code("110126", "Node Authentication")
_NETWORK_CONFIGURATION = _Code("110128", "Network Configuration")
_SECURITY_CONFIGURATION = _Code("110129", "Security Configuration")
_OBJECT_SECURITY = _Code("110135", "Object Security Attributes Changed")
# CID 402 Audit Active Participant Role ID Code
_APPLICATION, _LAUNCHER = _Code("110150", "Application"), _Code("110151", "Application Launcher")
_DESTINATION, _SOURCE = _Code("110152", "Destination Role ID"), _Code("110153", "Source Role ID")
_DESTINATION_MEDIA, _SOURCE_MEDIA = _Code("110154", "Destination Media"), _Code("110155", "Source Media")
# CID 404 Audit Participant Object ID Type Code, and those of RFC 3881
_STUDY, _SOP_CLASS = _Code("110180", "Study Instance UID"), _Code("110181", "SOP Class UID")
_PATIENT = _Code("2", "Patient Number", "RFC-3881")
_URI = _Code("12", "URI", "RFC-3881")


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a kind of record is told."""

    event: _Code
    action: str
    """C, R, U, D or E."""
    type: _Code | None = None
    node: _Code | None = None
    """Our role in it."""
    other: _Code | None = None
    """The role of whom the record calls its actor."""
    ours: bool = False
    """Whether the node began it, and the actor was asked or told."""
    failure: str = "4"
    """The outcome that is no success: 4, minor; 8, serious."""
    asked: bool = True
    """Whether the node is the requestor of what it did by itself; starting and stopping it is never told so (A.5.3.1)."""


def _received(action: str) -> _Kind:
    return _Kind(TRANSFERRED, action, node=_DESTINATION, other=_SOURCE)


_DELIVERY: Final = _Kind(TRANSFERRED, "C", node=_SOURCE, other=_DESTINATION, ours=True)
_UNDELIVERED: Final = _Kind(TRANSFERRED, "C", node=_SOURCE, other=_DESTINATION, ours=True, failure="8")
_LOST: Final = _Kind(ALERT, "E", _OBJECT_SECURITY, failure="8")
_WORK: Final = _Kind(ACTIVITY, "E", node=_APPLICATION, other=_LAUNCHER)

_IDENTITY: Final = _Kind(AUTHENTICATION, "E", _LOGIN)

KINDS: Final[Mapping[str, _Kind]] = MappingProxyType(
    {
        # C: it was not here before; R: it was, and stays as it is; U: what is here was replaced
        "instance.received": _received("C"),
        "instance.duplicate": _received("R"),
        "instance.healed": _received("U"),
        "instance.quarantined": _received("C"),
        "instance.refused": _received("C"),
        "instance.retrieved": _Kind(TRANSFERRED, "R", node=_SOURCE, other=_DESTINATION),
        "instance.archived": _Kind(ACCESSED, "U"),
        "instance.adopted": _Kind(ACCESSED, "C"),
        "instance.found": _Kind(ACCESSED, "R"),
        "instance.damaged": _LOST,
        "instance.lost": _LOST,
        "instance.erased": _Kind(DELETED, "D"),
        "instances.committed": _Kind(ACCESSED, "R"),
        "commitment.unreported": _Kind(ACCESSED, "R"),
        "study.searched": _Kind(QUERY, "E", node=_DESTINATION, other=_SOURCE),
        "study.erased": _Kind(DELETED, "D"),
        "report.concluded": _Kind(ACCESSED, "C"),
        "report.delivered": _DELIVERY,
        "report.committed": _DELIVERY,
        "report.uncommitted": _UNDELIVERED,
        "report.unproven": _UNDELIVERED,
        "report.denied": _UNDELIVERED,
        "report.lost": _LOST,
        "delivery.given_up": _UNDELIVERED,
        "analysis.concluded": _Kind(ACCESSED, "R"),
        "analysis.refused": _Kind(ACCESSED, "R", failure="8"),
        "quarantine.accepted": _Kind(ACCESSED, "U"),
        "quarantine.dropped": _Kind(ACCESSED, "D"),
        "quarantine.lost": _LOST,
        "hold.placed": _Kind(ALERT, "E", _OBJECT_SECURITY),
        "hold.lifted": _Kind(ALERT, "E", _OBJECT_SECURITY),
        "application.started": _Kind(ACTIVITY, "E", _START, node=_APPLICATION, asked=False),
        "application.stopped": _Kind(ACTIVITY, "E", _STOP, node=_APPLICATION, asked=False),
        "user.identified": _IDENTITY,
        "association.refused": _Kind(ALERT, "E", _NODE_AUTHENTICATION),
        "peer.added": _Kind(ALERT, "E", _NETWORK_CONFIGURATION),
        "peer.removed": _Kind(ALERT, "E", _NETWORK_CONFIGURATION),
        "keys.added": _Kind(ALERT, "E", _SECURITY_CONFIGURATION),
        "keys.bound": _Kind(ALERT, "E", _SECURITY_CONFIGURATION),
        "keys.promoted": _Kind(ALERT, "E", _SECURITY_CONFIGURATION),
        "keys.rotated": _Kind(ALERT, "E", _SECURITY_CONFIGURATION),
        "keys.removed": _Kind(ALERT, "E", _SECURITY_CONFIGURATION),
        "retention.held": _Kind(ALERT, "E", _SECURITY_CONFIGURATION),
        "retention.clock_confirmed": _Kind(ALERT, "E", _SECURITY_CONFIGURATION),
        "node.lost": _Kind(NETWORK_ENTRY, "E", _DETACH),
        "node.returned": _Kind(NETWORK_ENTRY, "E", _ATTACH),
        "webhook.delivered": _Kind(EXPORT, "R", node=_SOURCE, other=_DESTINATION_MEDIA, ours=True),
        "changefeed.read": _Kind(LOG_USED, "R"),
        "archive.backed_up": _Kind(EXPORT, "R", node=_SOURCE),
        "archive.restored": _Kind(IMPORT, "C", node=_DESTINATION, failure="8"),
        "archive.moved": _WORK,
        "archive.reindexed": _WORK,
        "archive.verified": _Kind(ACTIVITY, "E", node=_APPLICATION, other=_LAUNCHER, failure="8"),
        "archive.scrubbed": _Kind(ACTIVITY, "E", node=_APPLICATION, other=_LAUNCHER, failure="8"),
        "jobs.requeued": _WORK,
        "job.requeued": _WORK,
    }
)
"""Action of the trail -> how it is told. Every other action is told as Application Activity."""
_OURSELVES = frozenset({"node", "retention"})


@dataclass(frozen=True, slots=True)
class AuditSource:
    """Who tells.

    Parameters
    ----------
    source_id
        AuditSourceID; the same for all nodes that share a trail.
    ae_title
        Of the node.
    host
        Name of this machine.
    site
        AuditEnterpriseSiteID; empty: none.
    """

    source_id: str
    ae_title: str
    host: str
    site: str = ""


def framed(record: OutgoingRecord, source: AuditSource) -> bytes:
    """Return the frame of a record: length, space, syslog message; never more than `LONGEST` octets of message.

    A record that is too long for a message is told without its details: the hash stands for them.
    """
    message = syslog_message(record, source)
    if len(message) > LONGEST:
        message = syslog_message(record, source, whole=False)
    return b"%d %s" % (len(message), message)


def syslog_message(record: OutgoingRecord, source: AuditSource, *, whole: bool = True) -> bytes:
    """Return the syslog message of a record; `whole`: with the record itself."""
    entry = record.entry
    priority = _FACILITY * 8 + (_NOTICE if entry.event.outcome == "success" else _WARNING)
    at = entry.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    host = _NOT_NAME.sub("", source.host)[:255] or "-"
    # The number of the record: who gets one twice knows it by that
    sequence = (entry.seq - 1) % _SEQUENCE + 1
    header = f'<{priority}>1 {at} {host} dicom-node - DICOM+RFC3881 [meta sequenceId="{sequence}"] '
    return header.encode("ascii") + b"\xef\xbb\xbf" + audit_message(record, source, whole=whole)


def audit_message(record: OutgoingRecord, source: AuditSource, *, whole: bool = True) -> bytes:
    """Return the AuditMessage of a record, in UTF-8."""
    event = record.entry.event
    kind = _kind_of(event)
    root = ET.Element("AuditMessage")
    identification = _add(
        root,
        "EventIdentification",
        EventActionCode=kind.action,
        EventDateTime=record.entry.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        EventOutcomeIndicator="0" if event.outcome == "success" else kind.failure,
    )
    _coded(identification, "EventID", kind.event)
    if kind.type is not None:
        _coded(identification, "EventTypeCode", kind.type)
    _coded(identification, "EventTypeCode", _Code(event.action, event.action, _OWN_SCHEME))
    if event.outcome != "success":
        _add(identification, "EventOutcomeDescription").text = _xml(event.outcome)
    _participants(root, event, kind, source)
    described = {"AuditEnterpriseSiteID": source.site} if source.site else {}
    audit_source = _add(root, "AuditSourceIdentification", **described, AuditSourceID=source.source_id)
    _add(audit_source, "AuditSourceTypeCode", **{"csd-code": "4"})  # application server process
    _objects(root, record, kind, whole=whole)
    _itself(root, record, source, whole=whole)
    encoded: bytes = ET.tostring(root, encoding="UTF-8", xml_declaration=True)
    return encoded


def _kind_of(event: AuditEvent) -> _Kind:
    if event.action == "association.refused" and event.detail.get("kind") == "identity":
        return _IDENTITY
    return KINDS.get(event.action, _WORK)


def _participants(root: ET.Element, event: AuditEvent, kind: _Kind, source: AuditSource) -> None:
    alone = event.actor in _OURSELVES
    node = _add(
        root,
        "ActiveParticipant",
        UserID=source.source_id,
        AlternativeUserID=f"AETITLES={source.ae_title}",
        UserIsRequestor="true" if (alone and kind.asked) or kind.ours else "false",
        NetworkAccessPointID=source.host,
        NetworkAccessPointTypeCode="1",
    )
    if kind.node is not None:
        _coded(node, "RoleIDCode", kind.node)
    if alone:
        return
    title, address = _text(event, "calling_ae_title"), _text(event, "address")
    told = {"AlternativeUserID": f"AETITLES={title}"} if title else {}
    if address:
        told |= {"NetworkAccessPointID": address, "NetworkAccessPointTypeCode": "2" if _is_address(address) else "1"}
    user = _text(event, "user")
    asked = "false" if kind.ours or user else "true"  # one of all may be the requestor
    other = _add(root, "ActiveParticipant", UserID=event.actor or "unknown", UserIsRequestor=asked, **told)
    destination = _text(event, "destination")
    if kind.other is not None and not destination:
        _coded(other, "RoleIDCode", kind.other)
    if user:
        _add(root, "ActiveParticipant", UserID=user, UserIsRequestor="false" if kind.ours else "true")
    if destination:  # C-MOVE: who asked is not who gets it
        third = _add(root, "ActiveParticipant", UserID=destination, UserIsRequestor="false")
        _coded(third, "RoleIDCode", _DESTINATION)
    if kind.event is EXPORT and (folder := _text(event, "folder")):
        media = _add(root, "ActiveParticipant", UserID=folder, UserIsRequestor="false")
        _coded(media, "RoleIDCode", _DESTINATION_MEDIA)
    if kind.event is IMPORT and (folder := _text(event, "folder")):
        media = _add(root, "ActiveParticipant", UserID=folder, UserIsRequestor="false")
        _coded(media, "RoleIDCode", _SOURCE_MEDIA)


def _objects(root: ET.Element, record: OutgoingRecord, kind: _Kind, *, whole: bool) -> None:
    event, known = record.entry.event, record.known
    if kind.event is QUERY:
        keys = event.detail.get("keys")
        asked = {"QueryRetrieveLevel": _text(event, "level"), **(keys if isinstance(keys, dict) else {})}
        query = _object(root, _STUDY_ROOT_FIND, _SOP_CLASS, role="3", name=None)
        encoded = urlencode(asked, errors="replace").encode("ascii")
        _add(query, "ParticipantObjectQuery").text = base64.b64encode(encoded if whole else b"").decode("ascii")
        _detail(query, "QueryEncoding", b"application/x-www-form-urlencoded; charset=UTF-8")
    study = known.study_instance_uid if known is not None else _text(event, "study_instance_uid")
    if not study and event.action.startswith(("study.", "hold.")):
        study = event.subject
    if study:
        life = {"C": "1", "D": "15"}.get(kind.action, "6")
        one = _object(root, study, _STUDY, role="3", life=life)
        if event.subject and event.subject != study:
            described = _add(one, "ParticipantObjectDescription")
            classes = {"UID": known.sop_class_uid} if known is not None and known.sop_class_uid else {}
            sop_class = _add(described, "SOPClass", **classes, NumberOfInstances=_count(event))
            if classes:
                _add(sop_class, "Instance", UID=event.subject)
    if known is not None and known.patient_id:
        number = known.patient_id + (f"^^^{known.issuer_of_patient_id}" if known.issuer_of_patient_id else "")
        _object(root, number, _PATIENT, type_="1", role="1")


def _itself(root: ET.Element, record: OutgoingRecord, source: AuditSource, *, whole: bool) -> None:
    """Add the record itself."""
    one = _object(root, f"urn:dicom-node:audit:{source.source_id}:{record.entry.seq}", _URI, role="13", name=RECORD)
    event = record.entry.event
    if _kind_of(event).event is ALERT:
        _detail(one, "Alert Description", f"{event.action}: {event.outcome}"[:_TEXT].encode("utf-8", "replace"))
    if whole:
        _detail(one, RECORD, record.canonical.encode("ascii"))
    _detail(one, HASH, record.entry.hash.encode("ascii"))


def _object(root: ET.Element, uid: str, code: _Code, *, type_: str = "2", role: str, life: str = "", name: str | None = "") -> ET.Element:
    cycle = {"ParticipantObjectDataLifeCycle": life} if life else {}
    one = _add(
        root,
        "ParticipantObjectIdentification",
        ParticipantObjectID=uid,
        ParticipantObjectTypeCode=type_,
        ParticipantObjectTypeCodeRole=role,
        **cycle,
    )
    _coded(one, "ParticipantObjectIDTypeCode", code)
    if name is not None:  # the schema wants name or query; empty: names of patients are not told
        _add(one, "ParticipantObjectName").text = _xml(name)
    return one


def _detail(one: ET.Element, kind: str, value: bytes) -> None:
    ET.SubElement(one, "ParticipantObjectDetail", {"type": kind, "value": base64.b64encode(value).decode("ascii")})


def _coded(parent: ET.Element, tag: str, code: _Code) -> None:
    told = {"csd-code": code.value, "codeSystemName": code.scheme, "displayName": code.meaning, "originalText": code.meaning}
    _add(parent, tag, **told)


def _add(parent: ET.Element, tag: str, **attributes: str) -> ET.Element:
    return ET.SubElement(parent, tag, {name: _xml(value) for name, value in attributes.items()})


def _xml(value: str) -> str:
    """Return a text as XML 1.0 may hold it, on one line; what it may not hold, and controls, become U+FFFD. Long ones are cut."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value if len(value) <= _TEXT else value[:_TEXT] + "…")


def _text(event: AuditEvent, name: str) -> str:
    value: Any = event.detail.get(name)
    return value if isinstance(value, str) else ""


def _count(event: AuditEvent) -> str:
    count = event.detail.get("instances")
    return str(count) if isinstance(count, int) else "1"


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def record_of(canonical: str) -> dict[str, Any]:
    """Return the members of what the detail `RECORD` holds, by name; for who reads a repository."""
    names = ("seq", "at", "action", "outcome", "actor", "subject", "detail")
    return dict(zip(names, json.loads(canonical), strict=True))
