"""Audit messages: of the schema whatever a record holds, whole in their frames, and with the right codes."""

from __future__ import annotations

import ast
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.audit_message import KINDS, LONGEST, AuditSource, framed, record_of
from storage.audit import AuditEntry
from storage.audit_outbox import Known, OutgoingRecord
from storage.records import AuditEvent
from tests.dicom_node.audit_repository import Message, frames_of, message_of
from tests.dicom_node.audit_schema import check

ROOT = Path(__file__).parents[2]
SOURCE = AuditSource(source_id="DERM_NODE", ae_title="DERM_NODE", host="node.example")
AT = datetime(2026, 11, 21, 19, 30, 1, 20, tzinfo=UTC)
TEXT = st.text(max_size=60) | st.sampled_from(
    ["", "Doe^Jané\\日本=", "]]>", "<a b='c'>&amp;\"", "\0\x1b[2J\r\n\t", "\ud800", "\ufffe", "x" * 9000]
)


def outgoing(event: AuditEvent, *, seq: int = 7, known: Known | None = None) -> OutgoingRecord:
    """A record on its way out."""
    fields = [seq, 5, event.action, event.outcome, event.actor, event.subject, json.dumps(dict(event.detail))]
    return OutgoingRecord(AuditEntry(seq, AT, event, "ab" * 32), json.dumps(fields), known)


def told(event: AuditEvent, **options: Any) -> Message:
    """Frame a record, take it apart as a repository would, and check it against the schema."""
    messages, rest = frames_of(framed(outgoing(event, **options), SOURCE))
    assert rest == b""
    (message,) = map(message_of, messages)
    check(message.xml)
    return message


@given(
    action=TEXT | st.sampled_from(sorted(KINDS)),
    outcome=TEXT | st.just("success"),
    actor=TEXT | st.sampled_from(["node", "operator"]),
    subject=TEXT,
    detail=st.dictionaries(
        TEXT
        | st.sampled_from(
            ["calling_ae_title", "address", "study_instance_uid", "destination", "folder", "keys", "instances", "kind", "user"]
        ),
        TEXT | st.integers() | st.dictionaries(TEXT, TEXT, max_size=3) | st.lists(TEXT, max_size=3),
        max_size=6,
    ),
    known=st.none() | st.builds(Known, TEXT, TEXT, TEXT, TEXT),
    seq=st.integers(1, 2**40),
)
def test_any_record_makes_a_message(
    action: str, outcome: str, actor: str, subject: str, detail: dict[str, Any], known: Known | None, seq: int
) -> None:
    """Control characters, markup, any script, halves of characters, any length: one frame, of the schema, short enough, numbered."""
    event = AuditEvent(action, outcome, actor, subject, detail)
    message = told(event, seq=seq, known=known)
    assert len(framed(outgoing(event, seq=seq, known=known), SOURCE)) <= LONGEST + 6
    assert message.number == (seq - 1) % (2**31 - 1) + 1
    assert message.pri == (85 if outcome == "success" else 84)
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", message.xml)
    if record := message.detail("audit record"):
        assert record_of(record)["detail"] == json.dumps(detail)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6), st.integers(0, 200_000))
def test_frames_are_found_again_wherever_a_stream_breaks_off(texts: list[tuple[str, str]], cut: int) -> None:
    """Octet counting: of a stream that breaks off anywhere every message before is whole, and the rest is known not to be."""
    frames = [framed(outgoing(AuditEvent("instance.received", "success", actor, subject)), SOURCE) for actor, subject in texts]
    stream = b"".join(frames)
    cut %= len(stream) + 1
    whole, rest = frames_of(stream[:cut])
    assert whole == [frame.partition(b" ")[2] for frame in frames][: len(whole)]
    assert sum(map(len, frames[: len(whole)])) + len(rest) == cut


def test_a_record_that_is_too_long_is_told_by_its_hash() -> None:
    """Details that no message holds stay in the trail; the message is whole, and names the record by number and hash."""
    event = AuditEvent("study.erased", "success", "operator", "1.2.3", {"study_keys": ["0" * 32] * 3000})
    message = told(event)
    assert message.detail("audit record") == ""
    assert message.detail("audit record hash") == "ab" * 32


def at(message: Message, path: str, attribute: str = "csd-code") -> list[str]:
    """Values of an attribute."""
    return [one.get(attribute, "") for one in message.root.findall(path)]


@pytest.mark.parametrize(
    ("event", "code", "action", "outcome", "roles"),
    [
        (AuditEvent("instance.received", "success", "CAM", "1.2", {"address": "10.0.0.1"}), "110104", "C", "0", ["110152", "110153"]),
        (AuditEvent("instance.duplicate", "success", "CAM", "1.2"), "110104", "R", "0", ["110152", "110153"]),
        (AuditEvent("instance.refused", "0xA700 full", "CAM", "1.2"), "110104", "C", "4", ["110152", "110153"]),
        (AuditEvent("instance.retrieved", "success", "VIEWER", "1.2"), "110104", "R", "0", ["110153", "110152"]),
        (AuditEvent("instance.retrieved", "success", "VIEWER", "1.2", {"destination": "PACS"}), "110104", "R", "0", ["110153", "110152"]),
        (AuditEvent("report.delivered", "success", "pacs", "1.2"), "110104", "C", "0", ["110153", "110152"]),
        (AuditEvent("study.searched", "success", "VIEWER", "", {"keys": {"PatientName": "D*"}}), "110112", "E", "0", ["110152", "110153"]),
        (AuditEvent("study.erased", "success", "operator", "1.2.3"), "110105", "D", "0", []),
        (AuditEvent("archive.backed_up", "success", "operator", "", {"folder": "/mnt"}), "110106", "R", "0", ["110153", "110154"]),
        (AuditEvent("archive.restored", "incomplete", "operator", "", {"folder": "/mnt"}), "110107", "C", "8", ["110152", "110155"]),
        (AuditEvent("association.refused", "unknown", "X", "", {"kind": "association"}), "110113", "E", "4", []),
        (AuditEvent("association.refused", "wrong passcode", "X", "", {"kind": "identity"}), "110114", "E", "4", []),
        (AuditEvent("instance.damaged", "digest", "node", "1.2"), "110113", "E", "8", []),
        (AuditEvent("keys.rotated", "success", "operator"), "110113", "E", "0", []),
        (AuditEvent("archive.verified", "success", "node"), "110100", "E", "0", ["110150"]),
        (AuditEvent("never.heard_of", "success", "node"), "110100", "E", "0", ["110150"]),
        (AuditEvent("application.started", "success", "node", "", {"role": "web"}), "110100", "E", "0", ["110150"]),
        (AuditEvent("user.identified", "success", "alice", "", {"address": "10.0.0.1", "by": "token"}), "110114", "E", "0", []),
    ],
)
def test_codes(event: AuditEvent, code: str, action: str, outcome: str, roles: list[str]) -> None:
    """Event, action, outcome and who was what in it, as A.5.3 has them; our own word for it is a second type code."""
    message = told(event)
    assert at(message, "EventIdentification/EventID") == [code]
    assert at(message, "EventIdentification", "EventActionCode") == [action]
    assert at(message, "EventIdentification", "EventOutcomeIndicator") == [outcome]
    assert at(message, "EventIdentification/EventTypeCode")[-1] == event.action
    assert at(message, "ActiveParticipant/RoleIDCode") == roles


def test_a_user_is_the_requestor() -> None:
    """Who identified at the door asked, not the machine; of all participants one is the requestor."""
    detail = {"user": "dr.who@clinic", "address": "10.0.0.1"}
    message = told(AuditEvent("instance.retrieved", "success", "VIEWER", "1.2", detail))
    asked = {one.get("UserID"): one.get("UserIsRequestor") for one in message.root.findall("ActiveParticipant")}
    assert asked == {"DERM_NODE": "false", "VIEWER": "false", "dr.who@clinic": "true"}


@pytest.mark.parametrize(("action", "code"), [("application.started", "110120"), ("application.stopped", "110121")])
def test_start_and_stop(action: str, code: str) -> None:
    """As A.5.3.1 has them: the type says which; the application is a participant, with its AE title, and not the requestor."""
    message = told(AuditEvent(action, "success", "node", "", {"role": "node"}))
    assert at(message, "EventIdentification/EventTypeCode")[0] == code
    assert at(message, "ActiveParticipant", "UserIsRequestor") == ["false"]
    assert at(message, "ActiveParticipant", "AlternativeUserID") == ["AETITLES=DERM_NODE"]
    assert at(message, "ActiveParticipant/RoleIDCode") == ["110150"]


def test_a_login() -> None:
    """As A.5.3.11 has it: who identified himself is the requestor, from where he called; the node is who let him in."""
    message = told(AuditEvent("user.identified", "success", "alice", "", {"address": "10.0.0.1", "by": "passcode"}))
    assert at(message, "EventIdentification/EventTypeCode")[0] == "110122"
    assert at(message, "ActiveParticipant", "UserID") == ["DERM_NODE", "alice"]
    assert at(message, "ActiveParticipant", "UserIsRequestor") == ["false", "true"]
    assert at(message, "ActiveParticipant", "NetworkAccessPointID")[1] == "10.0.0.1"
    assert at(message, "ActiveParticipant", "NetworkAccessPointTypeCode")[1] == "2"


def test_every_action_of_the_trail_has_its_kind() -> None:
    """What the program records is told with a code that was chosen for it, not as mere activity."""
    found: set[str] = set()
    for folder in ("storage", "dicom_node", "dicomweb"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "audit_message.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in {"AuditEvent", "event_of", "note", "_note_in", "_append", "_record"}:
                    given_ = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "action")]
                    words = [one.value for one in given_ if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                    found |= {word for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+", word)}
    assert len(found) > 35
    assert found - set(KINDS) == set()
