"""The refusal diary: bounded, never in the way, and the same in both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.audit import AuditTrail
from storage.database import Database
from storage.refusals import VARIOUS, Refusals, printable
from tests.storage.support import open_database


@contextmanager
def diary(database: Database, **options: object) -> Iterator[Refusals]:
    """A diary that writes at once."""
    refusals = Refusals(database=database, every_s=0.01, retry_s=0.01, **options)  # type: ignore[arg-type]
    try:
        yield refusals
    finally:
        refusals.close()


def test_repeats_are_one_row(database: Database) -> None:
    """The same refusal again, in this process or another, raises the count of its row, and the newest time and remedy stand in it."""
    with diary(database) as first, diary(database) as second:
        for refusals in (first, second):
            for _ in range(50):
                refusals.note(kind="association", reason="calling AE title not recognised", calling_ae_title="X", address="10.1.2.3")
            assert refusals.flush()
        second.note(kind="association", reason="calling AE title not recognised", calling_ae_title="X", address="10.1.2.3", remedy="add it")
        assert second.flush()
        (row,) = first.all()
    assert (row.count, row.calling_ae_title, row.address, row.remedy) == (101, "X", "10.1.2.3", "add it")
    assert row.first_at <= row.last_at


def test_who_was_refused_is_audited_once(database: Database) -> None:
    """A caller that is turned away again and again, by two processes, is one audit event (threats.md row 11); instances are none."""
    audit = AuditTrail(database=database)
    with diary(database, audit=audit) as first, diary(database, audit=audit) as second:
        for refusals in (first, second):
            for _ in range(30):
                refusals.note(kind="association", reason="AE title 'X' at 10.1.2.3 is no peer", calling_ae_title="X", address="10.1.2.3")
                refusals.note(kind="instance", reason="0xC000: no data set", calling_ae_title="X", address="10.1.2.3")
            assert refusals.flush()
        first.note(kind="tls", reason="TLS: no certificate", address="10.1.2.3")
        assert first.flush()
    events = [entry.event for entry in audit.entries()]
    assert [(event.action, event.actor) for event in events] == [("association.refused", "X"), ("association.refused", "10.1.2.3")]
    assert events[0].outcome == "AE title 'X' at 10.1.2.3 is no peer"
    assert audit.verify() is None


def test_an_alert_is_given_again_after_an_hour(tmp_path: Path) -> None:
    """What is still refused an hour later is another audit event."""
    moments = iter([datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes) for minutes in (0, 50, 120)])
    now = [next(moments)]
    database = open_database(tmp_path, clock=lambda: now[0])
    database.migrate()
    audit = AuditTrail(database=database)
    with diary(database, audit=audit) as refusals:
        for expected in (1, 1, 2):
            refusals.note(kind="association", reason="no peer", calling_ae_title="X", address="10.1.2.3")
            assert refusals.flush()
            assert len(list(audit.entries())) == expected
            now[0] = next(moments, now[0])
    database.close()


def test_the_newest_come_first_and_can_be_chosen(database: Database) -> None:
    """Rows come newest first, so many as asked for; and those of a peer, an AE title or an address alone."""
    with diary(database) as refusals:
        for number, peer in enumerate(("pacs", "", "camera")):
            refusals.note(kind="instance", reason="refused", peer=peer, calling_ae_title=f"AET{number}", address=f"10.0.0.{number}")
            assert refusals.flush()
        assert [one.peer for one in refusals.all()] == ["camera", "", "pacs"]
        assert [one.peer for one in refusals.all(limit=1)] == ["camera"]
        assert [one.peer for one in refusals.all(peer="pacs")] == ["pacs"]
        assert [one.address for one in refusals.all(peer="AET1")] == ["10.0.0.1"]
        assert [one.calling_ae_title for one in refusals.all(peer="10.0.0.2")] == ["AET2"]
        assert set(refusals.last_of_peers()) == {"pacs", "camera"}


def test_the_oldest_go(database: Database) -> None:
    """Beyond its capacity the diary forgets what was refused longest ago, and a repeat is new."""
    with diary(database, capacity=5) as refusals:
        for number in range(5):
            refusals.note(kind="association", reason=f"reason {number}", address=f"10.0.0.{number}")
            assert refusals.flush()
        refusals.note(kind="association", reason="reason 0", address="10.0.0.0")
        refusals.note(kind="association", reason="reason 5", address="10.0.0.5")
        assert refusals.flush()
        assert sorted(one.reason for one in refusals.all()) == ["reason 0", "reason 2", "reason 3", "reason 4", "reason 5"]


def test_one_address_does_not_push_out_the_others(database: Database) -> None:
    """A stranger with a new AE title in each of 3 000 calls gets some hundred rows, then one for all the rest; nothing is miscounted."""
    with diary(database, capacity=1000, waiting=10_000) as refusals:
        refusals.note(kind="association", reason="not recognised", calling_ae_title="HONEST", address="10.9.9.9")
        for number in range(3000):
            refusals.note(kind="association", reason="not recognised", calling_ae_title=f"A{number}", address="10.6.6.6")
        assert refusals.flush()
        rows = refusals.all(limit=10_000)
        assert refusals.dropped == 0
    assert sum(one.count for one in rows) == 3001
    assert len(rows) < 300
    assert any(one.calling_ae_title == "HONEST" for one in rows)
    (rest,) = [one for one in rows if one.calling_ae_title == VARIOUS]
    assert rest.count > 2000


def test_noting_never_waits(tmp_path: Path) -> None:
    """While the database takes no write, notes are taken up to the bound and dropped beyond it, counted; later the taken ones are there."""
    database = open_database(tmp_path)
    database.migrate()
    locked, release = threading.Event(), threading.Event()

    def hold(_connection: object) -> None:
        locked.set()
        release.wait(60)

    holder = threading.Thread(target=lambda: database.write(hold))
    holder.start()
    assert locked.wait(60)
    try:
        told: list[int] = []
        with diary(database, waiting=100, lost=told.append) as refusals:
            for number in range(1000):
                refusals.note(kind="association", reason="not recognised", calling_ae_title=f"A{number}", address=f"10.0.{number % 200}.1")
            dropped = refusals.dropped
            assert 700 <= dropped < 1000
            assert not refusals.flush(0.01)
            release.set()
            assert refusals.flush(60)
            assert len(refusals.all(limit=2000)) == 1000 - refusals.dropped
            assert sum(told) == refusals.dropped
    finally:
        release.set()
        holder.join()
        database.close()


def test_an_outage_is_said_once_and_outlived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While there is no schema notes are kept and tried again, with one line in the log; once there is, they are written."""
    database = open_database(tmp_path)
    with diary(database) as refusals:
        refusals.note(kind="association", reason="early", address="10.0.0.1")
        assert not refusals.flush(0.3)
        database.migrate()
        assert refusals.flush(60)
        assert [one.reason for one in refusals.all()] == ["early"]
    database.close()
    assert [record.message for record in caplog.records].count("refusals.unwritten") == 1


def test_a_closed_diary_has_written_and_takes_nothing(database: Database) -> None:
    """Closing writes what waits; noting afterwards is harmless."""
    refusals = Refusals(database=database, every_s=60.0)
    refusals.note(kind="association", reason="one")
    assert refusals.flush()
    refusals.note(kind="association", reason="two")
    refusals.close()
    refusals.note(kind="association", reason="three")
    assert sorted(one.reason for one in refusals.all()) == ["one", "two"]


def test_times_are_of_the_refusal(tmp_path: Path) -> None:
    """A row tells when the caller was turned away, not when that was written."""
    moments = iter([datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour) for hour in range(2)])
    last = datetime(2026, 1, 1, 1, tzinfo=UTC)
    database = open_database(tmp_path, clock=lambda: next(moments, last))
    database.migrate()
    with diary(database) as refusals:
        refusals.note(kind="association", reason="r")
        refusals.note(kind="association", reason="r")
        assert refusals.flush()
        (row,) = refusals.all()
    database.close()
    assert (row.first_at.hour, row.last_at.hour, row.count) == (0, 1, 2)


@given(st.text(max_size=80))
def test_what_a_stranger_wrote_cannot_act(text: str) -> None:
    """Whatever a text holds, what is kept of it is printable, bounded, and encodable: no line break, no escape sequence, no surrogate."""
    shown = printable(text, 40)
    assert len(shown) <= 40
    assert shown.isprintable()
    shown.encode("utf-8")
    if text.isprintable() and len(text) <= 40:
        assert shown == text


def test_escapes_are_readable(database: Database) -> None:
    """Control characters in an AE title stand in the diary as their numbers."""
    with diary(database) as refusals:
        refusals.note(kind="association", reason="r", calling_ae_title="A\x1b[31m\nB\x00")
        assert refusals.flush()
        assert refusals.all()[0].calling_ae_title == "A\\x1b[31m\\x0aB\\x00"
