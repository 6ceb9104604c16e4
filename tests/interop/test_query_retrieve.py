"""DCMTK's findscu, movescu and getscu, and Orthanc, ask the node and are given what they ask for."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from dicom_node.dimse.query import QuerySCP
from dicom_node.dimse.retrieve import RetrieveSCP
from dicom_node.dimse.scu import StorageSCU
from dicom_node.peers import Peer, Peers
from tests.dicom_node.door import Door, Rooms, draw, open_door, open_rooms
from tests.dicom_node.test_query import file
from tests.dicom_node.test_retrieve import archive, compressed
from tests.interop.orthanc import Orthanc, running_orthanc
from tests.ports import free_port
from tests.storage.support import instance

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning")]  # of pydicom, about what we draw


@dataclass
class Site:
    """A node that is asked, and what lies in it."""

    door: Door
    move_port: int
    pictures: list[Dataset]
    coloured: Dataset

    @property
    def study(self) -> str:
        """The study of the uncompressed pictures."""
        return str(self.pictures[0].StudyInstanceUID)

    @property
    def series(self) -> str:
        """Their series."""
        return str(self.pictures[0].SeriesInstanceUID)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing; install DCMTK (apt install dcmtk)")
    return path


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One archive for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    yield rooms
    rooms.database.close()


@pytest.fixture(scope="module")
def orthanc_port() -> int:
    """Where Orthanc will listen."""
    return free_port()


@pytest.fixture(scope="module")
def site(rooms: Rooms, orthanc_port: int) -> Iterator[Site]:
    """Three pictures of one patient, one compressed of another, and many studies that are rows alone."""
    pictures = [draw(rows=64, columns=64, seed=number) for number in range(3)]
    for number, picture in enumerate(pictures, start=1):
        picture.StudyInstanceUID, picture.SeriesInstanceUID = pictures[0].StudyInstanceUID, pictures[0].SeriesInstanceUID
        picture.PatientName, picture.SpecificCharacterSet = "Müller^Jörg", "ISO_IR 192"
        picture.PatientID, picture.StudyDate, picture.StudyTime = "interop-1", "20240115", "103000"
        picture.AccessionNumber, picture.StudyDescription, picture.Modality = "ACC-1", "Skin of the back", "XC"
        picture.InstanceNumber = str(number)
        archive(rooms, picture, (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)[number - 1])
    coloured, _ = compressed(RLELossless)
    coloured.PatientID, coloured.StudyDate = "interop-2", "20231224"
    archive(rooms, coloured, RLELossless)
    many = {"PatientID": "many", "PatientName": "Many^Studies", "StudyDate": "20200101"}
    file(rooms, [instance(many, study=f"1.9.{number}", uid=f"1.9.{number}.1.1") for number in range(3000)])
    move_port = free_port()
    peers = Peers(
        [
            Peer("mover", "MOVER", "127.0.0.1", move_port),
            Peer("orthanc", "ORTHANC", "127.0.0.1", orthanc_port),
            Peer("away", "AWAY", "127.0.0.1", free_port()),
        ]
    )
    services = (
        QuerySCP(database=rooms.database, audit=rooms.audit, ae_title="DERM_NODE", unknown_peers=True),
        RetrieveSCP(
            database=rooms.database,
            archive=rooms.archive,
            audit=rooms.audit,
            peers=peers,
            sender=StorageSCU(ae_title="DERM_NODE"),
            unknown_peers=True,
        ),
    )
    with open_door(rooms, services=services) as door:
        yield Site(door, move_port, pictures, coloured)


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a DCMTK program to its end."""
    return subprocess.run([_tool(name), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def find(site: Site, folder: Path, *arguments: object) -> tuple[str, list[Dataset]]:
    """Run findscu; what it said, and the responses."""
    done = run("findscu", "-v", "-X", "-od", folder, "-aec", "DERM_NODE", "127.0.0.1", site.door.port, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, [pydicom.dcmread(path, force=True) for path in sorted(folder.glob("rsp*.dcm"))]


def keys(*pairs: str) -> list[str]:
    """-k for each key."""
    return [argument for pair in pairs for argument in ("-k", pair)]


# -- findscu -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matching", "count"),
    [
        ("PatientName=Many*", 3000),
        ("PatientID=interop-1", 1),
        ("PatientID=interop-?", 2),
        ("StudyDate=20240101-20240131", 1),
        ("StudyDate=20231201-", 2),
        ("StudyDate=-20200101", 3000),
        ("StudyTime=1030", 1),
        ("AccessionNumber=ACC*", 1),
        ("StudyDescription=*of the*", 1),
        ("ModalitiesInStudy=OT", 1),
        ("StudyInstanceUID=1.9.1\\1.9.2\\1.9.2999\\1.8", 3),
        ("PatientName=Nobody", 0),
    ],
)
def test_findscu_matches(site: Site, tmp_path: Path, matching: str, count: int) -> None:
    """Wildcards, ranges, lists, modalities: findscu gets the studies that match, and Success."""
    said, answers = find(site, tmp_path, "-S", *keys("QueryRetrieveLevel=STUDY", "StudyInstanceUID", matching))
    assert len(answers) == count
    assert "Received Final Find Response (Success)" in said


@pytest.mark.parametrize("propose", ["-x=", "-xe", "-xi"])
@pytest.mark.parametrize("root", ["-P", "-S", "-O"])
def test_findscu_in_every_root_and_syntax(site: Site, tmp_path: Path, root: str, propose: str) -> None:
    """All three models, explicit and implicit: names in UTF-8, with the character set said."""
    wanted = keys("QueryRetrieveLevel=STUDY", "PatientID=interop-1", "StudyInstanceUID", "PatientName", "NumberOfStudyRelatedInstances")
    _, (answer,) = find(site, tmp_path, root, propose, *wanted)
    assert str(answer.PatientName) == "Müller^Jörg"
    assert answer.SpecificCharacterSet == "ISO_IR 192"
    assert (answer.RetrieveAETitle, answer.NumberOfStudyRelatedInstances) == ("DERM_NODE", 3)


@pytest.mark.parametrize(
    ("root", "level", "path", "count"),
    [
        ("-P", "PATIENT", (), 3),
        ("-P", "SERIES", ("PatientID=interop-1", "StudyInstanceUID={study}"), 1),
        ("-S", "SERIES", ("StudyInstanceUID={study}",), 1),
        ("-S", "IMAGE", ("StudyInstanceUID={study}", "SeriesInstanceUID={series}"), 3),
        ("-P", "IMAGE", ("PatientID=interop-1", "StudyInstanceUID={study}", "SeriesInstanceUID={series}"), 3),
    ],
)
def test_findscu_at_every_level(site: Site, tmp_path: Path, root: str, level: str, path: tuple[str, ...], count: int) -> None:
    """Down the hierarchy with the unique keys of the levels above."""
    unique = {"PATIENT": "PatientID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}[level]
    above = [pair.format(study=site.study, series=site.series) for pair in path]
    _, answers = find(site, tmp_path, root, *keys(f"QueryRetrieveLevel={level}", unique, *above))
    assert len({answer[unique].value for answer in answers}) == len(answers) == count


def test_findscu_is_told_what_is_wrong(site: Site, tmp_path: Path) -> None:
    """A level without the unique key above it: A900 by its name, with our comment."""
    said, answers = find(site, tmp_path, "-d", "-S", *keys("QueryRetrieveLevel=SERIES", "SeriesInstanceUID"))
    assert answers == []
    assert "DataSetDoesNotMatchSOPClass" in said.replace(" ", "") or "0xa900" in said.lower(), said
    assert "StudyInstanceUID is missing" in said


def test_findscu_is_told_of_optional_keys(site: Site, tmp_path: Path) -> None:
    """Keys that are not supported: the warning status, and an empty sequence."""
    said, (answer,) = find(
        site,
        tmp_path,
        "-S",
        *keys("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={site.study}", "ReferencedStudySequence", "PatientWeight"),
    )
    assert "WarningUnsupportedOptionalKeys" in said.replace(" ", "") or "ff01" in said.lower(), said
    assert len(answer.ReferencedStudySequence) == 0
    assert "PatientWeight" not in answer


def test_findscu_cancels(site: Site, tmp_path: Path) -> None:
    """``--cancel``: matching is terminated long before its 3000 answers."""
    said, answers = find(site, tmp_path, "-S", "--cancel", 5, *keys("QueryRetrieveLevel=STUDY", "StudyInstanceUID", "PatientID=many"))
    assert len(answers) < 3000
    assert "Cancel" in said
    assert run("echoscu", "-aec", "DERM_NODE", "127.0.0.1", site.door.port).returncode == 0


# -- getscu ------------------------------------------------------------------------------------------------------------------------


def received(folder: Path) -> dict[str, Dataset]:
    """SOP Instance UID -> data set of the files in a folder."""
    found = [pydicom.dcmread(path) for path in folder.iterdir() if path.is_file()]
    return {str(one.SOPInstanceUID): one for one in found}


def get(site: Site, folder: Path, *arguments: object) -> tuple[str, dict[str, Dataset]]:
    """Run getscu; what it said, and what it wrote."""
    done = run("getscu", "-v", "-od", folder, "-aec", "DERM_NODE", "127.0.0.1", site.door.port, *arguments)
    return done.stdout + done.stderr, received(folder)


def same(one: Dataset, other: Dataset) -> bool:
    """Whether two uncompressed pictures hold the same values."""
    return one.pixel_array.tobytes() == other.pixel_array.tobytes() and one.PatientName == other.PatientName


@pytest.mark.parametrize("syntax", ["+x=", "+xe", "+xr", "+xv"])
def test_getscu_retrieves_a_study(site: Site, tmp_path: Path, syntax: str) -> None:
    """All instances of the study, whatever they are stored in and whatever getscu would rather have compressed."""
    said, found = get(site, tmp_path, "-S", syntax, *keys("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={site.study}"))
    assert set(found) == {picture.SOPInstanceUID for picture in site.pictures}, said
    assert {one.file_meta.TransferSyntaxUID for one in found.values()} == {ExplicitVRLittleEndian}
    assert {str(one.PatientName) for one in found.values()} == {"Müller^Jörg"}


def test_getscu_retrieves_a_series_and_an_instance(site: Site, tmp_path: Path) -> None:
    """At the levels below, in both roots."""
    (tmp_path / "series").mkdir()
    (tmp_path / "image").mkdir()
    path = (f"StudyInstanceUID={site.study}", f"SeriesInstanceUID={site.series}")
    _, found = get(site, tmp_path / "series", "-P", *keys("QueryRetrieveLevel=SERIES", "PatientID=interop-1", *path))
    assert len(found) == 3
    wanted = site.pictures[1].SOPInstanceUID
    _, found = get(site, tmp_path / "image", "-S", *keys("QueryRetrieveLevel=IMAGE", *path, f"SOPInstanceUID={wanted}"))
    assert set(found) == {wanted}


def test_getscu_gets_compressed_pixels_decoded(site: Site, tmp_path: Path) -> None:
    """To who takes no RLE the picture goes in plain, and DCMTK reads it."""
    _, found = get(site, tmp_path, "-S", *keys("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={site.coloured.StudyInstanceUID}"))
    (one,) = found.values()
    site.coloured.file_meta.TransferSyntaxUID = RLELossless
    assert one.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert one.PhotometricInterpretation == "RGB"
    assert one.pixel_array.tobytes() == site.coloured.pixel_array.tobytes()
    (path,) = tmp_path.iterdir()
    assert run("dcmdump", path).returncode == 0


def test_getscu_of_nothing(site: Site, tmp_path: Path) -> None:
    """An unknown study: Success, no file."""
    said, found = get(site, tmp_path, "-S", *keys("QueryRetrieveLevel=STUDY", "StudyInstanceUID=1.2.3.4.5"))
    assert found == {}
    assert "Success" in said, said


# -- movescu -----------------------------------------------------------------------------------------------------------------------


def move(site: Site, folder: Path, *arguments: object, to: str = "MOVER") -> tuple[subprocess.CompletedProcess[str], dict[str, Dataset]]:
    """Run movescu, which receives on a port of its own; how it ended, and what it wrote."""
    done = run(
        "movescu", "-v", "-od", folder, "-aet", "MOVER", "-aem", to, "-aec", "DERM_NODE", "--port", site.move_port, "127.0.0.1",
        site.door.port, *arguments,
    )  # fmt: skip
    return done, received(folder)


@pytest.mark.parametrize("root", ["-P", "-S", "-O"])
def test_movescu_retrieves_a_study(site: Site, tmp_path: Path, root: str) -> None:
    """All instances reach movescu's own receiver, in all three models."""
    path = keys("QueryRetrieveLevel=STUDY", "PatientID=interop-1", f"StudyInstanceUID={site.study}")
    done, found = move(site, tmp_path, root, *path)
    assert done.returncode == 0, done.stderr
    assert set(found) == {picture.SOPInstanceUID for picture in site.pictures}
    assert "Received Final Move Response (Success)" in done.stdout + done.stderr


@pytest.mark.parametrize("syntax", ["+xi", "+xa"])
def test_movescu_transcodes_only_where_it_must(site: Site, tmp_path: Path, syntax: str) -> None:
    """A receiver of Implicit VR alone gets that; one that takes all gets what is stored."""
    path = keys("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={site.coloured.StudyInstanceUID}")
    done, found = move(site, tmp_path, "-S", syntax, *path)
    assert done.returncode == 0, done.stderr
    (one,) = found.values()
    assert one.file_meta.TransferSyntaxUID == (ImplicitVRLittleEndian if syntax == "+xi" else RLELossless)


def test_movescu_to_an_unknown_destination(site: Site, tmp_path: Path) -> None:
    """A801 by its name; nothing arrives."""
    path = keys("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={site.study}")
    done, found = move(site, tmp_path, "-S", *path, to="NOBODY")
    assert "MoveDestinationUnknown" in (done.stdout + done.stderr).replace(" ", ""), done.stderr
    assert found == {}


def test_movescu_to_a_destination_that_is_away(site: Site, tmp_path: Path) -> None:
    """A702 by its name."""
    path = keys("QueryRetrieveLevel=STUDY", f"StudyInstanceUID={site.study}")
    done, _ = move(site, tmp_path, "-S", *path, to="AWAY")
    assert "OutOfResourcesSubOperations" in done.stdout + done.stderr, done.stderr


# -- Orthanc -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory, site: Site, orthanc_port: int) -> Iterator[Orthanc]:
    """An Orthanc that knows the node as a modality."""
    folder = tmp_path_factory.mktemp("orthanc")
    with running_orthanc(
        folder, ae_title="ORTHANC", modalities={"node": ("DERM_NODE", site.door.port)}, dicom_port=orthanc_port
    ) as orthanc:
        yield orthanc


def _asked(orthanc: Orthanc, level: str, **query: str) -> tuple[str, list[Any]]:
    """`POST /modalities/node/query`; its path, and the answers."""
    body = json.dumps({"Level": level, "Query": query}).encode()
    path = orthanc.call("/modalities/node/query", body)["Path"]
    return path, [orthanc.call(f"{path}/answers/{number}/content?simplify") for number in orthanc.call(f"{path}/answers")]


def test_orthanc_queries(site: Site, orthanc: Orthanc) -> None:
    """Orthanc finds the study by name, beyond ASCII, and its series below it."""
    _, (answer,) = _asked(orthanc, "Study", PatientName="MÜLLER*", StudyInstanceUID="", StudyDescription="")
    assert answer["StudyInstanceUID"] == site.study
    assert answer["PatientName"] == "Müller^Jörg"
    _, (series,) = _asked(orthanc, "Series", StudyInstanceUID=site.study, SeriesInstanceUID="", Modality="")
    assert (series["SeriesInstanceUID"], series["Modality"]) == (site.series, "XC")


def test_orthanc_retrieves(site: Site, orthanc: Orthanc) -> None:
    """C-MOVE of a study to Orthanc itself: all of it is there, once."""
    path, answers = _asked(orthanc, "Study", PatientID="interop-1", StudyInstanceUID="")
    assert len(answers) == 1
    orthanc.call(f"{path}/answers/0/retrieve", b"ORTHANC")
    deadline = time.monotonic() + 60
    while len(orthanc.instances()) < len(site.pictures):
        assert time.monotonic() < deadline, "the instances do not arrive"
        time.sleep(0.1)
    uids = {orthanc.call(f"/instances/{one}/simplified-tags")["SOPInstanceUID"] for one in orthanc.instances()}
    assert uids == {picture.SOPInstanceUID for picture in site.pictures}
