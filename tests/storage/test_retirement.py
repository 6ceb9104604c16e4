"""Retiring a wrapping key: what no row knows is looked at too, what was erased stays so, and nobody's commit waits for the ring."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from datetime import timedelta

import pytest

from storage.errors import Unavailable
from storage.keys import Ring
from storage.retirement import Retirement
from tests.storage.house import House
from tests.storage.samples import photograph
from tests.storage.test_erasure import documents
from tests.storage.test_orphans import left_behind

LATER = timedelta(minutes=-1)


def retirement_of(house: House) -> Retirement:
    """Return what retires the keys of a house."""
    parts = {"database": house.database, "study_keys": house.study_keys, "ring": house.ring, "audit": house.audit}
    return Retirement(**parts, store=house.store)


def rotated(house: House) -> str:
    """Add a key and re-wrap all rows; return the former one."""
    former = house.ring.primary_key_id
    Ring.add(house.ring.path)
    house.ring.holds("")
    house.study_keys.rotate(put_document=house.store.put_document, delete_document=house.store.delete_document)
    return former


def test_an_orphan_stays_readable(either_house: House) -> None:
    """An object without a row lies under a key whose document the rotation did not see: retired, it is adopted all the same."""
    house, sample, archived = either_house, photograph(), photograph()
    left_behind(house, sample)
    house.ingest(archived)
    former = rotated(house)
    assert retirement_of(house).retire(former) == 1
    assert former not in [key.key_id for key in Ring.shown(house.ring.path)]
    named = {json.loads(house.store.get_document(name))["wrapping_key_id"] for name in documents(house)}
    assert named == {house.ring.primary_key_id}
    assert house.archive.orphans().sweep(grace=LATER).adopted == 1
    for one in (sample, archived):
        assert house.read(one.sop_instance_uid) == one.data_set


def test_what_was_erased_is_not_wrapped_anew(house: House) -> None:
    """The document of an erased study that could not be deleted goes when its key is retired: it must open nothing any more."""
    sample = photograph()
    house.ingest(sample)
    (name,) = documents(house)
    content = house.store.get_document(name)
    house.archive.erasure().erase_study(sample.study_instance_uid, actor="operator", reason="asked for")
    house.store.put_document(name, content)  # the store was away when it was to be deleted
    former = rotated(house)
    assert retirement_of(house).retire(former) == 0
    assert documents(house) == []


def test_damaged_documents_keep_no_key(house: House) -> None:
    """What no key opens is passed over; a key that rows need, the primary and an unknown one are refused."""
    left_behind(house, photograph())
    house.ingest(photograph())
    name = f"keys/00/{'0' * 32}"
    house.store.put_document(name, b"{}")
    former = house.ring.primary_key_id
    Ring.add(house.ring.path)
    house.ring.holds("")
    with pytest.raises(Unavailable, match="keys rotate"):
        retirement_of(house).retire(former)
    with pytest.raises(Unavailable, match="primary"):
        retirement_of(house).retire(house.ring.primary_key_id)
    with pytest.raises(Unavailable, match="no key"):
        retirement_of(house).retire("0" * 16)
    house.study_keys.rotate(put_document=house.store.put_document, delete_document=house.store.delete_document)
    assert retirement_of(house).retire(former) == 1
    assert house.store.get_document(name) == b"{}"


@pytest.mark.parametrize("row_damaged", [False, True], ids=["late", "row-damaged"])
def test_a_document_that_its_row_vouches_for_is_looked_at_too(either_house: House, *, row_damaged: bool) -> None:
    """An older document was put over the newer one, by a process that is gone: none stays under the key that goes, a damaged row or not."""
    house = either_house
    house.ingest(photograph())
    (name,) = documents(house)
    older = house.store.get_document(name)
    former = rotated(house)
    house.store.put_document(name, older)
    if row_damaged:
        house.database.write(lambda connection: connection.exec_driver_sql("UPDATE study_keys SET wrapped = 'AAAA'"))
    assert retirement_of(house).retire(former) == 1
    key = house.study_keys.from_document(house.store.get_document(name))
    assert key.wrapping_key_id == house.ring.primary_key_id
    assert row_damaged or house.study_keys.get(key.id).wrapped == key.wrapped


def test_nobodys_commit_waits_for_the_ring(house: House) -> None:
    """While another command holds the ring (it waits for a key service, say), retiring waits, and the archive goes on."""
    former = rotated(house)
    descriptor = os.open(house.ring.path.parent, os.O_RDONLY | os.O_DIRECTORY)
    retiring = threading.Thread(target=house.study_keys.retire, args=(former,))
    ingesting = threading.Thread(target=house.ingest, args=(photograph(),), daemon=True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        retiring.start()
        retiring.join(0.5)
        ingesting.start()
        ingesting.join(30)
        assert not ingesting.is_alive()
        assert retiring.is_alive()
    finally:
        os.close(descriptor)
        retiring.join(30)
    assert former not in [key.key_id for key in Ring.shown(house.ring.path)]
