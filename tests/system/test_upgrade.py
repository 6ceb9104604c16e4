"""From one version to the next and back with work under way: a data folder as the version before left it, made by its own migrations.

There is no released program of the older schema, so what is older is the schema: the work is begun by this program, killed, and its
database put back to the older revision, which is compared with what that revision's migrations make of an empty one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect, text

import storage.index
from dicom_node.config import load
from dicom_node.sending import Outgoing
from dicom_node.storehouse import open_database
from storage.database import HEAD, METADATA, Database
from storage.keys import Ring
from storage.records import JobKind, JobState
from tests.conftest import S3_KEY, S3_SECRET
from tests.ports import free_port
from tests.storage import support
from tests.storage.test_migrations import _described
from tests.system.pacs import Pacs, await_reports, drawn, judge, quick_settings, send
from tests.system.running_node import START_S, RunningNode

OLDER, NEWER = "0002", "9999"
ITEMS = 6


@dataclass
class Old:
    """A node that was killed at its work, and what it had acknowledged."""

    node: RunningNode
    items: list[Outgoing]

    @contextmanager
    def schema(self) -> Iterator[Connection]:
        """Give a transaction in which the schema of its database may be changed."""
        environ = {name: value for name, value in self.node.environ.items() if name.startswith("DICOM_NODE_")}
        database = open_database(load(self.node.config, environ), Ring.load(self.node.ring_file))
        with database._backend.migration() as connection:
            yield connection
        database.close()

    def revision(self) -> str:
        """Return what the database is stamped with."""
        with self.schema() as connection:
            return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())

    def stamp(self, revision: str) -> None:
        """Stamp it."""
        with self.schema() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})

    def content(self) -> dict[str, Any]:
        """Return every row, and the digest of every file besides the database and what is of a running process."""
        found: dict[str, Any] = {}
        with self.schema() as connection:
            for table in METADATA.sorted_tables:
                found[table.name] = sorted(map(repr, connection.execute(table.select())))
        for path in self.node.data_dir.rglob("*"):
            if path.is_file() and "run" not in path.relative_to(self.node.data_dir).parts and not path.name.startswith("node.db"):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.peer)])
def old(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pacs: Pacs,
    bundles: str,
    s3_bucket: Callable[[], tuple[str, str, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Old]:
    """A node killed with objects landed, analyses queued, one claimed, and reports waiting for a destination that is away."""
    endpoint, bucket, _ = s3_bucket()
    environ = {
        **quick_settings(bundles),
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "DICOM_NODE_INFERENCE__WORKERS": "1",
        "DICOM_NODE_ARCHIVE__STORE": "s3",
        "DICOM_NODE_ARCHIVE__ACKNOWLEDGE": "land",
        "DICOM_NODE_ARCHIVE__BUCKET": bucket,
        "DICOM_NODE_ARCHIVE__ENDPOINT_URL": endpoint,
        "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
    }
    if request.param == "postgresql":
        environ["DICOM_NODE_DATABASE__URL"] = request.getfixturevalue("postgresql_database")(migrated=False)
    node = RunningNode(tmp_path / "node", toml=pacs.toml.replace(str(pacs.door.port), str(free_port())), environ=environ)
    if request.param == "postgresql":
        node.command("keys", "init")
    stopped = {"DICOM_NODE_FAILPOINT": "analyse.claimed:3:pause", "DICOM_NODE_ARCHIVE__MOVER_BYTES_PER_S": "1"}
    node.start(environ=stopped)
    items = drawn(range(ITEMS))
    assert send(node, items) == items

    def under_way() -> bool:
        with node.parts() as parts:
            counts = parts.queue.counts()
        waiting = counts.get((JobKind.DELIVER, JobState.READY), 0) + counts.get((JobKind.DELIVER, JobState.CLAIMED), 0)
        return waiting == 2 and (counts.get((JobKind.ANALYSE, JobState.CLAIMED)), counts.get((JobKind.ANALYSE, JobState.READY))) == (1, 3)

    deadline = time.monotonic() + START_S
    while not under_way():
        assert time.monotonic() < deadline, node.log_text()[-3000:]
        time.sleep(0.2)
    node.kill_all()
    assert any((node.data_dir / "landed").rglob("*"))
    node.config.write_text(pacs.toml)
    yield Old(node, items)
    if node.process is not None:
        node.stop()


def indexes(connection: Connection, tables: Iterable[str]) -> set[str]:
    """Return the names of all indexes of some tables."""
    return {str(index["name"]) for table in tables for index in inspect(connection).get_indexes(table)}


def downgrade(old: Old, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Put the database of a node that does not run back to the older revision, and see that it is what that revision made."""
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    on_postgresql = "DICOM_NODE_DATABASE__URL" in old.node.environ
    empty: Database = support.open_database(request.getfixturevalue("postgresql_database")(migrated=False) if on_postgresql else fresh)
    config = Config()
    config.set_main_option("script_location", str(Path(storage.index.__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    with empty._backend.migration() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
    with empty._backend.writer.connect() as connection:
        wanted = _described(connection)
        kept = indexes(connection, wanted)
        columns = {(table, column["name"]) for table in wanted for column in inspect(connection).get_columns(table)}
    empty.close()
    with old.schema() as connection:
        by_dependence = [name for name, _ in inspect(connection).get_sorted_table_and_fkc_names() if name]
        for table in reversed(by_dependence):
            if table not in {*wanted, "alembic_version"}:
                connection.execute(text(f"DROP TABLE {table}"))
        for index in indexes(connection, wanted) - kept:
            connection.execute(text(f"DROP INDEX {index}"))
        newer = {(name, column.name) for name in wanted for column in METADATA.tables[name].columns} - columns
        for table, column in newer:
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        assert _described(connection) == wanted
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": OLDER})


def goes_on(old: Old, pacs: Pacs) -> None:
    """Start it as it is, and see everything analysed and delivered, once."""
    old.node.start()
    await_reports(pacs, ITEMS, old.node)
    judge(old.node, pacs, old.items)
    assert pacs.repeats() == 0
    assert old.revision() == HEAD


def test_an_upgrade_with_work_under_way(old: Old, pacs: Pacs, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The older version's folder, killed at its work: this version starts on it, and every picture has its report, once (51)."""
    downgrade(old, tmp_path, request)
    assert old.revision() == OLDER
    goes_on(old, pacs)


def test_the_older_version_refuses_and_changes_nothing(old: Old, pacs: Pacs) -> None:
    """A newer version was here: this one says so and ends, no file and no row is touched; the newer one goes on as if nothing was (51)."""
    old.stamp(NEWER)
    before = old.content()
    for arguments in (("serve",), ("serve", "--role", "worker"), ("verify",), ("reindex",)):
        refused = old.node.command(*arguments, expect=1)
        said = refused.stdout + refused.stderr
        assert f"the database has schema {NEWER}, this program knows {HEAD}: use the newer version again" in said
        assert "Traceback" not in said
    assert old.content() == before
    assert old.revision() == NEWER
    old.stamp(HEAD)
    goes_on(old, pacs)


@pytest.mark.parametrize("old", ["sqlite"], indirect=True)
def test_control_a_schema_that_is_neither_is_found_out(old: Old, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Negative control: had the older revision had another column, the folder would not pass for one of its making."""
    with old.schema() as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN later TEXT"))
    with pytest.raises(AssertionError):
        downgrade(old, tmp_path, request)
