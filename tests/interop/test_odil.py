"""odil's command line, a DICOM implementation of its own, as a user of the node: verification, storage, query, retrieve."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_node.dimse.query import QuerySCP
from dicom_node.dimse.retrieve import RetrieveSCP
from dicom_node.dimse.scu import StorageSCU
from dicom_node.peers import Peers
from tests.dicom_node.door import Door, draw, encoded, open_door, open_rooms, save

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A door with query and retrieve."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    services = (
        QuerySCP(database=rooms.database, audit=rooms.audit, ae_title="DERM_NODE", unknown_peers=True),
        RetrieveSCP(
            database=rooms.database,
            archive=rooms.archive,
            audit=rooms.audit,
            peers=Peers(),
            sender=StorageSCU(ae_title="DERM_NODE"),
            unknown_peers=True,
        ),
    )
    with open_door(rooms, services=services) as door:
        yield door
    rooms.database.close()


def odil(door: Door, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an odil command against the door."""
    path = shutil.which("odil")
    if path is None:
        pytest.fail("odil is missing; install it (apt install odil)")
    where = ["127.0.0.1", str(door.port), "ODIL", "DERM_NODE"]
    options = [str(one) for one in arguments if str(one).startswith("-d")]
    rest = [str(one) for one in arguments if not str(one).startswith("-d")]
    return subprocess.run([path, command, *options, *where, *rest], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def pictures(door: Door, tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Three pictures of one study, stored by odil in two transfer syntaxes."""
    folder = tmp_path_factory.mktemp("files")
    pictures = [draw(rows=40, columns=50, seed=number) for number in range(3)]
    files = []
    for number, picture in enumerate(pictures):
        picture.StudyInstanceUID, picture.SeriesInstanceUID = pictures[0].StudyInstanceUID, pictures[0].SeriesInstanceUID
        picture.PatientName, picture.PatientID, picture.StudyDate = "Odil^Anna", "odil-1", "20240229"
        files.append(folder / f"{number}.dcm")
        save(picture, files[-1], ImplicitVRLittleEndian if number == 1 else ExplicitVRLittleEndian)
    done = odil(door, "store", *files)
    assert done.returncode == 0, done.stderr
    return pictures


def test_odil_echoes(door: Door) -> None:
    """C-ECHO."""
    assert odil(door, "echo").returncode == 0


def test_odil_stores(door: Door, pictures: list[Dataset]) -> None:
    """C-STORE: each data set is archived as odil sent it."""
    for picture in pictures:
        with door.rooms.archive.open(picture.SOPInstanceUID) as stored:
            assert stored.record.summary.study_instance_uid == picture.StudyInstanceUID
            assert stored.record.summary.byte_count == sum(map(len, stored.chunks())) > len(encoded(picture)) // 2


@pytest.mark.parametrize(
    ("root", "keys", "count"),
    [
        ("study", ["QueryRetrieveLevel=STUDY", "PatientName=Odil*", "StudyInstanceUID"], 1),
        ("study", ["QueryRetrieveLevel=STUDY", "StudyDate=20240101-20241231", "PatientID=odil-1", "StudyInstanceUID"], 1),
        ("study", ["QueryRetrieveLevel=STUDY", "PatientID=nobody", "StudyInstanceUID"], 0),
        ("patient", ["QueryRetrieveLevel=PATIENT", "PatientID=odil-1", "PatientName"], 1),
        ("study", ["QueryRetrieveLevel=SERIES", "StudyInstanceUID={study}", "SeriesInstanceUID"], 1),
        ("study", ["QueryRetrieveLevel=IMAGE", "StudyInstanceUID={study}", "SeriesInstanceUID={series}", "SOPInstanceUID"], 3),
    ],
)
def test_odil_finds(door: Door, pictures: list[Dataset], root: str, keys: list[str], count: int) -> None:
    """C-FIND of both roots at every level."""
    uids = {"study": pictures[0].StudyInstanceUID, "series": pictures[0].SeriesInstanceUID}
    done = odil(door, "find", root, *(key.format(**uids) for key in keys))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0008,0052") == count, done.stdout


@pytest.mark.parametrize("root", ["study", "patient"])
def test_odil_gets(door: Door, pictures: list[Dataset], tmp_path: Path, root: str) -> None:
    """C-GET of a study: every instance, pixel for pixel."""
    patient = ["PatientID=odil-1"] if root == "patient" else []
    uid = pictures[0].StudyInstanceUID
    done = odil(door, "get", f"-d{tmp_path}", root, "QueryRetrieveLevel=STUDY", *patient, f"StudyInstanceUID={uid}")
    assert done.returncode == 0, done.stderr
    found = {data_set.SOPInstanceUID: data_set for path in tmp_path.rglob("*") if path.is_file() for data_set in [pydicom.dcmread(path)]}
    assert {one.SOPInstanceUID for one in pictures} == set(found)
    for one in pictures:
        assert found[one.SOPInstanceUID].PixelData == one.PixelData
