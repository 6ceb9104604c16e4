"""SQLite: unreadable without its key, durable when it says so, never vague about a fault of file or disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlcipher3 import dbapi2

from storage.database import Database
from storage.errors import IntegrityError, Unavailable
from tests.storage.support import open_database
from tests.storage.test_database import CANARY, put, rows

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection


@pytest.fixture
def engine() -> str:
    """Run these over SQLite alone."""
    return "sqlite"


def test_nothing_on_the_disk_is_readable(database: Database, tmp_path: Path) -> None:
    """No plaintext in database, write-ahead log or shared memory, before and after the log is folded in."""
    database.write(lambda c: put(c, 1, CANARY))

    def leaks() -> list[str]:
        contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert "node.db" in contents
        return [
            name for name, content in contents.items() if CANARY.encode() in content or b"SQLite format" in content or b"audit" in content
        ]

    assert (tmp_path / "node.db-wal").stat().st_size > 0
    assert leaks() == []
    database.close()
    assert leaks() == []


def test_the_files_are_for_the_owner_only(database: Database, tmp_path: Path) -> None:
    """No file of the database can be read by other users of the machine."""
    database.write(lambda c: put(c, 1))
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in tmp_path.iterdir() if path.stat().st_mode & 0o077} == {}


def test_settings_that_durability_and_secrecy_rest_on(database: Database) -> None:
    """Synchronous FULL, write-ahead log, foreign keys and memory-only temporary files hold on writer and readers."""
    wanted = {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1, "temp_store": 2}

    def settings(connection: Connection) -> dict[str, object]:
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted}

    assert database.write(settings) == wanted
    with database.read() as connection:
        assert settings(connection) == wanted


def test_a_wrong_key_is_named(database: Database, tmp_path: Path) -> None:
    """Another key raises IntegrityError that speaks of the key ring, for readers, writers and migration."""
    database.write(lambda c: put(c, 1))
    other = open_database(tmp_path, key=bytes(32))
    for attempt in (other.migrate, lambda: other.write(lambda _: None), lambda: rows(other), other.check):
        with pytest.raises(IntegrityError, match="key ring"):
            attempt()
    other.close()
    assert rows(database) == [1]


@pytest.mark.parametrize("key", [None, b"", b"short", bytes(33)])
def test_no_database_without_a_whole_key(tmp_path: Path, key: bytes | None) -> None:
    """There is no way to open a database in plaintext or with a cut key."""
    with pytest.raises(Unavailable, match="32 bytes"):
        Database(url=f"sqlite:///{tmp_path / 'node.db'}", key=key)


def test_a_missing_file_is_not_made_by_accident(tmp_path: Path) -> None:
    """Reading or writing where there is no database fails, names the remedy and leaves no empty file."""
    database = open_database(tmp_path)
    for attempt in (lambda: rows(database), lambda: database.write(lambda _: None), database.check):
        with pytest.raises(Unavailable, match="does not exist"):
            attempt()
    database.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("pages", "message"), [(slice(0, 1), "key ring"), (slice(1, None), "damaged")])
def test_a_flipped_bit_is_detected(database: Database, tmp_path: Path, pages: slice, message: str) -> None:
    """A changed bit in any page is an IntegrityError when the page is read, never other data."""
    database.write(lambda c: [put(c, n, "x" * 500) for n in range(1, 100)])
    database.close()
    path = tmp_path / "node.db"
    content = bytearray(path.read_bytes())
    for number in range(len(content) // 4096)[pages]:
        content[number * 4096 + 2000] ^= 1
    path.write_bytes(content)
    broken = open_database(tmp_path)
    with pytest.raises(IntegrityError, match=message):
        rows(broken)
    with pytest.raises(IntegrityError, match=message):
        broken.write(lambda c: c.execute(text("SELECT * FROM audit")).all())
    broken.close()


def test_a_full_disk_fails_the_write_and_recovers(database: Database) -> None:
    """SQLITE_FULL makes the write Unavailable with the remedy, nothing of it stays, and the next one works again."""
    database.write(lambda c: put(c, 1))

    def too_much(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        for number in range(2, 5000):
            put(connection, number, "x" * 1000)

    with pytest.raises(Unavailable, match="full"):
        database.write(too_much)
    assert rows(database) == [1]
    database.write(lambda c: put(c, 2))
    database.check()
    assert rows(database) == [1, 2]


def test_a_lock_held_by_another_process_ends_in_unavailable(database: Database, tmp_path: Path) -> None:
    """A writer that waits longer than its busy timeout gets Unavailable, reads go on, and it works again afterwards."""
    database.close()
    database = open_database(tmp_path, busy_timeout_s=0.2)
    database.write(lambda _: None)
    holder = database._backend.connect()
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="write lock"):
        database.write(lambda c: put(c, 1))
    assert rows(database) == []
    holder.execute("ROLLBACK")
    holder.close()
    database.write(lambda c: put(c, 1))
    assert rows(database) == [1]
    database.close()


def test_check_names_a_writer_that_is_stuck(database: Database) -> None:
    """Readiness fails, and does not hang, while the write lock is held elsewhere."""
    holder = database._backend.connect()
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="took no write"):
        database.check(timeout_s=0.05)
    holder.execute("ROLLBACK")
    holder.close()
    database.check()


def test_a_failed_flush_is_never_success(database: Database, tmp_path: Path) -> None:
    """When flushing fails, the write is Unavailable, and so is every later one and readiness: no retry-and-hope."""

    def fail(connection: Connection) -> None:
        put(connection, 1)
        error = dbapi2.OperationalError("disk I/O error")
        error.sqlite_errorcode = 1034  # SQLITE_IOERR_FSYNC
        connection.connection.driver_connection.execute("ROLLBACK")  # type: ignore[union-attr]  # as SQLite itself does on such an error
        raise error

    with pytest.raises(Unavailable, match="input/output error"):
        database.write(fail)
    for attempt in (lambda: database.write(lambda c: put(c, 2)), database.check):
        with pytest.raises(Unavailable, match="until the node is restarted"):
            attempt()
    assert rows(database) == []
    database.close()
    again = open_database(tmp_path)
    again.write(lambda c: put(c, 3))
    assert rows(again) == [3]
    again.close()
