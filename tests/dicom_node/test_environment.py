"""`dicom-node check` finds what would stop the node: rights in the bucket, the key service, versions that nobody keeps."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicom_node.config import load
from dicom_node.environment import findings
from dicom_node.storehouse import wrapping_key
from storage.keys import Ring
from tests.faults.lying_s3 import LyingS3, error
from tests.storage.key_service import REGION, key_service, moto_server

DOORS = "[dimse]\nenabled = false\n[dicomweb]\nenabled = false\n[admin]\nenabled = false\n[inference]\nenabled = false\n"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any credentials, and no settings of whoever runs this."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-1")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


def told(folder: Path, toml: str, subject: str) -> tuple[bool | None, str]:
    """Return what check says of one thing."""
    config = folder / "node.toml"
    config.write_text(f'[node]\ndata_dir = "{folder}/data"\n{DOORS}{toml}')
    return next((one.passed, one.text) for one in findings(load(config)) if one.subject == subject)


def test_rights_in_the_bucket(tmp_path: Path) -> None:
    """A bucket that may be listed but not written passes no check; one without versions is worth a word."""
    with LyingS3() as s3:
        toml = f'[archive]\nstore = "s3"\nbucket = "{s3.bucket}"\nendpoint_url = "{s3.endpoint}"\nregion = "us-east-1"\n'
        passed, text = told(tmp_path, toml, "archive.store")
        assert passed is None
        assert text.startswith(f"bucket {s3.bucket} can be reached, written, read, listed and cleared, but keeps no versions")
        s3.fail(error(403, "AccessDenied"), operation="put")
        passed, text = told(tmp_path, toml, "archive.store")
        assert passed is False
        assert "check the credentials and the policy" in text
        assert s3.objects() == {}


def test_rights_on_the_wrapping_key(tmp_path: Path) -> None:
    """A key that opens the ring but may make no data keys is found before the first instance is."""
    with moto_server() as moto, key_service(moto) as service:
        toml = f'[keys]\nring = "kms"\nkms_key_id = "{service.make_key()}"\nkms_region = "{REGION}"\nkms_endpoint_url = "{service.url}"\n'
        assert told(tmp_path, toml, "keys")[0] is True
        (tmp_path / "data" / "keys").mkdir(mode=0o700)
        Ring.create(tmp_path / "data" / "keys" / "ring.json", wrapping_key(load(tmp_path / "node.toml")))
        assert told(tmp_path, toml, "keys")[0] is True
        service.refuse("AccessDeniedException", operation="GenerateDataKey")
        passed, text = told(tmp_path, toml, "keys")
        assert passed is False
        assert "allow kms:GenerateDataKey" in text


@pytest.mark.peer
def test_a_clock_that_is_off(tmp_path: Path, postgresql_database: Callable[..., str]) -> None:
    """Nodes that share a database hand each other leases by their clocks: one that is off is told, in words that name the remedy."""
    config = tmp_path / "node.toml"
    config.write_text(
        f'[node]\ndata_dir = "{tmp_path}/data"\n{DOORS}[database]\nurl = "{postgresql_database()}"\n'
        '[archive]\nstore = "s3"\nbucket = "none"\nendpoint_url = "http://127.0.0.1:9"\n'
    )
    settings = load(config)
    settings.ring_file.parent.mkdir(mode=0o700, parents=True)
    Ring.create(settings.ring_file)

    def clock(off: timedelta) -> tuple[bool | None, str]:
        found = findings(settings, peers=False, clock=lambda: datetime.now(UTC) + off)
        return next((one.passed, one.text) for one in found if one.subject == "clock")

    assert clock(timedelta()) == (True, "it agrees with the database server's")
    passed, text = clock(timedelta(hours=-1))
    assert passed is None
    assert "behind the database server's" in text
    assert "NTP" in text
