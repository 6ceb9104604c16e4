"""Copies of a whole database: from one engine to the other, into a backup and back out of it.

A target is unusable from the first moment until it is whole: every node refuses a copy that was not finished, for an index that is empty
by mistake would have the sweep take every object for an orphan. The rows are copied, read back and compared in one transaction, so what
is killed half-way leaves the mark and no rows, and is simply repeated.

To *move* a database under a running node, `move_database` keeps every process from writing while it copies (they wait, then answer that
the database is unavailable: senders try again, nothing is promised) and, with its last step, retires the source: whoever has it open is
refused from then on. A move that dies between the two commits leaves both whole and equal, and the source in use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import BigInteger, Row, Table, delete, func, insert, select, text, tuple_

# All that have tables: METADATA has to be whole.
import storage.audit
import storage.changes
import storage.commitments
import storage.duties
import storage.holds
import storage.known_peers
import storage.nodes
import storage.refusals
import storage.study_keys
import storage.tables
import storage.visits
import storage.work
from storage.database import METADATA
from storage.database_name import name_of
from storage.errors import IntegrityError, Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

Progress: TypeAlias = Callable[[str, int], None]
_PAGE = 1000
_HEAD = storage.audit.AUDIT_HEAD


def _silent(_table: str, _rows: int) -> None:
    """Tell nobody."""


def copy_database(
    source: Database, target: Database, progress: Callable[[str, int], None] = lambda _table, _rows: None
) -> Mapping[str, int]:
    """Copy one consistent snapshot of `source`, which goes on being used, into `target`, which is migrated and must be empty.

    Parameters
    ----------
    progress
        Told the table and the number of its rows that are copied so far.

    Returns
    -------
    Mapping[str, int]
        Number of rows by table.

    Raises
    ------
    Unavailable
        The target holds something already, or either database is away; a target that was begun is marked unfinished.
    IntegrityError
        What was read back of a table, which is named, is not what was written.
    """
    target.begin_copy(_clear)
    with source.read() as connection:
        return target.fill_copy(lambda into: _copy(connection, into, progress))


def move_database(
    source: Database, target: Database, progress: Callable[[str, int], None] = lambda _table, _rows: None
) -> Mapping[str, int]:
    """As :func:`copy_database`, while nobody writes to `source`, and nobody ever does again afterwards.

    Raises
    ------
    Unavailable, IntegrityError
        As :func:`copy_database`; the source is in use as before.
    """
    target.begin_copy(_clear)

    def work(connection: Connection) -> Mapping[str, int]:
        source.freeze(connection)
        counted = target.fill_copy(lambda into: _copy(connection, into, progress))
        source.retire(connection)
        return counted

    return source.write(work)


def _clear(connection: Connection, unfinished: bool) -> None:
    """Remove what an unfinished copy or the migration left; refuse a database that is in use."""
    if not unfinished:
        for table in METADATA.sorted_tables:
            rows = select(func.count()).select_from(table)
            if connection.execute(rows if table is not _HEAD else rows.where(_HEAD.c.seq > 0)).scalar():
                empty = (
                    "move the file aside (keep it) and repeat"
                    if connection.dialect.name == "sqlite"
                    else "name a database that was never used (createdb makes one)"
                )
                raise Unavailable(
                    f"{name_of(connection)} is not empty (table {table.name}), and nothing was copied: it holds an index already. If an "
                    f"earlier run filled it, that is done: start the node with the configuration that names it. Otherwise {empty}"
                )
    for table in reversed(METADATA.sorted_tables):
        connection.execute(delete(table))


def _copy(source: Connection, target: Connection, progress: Progress) -> Mapping[str, int]:
    counted = {}
    for table in METADATA.sorted_tables:
        digest, rows = hashlib.sha256(), 0
        for page in _pages(source, table):
            _add(digest, page)
            target.execute(insert(table).inline(), [dict(row._mapping) for row in page])  # noqa: SLF001 - SQLAlchemy's public accessor
            rows += len(page)
            progress(table.name, rows)
        arrived = hashlib.sha256()
        for page in _pages(target, table):
            _add(arrived, page)
        if arrived.digest() != digest.digest():
            raise IntegrityError(
                f"table {table.name} of the copy is not what was read from the source: check both disks, and repeat the copy"
            )
        _go_on_counting(target, table)
        counted[table.name] = rows
    return counted


def _pages(connection: Connection, table: Table) -> Iterable[list[Row[Any]]]:
    """Give the rows of a table in the order of its key, which both engines compare by bytes."""
    after: tuple[Any, ...] | None = None
    key = list(table.primary_key.columns)
    rows = select(table).order_by(*key).limit(_PAGE)
    while True:
        page = list(connection.execute(rows if after is None else rows.where(tuple_(*key) > tuple_(*after))))
        if not page:
            return
        yield page
        after = tuple(page[-1]._mapping[column] for column in key)  # noqa: SLF001 - SQLAlchemy's public accessor


def _add(digest: Any, page: Iterable[Row[Any]]) -> None:
    for row in page:
        digest.update(json.dumps(list(row), separators=(",", ":")).encode() + b"\n")


def _go_on_counting(connection: Connection, table: Table) -> None:
    """Have PostgreSQL generate keys above those that were copied; SQLite does so by itself."""
    key = table.autoincrement_column
    if connection.dialect.name != "postgresql" or key is None or not isinstance(key.type, BigInteger):
        return
    highest = connection.execute(select(func.max(key))).scalar()
    if highest is not None:
        name = {"table": table.name, "key": key.name, "highest": highest}
        connection.execute(text("SELECT setval(pg_get_serial_sequence(:table, :key), :highest)"), name)
