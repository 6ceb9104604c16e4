"""The drill: an empty machine, a backup, and nothing that was archived is lost, not even what came after the backup."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.backup import BackedUp, back_up, newest, restore, restore_ring
from storage.differences import differences
from storage.errors import InstanceNotFound, IntegrityError, StorageError, Unavailable
from storage.keys import Ring
from storage.objects import ObjectStore
from storage.records import JobKind, JobState
from tests.storage.conftest import Build
from tests.storage.house import House
from tests.storage.samples import photograph
from tests.storage.test_erasure import concluded
from tests.storage.test_reindex import populated

NODE = "00000000000000aa"
NEW_NODE = "00000000000000bb"


def backed_up(house: House, folder: Path, **options: Any) -> BackedUp:
    """Back a house up."""
    return back_up(
        folder,
        database=house.database,
        index=house.index,
        store=house.store,
        ring=house.ring,
        spool=house.archive._places.spool,
        **options,
    )


def brought_back(houses: Build, folder: Path, tmp_path: Path, **options: object) -> House:
    """Do the drill: an empty machine with the ring, the database and the objects of the backup."""
    target = tmp_path / "new"
    target.mkdir()
    restore_ring(folder, target / "keys.json")
    house = houses("new", **options)
    found = restore(folder, database=house.database, store=house.store, ring=house.ring, index=house.index, queue=house.queue)
    assert found.lost == []
    return house


def test_the_drill(either_house: House, houses: Build, tmp_path: Path) -> None:
    """Backed up, lost, restored: equal row for row and digest for digest; what was archived after the backup is adopted (RPO 0)."""
    house, folder = either_house, tmp_path / "backup"
    populated(house, studies=6)
    backed_up(house, folder, with_ring=True)
    later = photograph()
    house.ingest(later)
    store = {"store": house.store} if house.store.remote else {}
    again = brought_back(houses, folder, tmp_path, **store)
    if not house.store.remote:  # the objects' disk survived
        shutil.copytree(house.folder / "objects", again.folder / "objects", dirs_exist_ok=True)
    with pytest.raises(InstanceNotFound):
        again.read(later.sop_instance_uid)
    swept = again.archive.orphans().sweep(grace=timedelta(minutes=-1), restored=True)
    assert (swept.adopted, swept.deleted, swept.unreadable) == (1, 0, 0)
    assert again.read(later.sop_instance_uid) == later.data_set
    assert differences(house.database, again.database) == []
    assert again.queue.counts() == house.queue.counts()
    found = again.archive.verify()
    assert (found.intact, found.unindexed) == (True, [])


def test_only_what_is_new_is_copied(house: House, houses: Build, tmp_path: Path) -> None:
    """A second backup copies what came since; an erased study's key does not stay in the backup's documents; old databases go."""
    folder = tmp_path / "backup"
    first, second = photograph(), photograph()
    house.ingest(first)
    start = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    moments: list[Callable[[], datetime]] = [lambda number=number: start + timedelta(days=number) for number in range(3)]  # type: ignore[misc]
    made = backed_up(house, folder, clock=moments[0], keep=2)
    assert (made.objects, made.copied, made.damaged) == (1, 1, [])
    house.ingest(second)
    made = backed_up(house, folder, clock=moments[1], keep=2)
    assert (made.objects, made.copied) == (2, 1)
    house.archive.erasure().erase_study(first.study_instance_uid, actor="operator", reason="")
    backed_up(house, folder, clock=moments[2], keep=2)
    assert sorted(path.name for path in folder.glob("*.db")) == ["index-20260305T050607Z.db", "index-20260306T050607Z.db"]
    assert len(list((folder / "objects" / "keys").rglob("?" * 32))) == 1
    assert newest(folder)["database"] == "index-20260306T050607Z.db"
    assert {path.name for path in folder.iterdir()} == {"backup.json", "objects", "index-20260305T050607Z.db", "index-20260306T050607Z.db"}
    needles = [sample.sop_instance_uid.encode() for sample in (first, second)]
    for path in folder.rglob("*"):
        assert not path.is_file() or not any(needle in path.read_bytes() for needle in needles)


def test_what_is_wrong_is_said(house: House, houses: Build, tmp_path: Path) -> None:
    """No backup, no ring in it, another ring, a database in use, a damaged object: each has its sentence, and nothing is written over."""
    folder = tmp_path / "backup"
    with pytest.raises(Unavailable, match="no whole backup"):
        newest(tmp_path)
    sample = photograph()
    house.ingest(sample)
    key = house.index.find(sample.sop_instance_uid).sealed.object_key
    path = house.folder / "objects" / key[:2] / key
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert backed_up(house, folder).damaged == [key]
    path.write_bytes(content)
    assert backed_up(house, folder).damaged == []
    with pytest.raises(Unavailable, match="no key ring"):
        restore_ring(folder, tmp_path / "ring.json")
    backed_up(house, folder, with_ring=True)
    with pytest.raises(Unavailable, match="never written over"):
        restore_ring(folder, house.folder / "keys.json")
    parts = {"store": house.store, "index": house.index, "queue": house.queue}
    with pytest.raises(Unavailable, match="not empty"):
        restore(folder, database=house.database, ring=house.ring, **parts)  # type: ignore[arg-type]
    fresh = houses("fresh")
    with pytest.raises(IntegrityError):
        restore(folder, database=fresh.database, ring=Ring.create(tmp_path / "other.json"), **parts)  # type: ignore[arg-type]


def test_what_rots_in_the_backup_is_copied_anew(house: House, tmp_path: Path) -> None:
    """Flipped bytes of the right length: found at once when asked for, in sixteen runs at most otherwise; told, and mended."""
    folder = tmp_path / "backup"
    for _ in range(3):
        house.ingest(photograph())
    keys = house.objects()
    backed_up(house, folder)

    def rot(key: str) -> Path:
        path = folder / "objects" / key[:2] / key
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        return path

    paths = [rot(key) for key in sorted(keys)]
    made = backed_up(house, folder, verify=True)
    assert (made.copied, sorted(made.mended), made.damaged) == (3, sorted(keys), [])
    rot(min(keys))
    mended: list[str] = []
    verified = 0
    for _ in range(16):
        made = backed_up(house, folder)
        mended += made.mended
        verified += made.verified
    assert (mended, verified) == ([min(keys)], 2)
    assert [path.read_bytes() for path in paths] == [(house.folder / "objects" / key[:2] / key).read_bytes() for key in sorted(keys)]
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}


def test_what_is_damaged_replaces_nothing(house: House, tmp_path: Path) -> None:
    """The archive's object rots after the backup: it is told, and the good copy in the backup stays, whatever length the other has."""
    folder = tmp_path / "backup"
    house.ingest(photograph())
    (key,) = house.objects()
    backed_up(house, folder)
    source, copy = house.folder / "objects" / key[:2] / key, folder / "objects" / key[:2] / key
    source.write_bytes(source.read_bytes()[:-1])
    content = copy.read_bytes()
    copy.write_bytes(content + b"longer")
    assert backed_up(house, folder).damaged == [key]
    assert copy.read_bytes() == content + b"longer"
    copy.write_bytes(content)
    assert backed_up(house, folder, verify=True).damaged == []


def test_an_erased_study_leaves_the_backup(house: House, tmp_path: Path) -> None:
    """Its objects go with the last kept database that names them, not before; what cannot be asked keeps everything."""
    folder = tmp_path / "backup"
    stays, goes = photograph(), photograph()
    house.ingest(goes)
    (gone,) = house.objects()
    start = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)

    def run(day: int) -> tuple[int, bool]:
        made = backed_up(house, folder, keep=2, clock=lambda: start + timedelta(days=day))
        return made.removed, (folder / "objects" / gone[:2] / gone).exists()

    assert run(0) == (0, True)
    house.ingest(stays)
    house.archive.erasure().erase_study(goes.study_instance_uid, actor="operator", reason="")
    assert run(1) == (0, True)
    other = folder / "index-20260304T060000Z.db"
    other.write_bytes(b"no database of ours")
    made = backed_up(house, folder, keep=3, clock=lambda: start + timedelta(days=2))
    assert (made.removed, (folder / "objects" / gone[:2] / gone).exists()) == (0, True)
    other.unlink(missing_ok=True)
    assert run(3) == (1, False)
    assert run(4) == (0, False)
    assert len([path for path in (folder / "objects").glob("??/*") if path.is_file()]) == 1


def test_what_survived_in_the_store_is_newer(house: House, houses: Build, tmp_path: Path) -> None:
    """Restored over the folder of objects that survived: a key's document that was wrapped anew there is not replaced by the older one."""
    folder = tmp_path / "backup"
    sample = photograph()
    house.ingest(sample)
    backed_up(house, folder, with_ring=True)
    (name,) = house.store.list_documents("keys/")
    house.store.put_document(name, b"newer")
    target = tmp_path / "new"
    target.mkdir()
    restore_ring(folder, target / "keys.json")
    again = houses("new", store=house.store)
    restore(folder, database=again.database, store=again.store, ring=again.ring, index=again.index, queue=again.queue)
    assert house.store.get_document(name) == b"newer"


def test_a_backup_is_a_folder(house: House, tmp_path: Path) -> None:
    """Onto a file, or below one: a sentence that names the file, which stays as it is."""
    file = tmp_path / "backup.tar"
    file.write_bytes(b"mine")
    for place in (file, file / "below"):
        with pytest.raises(Unavailable, match=r"backup\.tar is a file, and a backup is a folder"):
            backed_up(house, place)
    assert file.read_bytes() == b"mine"


def test_a_backup_lies_beside_the_node(house: House, tmp_path: Path) -> None:
    """Into the node's own folder, or below it, also by a link: a sentence that names both, and not a file is touched."""
    sample = photograph()
    house.ingest(sample)
    (tmp_path / "link").symlink_to(house.folder)
    before = sorted(house.folder.rglob("*"))
    for place in (house.folder, house.folder / "backups", tmp_path / "link" / "new", tmp_path / "x" / ".." / "house"):
        with pytest.raises(StorageError, match=r"where the node keeps the archive itself.+Name a folder on another disk"):
            backed_up(house, place, data_dir=house.folder)
    assert sorted(house.folder.rglob("*")) == before
    backed_up(house, tmp_path / "house 2", data_dir=house.folder)


def test_what_had_landed_on_the_lost_node(houses: Build, s3_store: ObjectStore, tmp_path: Path) -> None:
    """Objects on the lost disk alone are in the backup, and come into the store; one that was moved after the backup is found there."""
    house, folder = houses(store=s3_store, node_id=NODE), tmp_path / "backup"
    stays, moved = photograph(), photograph()
    house.ingest(stays)
    house.ingest(moved)
    made = concluded(house, stays)
    assert backed_up(house, folder, with_ring=True).landed == 3
    while (job := house.queue.claim(JobKind.ARCHIVE, owner="mover")) is not None:
        if job.sop_instance_uid == moved.sop_instance_uid:
            house.archive.bring(job)
    again = brought_back(houses, folder, tmp_path, store=s3_store, node_id=NEW_NODE)
    for sample in (stays, moved):
        assert again.read(sample.sop_instance_uid) == sample.data_set
    assert again.index.find(made).landed_on == ""
    assert again.queue.claim(JobKind.DELIVER, owner="courier") is not None
    job = again.queue.claim(JobKind.ARCHIVE, owner="mover")
    while job is not None:
        assert again.archive.bring(job) == 0
        job = again.queue.claim(JobKind.ARCHIVE, owner="mover")
    assert again.queue.counts()[JobKind.ARCHIVE, JobState.READY] == 0
    assert again.study_keys.publish_all(put_document=s3_store.put_document, delete_document=s3_store.delete_document) >= 1
    assert again.archive.verify().intact
