"""Erasure: nothing of a study is readable after it, in any copy; nothing else is touched; a kill at any step leaves nothing for good."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from storage.database import Database
from storage.errors import ConflictingInstance, InstanceNotFound, LeaseLost, StorageError
from storage.index import Index
from storage.records import JobKind, Level, NewReport, Outcome, Query
from storage.study_keys import document_name
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.samples import Sample, photograph, report
from tests.storage.support import instance, open_database


def concluded(house: House, sample: Sample) -> str:
    """Analyse a sample and conclude it with one report; return the report's UID."""
    job = house.queue.claim(JobKind.ANALYSE, owner="test")
    assert job is not None
    made = report(source=sample, sop=f"{sample.sop_instance_uid}1")
    (receipt,) = house.archive.conclude(job, reports=[NewReport("summary", made.data_set, deliver_to=("pacs",))], result={})
    return receipt.sop_instance_uid


def documents(house: House) -> list[str]:
    """Return the names of the documents of keys in the store."""
    return list(house.store.list_documents("keys/"))


def counts(database: Database, *tables: str) -> dict[str, int]:
    """Return how many rows there are."""
    with database.read() as connection:
        return {table: int(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() or 0) for table in tables}  # noqa: S608


TABLES = ("patients", "studies", "series", "instances", "reports", "quarantine", "jobs", "study_keys")


def test_a_study_is_gone_from_everywhere(either_house: House) -> None:
    """Rows, reports, jobs, quarantine, keys, documents and objects of the study go; the other study keeps all of its own."""
    house = either_house
    first, other = photograph(), photograph()
    house.ingest(first)
    made = concluded(house, first)
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(sop=first.sop_instance_uid, study=first.study_instance_uid))
    house.ingest(other)
    erased = house.archive.erasure().erase_study(first.study_instance_uid, actor="operator", reason="asked by the patient")
    assert erased.complete
    assert (erased.instances, len(erased.objects), len(erased.study_key_ids)) == (3, 3, 1)
    for uid in (first.sop_instance_uid, made):
        with pytest.raises(InstanceNotFound):
            house.archive.open(uid)
        assert house.queue.jobs_of(uid) == []
    assert house.read(other.sop_instance_uid) == other.data_set
    assert house.objects() == [house.index.find(other.sop_instance_uid).sealed.object_key]
    assert documents(house) == [document_name(house.index.find(other.sop_instance_uid).sealed.key_id)]
    assert counts(house.database, *TABLES) == {**dict.fromkeys(TABLES, 1), "reports": 0, "quarantine": 0}
    assert house.index.count(Query(Level.STUDY)) == 1
    (event,) = [entry.event for entry in house.audit.events_of(first.study_instance_uid)]
    assert (event.action, event.actor, event.detail["instances"]) == ("study.erased", "operator", 3)
    assert house.archive.verify().intact
    with pytest.raises(InstanceNotFound):
        house.archive.erasure().erase_study("1.2.3", actor="operator", reason="")


def test_a_copy_of_the_object_cannot_be_opened(house: House) -> None:
    """Crypto-shredding: the sealed bytes, kept by a backup of the bucket, open for nobody any more."""
    sample = photograph()
    house.ingest(sample)
    record = house.index.find(sample.sop_instance_uid)
    path = house.folder / "objects" / record.sealed.object_key[:2] / record.sealed.object_key
    copy = path.read_bytes()
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="")
    path.write_bytes(copy)
    with pytest.raises(StorageError, match="no such study key"):
        house.study_keys.get(record.sealed.key_id)


def test_a_held_study_stays(house: House) -> None:
    """Legal hold: neither the study nor its patient is erased, and nothing at all is changed; lifted, it goes."""
    first, second = photograph(patient_id="P-7"), photograph(patient_id="P-7")
    house.ingest(first)
    house.ingest(second)
    house.archive._holds.place(second.study_instance_uid, reason="court", actor="operator")
    before = counts(house.database, *TABLES)
    with pytest.raises(StorageError, match="hold"):
        house.archive.erasure().erase_study(second.study_instance_uid, actor="operator", reason="")
    with pytest.raises(StorageError, match=second.study_instance_uid):
        house.archive.erasure().erase_patient("P-7", actor="operator", reason="")
    assert counts(house.database, *TABLES) == before
    assert house.read(first.sop_instance_uid) == first.data_set
    house.archive._holds.lift(second.study_instance_uid, reason="over", actor="operator")
    erased = house.archive.erasure().erase_patient("P-7", actor="operator", reason="")
    assert sorted(erased.study_instance_uids) == sorted([first.study_instance_uid, second.study_instance_uid])
    everything = (*TABLES, "texts", "trigrams")
    assert counts(house.database, *everything) == dict.fromkeys(everything, 0)
    assert house.objects() == documents(house) == []


def test_what_is_kept_aside_of_a_patient_goes_too(house: House) -> None:
    """An instance of the patient in quarantine, whose study is archived for another patient, goes; that patient's study stays."""
    theirs = photograph(patient_id="P-1")
    house.ingest(theirs)
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(patient_id="P-2", study=theirs.study_instance_uid))
    with pytest.raises(InstanceNotFound):
        house.archive.erasure().erase_patient("P-3", actor="operator", reason="")
    with pytest.raises(StorageError, match="empty"):
        house.archive.erasure().erase_patient(" ", actor="operator", reason="")
    assert house.archive.erasure().erase_patient("P-2", actor="operator", reason="").instances == 1
    assert house.index.quarantined() == []
    assert house.read(theirs.sop_instance_uid) == theirs.data_set
    assert len(house.objects()) == 1


def test_the_same_study_may_come_again(houses: Build) -> None:
    """After its erasure a study is taken in like any other, under a new key; also by a process that remembers the old series and key."""
    here, there = houses(), houses()
    sample = photograph()
    here.ingest(sample)
    sibling = photograph(study=sample.study_instance_uid, series=sample.series_instance_uid)
    there.ingest(sibling)
    old = here.index.find(sample.sop_instance_uid).sealed.key_id
    here.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="")
    for _ in range(2):  # the other process remembers its key: it asks the sender to try again, once
        try:
            receipt = there.ingest(sample)
            break
        except StorageError as error:
            assert error.retryable  # noqa: PT017 - one of two good ends
    else:
        pytest.fail("never taken in again")
    assert receipt.outcome is Outcome.STORED
    assert there.index.find(sample.sop_instance_uid).sealed.key_id != old
    (match,) = there.index.match(Query(Level.SERIES))
    assert match.attributes["NumberOfSeriesRelatedInstances"] == ("1",)
    assert here.read(sample.sop_instance_uid) == sample.data_set
    assert here.archive.verify().intact


def test_a_remembered_series_that_was_erased_is_made_again(place: str) -> None:
    """Two processes: what one remembers of a series that the other erased is never filed under."""
    first, second = open_database(place), open_database(place)
    try:
        one, two = Index(database=first), Index(database=second)
        kept = instance(study="1.2.3", series="1.2.3.4")
        first.write(lambda connection: one.add(connection, kept))
        first.write(lambda connection: one.add(connection, instance(study="1.2.3", series="1.2.3.4")))
        from storage.removal import instances_in, remove_in  # noqa: PLC0415

        assert len(second.write(lambda connection: remove_in(connection, instances_in(connection, "1.2.3")))) == 2
        assert counts(second, "patients", "studies", "series", "instances") == dict.fromkeys(
            ("patients", "studies", "series", "instances"), 0
        )
        other = instance({"PatientID": "P9"}, study="1.2.3", series="1.2.3.4")
        first.write(lambda connection: one.add(connection, other))
        assert two.find(other.summary.sop_instance_uid).summary.attributes["PatientID"] == ("P9",)
        with pytest.raises(InstanceNotFound):
            one.find(kept.summary.sop_instance_uid)
        assert counts(second, "patients", "studies", "series", "instances") == dict.fromkeys(
            ("patients", "studies", "series", "instances"), 1
        )
    finally:
        first.close()
        second.close()


def test_an_analysis_under_way_brings_nothing_back(house: House) -> None:
    """A worker that concludes after the erasure is told so; no report, job or object of it stays."""
    sample = photograph()
    house.ingest(sample)
    job = house.queue.claim(JobKind.ANALYSE, owner="slow")
    assert job is not None
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="")
    made = report(source=sample, sop=f"{sample.sop_instance_uid}1")
    with pytest.raises((InstanceNotFound, LeaseLost)):
        house.archive.conclude(job, reports=[NewReport("summary", made.data_set, deliver_to=("pacs",))], result={})
    assert counts(house.database, *TABLES) == dict.fromkeys(TABLES, 0)
    assert house.objects() == []


def test_a_delivery_under_way_ends(house: House) -> None:
    """A courier that comes back after the erasure has lost its lease."""
    sample = photograph()
    house.ingest(sample)
    concluded(house, sample)
    job = house.queue.claim(JobKind.DELIVER, lane="pacs", owner="courier")
    assert job is not None
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="")
    with pytest.raises(LeaseLost):
        house.archive.acknowledge(job, status=0)


def test_readers_and_senders_beside_an_erasure(house: House) -> None:
    """Who reads while a study is erased gets what was stored or an error, never other bytes; who sends gets success or is told to retry."""
    study = photograph()
    house.ingest(study)
    stop = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not stop.is_set():
            try:
                if house.read(study.sop_instance_uid) != study.data_set:
                    wrong.append("other bytes")
            except StorageError:
                pass

    def send() -> None:
        while not stop.is_set():
            try:
                house.ingest(study)
            except StorageError as error:
                if not error.retryable:
                    wrong.append(str(error))

    threads = [threading.Thread(target=work) for work in (read, read, send)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            try:
                house.archive.erasure().erase_study(study.study_instance_uid, actor="operator", reason="")
            except InstanceNotFound:
                wrong.append("not found")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    found = house.archive.verify()
    assert found.intact
    try:
        house.archive.erasure().erase_study(study.study_instance_uid, actor="operator", reason="")
    finally:
        assert counts(house.database, "instances", "study_keys") == {"instances": 0, "study_keys": 0}


_PROGRAM = """
import os, sys
from pathlib import Path
from storage.failpoints import failpoint_from_environment
from tests.storage.house import build
house = build(Path(sys.argv[1]), reach=failpoint_from_environment(os.environ))
house.archive.erasure().erase_study(sys.argv[2], actor="operator", reason="")
"""


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize("step", ["erase.committed", "erase.documents", "erase.objects"])
def test_killed_at_each_step(houses: Build, step: str, engine: str) -> None:
    """After a kill the study is gone at once for every reader; the same call again deletes the keys' documents, the sweep all the rest."""
    house = houses()
    sample, other = photograph(), photograph()
    house.ingest(sample)
    house.ingest(other)
    house.close()
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(house.folder), sample.study_instance_uid],
        env={**os.environ, "DICOM_NODE_FAILPOINT": f"{step}:1"},
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == -9
    again = houses()
    with pytest.raises(InstanceNotFound):
        again.read(sample.sop_instance_uid)
    assert again.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="").complete
    kept = again.index.find(other.sop_instance_uid).sealed
    assert documents(again) == [document_name(kept.key_id)]
    again.archive.orphans().sweep(grace=timedelta(minutes=-1))
    assert again.objects() == [kept.object_key]
    assert again.read(other.sop_instance_uid) == other.data_set
