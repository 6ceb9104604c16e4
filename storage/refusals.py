"""The refusal diary: who was refused what, when, why, and what helps; bounded, one row for what repeats.

Whoever refuses calls :meth:`Refusals.note` and goes on: a bounded queue takes it, one thread writes it some moments later. A stranger who
knocks a thousand times a second costs a row with a high count and one write a second; one who gives a new name each time gets a bounded
number of rows. What is about who somebody is goes into the audit trail too, once an hour for what repeats. No patient data: AE titles,
addresses, names of SOP classes, and our own sentences.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from sqlalchemy import BigInteger, Column, Index, Row, Table, Text, bindparam, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from storage.database import METADATA, from_micros, to_micros
from storage.errors import StorageError
from storage.records import AuditEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database

REFUSALS = Table(
    "refusals",
    METADATA,
    Column("digest", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("peer", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("calling_ae_title", Text, nullable=False),
    Column("called_ae_title", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("remedy", Text, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("first_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
)
Index("ix_refusals_last_at", REFUSALS.c.last_at)

_LENGTHS: Final[Mapping[str, int]] = {
    "kind": 32,
    "peer": 64,
    "address": 64,
    "calling_ae_title": 64,
    "called_ae_title": 64,
    "reason": 400,
    "remedy": 400,
}
_IDENTITY = ("kind", "peer", "address", "calling_ae_title", "called_ae_title", "reason")
VARIOUS: Final = "(various)"
"""Stands for the AE titles of a caller who uses a new one each time."""
_OF_ONE_ADDRESS = 200
_ADDRESSES = 500
_WINDOW_S = 3600.0
_ALERTS = frozenset({"association", "identity", "tls"})
"""Kinds that are security alerts (DICOM PS3.15 A.5.3.12)."""
_log = logging.getLogger(__name__)


def _upsert(made: Any) -> Any:
    statement = made(REFUSALS)
    seen_again = {
        "count": REFUSALS.c.count + statement.excluded["count"],
        "last_at": statement.excluded.last_at,
        "remedy": statement.excluded.remedy,
    }
    return statement.on_conflict_do_update(index_elements=("digest",), set_=seen_again)


_UPSERT: Final[Mapping[str, Any]] = {"sqlite": _upsert(sqlite.insert), "postgresql": _upsert(postgresql.insert)}
_NEWEST = select(REFUSALS).order_by(REFUSALS.c.last_at.desc(), REFUSALS.c.digest)
_EDGE = select(REFUSALS.c.last_at, REFUSALS.c.digest).order_by(REFUSALS.c.last_at.desc(), REFUSALS.c.digest)
_BEYOND = delete(REFUSALS).where(
    (REFUSALS.c.last_at < bindparam("edge_at")) | ((REFUSALS.c.last_at == bindparam("edge_at")) & (REFUSALS.c.digest > bindparam("edge")))
)
_LAST_OF = select(REFUSALS.c.digest, REFUSALS.c.last_at).where(REFUSALS.c.digest.in_(bindparam("digests", expanding=True)))
_LAST_OF_PEERS = select(REFUSALS.c.peer, func.max(REFUSALS.c.last_at)).where(REFUSALS.c.peer != "").group_by(REFUSALS.c.peer)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was refused, once or many times."""

    kind: str
    """association, context, instance, tls …: what was refused."""
    peer: str
    """Name of the peer; empty for a stranger."""
    address: str
    calling_ae_title: str
    called_ae_title: str
    reason: str
    """In words."""
    remedy: str
    """What helps, in words; empty when nothing is known to."""
    count: int
    first_at: datetime
    last_at: datetime


class Diary(Protocol):
    """Takes note of refusals."""

    def note(
        self,
        *,
        kind: str,
        reason: str,
        remedy: str = "",
        peer: str = "",
        address: str = "",
        calling_ae_title: str = "",
        called_ae_title: str = "",
    ) -> None:
        """See `Refusals.note`."""


class NoDiary:
    """Takes no note."""

    def note(self, **_: str) -> None:
        """Forget it."""


class Refusals:
    """The diary of one process, and what all of them wrote.

    Parameters
    ----------
    database
        Where it is kept; its clock gives the times.
    capacity
        Most rows; the oldest go.
    waiting
        Most notes that wait to be written; more are dropped and counted.
    every_s
        Longest time that a note waits while the database answers; also the pause between writes.
    retry_s
        Pause after a write that failed.
    audit
        Takes ``association.refused`` for associations, identities and certificates that were refused; None: nobody does.
    lost
        Told how many notes were dropped, each time that some are.
    """

    def __init__(
        self,
        *,
        database: Database,
        capacity: int = 10_000,
        waiting: int = 2_000,
        every_s: float = 1.0,
        retry_s: float = 5.0,
        audit: AuditTrail | None = None,
        lost: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._database = database
        self._audit = audit
        self._lost = lost
        self._capacity = capacity
        self._waiting = waiting
        self._every_s = every_s
        self._retry_s = retry_s
        self._notes: queue.Queue[tuple[datetime, dict[str, str]] | None] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._taken = 0
        self._written = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._unavailable = False
        self._distinct: dict[tuple[str, str], set[str]] = {}
        self._window = time.monotonic()

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def note(
        self,
        *,
        kind: str,
        reason: str,
        remedy: str = "",
        peer: str = "",
        address: str = "",
        calling_ae_title: str = "",
        called_ae_title: str = "",
    ) -> None:
        """Take note of a refusal; never waits, never raises.

        Parameters
        ----------
        kind
            association, context, instance, tls, identity, query …
        reason, remedy
            Sentences of ours, without patient data; what a stranger wrote may stand in them, it is escaped.
        peer
            Name of the peer, when the caller is known to be one.
        address
            IP address of the caller.
        calling_ae_title, called_ae_title
            As proposed.
        """
        told = {
            "kind": kind,
            "peer": peer,
            "address": address,
            "calling_ae_title": calling_ae_title,
            "called_ae_title": called_ae_title,
            "reason": reason,
            "remedy": remedy,
        }
        with self._lock:
            if self._closing.is_set():
                return
            try:
                self._notes.put_nowait((self._database.clock(), told))
            except queue.Full:
                full = True
            else:
                full = False
                self._taken += 1
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="refusals", daemon=True)
                    self._thread.start()
        if full:
            self._drop(1)

    @property
    def dropped(self) -> int:
        """How many notes found the queue full, or the database away for too long."""
        with self._lock:
            return self._dropped

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until what was noted before is written or dropped; False when it was not in time."""
        with self._settled:
            wanted = self._taken
            return self._settled.wait_for(lambda: self._written >= wanted, timeout_s)

    def close(self) -> None:
        """Write what waits, once, and end the thread."""
        with self._lock:
            self._closing.set()
            thread = self._thread
        if thread is not None:
            try:
                self._notes.put_nowait(None)
            except queue.Full:
                _log.debug("refusals.closing")  # the thread is busy, and looks at `_closing` afterwards
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        pending: dict[str, Refusal] = {}
        held = 0
        while not (self._closing.is_set() and self._notes.empty()):
            held += self._gather(pending, wait=not pending)
            if not pending:
                continue
            if self._write(pending):
                pending.clear()
                self._settle(held)
                held = 0
                self._closing.wait(self._every_s)
            else:
                if self._closing.is_set():
                    break
                self._closing.wait(self._retry_s)
        if pending and not self._write(pending):
            self._drop(held)
        self._settle(held)

    def _gather(self, pending: dict[str, Refusal], *, wait: bool) -> int:
        """Add what waits to `pending`, repeats in one; return how many notes that were."""
        count = 0
        while True:
            try:
                note = self._notes.get(block=wait)
            except queue.Empty:
                return count
            wait = False
            if note is None:
                return count
            count += 1
            self._add(pending, *note)

    def _add(self, pending: dict[str, Refusal], at: datetime, told: dict[str, str]) -> None:
        told = {name: printable(text, _LENGTHS[name]) for name, text in told.items()}
        if not self._is_new_enough(told):
            told |= {"calling_ae_title": VARIOUS, "called_ae_title": VARIOUS, "reason": f"{told['kind']} refused, under ever new names"}
        digest = _digest(told)
        before = pending.get(digest)
        if before is None and len(pending) >= self._waiting:
            self._drop(1)
            return
        if before is None:
            pending[digest] = Refusal(**told, count=1, first_at=at, last_at=at)
        else:
            pending[digest] = replace(before, count=before.count + 1, last_at=max(at, before.last_at), remedy=told["remedy"])

    def _is_new_enough(self, told: Mapping[str, str]) -> bool:
        """Whether an address still may have rows of its own: one that invents names must not push out everybody else's."""
        now = time.monotonic()
        if now - self._window > _WINDOW_S or len(self._distinct) > _ADDRESSES:
            self._distinct.clear()
            self._window = now
        seen = self._distinct.setdefault((told["kind"], told["address"]), set())
        if len(seen) < _OF_ONE_ADDRESS:
            seen.add(_digest(told))
            return True
        return _digest(told) in seen

    def _write(self, pending: Mapping[str, Refusal]) -> bool:
        # Sorted: two processes that write the same rows take their locks in one order.
        rows = [{"digest": digest, **_values(pending[digest])} for digest in sorted(pending)]

        def work(connection: Connection) -> None:
            if self._audit is not None:
                self._alert(self._audit, connection, pending)
            connection.execute(_UPSERT[connection.dialect.name], rows)
            edge = connection.execute(_EDGE.offset(self._capacity - 1).limit(1)).first()
            if edge is not None:
                connection.execute(_BEYOND, {"edge_at": edge.last_at, "edge": edge.digest})

        try:
            self._database.write(work, ordered=self._audit is not None)
        except StorageError as error:
            if not self._unavailable:  # said once an outage
                _log.warning("refusals.unwritten", extra={"reason": str(error)})
            self._unavailable = True
            return False
        except Exception:  # noqa: BLE001 - an edge: a fault of ours must not be the end of the diary's thread
            _log.exception("refusals.failed")
            self._drop(sum(refusal.count for refusal in pending.values()))
            return True
        self._unavailable = False
        return True

    def _alert(self, audit: AuditTrail, connection: Connection, pending: Mapping[str, Refusal]) -> None:
        """Audit what was not refused within the last hour, in the transaction that says so in the diary."""
        alerts = {digest: refusal for digest, refusal in pending.items() if refusal.kind in _ALERTS}
        if not alerts:
            return
        last = {row.digest: from_micros(row.last_at) for row in connection.execute(_LAST_OF, {"digests": sorted(alerts)})}
        for digest, refusal in sorted(alerts.items()):
            if digest in last and refusal.last_at - last[digest] < timedelta(seconds=_WINDOW_S):
                continue
            detail: dict[str, object] = {"kind": refusal.kind, "address": refusal.address, "calling_ae_title": refusal.calling_ae_title}
            detail |= {"called_ae_title": refusal.called_ae_title, "count": refusal.count}
            actor = refusal.peer or refusal.calling_ae_title or refusal.address
            audit.append(connection, AuditEvent("association.refused", outcome=refusal.reason, actor=actor, detail=detail))

    def _drop(self, count: int) -> None:
        with self._lock:
            self._dropped += count
        self._lost(count)

    def _settle(self, count: int) -> None:
        with self._settled:
            self._written += count
            self._settled.notify_all()

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def all(self, *, limit: int = 100, peer: str | None = None) -> list[Refusal]:
        """Return what was refused, the newest first.

        Parameters
        ----------
        limit
            At most so many rows.
        peer
            Of this peer alone; or of whoever called by this AE title, or from this address.

        Raises
        ------
        Unavailable, IntegrityError
            As ``Database.read``.
        """
        statement = _NEWEST.limit(limit)
        if peer is not None:
            statement = statement.where((REFUSALS.c.peer == peer) | (REFUSALS.c.calling_ae_title == peer) | (REFUSALS.c.address == peer))
        with self._database.read() as connection:
            return [_refusal(row) for row in connection.execute(statement)]

    def last_of_peers(self) -> dict[str, datetime]:
        """Return when each peer was refused last, by name; those that never were are not in it."""
        with self._database.read() as connection:
            return {name: from_micros(at) for name, at in connection.execute(_LAST_OF_PEERS)}


def printable(text: str, length: int) -> str:
    r"""Return a text in which every character that is not printable is escaped, as ``\x1b``, cut to `length`."""
    cut = text[: length + 1]
    shown = "".join(character if character.isprintable() else _escaped(character) for character in cut)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _digest(told: Mapping[str, str]) -> str:
    return hashlib.sha256("\0".join(told[name] for name in _IDENTITY).encode("utf-8", "backslashreplace")).hexdigest()


def _values(refusal: Refusal) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(refusal, name) for name in _LENGTHS}
    return {**values, "count": refusal.count, "first_at": to_micros(refusal.first_at), "last_at": to_micros(refusal.last_at)}


def _refusal(row: Row[Any]) -> Refusal:
    told = {name: getattr(row, name) for name in _LENGTHS}
    return Refusal(**told, count=row._mapping["count"], first_at=from_micros(row.first_at), last_at=from_micros(row.last_at))  # noqa: SLF001 - a Row has a method of that name
