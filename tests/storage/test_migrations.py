"""Migrations: their sum is the schema of the code, however many start at once and wherever one is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

import storage.copying  # with all that have tables
import storage.index
from storage.database import HEAD, METADATA
from storage.records import Level, Query
from tests.storage.support import instance, open_database
from tests.storage.test_database import rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import ReflectedIndex

    from storage.database import Database

_VERSIONS = Path(storage.index.__file__).with_name("migrations")


def _index(index: ReflectedIndex) -> str:
    options = {name: str(value) for name, value in index.get("dialect_options", {}).items()}
    return str((index["name"], index["column_names"], index["unique"], options))


def _described(connection: Connection) -> dict[str, object]:
    """Return everything the inspector knows of the schema."""
    inspector = inspect(connection)
    return {
        table: (
            sorted((column["name"], str(column["type"]), column["nullable"], column["default"]) for column in inspector.get_columns(table)),
            inspector.get_pk_constraint(table),
            sorted(map(str, inspector.get_foreign_keys(table))),
            sorted(map(str, inspector.get_unique_constraints(table))),
            sorted(map(_index, inspector.get_indexes(table))),
        )
        for table in sorted(inspector.get_table_names())
        if table != "alembic_version"
    }


def test_the_sum_of_the_migrations_is_the_schema(database: Database, engine: str, new_place: str) -> None:
    """What the migrations make and what METADATA says are the same, by alembic's comparison and by the inspector's eyes."""
    with database.read() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), METADATA)
        if engine == "postgresql":  # the study list's index is shorter there
            differences = [(what, index) for what, index in differences if index.name != "ix_studies_list"]
        assert differences == []
        migrated = _described(connection)
    made = open_database(new_place)
    with made._backend.migration() as connection:
        METADATA.create_all(connection)
    with made._backend.writer.connect() as connection:
        assert _described(connection) == migrated
    made.close()


@pytest.mark.peer
def test_postgresql_compares_text_by_bytes_and_holds_long_names(postgresql_database: Callable[..., str]) -> None:
    """Whatever the database's locale: no column of text has another collation than C, and no index entry can grow too long."""
    database = open_database(postgresql_database())
    with database.read() as connection:
        columns = [column for table in METADATA.sorted_tables for column in inspect(connection).get_columns(table.name)]
    assert {column["type"].collation for column in columns if str(column["type"]).startswith("TEXT")} == {"C"}
    keywords = ("PatientName", "PatientID", "AccessionNumber", "StudyDescription", "StudyID", "ReferringPhysicianName")
    name = "".join(chr(0x20000 + number * 37 % 0xA000) for number in range(250))  # 1000 bytes that nothing can compress
    longest = {keyword: f"{name}={name[1:]}={name[2:]}" if keyword.endswith(("tName", "nName")) else name[3:] for keyword in keywords}
    index = storage.index.Index(database=database)
    database.write(lambda connection: index.add(connection, instance(longest)))
    assert index.count(Query(Level.STUDY, {"StudyDescription": name[3:13] + "*"})) == 1
    database.close()


def test_texts_of_an_older_archive_are_found(database: Database) -> None:
    """Studies and patients filed by an older version are in the trigrams after the migration, as if they had been filed by this one."""
    index = storage.index.Index(database=database)
    names = ("Doe^Jane", "Yamada^Tarou=山田^太郎=やまだ^たろう", "", "ab", "Müller^Zoë " + "x" * 300)

    def work(connection: Connection) -> None:
        for number, name in enumerate(names):
            values = {"PatientID": f"P{number}", "PatientName": name, "StudyDescription": "Wound" if number % 2 else name[:100]}
            index.add(connection, instance(values, study=f"1.2.{number}"))
        index.add(connection, instance({"PatientID": "P0", "PatientName": "Roe^Jane"}, study="1.2.99"))

    database.write(work)
    texts = "SELECT value, trigram FROM texts JOIN trigrams ON text_ref = texts.id ORDER BY 1, 2"
    with database.read() as connection:
        filed = connection.exec_driver_sql(texts).all()
    with database._backend.migration() as connection:
        later = [f"ALTER TABLE nodes DROP COLUMN {column}" for column in ("incarnation", "clock_ahead")]
        for undone in (*later, "DROP TABLE trigrams", "DROP TABLE texts", "DROP INDEX ix_studies_study_description"):
            connection.exec_driver_sql(undone)
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0003'")
    database.migrate()
    with database.read() as connection:
        assert connection.exec_driver_sql(texts).all() == filed
        assert len({text for text, _ in filed}) == 9
    assert index.count(Query(Level.STUDY, {"PatientName": "*ë xxx*"})) == 1


def test_head_is_the_newest_revision() -> None:
    """The revision that the database code asks for is the last one of the folder, and the history is one line."""
    config = Config()
    config.set_main_option("script_location", str(_VERSIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_migrating_twice_changes_nothing(database: Database) -> None:
    """A second start finds nothing to do and loses nothing."""
    database.write(lambda connection: connection.exec_driver_sql("INSERT INTO patients VALUES (1, 'x', '', '', '', '', '', '', '', '')"))
    database.migrate()
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM patients").scalar() == 1
        assert connection.exec_driver_sql("SELECT count(*) FROM audit_head").scalar() == 1


_MIGRATE = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from storage.records import Level, Query
from tests.storage.support import instance, open_database
database = open_database(sys.argv[1])
statements = int(sys.argv[2])
def stop(*_):
    global statements
    statements -= 1
    if statements == 0:
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(database._backend.writer, "before_cursor_execute", stop)
database.migrate()
database.close()
"""


def _migrate(place: str, statements: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "error", "-c", _MIGRATE, place, str(statements)])


@pytest.mark.parametrize("statements", [1, 4, 9, 20])
def test_a_killed_migration_is_undone_and_repeated(new_place: str, statements: int) -> None:
    """SIGKILL before the n-th statement leaves no half schema: the next start migrates by itself (threats row 26)."""
    assert _migrate(new_place, statements).wait(60) == -signal.SIGKILL
    database = open_database(new_place)
    with database._backend.writer.connect() as connection:
        assert inspect(connection).get_table_names() == []
    database.migrate()
    assert rows(database) == []
    database.close()


def test_many_processes_may_start_at_once(new_place: str) -> None:
    """Four processes migrate the same new database: all succeed, the schema is made once."""
    processes = [_migrate(new_place, 0) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    database = open_database(new_place)
    database.check()
    database.close()
