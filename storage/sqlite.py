"""The embedded engine: SQLite with SQLCipher. Write-ahead log, ``synchronous=FULL``, every page encrypted and authenticated.

One file, shared by the processes of one machine; SQLite's write lock orders them.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import sqlalchemy.exc
from sqlalchemy import URL, Connection, Engine, create_engine
from sqlalchemy.pool import NullPool, QueuePool
from sqlcipher3 import dbapi2

from storage.errors import IntegrityError, StorageError, Unavailable

_BUSY, _READONLY, _IOERR, _CORRUPT, _FULL, _CANTOPEN, _CONSTRAINT, _NOTADB = 5, 8, 10, 11, 13, 14, 19, 26  # SQLite's result codes
_KEY_BYTES: Final = 32


class SqliteBackend:
    """What differs on SQLite; see :class:`storage.database.Backend`.

    Parameters
    ----------
    url
        ``sqlite:////absolute/path/of/file.db``.
    key
        32 bytes, the raw database key from the key ring. There is no file without one: plaintext never touches the disk.
    busy_timeout_s
        How long a write waits for the write lock of another process.
    readers
        Pooled read connections (the same number again may be opened in a rush).
    """

    driver_error: type[Exception] = dbapi2.Error

    def __init__(self, *, url: URL, key: bytes | None, busy_timeout_s: float, readers: int) -> None:
        if not url.database or url.database == ":memory:":
            raise Unavailable("database.url: sqlite:////path/of/file.db holds a database that lasts; leave it empty for the embedded one")
        if key is None or len(key) != _KEY_BYTES:
            raise Unavailable("the embedded database needs a key of 32 bytes: take it from the key ring (dicom-node keys init)")
        self._path = Path(url.database)
        self._key = key
        self._busy_timeout_s = busy_timeout_s
        self._watch: Any = None
        self._watch_lock = threading.Lock()
        self._closed = False
        self.writer = self._engine(cache_kib=65536)
        self.reader = self._engine(cache_kib=32768, readers=readers)

    # -- connections -------------------------------------------------------------------------------------------------------------

    def _engine(self, *, cache_kib: int, readers: int = 0) -> Engine:
        def creator() -> Any:
            return self.connect(cache_kib=cache_kib, query_only=readers > 0)

        pool: dict[str, Any] = {"poolclass": NullPool}
        if readers:
            pool = {"poolclass": QueuePool, "pool_size": readers, "max_overflow": readers, "pool_timeout": self._busy_timeout_s}
            pool["pool_use_lifo"] = True  # the connection whose page cache is warm
        # hide_parameters: an error's text must never carry a patient's name into a log.
        return create_engine("sqlite+pysqlite://", module=dbapi2, creator=creator, hide_parameters=True, **pool)

    def connect(self, *, cache_kib: int = 2048, query_only: bool = False) -> Any:
        """Open one driver connection in autocommit mode (transactions are begun in so many words), key first."""
        if not self._path.exists():
            raise Unavailable("the database file does not exist: start the node once to create it, or check the data directory")
        connection = dbapi2.connect(
            f"{self._path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,  # the pool hands a connection from thread to thread, never to two at once
            cached_statements=256,
        )
        try:
            connection.execute("PRAGMA cipher_log_level = NONE")  # its own lines on stderr are not in the log's form
            connection.execute(f"PRAGMA key = \"x'{self._key.hex()}'\"")
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # the key is only tried at the first page read
            for pragma in (
                "synchronous = FULL",
                "foreign_keys = ON",
                "temp_store = MEMORY",  # sorters must not spill plaintext to a disk
                "case_sensitive_like = ON",  # as PostgreSQL
                "journal_size_limit = 67108864",
                f"cache_size = -{cache_kib}",
                f"query_only = {'ON' if query_only else 'OFF'}",
            ):
                connection.execute(f"PRAGMA {pragma}").fetchall()
        except dbapi2.Error:
            connection.close()
            raise
        return connection

    # -- transactions ------------------------------------------------------------------------------------------------------------

    def begin_read(self, connection: Connection) -> None:
        """Begin a snapshot."""
        _say(connection, "BEGIN")

    def end_read(self, connection: Connection) -> None:
        """Nothing: the pool rolls back."""

    def begin_write(self, connection: Connection, *, ordered: bool, ask_revision: bool) -> str | None:  # noqa: ARG002 - all are
        """Take the write lock and begin the first savepoint."""
        _say(connection, "BEGIN IMMEDIATE")
        found = _say(connection, "SELECT version_num FROM alembic_version").fetchone() if ask_revision else None
        _say(connection, "SAVEPOINT work")
        return None if found is None else str(found[0])

    def next_savepoint(self, connection: Connection) -> None:
        """End the savepoint and begin the next."""
        _say(connection, "RELEASE SAVEPOINT work")
        _say(connection, "SAVEPOINT work")

    def before_commit(self, connection: Connection, *, ordered: bool) -> None:
        """Nothing: other processes look at the file."""

    def lives(self, connection: Connection) -> bool:
        """Tell whether the transaction is still there: on a full disk the engine rolls back everything."""
        return bool(cast("Any", connection.connection.driver_connection).in_transaction)

    def spoilt(self, connection: Connection) -> bool:  # noqa: ARG002 - the same question for every engine
        """Tell whether a failed statement keeps the work from going on: never here."""
        return False

    # -- waiting for others ------------------------------------------------------------------------------------------------------

    def wait_for_change(self, seen: int | None, timeout_s: float) -> int:
        """Wait until the number of the last commit, by anyone, is another than `seen`, and return it.

        ``PRAGMA data_version`` costs microseconds; it is asked every 20 ms, later every 100 ms.
        """
        deadline = time.monotonic() + timeout_s
        pause = 0.02
        while (version := self._data_version()) == seen and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(pause * 1.2, 0.1)
        return version

    def _data_version(self) -> int:
        with self._watch_lock:
            if self._closed:
                raise Unavailable("the database is closed: the node is stopping")
            if self._watch is None:
                self._watch = self.connect()
            return int(self._watch.execute("PRAGMA data_version").fetchone()[0])

    # -- life --------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def migration(self) -> Iterator[Connection]:
        """Create the file if there is none, and give a transaction that no other process migrates beside (a file lock)."""
        with self._migration_lock():
            if not self._path.exists():
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
                _flush_directory(self._path.parent)
            plain = self.connect()
            try:
                mode = plain.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            finally:
                plain.close()
            if mode != "wal":
                raise Unavailable("the file system cannot hold a write-ahead log: put the data directory on a local disk")
            with self.writer.connect() as connection, connection.begin():
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection

    @contextmanager
    def _migration_lock(self) -> Iterator[None]:
        handle = os.open(f"{self._path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def freeze(self, connection: Connection, tables: Sequence[str]) -> None:
        """Nothing: who writes has the only write lock."""

    def weaknesses(self, connection: Connection) -> list[str]:  # noqa: ARG002 - the same question for every engine
        """Return none: the settings that durability rests on are made at each connection."""
        return []

    def close(self) -> None:
        """Close every connection."""
        self.writer.dispose()
        self.reader.dispose()
        with self._watch_lock:
            self._closed = True
            if self._watch is not None:
                self._watch.close()
                self._watch = None

    # -- errors ------------------------------------------------------------------------------------------------------------------

    def lost(self, error: BaseException) -> bool:  # noqa: ARG002 - the same question for every engine
        """Tell whether the connection was lost before anything was done: a file is not lost."""
        return False

    def fatal(self, error: BaseException) -> bool:
        """Tell whether writing must stop for good: a failed flush. What the kernel dropped it may report as written the next time."""
        return _code(error) == _IOERR

    def translated(self, error: BaseException) -> StorageError | None:
        """Return our error for one of the engine's, with cause and remedy; None for what it has no words for."""
        match _code(error):
            case code if code == _BUSY:
                return Unavailable(
                    "another process holds the database's write lock: look for a stuck process on the data directory, then try again"
                )
            case code if code == _FULL:
                return Unavailable("the disk of the data directory is full: free some space; senders will try again")
            case code if code == _IOERR:
                return Unavailable("the disk of the data directory reports an input/output error: check the disk and the kernel's log")
            case code if code in (_READONLY, _CANTOPEN):
                return Unavailable("the database file cannot be opened for writing: check owner, rights and mount of the data directory")
            case code if code == _NOTADB:
                return IntegrityError(
                    "the key does not open the database, or its first page is damaged: check that the key ring is the one it was made "
                    "with; if it is, restore the data directory from its copy"
                )
            case code if code == _CORRUPT:
                return IntegrityError("pages of the database are damaged: check the disk, then restore the data directory from its copy")
            case code if code == _CONSTRAINT:
                return IntegrityError("the database refused a change that contradicts what it holds")
        return None


def _say(connection: Connection, statement: str) -> Any:
    driver: Any = connection.connection.driver_connection
    return driver.execute(statement)


def _code(error: BaseException) -> int:
    """Return SQLite's primary result code of an engine error, 0 for any other error."""
    original = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    return int(getattr(original, "sqlite_errorcode", 0)) & 0xFF


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
