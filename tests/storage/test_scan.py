"""Claims on the scanner: what it learns, what it refuses, and that it does neither more nor less for any way of feeding it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom.filereader import read_dataset

from storage.charset import decode
from storage.errors import InvalidInstance, UnsupportedInstance
from storage.iod import TRANSFER_SYNTAXES
from storage.part10 import Part10Parser
from storage.records import INDEXED, Limits, Summary
from storage.scan import VALUE_LIMIT, DataSetScanner, valid_uid
from tests.storage.datasets import (
    COMPREHENSIVE_3D_SR,
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    ENCAPSULATED,
    ENCAPSULATED_PDF,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    JPEG_BASELINE,
    MULTIFRAME_BYTE,
    SECONDARY_CAPTURE,
    UNDEFINED,
    Drawn,
    Element,
    deflate,
    documents,
    encode,
    identity,
    instances,
    photograph,
    pixels,
    text,
)

LIMITS = Limits()
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def scan(data: bytes, transfer_syntax_uid: str = EXPLICIT_VR_LITTLE_ENDIAN, limits: Limits = LIMITS, step: int = 0) -> Summary:
    """Scan the whole data set, in chunks of `step` bytes."""
    scanner = DataSetScanner(transfer_syntax_uid, limits)
    for at in range(0, len(data), step or max(len(data), 1)):
        scanner.feed(data[at : at + (step or len(data))])
    return scanner.finish()


def refused(data: bytes, match: str, transfer_syntax_uid: str = EXPLICIT_VR_LITTLE_ENDIAN, limits: Limits = LIMITS) -> None:
    """Expect a refusal whose message matches."""
    with pytest.raises(InvalidInstance, match=match):
        scan(data, transfer_syntax_uid, limits)


# --- what it learns ---------------------------------------------------------------------------------------------------------------


@MANY
@given(st.one_of(instances(), documents()), st.data())
def test_any_chunking_gives_the_same_summary(drawn: Drawn, data: st.DataObject) -> None:
    """How the network cuts the bytes changes nothing."""
    whole = scan(drawn.data, drawn.transfer_syntax_uid)
    scanner = DataSetScanner(drawn.transfer_syntax_uid, LIMITS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(drawn.data)), max_size=8)))
    for start, end in zip([0, *cuts], [*cuts, len(drawn.data)], strict=True):
        scanner.feed(memoryview(drawn.data)[start:end])
    assert scanner.finish() == whole
    assert scan(drawn.data, drawn.transfer_syntax_uid, step=1) == whole


@MANY
@given(instances())
def test_agrees_with_pydicom(drawn: Drawn) -> None:
    """An independent reader finds the same values, and the digest is over the bytes as given."""
    summary = scan(drawn.data, drawn.transfer_syntax_uid)
    data = drawn.data
    if drawn.transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = read_dataset(
            io.BytesIO(data),
            is_implicit_VR=drawn.transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN,
            is_little_endian=drawn.transfer_syntax_uid != EXPLICIT_VR_BIG_ENDIAN,
        )
        expected = {
            keyword: tuple(str(value).strip() for value in ([element.value] if element.VM == 1 else element.value) or ())
            for keyword in INDEXED
            if keyword in other and (element := other[keyword]) is not None
        }
    assert {keyword: tuple(value.rstrip() for value in values) for keyword, values in summary.attributes.items()} == expected
    assert summary.sha256 == hashlib.sha256(drawn.data).hexdigest()
    assert summary.byte_count == len(drawn.data)
    assert summary.has_pixel_data
    if drawn.transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        assert summary.pixel_data_offset == -1
    else:
        order = ">HH" if drawn.transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN else "<HH"
        assert struct.unpack_from(order, drawn.data, summary.pixel_data_offset) == (0x7FE0, 0x0010)


def test_report_is_recognised() -> None:
    """Title code, model name and software versions of a report are found at the top, and only there."""
    inner = (text(0x00080100, "SH", "113014"),)
    title = (text(0x00080100, "SH", "126000"), text(0x00080102, "SH", "DCM"), Element(0x0040A170, "SQ", items=(inner,)))
    content = (Element(0x0040A043, "SQ", items=((text(0x00080100, "SH", "999"),),)),)
    elements = sorted(
        [
            *identity(COMPREHENSIVE_3D_SR),
            text(0x00081090, "LO", "dicom-node"),
            text(0x00181020, "LO", "0.1.0\\bundle 3"),
            Element(0x0040A043, "SQ", items=(title,), undefined=True),
            Element(0x0040A730, "SQ", items=(content,)),
        ],
        key=lambda element: element.tag,
    )
    for syntax in (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN):
        summary = scan(encode(elements, syntax), syntax, step=7)
        assert summary.document_title_code == "126000"
        assert summary.manufacturer_model_name == "dicom-node"
        assert summary.software_versions == "0.1.0\\bundle 3"
        assert not summary.has_pixel_data
        assert summary.pixel_data_offset == -1


def test_empty_and_multiple_values() -> None:
    """An empty attribute is there with no value; backslashes part values; numbers are decimal text."""
    elements = identity(SECONDARY_CAPTURE) + pixels(rows=3, columns=5)
    elements[4] = text(0x00100020, "LO", "")
    elements.insert(3, text(0x00081030, "LO", " first \\second"))
    attributes = scan(encode(elements, EXPLICIT_VR_BIG_ENDIAN), EXPLICIT_VR_BIG_ENDIAN).attributes
    assert attributes["PatientID"] == ()
    assert attributes["StudyDescription"] == ("first", "second")
    assert (attributes["Rows"], attributes["Columns"]) == (("3",), ("5",))


@pytest.mark.parametrize(
    ("terms", "value", "expected"),
    [
        (("ISO_IR 100",), b"M\xfcller", "Müller"),
        (("", "ISO 2022 IR 87"), b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
        (("", "ISO 2022 IR 149"), b"Hong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7", "Hong=洪^吉洞"),
        (("ISO 2022 IR 100", "ISO 2022 IR 144"), b"\xe9=\x1b-L\xd6", "é=ж"),
        (("GB18030",), b"\xcd\xf5^\xd0\xa1\xb6\xab", "王^小东"),
        (("ISO_IR 192",), b"\xff\xfe", "\N{REPLACEMENT CHARACTER}" * 2),
        (("no such term",), b"\xe9", "é"),
        (("", "ISO 2022 IR 87"), b"a\x1b%Zb", "a\N{REPLACEMENT CHARACTER}%Zb"),
    ],
)
def test_character_sets(terms: tuple[str, ...], value: bytes, expected: str) -> None:
    """Published examples decode (PS3.5 Annexes H, I, K); what makes no sense becomes U+FFFD, never an exception."""
    assert decode(value, terms) == expected


@given(st.lists(st.sampled_from(["", "ISO_IR 192", "ISO 2022 IR 87", "ISO 2022 IR 149", "GBK", "ISO_IR 13", "x"]), max_size=3), st.binary())
def test_decoding_never_raises(terms: list[str], value: bytes) -> None:
    """Any bytes under any character set become some text, without a warning (which is an error in these tests)."""
    assert isinstance(decode(b"\x1b$B" + value, terms) + decode(value, terms), str)


@pytest.mark.parametrize("uid", ["1", "1.2.840.10008.1.2", "2.25." + "9" * 59, "0.0", "1.02.3"])
def test_valid_uids(uid: str) -> None:
    """The grammar of PS3.5 9.1; leading zeros are borne."""
    assert valid_uid(uid)


@pytest.mark.parametrize(
    "uid", ["", ".", "1.", ".1", "1..2", "1.2a", "1.2\n", "../../x", "1/2", "1.2 ", "1.\u0663", "9" * 65, "-1", "1.2\0"]
)
def test_invalid_uids(uid: str) -> None:
    """Nothing that could be a path, a second line or another digit passes."""
    assert not valid_uid(uid)


# --- what it refuses --------------------------------------------------------------------------------------------------------------


@FEW
@given(st.one_of(instances(), documents()))
def test_every_truncation_is_refused(drawn: Drawn) -> None:
    """Cut at any offset, an instance is refused; the one NUL after a deflated stream is no part of it."""
    data = drawn.data
    if drawn.transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(data)
        data = data[: len(data) - len(inflater.unused_data)]
    for cut in range(len(data)):
        with pytest.raises(InvalidInstance):
            scan(data[:cut], drawn.transfer_syntax_uid)


@MANY
@given(st.one_of(instances(), documents()), st.data())
def test_damage_raises_nothing_else(drawn: Drawn, data: st.DataObject) -> None:
    """Flipped, removed and inserted bytes: a summary or InvalidInstance, nothing else."""
    damaged = bytearray(drawn.data)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    at = data.draw(st.integers(0, len(damaged)))
    damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(InvalidInstance):
        scan(bytes(damaged), drawn.transfer_syntax_uid, step=data.draw(st.integers(1, 50)))


@MANY
@example(b"", EXPLICIT_VR_LITTLE_ENDIAN)
@given(st.binary(max_size=200), st.sampled_from(sorted(TRANSFER_SYNTAXES)))
def test_noise_is_refused(data: bytes, transfer_syntax_uid: str) -> None:
    """Bytes that are no data set are refused in every transfer syntax."""
    with pytest.raises(InvalidInstance):
        scan(data, transfer_syntax_uid)


def test_unknown_transfer_syntax() -> None:
    """Without the encoding nothing can be judged."""
    with pytest.raises(UnsupportedInstance):
        DataSetScanner("1.2.3.4", LIMITS)


def test_refusal_names_tag_and_offset_and_no_value() -> None:
    """A person finds the place; what the peer wrote there is not repeated."""
    elements = identity(SECONDARY_CAPTURE)
    elements[1] = text(0x00080018, "UI", "SECRET-NAME")
    with pytest.raises(InvalidInstance) as refusal:
        scan(encode(elements + pixels(rows=2, columns=2), EXPLICIT_VR_LITTLE_ENDIAN))
    assert "(0008,0018)" in str(refusal.value)
    assert "SECRET" not in str(refusal.value)
    with pytest.raises(InvalidInstance, match=r"^\(7FE0,0010\) at byte \d+: the pixel data is 14 bytes long"):
        scan(encode(identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2, data=bytes(14)), EXPLICIT_VR_LITTLE_ENDIAN))


@pytest.mark.parametrize("tag", [0x00080016, 0x00080018, 0x0020000D, 0x0020000E])
def test_uids_are_required(tag: int) -> None:
    """An instance without one of the four UIDs, or with two values for it, cannot be filed."""
    whole = identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2)
    refused(encode([element for element in whole if element.tag != tag], EXPLICIT_VR_LITTLE_ENDIAN), "is missing")
    twice = [text(tag, "UI", "1.2\\1.3") if element.tag == tag else element for element in whole]
    refused(encode(twice, EXPLICIT_VR_LITTLE_ENDIAN), "is no UID")


@pytest.mark.parametrize("tag", [0x00000002, 0x00020010, 0x00010001, 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFE0001])
@pytest.mark.parametrize("syntax", [EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN])
def test_foreign_groups(tag: int, syntax: str) -> None:
    """Commands, file meta information and item tags are no elements of a data set."""
    data = encode([Element(tag, "UI")], syntax) + photograph(syntax)
    refused(data, "belongs to commands|stands where", syntax)


def test_order() -> None:
    """A repeated tag and one out of order are refused, at the top and inside an item."""
    twice = [text(0x00100020, "LO", "A"), text(0x00100020, "LO", "B")]
    refused(encode(twice, EXPLICIT_VR_LITTLE_ENDIAN), "stands there twice")
    back = [text(0x00100020, "LO", "A"), text(0x00100010, "PN", "B")]
    refused(encode(back, EXPLICIT_VR_LITTLE_ENDIAN), r"must ascend, but \(0010,0020\) came before")
    refused(encode([Element(0x00081140, "SQ", items=(tuple(back),))], EXPLICIT_VR_LITTLE_ENDIAN), "must ascend")


@pytest.mark.parametrize("length", [0xFFFFFFFE, 0x20202020 + LIMITS.object_bytes, LIMITS.object_bytes])
def test_lengths_past_the_limit_are_refused_at_their_header(length: int) -> None:
    """The header alone is enough; nothing is allocated."""
    scanner = DataSetScanner(EXPLICIT_VR_LITTLE_ENDIAN, LIMITS)
    with pytest.raises(InvalidInstance, match="runs past"):
        scanner.feed(struct.pack("<HH2sHI", 0x0042, 0x0011, b"OB", 0, length))


def test_object_limit() -> None:
    """An endless instance ends at the limit."""
    data = photograph()
    assert scan(data, limits=Limits(object_bytes=len(data))).byte_count == len(data)
    refused(data, "limit of", limits=Limits(object_bytes=len(data) - 1))


def test_child_may_not_leave_its_parent() -> None:
    """An element longer than the item or sequence around it is refused."""
    item = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 16) + struct.pack("<HHI", 0xFFFE, 0xE000, 8)
    refused(item + struct.pack("<HH2sH", 0x0008, 0x1150, b"UI", 2) + b"1\0" + photograph(), "runs past the enclosing")
    refused(
        struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 8) + struct.pack("<HHI", 0xFFFE, 0xE000, 9) + bytes(40), "runs past the enclosing"
    )


def test_undefined_inside_defined_needs_its_delimiter() -> None:
    """A sequence that the end of its parent cuts off is refused."""
    data = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 8) + struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)
    refused(data + photograph(), "before the delimiter")


@pytest.mark.parametrize("order", ["<", ">"])
def test_delimiters_stand_where_they_end_something(order: str) -> None:
    """A delimiter of non-zero length, and one inside a sequence or item of defined length, are refused."""
    syntax = EXPLICIT_VR_LITTLE_ENDIAN if order == "<" else EXPLICIT_VR_BIG_ENDIAN

    whole = identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2)

    def instance(length: int, *items: tuple[int, int]) -> bytes:
        sequence = struct.pack(f"{order}HH2sHI", 0x0008, 0x1140, b"SQ", 0, length)
        sequence += b"".join(struct.pack(f"{order}HHI", 0xFFFE, number, size) for number, size in items)
        return encode(whole[:3], syntax) + sequence + encode(whole[3:], syntax)

    item, item_end, sequence_end = 0xE000, 0xE00D, 0xE0DD
    for data in (
        instance(UNDEFINED, (item, UNDEFINED), (item_end, 0), (sequence_end, 0)),
        instance(UNDEFINED, (item, 0), (sequence_end, 0)),
        instance(8, (item, 0)),
        instance(16, (item, UNDEFINED), (item_end, 0)),
    ):
        assert scan(data, syntax).has_pixel_data
    for data in (
        instance(UNDEFINED, (item, UNDEFINED), (item_end, 2), (sequence_end, 0)),
        instance(UNDEFINED, (item, 8), (item_end, 0), (sequence_end, 0)),
        instance(UNDEFINED, (item, UNDEFINED), (sequence_end, 0), (item_end, 0)),
        instance(UNDEFINED, (item, 0), (sequence_end, 2)),
        instance(UNDEFINED, (item, 0), (item_end, 0), (sequence_end, 0)),
        instance(16, (item, 0), (sequence_end, 0)),
        instance(16, (item, 0), (item_end, 0)),
    ):
        refused(data, "stands where|is expected here", syntax)


@pytest.mark.parametrize("vr", [b"OB", b"OW", b"UT", b"OF", b"ZZ"])
def test_undefined_length_needs_a_sequence(vr: bytes) -> None:
    """Only SQ, UN and encapsulated pixel data may have one."""
    refused(struct.pack("<HH2sHI", 0x0031, 0x1010, vr, 0, UNDEFINED), "an undefined length stands where")
    for syntax, match in ((EXPLICIT_VR_LITTLE_ENDIAN, "does not encapsulate"), (JPEG_BASELINE, "Samples per Pixel is not one")):
        expected = match if vr in (b"OB", b"OW") else "an undefined length stands where"
        refused(struct.pack("<HH2sHI", 0x7FE0, 0x0010, vr, 0, UNDEFINED), expected, syntax)


@pytest.mark.parametrize(("vr", "length"), [(b"UN", UNDEFINED), (b"SQ", UNDEFINED), (b"SQ", 0)])
def test_pixel_data_is_no_sequence(vr: bytes, length: int) -> None:
    """An empty sequence in the place of the pixel data does not pass for a picture."""
    head = encode(identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2)[:-1], EXPLICIT_VR_LITTLE_ENDIAN)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0) if length else b""
    for syntax in (EXPLICIT_VR_LITTLE_ENDIAN, JPEG_BASELINE):
        refused(head + struct.pack("<HH2sHI", 0x7FE0, 0x0010, vr, 0, length) + end, "no sequence|undefined length", syntax)


@pytest.mark.parametrize("syntax", [EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN, JPEG_BASELINE])
def test_unknown_of_undefined_length_is_implicit_little_endian(syntax: str) -> None:
    """CP-246: whatever the transfer syntax, everything inside such an element is Implicit VR Little Endian, delimiters too."""
    inner = Element(0x00081150, "UI", b"\x01\x00")
    nested = Element(0x00091010, "UN", items=((inner, Element(0x00091011, "UN", items=((inner,),), undefined=True)),), undefined=True)
    whole = encode([nested], syntax) + encode(
        identity(SECONDARY_CAPTURE)[3:] + pixels(rows=2, columns=2, fragments=[b"ab"] if syntax == JPEG_BASELINE else None), syntax
    )
    head = encode(identity(SECONDARY_CAPTURE)[:3], syntax)
    assert scan(head + whole, syntax, step=3).has_pixel_data


@pytest.mark.parametrize("vr", [b"\0\0", b"  ", b"??", b"ob", b"1A"])
def test_bad_value_representation(vr: bytes) -> None:
    """At the top, a VR that is no pair of capitals is refused."""
    refused(struct.pack("<HH2sH", 0x0008, 0x0016, vr, 0), "no pair of capital letters")


def test_future_value_representation() -> None:
    """A VR of a later edition has the long form (PS3.5 7.1.2) and is passed over."""
    data = photograph()
    at = data.index(struct.pack("<HH2s", 0x0010, 0x0010, b"PN"))
    future = struct.pack("<HH2sHI", 0x0009, 0x1001, b"ZZ", 0, 4) + b"\xff" * 4
    assert scan(data[:at] + future + data[at:]).attributes["PatientName"] == ("Drawn^Person",)


def test_implicit_items_in_an_explicit_data_set() -> None:
    """Some senders put implicit items into explicit sequences; they are read as what they are."""
    inner = encode([text(0x00081150, "UI", "1.2"), text(0x00081155, "UI", "1.3")], IMPLICIT_VR_LITTLE_ENDIAN)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner
    sequence = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, len(item)) + item
    data = photograph()
    at = data.index(struct.pack("<HH2s", 0x0010, 0x0010, b"PN"))
    assert scan(data[:at] + sequence + data[at:]).sop_instance_uid == "2.25.1001.3.1"


def test_indexed_value_limit() -> None:
    """An indexed attribute is kept whole or not accepted; a long one elsewhere is no matter."""
    elements = identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2)
    elements[4] = Element(0x00100020, "LO", b"x" * (VALUE_LIMIT + 2))
    refused(encode(elements, IMPLICIT_VR_LITTLE_ENDIAN), "limit is 65536", IMPLICIT_VR_LITTLE_ENDIAN)
    elements[4] = Element(0x00100020, "LO", b"x" * VALUE_LIMIT)
    summary = scan(encode(elements, IMPLICIT_VR_LITTLE_ENDIAN), IMPLICIT_VR_LITTLE_ENDIAN, step=1000)
    assert summary.attributes["PatientID"] == ("x" * VALUE_LIMIT,)
    elements[4] = Element(0x00104000, "LT", b"x" * (VALUE_LIMIT + 2))
    assert scan(encode(elements, IMPLICIT_VR_LITTLE_ENDIAN), IMPLICIT_VR_LITTLE_ENDIAN).byte_count > VALUE_LIMIT


# --- bombs ------------------------------------------------------------------------------------------------------------------------


def test_depth_limit() -> None:
    """64 sequences deep is accepted, 65 is not, in every form of sequence."""

    def nest(depth: int, **how: object) -> Element:
        element = Element(0x00081140, "SQ", items=(), **how)  # type: ignore[arg-type]
        for _ in range(depth - 1):
            element = Element(0x00081140, "SQ", items=((element,),), **how)  # type: ignore[arg-type]
        return element

    whole = identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2)
    for syntax in (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN):
        for undefined in (False, True):
            at = [*whole[:2], nest(64, undefined=undefined), *whole[2:]]
            assert scan(encode(at[:2] + sorted(at[2:], key=lambda element: element.tag), syntax), syntax).has_pixel_data
            refused(encode([nest(65, undefined=undefined)], syntax), "nested deeper than the limit of 64", syntax)


def test_a_million_levels() -> None:
    """Depth 10⁶ is refused at level 65, without recursion."""
    level = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, UNDEFINED) + struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)
    scanner = DataSetScanner(EXPLICIT_VR_LITTLE_ENDIAN, LIMITS)
    with pytest.raises(InvalidInstance, match="nested deeper"):
        scanner.feed(level * 1_000_000)


def test_element_budget() -> None:
    """More elements and items than allowed are refused; empty items count."""
    data = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, UNDEFINED) + struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 1_000_001
    refused(data, "limit of 1000000 elements")
    count = len(identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2))
    data = encode(identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2), EXPLICIT_VR_LITTLE_ENDIAN)
    assert scan(data, limits=Limits(elements=count)).has_pixel_data
    assert scan(data, limits=Limits(elements=count), step=1).has_pixel_data
    refused(data, "elements and items", limits=Limits(elements=count - 1))


def test_memory_is_bounded() -> None:
    """256 MB of pixel data, fed in chunks, leave no trace in memory."""
    head = encode(identity(SECONDARY_CAPTURE) + pixels(rows=16384, columns=16384, samples=1, data=b"")[:-1], EXPLICIT_VR_LITTLE_ENDIAN)
    scanner = DataSetScanner(EXPLICIT_VR_LITTLE_ENDIAN, LIMITS)
    scanner.feed(head + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 1 << 28))
    chunk = bytes(1 << 20)
    tracemalloc.start()
    try:
        for _ in range(256):
            scanner.feed(chunk)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert scanner.finish().byte_count == len(head) + 12 + (1 << 28)


# --- deflated ---------------------------------------------------------------------------------------------------------------------


def test_deflate_bomb() -> None:
    """A thousand to one is refused at the ratio, in little memory; the absolute limit holds as well."""
    body = encode([*identity(SECONDARY_CAPTURE), Element(0x00420011, "OB", bytes(50_000_000))], EXPLICIT_VR_LITTLE_ENDIAN)
    bomb = deflate(body)
    assert len(body) > 900 * len(bomb)
    tracemalloc.start()
    try:
        refused(bomb, "more than the limit of 200:1", DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    generous = Limits(inflate_ratio=2000, inflate_bytes=10_000_000)
    refused(bomb, "runs past the limit", DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, generous)
    many = deflate(encode([Element(tag, "OB", bytes(9_000)) for tag in range(0x00091000, 0x00091FFF)], EXPLICIT_VR_LITTLE_ENDIAN))
    refused(many, "beyond the limit of 10000000", DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, generous)


def test_small_blank_picture_is_no_bomb() -> None:
    """A blank megabyte deflates by hundreds and is accepted."""
    data = encode(identity(SECONDARY_CAPTURE) + pixels(rows=500, columns=600), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
    assert scan(data, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, step=100).has_pixel_data


def test_deflated_endings() -> None:
    """Nothing follows the stream but one NUL, or gzip's trailer when it is right; a zlib header is refused."""
    plain = photograph()
    stream = deflate(plain)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(stream)
    stream = stream[: len(stream) - len(inflater.unused_data)]
    trailer = struct.pack("<II", zlib.crc32(plain), len(plain))
    for tail in (b"", b"\0", trailer):
        for step in (0, 1, 5):
            summary = scan(stream + tail, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, step=step)
            assert summary.sha256 == hashlib.sha256(stream + tail).hexdigest()
    for tail in (b"\1", b"\0\0", trailer[::-1], bytes(100)):
        for step in (0, 1, 5):
            with pytest.raises(InvalidInstance, match="follow the end"):
                scan(stream + tail, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, step=step)
    refused(zlib.compress(plain), "no raw deflate", DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)


# --- the instance as a whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sop_class_uid", "tag"),
    [
        (SECONDARY_CAPTURE, "7FE0,0010"),
        (COMPREHENSIVE_3D_SR, "0040,A730"),
        (ENCAPSULATED_PDF, "0042,0011"),
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "5400,0100"),
        ("1.2.840.10008.5.1.4.1.1.481.3", "3006,0039"),
        ("1.2.840.10008.5.1.4.1.1.66.1", "0070,0308"),
    ],
)
def test_indispensable_attributes(sop_class_uid: str, tag: str) -> None:
    """What ends before the attribute that its SOP class cannot do without was cut, however clean the cut."""
    refused(encode(identity(sop_class_uid), EXPLICIT_VR_LITTLE_ENDIAN), tag)


def test_unknown_class_with_image_module_needs_pixels() -> None:
    """A private SOP class is judged by its content: rows, columns, bits and no pixels is a cut picture, no picture at all is fine."""
    private = identity("1.2.826.0.1.3680043.99.1")
    assert not scan(encode(private, EXPLICIT_VR_LITTLE_ENDIAN)).has_pixel_data
    refused(encode(private + pixels(rows=2, columns=2)[:-1], EXPLICIT_VR_LITTLE_ENDIAN), "7FE0,0010")
    assert scan(encode(private + pixels(rows=2, columns=2), EXPLICIT_VR_LITTLE_ENDIAN)).has_pixel_data


@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        ({"rows": 3, "columns": 3, "samples": 3}, 27),
        ({"rows": 3, "columns": 3, "samples": 3}, 28),
        ({"rows": 3, "columns": 3, "samples": 1, "bits": 1}, 2),
        ({"rows": 3, "columns": 3, "samples": 1, "bits": 1, "frames": 3}, 4),
        ({"rows": 2, "columns": 4, "samples": 3, "photometric": "YBR_FULL_422"}, 16),
        ({"rows": 2, "columns": 4, "samples": 3, "photometric": "YBR_FULL_422"}, 24),
        ({"rows": 2, "columns": 4, "samples": 3, "photometric": "YBR_PARTIAL_420"}, 12),
        ({"rows": 2, "columns": 2, "samples": 1, "bits": 16, "frames": 5}, 40),
        ({"rows": 2, "columns": 2, "samples": 1, "bits": 32}, 16),
    ],
)
def test_native_geometry(geometry: dict[str, object], size: int) -> None:
    """Native pixel data has the length that the geometry makes, with or without pad byte; two bytes off is refused."""

    def build(length: int) -> bytes:
        elements = pixels(**geometry)  # type: ignore[arg-type]
        elements[-1] = Element(0x7FE00010, elements[-1].vr, bytes(length))
        return encode(identity(MULTIFRAME_BYTE) + elements, EXPLICIT_VR_LITTLE_ENDIAN)

    assert scan(build(size)).has_pixel_data
    for wrong in (size - 2, size + 3, size * 7 + 9, 0):
        refused(build(wrong), "the pixel data is")


def test_float_pixel_data() -> None:
    """Float and Double Float Pixel Data count four and eight bytes a sample."""
    for tag, vr, width in ((0x7FE00008, "OF", 4), (0x7FE00009, "OD", 8)):
        image = pixels(rows=2, columns=3, samples=1, bits=8 * width, photometric="MONOCHROME2")[:-1]
        whole = [*identity("1.2.840.10008.5.1.4.1.1.30"), *image]
        assert scan(encode([*whole, Element(tag, vr, bytes(6 * width))], EXPLICIT_VR_LITTLE_ENDIAN)).has_pixel_data
        refused(encode([*whole, Element(tag, vr, bytes(5 * width))], EXPLICIT_VR_LITTLE_ENDIAN), "the pixel data is")


@pytest.mark.parametrize(
    ("tag", "replacement"),
    [
        (0x00280010, Element(0x00280010, "US", numbers=(0,))),
        (0x00280011, Element(0x00280011, "US", numbers=(0,))),
        (0x00280010, text(0x00280010, "LO", "many")),
        (0x00280010, Element(0x00280010, "US")),
        (0x00280010, Element(0x00280010, "US", numbers=(2, 2))),
        (0x00280002, Element(0x00280002, "US", numbers=(0,))),
        (0x00280100, Element(0x00280100, "US", numbers=(0,))),
        (0x00280100, Element(0x00280100, "US", numbers=(12,))),
        (0x00280100, Element(0x00280100, "US", numbers=(255,))),
        (0x00280008, text(0x00280008, "IS", "-1")),
        (0x00280008, text(0x00280008, "IS", "0")),
        (0x00280008, text(0x00280008, "IS", "1e9")),
        (0x00280008, text(0x00280008, "IS", "2147483647")),
        (0x00280011, Element(0x00280011, "UL", numbers=(0xFFFFFFFF,))),
    ],
)
def test_impossible_geometry(tag: int, replacement: Element) -> None:
    """Zero, negative, textual and monstrous dimensions are refused, in big numbers, before anything is allocated."""
    elements = {element.tag: element for element in identity(MULTIFRAME_BYTE) + pixels(rows=2, columns=2, frames=3)}
    assert tag in elements
    elements[tag] = replacement
    refused(encode(list(elements.values()), EXPLICIT_VR_LITTLE_ENDIAN), "must be|whole number|the pixel data is")


@pytest.mark.parametrize(
    "replacement",
    [
        Element(0x00280010, "US", numbers=(0,)),
        Element(0x00280011, "US", numbers=(0,)),
        Element(0x00280002, "US", numbers=(0,)),
        Element(0x00280002, "US", numbers=(5,)),
        Element(0x00280100, "US", numbers=(0,)),
        Element(0x00280100, "US", numbers=(12,)),
        Element(0x00280100, "US", numbers=(72,)),
        text(0x00280008, "IS", "0"),
    ],
)
def test_impossible_geometry_of_compressed_pictures(replacement: Element) -> None:
    """Where no length can contradict it, an impossible number alone is refused."""
    image = identity(MULTIFRAME_BYTE) + pixels(rows=2, columns=2, frames=3, fragments=[b"ab", b"cd", b"ef"])
    elements = {element.tag: element for element in image}
    assert replacement.tag in elements
    elements[replacement.tag] = replacement
    refused(encode(list(elements.values()), JPEG_BASELINE), "must be", JPEG_BASELINE)


def test_fragments_and_frames() -> None:
    """Every frame has at least one fragment; a video may have one for all."""
    three = identity(MULTIFRAME_BYTE) + pixels(rows=2, columns=2, frames=3, fragments=[b"ab", b"cd"])
    refused(encode(three, JPEG_BASELINE), "2 fragments of pixel data for 3 frames", JPEG_BASELINE)
    assert scan(encode(three, JPEG_BASELINE), "1.2.840.10008.1.2.4.102").has_pixel_data
    refused(encode(three, JPEG_BASELINE), "does not encapsulate", EXPLICIT_VR_LITTLE_ENDIAN)


def test_native_pixels_in_an_encapsulated_transfer_syntax() -> None:
    """They are refused (PS3.5 A.4); Float Pixel Data, which no syntax encapsulates, is not."""
    native = identity(MULTIFRAME_BYTE) + pixels(rows=2, columns=2)
    for syntax, kind in TRANSFER_SYNTAXES.items():
        if kind.encapsulated:
            refused(encode(native, EXPLICIT_VR_LITTLE_ENDIAN), "native Pixel Data in an encapsulated transfer syntax", syntax)
    image = pixels(rows=2, columns=3, samples=1, bits=32, photometric="MONOCHROME2")[:-1]
    whole = [*identity("1.2.840.10008.5.1.4.1.1.30"), *image, Element(0x7FE00008, "OF", bytes(24))]
    assert scan(encode(whole, EXPLICIT_VR_LITTLE_ENDIAN), JPEG_BASELINE).has_pixel_data


def test_fragment_framing() -> None:
    """Undefined fragments, a crooked offset table and foreign tags between fragments are refused."""
    head = encode(identity(SECONDARY_CAPTURE) + pixels(rows=2, columns=2)[:-1], EXPLICIT_VR_LITTLE_ENDIAN)
    head += struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, UNDEFINED)
    for body, match in (
        (struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED), "undefined length"),
        (struct.pack("<HHI", 0xFFFE, 0xE000, 6) + bytes(6), "multiple of 4"),
        (struct.pack("<HHI", 0xFFFE, 0xE00D, 0), "expected here"),
        (struct.pack("<HHI", 0x0010, 0x0010, 0), "expected here"),
        (struct.pack("<HHI", 0xFFFE, 0xE0DD, 2), "expected here"),
        (struct.pack("<HHI", 0xFFFE, 0xE0DD, 0), "0 fragments"),
    ):
        refused(head + body + bytes(8) * (match != "0 fragments"), match, JPEG_BASELINE)


# --- real files -------------------------------------------------------------------------------------------------------------------

NO_FILE = "no DICOM file: bare data set without preamble, or 16 bytes of nothing"
NO_IDENTITY = "a parser's test fragment: no SOP Class or Instance UID"
NO_STUDY = "no Study Instance UID"
NO_PIXELS = "an image SOP class without pixel data: the same as one cut before it"
REFUSED = {
    "dicom-test-files/pydicom/priv_SQ.dcm": NO_IDENTITY,
    "dicomweb-conformance/test_data/sample_ct.dcm": NO_FILE,
    "dicomweb-conformance/test_synthetic.dcm": NO_FILE,
    "pydicom/charset_files/chrJapMulti.dcm": NO_PIXELS,
    "pydicom/charset_files/chrJapMultiExplicitIR6.dcm": NO_PIXELS,
    "pydicom/charset_files/chrKoreanMulti.dcm": NO_PIXELS,
    "pydicom/charset_files/chrSQEncoding.dcm": NO_IDENTITY,
    "pydicom/charset_files/chrSQEncoding1.dcm": NO_IDENTITY,
    **dict.fromkeys(
        (f"pydicom/palettes/{name}.dcm" for name in ("fall", "hotiron", "hotmetalblue", "pet", "pet20step", "spring", "summer")),
        "Color Palette Storage, a non-patient object (PS3.4 GG): it belongs to no study",
    ),
    "pydicom/palettes/winter.dcm": "SOP Instance UID stands there twice; and a non-patient object",
    "pydicom/test_files/ExplVR_BigEndNoMeta.dcm": NO_FILE,
    "pydicom/test_files/ExplVR_LitEndNoMeta.dcm": NO_FILE,
    "pydicom/test_files/JPEGLSNearLossless_08.dcm": NO_STUDY,
    "pydicom/test_files/JPEGLSNearLossless_16.dcm": NO_STUDY,
    "pydicom/test_files/MR_small_padded.dcm": "128 bytes more pixel data than the geometry makes (put there by its authors)",
    "pydicom/test_files/MR_truncated.dcm": "cut within the pixel data by its authors",
    "pydicom/test_files/SC_rgb_jls_lossy_line.dcm": NO_STUDY,
    "pydicom/test_files/SC_rgb_jls_lossy_sample.dcm": NO_STUDY,
    "pydicom/test_files/SC_rgb_jpeg.dcm": "Implicit VR under a transfer syntax of Explicit VR",
    "pydicom/test_files/UN_sequence.dcm": NO_IDENTITY,
    "pydicom/test_files/badVR.dcm": "Number of Frames is no number",
    "pydicom/test_files/dicomdirtests/DICOMDIR-nooffset": "a media directory; and an item longer than its sequence",
    **dict.fromkeys(
        (
            f"pydicom/test_files/dicomdirtests/{name}"
            for name in (
                "DICOMDIR",
                "DICOMDIR-bigEnd",
                "DICOMDIR-empty.dcm",
                "DICOMDIR-implicit",
                "DICOMDIR-nopatient",
                "DICOMDIR-reordered",
                "TINY_ALPHA/DICOMDIR",
            )
        ),
        "a media directory (PS3.10 8.6), no composite instance",
    ),
    "pydicom/test_files/empty_charset_LEI.dcm": NO_IDENTITY,
    "pydicom/test_files/meta_missing_tsyntax.dcm": "no transfer syntax",
    "pydicom/test_files/nested_priv_SQ.dcm": NO_IDENTITY + "; begins with group 0001",
    "pydicom/test_files/no_meta.dcm": NO_FILE,
    "pydicom/test_files/no_meta_group_length.dcm": NO_IDENTITY,
    "pydicom/test_files/priv_SQ.dcm": NO_IDENTITY,
    "pydicom/test_files/rtplan_truncated.dcm": "cut by its authors",
    "pydicom/test_files/rtstruct.dcm": NO_FILE,
    "pydicom-data/HTJ2KLossless_08_RGB.dcm": NO_STUDY,
    "pydicom-data/HTJ2K_08_RGB.dcm": NO_STUDY,
    "pydicom-data/JLSL_08_07_0_1F.dcm": NO_STUDY,
    "pydicom-data/JLSL_16_15_1_1F.dcm": NO_STUDY,
    "pydicom-data/JLSL_RGB_ILV0.dcm": NO_FILE,
    "pydicom-data/JLSL_RGB_ILV1.dcm": NO_FILE,
    "pydicom-data/JLSL_RGB_ILV2.dcm": NO_FILE,
    "pydicom-data/JLSN_RGB_ILV0.dcm": NO_FILE,
    "pydicom-data/OT-PAL-8-face.dcm": NO_FILE,
    "pydicom-data/bad_sequence.dcm": "the SOP Instance UID is a hash in letters and digits",
    "pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm": "cut within the last fragment by its authors",
}
"""Files of the corpora that are wrong upstream, with the reason; besides these, the pictures under TINY_ALPHA, which have no pixels."""


def is_refused_upstream(path: str) -> bool:
    """Whether a file of the corpora is wrong as its authors made it."""
    return path in REFUSED or path.startswith("pydicom/test_files/dicomdirtests/TINY_ALPHA/PT000000/")


def _scan_file(data: bytes, step: int = 65_536) -> Summary:
    parser = Part10Parser()
    scanner = None
    for at in range(0, len(data), step):
        for piece in parser.feed(data[at : at + step]):
            scanner = scanner or DataSetScanner(parser.transfer_syntax_uid or "", LIMITS)
            scanner.feed(piece)
    parser.finish()
    assert scanner is not None
    return scanner.finish()


def corpora_files(shared: Path) -> list[tuple[str, bytes]]:
    """Every file of the corpora: path, content."""
    root = shared / "corpora"
    lines = (root / "MANIFEST.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [(path, (root / path).read_bytes()) for path in (line.split("\t")[0] for line in lines)]


@pytest.mark.shared
def test_corpora(shared: Path) -> None:
    """Every file of the corpora is accepted, but for those that are wrong upstream, each known with its reason."""
    faults = {}
    files = corpora_files(shared)
    for path, data in files:
        try:
            _scan_file(data)
        except (InvalidInstance, UnsupportedInstance) as error:
            faults[path] = str(error)
    assert {path for path in faults if not is_refused_upstream(path)} == set()
    assert {path for path, _ in files if is_refused_upstream(path)} - set(faults) == set()
    assert len(files) - len(faults) == 318


@pytest.mark.shared
def test_corpora_cut_short(shared: Path) -> None:
    """Each accepted file, cut at 20 random offsets, is refused each time (6,360 cuts, the same in every run)."""
    chance = random.Random(20_260_101)
    survivors = []
    reasons = set()
    for path, data in corpora_files(shared):
        if is_refused_upstream(path):
            continue
        for cut in (chance.randrange(len(data)) for _ in range(20)):
            try:
                _scan_file(data[:cut])
            except (InvalidInstance, UnsupportedInstance) as error:
                reasons.add(type(error))
            else:
                survivors.append((path, cut, len(data)))
    assert survivors == []
    assert reasons == {InvalidInstance}


def test_every_syntax_of_the_table() -> None:
    """A photograph passes in each kind of transfer syntax."""
    for uid, syntax in TRANSFER_SYNTAXES.items():
        if syntax.encapsulated:
            data = photograph(JPEG_BASELINE)
        elif syntax.deflated:
            data = photograph(DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
        else:
            kind = {0: IMPLICIT_VR_LITTLE_ENDIAN, 1: EXPLICIT_VR_LITTLE_ENDIAN, 2: EXPLICIT_VR_BIG_ENDIAN}[syntax.encoding]
            data = photograph(kind)
        assert scan(data, uid, step=100).transfer_syntax_uid == uid
    assert set(TRANSFER_SYNTAXES) >= ENCAPSULATED
