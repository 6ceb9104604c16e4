"""A storage layer of real parts in a folder, as the composition root builds it; shared by tests and the fault harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.archive import Archive
from storage.audit import AuditTrail
from storage.database import Clock, Database, utc_now
from storage.failpoints import unarmed
from storage.index import Index
from storage.keys import Ring
from storage.objects import DirectoryStore, ObjectStore
from storage.records import JobKind, Limits, NewJob, Origin, Receipt, Summary
from storage.study_keys import StudyKeys
from storage.work import WorkQueue
from tests.storage.samples import Sample


def analyse(summary: Summary, origin: Origin) -> Sequence[NewJob]:
    """Ask for one analysis of every instance."""
    return [NewJob(JobKind.ANALYSE, summary.sop_instance_uid)]


@dataclass(frozen=True)
class House:
    """The parts, opened."""

    folder: Path
    database: Database
    index: Index
    queue: WorkQueue
    audit: AuditTrail
    store: ObjectStore
    ring: Ring
    study_keys: StudyKeys
    archive: Archive

    def ingest(self, sample: Sample, **origin: str) -> Receipt:
        """Receive a sample whole and commit it."""
        with self.archive.receive(origin_of(**origin), transfer_syntax_uid=sample.transfer_syntax_uid) as intake:
            for start in range(0, len(sample.data_set), 65536):
                intake.write(sample.data_set[start : start + 65536])
            return intake.commit()

    def read(self, sop_instance_uid: str) -> bytes:
        """Return the archived data set."""
        with self.archive.open(sop_instance_uid) as stored:
            return stored.read()

    def objects(self) -> list[str]:
        """Return the keys of all objects in the store."""
        return [info.object_key for info in self.store.list()]

    def landing_files(self) -> list[Path]:
        """Return what lies in the landing folder."""
        return [path for path in (self.folder / "landing").rglob("*") if path.is_file()]

    def actions(self) -> list[str]:
        """Return the actions of the audit trail, in order."""
        return [entry.event.action for entry in self.audit.entries()]

    def close(self) -> None:
        """Close what holds files."""
        self.archive.close()
        self.database.close()


def origin_of(**fields: str) -> Origin:
    """Return an origin of the DIMSE door, now."""
    return Origin(door="dimse", received_at=datetime.now(UTC), **{"calling_ae_title": "SENDER", "address": "192.0.2.1", **fields})


def build(
    folder: Path,
    *,
    store: ObjectStore | None = None,
    reach: Callable[[str], None] = unarmed,
    clock: Clock = utc_now,
    database_url: str = "",
    node_id: str = "",
    **options: Any,
) -> House:
    """Make or open a house in `folder`.

    With a `node_id` and a remote store it has a spool, as a node of many. `database_url`: of another database than SQLite in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ring_file = folder / "keys.json"
    ring = Ring.load(ring_file) if ring_file.exists() else Ring.create(ring_file)
    if database_url:
        database = Database(url=database_url, key=None)
    else:
        database = Database(url=f"sqlite:///{folder / 'node.db'}", key=ring.database_key())
    database.migrate()
    index, audit = Index(database=database), AuditTrail(database=database)
    queue = WorkQueue(database=database, clock=clock, home=node_id)
    store = store if store is not None else DirectoryStore(folder / "objects", reach=reach)
    study_keys = StudyKeys(database=database, ring=ring, reach=reach)
    spool = DirectoryStore(folder / "landed", reach=reach) if node_id and store.remote else None
    archive = Archive(
        database=database,
        index=index,
        queue=queue,
        audit=audit,
        store=store,
        study_keys=study_keys,
        landing=folder / "landing",
        spool=spool,
        node_id=node_id,
        reach=reach,
        **{"limits": Limits(), "jobs_for": analyse, "min_free_bytes": 1 << 20, **options},
    )
    return House(folder, database, index, queue, audit, store, ring, study_keys, archive)
