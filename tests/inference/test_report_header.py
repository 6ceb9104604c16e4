"""What a report takes over from a source, however odd the source is (report.md section 2)."""

from __future__ import annotations

import warnings
from io import BytesIO

import pydicom
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from inference.records import FrameAnalysis, ImageAnalysis
from inference.report import build_reports
from inference.report.encode import encode
from inference.report.header import read_source
from inference.report.values import valid
from tests.inference import report_drawing as draw


def raw(elements: dict[int, tuple[str, bytes]], **changes: object) -> Dataset:
    """Draw a source whose elements (tag: VR, bytes) are read from bytes, unchecked; `changes` by keyword first."""
    ds = draw.source(bare=True)
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    written = BytesIO()
    pydicom.dcmwrite(written, ds, implicit_vr=False, little_endian=True)
    own = pydicom.dcmread(BytesIO(written.getvalue()), force=True)
    kept = [(int(tag), element.VR, element.value or b"") for tag in own.keys() if (element := own.get_item(tag)) is not None]  # noqa: SIM118
    merged = {tag: (vr, value) for tag, vr, value in kept} | elements
    data = encode((tag, vr, value + b"\0" * (len(value) % 2)) for tag, (vr, value) in merged.items() if vr not in {"US", "SQ"})
    with warnings.catch_warnings():  # pydicom's opinion of the source, before any of our code has seen it
        warnings.simplefilter("ignore")
        return pydicom.dcmread(BytesIO(data), force=True)


def summary(source: Dataset, analysis: ImageAnalysis | None = None) -> Dataset:
    """Read the summary of a source."""
    reports = build_reports(source, analysis or draw.analysis(draw.frame()), draw.context(), node=draw.NODE)
    return pydicom.dcmread(draw.part10(reports[0]))


def remarks(ds: Dataset) -> list[str]:
    """Texts of the evaluations."""
    return [item.TextValue for item in ds.ContentSequence[-1].ContentSequence if item.ValueType == "TEXT"]


@pytest.mark.parametrize(
    ("charset", "encoded", "name"),
    [
        (b"", b"Doe^Jane", "Doe^Jane"),
        (b"ISO_IR 100", "Müller^Änne".encode("latin-1"), "Müller^Änne"),
        (b"ISO_IR 144", "Люкцьзъ".encode("iso8859_5"), "Люкцьзъ"),
        (b"ISO_IR 192", "Wang^XiaoDong=王^小东=".encode(), "Wang^XiaoDong=王^小东"),
        (b"GB18030", "Wang^XiaoDong=王^小东".encode("gb18030"), "Wang^XiaoDong=王^小东"),
        # PS3.5 Annex H, example 1: three groups in ISO 2022
        (
            b"\\ISO 2022 IR 87",
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
            "Yamada^Tarou=山田^太郎=やまだ^たろう",
        ),
        # PS3.5 Annex I, example 1: Korean
        (
            b"\\ISO 2022 IR 149",
            b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
            "Hong^Gildong=洪^吉洞=홍^길동",
        ),
    ],
)
def test_names_are_converted(charset: bytes, encoded: bytes, name: str) -> None:
    """A name keeps all its groups, whatever the character set, and is written in UTF-8."""
    ds = summary(raw({0x00080005: ("CS", charset), 0x00100010: ("PN", encoded)}))
    assert ds.SpecificCharacterSet == "ISO_IR 192"
    assert ds.PatientName == name


def test_missing_attributes_are_empty() -> None:
    """A source without patient and study attributes: type 2 present and empty, type 3 absent."""
    ds = summary(draw.source(bare=True))
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"):
        assert keyword in ds
        assert not ds[keyword].value
    assert "ReferringPhysicianName" in ds
    assert "IssuerOfPatientID" not in ds
    assert "StudyDescription" not in ds


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        (0x00100010, "PN", b"x" * 65),
        (0x00100010, "PN", b"a=b=c=d"),
        (0x00100010, "PN", b"a\\b"),
        (0x00100020, "LO", b"1" * 65),
        (0x00100020, "LO", b"1\\2"),
        (0x00100020, "LO", b"1\n2"),
        (0x00100030, "DA", b"19610230"),
        (0x00100030, "DA", b"yesterday"),
        (0x00100030, "DA", b"\xff\xfe"),
        (0x00100040, "CS", b"female"),
        (0x00080020, "DA", b"2026-03-04"),
        (0x00080030, "TM", b"25"),
        (0x00080030, "TM", b"12:30"),
        (0x00080050, "SH", b"a" * 17),
        (0x00200010, "SH", b"\x1b\x1b"),
    ],
)
def test_what_cannot_be_kept_is_empty_and_named(tag: int, vr: str, value: bytes) -> None:
    """A value that is not valid is not cut and not repaired: the attribute is empty, its keyword stands in the remarks, no value does."""
    ds = summary(raw({tag: (vr, value)}))
    assert tag in ds
    assert not ds[tag].value
    assert f"Left empty, not valid in the source: {ds[tag].keyword}" in remarks(ds)


@pytest.mark.parametrize(
    ("tag", "vr", "value", "kept"),
    [
        (0x00100020, "LO", b" 7 ", " 7"),
        (0x00100020, "LO", b"1" * 64, "1" * 64),
        (0x00100030, "DA", b"19610203", "19610203"),
        (0x00080030, "TM", b"0102", "0102"),
        (0x00080030, "TM", b"235959.123456", "235959.123456"),
        (0x00100040, "CS", b"O ", "O"),
        (0x00101010, "AS", b"045Y", "045Y"),
    ],
)
def test_what_is_valid_is_kept_as_it_is(tag: int, vr: str, value: bytes, kept: str) -> None:
    """Padding goes, everything else stays, leading spaces of a Patient ID included."""
    report = build_reports(raw({tag: (vr, value)}), draw.analysis(draw.frame()), draw.context(), node=draw.NODE)[0]
    ds = pydicom.dcmread(draw.part10(report))
    written = ds.get_item(tag).value
    assert written.decode().rstrip(" ") == kept


def test_foreign_modules_stay_behind() -> None:
    """Private elements, acquisition and image attributes of the source are not in a report."""
    source = draw.source()
    source.add_new(0x00090010, "LO", "ACME")
    source.add_new(0x00091001, "LO", "secret")
    source.DeviceUID = "1.2.3"
    source.ProtocolName = "x"
    ds = summary(source)
    assert not {0x00090010, 0x00091001} & set(ds.keys())
    assert not {"DeviceUID", "ProtocolName", "Rows", "AnatomicRegionSequence"} & {element.keyword for element in ds}


def test_identity_of_the_issuer_and_deidentification() -> None:
    """Who issued the Patient ID, and how a source was de-identified, come along: they are part of the patient module."""
    source = draw.source()
    source.IssuerOfPatientID = "HOSPITAL"
    qualifier = Dataset()
    qualifier.UniversalEntityID, qualifier.UniversalEntityIDType = "1.2.3.4", "ISO"
    source.IssuerOfPatientIDQualifiersSequence = [qualifier]
    source.PatientIdentityRemoved = "YES"
    method = Dataset()
    method.CodeValue, method.CodingSchemeDesignator, method.CodeMeaning = "113100", "DCM", "Basic Application Confidentiality Profile"
    source.DeidentificationMethodCodeSequence = [method]
    ds = summary(draw.reread(source))
    assert ds.IssuerOfPatientID == "HOSPITAL"
    assert ds.IssuerOfPatientIDQualifiersSequence[0].UniversalEntityID == "1.2.3.4"
    assert ds.PatientIdentityRemoved == "YES"
    assert ds.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    del source.DeidentificationMethodCodeSequence
    assert "PatientIdentityRemoved" not in summary(source)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                (0x00080005, "CS"),
                (0x00080020, "DA"),
                (0x00080030, "TM"),
                (0x00080050, "SH"),
                (0x00080060, "CS"),
                (0x00080090, "PN"),
                (0x00080201, "SH"),
                (0x00081030, "LO"),
                (0x00100010, "PN"),
                (0x00100020, "LO"),
                (0x00100030, "DA"),
                (0x00100040, "CS"),
                (0x00101010, "AS"),
                (0x00200020, "CS"),
                (0x00200062, "CS"),
                (0x00280008, "IS"),
                (0x00282110, "CS"),
                (0x00282112, "DS"),
            ]
        ),
        st.binary(max_size=80) | st.sampled_from([b"ISO_IR 192", b"\\ISO 2022 IR 87", b"ISO_IR 1", b"01", b"12\\13", b"+0100", b"\x1b$B"]),
        max_size=8,
    )
)
def test_no_source_breaks_a_report(elements: dict[tuple[int, str], bytes]) -> None:
    """Arbitrary bytes in every attribute that is read: a report comes out, and reading it finds nothing wrong."""
    try:
        source = raw({tag: (vr, value) for (tag, vr), value in elements.items()})
    except ValueError:  # NUL in Specific Character Set: pydicom does not open it, and `source_header` refuses the picture
        reject()
    gates_only = FrameAnalysis(1, 120, 160, quality=draw.quality(3, acceptable=False))  # a small report: its patient and study matter here
    ds = summary(source, draw.analysis(gates_only))
    for element in ds.iterall():  # converts every value; warnings are errors here
        if element.VR in {"DA", "TM", "AS", "CS", "SH", "LO", "PN"} and element.value and element.VM == 1:
            assert valid(element.VR, str(element.value))


def test_damaged_sequences_are_left_out() -> None:
    """A sequence whose items cannot be read, or with nothing in its codes, costs the site, not the report."""
    source = draw.source()
    source.AnatomicRegionSequence = [Dataset()]
    assert read_source(source).site is None
    source = pydicom.dcmread(BytesIO(encode([(0x00082218, "SQ", [b"\x08\x00\x00"]), *_uids()])), force=True)
    assert read_source(source).site is None


def _uids() -> list[tuple[int, str, str]]:
    return [(0x00080016, "UI", draw.VL_PHOTOGRAPHIC), (0x00080018, "UI", "1.2"), (0x0020000D, "UI", "1.3"), (0x0020000E, "UI", "1.4")]


def test_another_picture_under_the_same_uid_has_other_reports() -> None:
    """Where an operator accepted other content under a UID, its reports are other documents: a PACS may hold the first ones."""
    source, analysis = draw.source(), draw.analysis(draw.frame())
    first = build_reports(source, analysis, draw.context(source_sha256="a" * 64), node=draw.NODE)
    second = build_reports(source, analysis, draw.context(source_sha256="b" * 64), node=draw.NODE)
    assert not {report.sop_instance_uid for report in first} & {report.sop_instance_uid for report in second}
