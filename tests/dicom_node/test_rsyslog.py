"""The audit trail goes to a real rsyslog over TLS: with OpenSSL each record arrives once and is known to; GnuTLS is found out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dicom_node.audit_message import AuditSource
from dicom_node.audit_sink import AuditSink, Repository, tried
from dicom_node.security import ClientTls
from storage.audit import AuditTrail
from storage.audit_outbox import AuditOutbox
from storage.database import Database
from storage.records import AuditEvent
from tests.certificates import CLIENT, Authority
from tests.dicom_node.audit_repository import message_of
from tests.dicom_node.audit_schema import check
from tests.ports import free_port
from tests.storage.support import open_database

pytestmark = pytest.mark.peer

PROGRAM = shutil.which("rsyslogd") or "/usr/sbin/rsyslogd"
RECORDS = 250
_CONFIGURATION = """
global(workDirectory="{folder}" maxMessageSize="64k" parser.escapeControlCharactersOnReceive="off" net.enableDNS="off"
       defaultNetstreamDriver="{library}" defaultNetstreamDriverCAFile="{authority}"
       defaultNetstreamDriverCertFile="{certificate}" defaultNetstreamDriverKeyFile="{key}")
module(load="imtcp" streamDriver.name="{library}" streamDriver.mode="1" streamDriver.authMode="x509/certvalid")
input(type="imtcp" address="127.0.0.1" port="{port}")
template(name="whole" type="string" string="%rawmsg%\\n")
action(type="omfile" file="{folder}/received" template="whole")
"""


@contextmanager
def rsyslog(folder: Path, library: str, authority: Authority) -> Iterator[tuple[int, Path]]:
    """Run one that believes who shows a certificate of the authority; give its port, and the file with what it received."""
    if not Path(PROGRAM).exists():
        if os.environ.get("CI"):
            pytest.fail("rsyslog is missing, in CI it must be there")
        pytest.skip("rsyslog is missing; make peers installs it")
    pair, port = authority.issue("repository"), free_port()
    file = folder / "rsyslog.conf"
    file.write_text(
        _CONFIGURATION.format(
            folder=folder, library=library, port=port, authority=authority.file, certificate=pair.certificate, key=pair.key
        )
    )
    with (folder / "words").open("wb") as words:
        command = [PROGRAM, "-n", "-f", file, "-i", folder / "pid"]
        with subprocess.Popen(command, stdout=words, stderr=words) as process:
            try:
                yield port, folder / "received"
            finally:
                process.terminate()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty database."""
    folder = tmp_path / "node"
    folder.mkdir()
    database = open_database(folder)
    database.migrate()
    yield database
    database.close()


def test_every_record_arrives_once_and_is_confirmed(database: Database, tmp_path: Path) -> None:
    """Two bursts of records, one of 20 kB: all in its file, in order, once; the cursor is at the end, and nothing failed."""
    authority = Authority(tmp_path / "authority")
    shown = authority.issue("node", purposes=CLIENT)
    trail, outbox = AuditTrail(database=database), AuditOutbox(database=database)
    events: list[tuple[str, dict[str, Any]]] = []
    with rsyslog(tmp_path, "ossl", authority) as (port, received):
        audit_sink = AuditSink(
            database=database,
            audit=trail,
            outbox=outbox,
            repository=Repository(host="127.0.0.1", port=port, tls=ClientTls(authority.file, shown.certificate, shown.key)),
            source=AuditSource(source_id="DERM_NODE", ae_title="DERM_NODE", host="node.example"),
            holder="node",
            linger_s=0.05,
            delay=lambda _: 0.05,
            observe=lambda event, **labels: events.append((event, labels)),
        )
        stop = threading.Event()
        thread = threading.Thread(target=audit_sink.run, args=(stop,))
        thread.start()
        try:
            for count in (1, RECORDS - 1):
                database.write(lambda connection, count=count: [trail.append(connection, event(n)) for n in range(count)])
                await_that(lambda: outbox.backlog().records == 0, outbox, tmp_path)
            await_that(lambda: received.read_bytes().count(b"</AuditMessage>\n") >= RECORDS, outbox, tmp_path)
        finally:
            stop.set()
            thread.join()
        messages = [message_of(one) for one in re.split(rb"\n(?=<85>1 )", received.read_bytes().rstrip(b"\n"))]
    assert [message.number for message in messages] == list(range(1, RECORDS + 1))
    for message in messages:
        check(message.xml)
    assert sum(labels["records"] for name, labels in events if name == "audit.sent") == RECORDS
    assert messages[8].record["actor"] == "Jörg"


@pytest.mark.parametrize("library", ["ossl", "gtls"])
def test_who_never_answers_the_end_is_named(tmp_path: Path, library: str) -> None:
    """`dicom-node check` says that GnuTLS in an rsyslog gives no proof that anything was taken, and what helps; that helps indeed."""
    authority = Authority(tmp_path / "authority")
    shown = authority.issue("node", purposes=CLIENT)
    with rsyslog(tmp_path, library, authority) as (port, _):
        repository = Repository(host="127.0.0.1", port=port, tls=ClientTls(authority.file, shown.certificate, shown.key))
        deadline = time.monotonic() + 60
        while "no connection" in (fault := tried(repository)):
            assert time.monotonic() < deadline, fault
            time.sleep(0.02)
    assert ("give it the driver ossl" in fault) == (library == "gtls")
    assert bool(fault) == (library == "gtls")


def event(number: int) -> AuditEvent:
    """Return something to record; one of many is large."""
    return AuditEvent("instance.received", "success", "Jörg", f"1.2.{number}", {"padding": "x" * (20_000 if number == 7 else 10)})


def await_that(condition: Any, outbox: AuditOutbox, folder: Path) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{outbox.backlog()}\n{(folder / 'words').read_text()}"
        time.sleep(0.02)
