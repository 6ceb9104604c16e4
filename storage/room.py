"""Whether the database has room for more: a transaction that writes nothing succeeds on a full disk, and so does a row that fits in a page.

So something is written that needs new pages, and nothing of it stays. It is written at most once in some seconds, however often it is
asked for: a page that anybody may ask for must not become the database's load.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storage.errors import StorageError, Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

EVERY_S: Final = 10.0
NEEDED: Final = 1 << 20
"""Bytes. An instance takes some pages of each of a dozen tables and indexes."""
_ROW: Final = 900
"""Characters; short enough that PostgreSQL neither compresses it nor puts it elsewhere."""


class Room:
    """Tells whether the database takes something that needs room. May be asked from many threads.

    Parameters
    ----------
    database
        Whose disk is tried.
    every_s
        Seconds for which an answer is good.
    monotonic
        Seconds of a clock that is never set.
    """

    def __init__(self, *, database: Database, every_s: float = EVERY_S, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._every_s = every_s
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._tried_at = -math.inf
        self._fault: StorageError | None = None

    def check(self) -> None:
        """Try it, or say what was found when it was tried last.

        Raises
        ------
        Unavailable, IntegrityError
            With cause and remedy.
        """
        with self._lock:
            now = self._monotonic()
            due = now - self._tried_at >= self._every_s
            if due:
                self._tried_at = now
        if due:  # one tries, and whoever comes meanwhile goes by what was found before
            try:
                self._database.write(_try, ordered=False)
            except StorageError as error:
                self._fault = error
            else:
                self._fault = None
        fault = self._fault
        if fault is not None:
            raise type(fault)(*fault.args)  # an object of its own: tracebacks grow in every thread that raises it


def _try(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        _extend(connection)
    else:
        _append(connection)


def _extend(connection: Connection) -> None:
    """Have PostgreSQL make new pages: of a temporary table, which no log and no other session knows, on the disk of the database itself.

    What a full disk left of the last try is truncated first: its pages would be room. A user who may make no such table tries nothing: the
    node works without that right.
    """
    if not connection.exec_driver_sql("SELECT has_database_privilege(current_database(), 'TEMPORARY')").scalar_one():
        return
    connection.exec_driver_sql("SELECT set_config('temp_tablespaces', '', true)")  # for this transaction
    connection.exec_driver_sql("CREATE TEMPORARY TABLE IF NOT EXISTS dicom_node_room (filler text)")
    connection.exec_driver_sql("TRUNCATE pg_temp.dicom_node_room")
    connection.exec_driver_sql(
        f"INSERT INTO pg_temp.dicom_node_room SELECT repeat('x', {_ROW}) FROM generate_series(1, {NEEDED // _ROW})"  # noqa: S608 - numbers
    )
    connection.exec_driver_sql("TRUNCATE pg_temp.dicom_node_room")


def _append(connection: Connection) -> None:
    """Have SQLite write a page of the file, unchanged, into its log; a log has pages to spare for a while, so the disk is asked too."""
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    connection.exec_driver_sql(f"PRAGMA user_version = {int(version)}")
    (file,) = (Path(row[2]) for row in connection.exec_driver_sql("PRAGMA database_list") if row[1] == "main")
    if shutil.disk_usage(file.parent).free < NEEDED:
        raise Unavailable("the disk of the data directory is full: free some space; senders will try again")
