"""WADO-RS over a real socket: instances, metadata, bulk data, frames; what cannot be given; what breaks on the way."""

from __future__ import annotations

import http.client
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from dicomweb.context import WebLimits
from dicomweb.negotiate import EXPLICIT_VR_LITTLE_ENDIAN
from storage.records import Limits
from storage.scan import DataSetScanner
from tests.dicomweb.door import Door, file_of, path_of
from tests.storage import datasets
from tests.storage.datasets import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    JPEG_2000,
    JPEG_BASELINE,
    MULTIFRAME_BYTE,
    RLE_LOSSLESS,
    VL_PHOTOGRAPHIC,
    Element,
)
from tests.storage.samples import Sample, new_uid, photograph

Doors = Callable[..., Door]
OCTETS = 'multipart/related; type="application/octet-stream"'
OHIF = "multipart/related; type=application/octet-stream; transfer-syntax=*"


def draw(
    transfer_syntax_uid: str, *extra: Element, sop_class: str = VL_PHOTOGRAPHIC, study: str = "", series: str = "", **pixels: Any
) -> Sample:
    """Draw an instance of any transfer syntax with elements of choice."""
    sop, study, series = new_uid(), study or new_uid(), series or new_uid()
    own = {0x00080018: sop, 0x0020000D: study, 0x0020000E: series}
    elements = [datasets.text(one.tag, "UI", own[one.tag]) if one.tag in own else one for one in datasets.identity(sop_class)]
    elements += list(extra) + (
        datasets.pixels(**{"rows": 4, "columns": 6, "samples": 1, "photometric": "MONOCHROME2"} | pixels) if pixels is not None else []
    )
    elements.sort(key=lambda element: element.tag)
    return Sample(sop, study, series, datasets.encode(elements, transfer_syntax_uid), transfer_syntax_uid, sop_class)


def put(door: Door, sample: Sample) -> Sample:
    """Store a sample."""
    answer = door.store(file_of(sample))
    assert answer.status == 200, answer.body
    return sample


def data_set_of(file: bytes) -> tuple[str, bytes]:
    """Transfer syntax and data set of a Part 10 file."""
    assert file[128:132] == b"DICM"
    (length,) = struct.unpack_from("<I", file, 140)
    meta = file[144 : 144 + length]
    at = meta.index(b"\x02\x00\x10\x00UI")
    (size,) = struct.unpack_from("<H", meta, at + 6)
    return meta[at + 8 : at + 8 + size].rstrip(b"\0").decode(), file[144 + length :]


@pytest.mark.parametrize("transfer_syntax_uid", [
    IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN, JPEG_BASELINE, RLE_LOSSLESS,  # noqa: E501
])  # fmt: skip
def test_as_stored(door: Door, transfer_syntax_uid: str) -> None:
    """``transfer-syntax=*`` and the stored syntax by name give the bytes that were sent; the part says its syntax."""
    fragments = [b"\xff\xd8\1\2\xff\xd9"] if transfer_syntax_uid in {JPEG_BASELINE, RLE_LOSSLESS} else None
    sample = put(door, draw(transfer_syntax_uid, fragments=fragments))
    for wanted in ("*", transfer_syntax_uid):
        answer = door.get(path_of(sample), Accept=f'multipart/related; type="application/dicom"; transfer-syntax={wanted}')
        assert answer.status == 200
        ((content_type, file),) = answer.parts
        assert content_type == f"application/dicom; transfer-syntax={transfer_syntax_uid}"
        assert data_set_of(file) == (transfer_syntax_uid, sample.data_set)


@pytest.mark.parametrize(
    "accept",
    ["", "*/*", "multipart/related", 'multipart/related; type="application/dicom"', "text/html, multipart/related; type=application/dicom"],
)
@pytest.mark.parametrize("transfer_syntax_uid", [IMPLICIT_VR_LITTLE_ENDIAN, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN])
def test_explicit_little_endian_is_the_default(door: Door, transfer_syntax_uid: str, accept: str) -> None:
    """Without a transfer-syntax parameter uncompressed instances come in Explicit VR Little Endian, saying the same."""
    plain = draw(EXPLICIT_VR_LITTLE_ENDIAN, bits=16, data=bytes(range(48)))
    sample = put(door, Sample(plain.sop_instance_uid, plain.study_instance_uid, plain.series_instance_uid,
                              _recoded(plain, transfer_syntax_uid), transfer_syntax_uid))  # fmt: skip
    answer = door.request("GET", path_of(sample), headers={"Accept": accept} if accept else {})
    assert answer.status == 200
    syntax, data = data_set_of(answer.parts[0][1])
    assert syntax == EXPLICIT_VR_LITTLE_ENDIAN
    assert data == plain.data_set
    scanner = DataSetScanner(EXPLICIT_VR_LITTLE_ENDIAN, Limits())
    scanner.feed(data)
    assert scanner.finish().sop_instance_uid == sample.sop_instance_uid


def _recoded(sample: Sample, transfer_syntax_uid: str) -> bytes:
    """Write the elements of `draw` again, with the same UIDs, in another syntax."""
    own = {0x00080018: sample.sop_instance_uid, 0x0020000D: sample.study_instance_uid, 0x0020000E: sample.series_instance_uid}
    elements = [datasets.text(one.tag, "UI", own[one.tag]) if one.tag in own else one for one in datasets.identity(VL_PHOTOGRAPHIC)]
    data = bytes(range(48))
    if transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN:
        data = b"".join(data[at : at + 2][::-1] for at in range(0, 48, 2))
    elements += datasets.pixels(rows=4, columns=6, samples=1, bits=16, photometric="MONOCHROME2", data=data)
    return datasets.encode(elements, transfer_syntax_uid)


def test_single_part(door: Door) -> None:
    """``application/dicom`` gives one instance as a bare file; for a series it is not on offer."""
    sample = door.stored()
    answer = door.get(path_of(sample), Accept="application/dicom")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/dicom")
    assert data_set_of(answer.body) == (EXPLICIT_VR_LITTLE_ENDIAN, sample.data_set)
    assert door.get(path_of(sample) + "?accept=application/dicom", Accept="text/html").body == answer.body
    series = path_of(sample).rsplit("/instances", 1)[0]
    assert door.get(series, Accept="application/dicom").problem["status"] == 406


def test_study_and_series(door: Door) -> None:
    """Every instance of a series or study is a part, in the order of the index, and only those."""
    study, first, second = new_uid(), new_uid(), new_uid()
    samples = [put(door, photograph(study=study, series=series)) for series in (first, first, second)]
    put(door, photograph())
    assert {data_set_of(part[1])[1] for part in door.get(f"/studies/{study}").parts} == {one.data_set for one in samples}
    assert len(door.get(f"/studies/{study}/series/{first}").parts) == 2
    assert len(door.get(f"/studies/{study}/series/{second}").parts) == 1


@pytest.mark.parametrize("suffix", ["", "/metadata", "/frames/1", "/bulkdata/7FE00010"])
def test_unknown_and_wrong_parent(door: Door, suffix: str) -> None:
    """An unknown instance, or a known one under another study or series, is 404; a UID that is none is 400."""
    sample, other = door.stored(), door.stored()
    study, series, sop = sample.study_instance_uid, sample.series_instance_uid, sample.sop_instance_uid
    assert door.get(f"/studies/{study}/series/{series}/instances/{sop}{suffix}").status == 200
    for parents in ((other.study_instance_uid, series), (study, other.series_instance_uid), (new_uid(), series), (study, new_uid())):
        answer = door.get(f"/studies/{parents[0]}/series/{parents[1]}/instances/{sop}{suffix}")
        assert answer.status == 404
        assert sop not in answer.problem["detail"]
    for bad in ("1.2.a", "1..2", "1.2.", "0" * 65, "1.2-3", "%20"):
        assert door.get(f"/studies/{study}/series/{series}/instances/{bad}{suffix}").problem["status"] == 400
    if suffix in {"", "/metadata"}:
        assert door.get(f"/studies/{new_uid()}{suffix}").status == 404
        assert door.get(f"/studies/{study}/series/{other.series_instance_uid}{suffix}").status == 404


def test_compressed_without_asking_for_it(door: Door) -> None:
    """A compressed instance is 406 where Explicit Little Endian is meant, and the words say how to get it; never a wrong syntax."""
    study = new_uid()
    sample = put(door, draw(JPEG_BASELINE, study=study, fragments=[b"\xff\xd8\xff\xd9"]))
    for accept in (
        "*/*",
        'multipart/related; type="application/dicom"',
        "application/dicom",
        f'multipart/related; type="application/dicom"; transfer-syntax={JPEG_2000}',
    ):
        answer = door.get(path_of(sample), Accept=accept)
        assert answer.status == 406
        assert "transfer-syntax=*" in answer.problem["detail"]
        assert JPEG_BASELINE in answer.problem["detail"]
    put(door, draw(EXPLICIT_VR_LITTLE_ENDIAN, study=study))
    assert door.get(f"/studies/{study}").status == 406
    mixed = 'multipart/related; type="application/dicom", multipart/related; type="application/dicom"; transfer-syntax=*'
    assert {part[0].rsplit("=", 1)[1] for part in door.get(f"/studies/{study}", Accept=mixed).parts} == {
        JPEG_BASELINE,
        EXPLICIT_VR_LITTLE_ENDIAN,
    }


@pytest.mark.parametrize("accept", ["text/html", "application/json", 'multipart/related; type="image/jpeg"', "application/zip", "*/*;q=0"])
def test_other_types_of_an_instance(door: Door, accept: str) -> None:
    """A type that is not on offer is 406 with the list of what is."""
    assert "on offer" in door.get(path_of(door.stored()), Accept=accept).problem["detail"]


@pytest.mark.parametrize("path", ["", "/metadata", "/frames/1", "/bulkdata/7FE00010"])
def test_malformed_accept(door: Door, path: str) -> None:
    """An Accept header that cannot be read is 400, not 406 and not ignored."""
    assert door.get(path_of(door.stored()) + path, Accept='multipart/related; type="application/dicom').problem["status"] == 400


# --- metadata ------------------------------------------------------------------------------------------------------------------------


def test_metadata(door: Door) -> None:
    """Metadata of instance, series and study: complete, without group 0002, pixel data by a URL that gives exactly them."""
    study, series = new_uid(), new_uid()
    item = (datasets.text(0x00080100, "SH", "T-01000"), datasets.text(0x00080102, "SH", "SRT"))
    sample = put(door, draw(EXPLICIT_VR_LITTLE_ENDIAN, Element(0x00081140, "SQ", items=(item,)), Element(0x00091001, "OB", b"p" * 3000),
                            study=study, series=series, data=bytes(range(24))))  # fmt: skip
    put(door, draw(EXPLICIT_VR_LITTLE_ENDIAN, study=study, series=series))
    put(door, draw(IMPLICIT_VR_LITTLE_ENDIAN, study=study))
    (one,) = door.get(path_of(sample) + "/metadata").json
    assert one["00080018"]["Value"] == [sample.sop_instance_uid]
    assert one["00081140"]["Value"][0]["00080100"]["Value"] == ["T-01000"]
    assert one["00280010"] == {"vr": "US", "Value": [4]}
    assert not any(tag.startswith("0002") for tag in one)
    assert one["7FE00010"]["BulkDataURI"].startswith(door.base + path_of(sample))
    for tag, content in (("7FE00010", bytes(range(24))), ("00091001", b"p" * 3000)):
        answer = door.get(one[tag]["BulkDataURI"])
        assert answer.status == 200
        assert [part[1] for part in answer.parts] == [content]
        assert door.get(one[tag]["BulkDataURI"], Accept="application/octet-stream").body == content
    assert len(door.get(f"/studies/{study}/series/{series}/metadata").json) == 2
    assert len(door.get(f"/studies/{study}/metadata", Accept="application/json").json) == 3
    assert door.get(f"/studies/{study}/metadata", Accept="application/json").headers["content-type"] == "application/json"


def test_metadata_in_xml(door: Door) -> None:
    """XML asked is 406; a mixed list that also names JSON is JSON."""
    path = path_of(door.stored()) + "/metadata"
    assert door.get(path, Accept='multipart/related; type="application/dicom+xml"').problem["status"] == 406
    assert door.get(path, Accept='multipart/related; type="application/dicom+xml", application/dicom+json;q=0.1').status == 200


def test_urls_have_the_host_of_the_client(doors: Doors) -> None:
    """URLs are made of the Host header; of X-Forwarded-* only behind a trusted proxy; of the public URL when there is one."""
    door = doors()
    sample = door.stored()
    forwarded = {"Host": "node.example:81", "X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}

    def uri(running: Door) -> str:
        answer = running.request("GET", path_of(sample) + "/metadata", headers=forwarded)
        return str(answer.json[0]["7FE00010"]["BulkDataURI"])

    assert uri(door).startswith("http://node.example:81/dicomweb/studies/")
    for host in ("a b", "x/../y", 'h"', "h\u00e9", "evil.example/path", "user@host"):
        assert door.request("GET", "/studies", headers={"Host": host.encode().decode("latin-1")}).status == 400, host
    with Door(door.house, trusted_proxy=True) as proxied:
        assert uri(proxied).startswith("https://evil.example/dicomweb/")
    with Door(door.house, public_url="https://pacs.example/dcm/") as public:
        assert uri(public).startswith("https://pacs.example/dcm/studies/")


# --- bulk data and frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["7FE00010/..", "7FE0", "7FE00010/0/7FE00010", "x", "00091001", "00081140/1/00091001", "7FE00010%00", "%2e%2e/x"]
)
def test_bulk_data_that_is_not_there(door: Door, path: str) -> None:
    """A path that no metadata gave is 400 or 404."""
    assert door.get(path_of(door.stored()) + "/bulkdata/" + path).problem["status"] in {400, 404}


def test_a_document_is_given_as_what_it_is(door: Door) -> None:
    """The encapsulated PDF comes as application/pdf for the comma list that a viewer sends, and as octets for who asks so."""
    pdf = b"%PDF-1.4 " + b"x" * 2001
    sop_class = datasets.ENCAPSULATED_PDF
    own = [datasets.text(0x00420012, "LO", "application/pdf"), Element(0x00420011, "OB", pdf)]
    sample = draw(EXPLICIT_VR_LITTLE_ENDIAN, *own, sop_class=sop_class)
    elements_only = sample.data_set[: sample.data_set.index(b"\x28\x00\x02\x00")] + datasets.encode(
        sorted(own, key=lambda one: one.tag), EXPLICIT_VR_LITTLE_ENDIAN
    )
    sample = put(
        door, Sample(sample.sop_instance_uid, sample.study_instance_uid, sample.series_instance_uid, elements_only, sop_class_uid=sop_class)
    )
    (one,) = door.get(path_of(sample) + "/metadata").json
    uri = one["00420011"]["BulkDataURI"]
    accept = 'multipart/related; type="application/pdf", multipart/related; type="application/octet-stream"'
    assert door.get(uri, Accept=accept).parts == [("application/pdf", pdf)]
    assert door.get(uri, Accept="application/pdf").body == pdf
    assert door.get(uri, Accept=OCTETS).parts[0][1] == pdf
    assert door.get(path_of(sample) + "/frames/1").problem["status"] == 404


@pytest.mark.parametrize("transfer_syntax_uid", [EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN])
def test_native_frames(door: Door, transfer_syntax_uid: str) -> None:
    """Native frames come bit-exact, in the order asked, as often as asked; also with an encoded comma."""
    frames = [bytes([number]) * 24 for number in range(3)]
    sample = put(door, draw(transfer_syntax_uid, sop_class=MULTIFRAME_BYTE, frames=3, data=b"".join(frames)))
    for path, numbers in (("1", [0]), ("3,1", [2, 0]), ("2%2C2", [1, 1]), ("1,2,3", [0, 1, 2])):
        for accept in ("", "*/*", OCTETS, OHIF):
            answer = door.request("GET", f"{path_of(sample)}/frames/{path}", headers={"Accept": accept} if accept else {})
            assert answer.status == 200
            expected = f"application/octet-stream; transfer-syntax={EXPLICIT_VR_LITTLE_ENDIAN}"
            assert answer.parts == [(expected, frames[number]) for number in numbers]


def test_big_endian_frames_are_little_endian(door: Door) -> None:
    """Frames and bulk data of a Big Endian object come in Little Endian words."""
    sample = put(door, draw(EXPLICIT_VR_BIG_ENDIAN, bits=16, data=b"\1\2" * 24))
    for path in ("/frames/1", "/bulkdata/7FE00010"):
        assert door.get(path_of(sample) + path).parts[0][1] == b"\2\1" * 24


def test_bit_packed_frames(door: Door) -> None:
    """Frames of single bits that do not begin at a byte are shifted to one."""
    bits = 0b1_1010_0101_1100_0011_1111_0000  # 25 bits: five frames of 5 pixels
    sample = put(door, draw(EXPLICIT_VR_LITTLE_ENDIAN, sop_class=datasets.SECONDARY_CAPTURE + ".1", rows=1, columns=5, bits=1, frames=5,
                            data=bits.to_bytes(4, "little")))  # fmt: skip
    for number in range(5):
        frame = door.get(f"{path_of(sample)}/frames/{number + 1}").parts[0][1]
        assert frame == bytes([bits >> 5 * number & 0b11111])


@pytest.mark.parametrize("table", ["none", "basic", "empty fragments"])
@pytest.mark.parametrize("split", [1, 2])
def test_compressed_frames(door: Door, table: str, split: int) -> None:
    """Compressed frames come untouched, one or two fragments each, with and without an offset table; the part names the type."""
    frames = [b"\xff\xd8\xff" + bytes([number]) * 29 for number in range(3)]
    fragments = [frame[at : at + 32 // split] for frame in frames for at in range(0, 32, 32 // split)]
    if table == "empty fragments":
        frames = [frame[:16] for frame in frames] if split == 2 else frames
        fragments = [piece if index % split == 0 else b"" for index, piece in enumerate(fragments)]
    sample = draw(JPEG_BASELINE, sop_class=datasets.SECONDARY_CAPTURE + ".4", frames=3, fragments=fragments)
    if table == "basic":
        stride = 32 + 8 * split
        offsets = struct.pack("<3I", 0, stride, 2 * stride)
        empty = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
        data = sample.data_set.replace(empty, struct.pack("<HHI", 0xFFFE, 0xE000, 12) + offsets, 1)
        sample = Sample(
            sample.sop_instance_uid, sample.study_instance_uid, sample.series_instance_uid, data, JPEG_BASELINE, sample.sop_class_uid
        )
    put(door, sample)
    for accept in (
        OHIF,
        "*/*",
        'multipart/related; type="image/jpeg"',
        f'multipart/related; type="image/jpeg"; transfer-syntax={JPEG_BASELINE}',
    ):
        answer = door.get(f"{path_of(sample)}/frames/3,1", Accept=accept)
        assert answer.status == 200
        assert answer.parts == [(f"image/jpeg; transfer-syntax={JPEG_BASELINE}", frames[number]) for number in (2, 0)]
    (one,) = door.get(path_of(sample) + "/metadata").json
    assert [part[1] for part in door.get(one["7FE00010"]["BulkDataURI"]).parts] == frames
    assert door.get(f"{path_of(sample)}/frames/1", Accept=OCTETS).problem["status"] == 406
    assert door.get(f"{path_of(sample)}/frames/1", Accept="image/jpeg").body == frames[0]


@pytest.mark.parametrize("transfer_syntax_uid", [JPEG_BASELINE, RLE_LOSSLESS])
def test_frames_of_unequal_fragments(door: Door, transfer_syntax_uid: str) -> None:
    """One, two and one fragment: told apart by their first bytes, or, where the codec has none, by the offset table; else 406."""
    mark = b"\xff\xd8\xff\xe0" if transfer_syntax_uid == JPEG_BASELINE else b"\1\0\0\0"
    fragments = [mark + b"11", mark + b"2222", b"2b", mark + b"33"]
    frames = [fragments[0], fragments[1] + fragments[2], fragments[3]]
    sample = draw(transfer_syntax_uid, sop_class=datasets.SECONDARY_CAPTURE + ".4", frames=3, fragments=fragments)
    if transfer_syntax_uid == RLE_LOSSLESS:
        put(door, sample)
        assert "tell" in door.get(f"{path_of(sample)}/frames/1", Accept=OHIF).problem["detail"]
        sample = draw(transfer_syntax_uid, sop_class=datasets.SECONDARY_CAPTURE + ".4", frames=3, fragments=fragments)
        table = struct.pack("<HHI3I", 0xFFFE, 0xE000, 12, 0, 14, 14 + 16 + 10)
        data = sample.data_set.replace(struct.pack("<HHI", 0xFFFE, 0xE000, 0), table, 1)
        sample = Sample(
            sample.sop_instance_uid, sample.study_instance_uid, sample.series_instance_uid, data, RLE_LOSSLESS, sample.sop_class_uid
        )
    put(door, sample)
    assert [part[1] for part in door.get(f"{path_of(sample)}/frames/2,1,3", Accept=OHIF).parts] == [frames[1], frames[0], frames[2]]


def test_an_encoded_slash_is_no_slash(door: Door) -> None:
    """A path that hides its structure in percent signs is refused as such, before any resource looks at it."""
    path = path_of(door.stored()) + "/bulkdata/"
    for hidden in ("00081140%2F1%2F00091001", "7FE00010%5c", "7FE00010%250", "7FE00010%1f", "7FE00010//"):
        assert door.get(path + hidden).problem["status"] == 400


@pytest.mark.parametrize(("frames", "status"), [
    ("0", 400), ("-1", 400), ("x", 400), ("1,", 400), (",1", 400), ("1.5", 400), ("2", 404), ("1,9", 404), ("1,0", 400), ("9" * 30, 400),
    ("1-2", 400), ("%31", 200), ("1%00", 400), (",".join(["1"] * 1001), 400),
])  # fmt: skip
def test_frame_lists(door: Door, frames: str, status: int) -> None:
    """Frame numbers that are none are 400, those beyond the last are 404."""
    answer = door.get(f"{path_of(door.stored())}/frames/{frames}")
    assert answer.status == status
    if status != 200:
        assert answer.problem["detail"]


# --- HEAD, and what breaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "/metadata", "/frames/1", "/bulkdata/7FE00010", "/frames/0", "/frames/7"])
def test_head_is_get_without_body(door: Door, suffix: str) -> None:
    """HEAD has the status and the headers of GET, and no body."""
    path = path_of(door.stored()) + suffix
    got, head = door.get(path), door.request("HEAD", path)
    assert head.status == got.status
    assert head.body == b""
    kind = "content-type"
    assert head.headers[kind].partition("boundary=")[0] == got.headers[kind].partition("boundary=")[0]
    assert set(got.headers) - {"transfer-encoding", "content-length"} <= set(head.headers)


def damage(door: Door, sample: Sample, where: float) -> None:
    """Change a byte of the sealed object on the disk."""
    key = door.house.index.find(sample.sop_instance_uid).sealed.object_key
    (path,) = [one for one in (door.house.folder / "objects").rglob("*") if one.is_file() and key in str(one).replace("/", "")]
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def test_a_damaged_instance_is_no_short_answer(doors: Doors) -> None:
    """An instance that fails its integrity check: an honest 500 before the first byte, or a connection that breaks off; never a short 200."""  # noqa: E501
    door = doors()
    study, series = new_uid(), new_uid()
    samples = [put(door, photograph(study=study, series=series, rows=1600, columns=1600)) for _ in range(2)]
    by_uid = sorted(samples, key=lambda sample: sample.sop_instance_uid)
    damage(door, by_uid[1], 0.7)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        door.get(f"/studies/{study}")
    damage(door, by_uid[1], 0.000004)  # in its header: seen when it is opened, though the first instance is whole
    for suffix in ("", "/metadata"):
        assert door.get(f"/studies/{study}{suffix}").problem["status"] == 500
    damage(door, by_uid[0], 0.01)
    answer = door.get(path_of(by_uid[0]))
    assert answer.status == 500
    assert "integrity" in answer.problem["detail"]
    assert door.get(f"/studies/{study}").problem["status"] == 500
    for path in (door.house.folder / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    assert door.get(f"/studies/{study}/metadata").problem["status"] == 500


@pytest.mark.slow
def test_a_client_that_reads_slowly(doors: Doors) -> None:
    """A reader that needs far longer than the idle time for a piece of ours, but never pauses so long, gets all of it."""
    door = doors(limits=WebLimits(idle_s=1.0))
    sample = put(door, photograph(rows=3000, columns=3000))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", door.port))
        connection.sendall(f"GET /dicomweb{path_of(sample)} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        received = bytearray()
        for _ in range(160):
            received += connection.recv(16_384)
            time.sleep(0.05)  # about 300 kB/s
        while piece := connection.recv(1 << 20):
            received += piece
    assert len(received) > len(sample.data_set)
    assert received.endswith(b"0\r\n\r\n")


def test_a_client_that_does_not_read(doors: Doors) -> None:
    """A reader that stops is cut off after the idle time; others are served meanwhile."""
    door = doors(limits=WebLimits(idle_s=0.5))
    sample = put(door, photograph(rows=6000, columns=6000))
    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.sendall(f"GET /dicomweb{path_of(sample)} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        received = connection.recv(10)
        assert received == b"HTTP/1.1 2"
        assert door.get("/studies?limit=1").status == 200
        time.sleep(1.2)  # what is measured here is our own idleness
        connection.settimeout(20)
        length = 0
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 20):
                length += len(piece)
                received = piece
        assert length < len(sample.data_set)
        assert not received.endswith(b"0\r\n\r\n")
