"""Claims on the try for room: it is made at most once in some seconds, leaves nothing, and what it found is forgotten in time."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from storage.database import Database
from storage.errors import Unavailable
from storage.room import Room


def test_with_room_nothing_is_said_and_nothing_stays(database: Database) -> None:
    """Tried again and again the database has room, and is as large as after the first time."""
    room = Room(database=database, every_s=0.0)
    room.check()
    sizes = []
    of_table = text("SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relname ~ 'room'")
    for _ in range(5):
        room.check()
        with database.read() as connection:
            size = of_table if connection.dialect.name == "postgresql" else text("PRAGMA page_count")
            sizes.append(connection.execute(size).scalar_one())
    assert len(set(sizes)) == 1
    assert sizes[0] is not None


def test_however_often_it_is_asked_it_tries_once_in_a_while(database: Database) -> None:
    """Who asks meanwhile gets the last answer, and the database is not touched: it may be closed, and may be there again."""
    now = [0.0]
    room = Room(database=database, every_s=10.0, monotonic=lambda: now[0])
    room.check()
    database.close()
    askers = [threading.Thread(target=room.check) for _ in range(20)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    now[0] = 9.9
    room.check()
    now[0] = 10.0
    for _ in range(3):
        with pytest.raises(Unavailable, match="the database is closed"):
            room.check()
