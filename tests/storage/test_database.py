"""Database: durable when it says so, shared by processes, unreadable without its key, never vague about a fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event, text
from sqlcipher3 import dbapi2

from storage.database import Database, from_micros, to_micros
from storage.errors import IntegrityError, Unavailable
from tests.storage.support import KEY, RECEIVED, open_database

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection

CANARY = "Canary^Patient"
_INSERT = text("INSERT INTO audit (seq, at, action, outcome, actor, subject, detail, hash) VALUES (:seq, 0, :action, '', '', '', '', '')")


def put(connection: Connection, seq: int, action: str = "x") -> int:
    """Write one row, by number."""
    connection.execute(_INSERT, {"seq": seq, "action": action})
    return seq


def rows(database: Database) -> list[int]:
    """Read the numbers of all rows."""
    with database.read() as connection:
        return [row[0] for row in connection.execute(text("SELECT seq FROM audit ORDER BY seq"))]


def test_a_write_returns_its_result_and_is_read_back(database: Database) -> None:
    """What a work returns reaches its caller, and readers see what it wrote."""
    assert database.write(lambda connection: put(connection, 7)) == 7
    assert rows(database) == [7]


def test_an_exception_rolls_back_its_own_work_only(database: Database) -> None:
    """Works that wait together share a commit; the one that raises loses its rows, the others keep theirs."""
    gate, entered = threading.Event(), threading.Event()

    def block(_: Connection) -> None:
        entered.set()
        assert gate.wait(30)

    def fail(connection: Connection) -> None:
        put(connection, 2)
        raise LookupError("mine")

    caught: list[BaseException] = []

    def caller(work: object) -> None:
        try:
            database.write(work)  # type: ignore[arg-type]
        except LookupError as error:
            caught.append(error)

    works = [block, lambda c: put(c, 1), fail, lambda c: put(c, 3)]
    threads = [threading.Thread(target=caller, args=(work,)) for work in works]
    threads[0].start()
    assert entered.wait(30)
    for thread in threads[1:]:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert [str(error) for error in caught] == ["mine"]
    assert rows(database) == [1, 3]


def test_waiting_works_share_one_commit(database: Database) -> None:
    """Group commit: works handed in while another runs are committed together."""
    gate, entered, commits = threading.Event(), threading.Event(), list[int]()

    def block(_: Connection) -> None:
        entered.set()
        assert gate.wait(30)

    event.listen(database._backend.writer, "commit", lambda _: commits.append(1))
    first = threading.Thread(target=database.write, args=(block,))
    first.start()
    assert entered.wait(30)
    threads = [threading.Thread(target=database.write, args=(lambda c, n=n: put(c, n),)) for n in range(1, 21)]
    for thread in threads:
        thread.start()
    while database._tickets.qsize() < len(threads):
        time.sleep(0.001)
    gate.set()
    for thread in [first, *threads]:
        thread.join()
    assert sorted(rows(database)) == list(range(1, 21))
    assert len(commits) == 2


def test_on_commit_runs_after_a_commit_only(database: Database) -> None:
    """A callback of a work that raised is dropped, one of a work that was committed runs before its caller goes on."""
    ran: list[str] = []

    def good(_: Connection) -> None:
        database.on_commit(lambda: ran.append("good"))

    def bad(_: Connection) -> None:
        database.on_commit(lambda: ran.append("bad"))
        raise LookupError

    database.write(good)
    with pytest.raises(LookupError):
        database.write(bad)
    assert ran == ["good"]
    with pytest.raises(RuntimeError, match="inside"):
        database.on_commit(lambda: None)


def test_write_inside_of_write_is_refused(database: Database) -> None:
    """A nested write would wait for itself for ever; it raises instead."""
    with pytest.raises(RuntimeError, match="inside"):
        database.write(lambda _: database.write(lambda _: None))


def test_readers_cannot_write(database: Database) -> None:
    """A read connection refuses to change anything."""
    with pytest.raises(Unavailable), database.read() as connection:
        put(connection, 1)
    assert rows(database) == []


def test_a_reader_keeps_its_snapshot(database: Database) -> None:
    """What is committed while a reader reads does not change what it sees."""
    count = text("SELECT count(*) FROM audit")
    with database.read() as connection:
        assert connection.execute(count).scalar() == 0
        database.write(lambda c: put(c, 1))
        assert connection.execute(count).scalar() == 0
    assert rows(database) == [1]


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


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/name"])
def test_urls_that_hold_no_durable_database_are_refused(url: str) -> None:
    """An in-memory or unknown database is refused at once."""
    with pytest.raises(Unavailable, match=r"database\.url"):
        Database(url=url, key=KEY)


def test_a_missing_file_is_not_made_by_accident(tmp_path: Path) -> None:
    """Reading or writing where there is no database fails, names the remedy and leaves no empty file."""
    database = open_database(tmp_path)
    for attempt in (lambda: rows(database), lambda: database.write(lambda _: None), database.check):
        with pytest.raises(Unavailable, match="does not exist"):
            attempt()
    database.close()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_and_another_schema_are_named(database: Database, tmp_path: Path) -> None:
    """A database without schema and one of a newer version say what to do."""
    for number, remedy in (("9999", "newer version"), ("0000", "older schema")):
        database.write(lambda c, number=number: c.execute(text(f"UPDATE alembic_version SET version_num = '{number}'")))  # noqa: S608
        other = open_database(tmp_path)
        with pytest.raises(Unavailable, match=remedy):
            rows(other)
        with pytest.raises(Unavailable, match=remedy):
            other.write(lambda _: None)
        other.close()
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "node.db").touch()
    with pytest.raises(Unavailable, match="no schema"):
        rows(open_database(folder))


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


def test_changed_sees_commits_of_anyone_and_only_those(database: Database, tmp_path: Path) -> None:
    """The first call returns at once, a call without a commit in between runs out, a commit through another Database is seen."""
    assert database.changed(0)
    assert not database.changed(0.05)
    other = open_database(tmp_path)
    other.write(lambda c: put(c, 1))
    assert database.changed(0)
    assert not database.changed(0)
    timer = threading.Timer(0.05, other.write, args=(lambda c: put(c, 2),))
    timer.start()
    assert database.changed(30)
    timer.join()
    other.close()


def test_a_closed_database_refuses_work(database: Database) -> None:
    """After close, which finishes what waits and may be repeated, everything is Unavailable."""
    database.write(lambda c: put(c, 1))
    database.close()
    database.close()
    for attempt in (lambda: database.write(lambda _: None), lambda: rows(database), lambda: database.changed(0), database.check):
        with pytest.raises(Unavailable, match="closed"):
            attempt()


def test_errors_carry_no_values(database: Database) -> None:
    """The text of an engine's error never holds what was to be written: it would end in a log."""
    database.write(lambda c: put(c, 1, CANARY))
    with pytest.raises(IntegrityError) as caught:
        database.write(lambda c: put(c, 1, CANARY))
    chain: BaseException | None = caught.value
    while chain is not None:
        assert CANARY not in str(chain)
        chain = chain.__cause__ or chain.__context__


def test_times_are_kept_to_the_microsecond() -> None:
    """Storing and reading a time gives the same time back."""
    assert from_micros(to_micros(RECEIVED)) == RECEIVED


# -- processes -----------------------------------------------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from tests.storage.support import open_database
from tests.storage.test_database import put
database = open_database(Path(sys.argv[1]))
database.migrate()
start, step, number = (int(argument) for argument in sys.argv[2:])
for seq in range(start, start + step * number, step):
    database.write(lambda connection: put(connection, seq))
    print(seq, flush=True)
database.close()
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process on `script`, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Two processes create the same new database and write to it at the same time: every row of both is there."""
    processes = [start(_WRITER, tmp_path, first, 2, 150) for first in (1, 2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    database = open_database(tmp_path)
    assert rows(database) == list(range(1, 301))
    database.close()


@pytest.mark.parametrize("after", [1, 20, 60])
def test_sigkill_keeps_what_was_committed(database: Database, tmp_path: Path, after: int) -> None:
    """Whatever write() returned from before a SIGKILL is in the database; at most the one in flight is there besides."""
    process = start(_WRITER, tmp_path, 1, 1, 100_000)
    assert process.stdout is not None
    printed = [int(process.stdout.readline()) for _ in range(after)]
    os.kill(process.pid, signal.SIGKILL)
    printed += [int(line) for line in process.stdout.read().splitlines()]
    process.wait()
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()
    database.migrate()
    found = rows(database)
    database.write(lambda connection: put(connection, 1_000_000))
    database.check()
    assert found[: len(printed)] == printed
    assert len(found) - len(printed) <= 1


def test_a_forked_child_is_refused(database: Database) -> None:
    """Sharing a Database over a fork would corrupt the file; the child gets an error instead."""
    child = os.fork()
    if child == 0:
        try:
            database.write(lambda _: None)
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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
