"""Storage commitments: those that peers ask of us, and those that we ask of the peers that got our reports (PS3.4 Annex J).

One table holds both, because both are promises with a time by which something has to happen. A row is claimed by moving its ``due_at``
ahead (the lease) and written again only where that has not been moved by anybody else since; whoever is killed leaves a row that comes
due. :data:`NEXT` is every change of state that there is.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import BigInteger, Column, ColumnElement, Index, Integer, Row, Table, Text, delete, func, insert, or_, select, update

from storage.database import METADATA, from_micros, to_micros
from storage.errors import LeaseLost, StorageError
from storage.records import AuditEvent, Job, JobKind, JobState, NewJob
from storage.work import JOBS, growing_delay

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.index import Index as InstanceIndex
    from storage.work import WorkQueue

COMMITMENTS = Table(
    "commitments",
    METADATA,
    Column("digest", Text, primary_key=True),  # asked of us: of peer and Transaction UID; by us: of peer and SOP Instance UID
    Column("transaction_uid", Text, nullable=False),
    Column("peer", Text, nullable=False),
    Column("asked_here", Integer, nullable=False),  # 1: a peer asked us; 0: we ask it
    Column("request", Text, nullable=False),  # asked of us: digest of the references; by us: number of the delivery's job
    Column("instances", Text, nullable=False),  # JSON: [[SOP Class UID, SOP Instance UID], …]
    Column("state", Text, nullable=False),
    Column("outcome", Text, nullable=False),  # asked of us: JSON, a failure reason for each reference, 0 committed, null not known yet
    Column("attempts", Integer, nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("asked_at", BigInteger, nullable=False),
    Column(
        "due_at", BigInteger, nullable=False
    ),  # when the state has something to be done: examined, reported, asked, sent again, forgotten
)
Index("ix_commitments_transaction_uid", COMMITMENTS.c.transaction_uid)
Index("ix_commitments_due_at", COMMITMENTS.c.due_at)
Index("ix_commitments_peer_state_due_at", COMMITMENTS.c.peer, COMMITMENTS.c.state, COMMITMENTS.c.due_at)


class State(StrEnum):
    """Of a commitment that was asked of us, then of one that we ask."""

    ASKED = "asked"
    """The request is durable; not all instances are examined."""
    EXAMINED = "examined"
    """The peer is to hear of it."""
    REPORTED = "reported"
    UNREPORTED = "unreported"
    """The peer did not take the report in days."""

    OWED = "owed"
    """A report was delivered; its commitment is to be asked."""
    ASKING = "asking"
    AWAITED = "awaited"
    """The peer took the request; its report is to come."""
    DENIED = "denied"
    """The peer does not have it, or said nothing in time: to be sent again."""
    RESENT = "resent"
    COMMITTED = "committed"
    UNCOMMITTED = "uncommitted"
    """Denied so often that it is sent no more."""
    UNPROVEN = "unproven"
    """The peer could not be asked in days."""


NEXT: Final[Mapping[State, tuple[State, ...]]] = {
    State.ASKED: (State.ASKED, State.EXAMINED),
    State.EXAMINED: (State.EXAMINED, State.REPORTED, State.UNREPORTED),
    State.REPORTED: (State.ASKED,),  #                       the same request once more
    State.UNREPORTED: (State.ASKED,),
    State.OWED: (State.ASKING, State.OWED),
    State.ASKING: (State.ASKING, State.OWED, State.AWAITED, State.UNPROVEN, State.COMMITTED, State.DENIED, State.UNCOMMITTED),
    State.AWAITED: (State.OWED, State.COMMITTED, State.DENIED, State.UNCOMMITTED),
    State.DENIED: (State.RESENT, State.OWED),
    State.RESENT: (State.OWED,),  #                          delivered again, as are those below when an operator requeues the delivery
    State.COMMITTED: (State.OWED,),
    State.UNCOMMITTED: (State.OWED,),
    State.UNPROVEN: (State.OWED,),
}
_OPEN = (State.ASKED, State.EXAMINED)
_TO_DO = (*_OPEN, State.OWED, State.ASKING, State.AWAITED, State.DENIED)
_DONE = tuple(state for state in State if state not in _TO_DO)

PROCESSING_FAILURE = 0x0110
RESOURCE_LIMITATION = 0x0213

_FORGOTTEN_AT_ONCE = 500
_GATHER = 1_000_000  # microseconds: the reports of one batch of deliveries are asked for together


class Reference(NamedTuple):
    """An item of a Referenced SOP Sequence."""

    sop_class_uid: str
    sop_instance_uid: str


class DuplicateTransaction(StorageError):
    """The Transaction UID is that of another request of the same peer."""

    failure_reason = 0x0131  # Duplicate transaction UID


class TooManyTransactions(StorageError):
    """The peer has as many commitments open as it may."""

    failure_reason = RESOURCE_LIMITATION
    retryable = True


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited, in seconds unless said otherwise."""

    lease_s: float = 60.0
    """A claim; renewed while instances are read."""
    wait_s: float = 3600.0
    """For an instance asked of us that is not in the store yet, or cannot be read now; then it is not committed."""
    report_s: float = 3 * 86400.0
    """For a peer to take our report, or our request."""
    answer_s: float = 86400.0
    """For the report of a peer that took our request; then the instance is sent again."""
    deliveries: int = 3
    """How often a report is sent to a peer that does not commit it."""
    kept_s: float = 30 * 86400.0
    """What is over is remembered, for repeated requests and re-used Transaction UIDs."""
    open_at_most: int = 100
    """Commitments that one peer may have open."""
    delay: Callable[[int], float] = growing_delay
    """Before the next try, from the number of tries so far."""


@dataclass(frozen=True, slots=True)
class Commitment:
    """A commitment asked of us, claimed."""

    digest: str
    transaction_uid: str
    peer: str
    references: tuple[Reference, ...]
    outcome: tuple[int | None, ...]
    """For each reference its failure reason; 0: committed, None: not known yet."""
    state: State
    attempts: int
    asked_at: datetime
    due_at: int
    """The lease: microseconds; who finds another one there lost it."""

    @property
    def failed(self) -> int:
        """How many instances are not committed."""
        return sum(1 for reason in self.outcome if reason)


class _Timers:
    """What both kinds of commitments share: the table, its clock, the fence."""

    def __init__(self, *, database: Database, audit: AuditTrail, patience: Patience | None = None) -> None:
        self._database = database
        self._audit = audit
        self.patience = patience or Patience()

    def _now(self) -> int:
        return to_micros(self._database.clock())

    def _in(self, seconds: float) -> int:
        return self._now() + int(seconds * 1_000_000)

    def _due(self) -> ColumnElement[bool]:
        """Due; or due so late that the clock must have been wrong when that was written."""
        now, far = self._now(), self._in(2 * max(self.patience.kept_s, self.patience.answer_s, self.patience.report_s) + 86400)
        return or_(COMMITMENTS.c.due_at <= now, COMMITMENTS.c.due_at > far)

    def _move(self, connection: Connection, row: Row[Any] | Commitment, state: State, **values: Any) -> None:
        """Take a step, if nobody else took one since `row` was read.

        Raises
        ------
        LeaseLost
            Somebody did.
        """
        if state not in NEXT[State(row.state)]:
            raise ValueError(f"no way leads from {row.state} to {state}")
        held = (COMMITMENTS.c.digest == row.digest, COMMITMENTS.c.state == str(row.state), COMMITMENTS.c.due_at == row.due_at)
        if connection.execute(update(COMMITMENTS).where(*held).values({"state": str(state), **values})).rowcount != 1:
            raise LeaseLost("another process has this storage commitment now")


class Commitments(_Timers):
    """Commitments that peers ask of us: asked, examined, reported.

    Parameters
    ----------
    database, audit
        Where they are kept, and what came of them.
    patience
        See `Patience`.
    """

    def accept(
        self, peer: str, transaction_uid: str, references: Sequence[Reference], *, lease_s: float | None = None
    ) -> Commitment | None:
        """Make a request durable, and claim it for the caller. None: the same request is open already, and somebody sees to it.

        `lease_s`: of this claim, where the caller knows how long it will take.

        Raises
        ------
        DuplicateTransaction, TooManyTransactions
            The request is refused.
        Unavailable
            The database.
        """
        asked = {
            "peer": peer,
            "transaction_uid": transaction_uid,
            "request": hashlib.sha256("\n".join(sorted(f"{one[0]} {one[1]}" for one in references)).encode()).hexdigest(),
            "instances": json.dumps([list(one) for one in references], separators=(",", ":")),
            "outcome": json.dumps([None] * len(references)),
        }
        row = self._database.write(partial(self._accept_in, asked=asked, lease_s=lease_s or self.patience.lease_s))
        return None if row is None else _commitment(row)

    def _accept_in(self, connection: Connection, *, asked: Mapping[str, str], lease_s: float) -> Row[Any] | None:
        peer = asked["peer"]
        digest = _digest("asked", peer, asked["transaction_uid"])
        known = connection.execute(select(COMMITMENTS).where(COMMITMENTS.c.digest == digest)).first()
        if known is not None and known.request != asked["request"]:
            raise DuplicateTransaction("the Transaction UID is in use for another request of this peer; use a new one")
        if known is not None and known.state in _OPEN:
            return None
        of_peer = (COMMITMENTS.c.peer == peer, COMMITMENTS.c.state.in_(_OPEN))
        if connection.execute(select(func.count()).select_from(COMMITMENTS).where(*of_peer)).scalar_one() >= self.patience.open_at_most:
            raise TooManyTransactions(f"{self.patience.open_at_most} storage commitments of this peer are open; ask again later")
        values = {**asked, "attempts": 0, "asked_at": self._now(), "due_at": self._in(lease_s)}
        if known is not None:
            self._move(connection, known, State.ASKED, **values)
        else:
            new = {"digest": digest, "asked_here": 1, "state": State.ASKED.value, "deliveries": 0}
            connection.execute(insert(COMMITMENTS).values({**new, **values}))
        return connection.execute(select(COMMITMENTS).where(COMMITMENTS.c.digest == digest)).one()

    def lanes(self) -> list[str]:
        """Return the peers with something to be done about commitments, in either direction."""
        statement = select(COMMITMENTS.c.peer).where(self._due(), COMMITMENTS.c.state.in_(_TO_DO)).distinct().order_by(COMMITMENTS.c.peer)
        with self._database.read() as connection:
            return [row.peer for row in connection.execute(statement)]

    def claim(self, peer: str) -> Commitment | None:
        """Claim what is to be examined or reported to `peer`, the longest due first; None when there is nothing."""
        statement = select(COMMITMENTS).where(COMMITMENTS.c.peer == peer, COMMITMENTS.c.state.in_(_OPEN), self._due())
        statement = statement.order_by(COMMITMENTS.c.due_at).limit(1)
        with self._database.read() as connection:
            if connection.execute(statement).first() is None:
                return None

        def work(connection: Connection) -> Commitment | None:
            row = connection.execute(statement).first()
            return None if row is None else self._held(connection, _commitment(row))

        return self._database.write(work)

    def renew(self, commitment: Commitment) -> Commitment:
        """Renew the lease.

        Raises
        ------
        LeaseLost
            Another process has it.
        """
        return self._database.write(lambda connection: self._held(connection, commitment))

    def _held(self, connection: Connection, commitment: Commitment, **values: Any) -> Commitment:
        due_at = max(self._in(self.patience.lease_s), commitment.due_at + 1)
        self._move(connection, commitment, commitment.state, due_at=due_at, **values)
        return replace(commitment, due_at=due_at)

    def release(self, commitment: Commitment) -> None:
        """Give it back: due at once.

        Raises
        ------
        LeaseLost
            Another process has it.
        """
        self._database.write(lambda connection: self._move(connection, commitment, commitment.state, due_at=self._now()))

    def examined(self, commitment: Commitment, outcome: Sequence[int | None], *, lease_s: float | None = None) -> Commitment | None:
        """Note what was found. None: some is not known yet, and looked at again later; else what to report, still held.

        What is not known when the patience with it ends is not committed (Resource limitation, 0213). `lease_s` as of `accept`.

        Raises
        ------
        LeaseLost
            Another process has it.
        """

        def work(connection: Connection) -> Commitment | None:
            known = list(outcome)
            if None in known and self._now() < to_micros(commitment.asked_at + timedelta(seconds=self.patience.wait_s)):
                attempts = commitment.attempts + 1
                due_at = self._in(min(self.patience.delay(attempts), 60.0))
                self._move(connection, commitment, State.ASKED, outcome=json.dumps(known), attempts=attempts, due_at=due_at)
                return None
            final = tuple(RESOURCE_LIMITATION if reason is None else reason for reason in known)
            due_at = max(self._in(lease_s or self.patience.lease_s), commitment.due_at + 1)
            held = replace(commitment, outcome=final, state=State.EXAMINED, attempts=0, due_at=due_at)
            self._move(connection, commitment, State.EXAMINED, outcome=json.dumps(final), attempts=0, due_at=held.due_at)
            detail = {"committed": len(final) - held.failed, "failed": held.failed}
            outcome_ = "success" if not held.failed else f"{held.failed} of {len(final)} instances are not committed"
            event = AuditEvent("instances.committed", outcome_, commitment.peer, commitment.transaction_uid, detail)
            self._audit.append(connection, event)
            return held

        return self._database.write(work)

    def reported(self, commitment: Commitment) -> None:
        """Note that the peer took the report. What it asked for is forgotten, that it asked is not yet.

        Raises
        ------
        LeaseLost
            Another process has it.
        """
        self._database.write(lambda connection: self._over(connection, commitment, State.REPORTED))

    def unreported(self, commitment: Commitment) -> State:
        """Note that the peer did not take the report: tried again later, EXAMINED, or never, UNREPORTED.

        Raises
        ------
        LeaseLost
            Another process has it.
        """

        def work(connection: Connection) -> State:
            if self._now() > to_micros(commitment.asked_at + timedelta(seconds=self.patience.report_s)):
                self._over(connection, commitment, State.UNREPORTED)
                event = AuditEvent("commitment.unreported", "the peer did not take the report", commitment.peer, commitment.transaction_uid)
                self._audit.append(connection, event)
                return State.UNREPORTED
            attempts = commitment.attempts + 1
            due_at = self._in(self.patience.delay(attempts))
            self._move(connection, commitment, State.EXAMINED, attempts=attempts, due_at=due_at)
            return State.EXAMINED

        return self._database.write(work)

    def _over(self, connection: Connection, commitment: Commitment, state: State) -> None:
        summary = json.dumps({"committed": len(commitment.outcome) - commitment.failed, "failed": commitment.failed})
        self._move(connection, commitment, state, instances="[]", outcome=summary, due_at=self._in(self.patience.kept_s))

    def forget(self) -> int:
        """Delete a page of what is over and has been kept long enough, in either direction; return how many."""
        old = (
            select(COMMITMENTS.c.digest)
            .where(COMMITMENTS.c.due_at <= self._now(), COMMITMENTS.c.state.in_(_DONE))
            .limit(_FORGOTTEN_AT_ONCE)
        )
        with self._database.read() as connection:
            digests = [row.digest for row in connection.execute(old)]
        if not digests:
            return 0
        still = (COMMITMENTS.c.digest.in_(digests), COMMITMENTS.c.due_at <= self._now(), COMMITMENTS.c.state.in_(_DONE))
        return self._database.write(lambda connection: connection.execute(delete(COMMITMENTS).where(*still)).rowcount)


@dataclass(frozen=True, slots=True)
class Asking:
    """Delivered reports whose commitment is asked of a peer in one transaction."""

    transaction_uid: str
    peer: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """What a peer's report brought about, as numbers of the deliveries' jobs."""

    committed: tuple[int, ...] = ()
    denied: tuple[int, ...] = ()
    """Will be sent again."""
    given_up: tuple[int, ...] = ()


class Proofs(_Timers):
    """Commitments that we ask of the peers that got our reports.

    Parameters
    ----------
    database, audit
        Where they are kept, and what came of them.
    queue, index
        To have a report delivered again.
    patience
        See `Patience`.
    """

    def __init__(
        self, *, database: Database, audit: AuditTrail, queue: WorkQueue, index: InstanceIndex, patience: Patience | None = None
    ) -> None:
        super().__init__(database=database, audit=audit, patience=patience)
        self._queue = queue
        self._index = index

    def delivered(self, peer: str, job: Job, reference: Reference) -> None:
        """Note that a peer acknowledged a report, before its delivery is called done: its commitment is owed now.

        Raises
        ------
        Unavailable
            The database; the delivery must not be called done.
        """

        def work(connection: Connection) -> None:
            digest = _digest("owed", peer, reference.sop_instance_uid)
            values = {
                "transaction_uid": "",
                "request": str(job.id),
                "attempts": 0,
                "asked_at": self._now(),
                "due_at": (self._now() // _GATHER + 2) * _GATHER,
            }
            known = connection.execute(select(COMMITMENTS).where(COMMITMENTS.c.digest == digest)).first()
            if known is not None:
                again = known.state not in (State.OWED, State.ASKING)
                self._move(connection, known, State.OWED, **values, deliveries=known.deliveries + again)
                return
            new = {"digest": digest, "peer": peer, "asked_here": 0, "instances": json.dumps([list(reference)])}
            connection.execute(insert(COMMITMENTS).values({**new, **values, "state": State.OWED.value, "outcome": "", "deliveries": 1}))

        self._database.write(work)

    def ask(self, peer: str, *, at_most: int = 500) -> Asking | None:
        """Claim the delivered reports whose commitment is to be asked of `peer` now; None when there are none."""
        rows_due = self._of(peer, State.OWED, State.ASKING).limit(at_most)
        with self._database.read() as connection:
            if connection.execute(rows_due).first() is None:
                return None

        def work(connection: Connection) -> Asking | None:
            transaction_uid = f"2.25.{uuid.uuid4().int}"
            rows = connection.execute(rows_due).all()
            for row in rows:
                values = {"transaction_uid": transaction_uid, "attempts": row.attempts + 1, "due_at": self._in(self.patience.lease_s)}
                self._move(connection, row, State.ASKING, **values)
            return Asking(transaction_uid, peer, tuple(_references(row)[0] for row in rows)) if rows else None

        return self._database.write(work)

    def asked(self, asking: Asking) -> None:
        """Note that the peer took the request. Its report may have come before."""

        def work(connection: Connection) -> None:
            for row in self._rows(connection, asking.peer, asking.transaction_uid, State.ASKING):
                self._move(connection, row, State.AWAITED, attempts=0, due_at=self._in(self.patience.answer_s))

        self._database.write(work)

    def unasked(self, asking: Asking, reason: str) -> tuple[int, ...]:
        """Note that the peer did not take the request: asked again later. Return the jobs whose proof is given up after days of it."""

        def work(connection: Connection) -> tuple[int, ...]:
            given_up = []
            for row in self._rows(connection, asking.peer, asking.transaction_uid, State.ASKING):
                if self._now() > row.asked_at + int(self.patience.report_s * 1_000_000):
                    given_up.append(int(row.request))
                    self._move(connection, row, State.UNPROVEN, outcome=reason, due_at=self._in(self.patience.kept_s))
                    self._append(connection, row, "report.unproven", reason)
                else:
                    self._move(connection, row, State.OWED, outcome=reason, due_at=self._in(self.patience.delay(row.attempts)))
            return tuple(given_up)

        return self._database.write(work)

    def reported(self, peer: str, transaction_uid: str, committed: Sequence[str], failed: Mapping[str, int]) -> Told | None:
        """Believe a peer's report about the transaction that we asked of it; None when we asked it no such thing.

        What it speaks of beyond that is nothing to us, and what it does not speak of is not committed. The same report again
        changes nothing.

        Parameters
        ----------
        committed
            SOP Instance UIDs of its Referenced SOP Sequence.
        failed
            Of its Failed SOP Sequence, with the failure reasons.
        """
        good = set(committed) - set(failed)

        def work(connection: Connection) -> Told | None:
            if not self._rows(connection, peer, transaction_uid):
                return None
            found: dict[str, list[int]] = {"committed": [], "denied": [], "given_up": []}
            for row in self._rows(connection, peer, transaction_uid, State.ASKING, State.AWAITED):
                uid = _references(row)[0].sop_instance_uid
                if uid in good:
                    self._prove(connection, row, uid)
                    found["committed"].append(int(row.request))
                else:
                    reason = f"failure reason {failed[uid]:04X}" if uid in failed else "not spoken of in the report"
                    found[self._deny(connection, row, f"not committed by the peer: {reason}")].append(int(row.request))
            return Told(**{name: tuple(jobs) for name, jobs in found.items()})

        return self._database.write(work)

    def overdue(self, peer: str) -> Told:
        """Look after the transactions of which the peer said nothing in time, and what is to be sent again; the reports are ready then."""
        rows_due = self._of(peer, State.AWAITED, State.DENIED).limit(_FORGOTTEN_AT_ONCE)
        with self._database.read() as connection:
            if connection.execute(rows_due).first() is None:
                return Told()

        def work(connection: Connection) -> Told:
            found: dict[str, list[int]] = {"denied": [], "given_up": []}
            for row in connection.execute(rows_due).all():
                if row.state == State.AWAITED:
                    found[self._deny(connection, row, "no commitment in time")].append(int(row.request))
                else:
                    self._send_again(connection, row)
            return Told(**{name: tuple(jobs) for name, jobs in found.items()})

        return self._database.write(work)

    # -- parts of it -------------------------------------------------------------------------------------------------------------

    def _of(self, peer: str, *states: State) -> Any:
        due = select(COMMITMENTS).where(COMMITMENTS.c.peer == peer, COMMITMENTS.c.state.in_(states), self._due())
        return due.order_by(COMMITMENTS.c.due_at, COMMITMENTS.c.digest)

    def _rows(self, connection: Connection, peer: str, transaction_uid: str, *states: State) -> Sequence[Row[Any]]:
        if not transaction_uid:
            return ()
        of_it = (COMMITMENTS.c.transaction_uid == transaction_uid, COMMITMENTS.c.peer == peer, COMMITMENTS.c.asked_here == 0)
        return connection.execute(select(COMMITMENTS).where(*of_it, COMMITMENTS.c.state.in_(states or tuple(State)))).all()

    def _append(self, connection: Connection, row: Row[Any], action: str, outcome: str) -> None:
        detail = {"job": int(row.request), "transaction_uid": row.transaction_uid, "deliveries": row.deliveries}
        self._audit.append(connection, AuditEvent(action, outcome, row.peer, _references(row)[0].sop_instance_uid, detail))

    def _prove(self, connection: Connection, row: Row[Any], uid: str) -> None:
        """Write the proof down: the audit trail, and the delivery's result, where `trace` shows it."""
        self._move(connection, row, State.COMMITTED, outcome="", due_at=self._in(self.patience.kept_s))
        self._append(connection, row, "report.committed", "success")
        job = connection.execute(
            select(JOBS.c.id, JOBS.c.result).where(
                JOBS.c.id == int(row.request), JOBS.c.sop_instance_uid == uid, JOBS.c.state == JobState.DONE
            )
        ).first()
        if job is not None:
            proof = {"transaction_uid": row.transaction_uid, "at": from_micros(self._now()).isoformat()}
            result = {**json.loads(job.result), "commitment": proof}
            written = json.dumps(result, sort_keys=True, separators=(",", ":"))
            connection.execute(update(JOBS).where(JOBS.c.id == job.id).values(result=written))

    def _deny(self, connection: Connection, row: Row[Any], reason: str) -> str:
        if row.deliveries >= self.patience.deliveries:
            self._move(connection, row, State.UNCOMMITTED, outcome=reason, due_at=self._in(self.patience.kept_s))
            self._append(connection, row, "report.uncommitted", reason)
            return "given_up"
        self._move(connection, row, State.DENIED, outcome=reason, due_at=self._in(self.patience.delay(row.deliveries)))
        self._append(connection, row, "report.denied", reason)
        return "denied"

    def _send_again(self, connection: Connection, row: Row[Any]) -> None:
        uid = _references(row)[0].sop_instance_uid
        self._move(connection, row, State.RESENT, due_at=self._in(self.patience.kept_s))
        record = self._index.find_in(connection, uid)
        if record is not None:  # else it was erased here meanwhile
            self._queue.enqueue_again(connection, NewJob(JobKind.DELIVER, uid, lane=row.peer, home=record.landed_on))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _references(row: Row[Any]) -> tuple[Reference, ...]:
    return tuple(Reference(*one) for one in json.loads(row.instances))


def _commitment(row: Row[Any]) -> Commitment:
    return Commitment(
        digest=row.digest,
        transaction_uid=row.transaction_uid,
        peer=row.peer,
        references=_references(row),
        outcome=tuple(json.loads(row.outcome)),
        state=State(row.state),
        attempts=row.attempts,
        asked_at=from_micros(row.asked_at),
        due_at=row.due_at,
    )
