"""When peers associated last: once a minute at most, the latest of all processes, and nobody waits for it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from storage.database import Database
from storage.visits import Visit, Visits, last_visits


class Clock:
    """Ten seconds later each time."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        """Give the time."""
        self.now += timedelta(seconds=10)
        return self.now


def test_the_latest_is_kept(database: Database) -> None:
    """Of two processes' notes the later one holds, whichever is written last; a peer that never came is not there."""
    first = datetime(2026, 1, 1, tzinfo=UTC)
    for moments, address in (((0, 2), "10.0.0.1"), ((1,), "10.0.0.2")):
        with Visits(database=database, every_s=0.0) as visits:
            for moment in moments:
                database.clock = lambda moment=moment: first + timedelta(minutes=moment)  # type: ignore[misc]
                visits.note("camera", address)
    assert last_visits(database) == {"camera": Visit(first + timedelta(minutes=2), "10.0.0.1")}


def test_once_in_a_while(database: Database) -> None:
    """A peer that associates all the time is written once; another one is written too."""
    database.clock = Clock()
    with Visits(database=database) as visits:
        for number in range(1000):
            visits.note("camera", f"10.0.0.{number % 250}")
        visits.note("pacs", "10.0.0.9")
    visits.note("late", "10.0.0.9")
    assert {name: visit.address for name, visit in last_visits(database).items()} == {"camera": "10.0.0.0", "pacs": "10.0.0.9"}


def test_a_database_that_is_away_is_tried_again(database: Database) -> None:
    """What could not be written is written at the next association, not a minute later."""
    with Visits(database=database) as away:
        database.close()
        away.note("camera", "10.0.0.1")
    assert away._noted == {}
