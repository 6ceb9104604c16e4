"""Webhooks: signed, in order, at least once, whatever the receiver does and whenever the sender dies."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.webhooks import DELIVERY, SIGNATURE, TIMESTAMP, BadSignature, Webhook, WebhookSender, sign, verify_signature
from storage.audit import AuditTrail
from storage.changes import Subscriber, Subscribers
from storage.database import Database
from storage.failpoints import VARIABLE, failpoint_from_environment
from storage.records import AuditEvent
from tests.conftest import both_engines
from tests.dicom_node.receiver import Posted, Receiver, certificate
from tests.ports import free_port
from tests.storage.support import open_database

SECRET = "a" * 16 + "secret-of-the-tests"
OTHER = "b" * 16 + "another-secret-of-them"
PAGE = Path(__file__).parents[2] / "docs" / "changefeed.md"


def changed(database: Database, count: int = 1, *, action: str = "instance.received") -> list[int]:
    """Let something happen; return the cursors."""
    trail = AuditTrail(database=database)
    return [trail.record(AuditEvent(action, "success", "someone", f"1.2.{number}")) for number in range(count)]


def webhook(url: str, **options: Any) -> Webhook:
    """A subscriber that is told everything."""
    return Webhook(**{"name": "portal", "url": url, "secrets": (SECRET,), "from_beginning": True, **options})


def sender(database: Database, *webhooks: Webhook, **options: Any) -> WebhookSender:
    """A sender in a hurry."""
    settings = {"holder": "node", "timeout_s": 5.0, "lease_s": 60.0, "poll_s": 0.02, "delay": lambda _: 0.05, **options}
    return WebhookSender(database=database, audit=AuditTrail(database=database), webhooks=webhooks, **settings)


@contextmanager
def running(*senders: WebhookSender) -> Iterator[None]:
    """Let senders run for the length of a block."""
    stop = threading.Event()
    threads = [threading.Thread(target=sender.run, args=(stop,), name="sender") for sender in senders]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "it did not stop"


def state(database: Database, name: str = "portal") -> Subscriber:
    """How far the subscriber is."""
    return next(one for one in Subscribers(database=database, audit=AuditTrail(database=database)).all() if one.name == name)


def wait_for(database: Database, condition: Callable[[], bool]) -> None:
    """Wait until the database has come to a state."""
    for _ in range(1200):
        if condition():
            return
        database.changed(0.05)
    pytest.fail("did not come")


def arrived(database: Database, cursor: int, name: str = "portal") -> None:
    """Wait until the cursor of a subscriber is there."""
    subscribers = Subscribers(database=database, audit=AuditTrail(database=database))
    wait_for(database, lambda: any(one.name == name and one.cursor >= cursor for one in subscribers.all()))


@both_engines
def test_sends_what_happened_in_order_and_signed(database: Database) -> None:
    """Old and new changes come in order, once, in requests whose signature the secret verifies; the audit trail keeps that they left."""
    cursors = changed(database, 5)
    events = []
    with Receiver() as receiver:
        sending = sender(database, webhook(receiver.url), batch=2, observe=lambda event, **labels: events.append((event, labels)))
        with running(sending):
            receiver.await_cursors(cursors)
            cursors += changed(database, 3)
            receiver.await_cursors(cursors)
            arrived(database, cursors[-1])
        assert receiver.cursors == cursors
        for posted in receiver.posted:
            verify(posted, SECRET)
            assert posted.headers[DELIVERY] == f"portal/{posted.cursors[0]}-{posted.cursors[-1]}"
            assert posted.headers["Content-Type"] == "application/json"
    recorded = [entry.event for entry in AuditTrail(database=database).entries() if entry.event.action == "webhook.delivered"]
    assert sum(event.detail["changes"] for event in recorded) == len(cursors)
    assert {event for event, _ in events} == {"webhook.delivered"}
    assert sum(labels["changes"] for _, labels in events) == len(cursors)


def verify(posted: Posted, secret: str) -> None:
    """Check the signature of a request as a receiver would."""
    verify_signature(posted.body, timestamp=posted.headers[TIMESTAMP], signature=posted.headers[SIGNATURE], secrets=[secret])


@pytest.mark.parametrize("fault", [500, 404, 302, 429, "cut", "hang", "drip", "redirect"])
def test_what_was_not_taken_is_sent_again(database: Database, fault: int | str) -> None:
    """A receiver that fails, twice, in whatever way gets the same changes again and then the later ones; a redirect is not followed."""
    cursors = changed(database, 2)
    with Receiver(fault, fault) as receiver:
        with running(sender(database, webhook(receiver.url), timeout_s=0.5)):
            posts = receiver.await_posts(3)
            assert [posted.cursors for posted in posts[:3]] == [cursors] * 3
            assert {posted.path for posted in posts} == {"/hook"}
            cursors += changed(database)
            receiver.await_cursors(cursors)
            arrived(database, cursors[-1])
        assert receiver.cursors == [*cursors[:2] * 3, cursors[2]]
    assert (state(database).failures, state(database).reason) == (0, "")


def test_the_body_of_an_answer_is_not_read(database: Database) -> None:
    """200 with a body without end is taken, and holds nothing up."""
    cursors = changed(database)
    with Receiver("endless") as receiver, running(sender(database, webhook(receiver.url))):
        arrived(database, cursors[-1])
        cursors += changed(database)
        receiver.await_cursors(cursors)
        assert receiver.cursors == cursors


def test_a_failure_waits_longer_each_time_and_names_its_reason(database: Database) -> None:
    """Row and counters say how often and why, without the receiver's words; the delay grows with the attempts, across a restart too."""
    changed(database)
    asked: list[int] = []
    events: list[tuple[str, dict[str, Any]]] = []

    def delay(failures: int) -> float:
        asked.append(failures)
        return 0.02 if failures < 3 else 3600.0

    observe = lambda event, **labels: events.append((event, labels))  # noqa: E731 - one line says it
    with Receiver(500, 500, 500) as receiver:
        with running(sender(database, webhook(receiver.url), delay=delay, observe=observe)):
            wait_for(database, lambda: bool(events) and events[-1][1]["failures"] == 3 and state(database).failures == 3)
        assert "answered 500" in state(database).reason
        assert "words" not in state(database).reason
        assert state(database).due_at - database.clock() > timedelta(minutes=50)
        with running(sender(database, webhook(receiver.url), delay=delay)):
            time.sleep(0.5)
        assert len(receiver.posted) == 3, "a restart forgot the delay"
        # A time that no delay gives, left by a clock that was wrong, is not waited for.
        with running(sender(database, webhook(receiver.url), delay=lambda _: 0.02)):
            receiver.await_posts(4)
    assert asked[:1] == [1]
    assert set(asked) == {1, 2, 3}


def test_one_subscriber_that_is_away_delays_no_other(database: Database) -> None:
    """The other gets everything meanwhile; the one that was away gets everything when it is back."""
    cursors = changed(database, 3)
    with Receiver("hang", "hang") as away, Receiver() as well:
        with running(sender(database, webhook(away.url, name="away"), webhook(well.url, name="well"), timeout_s=1.5)):
            away.await_posts(1)
            well.await_cursors(cursors)
            away.await_posts(3)
        assert well.cursors == cursors


def test_only_the_kinds_that_are_wanted(database: Database) -> None:
    """Others are not sent; a long run of them moves the cursor all the same."""
    with Receiver() as receiver, running(sender(database, webhook(receiver.url, kinds=frozenset({"report.delivered"})))):
        changed(database, 1100)
        (wanted,) = changed(database, action="report.delivered")
        receiver.await_cursors([wanted])
        arrived(database, wanted)
        assert receiver.cursors == [wanted]
        (last,) = changed(database, 1100)[-1:]
        arrived(database, last - 300)


def test_a_new_subscriber_is_told_what_comes(database: Database) -> None:
    """Without from_beginning what was before it is not sent."""
    changed(database, 3)
    with Receiver() as receiver, running(sender(database, webhook(receiver.url, from_beginning=False))):
        wait_for(database, lambda: bool(Subscribers(database=database, audit=AuditTrail(database=database)).all()))
        cursors = changed(database)
        receiver.await_cursors(cursors)
        assert receiver.cursors == cursors


# -- killed -------------------------------------------------------------------------------------------------------------------


def send_until_killed(place: str, url: str, failpoint: str, holder: str, lease_s: float) -> None:
    """Run a sender in this process, with a failpoint armed."""
    database = open_database(place)
    reach = failpoint_from_environment({VARIABLE: failpoint})
    sender(database, webhook(url), batch=1, reach=reach, holder=holder, timeout_s=lease_s / 2, lease_s=lease_s).run(threading.Event())


@both_engines
@pytest.mark.parametrize(("failpoint", "again"), [("webhook.claimed", False), ("webhook.answered", True), ("webhook.advanced", False)])
def test_a_sender_that_is_killed_skips_nothing(database: Database, place: str, failpoint: str, again: bool) -> None:
    """Killed between the receiver's 200 and the commit of the cursor, the change is sent again; killed before or after, it is not."""
    cursors = changed(database, 4)
    with Receiver() as receiver:
        arguments = (place, receiver.url, f"{failpoint}:2:kill", "killed", 1.0)
        process = multiprocessing.get_context("spawn").Process(target=send_until_killed, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -9
        with running(sender(database, webhook(receiver.url), batch=1, holder="next", timeout_s=0.5, lease_s=1.0)):
            receiver.await_cursors(cursors)
            arrived(database, cursors[-1])
        assert receiver.cursors == ([cursors[0], cursors[1], *cursors[1:]] if again else cursors)


@both_engines
def test_of_two_senders_one_sends(database: Database, place: str) -> None:
    """Two processes' worth of senders on one subscriber: never two requests at once, each change once; what one leaves the other takes."""
    other = open_database(place)
    cursors = changed(database, 5)
    settings: dict[str, Any] = {"batch": 1, "timeout_s": 2.0, "lease_s": 4.0}
    with Receiver(*["slow"] * 20) as receiver:
        first = sender(database, webhook(receiver.url), holder="first", **settings)
        second = sender(other, webhook(receiver.url), holder="second", **settings)
        with running(second):
            with running(first):
                receiver.await_posts(3)
                cursors += changed(database, 5)
                receiver.await_posts(5)
            cursors += changed(database, 2)
            receiver.await_cursors(cursors)
            arrived(database, cursors[-1])
        assert receiver.most_at_once == 1
        repeated = len(receiver.cursors) - len(cursors)
        assert repeated in {0, 1}, "only what was under way when the first was stopped may come twice"
        assert sorted(set(receiver.cursors)) == cursors
        assert receiver.cursors == sorted(receiver.cursors)
    other.close()


def test_stops_at_once_although_the_receiver_hangs(database: Database) -> None:
    """Stop breaks a request off, no thread is left, and the cursor stays: the change is sent by the next run."""
    cursors = changed(database)
    with Receiver("hang") as receiver:
        with running(sender(database, webhook(receiver.url), timeout_s=600.0, lease_s=1800.0)):
            receiver.await_posts(1)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("webhooks")]
        with running(sender(database, webhook(receiver.url), holder="next")):
            receiver.await_posts(2)
            arrived(database, cursors[-1])


# -- secrets and certificates -------------------------------------------------------------------------------------------------


def test_both_secrets_sign_during_a_change(database: Database) -> None:
    """A receiver that has the old secret and one that has the new one both take the request; a third does not."""
    changed(database)
    with Receiver() as receiver, running(sender(database, webhook(receiver.url, secrets=(SECRET, OTHER)))):
        (posted,) = receiver.await_posts(1)
    verify(posted, SECRET)
    verify(posted, OTHER)
    with pytest.raises(BadSignature):
        verify(posted, "c" * 40)


def test_https_with_a_certificate_that_is_known(database: Database, tmp_path: Path) -> None:
    """Over TLS, checked against ca_file."""
    path = certificate(tmp_path)
    cursors = changed(database, 2)
    with Receiver(certificate=path) as receiver, running(sender(database, webhook(receiver.url, ca_file=path))):
        receiver.await_cursors(cursors)
        assert receiver.cursors == cursors


@pytest.mark.parametrize("known", ["nobody", "another name", "no file"])
def test_https_is_not_sent_to_a_stranger(database: Database, tmp_path: Path, known: str) -> None:
    """A certificate of an unknown issuer, or for another name, and a ca_file that is missing: nothing is sent, and the reason says so."""
    path = certificate(tmp_path, "127.0.0.2" if known == "another name" else "127.0.0.1")
    ca_file = {"nobody": None, "another name": path, "no file": tmp_path / "missing.pem"}[known]
    changed(database)
    with Receiver(certificate=path) as receiver, ExitStack() as stack:
        stack.enter_context(running(sender(database, webhook(receiver.url, ca_file=ca_file))))
        wait_for(database, lambda: any(one.failures for one in Subscribers(database=database, audit=AuditTrail(database=database)).all()))
        assert "no answer" in state(database).reason
        assert receiver.posted == []


@given(
    body=st.binary(max_size=40), stamp=st.integers(0, 10**12 - 1), changed_byte=st.integers(0, 40), secret=st.text(min_size=1, max_size=20)
)
def test_a_signature_fits_what_was_signed_and_nothing_else(body: bytes, stamp: int, changed_byte: int, secret: str) -> None:
    """Round trip; another body, time or secret does not fit."""
    signature = sign(body, timestamp=str(stamp), secrets=[OTHER, secret])

    def check(body: bytes = body, stamp: int = stamp, secret: str = secret) -> None:
        verify_signature(body, timestamp=str(stamp), signature=signature, secrets=[secret], now=stamp)

    check()
    other = bytearray(body + b"\0")
    other[changed_byte % len(other)] ^= 1
    for wrong in (lambda: check(body=bytes(other)), lambda: check(stamp=stamp + 1), lambda: check(secret=secret + "x")):
        with pytest.raises(BadSignature):
            wrong()


@pytest.mark.parametrize(
    ("timestamp", "signature", "now"),
    [
        ("", "good", 1000),
        ("1000", "", 1000),
        ("1000", "v1=", 1000),
        ("1000", "v1=\xe9", 1000),
        ("1000", "v2=good", 1000),
        ("-1000", "good", 1000),
        ("1" * 400, "good", 1000),
        ("1000", "good", 1301),
        ("1000", "good", 699),
    ],
)
def test_what_a_receiver_refuses(timestamp: str, signature: str, now: int) -> None:
    """Headers that are missing or malformed, and a request that is too old, or from the future, are refused with that one error."""
    good = sign(b"{}", timestamp=timestamp, secrets=[SECRET])
    with pytest.raises(BadSignature):
        verify_signature(b"{}", timestamp=timestamp, signature=signature.replace("good", good), secrets=[SECRET], now=now)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "two words"},
        {"name": ""},
        {"url": "http://example.org/hook"},
        {"url": "ftp://127.0.0.1/hook"},
        {"url": "https://"},
        {"url": "https://user:word@example.org/"},
        {"url": "https://example.org:99999/"},
        {"url": "https://[::1/"},
        {"secrets": ()},
        {"secrets": ("short",)},
        {"secrets": (SECRET, OTHER, SECRET + "3")},
        {"kinds": frozenset()},
        {"kinds": frozenset({"instance.received"})},
    ],
)
def test_what_cannot_be_configured(options: dict[str, Any]) -> None:
    """A value that cannot be is named by its field; the secret is never in the words of the object."""
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        webhook(**{"url": "https://example.org/hook", **options})
    assert SECRET not in repr(webhook("https://example.org/hook"))


def test_two_of_one_name(database: Database) -> None:
    """They would share a cursor."""
    with pytest.raises(ValueError, match="same name"):
        sender(database, webhook("https://example.org/1"), webhook("https://example.org/2"))


# -- the page -----------------------------------------------------------------------------------------------------------------


def code(number: int) -> str:
    """A program of docs/changefeed.md."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]


@contextmanager
def program(text: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program of the page in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_the_receiver_of_the_page_works(database: Database, tmp_path: Path) -> None:
    """It does the work of a genuine request, and answers 401 to one with another secret."""
    cursors = changed(database, 3)
    port = free_port()
    with program(code(1), tmp_path, PORT=str(port), SECRET=SECRET) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{port}/"
        with running(sender(database, webhook(url))):
            assert [int(process.stdout.readline().split()[0]) for _ in cursors] == cursors
            arrived(database, cursors[-1])
        with running(sender(database, webhook(url, name="stranger", secrets=(OTHER,)))):
            wait_for(database, lambda: any("401" in one.reason for one in all_of(database)))


def all_of(database: Database) -> list[Subscriber]:
    """Every subscriber."""
    return Subscribers(database=database, audit=AuditTrail(database=database)).all()
