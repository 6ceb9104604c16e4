"""The schema of audit messages (DICOM PS3.15 A.5.1) as a check: elements and their order, attributes, values. No library is needed."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from xml.etree import ElementTree as ET


def _any(_value: str) -> bool:
    return True


def _token(_value: str) -> bool:
    return True  # of any text: white space is collapsed before it is looked at


def _boolean(value: str) -> bool:
    return value in {"true", "false", "0", "1"}


def _binary(value: str) -> bool:
    return base64.b64encode(base64.b64decode(value, validate=True)).decode() == value


def _moment(value: str) -> bool:
    return datetime.fromisoformat(value).utcoffset() is not None  # A.5.2.5: with its time zone


def _whole(value: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", value) is not None


def _one_of(*values: object) -> Callable[[str], bool]:
    return {str(value) for value in values}.__contains__


@dataclass(frozen=True)
class Element:
    """What an element may hold: attributes (``?`` behind the name: optional), children in order, text."""

    attributes: Mapping[str, Callable[[str], bool]] = field(default_factory=dict)
    children: str = ""
    """A regular expression over the children's names, each with a space behind."""
    text: Callable[[str], bool] = "".__eq__


_OTHER = {"codeSystemName": _token, "displayName?": _token, "originalText": _token}
_CODED = Element({"csd-code": _token, **_OTHER})
SCHEMA: Mapping[str, Element] = {
    "AuditMessage": Element({}, "EventIdentification (ActiveParticipant )+AuditSourceIdentification (ParticipantObjectIdentification )*"),
    "EventIdentification": Element(
        {
            "EventActionCode?": _one_of("C", "R", "U", "D", "E"),
            "EventDateTime": _moment,
            "EventOutcomeIndicator": _one_of(0, 4, 8, 12),
        },
        "EventID (EventTypeCode )*(EventOutcomeDescription )?",
    ),
    "EventID": _CODED,
    "EventTypeCode": _CODED,
    "EventOutcomeDescription": Element(text=_any),
    "ActiveParticipant": Element(
        {
            "UserID": _any,
            "AlternativeUserID?": _any,
            "UserName?": _any,
            "UserIsRequestor": _boolean,
            "NetworkAccessPointID?": _any,
            "NetworkAccessPointTypeCode?": _one_of(*range(1, 6)),
        },
        "(RoleIDCode )*(MediaIdentifier )?",
    ),
    "RoleIDCode": _CODED,
    "AuditSourceIdentification": Element({"AuditEnterpriseSiteID?": _token, "AuditSourceID": _token}, "(AuditSourceTypeCode )*"),
    "AuditSourceTypeCode": Element({"csd-code": _one_of(*range(1, 10))}),
    "ParticipantObjectIdentification": Element(
        {
            "ParticipantObjectID": _any,
            "ParticipantObjectTypeCode?": _one_of(*range(1, 5)),
            "ParticipantObjectTypeCodeRole?": _one_of(*range(1, 27)),
            "ParticipantObjectDataLifeCycle?": _one_of(*range(1, 16)),
            "ParticipantObjectSensitivity?": _token,
        },
        "ParticipantObjectIDTypeCode (ParticipantObjectName |ParticipantObjectQuery )"
        "(ParticipantObjectDetail )*(ParticipantObjectDescription )*",
    ),
    "ParticipantObjectIDTypeCode": _CODED,
    "ParticipantObjectName": Element(text=_any),
    "ParticipantObjectQuery": Element(text=_binary),
    "ParticipantObjectDetail": Element({"type": _token, "value": _binary}),
    "ParticipantObjectDescription": Element(
        {}, "(MPPS )*(Accession )*(SOPClass )*(ParticipantObjectContainsStudy )?(Encrypted )?(Anonymized )?"
    ),
    "SOPClass": Element({"UID?": _token, "NumberOfInstances": _whole}, "(Instance )*"),
    "Instance": Element({"UID": _any}),
}


def check(xml: bytes) -> ET.Element:
    """Check a message against the schema, and what A.5.2 says besides; return its root."""
    root = ET.fromstring(xml)  # noqa: S314 - our own
    assert root.tag == "AuditMessage"
    _check(root)
    asked = [one.get("UserIsRequestor") for one in root.iter("ActiveParticipant")]
    assert asked.count("true") <= 1, "one requestor at most"
    return root


def _check(element: ET.Element) -> None:
    rule = SCHEMA[element.tag]
    allowed = {name.rstrip("?"): test for name, test in rule.attributes.items()}
    for name, value in element.attrib.items():
        assert name in allowed, f"{element.tag} has no attribute {name}"
        assert allowed[name](value), f"{element.tag} {name}={value!r}"
    for name in rule.attributes:
        assert name.endswith("?") or name in element.attrib, f"{element.tag} lacks {name}"
    children = "".join(f"{child.tag} " for child in element)
    assert re.fullmatch(rule.children, children), f"{element.tag} holds {children}"
    assert rule.text(element.text or ""), f"{element.tag} holds the text {element.text!r}"
    for child in element:
        assert not child.tail
        _check(child)
