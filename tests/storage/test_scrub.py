"""Scrub: whatever is lost or changed in the store is found, once a round; what lies whole elsewhere is put again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.cache import ReadCache
from storage.errors import IntegrityError
from storage.objects import DirectoryStore
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.samples import Sample, photograph
from tests.storage.test_archive import object_file, spoil


class Elsewhere(DirectoryStore):
    """A directory that counts as a journey: a bucket without its costs."""

    remote = True


@pytest.fixture
def cached(houses: Build, tmp_path: Path) -> House:
    """A node with a cache before its store."""
    return houses(store=Elsewhere(tmp_path / "house" / "objects"), cache=ReadCache(tmp_path / "house" / "cache", 1 << 30))


def some(house: House, number: int = 5) -> list[Sample]:
    """Archive a few."""
    samples = [photograph() for _ in range(number)]
    for sample in samples:
        house.ingest(sample)
        if isinstance(house.store, Elsewhere):  # a link of the cached file: a bucket's object would be a copy
            path = object_file(house, sample.sop_instance_uid)
            Path(shutil.copy(path, house.folder / "copy")).replace(path)
    return samples


def test_all_is_well(either_house: House) -> None:
    """A round over a sound archive reads everything, finds nothing and is recorded."""
    samples = some(either_house)
    read: list[int] = []
    found = either_house.archive.scrub().round(pace=read.append)
    assert (found.checked, found.missing, found.damaged, found.unindexed, found.documents) == (len(samples), 0, 0, 0, 0)
    assert sum(read) == found.byte_count > 0
    assert either_house.actions()[-1] == "archive.scrubbed"


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "swapped"])
def test_damage_is_an_alarm_once_a_round(house: House, damage: str) -> None:
    """With no copy there is nothing to heal from: the alarm is in the trail, once a round, and the object stays as it is."""
    samples = some(house)
    spoil(object_file(house, samples[2].sop_instance_uid), damage, object_file(house, samples[3].sop_instance_uid))
    for number in (1, 2):
        found = house.archive.scrub().round()
        assert (found.missing + found.damaged, found.healed) == (1, 0)
        assert house.actions().count("instance.damaged") == number


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_healed_from_the_cache(cached: House, damage: str) -> None:
    """Lost or rotten in the store, whole in the cache: put again under a new key, from the same origin, and the audit trail says so."""
    house = cached
    (sample,) = some(house, 1)
    before = house.index.find(sample.sop_instance_uid)
    spoil(object_file(house, sample.sop_instance_uid), damage, Path())
    found = house.archive.scrub().round()
    assert (found.missing + found.damaged, found.healed) == (1, 1)
    after = house.index.find(sample.sop_instance_uid)
    assert after.sealed.object_key != before.sealed.object_key
    assert (after.summary, after.origin) == (before.summary, before.origin)
    assert house.objects() == [after.sealed.object_key]
    assert house.landing_files() == []
    assert "instance.healed" in house.actions()
    assert "instance.damaged" not in house.actions()
    shutil.rmtree(house.folder / "cache")
    assert house.read(sample.sop_instance_uid) == sample.data_set
    assert house.archive.scrub().round().healed == 0
    assert house.archive.verify().intact


def test_a_rotten_copy_heals_nothing(cached: House) -> None:
    """The copy is compared before it is believed."""
    house = cached
    (sample,) = some(house, 1)
    key = house.index.find(sample.sop_instance_uid).sealed.object_key
    spoil(house.folder / "cache" / key[:2] / key, "flipped", Path())
    spoil(object_file(house, sample.sop_instance_uid), "cut", Path())
    found = house.archive.scrub().round()
    assert (found.damaged, found.healed) == (1, 0)
    assert "instance.damaged" in house.actions()


def test_a_row_that_was_changed_is_damage_too(house: House) -> None:
    """An object that opens, and is not what its row says: told."""
    some(house, 2)
    house.database.write(lambda c: c.exec_driver_sql("UPDATE instances SET sealed_sha256 = sha256 WHERE id = 1"))
    house.database.write(lambda c: c.exec_driver_sql("UPDATE instances SET sha256 = sealed_sha256 WHERE id = 2"))
    assert house.archive.scrub().round().damaged == 2


def test_a_round_goes_on_where_it_was_stopped(house: House) -> None:
    """Stopped between pages it goes on from the cursor saved last, reading nothing twice but a page; every part has its turn."""
    some(house, 3)
    cursors: list[str] = []
    whole = house.archive.scrub().round(save=cursors.append)
    assert [cursor.partition(" ")[0] for cursor in cursors] == [
        "instances", "instances", "quarantine", "listing", "keys", "keys", "audit",
    ]  # fmt: skip
    assert house.archive.scrub().round(cursors[1]).checked == 0
    assert house.archive.scrub().round(cursors[0]).checked == whole.checked == 3

    class Stopped(Exception):
        """Stops."""

    def stop(_byte_count: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        house.archive.scrub().round(pace=stop)


def test_documents_of_keys_are_as_their_rows(either_house: House) -> None:
    """A key's document that is gone or changed is put again from its row."""
    house = either_house
    some(house, 3)
    house.archive.scrub().round()
    names = list(house.store.list_documents("keys/"))
    contents = {name: house.store.get_document(name) for name in names}
    house.store.delete_document(names[0])
    house.store.put_document(names[1], b"rotten")
    assert house.archive.scrub().round().documents == 2
    assert {name: house.store.get_document(name) for name in names} == contents
    assert house.archive.scrub().round().documents == 0


def test_a_broken_trail_is_told(house: House) -> None:
    """The audit trail is walked too."""
    some(house, 2)
    house.database.write(lambda connection: connection.exec_driver_sql("UPDATE audit SET actor = 'nobody' WHERE seq = 1"))
    assert "record 1" in house.archive.scrub().round().audit_fault


def test_an_erasure_meanwhile_is_no_damage(house: House) -> None:
    """What is erased between its row's reading and its object's is neither missing nor an alarm."""
    sample, other = some(house, 2)

    def erase(_byte_count: int) -> None:
        if erasures:
            house.archive.erasure().erase_study(erasures.pop(), actor="operator", reason="")

    erasures = [other.study_instance_uid]
    found = house.archive.scrub().round(pace=erase)
    assert (found.missing, found.damaged) == (0, 0)
    assert house.read(sample.sop_instance_uid) == sample.data_set
    with pytest.raises(IntegrityError):
        house.study_keys.get("0" * 32)
