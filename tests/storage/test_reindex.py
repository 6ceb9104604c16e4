"""Reindex: the store and the ring alone give the index back, row for row."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storage.differences import differences
from storage.errors import ConflictingInstance, Unavailable
from storage.objects import ObjectStore
from storage.records import JobKind, JobState, NewReport
from storage.removal import remove_in
from storage.s3 import S3Store
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.moto_service import moto_server, new_bucket
from tests.storage.samples import Sample, new_uid, photograph, report

NODE = "00000000000000aa"


def populated(house: House, *, studies: int = 40) -> list[Sample]:
    """Fill a house with what an archive holds: patients of several studies, reports, conflicts of both kinds, decisions, erasures."""
    samples: list[Sample] = []
    for number in range(studies):
        study, series = new_uid(), (new_uid(), new_uid())
        for count in range(3):
            sample = photograph(
                study=study, series=series[count % 2], patient_id=f"P-{number % 7}", name=f"Müller^{number % 7}", rows=4, columns=4
            )
            house.ingest(sample, peer="clinic", calling_ae_title=f"CAM{count}")
            samples.append(sample)
    large = photograph(rows=1400, columns=1400)
    house.ingest(large)
    samples.append(large)
    for sample in samples[: len(samples) // 2]:
        job = house.queue.claim(JobKind.ANALYSE, owner="test")
        assert job is not None
        made = report(source=sample, sop=f"{sample.sop_instance_uid}1", patient_id=f"P-{samples.index(sample) // 3 % 7}")
        new = NewReport("summary", made.data_set, deliver_to=("pacs", "viewer"), models={"derm": "1 abc"})
        house.archive.conclude(job, reports=[new], result={})
    for sample in samples[:4]:
        with pytest.raises(ConflictingInstance):
            house.ingest(photograph(sop=sample.sop_instance_uid, study=sample.study_instance_uid, patient_id="P-0"))
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(study=samples[0].study_instance_uid, patient_id="P-6"))
    first, second, *_ = house.archive.quarantine().all()
    house.archive.quarantine().accept(first.id, actor="operator", reason="")
    house.archive.quarantine().drop(second.id, actor="operator", reason="")
    house.archive.erasure().erase_study(samples[-4].study_instance_uid, actor="operator", reason="")
    house.archive.quarantine().synchronise_marks()
    return samples


def emptied(houses: Build, house: House, *, name: str = "rebuilt", store: ObjectStore | None = None, **options: object) -> House:
    """Return a house with the ring, and what else survives a lost database."""
    folder = house.folder.with_name(name)
    folder.mkdir()
    shutil.copy(house.folder / "keys.json", folder / "keys.json")
    if store is None:
        shutil.copytree(house.folder / "objects", folder / "objects")
    else:
        options["store"] = store
    if (house.folder / "landed").exists():
        shutil.copytree(house.folder / "landed", folder / "landed")
    return houses(name, **options)


def test_the_index_is_rebuilt_row_for_row(either_house: House, houses: Build) -> None:
    """Every table is equal to the old one; what has no report is analysed; nothing is delivered again unasked; the trail says it."""
    house = either_house
    samples = populated(house)
    again = emptied(houses, house, store=house.store if house.store.remote else None)
    seen: list[tuple[str, int, int | None]] = []
    found = again.archive.reindex().run(lambda *told: seen.append(told))
    assert differences(house.database, again.database) == []
    assert differences(again.database, house.database) == []
    assert (found.objects, found.unreadable, found.without_key, found.unlinked, found.copies) == (len(house.objects()), 0, 0, 0, 0)
    assert {told[0] for told in seen} == {"keys", "objects", "instances", "reports", "analyses"}
    (entry,) = again.audit.entries()
    assert (entry.event.action, entry.event.detail["instances"]) == ("archive.reindexed", found.instances)
    filed = [uid for uid in (sample.sop_instance_uid for sample in samples[:-4]) if again.index.find(uid)]
    waiting = {uid for uid in {*filed, samples[-1].sop_instance_uid} if not again.index.reports_of(uid)}
    assert 0 < len(waiting) < len(filed)
    assert {uid for uid in waiting if again.queue.jobs_of(uid)} == waiting
    states = again.queue.counts()
    assert states[JobKind.ANALYSE, JobState.READY] == len(waiting) == found.analyses
    assert states[JobKind.DELIVER, JobState.READY] == 0
    assert again.archive.verify().intact
    assert again.archive.orphans().sweep().settled == 0
    with pytest.raises(Unavailable, match=r"not empty: the database .* holds instances.*With no node running, .* aside|an empty database"):
        again.archive.reindex().run()


def test_differences_are_found(house: House, houses: Build) -> None:
    """The comparison is not blind: a row that is missing or changed in any column is told, whatever table it is in."""
    populated(house, studies=4)
    again = emptied(houses, house)
    again.archive.reindex().run()
    assert differences(house.database, again.database) == []
    for table in ("patients", "studies", "series", "instances", "quarantine", "reports", "study_keys"):
        column = {
            "patients": "patient_id",
            "studies": "study_date",
            "study_keys": "wrapped",
            "reports": "kind",
            "series": "modality",
        }.get(table, "key_id")
        again.database.write(lambda c, t=table, n=column: c.exec_driver_sql(f"UPDATE {t} SET {n} = {n} || 'x'"))  # type: ignore[misc]  # noqa: S608
        assert f"{table}: row 1 differs in {column}" in differences(house.database, again.database)
        again.database.write(lambda c, t=table, n=column: c.exec_driver_sql(f"UPDATE {t} SET {n} = substr({n}, 1, length({n}) - 1)"))  # type: ignore[misc]  # noqa: S608
        assert differences(house.database, again.database) == []
    uid = next(again.index.all_objects()).sop_instance_uid
    again.database.write(lambda connection: remove_in(connection, [uid]))
    assert any("rows here" in line for line in differences(house.database, again.database))


def test_deliveries_on_demand(house: House, houses: Build) -> None:
    """Asked for, every report is delivered again to whom it was meant for, under its own UID."""
    populated(house, studies=3)
    again = emptied(houses, house)
    found = again.archive.reindex(deliver=True).run()
    assert found.deliveries == 2 * found.reports > 0
    assert again.queue.counts()[JobKind.DELIVER, JobState.READY] == found.deliveries


def test_damage_does_not_stop_it(house: House, houses: Build) -> None:
    """A damaged object, one without a key, a damaged document, a copy: each is counted, all the rest comes back."""
    populated(house, studies=4)
    sound = photograph()
    house.ingest(sound)
    again = emptied(houses, house)
    objects = again.folder / "objects"
    keys = house.objects()
    rotten = house.index.find(sound.sop_instance_uid).sealed
    (objects / rotten.object_key[:2] / rotten.object_key).write_bytes(b"rotten")
    name = next(name for name in house.store.list_documents("keys/") if not name.endswith(rotten.key_id))  # whose objects are whole
    (objects / name).write_bytes(b"rotten")
    found = again.archive.reindex().run()
    assert found.unreadable == 2
    assert found.without_key >= 1
    assert found.instances + found.quarantined + found.copies + found.unreadable - 1 + found.without_key == len(keys)


def test_what_has_landed_alone_is_found_too(houses: Build, s3_store: ObjectStore) -> None:
    """Objects that only this node's spool holds come back with the Mover's jobs: the documents of their keys landed with them."""
    house = houses(store=s3_store, node_id=NODE)
    sample = photograph()
    house.ingest(sample)
    again = emptied(houses, house, store=s3_store, node_id=NODE)
    again.archive.reindex().run()
    assert differences(house.database, again.database) == []
    assert {job.kind for job in again.queue.jobs_of(sample.sop_instance_uid)} == {JobKind.ANALYSE, JobKind.ARCHIVE}
    assert again.read(sample.sop_instance_uid) == sample.data_set


def test_a_large_object_is_not_read_where_the_store_tells_its_digest(houses: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that keeps the checksum of an upload gives it: the digest of a large object costs its ends and one question."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with moto_server() as endpoint:
        store = S3Store(bucket=new_bucket(endpoint), endpoint_url=endpoint, region="us-east-1")
        house = houses(store=store)
        large = photograph(rows=1500, columns=1500)
        house.ingest(large)
        sealed = house.index.find(large.sop_instance_uid).sealed
        assert store.sha256(sealed.object_key) == sealed.sha256
        again = emptied(houses, house, store=store)
        again.archive.reindex().run()
        assert differences(house.database, again.database) == []


_PROGRAM = """
import os, sys
from pathlib import Path
from storage.failpoints import failpoint_from_environment
from tests.storage.house import build
build(Path(sys.argv[1]), reach=failpoint_from_environment(os.environ)).archive.reindex().run()
"""


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_killed_and_started_again(house: House, houses: Build, engine: str) -> None:
    """Killed in each pass, one after the other, and started again: it goes on, and the end is the same."""
    populated(house, studies=110)
    folder = emptied(houses, house).folder
    for step in ("reindex.keys", "reindex.heard", "reindex.heard", "reindex.filed", "reindex.filed", "reindex.linked"):
        run = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(folder)],
            env={**os.environ, "DICOM_NODE_FAILPOINT": f"{step}:1"},
            check=False,
            cwd=Path(__file__).parents[2],
        )
        assert run.returncode == -9
    again = houses(folder.name)
    again.archive.reindex().run()
    assert differences(house.database, again.database) == []
    assert again.actions() == ["archive.reindexed"]
