"""Races and faults that a review of the whole found: each was a way to lose, to delete or to leave lying what was acknowledged."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage.backup import BackedUp, newest
from storage.cache import ReadCache
from storage.errors import ConflictingInstance, IntegrityError, Unavailable
from storage.nodes import Incarnation, Nodes
from storage.objects import DirectoryStore, FileReader
from storage.records import Job, JobKind, JobState, Outcome
from storage.reindex import HEARD
from tests.faults.lying_s3 import LyingS3, error
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.samples import Sample, photograph
from tests.storage.test_archive import object_file
from tests.storage.test_backup import backed_up
from tests.storage.test_erasure import concluded
from tests.storage.test_mover import mover_of, store_of

HERE, THERE = "00000000000000aa", "00000000000000bb"
NOW = timedelta(minutes=-1)


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingS3]:
    """A bucket that lies when told to."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-1")
    with LyingS3() as service:
        yield service


def jobs(house: House, sample: Sample, kind: JobKind) -> list[Job]:
    """Return the jobs of a kind about a sample."""
    return [job for job in house.queue.jobs_of(sample.sop_instance_uid) if job.kind is kind]


def test_the_movers_job_stays_with_the_node_that_has_the_object(houses: Build, lying: LyingS3) -> None:
    """A twin in quarantine, landed on another node, is brought: the archived one's way into the store is not ended by that node."""
    here, there = (houses(store=store_of(lying), node_id=node) for node in (HERE, THERE))
    first = photograph()
    other = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid)
    here.ingest(first)
    with pytest.raises(ConflictingInstance):
        there.ingest(other)
    assert mover_of(there).bring_once()  # the one in quarantine
    assert {job.home for job in jobs(here, first, JobKind.ANALYSE)} == {HERE}
    while mover_of(there).bring_once():
        pass
    assert here.index.find(first.sop_instance_uid).landed_on == HERE
    assert mover_of(here).bring_once()
    assert here.index.find(first.sop_instance_uid).landed_on == ""


def test_a_movers_job_that_lost_its_home_gets_it_back(houses: Build, lying: LyingS3) -> None:
    """Claimed by a node that has not the object, it is given to the one that has."""
    here, there = (houses(store=store_of(lying), node_id=node) for node in (HERE, THERE))
    sample = photograph()
    here.ingest(sample)
    here.database.write(lambda connection: here.queue.rehome(connection, sample.sop_instance_uid, kinds=(JobKind.ARCHIVE,)))
    assert mover_of(there).bring_once()
    (job,) = jobs(here, sample, JobKind.ARCHIVE)
    assert (job.state, job.home, job.attempts) == (JobState.READY, HERE, 0)
    assert mover_of(here).bring_once()
    assert here.objects() == [here.index.find(sample.sop_instance_uid).sealed.object_key]


def test_a_sweep_with_a_wrong_clock_does_not_cost_what_is_on_its_way_in(houses: Build) -> None:
    """It takes the object between put and commit for an old orphan and adopts it: the commit finds itself, and deletes nothing."""
    armed: list[Callable[[], object]] = []

    def reach(point: str) -> None:
        if point == "directory.flushed" and armed:
            armed.pop()()

    sweeper, house = houses(), houses(reach=reach)
    sample = photograph()

    def sweep() -> None:
        with house.database.read() as connection:
            assert house.index.find_in(connection, sample.sop_instance_uid) is None
        # the key's document is in the store before the object
        assert sweeper.archive.orphans().sweep(grace=timedelta(days=-1)).adopted == 1

    armed.append(sweep)
    assert house.ingest(sample).outcome in (Outcome.STORED, Outcome.DUPLICATE)
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert house.archive.verify().intact


def test_a_store_that_was_away_keeps_the_better_copy(houses: Build, lying: LyingS3) -> None:
    """Sent again while the bucket gives nothing, the row names the landed copy; the one in the bucket stays, and is taken back."""
    house = houses(store=store_of(lying), node_id=HERE, acknowledge=lambda origin: "archive" if origin.peer == "careful" else "land")
    sample = photograph()
    house.ingest(sample, peer="careful")
    (kept,) = house.objects()
    lying.fail(error(500, "InternalError"), operation="get")
    assert house.ingest(sample, peer="quick").outcome is Outcome.STORED
    lying.heal()
    assert house.index.find(sample.sop_instance_uid).landed_on == HERE
    assert {job.home for job in jobs(house, sample, JobKind.ANALYSE)} == {HERE}
    assert house.objects() == [kept]
    assert house.archive.orphans().sweep(grace=NOW).healed == 1
    found = house.index.find(sample.sop_instance_uid)
    assert (found.landed_on, found.sealed.object_key) == ("", kept)
    assert {job.home for job in jobs(house, sample, JobKind.ANALYSE)} == {""}
    while mover_of(house).bring_once():
        pass
    assert house.objects() == [kept]
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert house.archive.verify().intact


def test_an_erased_key_does_not_come_back_after_a_commit_of_unknown_outcome(
    houses: Build, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost at the commit, which was done; another process erases the study; its next instance gets another key."""
    first, write = photograph(), house.database.write

    def lost(work: Callable[..., Any], **how: Any) -> Any:
        write(work, **how)
        monkeypatch.undo()
        raise Unavailable("the connection to the database was lost")

    def without_callbacks(*_: Any) -> None:
        """Nobody is told of a commit whose answer did not come."""

    monkeypatch.setattr(house.database, "write", lost)
    monkeypatch.setattr(house.database, "on_commit", without_callbacks)
    with pytest.raises(Unavailable):
        house.ingest(first)
    key_id = house.index.find(first.sop_instance_uid).sealed.key_id
    other = houses()
    other.archive.erasure().erase_study(first.study_instance_uid, actor="operator", reason="asked for")
    second = photograph(study=first.study_instance_uid)
    house.ingest(second)
    assert not house.study_keys.known([key_id])
    assert house.index.find(second.sop_instance_uid).sealed.key_id != key_id
    with pytest.raises(IntegrityError):
        house.study_keys.get(key_id)


def test_the_newest_backup_is_kept_whatever_the_clock_says(house: House, tmp_path: Path) -> None:
    """Made by a clock that was put back, it has the oldest name."""
    house.ingest(photograph())
    folder = tmp_path / "backup"
    for year in (2031, 2032, 2030):
        made = backed_up(house, folder, clock=partial(datetime, year, 1, 1, tzinfo=UTC), keep=2)
        assert isinstance(made, BackedUp)
        assert newest(folder)["database"] == made.database
    assert len(list(folder.glob("index-*.db"))) == 2


def test_a_bad_sector_stops_no_round(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object cannot be read at all: it is counted and the others are looked at. When none can be read, the round waits."""
    samples = [photograph() for _ in range(3)]
    for sample in samples:
        house.ingest(sample)
    bad = object_file(house, samples[0].sop_instance_uid).stat().st_ino
    read_at = FileReader.read_at

    def failing(self: FileReader, offset: int, length: int) -> bytes:
        if bad in (0, os.fstat(self._descriptor).st_ino):
            raise Unavailable("input/output error")
        return read_at(self, offset, length)

    monkeypatch.setattr(FileReader, "read_at", failing)
    found = house.archive.scrub().round()
    assert (found.checked, found.unreadable) == (2, 1)
    bad = 0
    monkeypatch.setattr("storage.scrub._UNREADABLE_IN_A_ROW", 3)
    with pytest.raises(Unavailable):
        house.archive.scrub().round()


class Elsewhere(DirectoryStore):
    """A directory that counts as a journey."""

    remote = True


def test_the_same_picture_in_the_cache_alone_is_no_duplicate(houses: Build, tmp_path: Path) -> None:
    """The archived object is gone, a cached copy is not: the same picture in another transfer syntax is not answered with success."""
    cache = ReadCache(tmp_path / "house" / "cache", 1 << 30)
    house = houses(store=Elsewhere(tmp_path / "house" / "objects"), cache=cache, pixels_equal=lambda _first, _second: True)
    first = photograph()
    house.ingest(first)
    other = photograph(sop=first.sop_instance_uid, study=first.study_instance_uid, series=first.series_instance_uid, implicit=True)
    object_file(house, first.sop_instance_uid).unlink()
    with pytest.raises(ConflictingInstance):
        house.ingest(other)


def test_a_report_is_as_safe_as_what_it_was_made_from(houses: Build, lying: LyingS3) -> None:
    """Acknowledged in the store, analysed by a node that is lost for ever: the report is in the store, and is delivered by another."""
    house = houses(store=store_of(lying), node_id=HERE, acknowledge=lambda origin: "archive" if origin.peer == "careful" else "land")
    made = {}
    for peer in ("careful", "quick"):
        sample = photograph()
        house.ingest(sample, peer=peer)
        made[peer] = concluded(house, sample)
    assert house.index.find(made["careful"]).landed_on == ""
    assert house.index.find(made["quick"]).landed_on == HERE


def test_a_ring_that_is_too_old_buries_no_object(houses: Build, lying: LyingS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's copy of the ring lacks a key: what landed waits on its disk, no alarm says that it is damaged, and it arrives later."""
    house, sample = houses(store=store_of(lying), node_id=HERE), photograph()
    house.ingest(sample)

    def closed(*_: object, **__: object) -> None:
        raise IntegrityError("a study key was wrapped by a key that is not in the ring")

    monkeypatch.setattr(house.study_keys, "publish", closed)
    assert mover_of(house).bring_once()
    (job,) = jobs(house, sample, JobKind.ARCHIVE)
    assert job.state is JobState.READY
    assert "instance.damaged" not in house.actions()
    monkeypatch.undo()
    house.archive.bring(job_now(house))
    assert house.index.find(sample.sop_instance_uid).landed_on == ""


def job_now(house: House) -> Job:
    """Claim the Mover's job when it is due."""
    deadline = time.monotonic() + 10
    while (job := house.queue.claim(JobKind.ARCHIVE, owner="test")) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return job


def test_no_node_starts_beside_a_reindex(house: House) -> None:
    """Its sweep would delete reports that are not linked yet. When the reindex is over, it starts."""
    nodes, where = Nodes(database=house.database), {"host": "one", "data_dir": "/srv/one", "version": "1"}
    first = Incarnation("first")
    house.database.write(HEARD.create)
    with pytest.raises(Unavailable, match="reindex"):
        nodes.enter(node_id=HERE, incarnation=first, **where)
    house.database.write(HEARD.drop)
    nodes.enter(node_id=HERE, incarnation=first, **where)


def test_what_is_taken_back_from_a_spool_is_brought(houses: Build, lying: LyingS3) -> None:
    """Its job ended when another copy had its place; that copy is lost, the object is taken back, and the job is ready again."""
    here, there = (houses(store=store_of(lying), node_id=node) for node in (HERE, THERE))
    sample = photograph()
    here.ingest(sample)
    first = here.index.find(sample.sop_instance_uid)
    there.ingest(sample)  # as far as it knows the object lies on another node's disk
    second = here.index.find(sample.sop_instance_uid)
    assert second.landed_on == THERE
    assert mover_of(here).bring_once()  # nothing to bring any more
    (there.folder / "landed" / second.sealed.object_key[:2] / second.sealed.object_key).unlink()
    assert there.archive.orphans().sweep_spool(grace=NOW).healed == 1
    assert {job.state for job in jobs(here, sample, JobKind.ARCHIVE)} == {JobState.READY}
    while mover_of(there).bring_once():
        pass
    found = here.index.find(sample.sop_instance_uid)
    assert (found.landed_on, found.sealed) == ("", first.sealed)
    assert here.read(sample.sop_instance_uid) == sample.data_set
