"""What the composition root itself does: the record of dead jobs, and the lock on the data folder."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicom_node import config, node, storehouse
from dicom_node.errors import StartError
from storage.database import Database
from storage.keys import Ring
from storage.records import JobKind, JobState, NewJob, SealedObject


def settings_of(folder: Path) -> config.Settings:
    """Give the defaults, with data in a folder."""
    return config.load(None, {"DICOM_NODE_NODE__DATA_DIR": str(folder)})


def test_a_job_whose_workers_died_is_in_the_audit_trail(tmp_path: Path) -> None:
    """Three workers die over an instance: none could record it, so the one that finds the job dead does, in the same transaction."""
    settings = settings_of(tmp_path)
    settings.ring_file.parent.mkdir(mode=0o700)
    database = Database(url=f"sqlite:///{storehouse.database_file(settings)}", key=Ring.create(settings.ring_file).database_key())
    database.migrate()
    database.close()
    with storehouse.storage(settings) as parts:
        started = datetime.now(UTC)
        parts.database.write(lambda connection: parts.queue.enqueue(connection, NewJob(JobKind.ANALYSE, "2.25.1")))
        for died in range(3):
            parts.queue._clock = lambda died=died: started + timedelta(hours=died + 1)  # type: ignore[misc]
            assert parts.queue.claim(JobKind.ANALYSE, owner="dies") is not None
        assert parts.audit.events_of("2.25.1") == []
        parts.queue._clock = lambda: started + timedelta(hours=9)
        assert parts.queue.claim(JobKind.ANALYSE, owner="lives") is None
        (job,) = parts.queue.jobs_of("2.25.1")
        (entry,) = parts.audit.events_of("2.25.1")
        assert job.state is JobState.DEAD
        assert (entry.event.action, entry.event.outcome) == ("analysis.refused", job.reason)
        assert "died" in job.reason


def test_a_second_start_leaves_the_counters_alone(tmp_path: Path) -> None:
    """A second node on the folder refuses, and the counters of the first are still there."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    counters = tmp_path / "run" / "metrics" / "counter_1.db"
    counters.parent.mkdir(parents=True)
    counters.write_bytes(b"of the first")
    lock = node._locked_folder(settings_of(tmp_path))
    try:
        with pytest.raises(StartError, match="another node"):
            node.serve(settings_of(tmp_path), None)
    finally:
        lock.close()
        for number, handler in handlers:
            signal.signal(number, handler)
    assert counters.read_bytes() == b"of the first"


def test_a_lost_ring_is_noticed_by_a_full_bucket(s3_bucket: Callable[[], tuple[str, str, Path]], tmp_path: Path) -> None:
    """A node on an empty folder makes no new ring beside a bucket that another ring has written: it says what to put back."""
    endpoint, bucket, _ = s3_bucket()
    environ = {
        "DICOM_NODE_NODE__DATA_DIR": str(tmp_path / "var"),
        "DICOM_NODE_ARCHIVE__STORE": "s3",
        "DICOM_NODE_ARCHIVE__BUCKET": bucket,
        "DICOM_NODE_ARCHIVE__ENDPOINT_URL": endpoint,
        "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
    }
    settings = config.load(None, environ)
    node._ensure_keys(settings)
    assert settings.ring_file.exists()
    settings.ring_file.unlink()
    content = b"sealed"
    path = tmp_path / "object"
    path.write_bytes(content)
    sealed = SealedObject("ab" * 16, len(content), hashlib.sha256(content).hexdigest(), "0" * 32)
    storehouse.object_store(settings).put(sealed.object_key, path, sealed)
    with pytest.raises(StartError, match="is missing although bucket"):
        node._ensure_keys(settings)
    assert not settings.ring_file.exists()


def test_a_database_of_another_ring_is_refused(tmp_path: Path) -> None:
    """A node whose ring lacks the keys that the database was written with says which, and does not start."""
    settings = settings_of(tmp_path)
    node._prepare(settings)
    with storehouse.storage(settings) as parts:
        key = parts.study_keys.current("2.25.7")
        parts.database.write(lambda connection: parts.study_keys.store_in(connection, key))
        known = parts.ring.primary_key_id
        Ring.add(settings.ring_file)
        document = json.loads(settings.ring_file.read_text())
        del document["keys"][known]
        settings.ring_file.write_text(json.dumps(document))
    lock = node._locked_folder(settings)
    with storehouse.storage(settings) as parts, pytest.raises(StartError, match=known), node._present(settings, parts, lock, pytest.fail):
        pass
    lock.close()


def test_start_and_stop_are_in_the_audit_trail(tmp_path: Path) -> None:
    """A node says that it starts before it does anything else, and that it stops; so does a role that is started by itself."""
    settings = settings_of(tmp_path)
    node._prepare(settings)
    for role in ("node", "web"):
        lock = node._locked_folder(settings)
        with storehouse.storage(settings) as parts:
            with node._present(settings, parts, lock, pytest.fail, role):
                told = [entry for entry in parts.audit.entries() if entry.event.action != "keys.bound"]  # of the first start alone
                assert [entry.event.action for entry in told][-1:] == ["application.started"]
                assert told[-1].event.detail["role"] == role
                assert told[-1].event.detail["process"] == os.getpid()
            actions = [entry.event.action for entry in parts.audit.entries() if entry.event.action != "keys.bound"]
            assert actions[-2:] == ["application.started", "application.stopped"]
        lock.close()


def test_roles_alone_share_a_folder_and_a_whole_node_does_not(tmp_path: Path) -> None:
    """Two roles of one node may run on a folder; a node that wants it for itself is refused, and the other way round."""
    settings = settings_of(tmp_path)
    first, second = (node._locked_folder(settings, shared=True) for _ in range(2))
    with pytest.raises(StartError, match="another node"):
        node._locked_folder(settings)
    first.close()
    second.close()
    alone = node._locked_folder(settings)
    with pytest.raises(StartError, match="another node"):
        node._locked_folder(settings, shared=True)
    alone.close()
