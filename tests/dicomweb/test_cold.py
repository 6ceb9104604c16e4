"""Objects in a cold storage class: the answer says when to come again, all of the study is restored at once, nothing is half sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import ColdObject
from storage.s3 import S3Store
from tests.dicomweb.door import Door, file_of, path_of
from tests.faults.lying_s3 import LyingS3
from tests.storage.house import build
from tests.storage.samples import new_uid, photograph


def test_a_cold_study_is_restored_and_then_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with Retry-After for study, instance and metadata; one asking starts the restore of every instance; afterwards all is given."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-1")
    with LyingS3() as bucket:
        store = S3Store(
            bucket=bucket.bucket, endpoint_url=bucket.endpoint, region="us-east-1", storage_class="GLACIER", restore_tier="Expedited"
        )
        house = build(tmp_path / "house", store=store, acknowledge=lambda _: "archive")
        try:
            with Door(house) as door:
                study = new_uid()
                samples = [photograph(study=study) for _ in range(3)]
                assert door.store(*(file_of(sample) for sample in samples)).status == 200
                for path in (f"/studies/{study}", path_of(samples[0]), f"/studies/{study}/metadata"):
                    answer = door.get(path)
                    assert answer.status == 503
                    assert answer.headers["retry-after"] == "300"
                    assert "restore" in answer.problem["detail"]
                assert bucket.count("restore") == 3
                with pytest.raises(ColdObject):
                    house.read(samples[2].sop_instance_uid)
                bucket.finish_restores()
                answer = door.get(f"/studies/{study}")
                assert answer.status == 200
                bodies = b"".join(body for _, body in answer.parts)
                assert all(sample.data_set in bodies for sample in samples)
        finally:
            house.close()
