"""When each peer associated last: for whoever wonders whether a camera is still alive, across processes, nodes and restarts.

A peer is written at most once a minute, by a thread of its own: nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy import BigInteger, Column, Table, Text, select
from sqlalchemy.dialects import postgresql, sqlite

from storage.database import METADATA, from_micros, to_micros
from storage.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy import Connection

    from storage.database import Database

VISITS = Table(
    "visits",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("last_at", BigInteger, nullable=False),
    Column("address", Text, nullable=False),
)
_EVERY_S = 60.0
_log = logging.getLogger(__name__)


def _upsert(made: Any) -> Any:
    statement = made(VISITS)
    latest = {"last_at": statement.excluded.last_at, "address": statement.excluded.address}
    return statement.on_conflict_do_update(index_elements=("name",), set_=latest, where=VISITS.c.last_at < statement.excluded.last_at)


_UPSERT: Final[Mapping[str, Any]] = {"sqlite": _upsert(sqlite.insert), "postgresql": _upsert(postgresql.insert)}


@dataclass(frozen=True, slots=True)
class Visit:
    """When a peer associated last, and from where."""

    last_at: datetime
    address: str


class Visits:
    """Writes when peers associate.

    Parameters
    ----------
    database
        Where it is kept; its clock gives the times.
    every_s
        A peer that was written is not written again for so long.
    """

    def __init__(self, *, database: Database, every_s: float = _EVERY_S) -> None:
        self._database = database
        self._every_s = every_s
        self._lock = threading.Lock()
        self._noted: dict[str, float] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="visits")
        self._closed = False

    def note(self, name: str, address: str) -> None:
        """Hear that a peer associated; never waits, never raises.

        Parameters
        ----------
        name
            Of the peer.
        address
            IP address it called from.
        """
        now = time.monotonic()
        with self._lock:
            if self._closed or now - self._noted.get(name, float("-inf")) < self._every_s:
                return
            self._noted[name] = now
            try:
                self._writer.submit(self._write, {"name": name, "last_at": to_micros(self._database.clock()), "address": address})
            except RuntimeError as error:  # no thread is to be had
                _log.warning("visits.unwritten", extra={"reason": str(error)})

    def close(self) -> None:
        """Write what was noted, and end the thread."""
        with self._lock:
            self._closed = True
        self._writer.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(_UPSERT[connection.dialect.name], row)

        try:
            self._database.write(work, ordered=False)
        except StorageError as error:  # the database away is said elsewhere; the next association tries again
            _log.debug("visits.unwritten", extra={"reason": str(error)})
            with self._lock:
                self._noted.pop(row["name"], None)
        except Exception:  # noqa: BLE001 - an edge: nobody looks at what the thread's work came to
            _log.exception("visits.failed")


def last_visits(database: Database) -> dict[str, Visit]:
    """Return when each peer associated last, by name; those that never did are not in it.

    Raises
    ------
    Unavailable, IntegrityError
        As ``Database.read``.
    """
    with database.read() as connection:
        return {row.name: Visit(from_micros(row.last_at), row.address) for row in connection.execute(select(VISITS))}
