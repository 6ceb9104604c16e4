"""Claims on study keys: every process finds them, an erased one is gone everywhere, changing the wrapping key loses none, killed or not."""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, select, update

from storage.database import Database
from storage.errors import InstanceNotFound, IntegrityError, Unavailable
from storage.failpoints import VARIABLE
from storage.keys import Ring
from storage.kms import KmsKey
from storage.objects import DirectoryStore
from storage.study_keys import STUDY_KEYS, StudyKey, StudyKeys, document_name
from tests.storage.key_service import key_service, moto_server
from tests.storage.support import open_database

STUDY, OTHER = "1.2.3.4", "1.2.3.5"


@dataclass
class Site:
    """A ring, a table and a store; each `node` is a process of its own as far as keys are concerned."""

    database: Database
    path: Path
    store: DirectoryStore
    now: list[float] = field(default_factory=lambda: [0.0])

    def node(self, **options: Any) -> StudyKeys:
        """Start a process."""
        ring = Ring.load(self.path, look_every_s=options.pop("look_every_s", 0.0))
        return StudyKeys(database=self.database, ring=ring, monotonic=lambda: self.now[0], **options)

    def admit(self, keys: StudyKeys, study: str = STUDY, *, stored: bool = False) -> tuple[str, bytes, bytes]:
        """Seal something under the study's current key and admit it: study key id, wrapped data key, data key."""
        key, data_key = keys.current(study), os.urandom(32)
        if stored:
            self.store.put_document(document_name(key.id), keys.document(key))
        self.database.write(lambda connection: keys.store_in(connection, key, stored=stored))
        return key.id, keys.wrap_data_key(key, data_key), data_key

    def rotate(self, keys: StudyKeys, **options: Any) -> int:
        """Rotate with the documents of the store."""
        return keys.rotate(**options, put_document=self.store.put_document, delete_document=self.store.delete_document)

    def publish(self, keys: StudyKeys, study_key_id: str) -> None:
        """Publish one key."""
        keys.publish(study_key_id, put_document=self.store.put_document, delete_document=self.store.delete_document)

    def shred(self, keys: StudyKeys, study: str = STUDY) -> list[str]:
        """Erase a study's keys as the archive does."""
        ids = self.database.write(lambda connection: keys.forget_in(connection, study))
        for study_key_id in ids:
            self.store.delete_document(document_name(study_key_id))
        return ids

    def rows(self) -> dict[str, Any]:
        """Return the table by id."""
        with self.database.read() as connection:
            return {row.id: row for row in connection.execute(select(STUDY_KEYS))}

    def documents(self) -> dict[str, bytes]:
        """Return the store's documents by study key id."""
        return {name.rsplit("/", 1)[1]: self.store.get_document(name) for name in self.store.list_documents("keys/")}

    def alter(self, study_key_id: str, **values: Any) -> None:
        """Damage a row."""
        self.database.write(
            lambda connection: connection.execute(update(STUDY_KEYS).where(STUDY_KEYS.c.id == study_key_id).values(**values))
        )


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Site:
    """An empty site with a ring of one file key."""
    Ring.create(tmp_path / "ring.json")
    return Site(database, tmp_path / "ring.json", DirectoryStore(tmp_path / "objects"))


# --- making and finding -----------------------------------------------------------------------------------------------


def test_one_key_for_a_study(site: Site) -> None:
    """The key of a study is made once, found by every process, and other studies have others."""
    one, two = site.node(), site.node()
    admitted = site.admit(one)
    assert site.admit(one)[0] == admitted[0] == two.current(STUDY).id
    assert one.current(OTHER).id != admitted[0]
    assert two.unwrap(*admitted[:2]) == admitted[2]
    assert set(site.rows()) == {admitted[0]}
    assert site.rows()[admitted[0]].stored == 0
    assert one.counts() == {Ring.load(site.path).primary_key_id: 1}


def test_a_rush_makes_one_key(site: Site) -> None:
    """Many threads that begin a study at once in one process share the key."""
    keys = site.node()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(keys.current(STUDY).id)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1


def test_two_processes_may_make_one_each(site: Site) -> None:
    """Two processes that begin a study at once make a key each; both open, and from then on all seal under the older."""
    one, two = site.node(), site.node()
    one.current(STUDY)
    two.current(STUDY)
    first, second = site.admit(one), site.admit(two)
    assert first[0] != second[0]
    for keys in (one, two, site.node()):
        for study_key_id, wrapped, data_key in (first, second):
            assert keys.unwrap(study_key_id, wrapped) == data_key
    assert {key.id for key in one.all_of(STUDY)} == {first[0], second[0]}
    site.now[0] += 61
    assert one.current(STUDY).id == two.current(STUDY).id == one.all_of(STUDY)[0].id


def test_opened_before_it_is_admitted(site: Site) -> None:
    """What this process sealed opens here before its row is there, however long that takes; no other process opens it."""
    keys = site.node()
    key = keys.current(STUDY)
    wrapped = keys.wrap_data_key(key, bytes(32))
    site.now[0] += 10_000
    assert keys.unwrap(key.id, wrapped) == bytes(32)
    with pytest.raises(IntegrityError, match="no such study key"):
        site.node().unwrap(key.id, wrapped)


def test_rolled_back_is_not_stored(site: Site) -> None:
    """A transaction that fails leaves no row, and the next one admits the same key."""
    keys = site.node()
    key = keys.current(STUDY)

    def work(connection: Any) -> None:
        keys.store_in(connection, key)
        raise RuntimeError("something else failed")

    with pytest.raises(RuntimeError):
        site.database.write(work)
    assert not site.rows()
    assert site.admit(keys)[0] == key.id


def test_nothing_secret_is_shown(site: Site) -> None:
    """A key in a log or traceback shows no secret."""
    key = site.node().current(STUDY)
    assert repr(key.secret) not in repr(key)
    assert repr(key.wrapped) not in repr(key)


def test_damaged_rows(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A row that was changed is refused; new instances of the study get a new key, and the log says why."""
    admitted = site.admit(site.node())
    other = site.admit(site.node(), OTHER)
    rows = site.rows()
    for values in (
        {"wrapped": "?"},
        {"wrapped": base64.b64encode(bytes(40)).decode()},
        {"wrapped": rows[other[0]].wrapped},
        {"wrapping_key_id": "0" * 15},
    ):
        site.alter(admitted[0], **{"wrapped": rows[admitted[0]].wrapped, "wrapping_key_id": rows[admitted[0]].wrapping_key_id, **values})
        keys = site.node()
        with pytest.raises(IntegrityError):
            keys.unwrap(*admitted[:2])
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            assert keys.current(STUDY).id != admitted[0]
        assert "study_key.damaged" in caplog.text


# --- erasing ----------------------------------------------------------------------------------------------------------


def test_erased_here_and_everywhere(site: Site) -> None:
    """An erased key opens nothing at once where it was erased, and elsewhere when the cache's time is over; other studies go on."""
    here, there = site.node(), site.node()
    admitted, other = site.admit(here, stored=True), site.admit(here, OTHER)
    assert there.unwrap(*admitted[:2]) == admitted[2]
    site.now[0] += 59  # use does not prolong
    assert there.unwrap(*admitted[:2]) == admitted[2]
    assert site.shred(here) == [admitted[0]]
    with pytest.raises(IntegrityError, match="erased"):
        here.unwrap(*admitted[:2])
    assert there.unwrap(*admitted[:2]) == admitted[2]
    site.now[0] += 1
    with pytest.raises(IntegrityError, match="erased"):
        there.unwrap(*admitted[:2])
    with pytest.raises(InstanceNotFound):
        site.store.get_document(document_name(admitted[0]))
    assert there.unwrap(*other[:2]) == other[2]


@pytest.mark.parametrize("where", ["here", "there", "evicted"])
def test_an_erased_key_never_comes_back(site: Site, where: str) -> None:
    """What was sealed under a key before it was erased is not admitted after: the key would come back. Trying again works."""
    here, there = site.node(), site.node(cache_keys=1)
    site.admit(here)
    keys = here if where == "here" else there
    key = keys.current(STUDY)
    if where == "evicted":
        keys.current(OTHER)
    site.shred(here)
    with pytest.raises(Unavailable, match="send it again"):
        site.database.write(lambda connection: keys.store_in(connection, key))
    assert not site.rows()
    again = site.admit(keys)
    assert again[0] != key.id
    assert site.node().unwrap(*again[:2]) == again[2]


def test_erased_in_the_same_commit(site: Site) -> None:
    """Admitted, erased and admitted again in one group commit: the third is refused."""
    keys = site.node()
    key = keys.current(STUDY)

    def work(connection: Any) -> None:
        keys.store_in(connection, key)
        keys.forget_in(connection, STUDY)
        keys.store_in(connection, key)

    with pytest.raises(Unavailable, match="send it again"):
        site.database.write(work)


def test_an_erased_key_is_not_published(site: Site) -> None:
    """A document that is put while its key is erased is taken back."""
    keys = site.node()
    study_key_id = site.admit(keys)[0]
    site.now[0] += 61

    def put(name: str, content: bytes) -> None:
        site.shred(keys)
        site.store.put_document(name, content)

    with pytest.raises(IntegrityError):
        keys.publish(study_key_id, put_document=put, delete_document=site.store.delete_document)
    assert not site.documents()


# --- documents --------------------------------------------------------------------------------------------------------


def test_documents_bring_the_table_back(site: Site) -> None:
    """From the documents alone the table is rebuilt to the last column, and everything opens."""
    keys = site.node()
    admitted = [site.admit(keys, f"1.2.{number}") for number in range(5)]
    for study_key_id, _, _ in admitted:
        site.publish(keys, study_key_id)
    before = site.rows()
    assert all(row.stored for row in before.values())
    documents = site.documents()
    site.database.write(lambda connection: connection.execute(delete(STUDY_KEYS)))
    fresh = site.node()
    for content in documents.values():
        key = fresh.from_document(content)
        site.database.write(lambda connection, key=key: fresh.restore_in(connection, key))
        site.database.write(lambda connection, key=key: fresh.restore_in(connection, key))
    assert site.rows() == before
    for study_key_id, wrapped, data_key in admitted:
        assert fresh.unwrap(study_key_id, wrapped) == data_key


def test_documents_tell_nothing(site: Site) -> None:
    """Neither the study's UID nor the key is readable in a document."""
    keys = site.node()
    study = "1.2.826.0.1.3680043.8.498.4711"
    key = keys.current(study)
    content = keys.document(key)
    for secret in (study.encode(), base64.b64encode(study.encode()), key.secret, base64.b64encode(key.secret)):
        assert secret not in content
    assert keys.document(key) == content


def test_every_change_of_a_document_is_refused(site: Site) -> None:
    """No field of a document is free to change, nor is its form; what is refused is a sentence without its content."""
    keys = site.node()
    key, other = keys.current(STUDY), keys.current(OTHER)
    content = json.loads(keys.document(key))
    elsewhere = json.loads(keys.document(other))
    variants: list[bytes] = [b"", b"null", b"[]", b"{}", b"\xff", json.dumps(content).encode()[:-5], b"[" * 100_000]
    for name in content:
        for value in ("", "0", "A" * 32, 1, None, [], {}, elsewhere[name] if name not in {"format", "wrapping_key_id"} else "x"):
            variants.append(json.dumps({**content, name: value}).encode())
        variants.append(json.dumps({other_name: value for other_name, value in content.items() if other_name != name}).encode())
    for variant in variants:
        with pytest.raises(IntegrityError):
            keys.from_document(variant)
    assert keys.from_document(keys.document(key)).study_instance_uid == STUDY


def test_publishing_beside_a_rotation(site: Site) -> None:
    """A document that was on its way while its key was re-wrapped is replaced by the new one."""
    keys = site.node()
    study_key_id = site.admit(keys)[0]
    Ring.add(site.path)
    site.now[0] += 61
    times = []

    def put(name: str, content: bytes) -> None:
        if not times:
            times.append(site.rotate(site.node()))
        site.store.put_document(name, content)

    site.alter(study_key_id, stored=0)
    keys.publish(study_key_id, put_document=put, delete_document=site.store.delete_document)
    assert times == [1]
    row = site.rows()[study_key_id]
    assert json.loads(site.documents()[study_key_id])["wrapped"] == row.wrapped
    assert row.stored == 1


def test_older_document_stored_beside_a_rotation(site: Site) -> None:
    """An archive that put a document of before the rotation records that it must be put again; the duty does so."""
    keys = site.node()
    site.admit(keys, stored=True)
    key = keys.current(STUDY)
    Ring.add(site.path)
    site.rotate(site.node())
    site.store.put_document(document_name(key.id), keys.document(key))
    site.database.write(lambda connection: keys.store_in(connection, key, stored=True))
    assert site.rows()[key.id].stored != 1
    assert site.node().publish_all(put_document=site.store.put_document, delete_document=site.store.delete_document) == 1
    row = site.rows()[key.id]
    assert row.stored == 1
    assert json.loads(site.documents()[key.id])["wrapped"] == row.wrapped


def test_published_once(site: Site) -> None:
    """Publishing a key whose document is there asks neither store nor, for a while, the table."""
    keys = site.node()
    study_key_id = site.admit(keys)[0]
    site.publish(keys, study_key_id)

    def never(*_: object) -> None:
        raise AssertionError

    keys.publish(study_key_id, put_document=never, delete_document=never)
    site.node().publish(study_key_id, put_document=never, delete_document=never)
    assert keys.current(STUDY).stored
    assert site.node().publish_all(put_document=never, delete_document=never) == 0
    assert keys.known([study_key_id, "0" * 32]) == {study_key_id}


# --- changing the wrapping key ----------------------------------------------------------------------------------------


def test_rotate_and_retire(site: Site) -> None:
    """All keys come under the new wrapping key, documents too; the old one is refused to go before and goes after."""
    keys = site.node()
    old_id = Ring.load(site.path).primary_key_id
    admitted = [site.admit(keys, f"1.2.{number}", stored=number % 2 == 0) for number in range(150)]
    new_id = Ring.add(site.path)
    with pytest.raises(Unavailable, match="keys rotate"):
        keys.retire(old_id)
    assert not keys.unused(old_id)
    seen: list[tuple[int, int]] = []
    assert site.rotate(keys, progress=lambda done, total: seen.append((done, total))) == 150
    assert seen == sorted(seen)
    assert seen[-1] == (150, 150)
    assert keys.counts() == {new_id: 150}
    assert keys.unused(old_id)
    assert site.rotate(keys) == 0
    keys.retire(old_id)
    with pytest.raises(Unavailable, match="is the primary key"):
        site.node().retire(new_id)
    last = site.node()
    for study_key_id, wrapped, data_key in admitted:
        assert last.unwrap(study_key_id, wrapped) == data_key
    rows = site.rows()
    assert set(site.documents()) == set(rows)
    for study_key_id, content in site.documents().items():
        assert json.loads(content)["wrapped"] == rows[study_key_id].wrapped
        assert last.from_document(content).id == study_key_id


def test_a_key_made_before_is_not_admitted_after_retirement(site: Site) -> None:
    """A process with an older ring in memory cannot bring in a row under a key that was removed meanwhile."""
    keys = site.node(look_every_s=3600.0)
    old_id = Ring.load(site.path).primary_key_id
    key = keys.current(STUDY)
    Ring.add(site.path)
    site.node().retire(old_id)
    with pytest.raises(Unavailable, match="send it again"):
        site.database.write(lambda connection: keys.store_in(connection, key))
    admitted = site.admit(keys)
    assert site.node().unwrap(*admitted[:2]) == admitted[2]


def test_a_key_that_was_never_admitted_is_made_anew(site: Site) -> None:
    """After the ring changed, no new study begins under the former wrapping key."""
    keys = site.node()
    first = keys.current(STUDY)
    new_id = Ring.add(site.path)
    second = keys.current(STUDY)
    assert second.id != first.id
    assert second.wrapping_key_id == new_id


def test_rotate_passes_over_a_damaged_key(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """One damaged row does not stop the rest, is named, and keeps its wrapping key from going."""
    keys = site.node()
    old_id = Ring.load(site.path).primary_key_id
    ids = [site.admit(keys, f"1.2.{number}")[0] for number in range(5)]
    site.alter(ids[2], wrapped=base64.b64encode(bytes(40)).decode())
    Ring.add(site.path)
    with pytest.raises(IntegrityError, match="1 study keys"):
        site.rotate(site.node())
    assert ids[2] in [record.__dict__.get("study_key_id") for record in caplog.records]
    assert keys.counts()[old_id] == 1
    with pytest.raises(Unavailable, match="still wraps"):
        keys.retire(old_id)


def rotate_and_spoil(site: Site, keys: StudyKeys) -> None:
    """Rotate into a store that replaces a good document by half of the new one, and then fails."""

    def spoil(name: str, content: bytes) -> None:
        site.store.put_document(name, content[: len(content) // 2])
        raise Unavailable("the store does not give back what it took")

    with pytest.raises(Unavailable):
        keys.rotate(put_document=spoil, delete_document=site.store.delete_document)


def test_a_document_that_the_store_spoilt_while_rotating_is_put_again(site: Site) -> None:
    """A store that replaces a good document by half of the new one, and then fails: the next round of the duty puts it right."""
    keys = site.node()
    study_key_id, wrapped, data_key = site.admit(keys, stored=True)
    Ring.add(site.path)
    rotate_and_spoil(site, keys)
    keys.publish_all(put_document=site.store.put_document, delete_document=site.store.delete_document)
    assert site.node().from_document(site.documents()[study_key_id]).id == study_key_id
    assert site.node().unwrap(study_key_id, wrapped) == data_key
    assert site.rotate(keys) == 1
    assert site.rows()[study_key_id].stored == 1


def test_who_put_no_document_does_not_vouch_for_one(site: Site) -> None:
    """What a rotation left spoilt stays in doubt when the next instance comes, whose process remembers the document of before."""
    keys = site.node()
    study_key_id, wrapped, data_key = site.admit(keys, stored=True)
    Ring.add(site.path)
    rotate_and_spoil(site, keys)
    assert site.admit(keys, stored=True)[0] == study_key_id
    assert keys.publish_all(put_document=site.store.put_document, delete_document=site.store.delete_document) == 1
    assert site.node().from_document(site.documents()[study_key_id]).id == study_key_id
    assert site.node().unwrap(study_key_id, wrapped) == data_key


@pytest.mark.parametrize("when", ["before the spoilt put", "after it"])
@pytest.mark.parametrize("known", ["before the doubt", "since the doubt"])
@pytest.mark.parametrize("who", ["a sender", "the Mover", "the duty"])
def test_nobody_vouches_for_what_a_rotation_spoils(site: Site, who: str, known: str, when: str) -> None:
    """Whoever puts a document beside a rotation that spoils it and fails, and whenever that is committed: the duty puts it again.

    They are held, by events, between what they know of the row and their commit.
    """
    keys, other = site.node(), site.node()
    study_key_id, wrapped, data_key = site.admit(keys)
    Ring.add(site.path)
    read, may_commit = threading.Event(), threading.Event()

    def put_and_wait(name: str, content: bytes) -> None:
        site.store.put_document(name, content)
        read.set()
        assert may_commit.wait(60)

    def sender() -> None:
        key = other.get(study_key_id)
        put_and_wait(document_name(key.id), other.document(key))
        site.database.write(lambda connection: other.store_in(connection, key, stored=True))

    def publish() -> None:
        other.publish(study_key_id, put_document=put_and_wait, delete_document=site.store.delete_document)

    def duty() -> None:
        other.publish_all(put_document=put_and_wait, delete_document=site.store.delete_document)

    thread = threading.Thread(target={"a sender": sender, "the Mover": publish, "the duty": duty}[who])

    def begin() -> None:
        thread.start()
        assert read.wait(60)

    def commit() -> None:
        may_commit.set()
        thread.join()

    def spoil(name: str, content: bytes) -> None:
        if known == "since the doubt":
            begin()
        if when == "before the spoilt put":
            commit()
        site.store.put_document(name, content[: len(content) // 2])
        raise Unavailable("the store does not give back what it took")

    if known == "before the doubt":
        begin()
    with pytest.raises(Unavailable, match="does not give back"):
        keys.rotate(put_document=spoil, delete_document=site.store.delete_document)
    if when == "after it":
        commit()
    keys.publish_all(put_document=site.store.put_document, delete_document=site.store.delete_document)
    assert site.node().from_document(site.documents()[study_key_id]).id == study_key_id
    assert site.node().unwrap(study_key_id, wrapped) == data_key
    assert site.rotate(keys) == 1
    row = site.rows()[study_key_id]
    assert row.stored == 1
    assert json.loads(site.documents()[study_key_id])["wrapped"] == row.wrapped


def test_an_older_document_over_that_of_a_rotation_is_replaced(site: Site) -> None:
    """A sender's document of before that comes over the rotation's, and is committed before the row changes, is replaced again."""
    keys, other = site.node(), site.node()
    study_key_id = site.admit(keys)[0]
    former = other.current(STUDY)
    Ring.add(site.path)

    def late(name: str, content: bytes) -> None:
        site.store.put_document(name, content)
        if site.rows()[study_key_id].wrapping_key_id == former.wrapping_key_id:
            site.store.put_document(name, other.document(former))
            site.database.write(lambda connection: other.store_in(connection, former, stored=True))

    assert keys.rotate(put_document=late, delete_document=site.store.delete_document) == 1
    row = site.rows()[study_key_id]
    assert json.loads(site.documents()[study_key_id])["wrapped"] == row.wrapped
    assert row.stored == 1


def test_rotate_stops_with_the_store(site: Site) -> None:
    """With the store gone a rotation ends with its reason, no row says more than the store has, and another run finishes."""
    keys = site.node()
    for number in range(100):
        site.admit(keys, f"1.2.{number}", stored=True)
    old_id = Ring.load(site.path).primary_key_id
    Ring.add(site.path)
    calls = []

    def put(name: str, content: bytes) -> None:
        calls.append(name)
        if len(calls) > 80:
            raise Unavailable("the store is gone: look at it")
        site.store.put_document(name, content)

    with pytest.raises(Unavailable, match="the store is gone"):
        keys.rotate(put_document=put, delete_document=site.store.delete_document)
    assert sum(keys.counts().values()) == 100
    assert len(keys.counts()) == 2
    left = keys.counts()[old_id]
    assert 0 < left < 100
    assert site.rotate(keys) == left
    assert list(keys.counts().values()) == [100]


def test_erased_while_rotating(site: Site) -> None:
    """A study erased between the reading of its row and the writing leaves neither row nor document."""
    keys = site.node()
    gone, kept = site.admit(keys, STUDY, stored=True), site.admit(keys, OTHER, stored=True)
    Ring.add(site.path)

    def put(name: str, content: bytes) -> None:
        if name == document_name(gone[0]):
            site.shred(keys, STUDY)
        site.store.put_document(name, content)

    assert keys.rotate(put_document=put, delete_document=site.store.delete_document) == 1
    assert set(site.rows()) == set(site.documents()) == {kept[0]}


def test_two_rotations_at_once(site: Site) -> None:
    """One that was overtaken by another, to a newer key, changes nothing: neither row nor document fall back to a key that was removed."""
    keys = site.node()
    admitted = site.admit(keys, stored=True)
    first_id = Ring.load(site.path).primary_key_id
    second_id = Ring.add(site.path)
    done = []

    def put(name: str, content: bytes) -> None:
        if not done:
            done.append(Ring.add(site.path))
            other = site.node()
            assert site.rotate(other) == 1
            other.retire(first_id)
            other.retire(second_id)
        site.store.put_document(name, content)

    assert keys.rotate(put_document=put, delete_document=site.store.delete_document) == 0
    fresh = site.node()
    assert fresh.unwrap(*admitted[:2]) == admitted[2]
    assert fresh.from_document(site.documents()[admitted[0]]).wrapping_key_id == done[0]


def test_rotation_leaves_the_newest_documents(site: Site) -> None:
    """A document of before, put by another process in the middle of a rotation, is replaced before it ends."""
    keys, other = site.node(), site.node()
    study_key_id = site.admit(keys, stored=True)[0]
    former = other.current(STUDY)
    Ring.add(site.path)

    def late(*_: int) -> None:
        site.store.put_document(document_name(study_key_id), other.document(former))
        site.database.write(lambda connection: other.store_in(connection, former, stored=True))

    assert site.rotate(keys, progress=late) == 1
    assert json.loads(site.documents()[study_key_id])["wrapped"] == site.rows()[study_key_id].wrapped
    assert site.rows()[study_key_id].stored == 1


def test_rotation_while_others_seal_and_read(site: Site) -> None:
    """While keys are re-wrapped, others seal and read without one failure; afterwards nothing uses the old key and all opens."""
    keys = site.node()
    old_id = Ring.load(site.path).primary_key_id
    admitted = [site.admit(keys, f"1.2.{number}", stored=True) for number in range(100)]
    stop, failures = threading.Event(), []

    def run(work: Callable[[int], None]) -> threading.Thread:
        def loop() -> None:
            number = 0
            while not stop.is_set():
                try:
                    work(number)
                except Exception as error:  # noqa: BLE001 - whatever it is fails the test
                    failures.append(error)
                number += 1

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    sealer, reader = site.node(look_every_s=0.02, cache_s=0.0), site.node(cache_s=0.0)

    def seal(number: int) -> None:
        admitted.append(site.admit(sealer, f"1.3.{number % 100}"))

    def read(number: int) -> None:
        study_key_id, wrapped, data_key = admitted[number * 7 % len(admitted)]
        assert reader.unwrap(study_key_id, wrapped) == data_key

    threads = [run(seal), run(read), run(read)]
    try:
        for _ in range(3):
            Ring.add(site.path)
            assert site.rotate(site.node()) > 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    last = site.node()
    site.rotate(last)
    for info in Ring.shown(site.path):
        if not info.primary:
            last.retire(info.key_id)
    assert len(Ring.shown(site.path)) == 1
    assert old_id not in last.counts()
    fresh = site.node()
    for study_key_id, wrapped, data_key in admitted:
        assert fresh.unwrap(study_key_id, wrapped) == data_key


_ROTATING = """
import os, sys
from pathlib import Path
from storage.database import Database
from storage.failpoints import failpoint_from_environment
from storage.keys import Ring
from storage.objects import DirectoryStore
from storage.study_keys import StudyKeys
folder = Path(sys.argv[1])
database = Database(url=f"sqlite:///{folder / 'node.db'}", key=bytes(range(32)))
store = DirectoryStore(folder / "objects")
keys = StudyKeys(database=database, ring=Ring.load(folder / "ring.json"), reach=failpoint_from_environment(os.environ))
keys.rotate(put_document=store.put_document, delete_document=store.delete_document)
database.close()
"""


def test_killed_while_rotating(template_database: Path, tmp_path: Path) -> None:
    """Killed at each step, again and again, a rotation loses nothing: rows and documents open, and the next run finishes."""
    (tmp_path / "node.db").write_bytes(template_database.read_bytes())
    Ring.create(tmp_path / "ring.json")
    database = open_database(tmp_path)
    site = Site(database, tmp_path / "ring.json", DirectoryStore(tmp_path / "objects"))
    keys = site.node()
    admitted = [site.admit(keys, f"1.2.{number}", stored=number % 3 > 0) for number in range(150)]
    old_id = Ring.load(site.path).primary_key_id
    Ring.add(site.path)
    left = []
    for failpoint in ("wrapped:1", "document:1", "row:1", "wrapped:10", "document:20", "row:1", "document:5"):
        process = subprocess.run(
            [sys.executable, "-c", _ROTATING, str(tmp_path)],
            env={**os.environ, VARIABLE: f"rotate.{failpoint}"},
            check=False,
            capture_output=True,
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        fresh = site.node()
        for study_key_id, wrapped, data_key in admitted:
            assert fresh.unwrap(study_key_id, wrapped) == data_key
        for study_key_id, content in site.documents().items():
            assert fresh.from_document(content).id == study_key_id
        left.append(fresh.counts()[old_id])
    assert left == sorted(left, reverse=True)
    assert 0 < left[-1] < left[0] == 150
    subprocess.run([sys.executable, "-c", _ROTATING, str(tmp_path)], check=True)
    last = site.node()
    last.retire(old_id)
    rows = site.rows()
    assert {study_key_id: json.loads(content)["wrapped"] for study_key_id, content in site.documents().items()} == {
        study_key_id: row.wrapped for study_key_id, row in rows.items()
    }
    fresh = site.node()
    for study_key_id, wrapped, data_key in admitted:
        assert fresh.unwrap(study_key_id, wrapped) == data_key
    database.close()


STEPS = ("admit", "admit", "admit stored", "publish", "shred", "add", "promote", "rotate", "retire", "wait", "restart")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2), st.integers(0, 3)), min_size=5, max_size=40))
def test_any_order_of_events(site: Site, steps: list[tuple[str, int, int]]) -> None:
    """Whatever three processes do in whatever order: what was admitted opens until it is erased and never after, documents as rows."""
    site.database.write(lambda connection: connection.execute(delete(STUDY_KEYS)))
    for name in list(site.store.list_documents("keys/")):
        site.store.delete_document(name)
    nodes = [site.node() for _ in range(3)]
    living: dict[str, list[tuple[str, bytes, bytes]]] = {}
    erased: list[tuple[str, bytes, bytes]] = []
    for step, node, choice in steps:
        keys, study = nodes[node], f"1.2.{choice}"
        key_ids = [info.key_id for info in Ring.shown(site.path)]
        match step:
            case "admit" | "admit stored":
                try:
                    admitted = site.admit(keys, study, stored=step == "admit stored")
                except Unavailable:  # once, when the key was erased or retired meanwhile: the sender tries again
                    admitted = site.admit(keys, study)
                living.setdefault(study, []).append(admitted)
            case "publish":
                for study_key_id, _, _ in living.get(study, []):
                    site.publish(keys, study_key_id)
            case "shred":
                site.shred(keys, study)
                erased += living.pop(study, [])
            case "add":
                Ring.add(site.path)
            case "promote":
                Ring.promote(site.path, key_ids[choice % len(key_ids)])
            case "rotate":
                site.rotate(keys)
            case "retire":
                with suppress(Unavailable):  # in use, or primary
                    keys.retire(key_ids[choice % len(key_ids)])
            case "wait":
                site.now[0] += 61
            case _:
                nodes[node] = site.node()
        for admitted in (one for several in living.values() for one in several):
            assert keys.unwrap(*admitted[:2]) == admitted[2]
    site.now[0] += 61
    for keys in (*nodes, site.node()):
        for admitted in (one for several in living.values() for one in several):
            assert keys.unwrap(*admitted[:2]) == admitted[2]
        for admitted in erased:
            with pytest.raises(IntegrityError):
                keys.unwrap(*admitted[:2])
    nodes[0].publish_all(put_document=site.store.put_document, delete_document=site.store.delete_document)
    rows = site.rows()
    orphans = set(site.documents()) - set(rows)
    assert not orphans & {admitted[0] for admitted in erased}
    assert {admitted[0] for several in living.values() for admitted in several} <= set(rows) <= set(site.documents())
    for study_key_id, row in rows.items():
        assert json.loads(site.documents()[study_key_id])["wrapped"] == row.wrapped


# --- with a key service -----------------------------------------------------------------------------------------------


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What moto takes."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    """One for all tests here."""
    with moto_server() as address:
        yield address


@pytest.mark.usefixtures("credentials")
def test_key_service_away(site: Site, moto: tuple[str, int]) -> None:
    """With the key service away, what is remembered goes on for the cache's time; then sealing and reading wait for it, and recover."""
    with key_service(moto) as service:
        Ring.add(site.path, KmsKey(service.make_key(), endpoint_url=service.url))
        keys = site.node()
        first = site.admit(keys)
        service.requests.clear()
        for _ in range(20):
            site.admit(keys)
            assert keys.unwrap(*first[:2]) == first[2]
        assert not service.requests
        service.refuse("DisabledException")
        site.now[0] += 59
        assert keys.unwrap(*first[:2]) == first[2]
        site.admit(keys)
        with pytest.raises(Unavailable, match="key service"):
            keys.current(OTHER)
        site.now[0] += 1
        with pytest.raises(Unavailable, match="key service"):
            keys.unwrap(*first[:2])
        with pytest.raises(Unavailable, match="key service"):
            keys.current(STUDY)
        service.recover()
        assert keys.unwrap(*first[:2]) == first[2]
        assert site.admit(keys)[0] == first[0]


@pytest.mark.usefixtures("credentials")
def test_from_file_key_to_key_service_and_back(site: Site, moto: tuple[str, int]) -> None:
    """A running archive moves to a key of the service and away again; nothing needs the former key after its retirement."""
    with key_service(moto) as service:
        keys = site.node()
        admitted = [site.admit(keys, f"1.2.{number}", stored=True) for number in range(10)]
        for key in (KmsKey(service.make_key(), endpoint_url=service.url), None):
            old_id = Ring.load(site.path).primary_key_id
            Ring.add(site.path, key)
            assert site.rotate(keys) == 10
            keys.retire(old_id)
            kinds = [entry["kind"] for entry in json.loads(site.path.read_text())["keys"].values()]
            assert kinds == ["kms" if key else "file"]
            fresh = site.node()
            for study_key_id, wrapped, data_key in admitted:
                assert fresh.unwrap(study_key_id, wrapped) == data_key
                assert fresh.from_document(site.documents()[study_key_id]).id == study_key_id
        service.go()
        fresh = site.node()
        assert all(fresh.unwrap(*one[:2]) == one[2] for one in admitted)
        service.come_back()


@pytest.mark.usefixtures("credentials")
def test_rotation_with_the_service_failing(site: Site, moto: tuple[str, int]) -> None:
    """A key service that refuses in the middle stops the rotation with its reason; nothing is half done, another run finishes."""
    with key_service(moto) as service:
        keys = site.node()
        admitted = [site.admit(keys, f"1.2.{number}", stored=True) for number in range(70)]
        new_id = Ring.add(site.path, KmsKey(service.make_key(), endpoint_url=service.url))

        def stop(done: int, _: int) -> None:
            if done == 64:
                service.refuse("DisabledException")

        with pytest.raises(Unavailable, match="enable it"):
            site.rotate(keys, progress=stop)
        service.recover()
        assert keys.counts()[new_id] == 64
        assert site.rotate(keys) == 6
        assert keys.counts() == {new_id: 70}
        fresh = site.node()
        assert all(fresh.unwrap(*one[:2]) == one[2] for one in admitted)


def test_secrets_of_study_keys_are_random(site: Site) -> None:
    """No two study keys share id or secret."""
    keys = site.node()
    made: list[StudyKey] = [keys.current(secrets.token_hex(4)) for _ in range(50)]
    assert len({key.id for key in made}) == len({key.secret for key in made}) == 50
    assert all(len(key.secret) == 32 for key in made)


def test_a_key_that_is_admitted_between_two_looks_is_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one sender asks for a study's new key, another one's instance brings it into the table: nobody takes it for erased."""
    keys = site.node()
    key = keys.current(STUDY)
    read, admissions = site.database.read, [key]

    @contextmanager
    def read_then_admit() -> Iterator[Connection]:
        with read() as connection:
            yield connection
        if admissions:
            admitted = admissions.pop()
            site.database.write(lambda connection: keys.store_in(connection, admitted))

    monkeypatch.setattr(site.database, "read", read_then_admit)
    assert keys.get(key.id).secret == key.secret
