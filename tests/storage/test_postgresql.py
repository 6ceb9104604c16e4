"""PostgreSQL that stops, hangs, fails over, is full or far away: what was answered is there, nothing hangs, everything recovers alone."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy import text

import storage.postgresql
from storage.audit import AuditTrail
from storage.database import Database
from storage.errors import StorageError, Unavailable
from storage.index import Index
from storage.postgresql import PostgresqlBackend
from storage.records import AuditEvent, JobKind, NewJob
from storage.work import WorkQueue
from tests.postgresql_server import PostgresqlServer, started
from tests.storage.support import instance, open_database

pytestmark = pytest.mark.peer


@pytest.fixture
def engine() -> str:
    """Run these over PostgreSQL alone."""
    return "postgresql"


@pytest.fixture(scope="module")
def durable_server() -> Iterator[PostgresqlServer]:
    """A server that flushes, on a disk."""
    with started(durable=True) as server:
        yield server


@pytest.fixture
def durable(durable_server: PostgresqlServer) -> Iterator[Database]:
    """Open a new database on it."""
    name = f"node_{time.monotonic_ns()}"
    durable_server.execute(f"CREATE DATABASE {name}")
    database = Database(url=durable_server.url(name), key=None, busy_timeout_s=10)
    database.migrate()
    yield database
    database.close()


class Load:
    """Threads that admit, claim and read until they are told to stop; they keep what was acknowledged and what was refused."""

    def __init__(self, database: Database, *, callers: int = 4) -> None:
        self._index, self._queue, self._audit = Index(database=database), WorkQueue(database=database), AuditTrail(database=database)
        self._database = database
        self._stop = threading.Event()
        self.acknowledged: list[str] = []
        self.refused: list[Unavailable] = []
        self.other: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(callers)]
        for thread in self._threads:
            thread.start()

    def _run(self, caller: int) -> None:
        while not self._stop.is_set():
            try:
                self._admit(caller)
                self._queue.claim(JobKind.ANALYSE, owner="load")
                self._index.reports_of("1.2.3")
            except Unavailable as error:
                self.refused.append(error)
                time.sleep(0.01)
            except BaseException as error:  # noqa: BLE001 - the test fails by it
                self.other.append(error)
                return

    def _admit(self, caller: int) -> None:
        record = instance(study=f"1.2.3.{caller}")
        uid = record.summary.sop_instance_uid

        def work(connection: storage.postgresql.Connection) -> None:
            self._index.add(connection, record)
            self._queue.enqueue(connection, NewJob(JobKind.ANALYSE, uid))
            self._audit.append(connection, AuditEvent("instance.received", "success", "load", uid))

        self._database.write(work)
        self.acknowledged.append(uid)

    def reaches(self, number: int) -> None:
        """Wait until so many more are acknowledged."""
        wanted, deadline = len(self.acknowledged) + number, time.monotonic() + 120
        while len(self.acknowledged) < wanted:
            assert not self.other
            assert time.monotonic() < deadline, self.refused[-1:]
            time.sleep(0.005)

    def ends(self) -> None:
        """Stop, and compare what was acknowledged with what is there."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.other == []
        with self._database.read() as connection:
            found = [connection.execute(text(f"SELECT {name}")).scalars().all() for name in _KEPT]
        for kept in found:
            assert set(self.acknowledged) <= set(kept), "acknowledged and lost"
            assert set(kept) == set(found[0]), "half of a transaction"
            assert len(kept) == len(set(kept)), "twice"
            assert len(kept) - len(self.acknowledged) <= len(self.refused)
        assert self._audit.verify() is None


_KEPT = ("sop_instance_uid FROM instances", "sop_instance_uid FROM jobs", "subject FROM audit")


def test_a_crash_of_the_server_costs_nothing_that_was_acknowledged(durable: Database, durable_server: PostgresqlServer) -> None:
    """Crashed three times under load: every acknowledged write is there, the others were Unavailable, and it goes on by itself."""
    load = Load(durable)
    for _ in range(3):
        load.reaches(40)
        durable_server.stop("immediate")
        seen = len(load.refused)
        while len(load.refused) < seen + 4:
            time.sleep(0.005)
        durable_server.start()
    load.reaches(40)
    load.ends()
    assert {type(error) for error in load.refused} == {Unavailable}


def test_terminated_backends_cost_nothing(durable: Database, durable_server: PostgresqlServer) -> None:
    """Connections are cut at random under load, also while committing: nothing acknowledged is lost, nothing is there by halves."""
    load = Load(durable)
    dice = random.Random(3)
    for _ in range(40):
        load.reaches(dice.randrange(1, 6))
        durable_server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'dicom-node' ORDER BY random() LIMIT 2"
        )
    load.reaches(10)
    load.ends()


def test_connections_lost_while_idle_are_noticed_by_nobody(durable: Database, durable_server: PostgresqlServer) -> None:
    """After a night, a firewall or a restart of the server the first read and the first write work."""
    trail = AuditTrail(database=durable)
    for number in range(3):
        assert (trail.record(AuditEvent("x", "success", "y")), trail.head()[0]) == (number + 1, number + 1)
        durable_server.execute("SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE application_name = 'dicom-node'")


@pytest.mark.parametrize("asks", [False, True])
def test_a_connection_that_is_cut_in_a_read_is_a_sentence(
    durable: Database, durable_server: PostgresqlServer, caplog: pytest.LogCaptureFixture, asks: bool
) -> None:
    """The server is gone at the next question, or at the end: Unavailable, and no trace of the program in the log (cluster, seed 4)."""
    with durable.read():
        pass  # what is asked once was asked

    def read() -> None:
        with durable.read() as connection:
            driver: Any = connection.connection.driver_connection
            os.kill(driver.info.backend_pid, signal.SIGKILL)
            if asks:
                driver.execute("SELECT 1")

    with pytest.raises(Unavailable):
        read()
    durable_server.stop("immediate")
    durable_server.start()
    with durable.read() as connection:
        assert connection.execute(text("SELECT 1")).scalar_one() == 1
    assert [record for record in caplog.records if record.exc_info] == []


def test_who_waits_for_changes_hears_them_again(durable: Database, durable_server: PostgresqlServer) -> None:
    """A listener whose connection was cut listens again, and takes what it missed for news."""
    assert durable.changed(30)
    while durable.changed(0.3):
        pass
    durable_server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
    assert durable.changed(30)
    while durable.changed(0.3):
        pass
    durable.write(lambda _: None)
    assert durable.changed(30)
    assert not durable.changed(0.2)
    durable.write(lambda _: None, ordered=False)
    assert not durable.changed(0.2)


def test_a_fail_over_is_waited_for() -> None:
    """A server that came back as a standby takes no writes: Unavailable, in words; once it is promoted everything works, untouched."""
    with started(durable=True) as server:
        server.execute("CREATE DATABASE node")
        database = Database(url=server.url("node"), key=None)
        database.migrate()
        load = Load(database)
        load.reaches(20)
        server.stop()
        server.as_standby()
        while not any("standby" in str(error) for error in load.refused):
            time.sleep(0.01)
        server.promote()
        load.reaches(20)
        load.ends()
        database.close()


def test_a_lock_held_by_another_session_ends_in_unavailable(place: str) -> None:
    """A table locked by an open psql, or the turn kept by a stuck node: writes are Unavailable, and work again afterwards."""
    database = open_database(place, busy_timeout_s=0.3)
    audit = AuditTrail(database=database)
    audit.record(AuditEvent("x", "success", "y"))
    for lock in ("LOCK TABLE audit_head IN EXCLUSIVE MODE", f"SELECT pg_advisory_xact_lock({storage.postgresql._ORDER})"):
        with psycopg.connect(place) as other:
            other.execute(lock.encode())
            with pytest.raises(Unavailable, match="holds a lock"):
                audit.record(AuditEvent("x", "success", "y"))
            assert audit.head()[0] == 1
    audit.record(AuditEvent("x", "success", "y"))
    assert audit.verify() is None
    database.close()


def test_the_queue_waits_for_nobodys_turn(place: str) -> None:
    """While a node keeps the turn, jobs are claimed, renewed, retried and released; what is audited waits for it."""
    database = open_database(place, busy_timeout_s=0.3)
    queue = WorkQueue(database=database, attempts={JobKind.ANALYSE: 2}, lease_s=0.05)
    for number in range(3):
        database.write(lambda connection, number=number: queue.enqueue(connection, NewJob(JobKind.ANALYSE, f"1.{number}")))
    with psycopg.connect(place) as other:
        other.execute(f"SELECT pg_advisory_xact_lock({storage.postgresql._ORDER})".encode())
        first, second = (queue.claim(JobKind.ANALYSE, owner="test") for _ in range(2))
        assert first is not None
        assert second is not None
        queue.heartbeat(first)
        queue.fail(first, "later", retryable=True)
        queue.release(second, after_s=1)
        with pytest.raises(Unavailable, match="holds a lock"):
            database.write(lambda connection: queue.enqueue(connection, NewJob(JobKind.ANALYSE, "1.9")))
    database.close()


def test_no_connection_left(postgresql_server: PostgresqlServer, place: str) -> None:
    """At the limit of connections everything is Unavailable with the remedy; once there is room it works."""
    name = place.rpartition("/")[2]
    postgresql_server.execute("DROP ROLE IF EXISTS plain")
    postgresql_server.execute("CREATE ROLE plain LOGIN IN ROLE pg_read_all_data, pg_write_all_data")
    database = open_database(place.replace("node@", "plain@"))
    postgresql_server.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    for attempt in (lambda: database.write(lambda _: None), database.check):
        with pytest.raises(Unavailable, match="no connection left"):
            attempt()
    postgresql_server.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 10")
    database.write(lambda _: None)
    database.check()
    database.close()


def test_who_is_not_let_in_is_told_why(postgresql_server: PostgresqlServer, place: str) -> None:
    """An unknown database or user, a server that is not there and a user without rights are named, without the password."""
    host = f"127.0.0.1:{postgresql_server.port}"
    for url, words in (
        (
            f"postgresql://node:secret-word@{host}/nowhere",
            r"no such database \(user 'node', database 'nowhere' of 127\.0\.0\.1\): create it",
        ),
        ("postgresql://node:secret-word@127.0.0.1:1/node", "connection to the database"),
    ):
        database = Database(url=url, key=None)
        with pytest.raises(Unavailable, match=words) as caught:
            database.check()
        assert "secret-word" not in f"{caught.value} {caught.value.__cause__}"
        database.close()
    postgresql_server.execute("DROP ROLE IF EXISTS nobody_special")
    postgresql_server.execute("CREATE ROLE nobody_special LOGIN")
    database = open_database(place.replace("node@", "nobody_special@"))
    with pytest.raises(Unavailable, match="grant"):
        database.check()
    database.close()


def test_an_error_is_put_into_words_without_a_login_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user has a number and no entry in passwd: errors that name nobody never ask, and the others name the number."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1000710000")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.delenv("PGUSER", raising=False)
    backend = PostgresqlBackend(url="postgresql:///?service=derm", busy_timeout_s=1, readers=1)
    assert "undid one" in str(backend.translated(psycopg.errors.DeadlockDetected("x")))
    for words in ('FATAL:  database "derm" does not exist', "local user with ID 1000710000 does not exist"):
        assert f"user number {os.getuid()}, its database of this machine" in str(backend.translated(psycopg.OperationalError(words)))
    backend.close()


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ('FATAL:  role "derm" is not permitted to log in', "may not log in .*LOGIN"),
        ('root certificate file "/x/root.crt" does not exist\nEither provide the file or', "sslrootcert names is not there"),
        ('FATAL:  permission denied for database "derm"\nDETAIL:  User does not have CONNECT privilege.', "grant it"),
        ('FATAL:  pg_hba.conf rejects connection for host "10.0.0.1", user "d", database "d", no encryption', "a line .* rejects it"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "d", database "d", no encryption', "add a line"),
        ("FATAL:  connection requires a valid client certificate", "sslcert and sslkey"),
        ("certificate verify failed", "sslrootcert, and the host's name"),
    ],
)
def test_what_is_said_at_the_door_gets_its_own_advice(said: str, advice: str) -> None:
    """Words of the server, or of its client library, that come without a number."""
    backend = PostgresqlBackend(url="postgresql://derm@/derm", busy_timeout_s=1, readers=1)
    assert re.search(advice, str(backend.translated(psycopg.OperationalError(f'connection to server at "h", port 5432 failed: {said}'))))
    backend.close()


def test_a_wrong_password_names_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong, missing, an unknown user, a machine that may not come in: each its own sentence, with user, host and the setting to mend."""
    monkeypatch.delenv("PGPASSFILE", raising=False)
    with started(durable=False) as server:
        server.execute("CREATE ROLE guarded LOGIN PASSWORD 'right-word'")
        rules = server.folder / "data" / "pg_hba.conf"
        kept = rules.read_text()
        rules.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\nhost all outsider 127.0.0.1/32 reject\n{kept}")
        server.execute("SELECT pg_reload_conf()")
        where = f"127.0.0.1:{server.port}/postgres"
        for user, words in (
            (
                "guarded:wrong-word",
                r"refuses .*\(user 'guarded', database 'postgres' of 127\.0\.0\.1\): correct DICOM_NODE_DATABASE__PASSWORD \(",
            ),
            ("guarded", r"asks for a password .*user 'guarded'.*: set DICOM_NODE_DATABASE__PASSWORD, or"),
            ("nobody-here", r"no such user .*user 'nobody-here'"),
            ("outsider", r"user 'outsider'.*pg_hba\.conf"),
        ):
            database = Database(url=f"postgresql://{user}@{where}", key=None)
            with pytest.raises(Unavailable, match=words) as caught:
                database.check()
            assert "wrong-word" not in f"{caught.value} {caught.value.__cause__}"
            database.close()


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes statements and never answers blocks nobody for ever; when it answers again everything works."""
    monkeypatch.setattr(storage.postgresql, "_STATEMENT_S", 0.5)
    monkeypatch.setattr(storage.postgresql, "_READ_S", 0.5)
    monkeypatch.setattr(storage.postgresql, "_GRACE_S", 0.5)
    with started(durable=False) as server:
        server.execute("CREATE DATABASE node")
        database = Database(url=server.url("node") + "?connect_timeout=2", key=None)
        database.migrate()
        load = Load(database)
        load.reaches(10)
        server.signal(signal.SIGSTOP)
        seen = len(load.refused)
        while len(load.refused) < seen + 5:
            time.sleep(0.01)
        server.signal(signal.SIGCONT)
        load.reaches(10)
        load.ends()
        database.close()


def test_a_node_that_hangs_loses_its_turn(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stops in the middle of a transaction is thrown out by the server; the others go on, and its work is not there."""
    monkeypatch.setattr(storage.postgresql, "_IDLE_S", 0.3)
    stuck, other = open_database(place), open_database(place)
    held, free = threading.Event(), threading.Event()

    def hang(connection: storage.postgresql.Connection) -> None:
        connection.execute(text("UPDATE audit_head SET seq = 77"))
        held.set()
        free.wait(60)

    caught: list[BaseException] = []

    def call() -> None:
        try:
            stuck.write(hang)
        except StorageError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert held.wait(30)
    assert AuditTrail(database=other).record(AuditEvent("x", "success", "y")) == 1
    free.set()
    thread.join()
    assert [type(error) for error in caught] == [Unavailable]
    assert AuditTrail(database=stuck).record(AuditEvent("x", "success", "y")) == 2
    stuck.close()
    other.close()


_CLAIMER = """
import sys
from storage.records import JobKind
from storage.work import WorkQueue
from tests.storage.support import open_database
database = open_database(sys.argv[1])
queue = WorkQueue(database=database)
while (job := queue.claim(JobKind.ANALYSE, owner=sys.argv[2])) is not None or queue.lanes(JobKind.ANALYSE):
    if job is not None:
        print(job.id, job.attempts, flush=True)
database.close()
"""


def test_many_processes_claim_each_job_once(place: str, database: Database) -> None:
    """Four processes empty a queue at once: every job is claimed, by one of them, at its first attempt."""
    queue = WorkQueue(database=database)
    number = 400
    database.write(lambda connection: [queue.enqueue(connection, NewJob(JobKind.ANALYSE, f"1.{count}")) for count in range(number)])
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", _CLAIMER, place, str(who)], stdout=subprocess.PIPE, text=True)
        for who in range(4)
    ]
    claimed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(line for lines in claimed for line in lines) == sorted(f"{job} 1" for job in range(1, number + 1))
    assert sum(bool(lines) for lines in claimed) > 1


def test_a_commit_is_flushed_whatever_the_server_is_set_to(place: str, postgresql_server: PostgresqlServer) -> None:
    """A database whose default is to answer before the flush does not do so for the node; weaknesses of the server are named."""
    name = place.rpartition("/")[2]
    postgresql_server.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    database = open_database(place)
    assert database.write(lambda connection: connection.exec_driver_sql("SHOW synchronous_commit").scalar()) == "on"
    assert [word for sentence in database.weaknesses() for word in ("fsync", "full_page_writes") if f" {word} " in sentence] == [
        "fsync",
        "full_page_writes",
    ]
    database.close()


def test_a_locale_changes_nothing(postgresql_server: PostgresqlServer) -> None:
    """In a database of another locale text is ordered by bytes all the same, and a search for a prefix reads an index."""
    postgresql_server.execute("DROP DATABASE IF EXISTS of_locale")
    postgresql_server.execute("CREATE DATABASE of_locale TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de-DE'")
    database = Database(url=postgresql_server.url("of_locale"), key=None)
    database.migrate()
    index = Index(database=database)
    names = ["b^x", "A^x", "ä^x", "a^x", "B^x", "a_^x"]
    records = [instance({"PatientName": name}, study=f"1.{number}") for number, name in enumerate(names)]
    database.write(lambda connection: [index.add(connection, record) for record in records])
    with database.read() as connection:
        ordered = connection.execute(text("SELECT patient_name_alphabetic FROM studies ORDER BY patient_name_alphabetic")).scalars().all()
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        question = text("EXPLAIN SELECT id FROM studies WHERE patient_name_alphabetic LIKE 'a!_%' ESCAPE '!'")
        plan = " ".join(connection.execute(question).scalars())
    assert ordered == sorted((name.casefold() for name in names), key=str.encode)
    assert "ix_studies_patient_name" in plan
    assert "Index Cond" in plan
    database.close()
    postgresql_server.execute("DROP DATABASE of_locale WITH (FORCE)")


# -- over a network ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://node@db.example/node",
        "postgresql://node@192.0.2.7/node?sslmode=require",
        "postgresql://node@127.0.0.1,db.example/node?sslmode=prefer",
        "postgresql://node@localhost/node?hostaddr=192.0.2.7",
    ],
)
def test_a_server_elsewhere_must_prove_who_it_is(url: str) -> None:
    """Without verify-full or verify-ca no connection to another machine is even tried."""
    with pytest.raises(Unavailable, match="verify-full"):
        Database(url=url, key=None)


@pytest.mark.parametrize("url", ["postgresql://[", "postgresql://node@h/n?nonsense=1"])
def test_a_url_that_cannot_be_read(url: str) -> None:
    """It is refused with the form that is wanted."""
    with pytest.raises(Unavailable, match="its form is"):
        Database(url=url, key=None)


def test_tls_with_a_verified_certificate(tmp_path: Path, place: str, postgresql_server: PostgresqlServer) -> None:
    """With the right authority the connection is encrypted; with another one, or another name, it is refused and says why."""
    postgresql_server.present(*_certificate(tmp_path, "db", "127.0.0.1"))
    (tmp_path / "other").mkdir()
    _certificate(tmp_path / "other", "db", "127.0.0.1")
    url = f"{place}?sslmode=verify-full&sslrootcert="
    database = open_database(f"{url}{tmp_path / 'db.crt'}")
    ask = text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    assert database.write(lambda connection: connection.execute(ask).scalar()) is True
    with database.read() as connection:
        assert connection.execute(ask).scalar() is True
    database.close()
    for root, host in ((tmp_path / "other/db.crt", "127.0.0.1"), (tmp_path / "db.crt", "localhost")):
        database = open_database(f"{url}{root}".replace("127.0.0.1", host))
        with pytest.raises(Unavailable, match="certificate"):
            database.check()
        database.close()


def _certificate(folder: Path, name: str, address: str) -> tuple[Path, Path]:
    """Make a certificate that signs itself, for an address; return certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return certificate, private
