"""The audit trail elsewhere: every record arrives, in order, by TLS alone, whatever the repository does and whenever the sender dies."""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dicom_node.audit_message import HASH, RECORD, AuditSource
from dicom_node.audit_sink import AuditSink, Line, Repository, tried
from dicom_node.config import ConfigurationError, Settings
from dicom_node.security import ClientTls
from storage.audit import GENESIS, AuditTrail
from storage.audit_outbox import SINK, AuditOutbox, degraded
from storage.changes import Subscriber, Subscribers
from storage.database import Database
from storage.duties import Duties
from storage.errors import Unavailable
from storage.failpoints import VARIABLE, failpoint_from_environment
from storage.index import Index
from storage.records import AuditEvent
from tests.certificates import CLIENT, Authority
from tests.conftest import both_engines
from tests.dicom_node.audit_repository import AuditRepository, frames_of
from tests.dicom_node.audit_schema import check
from tests.faults.proxy import Proxy
from tests.storage.support import instance, open_database

SOURCE = AuditSource(source_id="DERM_NODE", ae_title="DERM_NODE", host="node.example", site="clinic")
CANARY = "Kanari-5c1d"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who vouches for the repository."""
    return Authority(tmp_path_factory.mktemp("certificates"))


def recorded(database: Database, count: int = 1, *, size: int = 0) -> list[int]:
    """Record something; return the numbers."""
    trail = AuditTrail(database=database)
    detail = {"calling_ae_title": CANARY, "padding": "x" * size}

    def work(connection: Any) -> list[int]:
        return [trail.append(connection, AuditEvent("instance.received", "success", "someone", f"1.2.{n}", detail)) for n in range(count)]

    return database.write(work)


def repository(listener: AuditRepository, authority: Authority, **options: Any) -> Repository:
    """How to reach a repository of the tests."""
    files = options.pop("files", ())
    return Repository(**{"host": "127.0.0.1", "port": listener.port, "tls": ClientTls(authority.file, *files), "answer_s": 60.0, **options})


def sink(database: Database, to: Repository, **options: Any) -> AuditSink:
    """A sink in a hurry."""
    outbox = AuditOutbox(database=database, from_beginning=options.get("from_beginning", True))
    settings: dict[str, Any] = {"holder": "node", "linger_s": 0.05, "delay": lambda _: 0.05, **options}
    audit = AuditTrail(database=database)
    return AuditSink(database=database, audit=audit, outbox=outbox, repository=to, source=SOURCE, **settings)


@contextmanager
def running(*sinks: AuditSink) -> Iterator[None]:
    """Let sinks run for the length of a block."""
    stop = threading.Event()
    threads = [threading.Thread(target=sink.run, args=(stop,), name="sink") for sink in sinks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "it did not stop"


def state(database: Database) -> Subscriber | None:
    """How far the repository is."""
    found = Subscribers(database=database, audit=AuditTrail(database=database)).all()
    return next((one for one in found if one.name == SINK), None)


def wait_for(database: Database, condition: Callable[[], object]) -> None:
    """Wait until the database has come to a state."""
    for _ in range(1200):
        if condition():
            return
        database.changed(0.1)
    pytest.fail(f"did not come: {state(database)}")


def confirmed(database: Database, number: int) -> None:
    """Wait until the cursor is there."""
    wait_for(database, lambda: (state(database) or Subscriber("", -1, 0, database.clock(), "")).cursor >= number)


def failed(database: Database) -> str:
    """Wait for a failed attempt; return why it failed."""
    wait_for(database, lambda: (found := state(database)) is not None and found.failures)
    found = state(database)
    assert found is not None
    return found.reason


@both_engines
def test_every_record_arrives_once_in_order(database: Database, authority: Authority) -> None:
    """Old and new records come by TLS in the order of the trail, each once; with them the chain can be proved at the repository."""
    events: list[tuple[str, dict[str, Any]]] = []
    numbers = recorded(database, 250)
    with AuditRepository(authority.issue("repository")) as listener:
        sending = sink(database, repository(listener, authority), observe=lambda event, **labels: events.append((event, labels)))
        with running(sending):
            confirmed(database, numbers[-1])
            numbers += recorded(database, 3)
            confirmed(database, numbers[-1])
        assert listener.numbers == numbers == list(range(1, 254))
        before = GENESIS
        for message in listener.messages:
            check(message.xml)
            before = hashlib.sha256(bytes.fromhex(before) + message.detail(RECORD).encode()).hexdigest()
            assert message.detail(HASH) == before
        assert before == AuditTrail(database=database).head()[1]
        assert {message.pri for message in listener.messages} == {85}
    assert sum(labels["records"] for event, labels in events if event == "audit.sent") == 253
    assert {event for event, _ in events} == {"audit.sent"}


def test_without_from_beginning_what_was_is_not_sent(database: Database, authority: Authority) -> None:
    """A first repository is then sent what is recorded from now on."""
    recorded(database, 5)
    with AuditRepository(authority.issue("repository")) as listener:
        with running(sink(database, repository(listener, authority), from_beginning=False)):
            wait_for(database, lambda: state(database))
            (number,) = recorded(database)
            confirmed(database, number)
        assert listener.numbers == [6]


def test_the_sink_is_away_and_comes_back(database: Database, authority: Authority) -> None:
    """While nothing listens the trail is the queue, and recording goes on; back, the repository gets all of it, in order, once."""
    listener = AuditRepository(authority.issue("repository"))
    numbers = recorded(database, 30)
    with running(sink(database, repository(listener, authority))):
        assert "no connection" in failed(database)
        numbers += recorded(database, 30)
        waiting = AuditOutbox(database=database).backlog()
        assert waiting.records == 60
        assert waiting.oldest_at is not None
        said = degraded(waiting, records=59, age_s=0, now=database.clock())
        assert "60 audit records" in said
        assert "no connection" in said
        assert degraded(waiting, records=0, age_s=86_400, now=waiting.oldest_at + timedelta(days=1, seconds=1))
        assert not degraded(waiting, records=60, age_s=86_400, now=waiting.oldest_at + timedelta(hours=23))
        with listener:
            confirmed(database, numbers[-1])
            assert listener.numbers == numbers
    found = state(database)
    assert found is not None
    assert (found.failures, found.reason) == (0, "")
    assert AuditOutbox(database=database).backlog().records == 0


@pytest.mark.parametrize("fault", ["reset", "close"])
def test_what_was_not_confirmed_is_sent_again(database: Database, authority: Authority, fault: str) -> None:
    """A connection that is lost after bytes were taken confirms none of them: all come again, none is missing."""
    numbers = recorded(database, 400, size=500)
    with AuditRepository(authority.issue("repository"), fault, fault, fault) as listener:
        with running(sink(database, repository(listener, authority))):
            confirmed(database, numbers[-1])
        assert sorted(set(listener.numbers)) == numbers
        assert len(listener.connections) >= 4


def test_a_line_that_never_lasts_long_gets_through(database: Database, authority: Authority) -> None:
    """With each failure in a row fewer records go by one connection, so that some are confirmed at last."""
    asked: list[int] = []
    numbers = recorded(database, 40)
    with AuditRepository(authority.issue("repository"), *["reset"] * 4) as listener:

        def delay(failures: int) -> float:
            asked.append(failures)
            return 0.02

        with running(sink(database, repository(listener, authority), delay=delay, window=64)):
            confirmed(database, numbers[-1])
        assert len(frames_of(listener.connections[4])[0]) == 4, "64 halved four times"
        assert {1, 2, 3, 4} <= set(asked)
        assert sorted(set(listener.numbers)) == numbers


def test_who_does_not_answer_the_end_is_not_believed(database: Database, authority: Authority) -> None:
    """A repository that reads and never answers close_notify may have read nothing: the records are sent again, and the reason says it."""
    numbers = recorded(database, 3)
    with AuditRepository(authority.issue("repository"), "mute") as listener:
        with running(sink(database, repository(listener, authority, answer_s=3.0))):
            assert "does not answer the end of the connection" in failed(database)
            confirmed(database, numbers[-1])
        assert listener.numbers[: len(numbers) * 2] == numbers * 2
        assert set(listener.numbers) == set(numbers)


def test_who_takes_nothing_holds_nothing_up(database: Database, authority: Authority) -> None:
    """A repository that hangs is given up after a while; recording never waits for it, and memory stays bounded."""
    numbers = recorded(database, 600, size=15_000)
    with AuditRepository(authority.issue("repository"), "deaf") as listener:
        with running(sink(database, repository(listener, authority, answer_s=3.0))):
            assert "takes nothing" in failed(database)
            numbers += recorded(database, 1)
            confirmed(database, numbers[-1])
        assert sorted(set(listener.numbers)) == numbers


# -- certificates -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("unknown", "authority we do not know"),
        ("self-signed", "self-signed"),
        ("expired", "expired"),
        ("other host", "of another address"),
        ("for clients", "not for this use"),
        ("plain", "is no TLS"),
    ],
)
def test_a_wrong_certificate_gets_nothing(database: Database, authority: Authority, tmp_path: Path, wrong: str, words: str) -> None:
    """Nothing is sent to who cannot prove that it is the repository; the reason has a remedy; once it can, it gets everything."""
    good = authority.issue("repository")
    bad = {
        "unknown": lambda: Authority(tmp_path / "strangers", "stranger").issue("repository"),
        "self-signed": lambda: authority.issue("self", self_signed=True),
        "expired": lambda: authority.issue("expired", begins_days=-10, ends_days=-1),
        "other host": lambda: authority.issue("other", hosts=("127.0.0.2", "elsewhere.example")),
        "for clients": lambda: authority.issue("client", purposes=CLIENT),
        "plain": lambda: None,
    }[wrong]()
    numbers = recorded(database, 2)
    with AuditRepository(bad) as listener:
        to = repository(listener, authority, connect_s=2.0 if wrong == "plain" else 30.0)
        with running(sink(database, to, delay=lambda _: 0.2)):
            reason = failed(database)
            came = b"".join(listener.connections)
    assert CANARY.encode() not in came
    assert b"AuditMessage" not in came
    if wrong != "plain":
        assert came == b""
        assert words in reason
    assert ";" in reason, "cause; remedy"
    assert "DICOM on" not in reason
    with AuditRepository(good, port=listener.port) as listener, running(sink(database, repository(listener, authority))):
        confirmed(database, numbers[-1])
        assert listener.numbers == numbers


def test_a_certificate_of_ours_where_one_is_asked_for(database: Database, authority: Authority) -> None:
    """A repository that wants to know us gets our certificate; without one nothing is confirmed, and the reason says what it wants."""
    numbers = recorded(database, 2)
    ours = authority.issue("node", purposes=CLIENT)
    with AuditRepository(authority.issue("repository"), clients=authority) as listener:
        assert "wants a certificate of ours" in tried(repository(listener, authority))
        with running(sink(database, repository(listener, authority))):
            assert "wants a certificate of ours" in failed(database)
        to = repository(listener, authority, files=(ours.certificate, ours.key))
        assert tried(to) == ""
        with running(sink(database, to)):
            confirmed(database, numbers[-1])
        assert listener.numbers == numbers


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"syslog_host": "arr.example"}, "audit.authorities: the audit trail goes out by TLS alone"),
        ({"syslog_host": "arr.example:6514/", "authorities": "ca.pem"}, "the port stands in audit.syslog_port"),
        (
            {"syslog_host": "arr.example", "authorities": "ca.pem", "key": "our.key"},
            "audit.certificate: a certificate needs its private key",
        ),
        ({"refuse_after": 10}, "audit.refuse_after: nothing takes the records"),
    ],
)
def test_faults_of_the_configuration(section: dict[str, Any], words: str) -> None:
    """What cannot work is said before the start, with key and remedy."""
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        Settings.model_validate({"audit": section})


def test_try_without_a_record(authority: Authority) -> None:
    """`dicom-node check` connects and ends the connection in order, and sends nothing."""
    with AuditRepository(authority.issue("repository")) as listener:
        assert tried(repository(listener, authority)) == ""
        assert listener.connections == [b""]
    assert "no connection" in tried(repository(listener, authority))


# -- killed, and several ----------------------------------------------------------------------------------------------------------


def send_until_killed(place: str, port: int, authorities: Path, failpoint: str) -> None:
    """Run a sink in this process, with a failpoint armed."""
    database = open_database(place)
    reach = failpoint_from_environment({VARIABLE: failpoint})
    to = Repository(host="127.0.0.1", port=port, tls=ClientTls(authorities), answer_s=60.0)
    sink(database, to, reach=reach, holder="killed", lease_s=1.0, window=20).run(threading.Event())


@both_engines
@pytest.mark.parametrize(
    ("failpoint", "again"),
    [("audit_sink.part:2", True), ("audit_sink.written:2", True), ("audit_sink.confirmed:2", True), ("audit_sink.advanced:2", False)],
)
def test_killed_in_mid_record(database: Database, place: str, authority: Authority, failpoint: str, again: bool) -> None:
    """SIGKILL in the middle of a record, or before the cursor is durable: what was not confirmed comes again, nothing is left out."""
    numbers = recorded(database, 60, size=1000)
    with AuditRepository(authority.issue("repository")) as listener:
        arguments = (place, listener.port, authority.file, f"{failpoint}:kill")
        process = multiprocessing.get_context("spawn").Process(target=send_until_killed, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -9
        before = state(database)
        assert before is not None
        with running(sink(database, repository(listener, authority), holder="next", lease_s=1.0)):
            confirmed(database, numbers[-1])
        if failpoint.startswith("audit_sink.part"):
            assert frames_of(listener.connections[0])[1], "it was killed in the middle of a record"
        assert listener.numbers[-(60 - before.cursor) :] == numbers[before.cursor :]
        assert sorted(set(listener.numbers)) == numbers
        assert (len(listener.numbers) > 60) == again


@both_engines
def test_of_two_sinks_one_sends(database: Database, place: str, authority: Authority) -> None:
    """Two processes' worth of sinks on one trail: one sends, the other takes over what it leaves."""
    other = open_database(place)
    numbers = recorded(database, 20)
    with AuditRepository(authority.issue("repository")) as listener:
        to = repository(listener, authority)
        second = sink(other, to, holder="second", lease_s=60.0)
        with running(sink(database, to, holder="first", lease_s=60.0)):
            confirmed(database, numbers[-1])
            with running(second):
                numbers += recorded(database, 20)
                confirmed(database, numbers[-1])
                assert {duty.name: duty.holder for duty in Duties(database=database, holder="").all()}[SINK] == "first"
        with running(second):
            numbers += recorded(database, 5)
            confirmed(database, numbers[-1])
        assert listener.numbers == numbers
    other.close()


# -- too much waits ---------------------------------------------------------------------------------------------------------------


def test_too_much_waits_and_recovers(database: Database, authority: Authority) -> None:
    """Above `refuse_after` records instances are refused with a reason; once the repository has them, no more. 0 refuses never."""
    outbox = AuditOutbox(database=database, refuse_after=10, look_s=0.0)
    numbers = recorded(database, 10)
    outbox.require_room()
    numbers += recorded(database, 1)
    with pytest.raises(Unavailable, match=r"more than 10 audit records were not taken"):
        outbox.require_room()
    AuditOutbox(database=database).require_room()
    with AuditRepository(authority.issue("repository")) as listener, running(sink(database, repository(listener, authority))):
        confirmed(database, numbers[-1])
        outbox.require_room()


def test_what_is_told_of_an_instance(database: Database, authority: Authority) -> None:
    """Study, instance and Patient ID stand in the message as the index knows them; the patient's name does not."""
    record = instance({"PatientName": f"{CANARY}^Jane", "PatientID": "P-77", "IssuerOfPatientID": "clinic"}, study="1.2.77")
    database.write(lambda connection: Index(database=database).add(connection, record))
    uid = record.summary.sop_instance_uid
    trail = AuditTrail(database=database)
    number = trail.record(
        AuditEvent("instance.retrieved", "success", "viewer", uid, {"door": "dimse", "address": "10.0.0.9", "instances": 1})
    )
    with AuditRepository(authority.issue("repository")) as listener, running(sink(database, repository(listener, authority))):
        confirmed(database, number)
        (message,) = listener.messages
    check(message.xml)
    objects = {one.get("ParticipantObjectID"): one for one in message.root.iter("ParticipantObjectIdentification")}
    assert {"1.2.77", "P-77^^^clinic"} <= set(objects)
    assert [one.get("UID") for one in objects["1.2.77"].iter("Instance")] == [uid]
    assert CANARY not in message.xml.decode()
    assert message.record["subject"] == uid


def test_no_canary_is_readable_on_the_wire(database: Database, authority: Authority) -> None:
    """What goes through the line is TLS: a relay in between sees no word of a record, and no XML."""
    numbers = recorded(database, 20)
    with AuditRepository(authority.issue("repository")) as listener, Proxy("127.0.0.1", listener.port, record=True) as relay:
        with running(sink(database, repository(listener, authority, port=relay.port))):
            confirmed(database, numbers[-1])
        assert CANARY in listener.messages[0].detail(RECORD)
        assert len(relay.recorded) > 20_000
        for word in (CANARY.encode(), b"AuditMessage", b"DICOM+RFC3881", b"instance.received"):
            assert word not in relay.recorded


def test_control_who_believes_that_sent_is_taken_loses_records(
    database: Database, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a sink that takes the writing for the taking loses what a repository that hangs had not read."""
    monkeypatch.setattr(Line, "finish", Line.drop)
    numbers = recorded(database, 40)
    with AuditRepository(authority.issue("repository"), "deaf") as listener:
        with running(sink(database, repository(listener, authority), window=20)):
            confirmed(database, numbers[-1])
        assert not set(listener.numbers) & set(numbers[:20])


def test_control_who_does_not_verify_sends_to_anybody(database: Database, tmp_path: Path, authority: Authority) -> None:
    """Negative control: without verification the impostor of `test_a_wrong_certificate_gets_nothing` gets every record."""

    class Credulous(ClientTls):
        def context(self) -> ssl.SSLContext:
            context = super().context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context

    numbers = recorded(database, 2)
    with AuditRepository(Authority(tmp_path / "strangers", "stranger").issue("repository")) as listener:
        with running(sink(database, repository(listener, authority, tls=Credulous(authority.file)))):
            confirmed(database, numbers[-1])
        assert listener.numbers == numbers
