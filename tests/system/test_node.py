"""The whole node, as its users meet it: started by its command, filled by its command, killed, started again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from inference.bundle import default_bundles
from tests.system.running_node import RunningNode, analysed, get, running_node

PATIENT = ("--patient-id", "CANARY-4711", "--patient-name", "Canary^Conrad")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """One node for the tests that only use it."""
    with running_node(tmp_path_factory.mktemp("node")) as started:
        yield started


def sent_uid(output: str) -> str:
    """UID in a line that `send` prints."""
    assert output.startswith("stored"), output
    return output.split()[1]


def test_a_newcomer_sends_and_traces(node: RunningNode) -> None:
    """`send --demo`, then `trace`: received, sealed, analysed, with a summary, findings and a segmentation."""
    sent = node.command("send", "--demo", *PATIENT)
    uid = sent_uid(sent.stdout)
    found = node.await_trace(uid, analysed)
    (instance,) = found["instances"]
    assert instance["received"]["door"] == "dimse"
    assert instance["received"]["calling_ae_title"] == "DICOM_NODE_SEND"
    assert {report["kind"] for report in instance["reports"]} == {"summary", "findings", "segmentation"}
    for report in instance["reports"]:
        assert report["study_instance_uid"] == instance["study_instance_uid"]
        assert report["models"]
    told = node.command("trace", uid).stdout
    assert "digest" in told
    assert "summary" in told


def test_stow_then_everything_over_dicomweb(node: RunningNode, tmp_path: Path) -> None:
    """Sent by STOW-RS, found by QIDO-RS at once, its bytes given back by WADO-RS, its reports listed as series of the study."""
    saved = node.command("send", "--demo", "--save-only", "--output", str(tmp_path), *PATIENT).stdout.strip()
    data_set = pydicom.dcmread(saved)
    sent = node.command("send", saved, "--to", node.base_url)
    assert sent_uid(sent.stdout) == data_set.SOPInstanceUID
    study = f"{node.base_url}/studies/{data_set.StudyInstanceUID}"
    status, body = get(
        f"{node.base_url}/studies?PatientID=CANARY-4711&StudyInstanceUID={data_set.StudyInstanceUID}", "application/dicom+json"
    )
    assert status == 200
    assert json.loads(body)[0]["00100020"]["Value"] == ["CANARY-4711"]
    status, body = get(
        f"{study}/series/{data_set.SeriesInstanceUID}/instances/{data_set.SOPInstanceUID}", "application/dicom; transfer-syntax=*"
    )
    assert status == 200
    assert pydicom.dcmread(BytesIO(body)) == data_set
    node.await_trace(data_set.SOPInstanceUID, analysed)
    status, body = get(f"{study}/series", "application/dicom+json")
    assert sorted(series["00080060"]["Value"][0] for series in json.loads(body)) == ["DMS", "SEG", "SR", "SR"]


def test_sending_again_is_a_success_and_changes_nothing(node: RunningNode, tmp_path: Path) -> None:
    """The same instance twice, by both doors: stored once, analysed once."""
    saved = node.command("send", "--demo", "--save-only", "--output", str(tmp_path)).stdout.strip()
    uid = sent_uid(node.command("send", saved).stdout)
    before = node.await_trace(uid, analysed)
    node.command("send", saved)
    node.command("send", saved, "--to", node.base_url)
    after = node.trace(uid)
    for key in ("jobs", "reports", "object", "digest"):
        assert after["instances"][0][key] == before["instances"][0][key]


def test_requeue_writes_the_same_reports(node: RunningNode, tmp_path: Path) -> None:
    """An analysis that runs again ends with the same objects: same UIDs, same digests."""
    uid = sent_uid(node.command("send", "--demo").stdout)
    before = node.await_trace(uid, analysed)["instances"][0]
    (job,) = (job for job in before["jobs"] if job["kind"] == "analyse")
    assert "1 job" in node.command("requeue", str(job["id"])).stdout
    after = node.await_trace(uid, lambda found: analysed(found) and found["instances"][0]["jobs"][0]["finished_at"] != job["finished_at"])
    assert [report["digest"] for report in after["instances"][0]["reports"]] == [report["digest"] for report in before["reports"]]


def test_nothing_of_the_patient_is_readable(node: RunningNode) -> None:
    """Name, ID and UIDs stand in no file of the data directory and in no log line."""
    sent = node.command("send", "--demo", *PATIENT, "--accession-number", "CANARYACC")
    found = node.await_trace(sent_uid(sent.stdout), analysed)
    (instance,) = found["instances"]
    words = ["CANARY-4711", "Canary^Conrad", "CANARYACC", instance["sop_instance_uid"], instance["study_instance_uid"]]
    words += [report["sop_instance_uid"] for report in instance["reports"]]
    needles = [word.encode(encoding) for word in words for encoding in ("ascii", "utf-16-le")]
    files = [path for path in node.data_dir.rglob("*") if path.is_file()] + [node.log]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        assert not [needle for needle in needles if needle in content], path


def test_verify_is_content(node: RunningNode) -> None:
    """`verify` on a node that runs: intact."""
    node.command("send", "--demo")
    assert node.command("verify").returncode == 0


def test_metrics_count_what_happened(node: RunningNode) -> None:
    """/metrics adds the counters of all processes; /healthz is there; neither is on the DICOMweb listener."""
    node.await_trace(sent_uid(node.command("send", "--demo").stdout), analysed)
    status, body = get(f"http://127.0.0.1:{node.admin_port}/metrics")
    text = body.decode()
    assert status == 200
    for expected in (
        'dicom_node_instances_total{door="dimse",outcome="stored"}',
        "dicom_node_analyses_total",
        'dicom_node_jobs{kind="analyse"',
    ):
        assert expected in text
    assert get(f"http://127.0.0.1:{node.admin_port}/healthz")[0] == 200
    assert get(f"http://127.0.0.1:{node.web_port}/metrics")[0] == 404


def test_a_second_node_on_the_same_folder_is_refused(node: RunningNode) -> None:
    """One folder, one node: the second says which process has it."""
    ports = {"DICOM_NODE_DIMSE__PORT": "0", "DICOM_NODE_DICOMWEB__PORT": "0", "DICOM_NODE_ADMIN__PORT": "0"}
    refused = node.command("serve", expect=1, environ=ports)
    assert "another node (process" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_killed_children_come_back(node: RunningNode) -> None:
    """SIGKILL to each process of the node: it is started again by itself and work goes on."""
    for process_id, role in node.children().items():
        os.kill(process_id, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while process_id in node.children() or not node.ready():
            assert time.monotonic() < deadline, f"{role} did not come back:\n{node.log_text()[-3000:]}"
            time.sleep(0.1)
    node.await_trace(sent_uid(node.command("send", "--demo").stdout), analysed)


def test_hanging_child_is_replaced(tmp_path: Path) -> None:
    """A process that is stopped in its tracks gives no sign of life: it is killed, another takes its place and its work."""
    environ = {"DICOM_NODE_NODE__SILENCE_S": "10", "DICOM_NODE_NODE__LEASE_S": "2"}
    with running_node(tmp_path / "node", environ=environ) as node:
        (stopped,) = (process_id for process_id, role in node.children().items() if role == "worker")
        os.kill(stopped, signal.SIGSTOP)
        uid = sent_uid(node.command("send", "--demo").stdout)
        node.await_trace(uid, analysed)
        assert stopped not in node.children()
        assert '"process.hangs"' in node.log_text()


def test_faulty_child_makes_the_node_not_ready(tmp_path: Path) -> None:
    """What a process cannot write to, /readyz says, for each process."""
    node = RunningNode(tmp_path / "node", environ={"DICOM_NODE_ARCHIVE__MIN_FREE_BYTES": str(10**18)}).start(wait=False)
    try:
        deadline = time.monotonic() + 90
        while True:
            with suppress(OSError):
                status, body = get(f"http://127.0.0.1:{node.admin_port}/readyz")
                if b"process dimse-0 is faulty" in body:
                    break
            assert time.monotonic() < deadline, node.log_text()[-2000:]
            time.sleep(0.3)
        assert status == 503
        assert "0xA700" in node.command("send", "--demo", expect=1).stdout
    finally:
        assert node.stop() == 0


def test_killed_node_starts_again_by_itself(tmp_path: Path) -> None:
    """SIGKILL to the parent right after Success: the next start needs no hand, the instance is there and gets analysed."""
    node = RunningNode(tmp_path / "node").start()
    children = node.children()
    uid = sent_uid(node.command("send", "--demo").stdout)
    node.kill()
    node.start()
    try:
        node.await_trace(uid, analysed)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{process_id}").exists() for process_id in children):
            assert time.monotonic() < deadline, "children of the killed parent are still there"
            time.sleep(0.1)
    finally:
        assert node.stop() == 0
    assert "Traceback" not in node.log_text()


def test_missing_key_ring_is_refused_never_replaced(tmp_path: Path) -> None:
    """With data but without the ring the node does not start, and makes no new ring."""
    node = RunningNode(tmp_path / "node").start()
    node.command("send", "--demo")
    node.stop()
    ring = node.data_dir / "keys" / "ring.json"
    ring.rename(tmp_path / "copy.json")
    refused = node.command("serve", expect=1)
    assert "key ring" in refused.stderr
    assert not ring.exists()
    assert "made with another ring" in node.command("keys", "init", expect=1).stderr
    assert not ring.exists()
    assert "without it nothing" in node.command("check", expect=1).stdout
    (tmp_path / "copy.json").rename(ring)
    node.start()
    assert node.stop() == 0


def test_check_knows_the_running_node(node: RunningNode) -> None:
    """On a node that runs, `check` is content: its ports are its own, its ring opens its database, its models load."""
    told = node.command("check").stdout
    assert f"127.0.0.1:{node.dimse_port} is in use by the running node (process {node.process.pid if node.process else 0})" in told
    assert "opens the database" in told
    assert told.count("inference.bundles") == 4


def test_check_builds_the_networks(tmp_path: Path) -> None:
    """A bundle whose weights do not fit its network is found before the node is started with it."""
    shipped = {path.name: path for path in default_bundles()}
    mixed = tmp_path / "mixed"
    shutil.copytree(shipped["lesion-diagnosis"], mixed)
    weights = (shipped["image-quality"] / "weights.safetensors").read_bytes()
    (mixed / "weights.safetensors").write_bytes(weights)
    manifest = json.loads((mixed / "manifest.json").read_text())
    manifest["weights"]["sha256"] = hashlib.sha256(weights).hexdigest()
    (mixed / "manifest.json").write_text(json.dumps(manifest))
    node = RunningNode(tmp_path / "node", environ={"DICOM_NODE_INFERENCE__BUNDLES": str(mixed)})
    told = node.command("check", expect=1).stdout
    assert "no  inference.bundles: " in told
    assert "weights do not fit" in told


def test_conflict_is_refused_and_listed(node: RunningNode, tmp_path: Path) -> None:
    """Other content under a known UID: `send` says refused by both doors, `quarantine` lists it, the first one stays."""
    saved = node.command("send", "--demo", "--save-only", "--output", str(tmp_path), *PATIENT).stdout.strip()
    uid = sent_uid(node.command("send", saved).stdout)
    before = node.trace(uid)["instances"][0]["digest"]
    data_set = pydicom.dcmread(saved)
    data_set.StudyDescription = "changed"
    data_set.save_as(saved)
    assert "refused, 0x0111" in node.command("send", saved, expect=1).stdout
    assert "refused, 0x0111" in node.command("send", saved, "--to", node.base_url, expect=1).stdout
    assert f"instance {uid}" in node.command("quarantine", "list").stdout
    assert node.trace(uid)["instances"][0]["digest"] == before


def test_unreachable_and_wrong_are_sentences(tmp_path: Path) -> None:
    """The errors a newcomer meets: no node, no such UID, no file, a typo; none is a traceback."""
    node = RunningNode(tmp_path / "node")
    picture = tmp_path / "notes.txt"
    picture.write_text("no picture")
    for arguments, expected in {
        ("send", "--demo"): "did not answer",
        ("trace", "1.2.3"): "there is no archive",
        ("send", str(picture)): "neither DICOM, JPEG nor PNG",
        ("send",): "nothing to send",
        ("send", "--demo", "--body-site", "elbow"): "use one of head",
        ("send", "--demo", "--to", "nowhere"): "use host:port",
        ("keys", "list"): "dicom-node keys init",
        ("requeue",): "there is no archive",
    }.items():
        done = node.command(*arguments, expect=1)
        assert expected in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
