"""Duties: what has to be done from time to time by one process of all nodes (scrub, sweeps, retention).

A duty is a row with the time when it is due again. Whoever takes it holds it for a while and renews; one that died leaves it to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Column, Row, Table, Text, bindparam, insert, select, update

from storage.database import METADATA, from_micros, to_micros
from storage.errors import LeaseLost

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

DUTIES = Table(
    "duties",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("due_at", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("held_until", BigInteger, nullable=False),
    Column("cursor", Text, nullable=False),
    Column("finished_at", BigInteger),
    Column("outcome", Text, nullable=False),
)
_FIND = select(DUTIES).where(DUTIES.c.name == bindparam("duty")).with_for_update()
_ALL = select(DUTIES).order_by(DUTIES.c.name)


@dataclass(frozen=True, slots=True)
class Duty:
    """A duty as it stands."""

    name: str
    due_at: datetime
    holder: str
    cursor: str
    """How far the last round came, in words of the duty; empty: at the start."""
    finished_at: datetime | None
    outcome: str
    """Of the last finished round, for people."""


class Duties:
    """Hands each duty to one holder at a time.

    Parameters
    ----------
    database
        Where they are kept; its clock decides what is due.
    holder
        Who asks: node and process.
    lease_s
        Seconds after which a holder that did not `renew` is taken for dead.
    """

    def __init__(self, *, database: Database, holder: str, lease_s: float = 120.0) -> None:
        self._database = database
        self._holder = holder
        self._lease = int(lease_s * 1_000_000)

    def take(self, name: str, *, every_s: float, at_once: bool = True) -> Duty | None:
        """Take the duty if it is due and nobody holds it; None otherwise. A new duty is due `at_once`, or in `every_s`.

        A due time further ahead than `every_s` is the work of a wrong clock, and counts as due.
        """

        def work(connection: Connection) -> Duty | None:
            now = self._now()
            far = now + int(every_s * 1_000_000)
            row = connection.execute(_FIND, {"duty": name}).first()
            if row is None:
                values = {"name": name, "due_at": now if at_once else far, "holder": "", "held_until": 0, "cursor": "", "outcome": ""}
                connection.execute(insert(DUTIES).inline(), values)
                row = connection.execute(_FIND, {"duty": name}).one()
            held = row.holder and row.holder != self._holder and now < row.held_until <= now + self._lease
            if held or now < row.due_at <= far:
                return None
            self._set(connection, name, {"holder": self._holder, "held_until": now + self._lease})
            return _duty(row)

        return self._database.write(work)

    def renew(self, name: str, *, cursor: str) -> None:
        """Say that the work goes on, and how far it came.

        Raises
        ------
        LeaseLost
            Another process took the duty.
        """
        self._held(name, lambda now: {"held_until": now + self._lease, "cursor": cursor})

    def finish(self, name: str, *, every_s: float, outcome: str, cursor: str = "") -> None:
        """End the round: due again in `every_s`.

        Raises
        ------
        LeaseLost
            Another process took the duty.
        """
        self._held(
            name,
            lambda now: {
                "holder": "",
                "held_until": 0,
                "due_at": now + int(every_s * 1_000_000),
                "cursor": cursor,
                "finished_at": now,
                "outcome": outcome,
            },
        )

    def put(self, name: str, *, cursor: str) -> None:
        """Set by hand how far a duty came, and have it due now; who holds it gets :class:`LeaseLost`."""

        def work(connection: Connection) -> None:
            values = {"due_at": self._now(), "holder": "", "held_until": 0, "cursor": cursor}
            if connection.execute(_FIND, {"duty": name}).first() is None:
                connection.execute(insert(DUTIES).inline(), {"name": name, "outcome": "", **values})
            else:
                self._set(connection, name, values)

        self._database.write(work)

    def all(self) -> list[Duty]:
        """Return every duty, by name."""
        with self._database.read() as connection:
            return [_duty(row) for row in connection.execute(_ALL)]

    def _held(self, name: str, values: Callable[[int], dict[str, Any]]) -> None:
        def work(connection: Connection) -> None:
            row = connection.execute(_FIND, {"duty": name}).first()
            if row is None or row.holder != self._holder:
                raise LeaseLost(f"another process took the duty {name}")
            self._set(connection, name, values(self._now()))

        self._database.write(work)

    def _now(self) -> int:
        return to_micros(self._database.clock())

    @staticmethod
    def _set(connection: Connection, name: str, values: dict[str, Any]) -> None:
        connection.execute(update(DUTIES).where(DUTIES.c.name == name).values(values))


def _duty(row: Row[Any]) -> Duty:
    finished_at = None if row.finished_at is None else from_micros(row.finished_at)
    return Duty(row.name, from_micros(row.due_at), row.holder, row.cursor, finished_at, row.outcome)
