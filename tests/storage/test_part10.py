"""Claims on the file format: what is dropped, what is read, what is refused."""

from __future__ import annotations

import io
import struct

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import InvalidInstance, StorageError, UnsupportedInstance
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, META_LIMIT, Part10Parser, part10_prefix
from storage.scan import valid_uid
from tests.storage.datasets import (
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    TRANSFER_SYNTAXES,
    VL_PHOTOGRAPHIC,
    photograph,
)

DATA = photograph()
PREFIX = part10_prefix(sop_class_uid=VL_PHOTOGRAPHIC, sop_instance_uid="2.25.1001.3.1", transfer_syntax_uid=EXPLICIT_VR_LITTLE_ENDIAN)


def parse(file: bytes, step: int = 0) -> tuple[Part10Parser, bytes]:
    """Parse the whole file in chunks of `step` bytes."""
    parser = Part10Parser()
    data = bytearray()
    for at in range(0, len(file), step or max(len(file), 1)):
        for piece in parser.feed(file[at : at + (step or len(file))]):
            assert parser.transfer_syntax_uid
            data += piece
    parser.finish()
    return parser, bytes(data)


def element(number: int, vr: bytes, value: bytes, group: int = 2) -> bytes:
    """Write one element of group 0002."""
    if vr in (b"OB", b"UN"):
        return struct.pack("<HH2sHI", group, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


def meta(*elements: bytes, group_length: int | None = None, preamble: bytes = bytes(128)) -> bytes:
    """Write preamble, prefix and group 0002; a group length of None leaves it out."""
    body = b"".join(elements)
    head = b"" if group_length is None else element(0, b"UL", struct.pack("<I", group_length))
    return preamble + b"DICM" + head + body


SYNTAX = element(0x10, b"UI", b"1.2.840.10008.1.2.1\0")
CLASS = element(0x02, b"UI", b"1.2.840.10008.5.1.4.1.1.77.1.4")


@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES)
@pytest.mark.parametrize("step", [0, 1, 3, 131])
def test_what_we_write_is_read_back(syntax: str, step: int) -> None:
    """The data set comes out bit-exact for any chunking, with its transfer syntax and what the file announces."""
    data = photograph(syntax)
    prefix = part10_prefix(sop_class_uid=VL_PHOTOGRAPHIC, sop_instance_uid="2.25.7", transfer_syntax_uid=syntax)
    parser, found = parse(prefix + data, step)
    assert found == data
    assert parser.transfer_syntax_uid == syntax
    assert (parser.announced.sop_class_uid, parser.announced.sop_instance_uid) == (VL_PHOTOGRAPHIC, "2.25.7")


def test_prefix_is_ours_and_conformant() -> None:
    """Pydicom reads the prefix without complaint: zero preamble, right group length, our implementation."""
    assert PREFIX[:132] == bytes(128) + b"DICM"
    read = pydicom.dcmread(io.BytesIO(PREFIX + DATA))
    assert read.file_meta.FileMetaInformationGroupLength == len(PREFIX) - 144
    assert read.file_meta.FileMetaInformationVersion == b"\0\1"
    assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID == "2.25.1001.3.1"
    assert read.file_meta.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert read.file_meta.ImplementationVersionName == IMPLEMENTATION_VERSION_NAME
    assert valid_uid(IMPLEMENTATION_CLASS_UID)
    assert 1 <= len(IMPLEMENTATION_VERSION_NAME) <= 16


@pytest.mark.parametrize("uid", ["", "1" * 65, "1.2.é"])
def test_prefix_refuses_what_is_no_uid(uid: str) -> None:
    """The writer does not write what its own reader would refuse."""
    with pytest.raises(ValueError, match="1 to 64"):
        part10_prefix(sop_class_uid=VL_PHOTOGRAPHIC, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT_VR_LITTLE_ENDIAN)


@pytest.mark.parametrize("group_length", [None, 0, 1, len(SYNTAX + CLASS), len(CLASS), 9999, 0xFFFFFFFF])
@pytest.mark.parametrize("step", [0, 1])
def test_group_length_is_a_hint(group_length: int | None, step: int) -> None:
    """Right, wrong or absent, the data set begins after the last element of group 0002."""
    parser, data = parse(meta(CLASS, SYNTAX, group_length=group_length) + DATA, step)
    assert data == DATA
    assert parser.transfer_syntax_uid == EXPLICIT_VR_LITTLE_ENDIAN


def test_group_length_decides_where_bytes_look_alike() -> None:
    """A deflated stream may begin with the bytes of group 0002: a right group length ends the meta information before it."""
    stream = b"\x02\x00\x10\x00\xff\xff\x00\x01"
    deflated = element(0x10, b"UI", b"1.2.840.10008.1.2.1.99")
    assert parse(meta(deflated, group_length=len(deflated)) + stream)[1] == stream


@pytest.mark.parametrize("syntax", [EXPLICIT_VR_BIG_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN])
def test_preamble_is_dropped(syntax: bytes) -> None:
    """A preamble that makes the file a program or a TIFF as well is no part of the instance."""
    uid = syntax.encode() if isinstance(syntax, str) else syntax
    file = meta(element(0x10, b"UI", uid + b"\0" * (len(uid) % 2)), preamble=b"MZ" + b"#!/bin/sh" * 14) + photograph(uid.decode())
    assert parse(file)[1] == photograph(uid.decode())


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (DATA, "not DICM"),
        (bytes(128) + b"DICN" + DATA, "not DICM"),
        (DATA[:10] + b"DICM" + DATA * 3, "not DICM"),
        (b"", "ends before"),
        (bytes(131), "ends before"),
        (meta(CLASS) + DATA, r"no Transfer Syntax UID \(0002,0010\)"),
        (meta(CLASS, element(0x10, b"UI", b"")) + DATA, "no Transfer Syntax UID"),
        (meta() + DATA, "no Transfer Syntax UID"),
        (meta(SYNTAX), "ends before"),
        (meta(SYNTAX) + DATA[:7], "ends before"),
        (meta(b"\x02\0\x10\0\x14\0\0\0" + b"1.2.840.10008.1.2.1\0") + DATA, "must be Explicit VR Little Endian"),
        (meta(element(0x01, b"  ", b"\0\1")) + DATA, "must be Explicit VR Little Endian"),
        (meta(element(0x01, b"\0\0", b"\0\1")) + DATA, "must be Explicit VR Little Endian"),
        (meta(struct.pack("<HH2sHI", 2, 0x0102, b"OB", 0, 0xFFFFFFFF)) + DATA, "passes the limit"),
        (meta(struct.pack("<HH2sHI", 2, 0x0102, b"OB", 0, META_LIMIT)) + DATA, "passes the limit"),
        (meta(*[element(0x0102, b"SH", b"ab")] * 7000) + DATA, "limit of 65536"),
    ],
)
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_refused_with_a_reason(file: bytes, reason: str, step: int) -> None:
    """No preamble, no prefix, no transfer syntax, malformed or endless meta information: refused, and why."""
    with pytest.raises(InvalidInstance, match=reason):
        parse(file, step)


@pytest.mark.parametrize("uid", [b"1.2.3.4 ", b"1.2.840.10008.1.2.7.1\0", b"\xff\xff"])
def test_unknown_transfer_syntax(uid: bytes) -> None:
    """An encoding that is unknown is not guessed, and the peer's text is not repeated."""
    with pytest.raises(UnsupportedInstance, match="unknown here") as refusal:
        parse(meta(element(0x10, b"UI", uid)) + DATA)
    assert "1.2." not in str(refusal.value)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damage_raises_nothing_else(data: st.DataObject) -> None:
    """Any flipped bytes before the data set: parsed, or refused as a StorageError; the data set is never longer than the file."""
    file = bytearray(PREFIX + DATA)
    for _ in range(data.draw(st.integers(1, 5))):
        file[data.draw(st.integers(0, len(PREFIX) + 8))] = data.draw(st.integers(0, 255))
    try:
        _, found = parse(bytes(file), data.draw(st.integers(1, 400)))
    except StorageError:
        return
    assert bytes(file).endswith(found)


def test_every_truncation_of_the_prefix_is_refused() -> None:
    """A file that ends before its data set is no file."""
    for cut in range(len(PREFIX) + 1):
        with pytest.raises(InvalidInstance):
            parse(PREFIX[:cut])
