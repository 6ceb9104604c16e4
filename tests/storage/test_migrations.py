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
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql import ClauseElement

import storage.audit
import storage.changes
import storage.duties
import storage.holds
import storage.index
import storage.nodes
import storage.study_keys
import storage.work
from storage.database import HEAD, METADATA
from tests.storage.support import open_database
from tests.storage.test_database import rows

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import ReflectedIndex

    from storage.database import Database

_MODULES = (
    storage.audit,
    storage.changes,
    storage.duties,
    storage.holds,
    storage.index,
    storage.nodes,
    storage.study_keys,
    storage.work,
)
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


def test_the_sum_of_the_migrations_is_the_schema(database: Database, tmp_path: Path) -> None:
    """What the migrations make and what METADATA says are the same, by alembic's comparison and by the inspector's eyes."""
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        migrated = _described(connection)
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "node.db").touch()
    made = open_database(folder)
    with made._backend.writer.connect() as connection:
        METADATA.create_all(connection)
        assert _described(connection) == migrated
    made.close()


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
from tests.storage.support import open_database
database = open_database(Path(sys.argv[1]))
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


def _migrate(folder: Path, statements: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "error", "-c", _MIGRATE, str(folder), str(statements)])


@pytest.mark.parametrize("statements", [1, 4, 9, 20])
def test_a_killed_migration_is_undone_and_repeated(tmp_path: Path, statements: int) -> None:
    """SIGKILL before the n-th statement leaves no half schema: the next start migrates by itself (threats row 26)."""
    assert _migrate(tmp_path, statements).wait(60) == -signal.SIGKILL
    database = open_database(tmp_path)
    with database._backend.writer.connect() as connection:
        assert inspect(connection).get_table_names() == []
    database.migrate()
    assert rows(database) == []
    database.close()


def test_many_processes_may_start_at_once(tmp_path: Path) -> None:
    """Four processes migrate the same new file: all succeed, the schema is made once."""
    processes = [_migrate(tmp_path, 0) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    database = open_database(tmp_path)
    database.check()
    database.close()


def test_every_statement_compiles_for_postgresql() -> None:
    """Tables, indexes and all prepared statements of index, queue and audit trail are taken by PostgreSQL's compiler too."""
    dialect = postgresql.dialect()
    for table in METADATA.sorted_tables:
        assert str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect))
    prepared = [
        statement
        for module in _MODULES
        for value in vars(module).values()
        for statement in (value if isinstance(value, tuple) else (value,))
        if isinstance(statement, ClauseElement) and statement.__visit_name__ in {"select", "insert", "update"}
    ]
    assert len(prepared) > 20
    compiled = [str(statement.compile(dialect=dialect)) for statement in prepared]
    assert any("FOR UPDATE SKIP LOCKED" in statement for statement in compiled)
