"""DICOM JSON and Explicit VR Little Endian of stored data sets: the walk, its two users, hostile values."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomweb.dataset import DataSet, Inflating
from dicomweb.dataset import Element as Found
from dicomweb.metadata import InlineLimits, find_bulk, instance_json
from dicomweb.negotiate import UNCOMPRESSED
from dicomweb.transcode import explicit_little_endian
from storage.errors import InstanceNotFound, InvalidInstance, StorageError
from storage.part10 import Part10Parser
from storage.records import Limits
from storage.scan import DataSetScanner
from tests.storage import datasets
from tests.storage.datasets import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    Drawn,
    Element,
)

URL = "http://node/bulkdata/"


def opened(data: bytes, transfer_syntax_uid: str) -> DataSet:
    """Open bytes as a stored data set."""
    return DataSet(lambda offset, length: data[offset : offset + length], transfer_syntax_uid)


def document(data: bytes, transfer_syntax_uid: str = EXPLICIT_VR_LITTLE_ENDIAN, **limits: int) -> dict[str, Any]:
    """Write and read the DICOM JSON of a data set."""
    text = instance_json(opened(data, transfer_syntax_uid), lambda path: URL + path, InlineLimits(**limits))
    return dict(json.loads(text, object_pairs_hook=_unique))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), "a name occurs twice in one object"
    return dict(pairs)


def scanned(data: bytes, transfer_syntax_uid: str) -> None:
    """Require that the archive would take the data set."""
    scanner = DataSetScanner(transfer_syntax_uid, Limits())
    scanner.feed(data)
    scanner.finish()


@settings(max_examples=150, deadline=None)
@given(drawn=st.one_of(datasets.instances(), datasets.documents()))
def test_every_element_is_in_the_document(drawn: Drawn) -> None:
    """Whatever the archive takes has a document with each of its elements, nested ones too, and pydicom reads it."""
    data = drawn.data
    scanned(data, drawn.transfer_syntax_uid)
    found = document(data, drawn.transfer_syntax_uid)
    assert set(found) == {f"{element.tag:08X}" for element in drawn.elements if element.tag & 0xFFFF}
    assert not any(tag.startswith("0002") or tag.endswith("0000") for tag in found)
    for element in drawn.elements:
        if element.items is not None:
            items = found[f"{element.tag:08X}"].get("Value", [])
            expected = [{f"{inner.tag:08X}" for inner in item} for item in element.items]
            assert [set(item) for item in items] == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydicom, about drawn values that break their VR
        pydicom.Dataset.from_json(found, bulk_data_uri_handler=lambda _: b"")


@settings(max_examples=150, deadline=None)
@given(drawn=st.one_of(datasets.instances(sorted(UNCOMPRESSED)), datasets.documents()))
def test_explicit_little_endian_says_the_same(drawn: Drawn) -> None:
    """Re-encoded data sets are taken by the archive's own scanner and have the same document as the original."""
    data = drawn.data
    again = b"".join(explicit_little_endian(opened(data, drawn.transfer_syntax_uid)))
    scanned(again, EXPLICIT_VR_LITTLE_ENDIAN)
    assert document(again) == document(data, drawn.transfer_syntax_uid)
    if drawn.transfer_syntax_uid == EXPLICIT_VR_LITTLE_ENDIAN and not any(element.items is not None for element in drawn.elements):
        assert again == data


def test_every_numeric_vr_is_swapped() -> None:
    """Big Endian numbers of every size come out as the numbers they are, in the document and re-encoded."""
    values = {
        (0x00280010, "US"): ("H", 258), (0x00189219, "SS"): ("h", -2), (0x00186020, "SL"): ("i", -70000), (0x00081161, "UL"): ("I", 70000),
        (0x00189087, "FD"): ("d", 1.5), (0x00181111, "FL"): ("f", 2.5),
    }  # fmt: skip
    elements = [(tag, vr, struct.pack(">" + code, number)) for (tag, vr), (code, number) in values.items()]
    elements += [(0x00209165, "AT", struct.pack(">HH", 0x0018, 0x1155))]
    data = b"".join(struct.pack(">HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), len(raw)) + raw for tag, vr, raw in sorted(elements))
    for words, vr, code in ((0x7FE00010, "OW", "H"), (0x7FE00020, "OV", "Q")):
        raw = struct.pack(f">3{code}", 1, 2, 3)
        data += struct.pack(">HH2sHI", words >> 16, words & 0xFFFF, vr.encode(), 0, len(raw)) + raw
    found = document(data, EXPLICIT_VR_BIG_ENDIAN)
    assert {int(tag, 16): entry["Value"] for tag, entry in found.items() if "Value" in entry} == {
        **{tag: [number] for (tag, _), (_, number) in values.items()}, 0x00209165: ["00181155"]
    }  # fmt: skip
    again = b"".join(explicit_little_endian(opened(data, EXPLICIT_VR_BIG_ENDIAN)))
    assert document(again) == found
    assert struct.pack("<3H", 1, 2, 3) in again
    assert struct.pack("<3Q", 1, 2, 3) in again


@pytest.mark.parametrize(
    ("vr", "raw", "expected"),
    [
        ("DS", b"1.5\\ -2 \\\\x\\1e999\\NaN\\1_0", [1.5, -2.0, None, None, None, None, None]),
        ("IS", b"12\\+3\\1.0\\1.5\\x ", [12, 3, 1, None, None]),
        ("IS", b"x ", None),
        ("US", b"\1", None),  # no whole number
        ("FD", struct.pack("<2d", float("nan"), 1.0), [None, 1.0]),
        ("FL", struct.pack("<f", float("inf")), None),
        ("SV", struct.pack("<2q", 5, -(2**60)), [5, str(-(2**60))]),
        ("CS", b"A \\ B\\\\", ["A", "B", None, None]),
        ("LT", b" a\\b \r\n ", [" a\\b \r\n"]),
        ("UI", b"1.2\0", ["1.2"]),
        ("UI", b"\xff\xfe", ["ÿþ"]),
        ("LO", b"tab\there\x00", ["tab\there"]),
        ("PN", b"A^B=\xc3\xa4=p\\\\=I", [{"Alphabetic": "A^B", "Ideographic": "ä", "Phonetic": "p"}, None, {"Ideographic": "I"}]),
        ("DA", b"not a date", ["not a date"]),
        ("AT", struct.pack("<4H", 0x10, 0x20, 0x7FE0, 0x10), ["00100020", "7FE00010"]),
        ("AT", b"\0\0\0\0\0\0", None),
        ("ST", b"", None),
        ("PN", b"^^ ", [{"Alphabetic": "^^"}]),
    ],
)  # fmt: skip
def test_values(vr: str, raw: bytes, expected: list[Any] | None) -> None:
    """One value that cannot be decoded is empty; its neighbours and the other elements stay."""
    raw += b" " * (len(raw) % 2) if vr != "US" else b""
    long_form = vr in {"SV", "UT"}
    tag = struct.pack("<HH2s", 0x0009, 0x1001, vr.encode())
    data = datasets.encode([datasets.text(0x00080005, "CS", "ISO_IR 192")], EXPLICIT_VR_LITTLE_ENDIAN)
    data += tag + (struct.pack("<HI", 0, len(raw)) if long_form else struct.pack("<H", len(raw))) + raw
    data += datasets.encode([datasets.text(0x00100020, "LO", "after")], EXPLICIT_VR_LITTLE_ENDIAN)
    found = document(data)
    assert found["00091001"] == ({"vr": vr, "Value": expected} if expected is not None else {"vr": vr})
    assert found["00100020"] == {"vr": "LO", "Value": ["after"]}


def test_bulk_and_inline() -> None:
    """Short binary is inline and little endian; long binary, long text and every pixel data element are given by URL, which finds them."""
    elements = [
        datasets.text(0x00080018, "UI", "1.2"),
        Element(0x00081140, "SQ", items=((Element(0x00091001, "OB", b"x" * 2000),), (Element(0x00091001, "OB", b"y" * 2000),))),
        Element(0x00091002, "OB", b"\1\2"),
        Element(0x00091003, "UT", b"t" * 70_000),
        Element(0x7FE00010, "OW", b"\1\2"),
    ]
    data = datasets.encode(elements, EXPLICIT_VR_LITTLE_ENDIAN)
    found = document(data)
    assert found["00091002"] == {"vr": "OB", "InlineBinary": "AQI="}
    assert found["00091003"] == {"vr": "UT", "BulkDataURI": URL + "00091003"}
    assert found["7FE00010"] == {"vr": "OW", "BulkDataURI": URL + "7FE00010"}
    second = found["00081140"]["Value"][1]["00091001"]["BulkDataURI"]
    assert second == URL + "00081140/2/00091001"
    bulk = find_bulk(opened(data, EXPLICIT_VR_LITTLE_ENDIAN), second.removeprefix(URL).split("/"))
    assert data[bulk.element.offset : bulk.element.offset + bulk.element.length] == b"y" * 2000
    for path in (["00081140", "3", "00091001"], ["00091001"], ["00081140"], ["00081140", "0", "00091001"]):
        with pytest.raises(InstanceNotFound):
            find_bulk(opened(data, EXPLICIT_VR_LITTLE_ENDIAN), path)


def test_the_document_is_bounded() -> None:
    """When the inline values have used up their share, the rest is given by URL."""
    elements = [Element(0x00091000 + number, "UT", b"t" * 1000) for number in range(1, 100)]
    found = document(datasets.encode(elements, EXPLICIT_VR_LITTLE_ENDIAN), total_bytes=10_000)
    assert 9 <= sum("Value" in entry for entry in found.values()) <= 11


def test_unknown_vr_of_a_public_attribute_is_looked_up() -> None:
    """UN of an attribute that the dictionary knows has its value read; a private one stays inline binary."""
    data = datasets.encode([Element(0x00100010, "UN", b"Doe^J "), Element(0x00111001, "UN", b"\1\2")], EXPLICIT_VR_LITTLE_ENDIAN)
    assert document(data) == {
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^J"}]},
        "00111001": {"vr": "UN", "InlineBinary": "AQI="},
    }


def test_characters_are_utf_8_and_say_so() -> None:
    """Text of any character set comes out as it is, items inherit the set, and (0008,0005) says what the document is written in."""
    item = (datasets.text(0x0008103E, "LO", "плечо", "iso8859_5"),)
    elements = [datasets.text(0x00080005, "CS", "ISO_IR 144"), datasets.text(0x00081030, "LO", "кожа", "iso8859_5"),
                Element(0x00081140, "SQ", items=(item,), undefined=True)]  # fmt: skip
    found = document(datasets.encode(elements, EXPLICIT_VR_LITTLE_ENDIAN))
    assert found["00080005"]["Value"] == ["ISO_IR 192"]
    assert found["00081030"]["Value"] == ["кожа"]
    assert found["00081140"]["Value"][0]["0008103E"]["Value"] == ["плечо"]


def test_implicit_items_in_an_explicit_data_set() -> None:
    """Items that a sender wrote in Implicit VR into an explicit data set are read as the archive read them, and come out explicit."""
    item = datasets.encode([datasets.text(0x00080100, "SH", "T-01000"), datasets.text(0x00080102, "SH", "SRT")], IMPLICIT_VR_LITTLE_ENDIAN)
    sequence = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, len(item) + 8) + struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item
    drawn = [*datasets.identity(datasets.VL_PHOTOGRAPHIC), *datasets.pixels(rows=2, columns=2)]
    before = datasets.encode([one for one in drawn if one.tag < 0x00081140], EXPLICIT_VR_LITTLE_ENDIAN)
    data = before + sequence + datasets.encode([one for one in drawn if one.tag > 0x00081140], EXPLICIT_VR_LITTLE_ENDIAN)
    scanned(data, EXPLICIT_VR_LITTLE_ENDIAN)
    found = document(data)
    assert found["00081140"]["Value"][0]["00080100"] == {"vr": "SH", "Value": ["T-01000"]}
    assert found["00280010"]["Value"] == [2]
    assert document(b"".join(explicit_little_endian(opened(data, EXPLICIT_VR_LITTLE_ENDIAN)))) == found


def test_deep_nesting_costs_no_stack() -> None:
    """A hundred sequences in each other are written and read; more than the walk allows is refused, not a crash."""

    def nested(depth: int) -> bytes:
        opening = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        closing = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        return opening * depth + closing * depth

    assert document(nested(100))
    assert b"".join(explicit_little_endian(opened(nested(100), EXPLICIT_VR_LITTLE_ENDIAN))) == nested(100)
    with pytest.raises(InvalidInstance, match="nested"):
        document(nested(1000))


def test_only_the_header_is_read() -> None:
    """Metadata of an image read neither native nor encapsulated pixel data; what follows native ones is there."""
    header = datasets.encode([datasets.text(0x00080018, "UI", "1.2")], EXPLICIT_VR_LITTLE_ENDIAN)
    size = 50 * 1024**2
    native = header + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, size)
    tail = datasets.encode([Element(0xFFFCFFFC, "OB", b"\0\0")], EXPLICIT_VR_LITTLE_ENDIAN)
    read: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        read.append(length)
        whole = len(native) + size + len(tail)
        piece = native[offset : offset + length].ljust(min(length, whole - offset), b"\0") if offset < len(native) else b""
        return piece or tail[offset - len(native) - size :][:length]

    text = instance_json(DataSet(read_at, EXPLICIT_VR_LITTLE_ENDIAN), lambda path: URL + path)
    assert set(json.loads(text)) == {"00080018", "7FE00010", "FFFCFFFC"}
    assert sum(read) < 1024**2


@given(data=st.binary(max_size=300_000), reads=st.lists(st.tuples(st.integers(0, 310_000), st.integers(1, 100_000)), max_size=6))
def test_inflated_reads_are_slices(data: bytes, reads: list[tuple[int, int]]) -> None:
    """Reading a deflated data set anywhere, forwards or back, gives what slicing the inflated bytes gives."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(data) + packer.flush()
    source = Inflating(lambda offset, length: packed[offset : offset + length], inflate_bytes=400_000)
    for offset, length in reads:
        assert source.read(offset, length) == data[offset : offset + length]


def test_inflation_is_bounded() -> None:
    """A data set that inflates beyond the limit is refused without inflating it all; a damaged one is refused too."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(bytes(10_000_000)) + packer.flush()
    with pytest.raises(InvalidInstance, match="longer"):
        Inflating(lambda offset, length: packed[offset : offset + length], inflate_bytes=100_000).read(9_000_000, 10)
    with pytest.raises(InvalidInstance, match="damaged"):
        Inflating(lambda offset, length: b"\xff\xff\xff\xff"[offset : offset + length], inflate_bytes=100_000).read(0, 10)


@settings(max_examples=300, deadline=None)
@given(drawn=datasets.instances(), position=st.integers(0, 5000), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_data_sets_never_crash(drawn: Drawn, position: int, value: int, cut: bool) -> None:
    """A data set with a byte changed or its end cut off gives a document or a refusal, and never hangs."""
    data = bytearray(drawn.data)
    position %= len(data)
    data[position] = value
    damaged = bytes(data[:position] if cut else data)
    try:
        document(damaged, drawn.transfer_syntax_uid)
    except InvalidInstance as error:
        assert str(error)  # noqa: PT017


def _corpus(shared: Path) -> Iterator[tuple[Path, bytes, str]]:
    for path in sorted((shared / "corpora").rglob("*")):
        if not path.is_file() or path.stat().st_size > 20_000_000:
            continue
        data = path.read_bytes()
        if data[128:132] != b"DICM":
            continue
        parser = Part10Parser()
        try:
            data_set = b"".join(bytes(piece) for piece in parser.feed(data))
            parser.finish()
            scanned(data_set, parser.transfer_syntax_uid or "")
        except StorageError:
            continue
        yield path, data_set, parser.transfer_syntax_uid or ""


@pytest.mark.shared
def test_corpora(shared: Path) -> None:
    """Every file of the corpora that the archive takes has a document; uncompressed ones say the same in Explicit Little Endian."""
    count = 0
    for path, data, transfer_syntax_uid in _corpus(shared):
        found = document(data, transfer_syntax_uid)
        assert found["00080018"]["Value"], path
        count += 1
        if transfer_syntax_uid in UNCOMPRESSED:
            again = b"".join(explicit_little_endian(opened(data, transfer_syntax_uid)))
            scanned(again, EXPLICIT_VR_LITTLE_ENDIAN)
            assert document(again) == found, path
    assert count > 250


@pytest.mark.shared
def test_against_pydicom(shared: Path) -> None:
    """Numbers, names and codes of the corpora are what pydicom reads in them."""
    compared = 0
    for path, data, transfer_syntax_uid in _corpus(shared):
        if transfer_syntax_uid not in UNCOMPRESSED - {DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN} or len(data) > 2_000_000:
            continue
        found = document(data, transfer_syntax_uid)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydicom, about values in the corpora that break their VR
            ours = pydicom.filereader.read_dataset(
                io.BytesIO(data),
                is_implicit_VR=transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN,
                is_little_endian=transfer_syntax_uid != EXPLICIT_VR_BIG_ENDIAN,
            )
            for element in ours:
                entry = found.get(f"{element.tag:08X}", {})
                if element.VR not in {"US", "UL", "SS", "SL", "UI", "CS", "DA"} or "Value" not in entry or element.tag == 0x00080005:
                    continue
                values = element.value if element.VM > 1 else [element.value]
                texts = [None if value is None else str(value) for value in entry["Value"]]
                assert [str(value).strip() or None for value in values] == texts, (path, element.tag)
                compared += 1
    assert compared > 2000


def test_walk_stops_when_asked() -> None:
    """Giving up the walk reads nothing further: elements come one by one."""
    data = datasets.photograph()
    first = next(opened(data, EXPLICIT_VR_LITTLE_ENDIAN).walk())
    assert isinstance(first, Found)
    assert first.tag == 0x00080016


def test_an_element_that_stands_twice_is_refused() -> None:
    """No name stands twice in a JSON object, at the top or in an item: such a data set is no archive's."""
    once = struct.pack("<HH2sH", 0x0008, 0x0060, b"CS", 2) + b"XC"
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 2 * len(once)) + 2 * once
    sequence = struct.pack("<HH2s2xL", 0x0008, 0x1140, b"SQ", len(item)) + item
    for damaged in (2 * once, sequence):
        with pytest.raises(InvalidInstance, match="twice"):
            document(damaged, "1.2.840.10008.1.2.1")
