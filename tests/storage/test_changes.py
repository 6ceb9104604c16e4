"""The change feed: each change once, in order, whoever writes; what it shows; how far subscribers are."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.audit import AuditTrail
from storage.changes import KINDS, LIMIT, Change, ChangeFeed, Subscribers
from storage.database import Database
from storage.errors import ConflictingInstance, InvalidQuery, LeaseLost
from storage.records import AuditEvent, JobKind, JobState, NewJob, NewReport
from tests.storage.house import House
from tests.storage.samples import new_uid, photograph, report
from tests.storage.support import open_database

ACTIONS = ("instance.received", "study.retrieved", "instance.duplicate", "report.delivered")
EACH = 60
"""Records of one writing thread."""


def record(database: Database, action: str, subject: str = "1.2.3", **detail: object) -> int:
    """Write one audit record."""
    return AuditTrail(database=database).record(AuditEvent(action, "success", "someone", subject, detail))


def follow(feed: ChangeFeed, cursor: int, *, limit: int = 7) -> Iterator[Change]:
    """Read the feed as an integrator does, for ever."""
    while True:
        page = feed.since(cursor, limit=limit, wait_s=1)
        assert page.cursor >= cursor
        yield from page.changes
        cursor = page.cursor


def write_much(place: str, name: str) -> None:
    """Write from two threads of this process."""
    database = open_database(place)

    def work(thread: int) -> None:
        for number in range(EACH):
            record(database, ACTIONS[number % 4], f"{name}.{thread}.{number}")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()


@contextmanager
def writers(place: str, *names: str) -> Iterator[None]:
    """Let a process of two threads run for each name."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_much, args=(place, name)) for name in names]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.join()
            assert process.exitcode == 0


def test_a_reader_sees_each_change_once_and_in_order_while_many_write(database: Database, place: str) -> None:
    """Followed while two processes of two threads write, the feed is the trail without the rest: nothing missed, twice, or out of order."""
    wanted = 4 * EACH // 2
    seen: list[Change] = []
    with writers(place, "1", "2"):
        for change in follow(ChangeFeed(database=database), 0):
            seen.append(change)
            if len(seen) == wanted:
                break
    recorded = [entry for entry in AuditTrail(database=database).entries() if entry.event.action in {ACTIONS[0], ACTIONS[3]}]
    assert [(change.cursor, change.sop_instance_uid) for change in seen] == [(entry.seq, entry.event.subject) for entry in recorded]
    assert len({change.sop_instance_uid for change in seen}) == wanted


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=25), limit=st.integers(1, 4), scan=st.integers(1, 6))
def test_pages_of_any_size_add_up_to_the_whole(database: Database, actions: list[str], limit: int, scan: int) -> None:
    """However small page and step, going on from cursor to cursor gives every change once; each step moves on or is at the end."""
    start = ChangeFeed(database=database).latest()
    numbers = [record(database, action) for action in actions]
    expected = [number for number, action in zip(numbers, actions, strict=True) if action in {ACTIONS[0], ACTIONS[3]}]
    feed, cursor, found, more = ChangeFeed(database=database, scan=scan), start, [], True
    while more:
        page = feed.since(cursor, limit=limit)
        assert len(page.changes) <= limit
        assert page.cursor > cursor or not page.more
        found += [change.cursor for change in page.changes]
        cursor, more = page.cursor, page.more
    assert found == expected
    assert cursor == feed.latest()


def test_a_long_run_of_no_interest_is_stepped_over(database: Database) -> None:
    """A step through records of no interest comes back without a change and with a cursor farther on; waiting walks on to the change."""
    feed = ChangeFeed(database=database, scan=10)
    for _ in range(35):
        record(database, "study.retrieved")
    wanted = record(database, "instance.received", "1.2.9")
    page = feed.since(0)
    assert (page.changes, page.cursor, page.more) == ((), 10, True)
    page = feed.since(0, wait_s=30)
    assert [change.cursor for change in page.changes] == [wanted]


def test_waiting_ends_with_the_change(database: Database) -> None:
    """A reader that waits gets what is committed meanwhile, and is not stopped by records of no interest before it."""
    feed = ChangeFeed(database=database)
    pages = []
    reader = threading.Thread(target=lambda: pages.append(feed.since(0, wait_s=60)))
    reader.start()
    record(database, "study.retrieved")
    wanted = record(database, "instance.received")
    reader.join(timeout=50)
    assert [change.cursor for change in pages[0].changes] == [wanted]


def test_waiting_in_vain_gives_the_end(database: Database) -> None:
    """Without a change the wait ends with an empty page at the end of the trail."""
    end = record(database, "study.retrieved")
    page = ChangeFeed(database=database).since(0, wait_s=0.2)
    assert (page.changes, page.cursor, page.more) == ((), end, False)


def test_only_the_kinds_that_are_wanted(database: Database) -> None:
    """The others are stepped over."""
    record(database, "instance.received")
    wanted = record(database, "report.delivered")
    page = ChangeFeed(database=database).since(0, kinds={"report.delivered"})
    assert [(change.cursor, change.kind) for change in page.changes] == [(wanted, "report.delivered")]


@pytest.mark.parametrize(
    ("cursor", "options"),
    [(1, {}), (-1, {}), (2**63 - 1, {}), (0, {"limit": 0}), (0, {"limit": LIMIT + 1}), (0, {"kinds": {"instance.received"}})],
)
def test_what_cannot_be_asked(database: Database, cursor: int, options: dict[str, object]) -> None:
    """A cursor beyond the end, which another database gave, is refused instead of waiting for the trail to catch up."""
    with pytest.raises(InvalidQuery):
        ChangeFeed(database=database).since(cursor, **options)  # type: ignore[arg-type]


def test_an_instance_on_its_way_through_the_house(houses: Callable[..., House]) -> None:
    """Stored, analysed, reported, delivered: each step is a change that says where the instance belongs, and no patient's name."""
    house = houses()
    sample = photograph()
    answer = report(source=sample, sop=new_uid())
    house.ingest(sample)
    job = house.queue.claim(JobKind.ANALYSE, owner="test")
    assert job is not None
    made = NewReport("summary", answer.data_set, deliver_to=("pacs",), models={"model": "1"})
    house.archive.conclude(job, reports=[made], result={})
    delivery = house.queue.claim(JobKind.DELIVER, lane="pacs", owner="test")
    assert delivery is not None
    house.archive.acknowledge(delivery, status=0, detail={"peer": "pacs", "ae_title": "PACS", "comment": "Canary^Comment"})
    with pytest.raises(ConflictingInstance):
        house.ingest(photograph(sop=sample.sop_instance_uid, study=sample.study_instance_uid))

    changes = ChangeFeed(database=house.database).since(0).changes
    assert [(change.kind, change.sop_instance_uid) for change in changes] == [
        ("instance.stored", sample.sop_instance_uid),
        ("report.stored", answer.sop_instance_uid),
        ("analysis.concluded", sample.sop_instance_uid),
        ("report.delivered", answer.sop_instance_uid),
        ("instance.quarantined", sample.sop_instance_uid),
    ]
    assert {change.study_instance_uid for change in changes} == {sample.study_instance_uid}
    assert [change.series_instance_uid for change in changes] == [
        sample.series_instance_uid,
        answer.series_instance_uid,
        sample.series_instance_uid,
        answer.series_instance_uid,
        "",
    ]
    assert changes[1].detail["source_sop_instance_uid"] == sample.sop_instance_uid
    assert changes[2].detail["reports"] == [answer.sop_instance_uid]
    assert changes[3].detail == {"job": delivery.id, "peer": "pacs", "status": "0000"}
    written = json.dumps([change.document() for change in changes])
    for word in ("Canary", "192.0.2.1", "SENDER"):
        assert word not in written


def test_what_was_given_up_names_the_peer_and_not_its_words(house: House) -> None:
    """A delivery and an analysis that are given up are changes; the reason, which may hold words of a peer, is not in them."""
    sample = photograph()
    house.ingest(sample)
    house.database.write(lambda connection: house.queue.enqueue(connection, NewJob(JobKind.DELIVER, sample.sop_instance_uid, lane="pacs")))
    for kind, lane in ((JobKind.ANALYSE, ""), (JobKind.DELIVER, "pacs")):
        job = house.queue.claim(kind, lane=lane, owner="test")
        assert job is not None
        assert house.archive.fail(job, "no [Canary^Comment]", retryable=False) is JobState.DEAD
    _, refused, given_up = ChangeFeed(database=house.database).since(0).changes
    assert (refused.kind, given_up.kind) == ("analysis.refused", "delivery.given_up")
    assert given_up.detail["peer"] == "pacs"
    assert "Canary" not in json.dumps([refused.document(), given_up.document()])


def test_an_erased_study(database: Database) -> None:
    """It is a change of the study, without an instance."""
    record(database, "study.erased", "1.2.3.4", instances=2)
    (change,) = ChangeFeed(database=database).since(0).changes
    assert (change.kind, change.study_instance_uid, change.sop_instance_uid) == ("study.erased", "1.2.3.4", "")
    assert change.detail == {"instances": 2}
    assert change.kind in KINDS


@pytest.mark.parametrize("kind", ["instance.lost", "report.lost"])
def test_what_was_lost_with_a_node(database: Database, kind: str) -> None:
    """An integrator that counted on it is told, with the node and the study, and with nothing of where it came from."""
    record(database, kind, "1.2.3.4.5", landed_on="00000000000000aa", study_instance_uid="1.2.3.4", calling_ae_title="SENDER")
    (change,) = ChangeFeed(database=database).since(0).changes
    assert (change.kind, change.study_instance_uid, change.sop_instance_uid) == (kind, "1.2.3.4", "1.2.3.4.5")
    assert change.detail == {"landed_on": "00000000000000aa"}


def test_the_page_lists_every_kind() -> None:
    """docs/changefeed.md has a row for each kind of change, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "changefeed.md").read_text(encoding="utf-8")
    table = page.partition("| kind |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z._]+)` \|", table, re.MULTILINE)) == KINDS


def test_a_subscriber_begins_where_it_is_told(database: Database) -> None:
    """A new subscriber begins with what happens from now on, or with everything; a known one stays where it is."""
    end = record(database, "instance.received")
    subscribers = Subscribers(database=database, audit=AuditTrail(database=database))
    assert subscribers.find("late").cursor == end
    assert subscribers.find("early", from_beginning=True).cursor == 0
    assert subscribers.find("late", from_beginning=True).cursor == end
    assert [subscriber.name for subscriber in subscribers.all()] == ["early", "late"]


def test_a_sender_that_was_overtaken_moves_no_cursor(database: Database) -> None:
    """Who read the cursor before another moved it can neither put it back nor note a failure; a success clears the failures."""
    for _ in range(3):
        record(database, "instance.received")
    subscribers = Subscribers(database=database, audit=AuditTrail(database=database))
    first = subscribers.find("one", from_beginning=True)
    subscribers.fail(first, "away", after_s=60)
    failed = subscribers.find("one")
    assert (failed.failures, failed.reason, failed.cursor) == (1, "away", 0)
    assert failed.due_at > database.clock()
    subscribers.advance(failed, 3, changes=3)
    with pytest.raises(LeaseLost):
        subscribers.advance(first, 2, changes=2)
    with pytest.raises(LeaseLost):
        subscribers.fail(first, "away", after_s=60)
    now = subscribers.find("one")
    assert (now.cursor, now.failures, now.reason) == (3, 0, "")
    sent = [entry.event for entry in AuditTrail(database=database).entries() if entry.event.action == "webhook.delivered"]
    assert [(event.actor, event.detail) for event in sent] == [("one", {"after": 0, "up_to": 3, "changes": 3})]
