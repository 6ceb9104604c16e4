"""Sends the audit trail to an Audit Record Repository elsewhere: syslog over TLS, in the order of the trail, each record at least once.

Syslog over TLS has no acknowledgement. What stands in for one is the end of the connection: after a burst of records we say
``close_notify``, and the repository answers with its own. TLS hands both over in their order, so whoever answers has read every record
before it. Only then the cursor moves in the database; whatever else happens to a connection (it is lost, cut, reset, not closed in order,
or we are killed), all of its records are sent again on the next one. A record may come twice, then, with the same number; none is left
out.

Of all nodes that share a trail one sends at a time (a duty); should two overlap, the one that was overtaken moves no cursor.

References
----------
RFC 5425 4.4 (closing), RFC 8446 6.1 (close_notify); DICOM PS3.15 A.6
"""

from __future__ import annotations

import fcntl
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import structlog

from dicom_node.audit_message import AuditSource, framed
from dicom_node.errors import StartError
from dicom_node.tls_faults import handshake_fault
from storage.audit_outbox import SINK, AuditOutbox
from storage.changes import Subscriber, Subscribers
from storage.duties import Duties
from storage.errors import LeaseLost, StorageError
from storage.failpoints import unarmed
from storage.work import growing_delay

if TYPE_CHECKING:
    from types import TracebackType

    from dicom_node.config import Settings
    from dicom_node.security import ClientTls
    from dicom_node.storehouse import Storehouse
    from storage.audit import AuditTrail
    from storage.database import Database

T = TypeVar("T")

log = structlog.get_logger(__name__)

_CHUNK = 16_384  # one TLS record
_LOOK_S = 0.25  # how soon it is seen that we are to stop
_TOGETHER_S = 0.2  # what is recorded within this time goes together
_ASIDE_S = 5.0  # how often it is looked whether another process still sends
_FILES_S = 30.0
_LAST_S = 5.0  # for what is under way when we are to stop


class SinkFault(Exception):
    """The repository did not take the records, as far as can be told; the message names cause and remedy."""


class _Stopped(Exception):
    """We are to stop, and what is under way does not end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """An Audit Record Repository, and how to reach it.

    Parameters
    ----------
    host
        Name or address; its certificate must bear it.
    port
        TCP port.
    tls
        Whom we believe, and what we show.
    connect_s
        Longest time for the connection, and for the TLS handshake.
    answer_s
        Longest time in which it takes nothing, or does not answer the end of the connection.
    """

    host: str
    port: int
    tls: ClientTls
    connect_s: float = 10.0
    answer_s: float = 30.0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host}:{self.port}"

    def connect(self, stop: threading.Event) -> Line:
        """Make a connection and the TLS handshake.

        Raises
        ------
        SinkFault
            It came to nothing; nothing was sent.
        """
        try:
            connection = socket.create_connection((self.host, self.port), timeout=self.connect_s)
        except OSError as error:
            raise SinkFault(
                f"no connection to the audit record repository {self.name} ({error.strerror or error}); start it, or correct "
                "audit.syslog_host and audit.syslog_port"
            ) from error
        connection.setblocking(False)
        try:
            secured = self.tls.context().wrap_socket(
                connection, server_hostname=self.host, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except (OSError, ValueError) as error:
            connection.close()
            raise SinkFault(f"TLS with the audit record repository {self.name} cannot begin ({error})") from error
        line = Line(secured, self.name, stop=stop, answer_s=self.answer_s)
        try:
            line.patiently(secured.do_handshake, self.connect_s)
        except OSError as error:
            line.drop()
            raise SinkFault(f"audit record repository {self.name}: {_words(error)}; nothing was sent") from error
        except _Stopped:
            line.drop()
            raise
        return line


class Line:
    """A connection to a repository, after its handshake. A context manager; leaving it drops the connection."""

    def __init__(self, secured: ssl.SSLSocket, name: str, *, stop: threading.Event, answer_s: float) -> None:
        self._secured = secured
        self._name = name
        self._stop = stop
        self._answer_s = answer_s
        self._stopped_at: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.drop()

    def drop(self) -> None:
        """Close without a word."""
        self._secured.close()

    def write(self, content: bytes) -> None:
        """Send some bytes.

        Raises
        ------
        SinkFault
            They were not all taken; nothing is known of those before them either.
        """
        try:
            self._listen()
            left = memoryview(content)
            while left:
                left = left[self.patiently(partial(self._secured.send, left[:_CHUNK]), self._answer_s) :]
        except TimeoutError as error:
            raise SinkFault(
                f"the audit record repository {self._name} takes nothing for {self._answer_s:g} s; look whether it hangs"
            ) from error
        except OSError as error:
            raise self._lost(error) from error

    def finish(self) -> None:
        """End the connection in order: returns when the repository has read all that was written.

        Raises
        ------
        SinkFault
            It cannot be told whether it has.
        """
        try:
            self._listen()
            self.patiently(self._secured.unwrap, self._answer_s)
            # Its answer came after our last byte, unless it had closed by itself at the same moment. Then our bytes met a closed socket:
            # its TCP did not acknowledge them, or reset the connection.
            self._require_acknowledged()
            socket.socket.shutdown(self._secured, socket.SHUT_WR)
            self._await_end()
        except TimeoutError as error:
            raise SinkFault(
                f"the audit record repository {self._name} does not answer the end of the connection (close_notify, RFC 5425 4.4) within "
                f"{self._answer_s:g} s; look whether it hangs. What it was sent is sent again"
            ) from error
        except ssl.SSLEOFError as error:  # whoever is between us could do so, and have kept all of it
            raise SinkFault(
                f"the audit record repository {self._name} closed the connection without answering its end (close_notify, RFC 5425 "
                "4.4), so that nobody knows what it took; what it was sent is sent again. If it is an rsyslog: give it the driver ossl "
                "(package rsyslog-openssl), since gtls never answers"
            ) from error
        except OSError as error:
            raise self._lost(error) from error
        finally:
            self.drop()

    def patiently(self, step: Callable[[], T], limit_s: float) -> T:
        """Do a step of TLS as soon as the other side allows.

        Raises
        ------
        TimeoutError
            Not within the limit.
        OSError
            It failed.
        _Stopped
            We are to stop, and waited for it long enough.
        """
        deadline = time.monotonic() + limit_s
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, deadline)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, deadline)

    def _wait(self, event: int, deadline: float) -> None:
        now = time.monotonic()
        if self._stop.is_set():
            self._stopped_at = self._stopped_at or now
            if now - self._stopped_at > _LAST_S:
                raise _Stopped
        if now >= deadline:
            raise TimeoutError
        poller = select.poll()
        poller.register(self._secured, event)
        poller.poll(min(deadline - now, _LOOK_S) * 1000)

    def _listen(self) -> None:
        """See whether the repository has closed, or says what it does not like; what else it says is nothing to us."""
        for _ in range(64):
            try:
                said = self._secured.recv(_CHUNK)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not said:
                raise ConnectionAbortedError

    def _require_acknowledged(self) -> None:
        deadline = time.monotonic() + self._answer_s
        while _unacknowledged(self._secured):
            if fault := self._secured.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionResetError(fault, "reset")
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.01)

    def _await_end(self) -> None:
        """See that its side was closed, and not reset: a socket is reset that is closed with bytes in it that nobody read."""
        deadline = time.monotonic() + min(self._answer_s, _LAST_S)
        while time.monotonic() < deadline:
            try:
                if not self._secured.recv(_CHUNK):
                    return
            except BlockingIOError:
                poller = select.poll()
                poller.register(self._secured, select.POLLIN)
                poller.poll(_LOOK_S * 1000)

    def _lost(self, error: OSError) -> SinkFault:
        again = "What was not confirmed is sent again"
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            try:
                self._listen()  # the reason may have come before the reset
            except ssl.SSLError as alert:
                error = alert
            except OSError:
                log.debug("audit_sink.no_reason", reason="the connection was reset without an alert")
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return SinkFault(f"audit record repository {self._name}: {_words(error)}. {again}")  # alerts about our certificate come late
        how = "reset" if isinstance(error, ConnectionResetError | BrokenPipeError) else "closed"
        why = "its log says why: perhaps it wants a certificate of ours"
        return SinkFault(f"the audit record repository {self._name} {how} the connection; {why}. {again}")


def _unacknowledged(connection: socket.socket) -> int:
    """Bytes that the other side's TCP has not acknowledged."""
    (count,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))
    return int(count)


def _words(error: OSError) -> str:
    fault = handshake_fault(error, calling=True)
    if "DICOM" in fault.remedy or "DICOM" in fault.reason:  # the sentences are of the DIMSE door
        fault = fault._replace(remedy="is this its port for syslog over TLS (RFC 5425, 6514 as a rule)? If so, its log says more")
    return str(fault)


def unobserved(event: str, **labels: Any) -> None:
    """Observe nothing."""


def pause_after(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    return growing_delay(failures, first_s=1.0, longest_s=300.0)


class AuditSink:
    """Sends.

    Parameters
    ----------
    database, audit
        Where trail and cursor are.
    outbox
        What was not taken yet.
    repository
        To whom.
    source
        As whom.
    holder
        Who this is among all processes of all nodes.
    from_beginning
        As `AuditOutbox`.
    batch
        Records that are read and written together, and are in memory at once.
    window
        Most records of one connection: as many may come twice. Halved for each failure in a row, so that a line that never lasts long gets
        some of them through.
    linger_s
        Seconds without a new record after which a connection is ended, and its records are confirmed.
    longest_s
        Seconds after which it is, in any case.
    delay
        Attempts in a row that failed -> seconds to the next.
    lease_s
        After this time without a sign another process takes over from one that died.
    reach
        Failpoints: audit_sink.connected, audit_sink.part (16 KiB are written, as a rule to the middle of a record), audit_sink.written
        (all are, none is confirmed), audit_sink.confirmed, audit_sink.advanced.
    observe
        Told ``audit.sent`` (records), ``audit.failed`` (failures).
    """

    def __init__(
        self,
        *,
        database: Database,
        audit: AuditTrail,
        outbox: AuditOutbox,
        repository: Repository,
        source: AuditSource,
        holder: str,
        from_beginning: bool = True,
        batch: int = 100,
        window: int = 5000,
        linger_s: float = 2.0,
        longest_s: float = 30.0,
        delay: Callable[[int], float] = pause_after,
        lease_s: float = 180.0,
        reach: Callable[[str], None] = unarmed,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._repository = repository
        self._source = source
        self._from_beginning = from_beginning
        self._batch = batch
        self._window = window
        self._linger_s = linger_s
        self._longest_s = longest_s
        self._delay = delay
        self._lease_s = lease_s
        self._reach = reach
        self._observe = observe
        self._subscribers = Subscribers(database=database, audit=audit)
        self._duties = Duties(database=database, holder=holder, lease_s=lease_s)
        self._held_since: float | None = None  # monotonic; None while another process may hold the duty

    def run(self, stop: threading.Event) -> None:
        """Send until `stop` is set. What is under way then is confirmed if that is quick, and else sent again by whoever sends next."""
        while not stop.is_set():
            try:
                pause = self._step(stop) if self._hold() else min(self._lease_s / 4, _ASIDE_S)
            except _Stopped:
                break
            except LeaseLost as error:
                log.warning("audit_sink.lease_lost", reason=str(error))
                self._held_since, pause = None, 0.0
            except StorageError as error:
                log.warning("audit_sink.storage_unavailable", reason=str(error))
                pause = 1.0
            stop.wait(pause)
        self._give_back()

    def _hold(self) -> bool:
        """Take the duty, or renew it in good time; False while another process has it."""
        now = time.monotonic()
        if self._held_since is None or now - self._held_since > self._lease_s / 4:
            self._held_since = None if self._duties.take(SINK, every_s=0.0) is None else now
        return self._held_since is not None

    def _give_back(self) -> None:
        if self._held_since is None:
            return
        try:
            self._duties.finish(SINK, every_s=0.0, outcome="stopped")
        except StorageError as error:
            log.warning("audit_sink.duty_kept", reason=str(error))

    def _step(self, stop: threading.Event) -> float:
        """Send what is to be sent, if anything; return for how many seconds there is nothing to do."""
        subscriber = self._subscribers.find(SINK, from_beginning=self._from_beginning)
        if (left := self._due_in(subscriber)) > 0:
            return min(left, self._lease_s / 8)
        if not self._outbox.after(subscriber.cursor, limit=1):
            self._database.changed(_LOOK_S)
            return _TOGETHER_S
        try:
            cursor = self._deliver(subscriber, stop)
        except SinkFault as fault:
            failures = subscriber.failures + 1
            pause = self._delay(failures)
            self._observe("audit.failed", failures=failures)
            log.warning("audit_sink.failed", failures=failures, reason=str(fault), again_in_s=round(pause, 1))
            self._subscribers.fail(subscriber, str(fault), after_s=pause)
            return 0.0
        self._reach("audit_sink.confirmed")
        self._subscribers.advance(subscriber, cursor)
        self._reach("audit_sink.advanced")
        self._observe("audit.sent", records=cursor - subscriber.cursor)
        log.debug("audit_sink.sent", records=cursor - subscriber.cursor, cursor=cursor)
        return 0.0

    def _due_in(self, subscriber: Subscriber) -> float:
        """Seconds until a failed attempt may be made again; a time that no delay gives is the work of a wrong clock, and counts as due."""
        if not subscriber.failures:
            return 0.0
        left = (subscriber.due_at - self._database.clock()).total_seconds()
        return 0.0 if left > 2 * self._delay(subscriber.failures) else left

    def _deliver(self, subscriber: Subscriber, stop: threading.Event) -> int:
        """Send the records that follow the cursor, by one connection; return the number of the last one that was taken."""
        window = max(1, self._window >> min(subscriber.failures, 30))
        cursor = subscriber.cursor
        for warning in self._repository.tls.warnings():
            log.warning("audit_sink.certificate_ends", reason=warning)
        with self._repository.connect(stop) as line:
            self._reach("audit_sink.connected")
            began = latest = time.monotonic()
            while (left := window - (cursor - subscriber.cursor)) > 0 and time.monotonic() - began < self._longest_s:
                if not self._hold():
                    raise LeaseLost("another process sends the audit trail")
                records = self._outbox.after(cursor, limit=min(left, self._batch))
                if records:
                    self._write(line, b"".join(framed(record, self._source) for record in records))
                    cursor, latest = records[-1].entry.seq, time.monotonic()
                    if len(records) < self._batch:
                        stop.wait(_TOGETHER_S)
                elif stop.is_set() or time.monotonic() - latest >= self._linger_s:
                    break
                else:
                    self._database.changed(min(_LOOK_S, self._linger_s))
            self._reach("audit_sink.written")
            line.finish()
        return cursor

    def _write(self, line: Line, content: bytes) -> None:
        for start in range(0, len(content), _CHUNK):
            line.write(content[start : start + _CHUNK])
            self._reach("audit_sink.part")


# -- composition ----------------------------------------------------------------------------------------------------------------


def repository_of(settings: Settings) -> Repository | None:
    """Return the repository that the configuration names; None when it names none.

    Raises
    ------
    StartError
        The certificate files cannot be used.
    """
    from dicom_node.security import ClientTls  # noqa: PLC0415 - most nodes have no repository

    section = settings.audit
    authorities = section.authorities or settings.tls.authorities
    if not section.syslog_host or authorities is None:
        return None
    return Repository(host=section.syslog_host, port=section.syslog_port, tls=ClientTls(authorities, section.certificate, section.key))


def tried(repository: Repository) -> str:
    """Connect and end the connection in order, without a record; return what is wrong, empty when nothing is."""
    try:
        with repository.connect(threading.Event()) as line:
            line.finish()
    except SinkFault as fault:
        return str(fault)
    return ""


@contextmanager
def sending(
    settings: Settings,
    parts: Storehouse,
    *,
    holder: str,
    stop: threading.Event,
    reach: Callable[[str], None] = unarmed,
    observe: Callable[..., None] = unobserved,
) -> Iterator[None]:
    """Send meanwhile, in a thread, if the configuration names a repository; sets `stop` should that end by a fault."""
    if not settings.audit.syslog_host:
        yield
        return
    faults: list[BaseException] = []

    def run() -> None:
        try:
            repository = _usable(settings, stop)
            if repository is not None:
                _sink_of(settings, parts, repository, holder=holder, reach=reach, observe=observe).run(stop)
        except BaseException as error:  # noqa: BLE001 - raised again below, where the process ends by it
            faults.append(error)
            stop.set()

    thread = threading.Thread(target=run, name="audit sink", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_LAST_S + 2.0)  # a name server that hangs must not keep the process from stopping
    if faults:
        raise faults[0]


def _usable(settings: Settings, stop: threading.Event) -> Repository | None:
    """Return the repository as soon as our certificate files can be used: the process has other work that must not wait for them."""
    while not stop.is_set():
        try:
            return repository_of(settings)
        except StartError as error:
            log.error("audit_sink.files_unusable", reason=f"{error}. Until then no audit record is sent")  # noqa: TRY400 - the fault is the file's
        stop.wait(_FILES_S)
    return None


def _sink_of(
    settings: Settings,
    parts: Storehouse,
    repository: Repository,
    *,
    holder: str,
    reach: Callable[[str], None],
    observe: Callable[..., None],
) -> AuditSink:
    source = AuditSource(
        source_id=settings.audit.source_id or settings.dimse.ae_title,
        ae_title=settings.dimse.ae_title,
        host=socket.gethostname(),
        site=settings.audit.site,
    )
    return AuditSink(
        database=parts.database,
        audit=parts.audit,
        outbox=parts.outbox,
        repository=repository,
        source=source,
        holder=holder,
        from_beginning=settings.audit.from_beginning,
        reach=reach,
        observe=observe,
    )
