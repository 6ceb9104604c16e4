"""The state that a run left behind, read from the real parts: index, store, spool, queue, audit trail, and every file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from storage.archive import Archive
from storage.audit import AuditTrail
from storage.errors import InstanceNotFound, StorageError
from storage.index import Index
from storage.objects import ObjectStore
from storage.records import Job, JobState
from storage.work import WorkQueue
from tests.faults.history import digest

_KEY_FILES: Final = ("keys.json", "ring.json")


@dataclass(frozen=True, slots=True)
class Held:
    """An instance as the index has it, and what was read of it."""

    role: str
    sha256: str
    object_key: str
    landed_on: str
    read: str
    """SHA-256 of what the archive gave; empty when it gave nothing."""
    problem: str = ""
    """Why it gave nothing."""


@dataclass(slots=True)
class State:
    """Plain values: a doctored one is as good as a real one."""

    instances: dict[str, Held] = field(default_factory=dict)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    """(SOP Instance UID, SHA-256)"""
    reports: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Source UID -> (report UID, kind)."""
    jobs: dict[str, list[Job]] = field(default_factory=dict)
    audit: dict[str, Counter[str]] = field(default_factory=dict)
    """Subject -> how many records of which action."""
    audit_fault: str = ""
    live_jobs: int = 0
    rows: set[str] = field(default_factory=set)
    """Object keys that the index names."""
    objects: set[str] = field(default_factory=set)
    """Object keys that the store has."""
    left_behind: list[str] = field(default_factory=list)
    """Files in landing folder and spool."""
    plaintext: list[str] = field(default_factory=list)
    """Files in which a canary was found, with the canary."""
    whole: bool = True
    """Whether store and index were compared as a whole, not for some UIDs only."""


def state_of(
    *,
    index: Index,
    queue: WorkQueue,
    audit: AuditTrail,
    archive: Archive,
    store: ObjectStore,
    uids: Iterable[str],
    folders: Iterable[Path] = (),
    canaries: Iterable[str] = (),
    others: Mapping[str, bytes] | None = None,
    whole: bool = True,
) -> State:
    """Read the final state.

    Parameters
    ----------
    index, queue, audit, archive, store
        Opened after the run.
    uids
        Instances that the history knows.
    folders
        Searched for canaries; the first is the node's own, whose landing folder and spool must be empty.
    canaries
        Identifying text that must be nowhere.
    others
        Name -> bytes of what lies in no folder (a store in memory), searched as well.
    whole
        Compare all rows with all objects, and walk the audit trail.
    """
    state = State(whole=whole)
    wanted = list(dict.fromkeys(uids))
    for uid in wanted:
        _read_instance(state, uid, index=index, archive=archive)
        found = [(report.sop_instance_uid, report.kind) for report in index.reports_of(uid)]
        if found:
            state.reports[uid] = found
            for report, _ in found:
                _read_instance(state, report, index=index, archive=archive)
    for uid in {*wanted, *state.instances}:
        state.jobs[uid] = queue.jobs_of(uid)
        state.audit[uid] = Counter(entry.event.action for entry in audit.events_of(uid))
    folders = list(folders)
    if whole:
        fault = audit.verify()
        state.audit_fault = fault.reason if fault else ""
        state.quarantined = [(kept.record.summary.sop_instance_uid, kept.record.summary.sha256) for kept in index.quarantined()]
        state.rows = {known.object_key for known in index.all_objects()}
        state.objects = {info.object_key for info in store.list()}
        state.live_jobs = sum(count for (_, job_state), count in queue.counts().items() if job_state in (JobState.READY, JobState.CLAIMED))
    if folders:
        for name in ("landing", "landed"):
            state.left_behind += [str(path) for path in (folders[0] / name).rglob("*") if path.is_file()]
    marks = [canary.encode() for canary in canaries]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in _KEY_FILES:
                state.plaintext += _found(str(path), path.read_bytes(), marks)
    for name, content in (others or {}).items():
        state.plaintext += _found(f"object {name}", content, marks)
    return state


def _read_instance(state: State, uid: str, *, index: Index, archive: Archive) -> None:
    try:
        record = index.find(uid)
    except InstanceNotFound:
        return
    read = problem = ""
    try:
        with archive.open(uid) as stored:
            read = digest(stored.read())
    except StorageError as error:
        problem = f"{type(error).__name__}: {error}"
    state.instances[uid] = Held(record.role, record.summary.sha256, record.sealed.object_key, record.landed_on, read, problem)


def _found(where: str, content: bytes, marks: Iterable[bytes]) -> list[str]:
    return [f"{where}: {mark.decode()}" for mark in marks if mark in content]
