"""Content negotiation, row by row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomweb.errors import BadRequest, NotAcceptable
from dicomweb.negotiate import (
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    Container,
    json_type,
    parse_accept,
    parse_media_type,
    plan_instances,
    plan_octets,
)

JPEG, J2K, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
DICOM = 'multipart/related; type="application/dicom"'
OCTETS = 'multipart/related; type="application/octet-stream"'


@pytest.mark.parametrize(
    ("text", "name", "parameters"),
    [
        ("application/dicom", "application/dicom", {}),
        ("Application/DICOM+JSON; Charset=utf-8", "application/dicom+json", {"charset": "utf-8"}),
        ('multipart/related; type="application/dicom"; boundary="a;b\\"c"', "multipart/related",
         {"type": "application/dicom", "boundary": 'a;b"c'}),
        ("multipart/related;type=application/dicom;boundary='()+_,-./:=?", "multipart/related",
         {"type": "application/dicom", "boundary": "'()+_,-./:=?"}),
        ("multipart/related ; type = application/octet-stream ; transfer-syntax=*;", "multipart/related",
         {"type": "application/octet-stream", "transfer-syntax": "*"}),
        ("*", "*/*", {}),
    ],
)  # fmt: skip
def test_media_types(text: str, name: str, parameters: dict[str, str]) -> None:
    """Types and parameters are read quoted or not, in any case, with any punctuation."""
    media = parse_media_type(text)
    assert (media.name, dict(media.parameters)) == (name, parameters)


@pytest.mark.parametrize("text", ["", "text", "/", "a/", "/b", "a/b; x", 'a/b; x="y', "a/b; =y", 'a/b; x=y"z', "a b/c", "ä/b"])
def test_malformed_media_types(text: str) -> None:
    """What is no media type is a 400."""
    with pytest.raises(BadRequest):
        parse_media_type(text)


@pytest.mark.parametrize("text", ["a/b; q=2", "a/b; q=-1", "a/b; q=x", "a/b; q=1.5", "a/b, c", "a/b;q=0.1234", ",".join(["a/b"] * 65)])
def test_malformed_accept(text: str) -> None:
    """A weight that is none, an entry that is no type, and too many entries are a 400."""
    with pytest.raises(BadRequest):
        parse_accept(text)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/dicom+json"),
        ("*/*", "application/dicom+json"),
        ("application/json", "application/json"),
        ("application/dicom+json", "application/dicom+json"),
        ("text/html, application/json;q=0.5, application/dicom+json;q=0.4", "application/json"),
        ("application/dicom+json;q=.2, application/json;q=.3", "application/json"),
        ("application/dicom+json, multipart/related; type=application/octet-stream", "application/dicom+json"),  # OHIF#3726
        ("nonsense/nonsense, application/*", "application/dicom+json"),
    ],
)
def test_json_answers(accept: str, expected: str) -> None:
    """The first acceptable entry wins, by weight and then by order; unknown ones are passed over."""
    assert json_type(parse_accept(accept)) == expected


@pytest.mark.parametrize("accept", ["application/dicom+xml", 'multipart/related; type="application/dicom+xml"', "text/html", "*/*;q=0"])
def test_json_is_never_given_for_something_else(accept: str) -> None:
    """XML asked is 406, never JSON; weight 0 is no acceptance."""
    with pytest.raises(NotAcceptable, match="on offer"):
        json_type(parse_accept(accept))


M, S = Container.MULTIPART, Container.SINGLE
LE, IMPLICIT, BIG = EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN


@pytest.mark.parametrize(
    ("accept", "stored", "container", "sent"),
    [
        ("", [LE], M, [LE]),
        ("*/*", [IMPLICIT, BIG, LE], M, [LE, LE, LE]),
        ("multipart/related", [IMPLICIT], M, [LE]),
        (DICOM, [IMPLICIT], M, [LE]),
        (DICOM + "; transfer-syntax=*", [IMPLICIT, BIG, JPEG], M, [IMPLICIT, BIG, JPEG]),
        (DICOM + f"; transfer-syntax={JPEG}", [JPEG], M, [JPEG]),
        (DICOM + f"; transfer-syntax={IMPLICIT}", [IMPLICIT], M, [IMPLICIT]),
        (DICOM + f"; transfer-syntax={JPEG}, {DICOM}; transfer-syntax={LE}", [JPEG, BIG], M, [JPEG, LE]),
        ("text/html, " + DICOM, [LE], M, [LE]),
        ("application/dicom", [LE], S, [LE]),
        ("application/dicom; transfer-syntax=*", [JPEG], S, [JPEG]),
        ("application/dicom, " + DICOM + "; transfer-syntax=*", [JPEG], M, [JPEG]),
        (DICOM + ";q=0.1, application/dicom", [LE], S, [LE]),
    ],
)
def test_instances(accept: str, stored: list[str], container: Container, sent: list[str]) -> None:
    """Container and transfer syntax of an answer, for every kind of Accept of dicomweb.md."""
    plan = plan_instances(parse_accept(accept), stored, single=len(stored) == 1)
    assert (plan.container, list(plan.transfer_syntax_uids)) == (container, sent)


@pytest.mark.parametrize(
    ("accept", "stored", "single", "words"),
    [
        ("text/html", [LE], True, "application/dicom"),
        ("application/dicom", [LE], False, "multipart/related"),  # a whole study needs multipart
        (DICOM, [JPEG], True, "transfer-syntax=*"),
        ("*/*", [LE, JPEG], False, "1 of 2 instances"),
        (DICOM + f"; transfer-syntax={J2K}", [JPEG], True, JPEG),
        ('multipart/related; type="application/dicom+json"', [LE], True, "on offer"),
    ],
)
def test_instances_that_cannot_be_given(accept: str, stored: list[str], single: bool, words: str) -> None:
    """Nothing fits: 406, and the words say what is on offer and how to ask for it."""
    with pytest.raises(NotAcceptable) as refused:
        plan_instances(parse_accept(accept), stored, single=single)
    assert words in refused.value.detail


@pytest.mark.parametrize(
    ("accept", "stored", "content_type"),
    [
        ("", LE, f"application/octet-stream; transfer-syntax={LE}"),
        (OCTETS, BIG, f"application/octet-stream; transfer-syntax={LE}"),
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", LE, f"application/octet-stream; transfer-syntax={LE}"),
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", JPEG, f"image/jpeg; transfer-syntax={JPEG}"),
        ('multipart/related; type="image/jpeg"', JPEG, f"image/jpeg; transfer-syntax={JPEG}"),
        ('multipart/related; type="image/x-dicom-rle"', RLE, f"image/x-dicom-rle; transfer-syntax={RLE}"),
        ('multipart/related; type="image/png", multipart/related; type="image/*"', J2K, f"image/jp2; transfer-syntax={J2K}"),
        ("*/*", J2K, f"image/jp2; transfer-syntax={J2K}"),
    ],
)
def test_frames(accept: str, stored: str, content_type: str) -> None:
    """Frames are given as stored, and the part says what they are; OHIF's ``octet-stream; transfer-syntax=*`` works."""
    assert plan_octets(parse_accept(accept), stored, encapsulated=stored not in {LE, BIG}, single=True).content_type == content_type


@pytest.mark.parametrize(
    ("accept", "stored"),
    [(OCTETS, JPEG), ('multipart/related; type="image/jp2"', JPEG), (f'multipart/related; type="image/jpeg"; transfer-syntax={J2K}', JPEG),
     ('multipart/related; type="image/jpeg"', LE), ("text/html", LE)],
)  # fmt: skip
def test_frames_are_never_recoded(accept: str, stored: str) -> None:
    """Decoded frames of a compressed image, or another compression, are 406: nothing lossy is invented."""
    with pytest.raises(NotAcceptable, match="on offer"):
        plan_octets(parse_accept(accept), stored, encapsulated=stored != LE, single=True)


def test_an_encapsulated_document_has_its_own_type() -> None:
    """The comma list that a viewer sends for a PDF gets the PDF."""
    accept = 'multipart/related; type="application/pdf", multipart/related; type="application/octet-stream"'
    assert (
        plan_octets(parse_accept(accept), LE, encapsulated=False, single=True, own_type="application/pdf").content_type == "application/pdf"
    )


@given(st.text(max_size=60))
def test_any_header_is_read_or_refused(text: str) -> None:
    """No header text does anything but parse or give a 400."""
    try:
        parse_accept(text)
    except BadRequest as error:
        assert error.detail  # noqa: PT017
