"""`dicom-node keys`, typed: a key is used when every node can have it, nothing is advised that loses an archive, and all is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dicom_node import config, environment, node, storehouse
from dicom_node.cli import app
from dicom_node.errors import StartError
from storage.actor import operator
from storage.database import Database
from storage.errors import KeyNotHere, StorageError
from storage.keys import Ring
from storage.kms import KmsKey
from storage.records import AuditEvent
from storage.ring_identity import SUBJECT
from storage.study_key import read_document
from tests.storage.house import origin_of
from tests.storage.key_service import KeyService, key_service, moto_server
from tests.storage.samples import photograph

Type = Callable[..., Result]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Type a command in a data folder that is empty yet."""
    monkeypatch.setenv("DICOM_NODE_NODE__DATA_DIR", str(tmp_path))
    return lambda *words: CliRunner().invoke(app, words)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyService]:
    """A key service of which the configuration names no key yet, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    with moto_server() as address, key_service(address) as service:
        monkeypatch.setenv("DICOM_NODE_KEYS__RING", "kms")
        monkeypatch.setenv("DICOM_NODE_KEYS__KMS_ENDPOINT_URL", service.url)
        yield service


def prepare() -> Path:
    """Make the database, as a first start does; return the ring's file."""
    settings = config.load(None)
    database = storehouse.open_database(settings, Ring.load(settings.ring_file))
    database.migrate()
    database.close()
    return settings.ring_file


def recorded() -> list[AuditEvent]:
    """Return what the audit trail holds."""
    with storehouse.storage(config.load(None)) as parts:
        return [entry.event for entry in parts.audit.entries()]


def test_a_rotation_step_by_step(typed: Type) -> None:
    """`add` uses nothing; `promote`, `rotate` and `remove` do the rest; each stands in the audit trail, with who did it."""
    assert typed("keys", "init").exit_code == 0
    path = prepare()
    (first,) = Ring.shown(path)
    added = typed("keys", "add")
    _, second = Ring.shown(path)
    assert (added.exit_code, second.primary) == (0, False)
    assert "copy the ring to every node" in added.stdout
    assert f"`dicom-node keys promote {second.key_id}`" in added.stdout
    promoted = typed("keys", "promote", second.key_id)
    assert (promoted.exit_code, Ring.load(path).primary_key_id) == (0, second.key_id)
    assert "Copy the ring to every node" in promoted.stdout
    assert typed("keys", "rotate").exit_code == 0
    removed = typed("keys", "remove", first.key_id)
    assert (removed.exit_code, "Destroy the old copies when no backup needs it" in removed.stdout) == (0, True)
    events = recorded()
    assert [event.action for event in events] == ["keys.added", "keys.promoted", "keys.rotated", "keys.removed"]
    assert {(event.actor, event.subject, event.outcome) for event in events} == {(operator(), SUBJECT, "success")}
    assert events[0].detail == {"key": second.key_id, "place": "ring file", "primary": False}
    assert events[1].detail == {"key": second.key_id, "former": first.key_id}


def test_one_node_may_use_it_at_once(typed: Type) -> None:
    """`add --promote`, where nobody has a copy of the ring."""
    typed("keys", "init")
    path = prepare()
    assert typed("keys", "add", "--promote").exit_code == 0
    assert [key.primary for key in Ring.shown(path)] == [False, True]
    assert recorded()[-1].detail["primary"] is True


def test_what_cannot_be_recorded_is_not_done(typed: Type) -> None:
    """Without a database the ring stays as it is, byte for byte."""
    typed("keys", "init")
    path = config.load(None).ring_file
    before = path.read_bytes()
    for words in (("add",), ("add", "--promote"), ("promote", Ring.shown(path)[0].key_id)):
        refused = typed("keys", *words)
        assert (refused.exit_code, "start the node once" in refused.output) == (1, True)
    assert path.read_bytes() == before


def test_a_rotation_in_the_key_service(typed: Type, service: KeyService, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same key again is refused, by its alias too; another is taken, and the one that went may be deleted later."""
    arn, other = service.make_key(), service.make_key()
    monkeypatch.setenv("DICOM_NODE_KEYS__KMS_KEY_ID", arn)
    assert typed("keys", "init").exit_code == 0
    path = prepare()
    before = path.read_bytes()
    service.make_alias("ring", arn)
    for same in (arn, "alias/ring"):
        monkeypatch.setenv("DICOM_NODE_KEYS__KMS_KEY_ID", same)
        monkeypatch.setenv("DICOM_NODE_KEYS__KMS_REGION", "eu-central-1")
        refused = typed("keys", "add")
        assert refused.exit_code == 1
        assert f"{arn} is in the ring already" in refused.output
        assert "make a new key in the key service" in refused.output
    assert path.read_bytes() == before
    monkeypatch.setenv("DICOM_NODE_KEYS__KMS_KEY_ID", other)
    assert typed("keys", "add", "--promote").exit_code == 0
    assert typed("keys", "rotate").exit_code == 0
    removed = typed("keys", "remove", Ring.shown(path)[0].key_id)
    assert removed.exit_code == 0
    assert f"{arn} is used by this ring no more" in removed.stdout


def test_a_ring_with_one_key_twice(typed: Type, service: KeyService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version let the same key of the service in a second time: who removes one of the two is told to keep the key."""
    path = tmp_path / "keys" / "ring.json"
    path.parent.mkdir(mode=0o700)
    arn = service.make_key()
    monkeypatch.setenv("DICOM_NODE_KEYS__KMS_KEY_ID", arn)
    ring = Ring.create(path, KmsKey(arn, endpoint_url=service.url))
    prepare()
    content = json.loads(path.read_text())
    content["keys"]["0" * 16] = content["keys"][ring.primary_key_id]
    path.write_text(json.dumps(content))
    removed = typed("keys", "remove", "0" * 16)
    assert removed.exit_code == 0
    assert f"{arn} stays in use, as key {ring.primary_key_id}: do NOT delete it" in removed.stdout


@pytest.mark.peer
def test_two_rings_on_one_database(
    postgresql_database: Callable[..., str], s3_bucket: Callable[[], tuple[str, str, Path]], tmp_path: Path
) -> None:
    """The second node on an empty database, with a ring of its own, is refused before it takes anything in; `check` says so too."""
    url = postgresql_database()
    endpoint, bucket, _ = s3_bucket()
    shared = {
        "DICOM_NODE_DATABASE__URL": url,
        "DICOM_NODE_ARCHIVE__STORE": "s3",
        "DICOM_NODE_ARCHIVE__BUCKET": bucket,
        "DICOM_NODE_ARCHIVE__ENDPOINT_URL": endpoint,
        "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
    }
    first, second = (config.load(None, {"DICOM_NODE_NODE__DATA_DIR": str(tmp_path / name), **shared}) for name in ("first", "second"))
    for settings in (first, second):
        settings.ring_file.parent.mkdir(parents=True, mode=0o700)
        Ring.create(settings.ring_file)
    lock = node._locked_folder(second)
    with storehouse.storage(first) as parts, node._present(first, parts, node._locked_folder(first), list):
        assert "another ring" not in environment._keys(first).text
        found = environment._keys(second)
        assert (found.passed, "belongs to another ring" in found.text) == (False, True)
        with (
            storehouse.storage(second) as others,
            pytest.raises(StartError, match="belongs to another ring"),
            node._present(second, others, lock, list),
        ):
            pass
    second.ring_file.write_bytes(first.ring_file.read_bytes())
    with storehouse.storage(second) as others, node._present(second, others, lock, list):
        assert [entry.event.action for entry in others.audit.entries()].count("keys.bound") == 1
    lock.close()


def test_what_helps_when_a_ring_file_leaked(typed: Type, tmp_path: Path) -> None:
    """No rotation keeps an old copy of the file from opening the embedded database; a new ring does, with the old keys until a rotation."""
    typed("keys", "init")
    path = prepare()
    sample = photograph()
    with (
        storehouse.storage(config.load(None)) as parts,
        parts.archive.receive(origin_of(), transfer_syntax_uid=sample.transfer_syntax_uid) as intake,
    ):
        intake.write(sample.data_set)
        intake.commit()
    leaked = tmp_path / "leaked.json"
    path.rename(leaked)
    former = Ring.load(leaked).primary_key_id
    (tmp_path / "aside").mkdir()
    for file in tmp_path.glob("index.db*"):
        file.rename(tmp_path / "aside" / file.name)
    assert typed("keys", "init").exit_code == 0
    alone = typed("reindex")  # what a new ring opens by itself: nothing
    assert (alone.exit_code, "1 without key" in alone.stdout) == (1, True)
    for file in tmp_path.glob("index.db*"):
        file.unlink()
    merged = typed("keys", "merge", str(leaked))
    assert (merged.exit_code, former in merged.stdout) == (0, True)
    assert "0 keys taken" in typed("keys", "merge", str(leaked)).stdout
    done = typed("reindex")
    assert done.exit_code == 0, done.output
    assert typed("keys", "remove", former).exit_code == 1  # rotate first
    for words in (("rotate",), ("remove", former)):
        assert typed("keys", *words).exit_code == 0
    with storehouse.storage(config.load(None)) as parts:
        with parts.archive.open(sample.sop_instance_uid) as stored:
            assert stored.read() == sample.data_set
        for name in parts.store.list_documents("keys/"):
            with pytest.raises(KeyNotHere):
                read_document(parts.store.get_document(name), Ring.load(leaked).unwrap)
    database = Database(url=f"sqlite:///{tmp_path / 'index.db'}", key=Ring.load(leaked).database_key())
    with pytest.raises(StorageError), database.read():
        pass
    database.close()


def test_the_keys_of_two_nodes_are_brought_together(typed: Type, tmp_path: Path) -> None:
    """Where each of two copies got a key of its own, `merge` gives both to one, recorded; a key that was changed by hand is refused."""
    typed("keys", "init")
    path = prepare()
    other = tmp_path / "other.json"
    other.touch(mode=0o600)
    other.write_bytes(path.read_bytes())
    theirs = Ring.add(other)
    primary = Ring.load(path).primary_key_id
    assert typed("keys", "merge", str(other)).exit_code == 0
    assert {key.key_id: key.primary for key in Ring.shown(path)} == {primary: True, theirs: False}
    assert recorded()[-1].detail == {"keys": [theirs], "file": str(other), "primary": False}
    content = json.loads(other.read_text())
    content["keys"][theirs]["secret"] = content["keys"][primary]["secret"]
    other.write_text(json.dumps(content))
    before = path.read_bytes()
    refused = typed("keys", "merge", str(other))
    assert (refused.exit_code, "changed by hand" in refused.output) == (1, True)
    assert path.read_bytes() == before


def test_the_list_shows_what_this_ring_lacks(typed: Type) -> None:
    """Study keys that another node's key wraps are counted too: its ring is to be copied before anything is removed."""
    typed("keys", "init")
    path = prepare()
    before = path.read_bytes()
    theirs = Ring.add(path)
    with storehouse.storage(config.load(None)) as parts:
        key = parts.study_keys.current("2.25.7")
        parts.database.write(lambda connection: parts.study_keys.store_in(connection, key))
    path.write_bytes(before)
    (line,) = (line for line in typed("keys", "list").stdout.splitlines() if theirs in line)
    assert "1 study keys" in line
    assert "NOT in this ring" in line
