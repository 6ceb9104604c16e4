"""Nothing of a patient is readable, at rest or in transit: a whole round trip with canaries, then every byte is looked through.

Not looked through: PostgreSQL's own files, which the node does not encrypt (its disk must be encrypted by its operator), and the DIMSE
and HTTP doors, which have no TLS of their own yet.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dicom_node.receiver import certificate
from tests.system.canary import Canary, canary, captured, found_in, scanned, streams
from tests.system.pacs import Pacs, await_reports, quick_settings, send
from tests.system.running_node import RunningNode, get
from tests.system.services import CREDENTIALS, Services, services

pytestmark = pytest.mark.peer

SSL_REQUEST = bytes.fromhex("0000000804d2162f")
"""What a client of PostgreSQL says first when it wants TLS."""
SHARED_MEMORY = Path("/dev/shm")


def temporary(folder: Path) -> dict[str, str]:
    """Environment that keeps temporary files where we look."""
    folder.mkdir()
    return {"TMPDIR": str(folder)}


def asked_for(node: RunningNode, bird: Canary) -> None:
    """Find and retrieve it by every way there is."""
    summary = bird.item.summary
    study = f"{node.base_url}/studies/{summary.study_instance_uid}"
    instance = f"{study}/series/{summary.series_instance_uid}/instances/{summary.sop_instance_uid}"
    name = bird.words["patient name"].decode().partition("^")[0]
    for url, accept in {
        f"{node.base_url}/studies?PatientName={name}*": "application/dicom+json",
        f"{study}/metadata": "application/dicom+json",
        study: 'multipart/related; type="application/dicom"; transfer-syntax=*',
        instance: "application/dicom; transfer-syntax=*",
        f"{instance}/frames/1": 'multipart/related; type="application/octet-stream"; transfer-syntax=*',
    }.items():
        status, body = get(url, accept)
        assert status == 200, (url, status, body[:500])


def shared_memory() -> list[Path]:
    """Files in shared memory; folders there are of other tests."""
    return [path for path in SHARED_MEMORY.glob("*") if path.is_file()] if SHARED_MEMORY.is_dir() else []


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def objects(folder: Path) -> list[Path]:
    """Those that are no documents of study keys."""
    return [path for path in files_in(folder) if "keys" not in path.relative_to(folder).parts]


def test_at_rest(
    bundles: str, pacs: Pacs, tmp_path: Path, s3_bucket: Callable[[], tuple[str, str, Path]], s3_service: tuple[str, Path]
) -> None:
    """Landing, landed, cache, index, bucket, logs, temporary files: no canary in any byte, at no stage of the round trip."""
    endpoint, name, bucket = s3_bucket()
    bird = canary()
    environ = {
        **CREDENTIALS, **quick_settings(bundles), **temporary(tmp_path / "temporary"),
        "DICOM_NODE_ARCHIVE__STORE": "s3", "DICOM_NODE_ARCHIVE__BUCKET": name, "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
        "DICOM_NODE_ARCHIVE__DEADLINE_S": "3", "DICOM_NODE_LOGGING__LEVEL": "debug",
    }  # fmt: skip
    node = RunningNode(tmp_path / "node", toml=pacs.toml, environ=environ)
    places = [node.folder, bucket, tmp_path / "temporary"]
    nowhere = {"DICOM_NODE_ARCHIVE__ENDPOINT_URL": "http://127.0.0.1:9"}
    node.environ["DICOM_NODE_ARCHIVE__ENDPOINT_URL"] = endpoint
    # In the landing folder: the door's process dies before the first file is moved on.
    node.start(environ={"DICOM_NODE_FAILPOINT": "landing.flushed:1"})
    assert send(node, [bird.item]) == []
    node.kill_all()
    assert files_in(node.data_dir / "landing"), "nothing is in the landing folder"
    assert scanned(places, bird.words)[1] == {}
    # On the node's disk: the bucket is away.
    node.start(environ=nowhere)
    assert send(node, [bird.item]) == [bird.item]
    await_reports(pacs, 1, node)
    (report,) = pacs.reports()
    bird = bird.told(report=report)
    assert files_in(node.data_dir / "landed")
    assert scanned(places, bird.words)[1] == {}
    assert node.stop() == 0
    # In bucket and cache.
    node.start()
    try:
        node.await_trace(bird.item.sop_instance_uid, lambda _: not objects(node.data_dir / "landed"))
        asked_for(node, bird)
        assert files_in(node.data_dir / "cache")
        byte_count, findings = scanned([*places, *shared_memory()], bird.words)
        assert findings == {}
        assert byte_count > 100_000
    finally:
        assert node.stop() == 0
    assert files_in(bucket)
    assert node.log_text()
    assert scanned([*places, *shared_memory()], bird.words)[1] == {}


def round_trip(ground: Services, node: RunningNode, bird: Canary, path: Path, pacs: Pacs | None) -> dict[str, list[bytes]]:
    """Send, await the report, ask and stop while the wire is captured; return the streams of each part, and look that there are some."""
    ports = {"s3": ground.s3.port, "kms": ground.kms.port, "postgresql": ground.postgresql.port}
    with captured(path, ports.values()):
        node.command("keys", "init")
        node.start()
        try:
            assert send(node, [bird.item]) == [bird.item]
            if pacs is not None:
                await_reports(pacs, 1, node)
            asked_for(node, bird)
            node.command("verify")
        finally:
            assert node.stop() == 0
    by_port = streams(path)
    crossed = {part: by_port.get(port, []) for part, port in ports.items()}
    assert all(sum(map(len, whole)) > 1000 for whole in crossed.values()), {part: len(whole) for part, whole in crossed.items()}
    return crossed


def hits(whole: list[bytes], bird: Canary) -> list[str]:
    """What is readable in streams."""
    return [found for stream in whole for found in found_in(stream, bird.words)]


def test_in_transit(bundles: str, pacs: Pacs, tmp_path: Path) -> None:
    """S3, KMS and PostgreSQL over TLS: not one byte of a captured round trip tells anything, and no other authority is believed."""
    bird = canary()
    with services(tmp_path / "services", tls=True, durable=True) as ground:
        environ = {**ground.new_archive(), **quick_settings(bundles), **temporary(tmp_path / "temporary")}
        node = RunningNode(tmp_path / "node", toml=pacs.toml, environ=environ)
        crossed = round_trip(ground, node, bird, tmp_path / "captured", pacs)
        bird = bird.told(report=pacs.reports()[0])
        assert {part: hits(whole, bird) for part, whole in crossed.items()} == {"s3": [], "kms": [], "postgresql": []}
        for part in ("s3", "kms"):
            assert {stream[0] for stream in crossed[part] if stream} == {22}, "a connection did not begin with a handshake of TLS"
        for stream in crossed["postgresql"]:  # its clients ask for TLS first, its server says S
            assert stream[:1] in {b"", b"S"} or (stream[:8] == SSL_REQUEST and stream[8] == 22)
        byte_count, findings = scanned([node.folder, ground.folder, tmp_path / "temporary", *shared_memory()], bird.words)
        assert findings == {}
        assert byte_count > 100_000
        (tmp_path / "other").mkdir()
        other = certificate(tmp_path / "other")
        url = node.environ["DICOM_NODE_DATABASE__URL"].replace(str(ground.authority), str(other))
        for command, strange in {
            ("trace", "1.2.3"): {"DICOM_NODE_DATABASE__URL": url},
            ("keys", "add"): {"AWS_CA_BUNDLE": str(other)},
        }.items():
            refused = node.command(*command, expect=1, environ=strange)
            assert "certificate" in refused.stderr.lower()
            assert "Traceback" not in refused.stderr


def test_the_scan_finds_what_is_open(tmp_path: Path) -> None:
    """Without TLS PostgreSQL's connections do tell the canaries, by the same capture and scan; S3's and KMS's tell nothing even so."""
    bird = canary()
    with services(tmp_path / "services") as ground:
        off = dict.fromkeys(("DICOM_NODE_INFERENCE__ENABLED", "DICOM_NODE_DELIVERY__ENABLED"), "false")
        node = RunningNode(tmp_path / "node", environ={**ground.new_archive(), **off})
        crossed = round_trip(ground, node, bird, tmp_path / "captured", None)
    told = " ".join(hits(crossed["postgresql"], bird))
    assert all(word in told for word in bird.words if word != "pixels"), told
    assert hits(crossed["s3"] + crossed["kms"], bird) == []


def test_the_scan_finds_every_form(tmp_path: Path) -> None:
    """A word is found wherever it begins, in each of its forms, in a file's name too."""
    word = b"Kanarienvogel^77"
    folder = tmp_path / "folder"
    folder.mkdir()
    planted = {
        "ascii": b"..." + word + b"...",
        "utf-16": "..Kanarienvogel^77".encode("utf-16"),
        "hex": word.hex().encode(),
        **{f"base64-{place}": base64.b64encode(b"x" * place + word + b"xx") for place in range(5)},
        "base64-bytes": base64.urlsafe_b64encode(b"\xff" + word),
    }
    for name, content in planted.items():
        (folder / name).write_bytes(content)
    (folder / "name-Kanarienvogel^77").touch()
    (folder / "clean").write_bytes(b"Kanarienvogel^78" + base64.b64encode(b"Kanarienvogel^78"))
    _, findings = scanned([folder], {"word": word})
    assert {Path(path).name for path in findings} == {*planted, "name-Kanarienvogel^77"}
