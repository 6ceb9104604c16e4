"""Database, on both engines: durable when it says so, shared by processes, never vague about a fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy.exc
from sqlalchemy import event, text

from storage.database import HEAD, Database, from_micros, storable, to_micros
from storage.errors import IntegrityError, Unavailable
from tests.storage.support import KEY, RECEIVED, open_database

if TYPE_CHECKING:
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


def test_who_waits_is_answered_when_an_error_cannot_be_put_into_words(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in what translates the engine's errors ends neither the writer nor the waiting: Unavailable, and the next write works."""

    def fail(*_: object, **__: object) -> None:
        raise sqlalchemy.exc.OperationalError("COMMIT", {}, OSError("the connection is gone"))

    def speechless(_: BaseException) -> None:
        raise KeyError("getpwuid(): uid not found: 1000710000")

    with monkeypatch.context() as patched:
        patched.setattr(database._backend, "before_commit", fail)
        patched.setattr(database._backend, "translated", speechless)
        with pytest.raises(Unavailable, match=r"the database failed \(OperationalError\)"):
            database.check()
    assert database.write(lambda connection: put(connection, 7)) == 7


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
    while len(database._tickets) < len(threads):
        time.sleep(0.001)
    gate.set()
    for thread in [first, *threads]:
        thread.join()
    assert sorted(rows(database)) == list(range(1, 21))
    assert len(commits) == 2


def test_who_writes_alone_needs_no_other_thread(database: Database) -> None:
    """A work that nobody is in the way of runs in its caller's thread, one that comes meanwhile in the writer's; the next alone again."""
    gate, entered = threading.Event(), threading.Event()
    ran: dict[str, int] = {}

    def work(name: str) -> None:
        def note(_: Connection) -> int:
            if name == "first":
                entered.set()
                assert gate.wait(30)
            ran[name] = threading.get_ident()
            return threading.get_ident()

        assert database.write(note) == ran[name]
        alone[name] = ran[name] == threading.get_ident()

    alone: dict[str, bool] = {}
    first, second, third = (threading.Thread(target=work, args=(name,)) for name in ("first", "second", "third"))
    first.start()
    assert entered.wait(30)
    second.start()
    while not database._tickets:
        time.sleep(0.001)
    gate.set()
    first.join()
    second.join()
    third.start()
    third.join()
    assert alone == {"first": True, "second": False, "third": True}


def test_closing_waits_for_who_writes_alone(database: Database) -> None:
    """A work that was begun is committed before the connections go."""
    gate, entered, results = threading.Event(), threading.Event(), list[str]()

    def work(connection: Connection) -> str:
        entered.set()
        assert gate.wait(30)
        put(connection, 1)
        return "committed"

    writer = threading.Thread(target=lambda: results.append(database.write(work)))
    writer.start()
    assert entered.wait(30)
    closer = threading.Thread(target=database.close)
    closer.start()
    while not database._closed:
        time.sleep(0.001)
    gate.set()
    writer.join()
    closer.join()
    assert results == ["committed"]


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


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/name"])
def test_urls_that_hold_no_durable_database_are_refused(url: str) -> None:
    """An in-memory or unknown database is refused at once."""
    with pytest.raises(Unavailable, match=r"database\.url"):
        Database(url=url, key=KEY)


def test_an_empty_database_and_another_schema_are_named(database: Database, place: str) -> None:
    """A database of a newer or older version says what to do, to who opens it and to who had it open when it was changed."""
    rows(database)
    for number, remedy in (
        ("9999", "newer version"),
        ("0000", "older schema"),
        (f"unfinished-{HEAD}", "finished"),
        (f"retired-{HEAD}", "moved"),
    ):
        with database._backend.writer.connect() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :number"), {"number": number})
        with pytest.raises(Unavailable, match=remedy):
            database.write(lambda _: None)
        other = open_database(place)
        with pytest.raises(Unavailable, match=remedy):
            rows(other)
        with pytest.raises(Unavailable, match=remedy):
            other.write(lambda _: None)
        other.close()


def test_a_database_without_schema_is_named(new_place: str) -> None:
    """Before the first migration everything is refused, with the remedy."""
    if "://" not in new_place:
        Path(new_place, "node.db").touch()
    database = open_database(new_place)
    for attempt in (lambda: rows(database), lambda: database.write(lambda _: None)):
        with pytest.raises(Unavailable, match=r"no schema.+migrate.+restore.+reindex.+before any node starts"):
            attempt()
    database.close()


def test_a_reader_that_finds_the_schema_while_a_write_begins(database: Database, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's first write and first read at once: the write is not refused because the read was faster."""
    fresh = open_database(place)
    begin_write = fresh._backend.begin_write

    def slow(*arguments: Any, **more: Any) -> str | None:
        revision = begin_write(*arguments, **more)
        rows(fresh)  # another thread's, in life
        return revision

    monkeypatch.setattr(fresh._backend, "begin_write", slow)
    fresh.write(lambda c: put(c, 1))
    assert rows(fresh) == [1]
    fresh.close()


def test_changed_sees_commits_of_anyone_and_only_those(database: Database, place: str) -> None:
    """The first call returns at once, a call without a commit in between runs out, a commit through another Database is seen."""
    assert database.changed(30)
    while database.changed(0.2):  # PostgreSQL: whoever begins to listen takes it for news
        pass
    assert not database.changed(0.05)
    other = open_database(place)
    other.write(lambda c: put(c, 1))
    assert database.changed(30)
    assert not database.changed(0)
    timer = threading.Timer(0.05, other.write, args=(lambda c: put(c, 2),))
    timer.start()
    assert database.changed(30)
    timer.join()
    other.close()


def test_closing_wakes_who_waits_for_a_change(database: Database) -> None:
    """A thread that waits for commits when the database is closed gets Unavailable."""
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            while True:
                database.changed(60)
        except Unavailable as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    database.close()
    thread.join(30)
    assert ["closed" in str(error) for error in caught] == [True]


def test_a_callback_that_raises_stops_nobody(database: Database) -> None:
    """What is committed is committed: its caller gets the result, the other callbacks run, and the next write works."""
    ran: list[str] = []

    def work(connection: Connection) -> int:
        database.on_commit(lambda: ran.append("first"))
        database.on_commit(lambda: ran.remove("never"))
        database.on_commit(lambda: ran.append("last"))
        return put(connection, 1)

    assert database.write(work) == 1
    assert database.write(lambda connection: put(connection, 2)) == 2
    assert (ran, rows(database)) == (["first", "last"], [1, 2])


def test_a_swallowed_failure_is_not_committed_by_halves(database: Database) -> None:
    """A work that goes on after a statement failed either keeps all the rest of it (SQLite) or is refused whole (PostgreSQL)."""

    def work(connection: Connection) -> None:
        put(connection, 1)
        with suppress(sqlalchemy.exc.IntegrityError):
            put(connection, 1)

    with suppress(RuntimeError):
        database.write(work)
    database.write(lambda connection: put(connection, 2))
    assert rows(database) in ([1, 2], [2])


def test_text_is_the_same_on_both_engines(database: Database) -> None:
    """NUL, which PostgreSQL cannot hold, becomes U+FFFD; case, accents and digits are ordered by their bytes; LIKE minds the case."""
    words = ["a\0b", "B", "a", "\u00e9", "_", "10", "9", "A"]
    database.write(lambda connection: [put(connection, number, word) for number, word in enumerate(words)])
    with database.read() as connection:
        found = connection.execute(text("SELECT action FROM audit ORDER BY action")).scalars().all()
        like = connection.execute(text("SELECT action FROM audit WHERE action LIKE 'a%' ESCAPE '!' ORDER BY seq")).scalars().all()
        exact = connection.execute(text("SELECT seq FROM audit WHERE action = :word"), {"word": "a\0b"}).scalars().all()
    assert found == sorted((storable(word) for word in words), key=str.encode)
    assert (like, exact) == (["a\ufffdb", "a"], [0])


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
    without_actor = text("INSERT INTO audit VALUES (2, 0, :canary, '', NULL, '', '', '')")  # PostgreSQL would show the whole row
    for work in (lambda c: put(c, 1, CANARY), lambda c: c.execute(without_actor, {"canary": CANARY})):
        with pytest.raises(IntegrityError) as caught:
            database.write(work)
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
from tests.storage.support import open_database
from tests.storage.test_database import put
database = open_database(sys.argv[1])
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


def test_two_processes_write_at_once(new_place: str) -> None:
    """Two processes create the same new database and write to it at the same time: every row of both is there."""
    processes = [start(_WRITER, new_place, first, 2, 150) for first in (1, 2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    database = open_database(new_place)
    assert rows(database) == list(range(1, 301))
    database.close()


@pytest.mark.parametrize("after", [1, 20, 60])
def test_sigkill_keeps_what_was_committed(database: Database, place: str, after: int) -> None:
    """Whatever write() returned from before a SIGKILL is in the database; at most the one in flight is there besides."""
    process = start(_WRITER, place, 1, 1, 100_000)
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
