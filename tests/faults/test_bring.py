"""What the random schedules found about the Mover, each as a test of its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.mover import Mover
from storage.records import JobKind, JobState
from storage.s3 import S3Store
from tests.faults.lying_s3 import DENIED, OTHER, LyingS3
from tests.storage.house import build
from tests.storage.samples import photograph


def test_a_store_that_keeps_what_it_spoilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bytes kept, and no reading back then: the next try meets them under its own key, and replaces them (seed 1000768)."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    later = timedelta()
    with LyingS3() as s3:
        store = S3Store(bucket=s3.bucket, endpoint_url=s3.endpoint, region="us-east-1", attempts=2, sleep=lambda _: None)
        house = build(tmp_path / "house", store=store, node_id="0123456789abcdef", clock=lambda: datetime.now(UTC) + later)
        sample = photograph()
        house.ingest(sample)
        record = house.index.find(sample.sop_instance_uid)
        house.study_keys.publish(record.sealed.key_id, put_document=store.put_document, delete_document=store.delete_document)
        mover = Mover(archive=house.archive, queue=house.queue)
        s3.fail(OTHER, operation="put", times=1)
        s3.fail(DENIED, operation="get")
        assert mover.bring_once()
        assert house.index.find(sample.sop_instance_uid).landed_on
        s3.heal()
        later += timedelta(hours=1)
        assert mover.bring_once()
        assert house.index.find(sample.sop_instance_uid).landed_on == ""
        (job,) = [job for job in house.queue.jobs_of(sample.sop_instance_uid) if job.kind is JobKind.ARCHIVE]
        assert job.state is JobState.DONE
        assert house.read(sample.sop_instance_uid) == sample.data_set
        assert "instance.damaged" not in house.actions()
        house.close()
