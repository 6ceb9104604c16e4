"""The multipart reader and writer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomweb.errors import BadRequest, TooLarge, WebError
from dicomweb.multipart import MultipartLimits, MultipartReader, MultipartWriter, PartBegin, PartData, PartEnd

BOUNDARY_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'()+_,-./:=?"


def read(
    body: bytes, boundary: str, cuts: list[int] | None = None, limits: MultipartLimits | None = None
) -> list[tuple[dict[str, str], bytes]]:
    """Read a body that arrives cut at `cuts`; whole parts only."""
    reader = MultipartReader(boundary, limits)
    borders = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts or [])})
    parts: list[tuple[dict[str, str], bytes]] = []
    headers: dict[str, str] = {}
    content = b""
    for start, end in itertools.pairwise(borders):
        for event in reader.feed(body[start:end]):
            match event:
                case PartBegin(headers=new):
                    headers, content = dict(new), b""
                case PartData(data=data):
                    content += data
                case PartEnd():
                    parts.append((headers, content))
    reader.finish()
    return parts


boundaries = st.text(BOUNDARY_CHARACTERS + " ", min_size=1, max_size=70).filter(lambda text: not text.endswith(" "))
# Contents that are full of what looks like the beginning of a delimiter.
contents = st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([b"\r\n", b"\r\n--", b"--", b"\r", b"\n"])), max_size=8).map(b"".join)


@given(
    boundary=boundaries,
    parts=st.lists(contents, min_size=1, max_size=5),
    preamble=st.binary(max_size=20),
    epilogue=st.binary(max_size=20),
    headed=st.booleans(),
    padding=st.sampled_from([b"", b" ", b"\t  "]),
    cuts=st.lists(st.integers(0, 2000), max_size=20),
)
def test_what_is_framed_comes_out_however_it_arrives(
    boundary: str, parts: list[bytes], preamble: bytes, epilogue: bytes, headed: bool, padding: bytes, cuts: list[int]
) -> None:
    """Any parts, any boundary of RFC 2046, preamble, epilogue, padding and chunking: the parts come out byte for byte."""
    mark = b"--" + boundary.encode()
    if any(mark in one for one in [*parts, b"\r\n" + preamble]) or any(b"\r\n" + mark in b"\r\n" + one for one in parts):
        return  # the boundary must not occur in the data; short drawn ones do
    head = b"Content-Type: application/dicom\r\nX-Other:a b \r\n" if headed else b""
    body = preamble + b"\r\n" if preamble else b""
    body += b"".join(mark + padding + b"\r\n" + head + b"\r\n" + one + b"\r\n" for one in parts) + mark + b"--" + epilogue
    expected = {"content-type": "application/dicom", "x-other": "a b"} if headed else {}
    assert read(body, boundary, cuts) == [(expected, one) for one in parts]
    assert read(body, boundary, list(range(len(body)))) == [(expected, one) for one in parts]


@given(body=st.one_of(st.binary(max_size=300), contents.map(lambda text: b"--b\r\n" + text), contents.map(lambda text: text + b"--b--")),
       cuts=st.lists(st.integers(0, 300), max_size=5))  # fmt: skip
def test_hostile_bodies_are_refused_cleanly(body: bytes, cuts: list[int]) -> None:
    """Whatever the bytes, there are parts or a refusal of the 400 class, nothing else."""
    try:
        read(body, "b", cuts, MultipartLimits(header_bytes=64, preamble_bytes=64))
    except WebError as error:
        assert error.status in {400, 413}  # noqa: PT017


@given(parts=st.lists(contents, min_size=1, max_size=3), cut=st.integers(1, 1000))
def test_a_cut_body_never_ends_its_last_part(parts: list[bytes], cut: int) -> None:
    """A body that is cut before the end of its closing delimiter is refused, and the part that was cut is not ended."""
    body = b"".join(b"--boundary\r\n\r\n" + one + b"\r\n" for one in parts) + b"--boundary--"
    short = body[: cut % len(body)]
    reader = MultipartReader("boundary")
    ended = sum(isinstance(event, PartEnd) for event in reader.feed(short))
    # Where the delimiter line of each part ends: after its line end, or after the two hyphens that close the body.
    ends = list(itertools.accumulate(len(b"--boundary\r\n\r\n" + one + b"\r\n") for one in parts))
    assert ended == sum(end + len("--boundary--") <= len(short) for end in ends)
    with pytest.raises(BadRequest, match=r"cut|no delimiter"):
        reader.finish()


def test_parts_without_content_and_look_alikes() -> None:
    """An empty part needs no line end of its own; a longer boundary that begins like ours is content."""
    body = b"--b\r\n\r\n--b\r\nA: 1\r\n\r\n\r\n--bc\r\n\r\n--b x\r\n\r\n--b-\r\n--b--"
    assert read(body, "b") == [({}, b""), ({"a": "1"}, b"\r\n--bc\r\n\r\n--b x\r\n\r\n--b-")]


@pytest.mark.parametrize("boundary", ["", " ", "a ", "x" * 71, "bound\u00e4ry", "a\r\nb", "a;b", 'a"b'])
def test_boundaries_against_the_grammar(boundary: str) -> None:
    """A boundary that RFC 2046 does not allow is refused before anything is read."""
    with pytest.raises(BadRequest, match="boundary"):
        MultipartReader(boundary)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"x" * 100, TooLarge),  # no delimiter within the preamble's limit
        (b"--b\r\n" + b"A: " + b"x" * 100, TooLarge),  # a header without end
        (b"--b\r\n" + b"".join(b"H%d: x\r\n" % number for number in range(9)), TooLarge),
        (b"--b\r\nno header\r\n\r\n", BadRequest),
        (b"--b\r\n: no name\r\n\r\n", BadRequest),
        (b"--b\r\nA: b\nB: c\r\n\r\n", BadRequest),
        (b"--b\r\n\r\n\r\n" * 5, TooLarge),  # parts
    ],
)
def test_limits(body: bytes, kind: type[WebError]) -> None:
    """Preamble, headers and parts are counted, in one chunk and byte by byte."""
    limits = MultipartLimits(parts=4, header_bytes=80, header_count=8, preamble_bytes=80)
    for cuts in ([], list(range(len(body)))):
        with pytest.raises(kind):
            read(body, "b", cuts, limits)


def test_memory_stays_at_the_chunk() -> None:
    """What is not a possible delimiter is handed on at once: the reader keeps less than one delimiter."""
    reader = MultipartReader("boundary")
    list(reader.feed(b"--boundary\r\n\r\n"))
    kept = 0
    for chunk in (b"x" * 1000, b"\r\n--bound", b"y" * 1000, b"\r" * 1000):
        kept += len(chunk) - sum(len(event.data) for event in reader.feed(chunk) if isinstance(event, PartData))
        assert kept <= len("\r\n--boundary")


@given(parts=st.lists(contents, min_size=1, max_size=4))
def test_the_writer_is_read_back(parts: list[bytes]) -> None:
    """What the writer frames, the reader takes apart; the boundary is new each time."""
    writer = MultipartWriter("application/dicom")
    body = b"".join(writer.begin({"Content-Type": "application/dicom"}) + one for one in parts) + writer.end()
    assert read(body, writer.boundary) == [({"content-type": "application/dicom"}, one) for one in parts]
    assert writer.boundary != MultipartWriter("application/dicom").boundary
