"""Quarantine: shown, accepted, dropped; what is archived and what was set aside change places, and nothing gets lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from storage.backup import back_up, restore
from storage.database import utc_now
from storage.errors import ConflictingInstance, InstanceNotFound, IntegrityError, StorageError
from storage.quarantine import mark_name, read_mark
from storage.records import JobKind, JobState
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.samples import Sample, photograph
from tests.storage.test_erasure import concluded


def in_conflict(house: House) -> tuple[Sample, Sample]:
    """Archive one instance and have another of its UID set aside."""
    first = photograph()
    second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid)
    house.ingest(first)
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    return first, second


def test_shown_with_what_it_contradicts(house: House) -> None:
    """An operator sees both, by number."""
    first, _ = in_conflict(house)
    (one,) = house.archive.quarantine().all()
    shown, archived = house.archive.quarantine().show(one.id)
    assert shown == one
    assert archived == house.index.find(first.sop_instance_uid)
    for use in (house.archive.quarantine().show, lambda number: house.archive.quarantine().drop(number, actor="x", reason="")):
        with pytest.raises(InstanceNotFound):
            use(one.id + 1)


def test_accepted_takes_the_place(either_house: House) -> None:
    """The accepted instance is archived and analysed anew; the old one and its report are kept aside; accepted again, they change back."""
    house = either_house
    first, second = in_conflict(house)
    made = concluded(house, first)
    (one,) = house.index.quarantined()
    house.archive.quarantine().accept(one.id, actor="operator", reason="the retake")
    assert house.read(first.sop_instance_uid) == second.data_set
    assert house.index.reports_of(first.sop_instance_uid) == []
    with pytest.raises(InstanceNotFound):
        house.read(made)
    assert house.queue.jobs_of(made) == []
    (job,) = house.queue.jobs_of(first.sop_instance_uid)
    assert (job.kind, job.state) == (JobKind.ANALYSE, JobState.READY)
    aside = {kept.record.summary.sop_instance_uid: kept for kept in house.index.quarantined()}
    assert set(aside) == {first.sop_instance_uid, made}
    assert len(house.objects()) == 3
    marks = set(house.store.list_documents("quarantine/"))
    assert marks == {mark_name(kept.record.sealed.object_key) for kept in aside.values()}
    replaced = aside[first.sop_instance_uid]
    mark = read_mark(house.store, replaced.record.sealed.object_key)
    assert mark is not None
    assert (mark.reason, mark.quarantined_at) == (replaced.reason, replaced.quarantined_at)
    assert read_mark(house.store, one.record.sealed.object_key) is None
    house.archive.quarantine().accept(replaced.id, actor="operator", reason="no, the first")
    assert house.read(first.sop_instance_uid) == first.data_set
    assert house.actions().count("quarantine.accepted") == 2
    found = house.archive.verify()
    assert (found.intact, found.unindexed) == (True, [])


def test_another_patients_study_is_not_decided_here(house: House) -> None:
    """Where the study belongs to another patient the error names the remedy, nothing changes; with that study erased it can be accepted."""
    first = photograph(patient_id="P-1")
    second = photograph(patient_id="P-2", study=first.study_instance_uid)
    house.ingest(first)
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    (one,) = house.index.quarantined()
    with pytest.raises(ConflictingInstance, match="erase that study"):
        house.archive.quarantine().accept(one.id, actor="operator", reason="")
    assert house.index.quarantined() == [one]
    house.archive._holds.place(first.study_instance_uid, reason="court", actor="operator")
    with pytest.raises(StorageError, match="hold"):
        house.archive.quarantine().drop(one.id, actor="operator", reason="")
    assert house.index.quarantined() == [one]


def test_dropped(either_house: House) -> None:
    """Row, object and mark go, the archived instance stays; the last of a study takes its key along."""
    house = either_house
    first, second = in_conflict(house)
    other = photograph(sop=first.sop_instance_uid)  # under another study
    with pytest.raises(ConflictingInstance):
        house.ingest(other)
    house.archive.quarantine().synchronise_marks()
    assert len(list(house.store.list_documents("quarantine/"))) == 2
    for one in house.index.quarantined():
        house.archive.quarantine().drop(one.id, actor="operator", reason="wrong patient")
    assert house.index.quarantined() == []
    assert house.read(first.sop_instance_uid) == first.data_set != second.data_set
    record = house.index.find(first.sop_instance_uid)
    assert house.objects() == [record.sealed.object_key]
    assert [name[-32:] for name in house.store.list_documents("keys/")] == [record.sealed.key_id]
    assert list(house.store.list_documents("quarantine/")) == []
    assert house.study_keys.all_of(other.study_instance_uid) == []
    assert house.actions()[-2:] == ["quarantine.dropped"] * 2


def test_marks_follow_the_rows(house: House) -> None:
    """Marks that are missing are written, those of nothing are removed, a damaged one is told from none."""
    in_conflict(house)
    (one,) = house.index.quarantined()
    house.store.put_document(mark_name("0" * 32), b"{}")
    with pytest.raises(IntegrityError):
        read_mark(house.store, "0" * 32)
    assert house.archive.quarantine().synchronise_marks() == 2
    assert house.archive.quarantine().synchronise_marks() == 0
    assert list(house.store.list_documents("quarantine/")) == [mark_name(one.record.sealed.object_key)]


_PROGRAM = """
import os, sys
from pathlib import Path
from storage.failpoints import failpoint_from_environment
from tests.storage.house import build
house = build(Path(sys.argv[1]), reach=failpoint_from_environment(os.environ))
getattr(house.archive.quarantine(), sys.argv[2])(house.index.quarantined()[0].id, actor="operator", reason="")
"""


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize("verb", ["accept", "drop"])
def test_killed_after_the_commit(houses: Build, verb: str, engine: str) -> None:
    """The decision stands; what it left to do is done by the caretaker: marks are written, a dropped object does not come back."""
    house = houses()
    first, second = in_conflict(house)
    house.close()
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(house.folder), verb],
        env={**os.environ, "DICOM_NODE_FAILPOINT": "quarantine.committed:1"},
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == -9
    again = houses()
    again.archive.orphans().sweep(grace=timedelta(minutes=-1))
    again.archive.quarantine().synchronise_marks()
    assert again.read(first.sop_instance_uid) == (second if verb == "accept" else first).data_set
    assert len(again.objects()) == (2 if verb == "accept" else 1)
    assert len(again.index.quarantined()) == (1 if verb == "accept" else 0)
    assert len(list(again.store.list_documents("quarantine/"))) == len(again.index.quarantined())


def test_a_foreign_database_does_not_take_marks_away(houses: Build, house: House) -> None:
    """A database that knows nothing of the store's objects leaves their marks alone; where the object is gone the mark goes too."""
    in_conflict(house)
    (one,) = house.index.quarantined()
    house.archive.quarantine().synchronise_marks()
    foreign = houses("foreign", store=house.store)
    assert foreign.archive.quarantine().synchronise_marks() == 0
    assert read_mark(house.store, one.record.sealed.object_key) is not None
    house.store.delete(one.record.sealed.object_key)
    assert foreign.archive.quarantine().synchronise_marks() == 1
    assert list(house.store.list_documents("quarantine/")) == []


def test_an_older_database_follows_the_decision(houses: Build, house: House) -> None:
    """Both rows are in the backup, the decision is not: it is taken up once, and the operator may decide otherwise after that."""
    first, second = in_conflict(house)
    made = concluded(house, first)
    house.archive.quarantine().synchronise_marks()
    back_up(house.folder.with_name("backup"), database=house.database, index=house.index, store=house.store, ring=house.ring)
    (one,) = house.index.quarantined()
    house.archive.quarantine().accept(one.id, actor="operator", reason="the retake")
    aside = house.index.quarantined()
    house.folder.with_name("older").mkdir()
    shutil.copy(house.ring.path, house.folder.with_name("older") / "keys.json")
    older = houses("older", store=house.store)
    parts = {"index": older.index, "queue": older.queue, "store": older.store, "ring": older.ring}
    restore(house.folder.with_name("backup"), database=older.database, **parts)  # type: ignore[arg-type]
    assert older.archive.quarantine().follow_marks() == 1
    assert older.read(first.sop_instance_uid) == second.data_set
    assert {kept.record.summary.sop_instance_uid for kept in older.index.quarantined()} == {first.sop_instance_uid, made}
    assert older.archive.quarantine().synchronise_marks() == 0
    assert [kept.record.sealed for kept in older.index.quarantined()] == [kept.record.sealed for kept in aside]
    (accepted,) = (entry for entry in older.audit.entries() if entry.event.action == "quarantine.accepted")
    assert (accepted.event.actor, "after the backup" in accepted.event.detail["reason"]) == ("node", True)
    (back,) = (kept for kept in older.index.quarantined() if kept.record.summary.sop_instance_uid == first.sop_instance_uid)
    older.archive.quarantine().accept(back.id, actor="operator", reason="no, the first")
    assert older.archive.quarantine().follow_marks() == 0
    assert older.read(first.sop_instance_uid) == first.data_set


def test_an_older_database_leaves_the_mark_until_the_object_is_found(houses: Build, house: House) -> None:
    """The archived one is marked, the accepted one is too young to be adopted: the mark stays, and tells the decision when it is."""
    first = photograph()
    house.ingest(first)
    back_up(house.folder.with_name("backup"), database=house.database, index=house.index, store=house.store, ring=house.ring)
    second = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid)
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    house.archive.quarantine().accept(house.index.quarantined()[0].id, actor="operator", reason="the retake")
    made = concluded(house, second)
    house.folder.with_name("older").mkdir()
    shutil.copy(house.ring.path, house.folder.with_name("older") / "keys.json")
    older = houses("older", store=house.store)
    parts = {"index": older.index, "queue": older.queue, "store": older.store, "ring": older.ring}
    restore(house.folder.with_name("backup"), database=older.database, **parts)  # type: ignore[arg-type]
    assert older.archive.quarantine().synchronise_marks() == 0
    swept = older.archive.orphans().sweep(grace=timedelta(minutes=-1), restored=True)
    assert (swept.quarantined, swept.adopted) == (1, 1)
    assert older.read(first.sop_instance_uid) == second.data_set
    assert older.index.reports_of(first.sop_instance_uid) == house.index.reports_of(first.sop_instance_uid) != []
    assert older.read(made) == house.read(made)
    assert older.archive.quarantine().synchronise_marks() == 0


def restored_to(houses: Build, house: House) -> House:
    """Return a house over the same store whose database was restored from the backup."""
    house.folder.with_name("older").mkdir()
    shutil.copy(house.ring.path, house.folder.with_name("older") / "keys.json")
    older = houses("older", store=house.store)
    parts = {"index": older.index, "queue": older.queue, "store": older.store, "ring": older.ring}
    restore(house.folder.with_name("backup"), database=older.database, **parts)  # type: ignore[arg-type]
    return older


def keep_backup(house: House) -> None:
    """Back up what is here now."""
    back_up(house.folder.with_name("backup"), database=house.database, index=house.index, store=house.store, ring=house.ring)


def accept_other(house: House, *, reason: str = "the operator's choice") -> None:
    """Accept the one instance that is in quarantine."""
    (one,) = house.index.quarantined()
    house.archive.quarantine().accept(one.id, actor="operator", reason=reason)


def test_a_newcomer_is_not_taken_for_the_accepted_one(houses: Build, house: House) -> None:
    """The accepted one has no row yet when a third arrives: that stays aside, and the decision is followed when the second is found."""
    first = photograph()
    house.ingest(first)
    keep_backup(house)
    second, third = (
        photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid) for _ in range(2)
    )
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    accept_other(house)
    older = restored_to(houses, house)
    with pytest.raises(ConflictingInstance):
        older.ingest(third)
    older.archive.quarantine().synchronise_marks()
    assert older.read(first.sop_instance_uid) == first.data_set
    assert "quarantine.accepted" not in older.actions()
    with pytest.raises(ConflictingInstance):
        older.ingest(photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid))
    older.archive.orphans().sweep(grace=timedelta(minutes=-1))
    assert older.read(first.sop_instance_uid) == second.data_set
    assert len(older.index.quarantined()) == 3


def test_an_older_database_follows_the_last_of_several_decisions(houses: Build, house: House) -> None:
    """The second, the first again, a backup, the second again: what was accepted before the backup does not hide the last decision."""
    first, second = in_conflict(house)
    accept_other(house)
    accept_other(house)
    keep_backup(house)
    accept_other(house)
    marks = list(house.store.list_documents("quarantine/"))
    older = restored_to(houses, house)
    assert older.read(first.sop_instance_uid) == first.data_set
    older.archive.quarantine().synchronise_marks()
    assert older.read(first.sop_instance_uid) == second.data_set
    assert list(older.store.list_documents("quarantine/")) == marks


def test_an_older_acceptance_does_not_take_a_true_mark_away(houses: Build, house: House) -> None:
    """As before, but the accepted one lies in the quarantine of nobody yet: the mark waits for it."""
    first, second = in_conflict(house)
    accept_other(house)
    accept_other(house)
    house.archive.quarantine().drop(house.index.quarantined()[0].id, actor="operator", reason="comes again")
    keep_backup(house)
    with pytest.raises(ConflictingInstance):
        house.ingest(second)
    accept_other(house)
    marks = list(house.store.list_documents("quarantine/"))
    older = restored_to(houses, house)
    assert older.archive.quarantine().synchronise_marks() == 0
    assert list(older.store.list_documents("quarantine/")) == marks
    older.archive.orphans().sweep(grace=timedelta(minutes=-1))
    assert older.read(first.sop_instance_uid) == second.data_set


def test_a_damaged_mark_is_not_followed(houses: Build, house: House) -> None:
    """It does not say since when: nothing is accepted by it, and the rest is done."""
    first, _ = in_conflict(house)
    keep_backup(house)
    accept_other(house)
    (mark,) = house.store.list_documents("quarantine/")
    house.store.put_document(mark, b"{}")
    older = restored_to(houses, house)
    assert older.archive.quarantine().synchronise_marks() == 1  # that of the other one is written
    assert older.read(first.sop_instance_uid) == first.data_set
    assert len(list(older.store.list_documents("quarantine/"))) == 2


def test_an_acceptance_by_an_earlier_clock_ends_the_mark(houses: Build, house: House) -> None:
    """The node that accepts the first again has a clock an hour behind: it was decided later all the same, and stays so."""
    first, _ = in_conflict(house)
    accept_other(house)
    house.database.clock = lambda: utc_now() - timedelta(hours=1)  # type: ignore[misc]
    accept_other(house)
    assert house.read(first.sop_instance_uid) == first.data_set
    assert house.archive.quarantine().synchronise_marks() == 0
    assert house.actions().count("quarantine.accepted") == 2
