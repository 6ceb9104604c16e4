"""What the composition root itself does: the record of dead jobs, and the lock on the data folder."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dicom_node import config, node, storehouse
from dicom_node.node import StartError
from storage.database import Database
from storage.keys import Ring
from storage.records import JobKind, JobState, NewJob


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
    lock = node._own(settings_of(tmp_path))
    try:
        with pytest.raises(StartError, match="another node"):
            node.serve(settings_of(tmp_path), None)
    finally:
        os.close(lock)
        for number, handler in handlers:
            signal.signal(number, handler)
    assert counters.read_bytes() == b"of the first"
