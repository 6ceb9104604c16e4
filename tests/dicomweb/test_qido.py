"""QIDO-RS over a real socket: resources, matching, paging, what is returned, what is refused."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomweb.context import WebLimits
from dicomweb.errors import BadRequest
from dicomweb.qido import parse_parameters
from storage.part10 import part10_prefix
from tests.dicomweb.door import Door
from tests.storage.datasets import EXPLICIT_VR_LITTLE_ENDIAN, VL_PHOTOGRAPHIC, encode, pixels, text
from tests.storage.house import build

Doors = Callable[..., Door]
DERMOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.4.1"


def instance(study: str, series: int, number: int, *, sop_class: str = VL_PHOTOGRAPHIC, **values: str) -> bytes:
    """Write one small photograph as a file; `values` by keyword replace the usual ones."""
    vrs = {"PatientName": (0x00100010, "PN"), "PatientID": (0x00100020, "LO"), "StudyDate": (0x00080020, "DA"), "StudyTime": (0x00080030, "TM"),  # noqa: E501
           "AccessionNumber": (0x00080050, "SH"), "StudyDescription": (0x00081030, "LO"), "Modality": (0x00080060, "CS"),
           "SeriesDescription": (0x0008103E, "LO"), "SeriesNumber": (0x00200011, "IS"), "InstanceNumber": (0x00200013, "IS"),
           "PatientBirthDate": (0x00100030, "DA"), "ReferringPhysicianName": (0x00080090, "PN"), "BodyPartExamined": (0x00180015, "CS")}  # fmt: skip  # noqa: E501
    usual = {"Modality": "XC", "SeriesNumber": str(series), "InstanceNumber": str(number)}
    sop = f"{study}.{series}.{number}"
    elements = [text(0x00080005, "CS", "ISO_IR 192"), text(0x00080016, "UI", sop_class), text(0x00080018, "UI", sop),
                text(0x0020000D, "UI", study), text(0x0020000E, "UI", f"{study}.{series}")]  # fmt: skip
    elements += [text(*vrs[keyword], value, "utf-8") for keyword, value in (usual | values).items()]
    elements += pixels(rows=2, columns=3, samples=1, photometric="MONOCHROME2")
    elements.sort(key=lambda element: element.tag)
    prefix = part10_prefix(sop_class_uid=sop_class, sop_instance_uid=sop, transfer_syntax_uid=EXPLICIT_VR_LITTLE_ENDIAN)
    return prefix + encode(elements, EXPLICIT_VR_LITTLE_ENDIAN)


ANNA = {"PatientName": "Müller^Anna", "PatientID": "A-1", "StudyDate": "20240501", "StudyTime": "101500", "AccessionNumber": "ACC/1",
        "StudyDescription": "Skin, left arm", "PatientBirthDate": "19700101", "ReferringPhysicianName": "Doctor^Who"}  # fmt: skip
TARO = {"PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう", "PatientID": "T*1", "StudyDate": "20240601", "StudyTime": "235959.5"}
NOBODY = {"PatientName": "", "PatientID": "N-1", "StudyDate": "20230101"}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Three studies: Anna's of two series with three instances, Taro's, and one without a name."""
    house = build(tmp_path_factory.mktemp("clinic"))
    with Door(house) as running:
        answer = running.store(
            instance("2.25.1", 1, 1, SeriesDescription="overview", BodyPartExamined="ARM", **ANNA),
            instance("2.25.1", 1, 2, **ANNA),
            instance("2.25.1", 2, 1, sop_class=DERMOSCOPIC, **(ANNA | {"Modality": "DMS"})),
            instance("2.25.2", 1, 1, **TARO),
            instance("2.25.3", 1, 1, **NOBODY),
        )
        assert answer.status == 200, answer.body
        yield running
    house.close()


def uids(answer: Any, tag: str = "0020000D") -> list[str]:
    """UIDs of the results, in order."""
    assert answer.status == 200, answer.body
    return [match[tag]["Value"][0].removeprefix("2.25.") for match in answer.json]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", "2 1 3"),  # newest first
        ("PatientName=", "2 1 3"),
        ("PatientName=*", "2 1 3"),
        ("PatientName=m%C3%BCller*", "1"),
        ("00100010=M%C3%BCller%5EAnna", "1"),
        ("PatientName=*%5Eanna", "1"),
        ("PatientName=Anna", ""),
        ("PatientName=%E5%B1%B1%E7%94%B0*", "2"),
        ("PatientName=%E3%82%84*", "2"),
        ("PatientID=A-1", "1"),
        ("PatientID=A-%3F", "1"),
        ("PatientID=T%2A1", "2"),
        ("PatientID=A_1", ""),  # no SQL wildcard
        ("PatientID=%25", ""),
        ("AccessionNumber=ACC%2F1", "1"),
        ("StudyDescription=Skin%2C+left*", "1"),
        ("StudyDescription=*%20arm", "1"),
        ("StudyDate=20240501", "1"),
        ("StudyDate=20240501-20240601", "2 1"),
        ("StudyDate=20240502-", "2"),
        ("StudyDate=-20240501", "1 3"),
        ("StudyTime=1000-1100", "1"),
        ("StudyInstanceUID=2.25.1,2.25.3", "1 3"),
        ("StudyInstanceUID=2.25.1%2C2.25.3", "1 3"),
        ("StudyInstanceUID=2.25.1%5C2.25.2", "2 1"),
        ("StudyInstanceUID=2.25.1&StudyInstanceUID=2.25.2", "2 1"),
        ("ModalitiesInStudy=DMS", "1"),
        ("ModalitiesInStudy=XC", "2 1 3"),
        ("ModalitiesInStudy=SR", ""),
        ("00080061=DMS", "1"),
        ("PatientBirthDate=19700101", "1"),
        ("ReferringPhysicianName=doctor*", "1"),
        ("PatientID=A-1&StudyDate=20240601", ""),
        ("limit=2", "2 1"),
        ("limit=1&offset=1", "1"),
        ("offset=2", "3"),
        ("offset=9", ""),
        ("limit=0", ""),
        ("limit=101&offset=0&fuzzymatching=true&includefield=00081030%2C00080060", "2 1 3"),  # OHIF
        ("accept=application/dicom%2Bjson&PatientID=A-1", "1"),
        ("accept=application/dicom+json&PatientID=A-1", "1"),
    ],
)
def test_studies(clinic: Door, query: str, found: str) -> None:
    """Matching of studies: names, wildcards, ranges, lists, percent-encoding, paging."""
    assert uids(clinic.get(f"/studies?{query}")) == found.split()


@pytest.mark.parametrize(
    ("path", "tag", "found"),
    [
        ("/studies/2.25.1/series", "0020000E", "1.1 1.2"),
        ("/studies/2.25.9/series", "0020000E", ""),
        ("/studies/2.25.1/series?Modality=DMS", "0020000E", "1.2"),
        ("/studies/2.25.1/series?00080060=DMS", "0020000E", "1.2"),
        ("/studies/2.25.1/series?SeriesNumber=02", "0020000E", "1.2"),
        ("/studies/2.25.1/series?StudyInstanceUID=2.25.1", "0020000E", "1.1 1.2"),
        ("/studies/2.25.1/series?StudyInstanceUID=2.25.2", "0020000E", ""),
        ("/series?PatientID=A-1", "0020000E", "1.2 1.1"),  # across studies what was filed last comes first
        ("/series?ModalitiesInStudy=DMS", "0020000E", "1.2 1.1"),
        ("/series?BodyPartExamined=arm", "0020000E", ""),
        ("/series?BodyPartExamined=ARM", "0020000E", "1.1"),
        ("/studies/2.25.1/instances", "00080018", "1.1.1 1.1.2 1.2.1"),
        ("/studies/2.25.1/series/2.25.1.1/instances", "00080018", "1.1.1 1.1.2"),
        ("/studies/2.25.2/series/2.25.1.1/instances", "00080018", ""),
        (f"/instances?SOPClassUID={DERMOSCOPIC}", "00080018", "1.2.1"),
        ("/instances?SOPInstanceUID=2.25.1.1.2", "00080018", "1.1.2"),
        ("/instances?Rows=2&limit=2", "00080018", "3.1.1 2.1.1"),
        ("/instances?InstanceNumber=2", "00080018", "1.1.2"),
    ],
)
def test_series_and_instances(clinic: Door, path: str, tag: str, found: str) -> None:
    """The other five resources, with keys of their own level and of those above."""
    assert uids(clinic.get(path), tag) == found.split()


STUDY = (
    "00080020 00080030 00080050 00080056 00080061 00080090 00081190 00100010 00100020 00100030 00100040 0020000D 00200010 00201206 00201208"
)
SERIES = "00080060 0008103E 00081190 0020000E 00200011 00201209 00400244 00400245 00400275"
INSTANCE = "00080016 00080018 00080056 00081190 00200013 00280010 00280011 00280100"


@pytest.mark.parametrize(
    ("path", "tags"),
    [
        ("/studies", STUDY),
        ("/studies/2.25.1/series", SERIES + " 0020000D"),
        ("/series", f"{STUDY} {SERIES}"),
        ("/studies/2.25.1/series/2.25.1.1/instances", INSTANCE + " 0020000D 0020000E"),
        ("/studies/2.25.1/instances", f"{INSTANCE} {SERIES} 0020000D"),
        ("/instances", f"{STUDY} {SERIES} {INSTANCE}"),
    ],
)
def test_what_is_always_returned(clinic: Door, path: str, tags: str) -> None:
    """Every attribute that the standard wants is in every result, empty where not known, each with its VR."""
    for match in clinic.get(path).json:
        assert set(tags.split()) <= set(match)
        assert all(set(entry) <= {"vr", "Value"} for entry in match.values())


def test_one_study_in_full(clinic: Door) -> None:
    """Numbers are numbers, names are objects of three groups, computed attributes and the Retrieve URL are there."""
    (anna,) = clinic.get("/studies?PatientID=A-1").json
    assert anna["00080005"] == {"vr": "CS", "Value": ["ISO_IR 192"]}
    assert anna["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "Müller^Anna"}]}
    assert anna["00080061"] == {"vr": "CS", "Value": ["DMS", "XC"]}
    assert anna["00201206"] == {"vr": "IS", "Value": [2]}
    assert anna["00201208"] == {"vr": "IS", "Value": [3]}
    assert anna["00080056"] == {"vr": "CS", "Value": ["ONLINE"]}
    assert anna["00100040"] == {"vr": "CS"}
    assert anna["00081030"]["Value"] == ["Skin, left arm"]
    assert anna["00081190"] == {"vr": "UR", "Value": [f"{clinic.base}/studies/2.25.1"]}
    (taro,) = clinic.get("/studies?PatientID=T*").json
    assert taro["00100010"]["Value"] == [{"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"}]
    (nobody,) = clinic.get("/studies?PatientID=N-1").json
    assert nobody["00100010"] == {"vr": "PN"}
    assert "00080005" not in nobody
    first = clinic.get("/instances?SOPInstanceUID=2.25.1.1.1").json[0]
    assert first["00280010"] == {"vr": "US", "Value": [2]}
    assert first["00200011"] == {"vr": "IS", "Value": [1]}
    assert clinic.get(first["00081190"]["Value"][0]).status == 200
    series = clinic.get("/studies/2.25.1/series").json[0]
    assert series["00081190"]["Value"] == [f"{clinic.base}/studies/2.25.1/series/2.25.1.1"]


@pytest.mark.parametrize(
    ("spelling", "present"),
    [
        ("includefield=StudyDescription", True),
        ("includefield=00081030", True),
        ("includefield=all", True),
        ("includefield=ALL", True),
        ("includefield=00080060,00081030", True),
        ("includefield=00080060%2C00081030", True),
        ("includefield=Modality&includefield=StudyDescription", True),
        ("includefield=", False),
        ("includefield=ContentCreatorName", False),
        ("includefield=00091001", False),
        ("includefield=RequestAttributesSequence.ScheduledProcedureStepID", False),
    ],
)
def test_include_field(clinic: Door, spelling: str, present: bool) -> None:
    """Every spelling of includefield adds what it names, as an empty attribute where the study has none; the unknown ones do no harm."""
    answer = clinic.get(f"/studies?PatientID=N-1&{spelling}")
    assert answer.status == 200
    if "all" not in spelling.lower():
        assert (answer.json[0].get("00081030") == {"vr": "LO"}) == present
    full = clinic.get("/studies/2.25.1/series/2.25.1.1/instances?SOPInstanceUID=2.25.1.1.1&" + spelling).json[0]
    assert ("00081030" in full) == present


def test_warnings(doors: Doors, clinic: Door) -> None:
    """Fuzzy matching and a cut answer are warned of by 299, with the number left; a whole answer is not."""
    fuzzy = clinic.get("/studies?fuzzymatching=true")
    assert fuzzy.headers["warning"].startswith("299 ")
    assert "fuzzymatching" in fuzzy.headers["warning"]
    assert "warning" not in clinic.get("/studies?fuzzymatching=false").headers
    assert "warning" not in clinic.get("/studies?limit=3").headers
    assert "There are 2 additional results" in clinic.get("/studies?limit=1").headers["warning"]
    assert "There are 1 additional results" in clinic.get("/studies?limit=1&offset=1").headers["warning"]
    with Door(clinic.house, limits=WebLimits(results=2)) as small:
        for limit in ("", "limit=1000000000", "limit=2"):
            answer = small.get(f"/studies?{limit}")
            assert uids(answer) == ["2", "1"]
            assert "There are 1 additional" in answer.headers["warning"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=-1", "limit=x", "limit=", "limit=1.5", "limit=1e3", "limit=%D9%A1", "offset=-1", "offset=x", "limit=" + "9" * 30,
        "NoSuchThing=1", "0010001=x", "00091001=x", "FFFFFFFF=1", "PatientName%00=x", "PatientName=%00", "PatientName=%FF",
        "RequestAttributesSequence.ScheduledProcedureStepID=1", "StudyDate=yesterday", "StudyDate=2024*", "StudyDate=1-2-3",
        "PatientName=a&PatientName=b", "Modality=XC", "SeriesInstanceUID=1.2", "InstanceNumber=1", "PixelData=1", "fuzzymatching=maybe",
        "NumberOfStudyRelatedSeries=1", "includefield=nonsense", "%=1",
        "&".join(f"StudyInstanceUID=1.{number}" for number in range(300)),
    ],
)  # fmt: skip
def test_bad_queries(clinic: Door, query: str) -> None:
    """What cannot be read or cannot be searched by is 400 with the reason; never everything, never 500."""
    answer = clinic.get(f"/studies?{query}")
    assert answer.status == 400, answer.body
    assert answer.problem["detail"]


@pytest.mark.parametrize(("accept", "status", "content_type"), [
    ("", 200, "application/dicom+json"), ("*/*", 200, "application/dicom+json"), ("application/json", 200, "application/json"),
    ("application/dicom+json", 200, "application/dicom+json"), ("application/dicom+xml", 406, ""), ("text/html", 406, ""),
    ('multipart/related; type="application/dicom+xml"', 406, ""), ("a", 400, ""),
    ("application/dicom+json, multipart/related; type=application/octet-stream", 200, "application/dicom+json"),
])  # fmt: skip
def test_answer_types(clinic: Door, accept: str, status: int, content_type: str) -> None:
    """JSON in either name; XML is 406 and never answered with JSON."""
    answer = clinic.request("GET", "/studies", headers={"Accept": accept} if accept else {})
    assert answer.status == status
    if status == 200:
        assert answer.headers["content-type"] == content_type
    else:
        assert answer.problem["detail"]


def test_none_found_is_an_empty_list(clinic: Door) -> None:
    """No match is 200 with an empty list, for an unknown study in the path too."""
    for path in ("/studies?PatientID=nobody", "/studies/2.25.999/series", "/instances?SOPInstanceUID=2.25.999"):
        answer = clinic.get(path)
        assert (answer.status, answer.body) == (200, b"[]")


def test_stored_is_found_at_once(clinic: Door) -> None:
    """What STOW-RS answered with success is in the very next search."""
    for number in range(5):
        study = f"2.25.77{number}"
        assert clinic.store(instance(study, 1, 1, PatientID="AT-ONCE", StudyDate="19990101")).status == 200
        assert uids(clinic.get(f"/studies?StudyInstanceUID={study}")) == [f"77{number}"]


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_parameter_is_read_or_refused(name: str, value: str) -> None:
    """Whatever the name and value, the parser gives keys or a 400."""
    for raw in ((name, value), (urllib.parse.quote(name), urllib.parse.quote(value)), ("includefield", value), ("limit", value)):
        try:
            parse_parameters([raw], maximum=10)
        except BadRequest as error:
            assert error.detail  # noqa: PT017
