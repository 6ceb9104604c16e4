"""The whole node on S3, KMS and PostgreSQL, by both policies: the acceptance of the first issue again."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest

from dicom_node.photograph import PhotographOptions
from tests.interop.orthanc import program
from tests.system.pacs import Pacs, await_reports, drawn, quick_settings, send
from tests.system.running_node import RunningNode, analysed, get
from tests.system.services import Services, services

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Services]:
    """S3, KMS and PostgreSQL for all tests of this file; with ``--s3 radosgw`` over TLS."""
    chosen = str(request.config.getoption("s3"))
    with services(tmp_path_factory.mktemp("services"), s3=chosen, tls=chosen == "radosgw") as running:
        yield running


@pytest.fixture
def credentials(ground: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """For opening a node's archive in this process."""
    for name, value in ground.credentials.items():
        monkeypatch.setenv(name, value)


def objects(folder: Path) -> list[Path]:
    """Every file below a folder, but no document of the study keys."""
    return [path for path in folder.rglob("*") if path.is_file() and "keys" not in path.relative_to(folder).parts]


def retrieved(node: RunningNode, data_set: pydicom.Dataset) -> pydicom.Dataset:
    """Return an instance as WADO-RS gives it."""
    url = f"{node.base_url}/studies/{data_set.StudyInstanceUID}/series/{data_set.SeriesInstanceUID}/instances/{data_set.SOPInstanceUID}"
    status, body = get(url, "application/dicom; transfer-syntax=*")
    assert status == 200, body
    return pydicom.dcmread(BytesIO(body))


def await_store(node: RunningNode, uid: str) -> None:
    """Wait until nothing of an instance's lies in the node's own folder."""
    deadline = time.monotonic() + 60
    while objects(node.data_dir / "landed"):
        assert time.monotonic() < deadline, node.log_text()[-3000:]
        time.sleep(0.1)
    with node.parts() as parts:
        assert not parts.index.find(uid).landed_on


def storescu(node: RunningNode, path: Path) -> None:
    """Send by DCMTK's storescu; Success."""
    done = subprocess.run(
        [program("storescu"), "-v", "-R", "-xy", "-aec", "DERM_NODE", "127.0.0.1", str(node.dimse_port), str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def delivered(found: dict[str, Any]) -> bool:
    """Everything of a trace is analysed, and its reports are at their destination."""
    deliveries = [job for instance in found["instances"] for report in instance["reports"] for job in report["deliveries"]]
    return analysed(found) and bool(deliveries) and all(job["state"] == "done" for job in deliveries)


@pytest.mark.parametrize("policy", ["land", "archive"])
def test_in_analysed_out_and_back(ground: Services, bundles: str, pacs: Pacs, credentials: None, tmp_path: Path, policy: str) -> None:
    """By storescu and STOW-RS in, analysed, reports at the PACS, WADO-RS gives the same bytes.

    In between the machine fails: by `land` it comes back with its disk, by `archive` another takes its place with a copy of the ring.
    """
    environ = {**ground.new_archive(policy=policy), **quick_settings(bundles)}
    node = RunningNode(tmp_path / "node", toml=pacs.toml, environ=environ)
    node.command("keys", "init")
    ring = node.ring_file.read_bytes()
    assert {key["kind"] for key in json.loads(ring)["keys"].values()} == {"kms"}
    items = drawn(range(2), PhotographOptions(patient_id="P-4711", patient_name="Muster^Maria"))
    first, second = (tmp_path / f"{number}.dcm" for number in range(2))
    for path, item in zip((first, second), items, strict=True):
        path.write_bytes(b"".join(item.part10()))
    node.start()
    storescu(node, first)
    if policy == "archive":
        node.lose()
        node.take_ring(ring)
    else:
        node.kill_all()
    node.start()
    try:
        assert stowed(node, second) == "stored"
        await_reports(pacs, 2, node)
        for path, item in zip((first, second), items, strict=True):
            (instance,) = node.await_trace(item.sop_instance_uid, delivered)["instances"]
            (report,) = instance["reports"]
            assert report["sop_instance_uid"] in pacs.reports()
            await_store(node, item.sop_instance_uid)
            source = pydicom.dcmread(path)
            assert retrieved(node, source) == source
        storescu(node, first)  # again: a success that changes nothing
        assert len([name for name in ground.names(environ) if not name.startswith("keys/")]) == 4
        status, body = get(f"{node.base_url}/studies?PatientID=P-4711", "application/dicom+json")
        assert status == 200
        assert len(json.loads(body)) == 2
        assert "audit trail: whole" in node.command("verify").stdout
        assert len(pacs.reports()) == 2
        assert pacs.conflicts() == pacs.repeats() == 0
    finally:
        assert node.stop() == 0
    assert "Traceback" not in node.log_text()


def stowed(node: RunningNode, path: Path) -> str:
    """Send by STOW-RS, with the node's own command; return its first word."""
    return node.command("send", str(path), "--to", node.base_url).stdout.split()[0]


def test_services_away_are_sentences(ground: Services, tmp_path: Path) -> None:
    """A node whose services are away starts not, or refuses, in sentences; when they are back it goes on by itself."""
    off = dict.fromkeys(("DICOM_NODE_INFERENCE__ENABLED", "DICOM_NODE_DELIVERY__ENABLED", "DICOM_NODE_DICOMWEB__ENABLED"), "false")
    node = RunningNode(tmp_path / "node", environ={**ground.new_archive(), **off, "DICOM_NODE_ARCHIVE__DEADLINE_S": "3"})
    nowhere = {"DICOM_NODE_KEYS__KMS_ENDPOINT_URL": "http://127.0.0.1:9"}
    assert "Traceback" not in node.command("keys", "init", expect=1, environ=nowhere).stderr
    assert not node.ring_file.exists()
    assert "keys init" in node.command("serve", expect=1).stderr, "with a shared database no ring is made by itself"
    node.command("keys", "init")
    nowhere = {"DICOM_NODE_DATABASE__URL": "postgresql://node@127.0.0.1:9/nowhere"}
    assert "Traceback" not in node.command("serve", expect=1, environ=nowhere).stderr
    node.start()
    try:
        (item,) = drawn([0])
        ground.s3.kill()
        assert send(node, [item]) == []
        ground.s3.start()
        assert send(node, [item]) == [item]
    finally:
        assert node.stop() == 0
    assert "Traceback" not in node.log_text()
