"""Orphans: nothing that may be the last copy of an acknowledged instance is deleted; what a crash left goes; nothing comes back."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.backup import back_up, restore
from storage.errors import ConflictingInstance, InstanceNotFound, Unavailable
from storage.keys import Ring
from storage.objects import DirectoryStore, ObjectReader, ObjectStore
from storage.records import InstanceRecord, JobKind, JobState, SealedObject
from storage.study_keys import document_name
from tests.storage.conftest import Build
from tests.storage.house import House, origin_of
from tests.storage.samples import Sample, new_uid, photograph
from tests.storage.test_erasure import concluded

NOW = timedelta(minutes=-1)
"""A grace so short that everything is old."""
NODE = "00000000000000aa"


def restored(houses: Build, house: House, *, store: ObjectStore | None = None, name: str = "restored") -> House:
    """Return a house over the same objects and keys with a database that knows nothing of them."""
    folder = house.folder.with_name(name)
    folder.mkdir()
    shutil.copy(house.folder / "keys.json", folder / "keys.json")
    if store is None:
        shutil.copytree(house.folder / "objects", folder / "objects")
    return houses(name, **({} if store is None else {"store": store}))


def left_behind(house: House, sample: Sample, *, document: bool = True) -> InstanceRecord:
    """Put an object as a process does that is killed before its commit."""
    with house.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid) as intake:
        intake.write(sample.data_set)
        record, study_key = intake.seal()
        if document:
            house.store.put_document(f"keys/{study_key.id[:2]}/{study_key.id}", house.study_keys.document(study_key))
        house.store.put(record.sealed.object_key, intake.landing_file.path, record.sealed)
    return record


def test_what_an_older_database_does_not_know_is_adopted(either_house: House, houses: Build) -> None:
    """Instances, reports, links, keys: all is as it was; what was analysed is not analysed again; what was not is."""
    house = either_house
    first, second = photograph(), photograph()
    house.ingest(first, peer="clinic")
    made = concluded(house, first)
    house.ingest(second)
    again = restored(houses, house, store=house.store if house.store.remote else None)
    assert again.archive.orphans().sweep().settled == 0  # still young
    swept = again.archive.orphans().sweep(grace=NOW, restored=True)
    assert (swept.adopted, swept.settled, swept.waiting, swept.unreadable) == (3, 3, 0, 0)
    for uid in (first.sop_instance_uid, second.sop_instance_uid, made):
        assert again.index.find(uid) == house.index.find(uid)
        assert again.read(uid) == house.read(uid)
    assert again.index.reports_of(first.sop_instance_uid) == house.index.reports_of(first.sop_instance_uid)
    assert again.queue.jobs_of(first.sop_instance_uid) == []
    assert [job.kind for job in again.queue.jobs_of(second.sop_instance_uid)] == [JobKind.ANALYSE]
    assert [(job.kind, job.lane) for job in again.queue.jobs_of(made)] == [(JobKind.DELIVER, "pacs")]
    assert again.actions() == ["instance.adopted"] * 3
    found = again.archive.verify()
    assert (found.intact, found.unindexed) == (True, [])
    assert again.archive.orphans().sweep(grace=NOW).settled == 0


def test_a_sweep_on_schedule_adopts_the_same(house: House, houses: Build) -> None:
    """Nobody said that the database is older than the store: the next sweep finds source and report, and no analysis is repeated."""
    sample = photograph()
    house.ingest(sample)
    made = concluded(house, sample)
    again = restored(houses, house)
    assert again.archive.orphans().sweep(grace=NOW).adopted == 2
    assert again.queue.jobs_of(sample.sop_instance_uid) == []
    assert again.read(made) == house.read(made)


def test_a_report_of_an_older_analysis_ends_the_job(houses: Build, house: House) -> None:
    """After a restore the source is known and its analysis seems undone: the report that exists is taken in, and no other is made."""
    sample = photograph()
    house.ingest(sample)
    again = restored(houses, house, name="other")
    again.archive.orphans().sweep(grace=NOW, restored=True)
    made = concluded(house, sample)
    record = house.index.find(made)
    shutil.copy(
        house.folder / "objects" / record.sealed.object_key[:2] / record.sealed.object_key,
        again.folder / "objects" / record.sealed.object_key[:2],
    )
    assert again.archive.orphans().sweep(grace=NOW, restored=True).adopted == 1
    assert again.index.reports_of(sample.sop_instance_uid) == house.index.reports_of(sample.sop_instance_uid)
    assert again.queue.jobs_of(sample.sop_instance_uid) == []


def test_a_report_without_its_commit_is_made_again(house: House) -> None:
    """In a node that runs, the report of a worker that was killed goes: its analysis is still to be done and brings the same."""
    sample = photograph()
    house.ingest(sample)
    job = house.queue.claim(JobKind.ANALYSE, owner="killed")
    assert job is not None
    from storage.records import NewReport  # noqa: PLC0415
    from tests.storage.samples import report  # noqa: PLC0415

    made = report(source=sample, sop=f"{sample.sop_instance_uid}1")
    house.archive._store_report(NewReport("summary", made.data_set), job)
    assert len(house.objects()) == 2
    assert house.archive.orphans().sweep(grace=NOW).deleted == 1
    assert house.queue.jobs_of(sample.sop_instance_uid)[0].state is JobState.CLAIMED
    assert house.read(sample.sop_instance_uid) == sample.data_set


def test_killed_between_put_and_commit(house: House) -> None:
    """Nobody was told Success, yet the object is whole: adopted, and a second sending is a duplicate. Without a key it goes."""
    sample = photograph()
    left_behind(house, sample)
    left_behind(house, photograph(), document=False)
    assert house.archive.orphans().sweep().settled == 0
    swept = house.archive.orphans().sweep(grace=NOW, restored=True)  # the table of keys may be older than it should be
    assert (swept.adopted, swept.deleted, swept.waiting) == (1, 0, 1)
    assert house.archive.orphans().sweep(grace=NOW).deleted == 1
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert house.ingest(sample).outcome == "duplicate"


def test_a_copy_too_many_goes_and_the_only_good_copy_heals(house: House) -> None:
    """Beside a whole object an equal orphan is deleted; where the archived object rots, the orphan takes its place."""
    sample, rotten = photograph(), photograph()
    for one in (sample, rotten):
        house.ingest(one)
        left_behind(house, one)
    record = house.index.find(rotten.sop_instance_uid)
    path = house.folder / "objects" / record.sealed.object_key[:2] / record.sealed.object_key
    path.write_bytes(path.read_bytes()[:-1])
    swept = house.archive.orphans().sweep(grace=NOW)
    assert (swept.deleted, swept.healed) == (1, 1)
    assert len(house.objects()) == 2
    assert house.read(rotten.sop_instance_uid) == rotten.data_set
    assert house.archive.verify().intact


def test_other_content_is_set_aside_once(house: House) -> None:
    """An orphan that contradicts what is archived goes to quarantine; one more of the same goes. So with another patient's study."""
    first = photograph(patient_id="P-1")
    house.ingest(first)
    second = photograph(sop=first.sop_instance_uid)
    left_behind(house, second)
    assert house.archive.orphans().sweep(grace=NOW).quarantined == 1
    left_behind(house, second)
    left_behind(house, photograph(patient_id="P-2", study=first.study_instance_uid))
    swept = house.archive.orphans().sweep(grace=NOW)
    assert (swept.deleted, swept.quarantined) == (1, 1)
    assert len(house.index.quarantined()) == 2
    assert house.read(first.sop_instance_uid) == first.data_set
    found = house.archive.verify()
    assert (found.intact, found.unindexed) == (True, [])


def test_what_cannot_be_read_stays(house: House) -> None:
    """A damaged orphan, or a report whose source is nowhere, is left and counted."""
    sample = photograph()
    record = left_behind(house, sample)
    path = house.folder / "objects" / record.sealed.object_key[:2] / record.sealed.object_key
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    assert house.archive.orphans().sweep(grace=NOW).unreadable == 1
    assert house.objects() == [record.sealed.object_key]
    with pytest.raises(InstanceNotFound):
        house.read(sample.sop_instance_uid)


def test_keys_nobody_needs_go(house: House) -> None:
    """The document of a key goes when no row knows it and no object without a row needs it; a young one stays."""
    sample = photograph()
    house.ingest(sample)
    kept = list(house.store.list_documents("keys/"))
    unused = house.study_keys.current("1.2.3")
    name = f"keys/{unused.id[:2]}/{unused.id}"
    house.store.put_document(name, house.study_keys.document(unused))
    assert house.archive.orphans().sweep().documents == 0
    assert house.archive.orphans().sweep(grace=NOW).documents == 1
    assert list(house.store.list_documents("keys/")) == kept
    record = left_behind(house, photograph())
    path = house.folder / "objects" / record.sealed.object_key[:2] / record.sealed.object_key
    path.write_bytes(path.read_bytes() + b"x")  # it says nothing any more: perhaps it needs the key
    house.store.put_document(name, house.study_keys.document(unused))
    assert house.archive.orphans().sweep(grace=NOW).documents == 0


def test_an_erased_study_does_not_come_back(house: House) -> None:
    """Object and key document that survived an erasure (a copy that was put back) are deleted without grace for the key."""
    sample = photograph()
    house.ingest(sample)
    copies = house.folder.with_name("copies")
    shutil.copytree(house.folder / "objects", copies)
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="")
    shutil.copytree(copies, house.folder / "objects", dirs_exist_ok=True)
    swept = house.archive.orphans().sweep(grace=NOW)
    assert (swept.deleted, swept.documents, swept.adopted) == (1, 1, 0)
    assert house.objects() == list(house.store.list_documents("keys/")) == []


def test_what_came_before_an_erasure_under_a_key_nobody_knows_does_not_come_back(house: House) -> None:
    """A process died between put and commit with a key of its own; then the study was erased: the sweep deletes, it does not adopt."""
    study = new_uid()
    left_behind(house, photograph(study=study))
    house.study_keys._drop(list(house.study_keys._held))
    house.ingest(photograph(study=study))
    house.archive.erasure().erase_study(study, actor="operator", reason="")
    swept = house.archive.orphans().sweep(grace=NOW)
    assert (swept.deleted, swept.adopted) == (1, 0)
    assert house.objects() == []
    later = photograph(study=study)
    left_behind(house, later)
    assert house.archive.orphans().sweep(grace=NOW).adopted == 1


def test_the_spool_is_swept_the_same_way(houses: Build, s3_store: ObjectStore) -> None:
    """A landed object without a row is adopted with the Mover's job; one that was brought already goes; a foreign duplicate goes."""
    house = houses(store=s3_store, node_id=NODE)
    landed, brought = photograph(), photograph()
    house.ingest(landed)
    house.ingest(brought)
    record = house.index.find(brought.sop_instance_uid)
    spool = house.archive._places.spool
    assert spool is not None
    copy = Path(shutil.copy(spool.path_of(record.sealed.object_key), house.folder / "copy"))
    while (job := house.queue.claim(JobKind.ARCHIVE, owner="mover")) is not None:
        if job.sop_instance_uid == brought.sop_instance_uid:
            house.archive.bring(job)
    spool.put(record.sealed.object_key, copy, record.sealed)
    assert house.archive.orphans().sweep_spool(grace=NOW).settled == 0
    assert sorted(spool_info.object_key for spool_info in spool.list()) == [house.index.find(landed.sop_instance_uid).sealed.object_key]
    assert len(list(spool.list_documents("keys/"))) == 1  # the other's document is in the store
    intake = house.archive.receive(origin_of(), transfer_syntax_uid=landed.transfer_syntax_uid)
    fresh = photograph()
    intake.write(fresh.data_set)
    sealed, study_key = intake.seal()
    spool.put(sealed.sealed.object_key, intake.landing_file.path, sealed.sealed)
    spool.put_document(f"keys/{study_key.id[:2]}/{study_key.id}", house.study_keys.document(study_key))
    intake.abort()
    assert house.archive.orphans().sweep_spool(grace=NOW).adopted == 1
    adopted = house.index.find(fresh.sop_instance_uid)
    assert adopted.landed_on == NODE
    assert not house.study_keys.get(adopted.sealed.key_id).stored  # its document is in the spool alone yet
    assert {job.kind for job in house.queue.jobs_of(fresh.sop_instance_uid)} == {JobKind.ANALYSE, JobKind.ARCHIVE}
    assert house.read(fresh.sop_instance_uid) == fresh.data_set


def test_refused_conflicts_are_no_orphans(house: House) -> None:
    """What is in quarantine has a row: a sweep leaves it alone."""
    first = photograph()
    house.ingest(first)
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(sop=first.sop_instance_uid))
    assert house.archive.orphans().sweep(grace=NOW).settled == 0
    assert len(house.objects()) == 2


class _Forgetful(DirectoryStore):
    """A store that says of every document that it is not there."""

    def get_document(self, name: str) -> bytes:
        raise InstanceNotFound(f"no document {name}")


def test_one_wrong_answer_of_the_store_deletes_nothing(houses: Build, house: House) -> None:
    """The store says of a key's document that there is none, while its listing names it: the object waits, and is adopted later."""
    sample = photograph()
    house.ingest(sample)
    forgetful = _Forgetful(house.folder / "objects")
    again = restored(houses, house, store=forgetful)
    swept = again.archive.orphans().sweep(grace=NOW)
    assert (swept.deleted, swept.waiting) == (0, 1)
    honest = restored(houses, house, store=DirectoryStore(house.folder / "objects"), name="honest")
    assert honest.archive.orphans().sweep(grace=NOW).adopted == 1
    assert honest.read(sample.sop_instance_uid) == sample.data_set


class _Sectors(DirectoryStore):
    """A store on a disk with bad sectors."""

    bad: frozenset[str] = frozenset()

    def open(self, object_key: str) -> ObjectReader:
        if object_key in self.bad:
            raise Unavailable("the disk reports an I/O error")
        return super().open(object_key)


def test_one_object_that_cannot_be_read_does_not_end_the_sweep(houses: Build, house: House) -> None:
    """It waits, and all others are decided about; twenty in a row, and it is the store that is away."""
    samples = [photograph() for _ in range(22)]
    for sample in samples:
        house.ingest(sample)
    bad = house.index.find(samples[7].sop_instance_uid).sealed.object_key
    store = _Sectors(house.folder / "objects")
    store.bad = frozenset({bad})
    again = restored(houses, house, store=store)
    store.bad = frozenset(house.objects())
    with pytest.raises(Unavailable, match="I/O error"):
        again.archive.orphans().sweep(grace=NOW)
    store.bad = frozenset({bad})
    swept = again.archive.orphans().sweep(grace=NOW)
    assert (swept.adopted, swept.waiting, swept.deleted, swept.documents) == (21, 1, 0, 0)
    assert not again.archive.verify().missing
    store.bad = frozenset()
    assert again.archive.orphans().sweep(grace=NOW).adopted == 1
    assert again.read(samples[7].sop_instance_uid) == samples[7].data_set


def test_verify_reads_on_past_an_object_that_cannot_be_read(houses: Build) -> None:
    """It is named, and verify does not say that all is well; twenty in a row, and it is the store that is away."""
    store = _Sectors(houses().folder / "objects")
    house = houses(store=store)
    for _ in range(21):
        house.ingest(photograph())
    some = house.objects()[3]
    store.bad = frozenset({some})
    found = house.archive.verify()
    assert (found.checked, list(found.unreadable), found.intact) == (20, [some], False)
    assert any(some in line and "cannot be read now" in line for line in found.lines())
    store.bad = frozenset(house.objects())
    with pytest.raises(Unavailable, match="I/O error"):
        house.archive.verify()


def without_database(houses: Build, house: House, store: ObjectStore) -> House:
    """Return a house over the same bucket, spool and keys, whose database was lost."""
    folder = house.folder.with_name("without")
    folder.mkdir()
    shutil.copy(house.folder / "keys.json", folder / "keys.json")
    shutil.copytree(house.folder / "landed", folder / "landed")
    return houses("without", store=store, node_id=NODE)


def test_the_key_of_a_younger_landed_object_stays(houses: Build, s3_store: ObjectStore) -> None:
    """After a loss of the database an old key's document waits in the spool for the young objects under it."""
    house = houses(store=s3_store, node_id=NODE)
    sample = photograph()
    house.ingest(sample)
    again = without_database(houses, house, s3_store)
    spool = again.archive._places.spool
    assert spool is not None
    later = datetime.now(UTC) + timedelta(hours=1)
    os.utime(spool.path_of(house.index.find(sample.sop_instance_uid).sealed.object_key), (later.timestamp(), later.timestamp()))
    assert again.archive.orphans().sweep_spool(grace=NOW).documents == 0
    assert again.archive.orphans().sweep_spool(grace=-timedelta(hours=2)).adopted == 1
    assert again.read(sample.sop_instance_uid) == sample.data_set


def test_a_spoilt_document_in_the_store_does_not_hide_that_in_the_spool(houses: Build, s3_store: ObjectStore) -> None:
    """The store kept half of a key's document; the landed object is adopted by that beside it (seed 20207)."""
    house = houses(store=s3_store, node_id=NODE)
    sample = photograph()
    house.ingest(sample)
    again = without_database(houses, house, s3_store)
    key_id = house.index.find(sample.sop_instance_uid).sealed.key_id
    s3_store.put_document(f"keys/{key_id[:2]}/{key_id}", b"{")
    assert again.archive.orphans().sweep_spool(grace=NOW).adopted == 1
    assert again.read(sample.sop_instance_uid) == sample.data_set
    assert not again.study_keys.get(key_id).stored


class _Full(DirectoryStore):
    """A store that takes documents, and objects only at times."""

    remote = True
    full = False

    def put(self, object_key: str, path: Path, sealed: SealedObject, *, tags: Mapping[str, str] | None = None) -> None:
        if self.full:
            raise Unavailable("the store is full")
        super().put(object_key, path, sealed, tags=tags)


def test_a_refused_instance_does_not_replace_the_document_of_its_key(houses: Build) -> None:
    """What a process remembers of a key from before a rotation never replaces the newer document that the row vouches for."""
    store = _Full(houses().folder / "bucket")
    house = houses("landing", store=store, node_id=NODE, acknowledge=lambda origin: "archive" if origin.peer == "strict" else "land")
    sample = photograph()
    house.ingest(sample)
    Ring.add(house.folder / "keys.json")
    house.ring.holds("")
    house.study_keys.rotate(put_document=store.put_document, delete_document=store.delete_document)
    store.full = True
    with pytest.raises(Unavailable, match="full"):
        house.ingest(photograph(study=sample.study_instance_uid), peer="strict")
    for key in Ring.shown(house.folder / "keys.json"):
        if not key.primary:
            house.study_keys.retire(key.key_id)
    house.ring.holds("")
    key_id = house.index.find(sample.sop_instance_uid).sealed.key_id
    assert house.study_keys.get(key_id).stored
    assert house.study_keys.from_document(store.get_document(f"keys/{key_id[:2]}/{key_id}")).id == key_id


class _Slow(_Full):
    """A store in which something else is over before the next document is in it."""

    meanwhile: Callable[[], object] | None = None

    def put_document(self, name: str, content: bytes) -> None:
        happens, self.meanwhile = self.meanwhile, None
        if happens is not None:
            happens()
        super().put_document(name, content)


def test_a_document_that_comes_late_does_not_stay_in_place_of_a_newer_one(houses: Build) -> None:
    """A rotation ends while the document is on its way, and the instance is refused: what lies in the store is as the row has it."""
    store = _Slow(houses().folder / "bucket")
    house = houses("landing", store=store, node_id=NODE, acknowledge=lambda origin: "archive" if origin.peer == "strict" else "land")
    sample = photograph()
    house.ingest(sample)

    def rotate() -> None:
        Ring.add(house.folder / "keys.json")
        house.ring.holds("")
        house.study_keys.rotate(put_document=store.put_document, delete_document=store.delete_document)

    store.full, store.meanwhile = True, rotate
    with pytest.raises(Unavailable, match="full"):
        house.ingest(photograph(study=sample.study_instance_uid), peer="strict")
    key = house.study_keys.get(house.index.find(sample.sop_instance_uid).sealed.key_id)
    assert (key.stored, key.wrapping_key_id) == (True, house.ring.primary_key_id)
    assert store.get_document(f"keys/{key.id[:2]}/{key.id}") == house.study_keys.document(key)


def test_nothing_is_deleted_from_the_store_when_another_brought_it(houses: Build) -> None:
    """The store holds other bytes under the key; when the row no longer says that the object lies here, they are left alone."""
    store = _Full(houses().folder / "bucket")
    house = houses("landing", store=store, node_id=NODE)
    sample = photograph()
    house.ingest(sample)
    record = house.index.find(sample.sop_instance_uid)
    other = house.folder / "other"
    other.write_bytes(b"other bytes")
    sealed = SealedObject(record.sealed.object_key, 11, hashlib.sha256(b"other bytes").hexdigest(), record.sealed.key_id)
    store.put(record.sealed.object_key, other, sealed)
    with pytest.raises(Unavailable, match="meanwhile"):
        house.archive._places.bring(record, still=lambda: False)
    assert store.stat(record.sealed.object_key).byte_count == 11
    house.archive._places.bring(record)
    assert store.stat(record.sealed.object_key).byte_count == record.sealed.byte_count


def test_what_is_deleted_from_the_store_to_be_put_again_is_not_lost_meanwhile(houses: Build) -> None:
    """Another process settles the spool's file just before: the store gets the object all the same, and no second name is left."""
    store = _Full(houses().folder / "bucket")
    house = houses("landing", store=store, node_id=NODE)
    sample = photograph()
    house.ingest(sample)
    record, spool = house.index.find(sample.sop_instance_uid), house.archive.places.spool
    assert spool is not None
    other = house.folder / "other"
    other.write_bytes(b"other bytes")
    sealed = SealedObject(record.sealed.object_key, 11, hashlib.sha256(b"other bytes").hexdigest(), record.sealed.key_id)
    store.put(record.sealed.object_key, other, sealed)

    def settled() -> bool:
        spool.delete(record.sealed.object_key)
        return True

    house.archive.places.bring(record, still=settled)
    assert store.stat(record.sealed.object_key).byte_count == record.sealed.byte_count
    assert not [path for path in (house.folder / "landed").rglob(".*") if path.is_file()]
    with pytest.raises(InstanceNotFound), spool.held(record.sealed.object_key):
        pass


def test_the_key_of_what_lies_in_another_spool_stays(houses: Build, tmp_path: Path) -> None:
    """The database came back without an instance that another node took: the sweep of the store leaves its key, that node adopts it."""
    store = _Full(tmp_path / "bucket")
    other = houses(store=store, node_id=NODE)
    sample = photograph()
    other.ingest(sample)
    other.study_keys.publish_all(put_document=store.put_document, delete_document=store.delete_document)
    assert other.archive.orphans().sweep_spool(grace=NOW).documents == 1  # it is in the store
    restoring = restored(houses, other, store=store)
    for kind in (True, False):
        assert restoring.archive.orphans().sweep(grace=NOW, restored=kind).documents == 0
    again = without_database(houses, other, store)
    assert again.archive.orphans().sweep_spool(grace=NOW).adopted == 1
    assert again.read(sample.sop_instance_uid) == sample.data_set


def test_a_spoilt_document_of_an_erased_key_goes(houses: Build, tmp_path: Path) -> None:
    """The store kept half of a key's document, the node died while it erased: the document goes unread, the landed object after it."""
    store = _Full(tmp_path / "bucket")
    house = houses(store=store, node_id=NODE)
    sample = photograph()
    house.ingest(sample)
    record = house.index.find(sample.sop_instance_uid)
    name = document_name(record.sealed.key_id)
    landed = house.archive._places.spool
    assert landed is not None
    (file,) = (path for path in (house.folder / "landed").rglob(record.sealed.object_key) if path.is_file())
    kept = file.read_bytes()
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="asked for")
    file.write_bytes(kept)  # killed before it was deleted
    store.put_document(name, b'{"half')
    orphans = house.archive.orphans()
    assert orphans.sweep(grace=NOW).documents == 1
    assert name not in list(store.list_documents("keys/"))
    assert orphans.sweep_spool(grace=NOW).deleted == 1
    assert not file.exists()


def test_the_key_of_what_was_dropped_from_the_quarantine_goes(houses: Build, tmp_path: Path) -> None:
    """Its document was left in a shared store, which could not be asked then: the audit trail says that it was erased."""
    store = _Full(tmp_path / "bucket")
    house = houses(store=store)
    first = photograph()
    house.ingest(first)
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(sop=first.sop_instance_uid))
    (one,) = house.archive.quarantine().all()
    name = document_name(one.record.sealed.key_id)
    content = store.get_document(name)
    house.archive.quarantine().drop(one.id, actor="operator", reason="")
    store.put_document(name, content)
    assert house.archive.orphans().sweep(grace=NOW).documents == 1
    assert name not in list(store.list_documents("keys/"))


def test_a_landed_object_without_key_goes_only_when_it_was_erased(houses: Build, tmp_path: Path) -> None:
    """Its key is nowhere: perhaps the database and the document come back. When the audit trail says that it was erased, it goes."""
    store = _Full(tmp_path / "bucket")
    house = houses(store=store, node_id=NODE)
    sample = photograph()
    house.ingest(sample)
    spool = house.archive._places.spool
    assert spool is not None
    (landed,) = (info.object_key for info in spool.list())
    copy = Path(shutil.copy(spool.path_of(landed), tmp_path / "copy"))
    record = house.index.find(sample.sop_instance_uid)
    again = without_database(houses, house, store)
    there = again.archive._places.spool
    assert there is not None
    for name in list(there.list_documents("keys/")):
        there.delete_document(name)
    swept = again.archive.orphans().sweep_spool(grace=NOW)
    assert (swept.deleted, swept.waiting) == (0, 1)
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="")
    spool.put(landed, copy, record.sealed)
    assert house.archive.orphans().sweep_spool(grace=NOW).deleted == 1
    assert list(spool.list()) == []


def test_what_an_operator_decided_stays_decided(either_house: House, houses: Build) -> None:
    """The database knows neither the first, which was set aside with its report, nor the accepted second: all is as it was decided."""
    house = either_house
    first = photograph()
    second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid)
    house.ingest(first)
    made = concluded(house, first)
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    house.archive.quarantine().accept(house.index.quarantined()[0].id, actor="operator", reason="the retake")
    again = restored(houses, house, store=house.store if house.store.remote else None)
    swept = again.archive.orphans().sweep(grace=NOW, restored=True)
    assert (swept.adopted, swept.quarantined, swept.settled) == (1, 2, 3)
    assert again.read(first.sop_instance_uid) == second.data_set
    aside = {kept.record.summary.sop_instance_uid: kept for kept in again.index.quarantined()}
    assert set(aside) == {first.sop_instance_uid, made}
    for kept in house.index.quarantined():
        found = aside[kept.record.summary.sop_instance_uid]
        assert (found.record.sealed, found.reason, found.quarantined_at) == (kept.record.sealed, kept.reason, kept.quarantined_at)
    assert [job.kind for job in again.queue.jobs_of(first.sop_instance_uid)] == [JobKind.ANALYSE]
    assert again.archive.quarantine().synchronise_marks() == 0


def test_a_report_that_was_set_aside_stays_while_an_analysis_waits(houses: Build, house: House) -> None:
    """An operator replaced its source, whose analysis is still to be done: the report of the former one is set aside, not deleted."""
    first = photograph()
    second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid)
    house.ingest(first)
    made = concluded(house, first)
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    house.archive.quarantine().accept(house.index.quarantined()[0].id, actor="operator", reason="the retake")
    again = restored(houses, house)
    swept = again.archive.orphans().sweep(grace=NOW)
    assert [job.state for job in again.queue.jobs_of(first.sop_instance_uid)] == [JobState.READY]
    assert (swept.adopted, swept.quarantined, swept.deleted) == (1, 2, 0)
    assert {kept.record.summary.sop_instance_uid for kept in again.index.quarantined()} == {first.sop_instance_uid, made}
    assert again.objects() == house.objects()


@pytest.mark.parametrize("together", [True, False])
def test_a_decision_stays_though_what_was_set_aside_heals(houses: Build, house: House, *, together: bool) -> None:
    """A backup, a healed object, a decision, a restore: the marked orphan takes the damaged one's place, and its mark stays with it.

    By the mark the decision is followed: at once, or when the accepted one is found.
    """
    first = photograph()
    second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid)
    house.ingest(first)
    back_up(house.folder.with_name("backup"), database=house.database, index=house.index, store=house.store, ring=house.ring)
    damaged = house.index.find(first.sop_instance_uid)
    path = house.folder / "objects" / damaged.sealed.object_key[:2] / damaged.sealed.object_key
    path.write_bytes(path.read_bytes()[:-1])
    left_behind(house, first)
    assert house.archive.orphans().sweep(grace=NOW).healed == 1
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    house.archive.quarantine().accept(house.index.quarantined()[0].id, actor="operator", reason="the retake")
    accepted = house.index.find(first.sop_instance_uid)
    marks = list(house.store.list_documents("quarantine/"))
    again = restored(houses, house, store=house.store)
    parts = {"index": again.index, "queue": again.queue, "store": again.store, "ring": again.ring}
    restore(house.folder.with_name("backup"), database=again.database, **parts)  # type: ignore[arg-type]
    path.unlink(missing_ok=True)  # the backup brought it back, and it rots again
    if not together:
        path = house.folder / "objects" / accepted.sealed.object_key[:2] / accepted.sealed.object_key
        kept = shutil.move(path, house.folder / "kept")
        assert again.archive.orphans().sweep(grace=NOW).healed == 1
        assert again.archive.quarantine().synchronise_marks() == 0
        assert again.read(first.sop_instance_uid) == first.data_set
        shutil.move(kept, path)
    again.archive.orphans().sweep(grace=NOW)
    assert again.read(first.sop_instance_uid) == second.data_set
    assert [one.record.sealed for one in again.index.quarantined()] == [one.record.sealed for one in house.index.quarantined()]
    assert again.archive.quarantine().synchronise_marks() == 0
    assert list(again.store.list_documents("quarantine/")) == marks
