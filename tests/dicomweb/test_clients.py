"""Independent clients: dicomweb_client stores, searches and retrieves; the requests of a browser's viewer."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import gdcm
import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from dicomweb.negotiate import UNCOMPRESSED
from storage.errors import StorageError
from storage.part10 import Part10Parser
from storage.records import Limits
from storage.scan import DataSetScanner
from tests.dicomweb.door import ANY_SYNTAX, Door, file_of, multipart, path_of
from tests.storage.house import build
from tests.storage.samples import new_uid, photograph

IMPLICIT, EXPLICIT, DEFLATED, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
JPEG = "1.2.840.10008.1.2.4."
RLE = "1.2.840.10008.1.2.5"
PICTURE = np.add.outer(np.arange(48) * 3, np.arange(32) * 2).astype(np.uint8)
TRANSFER_SYNTAXES = [
    IMPLICIT,
    EXPLICIT,
    DEFLATED,
    BIG,
    *(JPEG + number for number in ("50", "51", "57", "70", "80", "81", "90", "91")),
    RLE,
]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of client libraries, about values that tests make odd on purpose, from being errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Recorded(DICOMwebClient):  # type: ignore[misc]
    """The client, remembering the bodies it got."""

    def __init__(self, url: str) -> None:
        self.session = requests.Session()
        self.bodies: list[tuple[str, bytes]] = []
        self.session.hooks["response"].append(
            lambda response, **_: self.bodies.append((response.headers.get("Content-Type", ""), response.content))
        )
        super().__init__(url, session=self.session)

    def close(self) -> None:
        """Close the connections."""
        self.session.close()


@pytest.fixture
def client(door: Door) -> Iterator[Recorded]:
    """A client of the door."""
    made = Recorded(door.base)
    yield made
    made.close()


def native() -> pydicom.Dataset:
    """Draw an image instance, uncompressed."""
    data = pydicom.Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.77.1.4", new_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = new_uid(), new_uid()
    data.PatientName, data.PatientID, data.Modality, data.StudyDate = "Strauß^Ä=山田", "CLIENT", "XC", "20240101"
    data.InstanceNumber, data.SamplesPerPixel, data.PhotometricInterpretation = 1, 1, "MONOCHROME2"
    data.Rows, data.Columns = PICTURE.shape
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "T-01000", "SRT", "Skin"
    data.AnatomicRegionSequence = [item]
    data.PixelData = PICTURE.tobytes()
    data["PixelData"].VR = "OB"
    return data


def encoded(transfer_syntax_uid: str, folder: Path) -> bytes:
    """Write the drawn instance as a file of a transfer syntax, with a real encoder."""
    data = native()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    if transfer_syntax_uid in {JPEG + "50", JPEG + "51"}:
        data.PixelData = encapsulate([cv2.imencode(".jpg", PICTURE)[1].tobytes()])
    elif transfer_syntax_uid in {JPEG + "57", JPEG + "70"}:
        return by_gdcm(written(data), transfer_syntax_uid, folder)
    elif transfer_syntax_uid not in UNCOMPRESSED:
        options = {JPEG + "81": {"jls_error": 2}, JPEG + "91": {"j2k_cr": [4]}}.get(transfer_syntax_uid, {})
        data.compress(UID(transfer_syntax_uid), generate_instance_uid=False, **options)
    data.file_meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    return written(data)


def written(data: pydicom.Dataset) -> bytes:
    """Write a file as dicomweb_client does."""
    buffer = io.BytesIO()
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    syntax = data.file_meta.TransferSyntaxUID
    if "PixelData" in data and syntax.is_compressed and str(syntax) not in UNCOMPRESSED:
        data["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    return buffer.getvalue()


def by_gdcm(file: bytes, transfer_syntax_uid: str, folder: Path) -> bytes:
    """Compress with GDCM, which has an encoder of lossless JPEG and works on files only."""
    source, target = folder / "source.dcm", folder / "target.dcm"
    source.write_bytes(file)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    kind = gdcm.TransferSyntax.JPEGLosslessProcess14 if transfer_syntax_uid.endswith("57") else gdcm.TransferSyntax.JPEGLosslessProcess14_1
    change.SetTransferSyntax(gdcm.TransferSyntax(kind))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target.read_bytes()


def data_set_of(file: bytes) -> tuple[str, bytes]:
    """Transfer syntax and data set of a file, divided by the archive's own parser."""
    parser = Part10Parser()
    data = b"".join(bytes(piece) for piece in parser.feed(file))
    parser.finish()
    return parser.transfer_syntax_uid or "", data


def stored_and_retrieved(door: Door, client: Recorded, file: bytes) -> pydicom.Dataset:
    """Store a file with the client, retrieve it with the client; the bytes of the data set must be those that were sent."""
    with quiet():
        data = pydicom.dcmread(io.BytesIO(file))
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, data)  # what store_instances sends
        transfer_syntax_uid, sent = data_set_of(buffer.getvalue())
        answer = client.store_instances([data])
        assert [str(item.ReferencedSOPInstanceUID) for item in answer.ReferencedSOPSequence] == [str(data.SOPInstanceUID)]
        client.bodies.clear()
        got = client.retrieve_instance(data.StudyInstanceUID, data.SeriesInstanceUID, data.SOPInstanceUID)
    assert str(got.file_meta.TransferSyntaxUID) == transfer_syntax_uid
    content_type, body = client.bodies[-1]
    assert content_type.startswith("multipart/related")
    assert sent in body
    start = body.index(b"\r\n\r\n") + 4
    assert data_set_of(body[start : body.rindex(b"\r\n--", 0, -4)]) == (transfer_syntax_uid, sent)
    assert door.house.read(str(data.SOPInstanceUID)) == sent
    return got


@pytest.mark.parametrize("transfer_syntax_uid", TRANSFER_SYNTAXES)
def test_bytes_are_those_that_were_sent(door: Door, client: Recorded, transfer_syntax_uid: str, tmp_path: Path) -> None:
    """dicomweb_client stores and retrieves thirteen transfer syntaxes, each by a real encoder: the data set is equal byte for byte."""
    got = stored_and_retrieved(door, client, encoded(transfer_syntax_uid, tmp_path))
    with quiet():
        difference = np.abs(got.pixel_array.astype(int) - PICTURE)
    lossy = {JPEG + "50": 8, JPEG + "51": 8, JPEG + "81": 2, JPEG + "91": 16}
    assert difference.max() <= lossy.get(transfer_syntax_uid, 0)


def corpus(shared: Path) -> dict[str, list[bytes]]:
    """Files of the corpora that the archive takes, a few of each transfer syntax."""
    found: dict[str, list[bytes]] = {}
    for path in sorted((shared / "corpora").rglob("*")):
        if not path.is_file() or path.stat().st_size > 3_000_000:
            continue
        file = path.read_bytes()
        if file[128:132] != b"DICM":
            continue
        try:
            transfer_syntax_uid, data = data_set_of(file)
            scanner = DataSetScanner(transfer_syntax_uid, Limits())
            scanner.feed(data)
            scanner.finish()
        except StorageError:
            continue  # not taken by the archive; tests of storage look at these
        if len(found.setdefault(transfer_syntax_uid, [])) < 3:
            found[transfer_syntax_uid].append(file)
    return found


@pytest.mark.shared
def test_corpora_through_the_client(shared: Path, tmp_path: Path) -> None:
    """Files of many makers in every transfer syntax of the corpora: stored and retrieved bit-exact, metadata readable."""
    files = corpus(shared)
    assert set(TRANSFER_SYNTAXES) <= set(files)
    for transfer_syntax_uid in sorted(files):
        # Some files are the same instance in several syntaxes: each syntax gets an archive of its own.
        house = build(tmp_path / transfer_syntax_uid)
        with Door(house) as door:
            client, kept = Recorded(door.base), 0
            for file in files[transfer_syntax_uid]:
                answer = door.store(file)
                if answer.status == 409:  # a UID that another file of this syntax has too
                    assert answer.json["00081198"]["Value"][0]["00081197"]["Value"] == [0x0111]
                    continue
                assert answer.status == 200, answer.body
                kept += 1
                ((content_type, got),) = door.request(
                    "GET", answer.json["00081199"]["Value"][0]["00081190"]["Value"][0], headers=ANY_SYNTAX
                ).parts
                assert content_type.endswith(transfer_syntax_uid)
                assert data_set_of(got) == data_set_of(file)
                _, study, _, series, _, instance = answer.json["00081199"]["Value"][0]["00081190"]["Value"][0].rsplit("/", 5)
                with quiet():
                    client.retrieve_instance(study, series, instance)
                    pydicom.Dataset.from_json(
                        client.retrieve_instance_metadata(study, series, instance), bulk_data_uri_handler=lambda _: b""
                    )
            assert kept
            client.close()
        house.close()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["HTJ2KLossless_08_RGB.dcm", "HTJ2K_08_RGB.dcm"])
def test_htj2k_through_the_client(door: Door, client: Recorded, shared: Path, name: str) -> None:
    """High-Throughput JPEG 2000, for which no free encoder is at hand: a real picture under UIDs of our own comes back bit-exact."""
    with quiet():
        data = pydicom.dcmread(shared / "corpora" / "pydicom-data" / name)
        for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
            setattr(data, keyword, new_uid())
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        stored_and_retrieved(door, client, written(data))


def test_the_client_searches(door: Door, client: Recorded) -> None:
    """search_for_studies, _series and _instances of dicomweb_client find what it stored."""
    with quiet():
        data = pydicom.dcmread(io.BytesIO(encoded_native(client)))
        (study,) = client.search_for_studies(search_filters={"StudyInstanceUID": data.StudyInstanceUID}, fields=["StudyDescription"])
        assert study["00100010"]["Value"] == [{"Alphabetic": "Strauß^Ä", "Ideographic": "山田"}]
        (series,) = client.search_for_series(data.StudyInstanceUID, search_filters={"Modality": "XC"}, limit=5, offset=0)
        assert series["0020000E"]["Value"] == [data.SeriesInstanceUID]
        (one,) = client.search_for_instances(data.StudyInstanceUID, data.SeriesInstanceUID)
        assert one["00080018"]["Value"] == [data.SOPInstanceUID]
        assert client.search_for_studies(search_filters={"PatientID": new_uid()}) == []
    assert door.get("/studies?limit=1").status == 200


def encoded_native(client: Recorded) -> bytes:
    """Store the drawn instance and give its file."""
    data = native()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    file = written(data)
    client.store_instances([pydicom.dcmread(io.BytesIO(file))])
    return file


def test_the_client_retrieves(client: Recorded) -> None:
    """Study, series, metadata, frames and bulk data by dicomweb_client."""
    with quiet():
        data = pydicom.dcmread(io.BytesIO(encoded_native(client)))
        where = (data.StudyInstanceUID, data.SeriesInstanceUID, data.SOPInstanceUID)
        (one,) = client.retrieve_study(where[0])
        assert one.PixelData == data.PixelData
        (one,) = client.retrieve_series(*where[:2])
        assert one.AnatomicRegionSequence[0].CodeMeaning == "Skin"
        explicit = client.retrieve_instance(*where, media_types=(("application/dicom", EXPLICIT),))
        assert explicit == data
        metadata = client.retrieve_instance_metadata(*where)
        read = pydicom.Dataset.from_json(metadata, bulk_data_uri_handler=lambda uri: client.retrieve_bulkdata(uri)[0])
        assert bytes(read.PixelData) == data.PixelData  # pydicom gives it as a list of numbers
        del read.PixelData
        assert {element.tag: element.value for element in read} == {
            element.tag: element.value for element in data if element.keyword != "PixelData"
        }
        assert len(client.retrieve_series_metadata(*where[:2])) == len(client.retrieve_study_metadata(where[0])) == 1
        (frame,) = client.retrieve_instance_frames(*where, frame_numbers=[1])
        assert frame == data.PixelData
        (frame,) = client.retrieve_instance_frames(*where, frame_numbers=[1], media_types=("application/octet-stream",))
        assert frame == data.PixelData
        with pytest.raises(requests.HTTPError, match="404"):
            client.retrieve_instance(where[0], where[1], new_uid())


def test_the_client_is_told_of_failures(door: Door, client: Recorded) -> None:
    """dicomweb_client reads Failed SOP Sequence, reason and comment of a partly stored request."""
    good, bad = photograph(), photograph()
    with quiet():
        answer = client._http_post_multipart_application_dicom(f"{door.base}/studies", [file_of(good), file_of(bad)[:-9]])
        assert [str(item.ReferencedSOPInstanceUID) for item in answer.ReferencedSOPSequence] == [good.sop_instance_uid]
        (failed,) = answer.FailedSOPSequence
        assert failed.ReferencedSOPInstanceUID == bad.sop_instance_uid
        assert failed.FailureReason == 0xC000
        assert failed[0x00090010].value == "DICOM_NODE"
        assert "ends" in failed[0x00091001].value


def test_what_a_viewer_asks(door: Door) -> None:
    """The requests of OHIF, as it writes them, in its order: list, filter, open, metadata, pixels."""
    sample = photograph(name="Viewer^Vera", patient_id=new_uid())
    browser = {
        "Accept": "application/dicom+json, multipart/related; type=application/octet-stream",
        "Origin": f"http://127.0.0.1:{door.port}",
    }

    def ask(path: str, accept: str = "application/dicom+json") -> Any:
        answer = door.request("GET", path, headers=browser | {"Accept": accept})
        assert answer.status == 200, (path, answer.body)
        return answer

    upload = multipart([file_of(sample)], "0a1b-uuid")
    kind = 'multipart/related; type="application/dicom"; boundary="0a1b-uuid"'
    assert door.request("POST", "/studies", headers=browser | {"Content-Type": kind, "Accept": "*/*"}, body=upload).status == 200
    first = ask("/studies?limit=101&offset=0&fuzzymatching=true&includefield=00081030%2C00080060").json
    assert all(match["00080061"].get("Value") and match["00201208"].get("Value") for match in first)
    query = f"/studies?PatientName=*Vera*&00100020=*{sample_id(door, sample)}*&limit=101&offset=0&fuzzymatching=true&includefield=00081030%2C00080060"  # noqa: E501
    assert len(ask(query).json) == 1
    study, series = sample.study_instance_uid, sample.series_instance_uid
    assert len(ask(f"/studies?limit=101&offset=0&StudyInstanceUID={study}").json) == 1
    fields = "includefield=00080021%2C00080031%2C0008103E%2C00200011"
    assert ask(f"/studies/{study}/series?{fields}").json[0]["0020000E"]["Value"] == [series]
    (metadata,) = ask(f"/studies/{study}/series/{series}/metadata").json
    assert {"00280010", "00280011", "00280002", "00280004", "00280100", "00080016"} <= set(metadata)
    octets = "multipart/related; type=application/octet-stream; transfer-syntax=*"
    ((content_type, frame),) = ask(f"{path_of(sample)}/frames/1", octets).parts
    assert content_type == f"application/octet-stream; transfer-syntax={EXPLICIT}"
    assert sample.data_set.endswith(frame)


def sample_id(door: Door, sample: Any) -> str:
    """Patient ID of a sample, from the index."""
    return door.house.index.find(sample.sop_instance_uid).summary.attributes["PatientID"][0]
