"""The change feed over HTTP: pages, waiting, what is refused, and that its readers do not wake each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.changes import KINDS, ChangeFeed
from storage.records import AuditEvent
from tests.dicomweb.door import Door
from tests.storage.house import House, build
from tests.storage.samples import photograph


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """An archive of its own."""
    house = build(tmp_path / "house")
    yield house
    house.close()


@pytest.fixture
def door(house: House) -> Iterator[Door]:
    """A door that serves the feed."""
    with Door(house, changefeed=ChangeFeed(database=house.database)) as running:
        yield running


def reads(house: House) -> int:
    """How many reads of the feed the trail holds."""
    return house.actions().count("changefeed.read")


def test_page_after_page(door: Door) -> None:
    """Pages give what was stored, in order, as JSON that nobody keeps; the cursor goes on, and ends at the latest."""
    stored = [door.stored().sop_instance_uid for _ in range(3)]
    first = door.get("/changefeed?limit=2")
    assert first.status == 200
    assert (first.headers["content-type"], first.headers["cache-control"]) == ("application/json", "no-store")
    assert set(first.json) == {"changes", "cursor", "more"}
    assert first.json["more"] is True
    second = door.get(f"/changefeed?since={first.json['cursor']}&limit=2").json
    changes = first.json["changes"] + second["changes"]
    assert [(change["kind"], change["sop_instance_uid"]) for change in changes] == [("instance.stored", uid) for uid in stored]
    assert b"Canary" not in first.body
    end = door.get("/changefeed/latest").json["cursor"]
    rest = door.get(f"/changefeed?since={second['cursor']}").json
    assert (rest["changes"], rest["cursor"], rest["more"]) == ([], end, False)


def test_waits_for_a_change(door: Door) -> None:
    """A request that waits is answered with the change that happens meanwhile."""
    start = door.get("/changefeed/latest").json["cursor"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(door.get, f"/changefeed?since={start}&wait=30")
        sample = door.stored()
        assert [change["sop_instance_uid"] for change in answer.result(25).json["changes"]] == [sample.sop_instance_uid]


def test_many_wait_and_the_door_still_answers(door: Door) -> None:
    """Three times as many requests wait as the door has threads: others are answered, and all of them get the change."""
    start = door.get("/changefeed/latest").json["cursor"]
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(door.get, f"/changefeed?since={start}&wait=30") for _ in range(12)]
        sample = door.stored()
        assert door.get(f"/studies?StudyInstanceUID={sample.study_instance_uid}").status == 200
        for answer in answers:
            assert [change["sop_instance_uid"] for change in answer.result(25).json["changes"]] == [sample.sop_instance_uid]


def test_followed_while_others_store(door: Door, house: House) -> None:
    """Who follows by cursor while four threads store sees every instance once, in the order of the trail."""
    wanted, seen, cursor = 24, [], 0
    stored: list[str] = []
    threads = [threading.Thread(target=lambda: stored.extend(door.stored().sop_instance_uid for _ in range(6))) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(seen) < wanted:
        page = door.get(f"/changefeed?since={cursor}&limit=5&wait=5&kinds=instance.stored").json
        seen += [change["sop_instance_uid"] for change in page["changes"]]
        cursor = page["cursor"]
    for thread in threads:
        thread.join()
    assert seen == [entry.event.subject for entry in house.audit.entries() if entry.event.action == "instance.received"]
    assert sorted(seen) == sorted(stored)


def test_what_is_of_no_interest_wakes_nobody(door: Door, house: House) -> None:
    """Other records pass by a waiting request; at its end it has an empty page with a cursor behind them."""
    start = door.get("/changefeed/latest").json["cursor"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(door.get, f"/changefeed?since={start}&wait=2")
        for _ in range(3):
            house.audit.record(AuditEvent("study.retrieved", "success", "someone"))
            time.sleep(0.1)
        page = answer.result(25).json
    assert page["changes"] == []
    assert start <= page["cursor"] <= start + 3


def test_readers_do_not_feed_each_other(door: Door, house: House) -> None:
    """The trail keeps who was shown what, once for each answer that shows something; such a record is no change and wakes no reader."""
    door.stored()
    start = door.get("/changefeed").json["cursor"]
    assert reads(house) == 1
    record = next(entry.event for entry in house.audit.entries() if entry.event.action == "changefeed.read")
    assert record.detail == {"door": "dicomweb", "since": 0, "up_to": start, "changes": 1}
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(door.get, f"/changefeed?since={start}&wait=2") for _ in range(2)]
        door.get("/changefeed")
        assert [answer.result(25).json["changes"] for answer in waiting] == [[], []]
    assert reads(house) == 2


def test_kinds(door: Door) -> None:
    """Only what is asked for is shown; what is asked for may be any kind."""
    door.stored()
    assert door.get("/changefeed?kinds=report.stored,study.erased").json["changes"] == []
    assert len(door.get(f"/changefeed?kinds={','.join(sorted(KINDS))}").json["changes"]) == 1


@pytest.mark.parametrize(
    "query",
    [
        "since=-1",
        "since=x",
        "since=",
        "since=%D9%A1",
        "since=1&since=2",
        "since=99999999999999999999999",
        "since=9223372036854775808",
        "since=1000000",
        "limit=0",
        "limit=1001",
        "wait=31",
        "wait=1.5",
        "kinds=",
        "kinds=instance.received",
        "cursor=1",
    ],
)
def test_what_is_refused(door: Door, query: str) -> None:
    """A parameter that is unknown, twice there or out of range, and a cursor beyond the end, are a 400 with the reason."""
    assert door.get(f"/changefeed?{query}").problem["status"] == 400


def test_the_cursor_of_another_database_is_named(door: Door) -> None:
    """Who comes with a cursor beyond the end learns why, and what to do."""
    assert "read the feed again from 0" in door.get("/changefeed?since=1000000").problem["detail"]


def test_latest_takes_no_parameters(door: Door) -> None:
    """400 for any."""
    assert door.get("/changefeed/latest?since=1").status == 400


def test_without_a_feed_there_is_no_such_resource(house: House) -> None:
    """404."""
    with Door(house) as running:
        assert running.get("/changefeed").status == 404


def test_a_door_that_closes_lets_nobody_wait(house: House) -> None:
    """A request that waits is answered when the door closes, and does not hold it up."""
    with ThreadPoolExecutor(1) as pool:
        with Door(house, changefeed=ChangeFeed(database=house.database)) as running:
            answer = pool.submit(running.get, "/changefeed?wait=30")
            for _ in range(400):
                if any(thread.name.startswith("changefeed") for thread in threading.enumerate()):
                    break
                time.sleep(0.02)
        assert answer.result(25).json == {"changes": [], "cursor": 0, "more": False}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("changefeed")]


def test_the_watcher_rests_and_starts_again(door: Door) -> None:
    """After a time without waiting requests the next one is told as well."""
    start = door.get("/changefeed?wait=1").json["cursor"]
    time.sleep(2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(door.get, f"/changefeed?since={start}&wait=30")
        sample = photograph()
        door.house.ingest(sample)
        assert [change["sop_instance_uid"] for change in answer.result(25).json["changes"]] == [sample.sop_instance_uid]


def test_the_loop_of_the_page_works(door: Door, tmp_path: Path) -> None:
    """The program of docs/changefeed.md prints each change once, also after it was killed and started again."""
    page = Path(__file__).parents[2] / "docs" / "changefeed.md"
    program = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0]
    (tmp_path / "reader").mkdir()
    for _ in range(2):
        stored = [door.stored().sop_instance_uid for _ in range(3)]
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path / "reader",
            env={**os.environ, "DICOMWEB": door.base},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert [process.stdout.readline().split()[1:] for _ in stored] == [["instance.stored", uid] for uid in stored]
        written = tmp_path / "reader" / "cursor"
        end = len(door.house.actions())
        while not written.exists() or int(written.read_text()) < end - 1:  # the last record may be that of its own read
            time.sleep(0.02)
        process.kill()
        process.wait()
        process.stdout.close()
