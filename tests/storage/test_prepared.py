"""Prepared statements: the driver gets what SQLAlchemy would have given it, and errors come back the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy.exc
from sqlalchemy import Column, DateTime, MetaData, Table, bindparam, insert, select, update

from storage.prepared import Prepared
from storage.study_keys import STUDY_KEYS
from storage.tables import PATIENTS
from storage.work import JOBS

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

ADD = Prepared(insert(STUDY_KEYS))
FIND = Prepared(select(STUDY_KEYS).where(STUDY_KEYS.c.id == bindparam("wanted")))
MARK = Prepared(update(STUDY_KEYS).where(STUDY_KEYS.c.stored == 0).values(stored=STUDY_KEYS.c.stored + 7))
ROW = {"id": "a", "study_instance_uid": "1.2", "wrapping_key_id": "k", "wrapped": "Müller^山田", "stored": 0, "created_at": 2**40}


def test_rows_are_what_sqlalchemy_says_they_are(database: Database) -> None:
    """Written and read by the driver, a row equals what SQLAlchemy reads; its columns are attributes."""

    def work(connection: Connection) -> None:
        ADD.run(connection, ROW)
        row = FIND.first(connection, {"wanted": "a"})
        assert row == tuple(connection.execute(select(STUDY_KEYS)).one())
        assert (row.wrapped, row.created_at) == ("Müller^山田", 2**40)
        assert FIND.all(connection, {"wanted": "a"}) == [row]
        assert FIND.scalar(connection, {"wanted": "a"}) == "a"
        assert FIND.first(connection, {"wanted": "b"}) is None
        assert FIND.scalar(connection, {"wanted": "b"}) is None

    database.write(work)


def test_values_that_the_statement_holds_itself_are_bound(database: Database) -> None:
    """Constants of a statement reach the driver, and the number of rows comes back."""

    def work(connection: Connection) -> None:
        ADD.run(connection, ROW)
        assert MARK.run(connection, {}).rowcount == 1
        assert MARK.run(connection, {}).rowcount == 0
        assert FIND.first(connection, {"wanted": "a"}).stored == 7

    database.write(work)


def test_nul_is_replaced(database: Database) -> None:
    """A NUL never reaches the database, as with every other statement."""

    def work(connection: Connection) -> None:
        ADD.run(connection, {**ROW, "wrapped": "a\0b"})
        assert FIND.first(connection, {"wanted": "a"}).wrapped == "a\ufffdb"

    database.write(work)


def test_a_generated_key_comes_back(database: Database) -> None:
    """RETURNING gives the generated key, and the statement does not stand in the way of the next savepoint."""
    names = [column.name for column in PATIENTS.c if column.name != "id"]
    add = Prepared(insert(PATIENTS).returning(PATIENTS.c.id), columns=names)
    keys = [
        database.write(lambda connection, number=number: add.scalar(connection, {**dict.fromkeys(names, ""), "identity": f"{number}"}))
        for number in range(3)
    ]
    assert keys == sorted(set(keys))


def test_errors_are_sqlalchemys_and_hold_no_values(database: Database) -> None:
    """The second row of a key is an IntegrityError whose text shows nothing of the row; the work's other rows go with it."""

    def work(connection: Connection) -> None:
        ADD.run(connection, ROW)
        with pytest.raises(sqlalchemy.exc.IntegrityError) as caught:
            ADD.run(connection, ROW)
        assert "Müller" not in str(caught.value)
        raise caught.value

    with pytest.raises(Exception, match="contradicts what it holds"):
        database.write(work)
    with database.read() as connection:
        assert FIND.first(connection, {"wanted": "a"}) is None


def test_what_needs_a_conversion_is_refused(database: Database) -> None:
    """A statement whose values SQLAlchemy converts, or which is written anew for each list, cannot be prepared; nor rows of an update."""
    moments = Table("moments", MetaData(), Column("at", DateTime))
    many = Prepared(select(JOBS.c.id).where(JOBS.c.kind.in_(bindparam("kinds", expanding=True))))
    with database.read() as connection:
        with pytest.raises(TypeError, match="anew"):
            many.run(connection, {"kinds": ["analyse"]})
        if connection.dialect.name == "sqlite":
            with pytest.raises(TypeError, match="converted"):
                Prepared(insert(moments)).run(connection, {"at": None})
        for ask in (MARK.first, MARK.all):
            with pytest.raises(TypeError, match="no rows"):
                ask(connection, {})
