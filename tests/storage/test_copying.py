"""Copies of a database: whole, or unusable and said so; a moved one is never written again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, select, text

from storage.audit import AuditTrail
from storage.copying import copy_database, move_database
from storage.database import HEAD, METADATA, Database
from storage.errors import IntegrityError, Unavailable
from storage.index import Index
from storage.records import AuditEvent, JobKind, NewJob
from storage.work import WorkQueue
from tests.storage.support import instance, open_database

INSTANCES = 1203  # more than one page


def fill(database: Database, number: int = INSTANCES) -> None:
    """File instances with jobs and audit records."""
    index, queue, audit = Index(database=database), WorkQueue(database=database), AuditTrail(database=database)

    def work(connection: Connection) -> None:
        for count in range(number):
            record = instance({"PatientName": "Müller^Zoë", "PatientID": f"P{count % 3}"}, study=f"1.2.{count % 3}")
            index.add(connection, record)
            queue.enqueue(connection, NewJob(JobKind.ANALYSE, record.summary.sop_instance_uid, home="a" * 16))
            audit.append(connection, AuditEvent("instance.received", "success", "peer\0", record.summary.sop_instance_uid))

    database.write(work)


def content(database: Database) -> Mapping[str, list[tuple[object, ...]]]:
    """Return every row of every table."""
    with database.read() as connection:
        ordered = {table.name: select(table).order_by(*table.primary_key) for table in METADATA.sorted_tables}
        return {name: [tuple(row) for row in connection.execute(rows)] for name, rows in ordered.items()}


@pytest.fixture
def target_place(engine: str, new_place: str, tmp_path: Path) -> str:
    """Return a place of the *other* engine where PostgreSQL takes part, else of the same."""
    return str(tmp_path) if engine == "postgresql" else new_place


@pytest.fixture
def target(target_place: str) -> Database:
    """Open the target of a copy, not migrated."""
    return open_database(target_place)


@pytest.mark.peer
@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_there_and_back(database: Database, postgresql_database: Callable[..., str], new_place: str) -> None:
    """From SQLite to PostgreSQL and back again: every table is the same, work goes on with new numbers, and the chain holds."""
    fill(database)
    told: list[tuple[str, int]] = []
    there = open_database(postgresql_database(migrated=False))
    counted = copy_database(database, there, lambda table, rows: told.append((table, rows)))
    assert counted == {name: len(rows) for name, rows in content(database).items()}
    assert [step for step in told if step[0] == "instances"] == [("instances", 1000), ("instances", INSTANCES)]
    fill(there, 7)
    assert AuditTrail(database=there).verify() is None
    with pytest.raises(Unavailable, match=r"^the database '\w+' of \S+ is not empty .*createdb"):
        copy_database(database, there)
    back = open_database(new_place)
    copy_database(there, back)
    assert content(back) == content(there)
    fill(back, 1)
    assert AuditTrail(database=back).verify() is None
    for opened in (there, back):
        opened.close()


def test_a_target_in_use_is_refused(database: Database, target: Database) -> None:
    """A database that holds a single row is not overwritten, and goes on being used."""
    target.migrate()
    AuditTrail(database=target).record(AuditEvent("x", "success", "y"))
    with pytest.raises(Unavailable, match=r"^the database .*node\.db.* is not empty .*holds an index already.*start the node"):
        copy_database(database, target)
    AuditTrail(database=target).record(AuditEvent("x", "success", "y"))
    target.close()


def test_writing_goes_on_beside_a_copy(database: Database, target: Database) -> None:
    """A backup is of one moment: what is written while it is made is in the source alone, and nobody waits."""
    fill(database, 30)
    before = content(database)
    copy_database(database, target, lambda *_: fill(database, 1))
    assert content(target) == before
    assert len(content(database)["instances"]) > 30
    target.close()


def test_a_moved_database_is_written_no_more(database: Database, place: str, target: Database) -> None:
    """While it is moved a writer waits or is refused; afterwards everyone is, also who had it open; what was promised is in the target."""
    fill(database, 30)
    writer = open_database(place, busy_timeout_s=0.2)
    kept: list[int] = []
    refused: list[str] = []
    moving, moved = threading.Event(), threading.Event()

    def write() -> None:
        number = 0
        while not moved.is_set() or number < 1:
            try:
                fill(writer, 1)
                kept.append(1)
            except Unavailable as error:
                refused.append(str(error))
                number += moving.is_set()

    thread = threading.Thread(target=write)
    thread.start()

    def hold(table: str, _: int) -> None:
        before = len(refused)
        moving.set()
        while table == "instances" and len(refused) == before:  # somebody was turned away while nothing may be written
            pass

    move_database(database, target, hold)
    moved.set()
    thread.join()
    assert len(content(target)["instances"]) == 30 + len(kept)
    for opened in (database, writer, open_database(place)):
        with pytest.raises(Unavailable, match="moved"):
            fill(opened, 1)
        opened.close()
    fill(target, 1)
    target.close()


def test_a_difference_is_found_and_the_copy_stays_unusable(database: Database, target: Database, target_place: str) -> None:
    """A target that changes what it is given is named by table, and no node starts on it; the copy can be repeated."""
    fill(database, 30)

    def after_insert(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO series"):
            connection.exec_driver_sql("UPDATE series SET instance_count = instance_count + 1")

    event.listen(target._backend.writer, "after_cursor_execute", after_insert)
    with pytest.raises(IntegrityError, match="table series"):
        copy_database(database, target)
    event.remove(target._backend.writer, "after_cursor_execute", after_insert)
    node = open_database(target_place)
    for attempt in (node.migrate, node.check, lambda: content(node)):
        with pytest.raises(Unavailable, match="not finished"):
            attempt()
    node.close()
    copy_database(database, target)
    assert content(target) == content(database)
    target.close()


_COPY = """
import os, signal, sys
from storage.copying import copy_database
from tests.storage.support import open_database
def stop(table, rows):
    if table == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
copy_database(open_database(sys.argv[1]), open_database(sys.argv[2]), stop)
"""


@pytest.mark.parametrize("table", ["audit_head", "instances"])
def test_a_killed_copy_is_refused_and_repeated(database: Database, place: str, target: Database, target_place: str, table: str) -> None:
    """SIGKILL at the first or at a later table: no node starts on the target; the same copy again makes it whole."""
    fill(database, 30)
    killed_and_repeated(database, place, target, target_place, table)
    target.close()


@pytest.mark.peer
@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_a_killed_copy_into_postgresql(database: Database, place: str, postgresql_database: Callable[..., str]) -> None:
    """As above, from SQLite into PostgreSQL."""
    fill(database, 30)
    target_place = postgresql_database(migrated=False)
    target = open_database(target_place)
    killed_and_repeated(database, place, target, target_place, "instances")
    target.close()


def killed_and_repeated(database: Database, place: str, target: Database, target_place: str, table: str) -> None:
    """Kill a process that copies, at a table; look at what it leaves, and copy again."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", _COPY, place, target_place, table], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(Unavailable, match="not finished"):
        target.migrate()
    copy_database(database, target)
    target.migrate()
    assert content(target) == content(database)
    with target.read() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == HEAD
