"""Orthanc sends an ISIC picture, the node sends its reports back to that Orthanc; with the folder store and with S3."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import highdicom
import pydicom
import pytest

from tests.conftest import S3_KEY, S3_SECRET
from tests.interop.orthanc import Orthanc, program, running_orthanc
from tests.ports import free_port
from tests.system.running_node import RunningNode, analysed, get, running_node

pytestmark = [pytest.mark.peer, pytest.mark.shared]

SR, SEG = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.66.4"


@pytest.fixture
def isic_picture(shared: Path) -> Path:
    """A dermoscopic picture with a clear lesion."""
    return sorted((shared / "data" / "derm" / "isic2018" / "images").iterdir())[5]


def wrapped(node: RunningNode, picture: Path, folder: Path) -> Path:
    """Make a DICOM file of the picture with the node's own command."""
    arguments = ["send", str(picture), "--save-only", "--output", str(folder), "--modality", "dermoscopic", "--patient-id", "P-1"]
    return Path(node.command(*arguments, "--patient-name", "Muster^Maria", "--body-site", "back", "--laterality", "left").stdout.strip())


def await_instances(orthanc: Orthanc, sop_class_uid: str, count: int) -> list[str]:
    """Wait for ``count`` instances of a class."""
    deadline = time.monotonic() + 90
    while len(found := orthanc.instances(sop_class_uid)) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} arrived"
        time.sleep(0.3)
    return found


def judge(path: Path) -> None:
    """dciodvfy: no error; dsrdump reads what is an SR."""
    done = subprocess.run([program("dciodvfy"), "-new", str(path)], capture_output=True, text=True, check=False)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
    assert not errors, errors
    if pydicom.dcmread(path, stop_before_pixels=True).SOPClassUID == SR:
        dumped = subprocess.run([program("dsrdump"), "-Er", str(path)], capture_output=True, text=True, check=False)
        assert dumped.returncode == 0, dumped.stderr
        assert "E:" not in dumped.stderr
        assert "Imaging Measurement Report" in dumped.stdout


@contextmanager
def round_trip(tmp_path: Path, isic_picture: Path, node_environ: dict[str, str]) -> Iterator[RunningNode]:
    """Walk the whole way and give the node, still running."""
    orthanc_port = free_port()
    toml = f'[[peers]]\nname = "orthanc"\nae_title = "ORTHANC"\nhost = "127.0.0.1"\nport = {orthanc_port}\n'
    with running_node(tmp_path / "node", toml=toml, environ=node_environ) as node:
        walk(node, orthanc_port, tmp_path, isic_picture)
        yield node


def walk(node: RunningNode, orthanc_port: int, tmp_path: Path, isic_picture: Path) -> None:
    """Orthanc to node to Orthanc; every object that comes back is judged."""
    modalities = {"node": ("DERM_NODE", node.dimse_port)}
    with running_orthanc(tmp_path / "orthanc", ae_title="ORTHANC", modalities=modalities, dicom_port=orthanc_port) as orthanc:
        file = wrapped(node, isic_picture, tmp_path)
        source = pydicom.dcmread(file)
        identifier = orthanc.upload(file.read_bytes())
        assert orthanc.send("node", identifier)["FailedInstancesCount"] == 0
        reports = await_instances(orthanc, SR, 2)
        (mask,) = await_instances(orthanc, SEG, 1)
        groups = 0
        for number, one in enumerate([*reports, mask]):
            path = tmp_path / f"back-{number}.dcm"
            path.write_bytes(orthanc.raw(f"/instances/{one}/file"))
            data_set = pydicom.dcmread(path)
            assert data_set.StudyInstanceUID == source.StudyInstanceUID
            assert str(data_set.PatientName) == "Muster^Maria"
            judge(path)
            if data_set.SOPClassUID == SR:
                report = highdicom.sr.srread(path)
                content = report.content
                groups += len(content.get_image_measurement_groups()) + len(content.get_planar_roi_measurement_groups())
        assert groups >= 8  # quality, domain, three categories, malignancy, referral; and at least one lesion
        found = node.await_trace(
            str(source.SOPInstanceUID),
            lambda told: (
                analysed(told)
                and all(delivery["state"] == "done" for report in told["instances"][0]["reports"] for delivery in report["deliveries"])
            ),
        )
        (instance,) = found["instances"]
        assert instance["received"]["peer"] == "orthanc"
        assert [len(report["deliveries"]) for report in instance["reports"]] == [1, 1, 1]
        # Our own reports, sent back to us by mistake, are known and not analysed.
        assert orthanc.send("node", reports[0])["FailedInstancesCount"] == 0
        assert len(node.trace(str(source.SOPInstanceUID))["instances"][0]["reports"]) == 3
    assert "Traceback" not in node.log_text()


def test_orthanc_round_trip(tmp_path: Path, isic_picture: Path) -> None:
    """SR and SEG come back into the same study; validators and highdicom accept them."""
    with round_trip(tmp_path, isic_picture, {}) as node:
        assert node.stop() == 0


def test_orthanc_round_trip_on_s3(tmp_path: Path, isic_picture: Path, s3_bucket: Callable[[], tuple[str, str, Path]]) -> None:
    """The same with S3: objects in the bucket are sealed, nothing lies in the node's folder, and a fresh start serves them back."""
    endpoint, bucket, folder = s3_bucket()
    environ = {
        "AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET, "AWS_EC2_METADATA_DISABLED": "true",
        "DICOM_NODE_ARCHIVE__STORE": "s3", "DICOM_NODE_ARCHIVE__ACKNOWLEDGE": "archive", "DICOM_NODE_ARCHIVE__BUCKET": bucket,
        "DICOM_NODE_ARCHIVE__ENDPOINT_URL": endpoint, "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
    }  # fmt: skip
    with round_trip(tmp_path, isic_picture, environ) as node:
        assert node.stop() == 0
        served_from_the_bucket(node, folder)


def served_from_the_bucket(node: RunningNode, folder: Path) -> None:
    """Look at the bucket of a stopped node, and at what the node serves from it after a start without local files."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    documents = [path for path in found if "keys" in path.relative_to(folder).parts]
    assert (len(found) - len(documents), len(documents)) == (4, 1)  # the picture, two SR, one SEG; the study's key, wrapped
    for path in found:
        content = path.read_bytes()
        assert b"Muster" not in content
        assert b"2.25." not in content
    assert not [path for path in (node.data_dir / "landing").rglob("*") if path.is_file() and path.stat().st_size]
    for local in ("landing", "cache", "landed"):
        shutil.rmtree(node.data_dir / local)
    node.start()
    status, body = get(f"{node.base_url}/studies", "application/dicom+json")
    assert status == 200
    (study,) = json.loads(body)
    uid = study["0020000D"]["Value"][0]
    status, body = get(f"{node.base_url}/studies/{uid}/instances", "application/dicom+json")
    instances = json.loads(body)
    assert len(instances) == 4
    for instance in instances:
        url = f"{node.base_url}/studies/{uid}/series/{instance['0020000E']['Value'][0]}/instances/{instance['00080018']['Value'][0]}"
        request = urllib.request.Request(url, headers={"Accept": "application/dicom; transfer-syntax=*"})
        with urllib.request.urlopen(request, timeout=30) as response:
            assert pydicom.dcmread(BytesIO(response.read())).SOPInstanceUID == instance["00080018"]["Value"][0]


def test_storescu_with_a_wrapped_photograph(tmp_path: Path, isic_picture: Path) -> None:
    """The README's words: a photograph made by `send --save-only`, sent by DCMTK's storescu, Success, analysed."""
    with running_node(tmp_path / "node") as node:
        file = wrapped(node, isic_picture, tmp_path)
        command = [program("storescu"), "-v", "-R", "-xy", "-aec", "DERM_NODE", "127.0.0.1", str(node.dimse_port), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Success" in done.stdout + done.stderr
        node.await_trace(str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID), analysed)
