"""Error Comment: what a sender's log shows of our sentences is whole words that say what happened."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.dimse.comment import LENGTH, in_brief
from dicom_node.dimse.message import StoreRequest, comment, store_response
from storage import postgresql

ROOT = Path(__file__).parents[2]
# Where an instance on its way in passes.
MODULES = ("admission", "database", "index", "intake", "keys", "kms", "landing", "objects", "part10", "scan", "sqlite", "study_keys")
ERRORS = {"InvalidInstance", "MismatchedInstance", "UnsupportedInstance", "ConflictingInstance", "Unavailable", "IntegrityError"}


def sentences() -> Iterator[tuple[str, str]]:
    """Give every message of an error that these modules make, placeholders filled."""
    for module in MODULES:
        path = ROOT / "storage" / f"{module}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
                match node.args[0]:
                    case ast.Constant(value=str(text)):
                        yield f"{module}:{node.lineno}", text
                    case ast.JoinedStr(values=parts):
                        yield f"{module}:{node.lineno}", "".join(str(p.value) if isinstance(p, ast.Constant) else "12345" for p in parts)
    for states, text in (*postgresql._WORDS, *postgresql._REFUSALS):
        yield f"postgresql:{states[0]}", text.format(who="user 'dicom_node', database 'dicom_node' of db.hospital.example")


@pytest.mark.parametrize(("place", "text"), tuple(sentences()))
def test_every_sentence_has_an_essence(place: str, text: str) -> None:
    """All that can be told to a sender fits into 64 characters without being broken off."""
    brief = in_brief(text)
    assert 12 <= len(brief) <= LENGTH or brief == text, place
    assert not brief.endswith("..."), f"{place}: {brief!r} is broken off: shorten its cause, or give dimse/comment.py a shorter one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "an instance of this SOP Instance UID and other content is archived; this one is kept in quarantine; an operator decides",
            "other content is archived under this SOP Instance UID",
        ),
        (
            "cannot write bucket 'derm' at https://s3.eu-central-1.amazonaws.com: access denied (AccessDenied); check the credentials",
            "cannot write the bucket: access denied (AccessDenied)",
        ),
        (
            "/var/lib/dicom-node/landing: 300 MiB free, 512 MiB are kept in reserve; free space or enlarge it",
            "the node's disk: 300 MiB free, 512 MiB are kept in reserve",
        ),
        (
            "(7FE0,0010) at byte 852: native Pixel Data in an encapsulated transfer syntax; send it in Explicit VR Little Endian instead",
            "(7FE0,0010) native Pixel Data in an encapsulated transfer syntax",
        ),
        (
            "(0010,0010) at byte 123456 in item 3 of (0040,A730): the length of 70000 bytes runs past the enclosing sequence or item",
            "(0010,0010) the length of 70000 bytes runs past its item",
        ),
        ("a" * 100, "a" * 61 + "..."),
        ("short", "short"),
    ],
)
def test_what_is_said_in_brief(text: str, expected: str) -> None:
    """Cause first; where the node's own paths and hosts stand before it, without them."""
    assert in_brief(text) == expected


def test_a_response_carries_the_essence() -> None:
    """What goes over the wire is the essence, not the first 64 characters."""
    request = StoreRequest(message_id=1, sop_class_uid="1.2", sop_instance_uid="1.3", has_data_set=True)
    long = "an instance of this SOP Instance UID and other content is archived; this one was dropped, as configured"
    assert b"other content is archived under this SOP Instance UID" in store_response(request, 0x0111, long)


@given(st.text(max_size=300))
def test_a_comment_is_always_an_lo(text: str) -> None:
    """Whatever the sentence: at most 64 characters of printable ASCII, no backslash, of even length."""
    encoded = comment(text)
    assert len(encoded) <= LENGTH
    assert len(encoded) % 2 == 0
    assert all(0x20 <= byte < 0x7F and byte != 0x5C for byte in encoded)
