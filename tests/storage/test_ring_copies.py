"""Two nodes of one archive, each with a copy of the ring of its own: what one has and the other lacks waits, and is no damage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicomweb.errors import from_storage
from inference.worker import Worker
from storage.errors import IntegrityError, KeyNotHere, Unavailable
from storage.keys import Ring
from storage.records import JobKind, JobState
from storage.retirement import Retirement
from storage.scrub import Unread
from tests.inference import laboratory
from tests.storage.house import House, build
from tests.storage.samples import Sample, photograph
from tests.storage.test_erasure import documents
from tests.storage.test_orphans import NOW, left_behind

ALARMS = {"instance.damaged"}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[[], tuple[House, House]]]:
    """Open two nodes on one database and one store; the ring of the second is a copy."""
    opened: list[House] = []

    def make() -> tuple[House, House]:
        first = build(tmp_path / "first")
        (tmp_path / "second").mkdir()
        (tmp_path / "second" / "node.db").symlink_to(tmp_path / "first" / "node.db")
        copy_ring(first, tmp_path / "second" / "keys.json")
        second = build(tmp_path / "second", store=first.store)
        opened.extend((first, second))
        return first, second

    yield make
    for house in opened:
        house.close()


def copy_ring(house: House, to: Path) -> None:
    """Copy the ring file, as an operator does."""
    fresh = to.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_bytes(house.ring.path.read_bytes())
    fresh.rename(to)


def ahead(first: House) -> tuple[str, str]:
    """Have the first node alone wrap by a key that the second has not; return the former key and the new one."""
    former, new = first.ring.primary_key_id, Ring.add(first.ring.path)
    first.ring.holds(new)
    return former, new


def retire(house: House, key_id: str) -> int:
    """Take a key out of the ring of a node."""
    retirement = Retirement(database=house.database, study_keys=house.study_keys, ring=house.ring, audit=house.audit, store=house.store)
    return retirement.retire(key_id)


def rotate(house: House) -> int:
    """Re-wrap by the primary key of a node's ring."""
    return house.study_keys.rotate(put_document=house.store.put_document, delete_document=house.store.delete_document)


def test_a_key_is_added_everywhere_before_it_is_used(nodes: Callable[[], tuple[House, House]]) -> None:
    """Added without promotion it wraps nothing; so both nodes read all that each takes in, at every step of a rotation."""
    first, second = nodes()
    samples: list[Sample] = []

    def look() -> None:
        for house in (first, second):
            house.ring.holds("")
            samples.append(photograph())
            house.ingest(samples[-1])
        for house in (first, second):
            for sample in samples:
                assert house.read(sample.sop_instance_uid) == sample.data_set

    former = first.ring.primary_key_id
    new = Ring.add(first.ring.path, promote=False)
    look()
    assert (first.ring.primary_key_id, set(first.study_keys.counts())) == (former, {former})
    copy_ring(first, second.ring.path)
    look()
    Ring.promote(first.ring.path, new)
    look()
    assert set(first.study_keys.counts()) == {former, new}
    copy_ring(first, second.ring.path)
    rotate(first)
    look()
    retire(first, former)
    copy_ring(first, second.ring.path)
    look()
    assert set(first.study_keys.counts()) == {new}
    assert ALARMS.isdisjoint(first.actions())


def test_what_another_key_wraps_waits_for_the_ring(nodes: Callable[[], tuple[House, House]], tmp_path: Path) -> None:
    """Taken in by a node that has a key more, read by one that has not: told to try again, nobody is alarmed, and a copy mends it."""
    first, second = nodes()
    _, new = ahead(first)
    bundles = laboratory.write_laboratory(tmp_path / "bundles")
    uid = laboratory.ingest(first, laboratory.photograph()).sop_instance_uid
    with pytest.raises(KeyNotHere, match=f"lacks key {new}.*copy the ring") as refused:
        second.read(uid)
    assert (refused.value.retryable, from_storage(refused.value).status) == (True, 503)
    worker: Worker = laboratory.worker_of(second, laboratory.pipeline_of(bundles))
    assert worker.work_once()
    (job,) = second.queue.jobs_of(uid)
    assert (job.kind, job.state, job.attempts) == (JobKind.ANALYSE, JobState.READY, 0)
    assert new in job.reason
    assert ALARMS.isdisjoint(first.actions())
    copy_ring(first, second.ring.path)
    second.read(uid)


def test_a_node_behind_goes_on_taking_in(nodes: Callable[[], tuple[House, House]], caplog: pytest.LogCaptureFixture) -> None:
    """Further instances of a study whose key it cannot open it seals under one of its own: the other node, which has both, reads all."""
    first, second = nodes()
    former, new = ahead(first)
    here = photograph()
    first.ingest(here)
    there = photograph(study=here.study_instance_uid)
    with caplog.at_level(logging.WARNING):
        second.ingest(there)
    assert "study_key.not_here" in caplog.text
    assert "study_key.damaged" not in caplog.text
    assert first.study_keys.counts() == {former: 1, new: 1}
    for sample in (here, there):
        assert first.read(sample.sop_instance_uid) == sample.data_set


def test_a_document_that_is_there_needs_no_key(nodes: Callable[[], tuple[House, House]]) -> None:
    """The Mover of a node behind asks for the key's document before each object: one that the row vouches for is not put, nor opened."""
    first, second = nodes()
    ahead(first)
    sample = photograph()
    first.ingest(sample)
    key_id = first.index.find(sample.sop_instance_uid).sealed.key_id

    def never(*_: object) -> None:
        pytest.fail("the document was touched")

    second.study_keys.publish(key_id, put_document=never, delete_document=never)


def test_care_by_a_node_behind(nodes: Callable[[], tuple[House, House]]) -> None:
    """Scrub, check and sweep by a node that lacks a key: what they cannot open they count and leave, and look at all the rest."""
    first, second = nodes()
    ahead(first)
    many = [photograph() for _ in range(20)]
    for sample in many[:-1]:
        first.ingest(sample)
    second.ingest(many[-1])
    orphan = photograph()
    left_behind(first, orphan)
    found = second.archive.scrub().round()
    assert (found.checked, found.damaged, found.missing, found.documents) == (1, 0, 0, 0)
    assert found.unreadable == 19 + 19  # objects, and the documents of their keys
    report = second.archive.verify()
    assert (report.checked, len(report.unreadable), report.damaged, report.missing) == (1, 19, {}, [])
    swept = second.archive.orphans().sweep(grace=NOW)
    assert (swept.waiting, swept.adopted, swept.deleted, swept.documents) == (2, 0, 0, 0)  # the object, and its key's document
    assert len(documents(first)) == 21
    assert ALARMS.isdisjoint(first.actions())
    copy_ring(first, second.ring.path)
    assert second.archive.scrub().round().unreadable == 0
    assert second.archive.orphans().sweep(grace=NOW).adopted == 1
    assert second.read(orphan.sop_instance_uid) == orphan.data_set


def test_a_node_behind_neither_ends_a_rotation_nor_retires(nodes: Callable[[], tuple[House, House]]) -> None:
    """Its rotation does what it can and says what it lacks; its ring, made smaller and copied, would lose the key of the other node."""
    first, second = nodes()
    _, new = ahead(first)
    first.ingest(photograph())
    former, own = ahead(second)
    second.ingest(photograph())
    with pytest.raises(KeyNotHere, match=f"1 study keys keep.*{new}"):
        rotate(second)
    with pytest.raises(KeyNotHere, match=rf"\({new}\).*not the newest"):
        retire(second, former)
    assert former in [key.key_id for key in Ring.shown(second.ring.path)]
    with pytest.raises(KeyNotHere, match=f"1 study keys keep.*{own}"):
        rotate(first)
    assert first.study_keys.counts() == {new: 1, own: 1}


def test_a_key_that_is_there_and_does_not_open_is_damage(nodes: Callable[[], tuple[House, House]]) -> None:
    """Only the want of a key is told so: bytes that the key there did not wrap, and an id that is none, stay an alarm."""
    first, _ = nodes()
    key_id, _, wrapped = first.ring.generate("0" * 32)
    for wrapping_key_id, bytes_ in ((key_id, wrapped[::-1]), ("", wrapped), ("x" * 16, wrapped)):
        with pytest.raises(IntegrityError):
            first.ring.unwrap(wrapping_key_id, bytes_, "0" * 32)


def test_want_of_keys_is_no_absence_of_the_store() -> None:
    """However many objects in a row want a key, what comes after them is looked at; of other reasons few are enough."""
    patience = Unread()
    for _ in range(100):
        patience.note("0" * 32, KeyNotHere("the ring lacks a key"))

    def others() -> None:
        for _ in range(100):
            patience.note("0" * 32, Unavailable("the store is away"))

    with pytest.raises(Unavailable, match="away"):
        others()
