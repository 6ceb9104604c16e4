"""The work queue: a table, so that a job and the rows that make it necessary share one transaction.

A claim is a lease: a token and a time when it runs out. Whoever holds the token may renew, finish, fail or release the job; whoever lost
it gets :class:`LeaseLost` and must drop the work (fencing: two results are impossible, whatever the clocks say). A job whose lease ran
out is claimed again; one that ran out of attempts, by failing or by killing its workers, is DEAD until an operator requeues it.

At most one job exists for the same (kind, instance, lane, payload), ever: enqueueing it again, in whatever state it is, returns the one
that is there and changes nothing. That is what makes a repeated *admit* or *conclude* harmless.

Many processes, on one machine or many, claim at once: what one is about to take, the others pass over. Claim, heartbeat, failure and
release touch this table alone and wait for nobody's transaction. A job with a *home* is for the processes of that node only, because the
object that it is about lies on that node's disk yet.

Clocks. The times that decide (due, lease) come from a clock that never goes back within a process: it follows the wall clock forward, and
runs on by the monotonic clock while the wall clock is behind. Across processes leases are wall-clock times in the database; a process
started after the clock was put back could find them far ahead. Nothing is ever planned further ahead than ``horizon_s``; a time beyond
that is taken for the work of a wrong clock, and the job is due. A clock put back therefore delays work by the horizon at most, a clock put
forward makes leases run out early, and the fence holds in both cases.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Column,
    ColumnElement,
    Index,
    Integer,
    Row,
    Select,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from storage.database import METADATA, BigId, from_micros, to_micros, utc_now
from storage.errors import LeaseLost, StorageError
from storage.prepared import Prepared
from storage.records import Job, JobKind, JobState, NewJob

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Clock, Database


class Step(StrEnum):
    """What can happen to a job."""

    CLAIM = "claim"
    RENEW = "renew"
    FINISH = "finish"
    RETRY = "retry"
    BURY = "bury"
    RELEASE = "release"
    RECLAIM = "reclaim"
    EXHAUST = "exhaust"
    REQUEUE = "requeue"
    LOSE = "lose"


TRANSITIONS: Final[Mapping[tuple[JobState, Step], JobState]] = {
    # (state, step): next state                            who does it, and when
    (JobState.READY, Step.CLAIM): JobState.CLAIMED,  #     a worker, once the job is due
    (JobState.CLAIMED, Step.RENEW): JobState.CLAIMED,  #   the holder: heartbeat
    (JobState.CLAIMED, Step.FINISH): JobState.DONE,  #     the holder
    (JobState.CLAIMED, Step.RETRY): JobState.READY,  #     the holder: failed, may be tried again, attempts left; due after a delay
    (JobState.CLAIMED, Step.BURY): JobState.DEAD,  #       the holder: failed for good, or no attempts left
    (JobState.CLAIMED, Step.RELEASE): JobState.READY,  #   the holder: gives it back untried (shutdown, busy lane)
    (JobState.CLAIMED, Step.RECLAIM): JobState.CLAIMED,  # another worker: the lease ran out, attempts left
    (JobState.CLAIMED, Step.EXHAUST): JobState.DEAD,  #    another worker: the lease ran out, no attempts left
    (JobState.DEAD, Step.REQUEUE): JobState.READY,  #      an operator: fresh attempts
    (JobState.DONE, Step.REQUEUE): JobState.READY,  #      an operator: do it again
    (JobState.READY, Step.LOSE): JobState.DEAD,  #         an operator: its object was lost with the disk of a node
    (JobState.CLAIMED, Step.LOSE): JobState.DEAD,  #       the same, of a job that the lost node held
}
"""Every change of state there is. The statements below are made from this table."""

JOBS = Table(
    "jobs",
    METADATA,
    Column("id", BigId, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("sop_instance_uid", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("payload_digest", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", BigInteger),  # READY: claimable from; CLAIMED: the lease runs out; else nothing
    Column("lease_token", Text, nullable=False),
    Column("lease_owner", Text, nullable=False),
    Column("first_claimed_at", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Column("reason", Text, nullable=False),
    Column("result", Text, nullable=False),
    Column("home", Text, nullable=False, server_default=""),
    UniqueConstraint("sop_instance_uid", "kind", "lane", "payload_digest"),
)
_LIVE, _ENDED = JOBS.c.due_at.is_not(None), JOBS.c.due_at.is_(None)
# Partial: an instance on its way in touches one of them, and a million finished jobs do not slow down a claim.
Index("ix_jobs_live", JOBS.c.kind, JOBS.c.lane, JOBS.c.home, JOBS.c.due_at, sqlite_where=_LIVE, postgresql_where=_LIVE)
Index("ix_jobs_ended", JOBS.c.kind, JOBS.c.state, sqlite_where=_ENDED, postgresql_where=_ENDED)

DEFAULT_ATTEMPTS: Final[Mapping[JobKind, int]] = {
    JobKind.ANALYSE: 3,
    JobKind.DELIVER: 100,  # with the delays below: a destination that is down for three days loses nothing
    JobKind.ARCHIVE: 10**9,  # for ever: the only copy lies on one disk until it is done
}
_TRIES_TO_CLAIM = 64
_PAGE = 500
_NOWHERE = "-"  # no node's identity
_KIND: Final[BindParameter[Any]] = bindparam("kind_")
_LANE: Final[BindParameter[Any]] = bindparam("lane_")
_ANYWHERE: Final[BindParameter[Any]] = bindparam("anywhere")
_OWN: Final[BindParameter[Any]] = bindparam("own")
_NOW: Final[BindParameter[Any]] = bindparam("now")
_FAR: Final[BindParameter[Any]] = bindparam("far")


def growing_delay(attempts: int, *, first_s: float = 5.0, longest_s: float = 3600.0) -> float:
    """Return the seconds to wait after so many attempts: doubling up to the longest, ±20 % so that failures do not march in step."""
    return float(min(first_s * 2 ** min(attempts - 1, 40), longest_s)) * random.uniform(0.8, 1.2)  # noqa: S311 - no secret


def _from(step: Step) -> list[str]:
    return [state.value for state, taken in TRANSITIONS if taken is step]


def _to(step: Step) -> str:
    (target,) = {after for (_, taken), after in TRANSITIONS.items() if taken is step}
    return target.value


_DUE, _STRAY = JOBS.c.due_at <= _NOW, JOBS.c.due_at > _FAR
_WHEN = (_DUE, _STRAY)


def _next(when: ColumnElement[bool], home: BindParameter[Any], *columns: ColumnElement[Any]) -> Select[Any]:
    of_lane = select(*columns or (JOBS,)).where(JOBS.c.kind == _KIND, JOBS.c.lane == _LANE, JOBS.c.home == home, _LIVE, when)
    return of_lane.order_by(JOBS.c.due_at, JOBS.c.id).limit(1)


# Parts instead of one OR: each is one step into the index, however many jobs wait for a later time.
_PLACES = tuple((rank, home) for rank in range(len(_WHEN)) for home in (_ANYWHERE, _OWN))
_HEADS = union_all(
    *(
        select(_next(_WHEN[rank], home, literal_column(str(place)).label("place"), JOBS.c.due_at, JOBS.c.id).subquery())
        for place, (rank, home) in enumerate(_PLACES)
    )
)
# A job that another process is about to take is passed over, not waited for.
_LOCK = tuple(_next(_WHEN[rank], home).with_for_update(skip_locked=True) for rank, home in _PLACES)
_LANES = (
    select(JOBS.c.lane).where(JOBS.c.kind == _KIND, JOBS.c.home.in_((_ANYWHERE, _OWN)), _LIVE, or_(*_WHEN)).distinct().order_by(JOBS.c.lane)
)
_SAME = select(JOBS.c.id).where(
    JOBS.c.sop_instance_uid == bindparam("uid"),
    JOBS.c.kind == _KIND,
    JOBS.c.lane == _LANE,
    JOBS.c.payload_digest == bindparam("digest"),
)
# The job is new nearly always: one round trip then, two for the same again.
_ENQUEUE: Final[Mapping[str, Prepared]] = {
    name: Prepared(
        made(JOBS).on_conflict_do_nothing(index_elements=("sop_instance_uid", "kind", "lane", "payload_digest")).returning(JOBS.c.id),
        columns=(column.name for column in JOBS.c if column.name not in ("id", "first_claimed_at", "finished_at")),
    )
    for name, made in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}
_JOBS_OF = select(JOBS).where(JOBS.c.sop_instance_uid == bindparam("uid")).order_by(JOBS.c.id)
_COUNTS = tuple(select(JOBS.c.kind, JOBS.c.state, func.count()).where(part).group_by(JOBS.c.kind, JOBS.c.state) for part in (_LIVE, _ENDED))
_OLDEST = select(JOBS.c.kind, func.min(JOBS.c.created_at)).where(_LIVE).group_by(JOBS.c.kind)
_LOST_RESULT = '{"outcome":"lost"}'
LOST = (JOBS.c.state == JobState.DEAD.value) & (JOBS.c.result == _LOST_RESULT)
_LOST_ONE = (
    select(JOBS.c.id)
    .where(JOBS.c.sop_instance_uid == bindparam("uid"), JOBS.c.kind == JobKind.ARCHIVE.value, JOBS.c.home == bindparam("home"))
    .where(LOST, JOBS.c.due_at.is_(None))
    .limit(1)
)
"""Of jobs: ended because their object was lost with the disk of the node that is their home."""
_REHOME = (
    update(JOBS)
    .where(JOBS.c.sop_instance_uid == bindparam("uid"), JOBS.c.home != bindparam("to_home"))
    .where(JOBS.c.kind.in_(bindparam("kinds", expanding=True)))
    .values(
        home=bindparam("to_home"),
        state=case((LOST, JobState.READY.value), else_=JOBS.c.state),
        due_at=case((LOST, bindparam("now")), else_=JOBS.c.due_at),
        attempts=case((LOST, 0), else_=JOBS.c.attempts),
        finished_at=case((LOST, null()), else_=JOBS.c.finished_at),
        reason=case((LOST, ""), else_=JOBS.c.reason),
        result=case((LOST, "{}"), else_=JOBS.c.result),
    )
)
_READING = (JobKind.ANALYSE, JobKind.DELIVER)
"""Kinds of jobs that read the archived object of an instance. The Mover's are about one object, which may lie elsewhere."""
_CANCEL = delete(JOBS).where(JOBS.c.sop_instance_uid.in_(bindparam("uids", expanding=True)))
_HELD = (JOBS.c.id == bindparam("job"), JOBS.c.lease_token == bindparam("token"))


class WorkQueue:
    """Hands out durable work, one holder at a time.

    Parameters
    ----------
    database
        Where the jobs are kept.
    home
        This node's identity: claims look at jobs of any home, and of this one. Empty: at the former only.
    clock
        Time of day: stored as created, first claimed, finished; see the module's words on clocks.
    lease_s
        Seconds that a claim lasts without heartbeat.
    attempts
        Claims of a job before it is dead, by kind.
    delay
        Seconds to wait before the next try, from the number of attempts so far.
    horizon_s
        The longest that anything is planned ahead; `delay` is cut to it.
    monotonic
        Seconds of a clock that never steps.
    exhausted
        Told, in the transaction, of a job that is dead because its workers died over it, with the reason: none of them can record it.
    """

    def __init__(
        self,
        *,
        database: Database,
        home: str = "",
        clock: Clock = utc_now,
        lease_s: float = 60.0,
        attempts: Mapping[JobKind, int] = DEFAULT_ATTEMPTS,
        delay: Callable[[int], float] = growing_delay,
        horizon_s: float = 4500.0,
        monotonic: Callable[[], float] = time.monotonic,
        exhausted: Callable[[Connection, Job, str], None] = lambda _connection, _job, _reason: None,
    ) -> None:
        self._database = database
        self._home = home
        self._clock = clock
        self._lease = int(lease_s * 1_000_000)
        self._attempts = dict(attempts)
        self._delay = delay
        self._horizon = max(int(horizon_s * 1_000_000), self._lease)
        self._monotonic = monotonic
        self._exhausted = exhausted
        self._lock = threading.Lock()
        self._latest: tuple[int, float] | None = None

    def _now(self) -> int:
        """Return queue time in microseconds: the wall clock, or what the monotonic clock makes of the last time when that is later."""
        wall, ticks = to_micros(self._clock()), self._monotonic()
        with self._lock:
            if self._latest is not None:
                latest, latest_ticks = self._latest
                wall = max(wall, latest + int(max(ticks - latest_ticks, 0) * 1_000_000))
            self._latest = (wall, ticks)
        return wall

    def _wanted(self, kind: JobKind) -> dict[str, Any]:
        now = self._now()
        return {"kind_": kind.value, "now": now, "far": now + self._horizon, "anywhere": "", "own": self._home or _NOWHERE}

    # -- enqueue and claim -------------------------------------------------------------------------------------------------------

    def enqueue(self, connection: Connection, job: NewJob) -> int:
        """Add a job in the caller's transaction and return its number; that of the same job when it exists, in whatever state.

        Raises
        ------
        TypeError
            The payload cannot be written as JSON.
        """
        payload = json.dumps(dict(job.payload), sort_keys=True, separators=(",", ":")) if job.payload else "{}"
        digest = hashlib.sha256(payload.encode()).hexdigest()[:32] if job.payload else ""
        made = _ENQUEUE[connection.dialect.name].scalar(
            connection,
            {
                "kind": job.kind.value,
                "state": JobState.READY.value,
                "lane": job.lane,
                "sop_instance_uid": job.sop_instance_uid,
                "payload": payload,
                "payload_digest": digest,
                "attempts": 0,
                "due_at": self._now(),
                "lease_token": "",
                "lease_owner": "",
                "created_at": to_micros(self._clock()),
                "reason": "",
                "result": "{}",
                "home": job.home,
            },
        )
        if made is None:
            same = {"uid": job.sop_instance_uid, "kind_": job.kind.value, "lane_": job.lane, "digest": digest}
            made = connection.execute(_SAME, same).scalar_one()
        return int(made)

    def enqueue_again(self, connection: Connection, job: NewJob) -> int:
        """As :meth:`enqueue`; the same job that is done or dead is ready again, for the node of `job`."""
        number = self.enqueue(connection, job)
        if self._requeue(connection, JOBS.c.id == number, _from(Step.REQUEUE)):
            connection.execute(update(JOBS).where(JOBS.c.id == number).values(home=job.home))
        return number

    def claim(self, kind: JobKind, *, lane: str | None = None, owner: str) -> Job | None:
        """Claim the job of `kind` (and `lane`) that is due longest, None when none is due.

        Parameters
        ----------
        lane
            None: any lane, the nameless one first, then the one whose job waits longest.
        owner
            Who claims, for people: process and role.
        """
        with self._database.read() as connection:  # an idle worker must not take the write lock every time it looks
            if not self._heads(connection, kind, lane):
                return None
        job, dead = self._database.write(lambda connection: self._claim_in(connection, kind, lane, owner, bury=False), ordered=False)
        if not dead:
            return job
        # A burial is written into the audit trail, which has one order.
        return self._database.write(lambda connection: self._claim_in(connection, kind, lane, owner, bury=True))[0]

    def claim_some(self, kind: JobKind, *, owner: str, at_most: int) -> list[Job]:
        """Claim up to `at_most` jobs of `kind` in one transaction, those first that `claim` would; an empty list when none is due."""
        with self._database.read() as connection:
            if not self._heads(connection, kind, None):
                return []

        def work(connection: Connection) -> list[Job]:
            jobs: list[Job] = []
            while len(jobs) < at_most and (job := self._claim_in(connection, kind, None, owner, bury=False)[0]) is not None:
                jobs.append(job)
            return jobs

        jobs = self._database.write(work, ordered=False)
        if jobs:
            return jobs
        job = self.claim(kind, owner=owner)  # one that is dead stands in front perhaps
        return [job] if job is not None else []

    def _heads(self, connection: Connection, kind: JobKind, lane: str | None) -> list[tuple[str, int]]:
        """Return lanes with a job to claim, the one to be served first at the front, each with the place in `_PLACES` of its first job."""
        wanted = self._wanted(kind)

        def head(one: str) -> Row[Any] | None:
            found = connection.execute(_HEADS, {**wanted, "lane_": one}).all()
            return min(found, key=lambda row: (_PLACES[row.place][0], row.due_at, row.id), default=None)

        first = head(lane or "")
        if first is not None or lane is not None:
            return [] if first is None else [(lane or "", first.place)]
        named = [row.lane for row in connection.execute(_LANES, wanted) if row.lane]
        found = [(row.due_at, row.id, one, row.place) for one in named if (row := head(one)) is not None]
        return [(one, place) for _, _, one, place in sorted(found)]

    def _lock_next(self, connection: Connection, kind: JobKind, lane: str | None) -> Row[Any] | None:
        """Lock the job to be served first; None when there is none that nobody else is about to take."""
        for one, place in self._heads(connection, kind, lane):
            wanted = {**self._wanted(kind), "lane_": one}
            for statement in (_LOCK[place], *_LOCK):
                row = connection.execute(statement, wanted).first()
                if row is not None:
                    return row
        return None

    def _claim_in(self, connection: Connection, kind: JobKind, lane: str | None, owner: str, *, bury: bool) -> tuple[Job | None, bool]:
        """Return what was claimed, and whether the next one is dead and has to be buried first."""
        for _ in range(_TRIES_TO_CLAIM):  # bounded: burying a thousand poisoned jobs is not done in one transaction
            row = self._lock_next(connection, kind, lane)
            if row is None:
                return None, False
            if row.state == JobState.CLAIMED and row.attempts >= self._limit(kind):
                if not bury:
                    return None, True
                reason = f"{row.attempts} workers died or hung over it"
                self._take(connection, Step.EXHAUST, row.id, row.lease_token, self._ended(reason))
                self._exhausted(connection, _job(row), reason)
                continue
            step = Step.RECLAIM if row.state == JobState.CLAIMED else Step.CLAIM
            values = {
                "lease_token": secrets.token_hex(16),
                "lease_owner": owner,
                "attempts": row.attempts + 1,
                "due_at": self._now() + self._lease,
                "first_claimed_at": row.first_claimed_at if row.first_claimed_at is not None else to_micros(self._clock()),
            }
            self._take(connection, step, row.id, row.lease_token, values)
            return _job(SimpleNamespace(**{**row._mapping, **values, "state": _to(step)})), False  # noqa: SLF001 - SQLAlchemy's public accessor
        return None, False

    # -- what the holder may do --------------------------------------------------------------------------------------------------

    def heartbeat(self, job: Job) -> None:
        """Renew the lease.

        Raises
        ------
        LeaseLost
            Another worker took the job: stop working on it.
        """
        self._database.write(
            lambda connection: self._take(connection, Step.RENEW, job.id, job.lease_token, {"due_at": self._now() + self._lease}),
            ordered=False,
        )

    def finish_in(self, connection: Connection, job: Job, result: Mapping[str, Any]) -> None:
        """End the job well, in the transaction of what it brought about.

        Raises
        ------
        LeaseLost
            Another worker took the job: the transaction must not be committed.
        """
        written = json.dumps(dict(result), sort_keys=True, separators=(",", ":"))
        self._take(connection, Step.FINISH, job.id, job.lease_token, {**self._ended(""), "result": written})

    def finish(self, job: Job, result: Mapping[str, Any]) -> None:
        """End the job well, in a transaction of its own.

        Raises
        ------
        LeaseLost
            As :meth:`finish_in`.
        """
        self._database.write(lambda connection: self.finish_in(connection, job, result))

    def fail_in(self, connection: Connection, job: Job, reason: str, *, retryable: bool) -> JobState:
        """Note that the attempt failed: READY again after a delay, or DEAD when not `retryable` or out of attempts.

        Raises
        ------
        LeaseLost
            Another worker took the job.
        """
        if not retryable or job.attempts >= self._limit(job.kind):
            self._take(connection, Step.BURY, job.id, job.lease_token, self._ended(reason))
            return JobState.DEAD
        pause = min(int(max(self._delay(job.attempts), 0) * 1_000_000), self._horizon)
        self._take(connection, Step.RETRY, job.id, job.lease_token, {**_unheld(self._now() + pause), "reason": reason})
        return JobState.READY

    def fail(self, job: Job, reason: str, *, retryable: bool) -> JobState:
        """As :meth:`fail_in`, in a transaction of its own.

        Raises
        ------
        LeaseLost
            Another worker took the job.
        """
        return self._database.write(lambda connection: self.fail_in(connection, job, reason, retryable=retryable), ordered=False)

    def release(self, job: Job, *, after_s: float = 0.0, reason: str = "", home: str | None = None) -> None:
        """Give the job back untried: this claim does not count as an attempt, and the job is due in `after_s` seconds.

        A `reason` is kept for people, as with :meth:`fail`. With a `home` it is for that node from now on.

        Raises
        ------
        LeaseLost
            Another worker took the job.
        """

        def work(connection: Connection) -> None:
            pause = min(int(max(after_s, 0) * 1_000_000), self._horizon)
            values = {**_unheld(self._now() + pause), "attempts": max(job.attempts - 1, 0)} | ({"reason": reason} if reason else {})
            values |= {} if home is None else {"home": home}
            self._take(connection, Step.RELEASE, job.id, job.lease_token, values)

        self._database.write(work, ordered=after_s <= 0)  # what is due at once wakes the others

    def rehome(self, connection: Connection, sop_instance_uid: str, *, home: str = "", kinds: Sequence[JobKind] = _READING) -> None:
        """Give the jobs that read the object of an instance to the node where it lies now, or to all; in the caller's transaction.

        Those that ended because the object was lost are ready again: there is one now.
        """
        values = {"uid": sop_instance_uid, "to_home": home, "kinds": [kind.value for kind in kinds], "now": self._now()}
        connection.execute(_REHOME, values)

    def revive_in(self, connection: Connection, sop_instance_uid: str, *, kinds: Sequence[JobKind] = _READING) -> int:
        """Make the dead jobs that read the object of an instance ready again, in the caller's transaction; return how many.

        For an instance whose damaged object was replaced by a whole one: they may have died of it.
        """
        where = (JOBS.c.sop_instance_uid == sop_instance_uid) & JOBS.c.kind.in_([kind.value for kind in kinds]) & ~LOST
        return self._requeue(connection, where, [JobState.DEAD.value])

    def lose_in(self, connection: Connection, job_ids: Sequence[int], reason: str) -> None:
        """End jobs whose object was lost with the disk of the node that is their home; whoever held one gets :class:`LeaseLost`.

        They keep their home: :meth:`rehome` makes them ready again when the instance was sent again, :func:`found_in` when the node
        came back after all.
        """
        values = {**self._ended(reason), "state": _to(Step.LOSE), "result": _LOST_RESULT}
        connection.execute(update(JOBS).where(JOBS.c.id.in_(list(job_ids)), JOBS.c.state.in_(_from(Step.LOSE))).values(values))

    def redo_in(self, connection: Connection, sop_instance_uid: str, *, home: str) -> int:
        """Let the analysis of an instance that is done run again, on the node where its object lies; return how many jobs that are."""
        where = (JOBS.c.sop_instance_uid == sop_instance_uid) & (JOBS.c.kind == JobKind.ANALYSE.value)
        done = connection.scalars(select(JOBS.c.id).where(where, JOBS.c.state == JobState.DONE.value)).all()
        connection.execute(update(JOBS).where(JOBS.c.id.in_(done)).values(home=home))
        return self._requeue(connection, JOBS.c.id.in_(done), [JobState.DONE.value])

    def cancel_in(self, connection: Connection, sop_instance_uids: Iterable[str]) -> int:
        """Delete every job about these instances, in the caller's transaction, and return how many: the instances are being erased.

        Who holds one of them gets :class:`LeaseLost` at its next step.
        """
        wanted = sorted(set(sop_instance_uids))
        pages = (wanted[start : start + _PAGE] for start in range(0, len(wanted), _PAGE))
        return sum(connection.execute(_CANCEL, {"uids": page}).rowcount for page in pages)

    # -- operators and metrics ---------------------------------------------------------------------------------------------------

    def requeue(self, job_id: int) -> None:
        """Make a dead or done job ready again, with fresh attempts; when it was first claimed stays.

        Raises
        ------
        StorageError
            No such job, or it is neither dead nor done, or its object was lost with a node.
        """
        if self._database.write(lambda connection: self._requeue(connection, (JOBS.c.id == job_id) & ~LOST, _from(Step.REQUEUE))):
            return
        with self._database.read() as connection:
            lost = connection.scalar(select(JOBS.c.reason).where(JOBS.c.id == job_id, LOST))
        if lost is not None:
            raise StorageError(f"job {job_id} cannot run: {lost}")
        raise StorageError(f"job {job_id} is neither dead nor done: only such a job can be requeued")

    def requeue_dead(self, kind: JobKind, *, lane: str | None = None) -> int:
        """Make every dead job of `kind` (and `lane`) ready again, and return how many.

        Not those whose object was lost with a node: nobody could claim them. They are ready when the instance is sent again.
        """
        where = (JOBS.c.kind == kind.value) & ~LOST
        if lane is not None:
            where &= JOBS.c.lane == lane
        return self._database.write(lambda connection: self._requeue(connection, where, [JobState.DEAD.value]))

    def _requeue(self, connection: Connection, where: ColumnElement[bool], states: list[str]) -> int:
        values = {"state": _to(Step.REQUEUE), **_unheld(self._now()), "attempts": 0, "finished_at": None, "result": "{}"}
        return connection.execute(update(JOBS).where(where, JOBS.c.state.in_(states)).values(values)).rowcount

    def lanes(self, kind: JobKind) -> list[str]:
        """Return the lanes in which a job of `kind` is due, in order of name."""
        with self._database.read() as connection:
            return [row.lane for row in connection.execute(_LANES, self._wanted(kind))]

    def jobs_of(self, sop_instance_uid: str) -> list[Job]:
        """Return every job about an instance, oldest first."""
        with self._database.read() as connection:
            return [_job(row) for row in connection.execute(_JOBS_OF, {"uid": sop_instance_uid})]

    def dead(self, kind: JobKind, *, limit: int = 1000) -> list[Job]:
        """Return dead jobs of `kind`, oldest first, for an operator."""
        statement = select(JOBS).where(JOBS.c.kind == kind.value, JOBS.c.state == JobState.DEAD.value).order_by(JOBS.c.id).limit(limit)
        with self._database.read() as connection:
            return [_job(row) for row in connection.execute(statement)]

    def counts(self) -> dict[tuple[JobKind, JobState], int]:
        """Return how many jobs there are by kind and state; every pair is there."""
        counted = {(kind, state): 0 for kind in JobKind for state in JobState}
        with self._database.read() as connection:
            for statement in _COUNTS:
                for kind, state, number in connection.execute(statement):
                    counted[JobKind(kind), JobState(state)] = number
        return counted

    def oldest_unfinished_s(self) -> dict[JobKind, float]:
        """Return by kind for how many seconds the oldest job is there that waits, waits for another try, or is under way; 0 without one.

        Thus a queue in which every attempt fails, or hangs, is seen to grow old, as one is that nobody works on.
        """
        now = to_micros(self._clock())
        ages = dict.fromkeys(JobKind, 0.0)
        with self._database.read() as connection:
            for kind, made in connection.execute(_OLDEST):
                ages[JobKind(kind)] = max(0, now - made) / 1_000_000
        return ages

    # -- one way to change a state -----------------------------------------------------------------------------------------------

    def _limit(self, kind: JobKind) -> int:
        return self._attempts.get(kind, DEFAULT_ATTEMPTS[kind])

    def _ended(self, reason: str) -> dict[str, Any]:
        return {**_unheld(None), "finished_at": to_micros(self._clock()), "reason": reason}

    def _take(self, connection: Connection, step: Step, job_id: int, token: str, values: Mapping[str, Any]) -> None:
        """Take `step` for the job if it is in a state that allows it and held by `token`."""
        statement = update(JOBS).where(*_HELD, JOBS.c.state.in_(_from(step))).values({"state": _to(step), **values})
        if connection.execute(statement, {"job": job_id, "token": token}).rowcount != 1:
            raise LeaseLost("another worker holds this job now: its lease ran out here, or an operator requeued it")


def was_lost_in(connection: Connection, sop_instance_uid: str, *, home: str) -> bool:
    """Tell whether an instance was lost with the disk of the node `home`: the job that was to bring it says so."""
    return connection.scalar(_LOST_ONE, {"uid": sop_instance_uid, "home": home}) is not None


def found_in(connection: Connection, home: str, *, at: datetime) -> int:
    """Make the jobs of a node ready again that ended because it was lost, and return how many: it came back with its disk."""
    values = {"state": _to(Step.REQUEUE), **_unheld(to_micros(at)), "attempts": 0, "finished_at": None, "reason": "", "result": "{}"}
    return connection.execute(update(JOBS).where(JOBS.c.home == home, LOST, _ENDED).values(values)).rowcount


def _unheld(due_at: int | None) -> dict[str, Any]:
    return {"due_at": due_at, "lease_token": "", "lease_owner": ""}


def _moment(micros: int | None) -> datetime | None:
    return None if micros is None else from_micros(micros)


def _job(row: Row[Any] | SimpleNamespace) -> Job:
    return Job(
        id=row.id,
        kind=JobKind(row.kind),
        state=JobState(row.state),
        lane=row.lane,
        sop_instance_uid=row.sop_instance_uid,
        attempts=row.attempts,
        first_claimed_at=_moment(row.first_claimed_at),
        lease_token=row.lease_token,
        payload=json.loads(row.payload),
        reason=row.reason,
        result=json.loads(row.result),
        available_at=_moment(row.due_at),
        created_at=_moment(row.created_at),
        finished_at=_moment(row.finished_at),
        home=row.home,
    )
