"""PostgreSQL, by psycopg: one database for the processes of many nodes.

Write transactions of all nodes follow each other: each takes one advisory lock with its first statement. The audit chain and the change
feed need one order, and where everything is in order nothing can deadlock. Those that touch the queue alone do without.

Nothing here waits for ever: the server ends statements, waits for locks and idle transactions; its keepalives find a node that is gone,
and the lock of one that died is free within half a minute; ours find a server that is gone; and a server that takes a statement and never
answers is given up by the clock. No number of round trips is spent on asking whether a connection lives: one that was lost while it lay
in the pool is replaced when the transaction begins, before anything was said on it.

All texts are compared by their bytes, whatever the database's locale is, so that searches give on both engines the same in the same order
and use the indexes for prefixes.
"""

from __future__ import annotations

import getpass
import ipaddress
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import sqlalchemy.exc
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.pool import NullPool, QueuePool

from storage.errors import IntegrityError, StorageError, Unavailable

_ORDER: Final = 0x6469636F6D  # the advisory lock that puts write transactions in order
_CHANNEL: Final = "dicom_node"
_STATEMENT_S: Final = 60.0
_READ_S: Final = 300.0
_IDLE_S: Final = 30.0
"""A transaction that says nothing for so long is ended by the server, and its lock is free: its process hangs."""
_READ_IDLE_S: Final = 600.0
_GRACE_S: Final = 15.0
_MIGRATION_S: Final = 3600.0
_LOOK_S: Final = 30.0
_LONGEST_PAUSE_S: Final = 5.0

_WORDS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("25006",),
        "the database takes no writes: it is a standby, or a fail-over is going on; if it lasts, check which server is the primary",
    ),
    (("57P01", "57P02", "57P03"), "the database server is stopping or starting: try again"),
    (("53300", "57P05"), "the database has no connection left: raise max_connections, or run fewer processes"),
    (("53100",), "the disk of the database server is full: free some space there; senders will try again"),
    (("53200", "53400", "58030"), "the database server is out of memory or has an input/output error: read its log"),
    (("55P03",), "another session holds a lock of the database for too long: look for a stuck process or an open psql, then try again"),
    (("57014",), "the database took too long over a statement: look at its load, then try again"),
    (("25P03",), "the transaction stood still for too long, and the database ended it: try again"),
    (("40P01", "40001"), "two sessions were in each other's way and the database undid one: try again"),
    (("3D000",), "the server has no such database ({who}): create it (createdb), or correct database.url"),
    (("28-TLS",), "the database server's certificate does not prove who it is: check sslrootcert, and the host's name in database.url"),
    (
        ("28-NONE",),
        (
            "the database asks for a password and none is given ({who}): set DICOM_NODE_DATABASE__PASSWORD, or "
            "DICOM_NODE_DATABASE__PASSWORD_FILE with the name of a file that holds it"
        ),
    ),
    (("28-ROLE",), "the database has no such user ({who}): create it (createuser), or correct the user in database.url"),
    (("28-LOGIN",), "the database user may not log in ({who}): ALTER ROLE ... LOGIN, or correct the user in database.url"),
    (("28-CA",), "the file that sslrootcert names is not there: correct it in database.url, or say sslrootcert=system"),
    (("28-CLIENT",), "the database server asks for a certificate of the node ({who}): name it by sslcert and sslkey in database.url"),
    (
        ("28-REJECTED",),
        "the database lets this machine not in ({who}): a line of the server's pg_hba.conf rejects it; change that",
    ),
    (("28-HBA",), "the database lets this machine not in ({who}): add a line for it to the server's pg_hba.conf, and reload it"),
    (
        ("28",),
        (
            "the database refuses the user or the password ({who}): correct DICOM_NODE_DATABASE__PASSWORD (or the file that "
            "DICOM_NODE_DATABASE__PASSWORD_FILE names, database.password, PGPASSFILE) and the user in database.url"
        ),
    ),
    (("42501",), "the database user may not do this: make it the owner of the database, or grant it the database and its schema"),
    (("08",), "the connection to the database was lost, or cannot be made: check the server and the network between; try again"),
)
_REFUSALS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (("XX001", "XX002"), "pages of the database are damaged: check the disk of the database server, then restore the database"),
    (("23",), "the database refused a change that contradicts what it holds"),
    (("22", "54"), "the database refused a value that it cannot hold"),
)
# Who is not let in gets words without a number.
_AT_THE_DOOR: Final = (
    ("too many clients", "53300"),
    ("remaining connection slots", "53300"),
    ("too many connections", "53300"),
    ("starting up", "57P03"),
    ("shutting down", "57P03"),
    ("session is read-only", "25006"),
    ("hot standby", "25006"),
    ("not permitted to log in", "28-LOGIN"),
    ("permission denied", "42501"),
    ('root certificate file "', "28-CA"),
    ("valid client certificate", "28-CLIENT"),
    ("pg_hba.conf rejects", "28-REJECTED"),
    ('role "', "28-ROLE"),
    ("local user with ID", "28-ROLE"),
    ("does not exist", "3D000"),
    ("authentication failed", "28P01"),
    ("pg_hba.conf", "28-HBA"),
    ("no password supplied", "28-NONE"),
    ("certificate", "28-TLS"),
)
_log = logging.getLogger(__name__)


class _Connection(psycopg.Connection[Any]):
    """A connection on which no answer is awaited for ever, and whose errors hold no values."""

    answer_s = _STATEMENT_S + _GRACE_S

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, self.answer_s if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - the library's own sign that its `timeout` ran out
            self.pgconn.finish()
            raise psycopg.errors.ConnectionException("the server does not answer") from None
        except psycopg.Error as error:
            # The server's words name the values that are in the way: a patient's name must not get into a log.
            words = (error.diag.message_primary or "") if error.sqlstate and error.sqlstate[:2] != "22" else type(error).__name__
            if error.sqlstate:
                error.args = (f"{error.sqlstate} {words}",)
            raise


class PostgresqlBackend:
    """What differs on PostgreSQL; see :class:`storage.database.Backend`.

    Parameters
    ----------
    url
        ``postgresql://user@host:port/name?sslmode=verify-full&sslrootcert=…``: what libpq takes, several hosts included. A password comes
        better from a PGPASSFILE. Connections to another machine must verify the server: ``sslmode`` verify-full or verify-ca.
    busy_timeout_s
        How long a statement waits for a lock.
    readers
        Read connections at most.
    """

    driver_error: type[Exception] = psycopg.Error

    def __init__(self, *, url: str, busy_timeout_s: float, readers: int) -> None:
        try:
            self._parameters = dict(conninfo_to_dict(url.replace("postgresql+psycopg://", "postgresql://", 1)))
        except psycopg.Error:  # whose words hold the whole URL, and a password in it
            form = "postgresql://user@host:5432/name?sslmode=verify-full"
            raise Unavailable(f"database.url cannot be read; its form is {form}") from None
        _require_verified(self._parameters)
        self._busy_timeout_s = busy_timeout_s
        self._listener = _Listener(self)
        # hide_parameters: an error's text must never carry a patient's name into a log.
        self.writer = self._engine({"poolclass": NullPool}, statement_s=_STATEMENT_S, idle_s=_IDLE_S)
        kept = (readers + 1) // 2
        pool = {"poolclass": QueuePool, "pool_size": kept, "max_overflow": readers - kept, "pool_timeout": busy_timeout_s}
        self.reader = self._engine(pool, statement_s=_READ_S, idle_s=_READ_IDLE_S)

    # -- connections -------------------------------------------------------------------------------------------------------------

    def _engine(self, pool: dict[str, Any], *, statement_s: float, idle_s: float) -> Engine:
        def creator() -> _Connection:
            return self.connect(statement_s=statement_s, idle_s=idle_s)

        return create_engine("postgresql+psycopg://", creator=creator, hide_parameters=True, use_native_hstore=False, **pool)

    def connect(self, *, statement_s: float = _STATEMENT_S, idle_s: float = _IDLE_S) -> _Connection:
        """Open one driver connection in autocommit mode (transactions are begun in so many words)."""
        settings = {
            "synchronous_commit": "on",  # whatever the server's default is: what was answered is on its disk
            "statement_timeout": f"{statement_s * 1000:.0f}",
            "lock_timeout": f"{self._busy_timeout_s * 1000:.0f}",
            "idle_in_transaction_session_timeout": f"{idle_s * 1000:.0f}",
            "client_connection_check_interval": "5000",
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
            "TimeZone": "UTC",
        }
        given: dict[str, Any] = {
            "connect_timeout": "10",
            "keepalives_idle": "10",
            "keepalives_interval": "5",
            "keepalives_count": "3",
            "tcp_user_timeout": "25000",
            "target_session_attrs": "read-write",
            "application_name": "dicom-node",
            **self._parameters,
            "client_encoding": "UTF8",
            "options": " ".join([str(self._parameters.get("options", "")), *(f"-c {name}={value}" for name, value in settings.items())]),
        }
        connection = _Connection.connect(autocommit=True, **given)
        connection.answer_s = statement_s + _GRACE_S
        return connection

    # -- transactions ------------------------------------------------------------------------------------------------------------

    def begin_read(self, connection: Connection) -> None:
        """Begin a snapshot."""
        _say(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")

    def end_read(self, connection: Connection) -> None:
        """End it; a rollback would make the driver forget the statements that it has prepared."""
        _say(connection, "COMMIT")

    def begin_write(self, connection: Connection, *, ordered: bool, ask_revision: bool) -> str | None:
        """Begin, wait for the turn, and begin the first savepoint, in one round trip."""
        turn = f"SELECT pg_advisory_xact_lock({_ORDER}); " if ordered else ""
        question = "; SELECT version_num FROM alembic_version" if ask_revision else ""
        answers = _say(connection, f"BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; {turn}SAVEPOINT work{question}")
        if not ask_revision:
            return None
        while answers.nextset():
            pass
        found = answers.fetchone()
        return None if found is None else str(found[0])

    def next_savepoint(self, connection: Connection) -> None:
        """End the savepoint and begin the next."""
        _say(connection, "RELEASE SAVEPOINT work; SAVEPOINT work")

    def before_commit(self, connection: Connection, *, ordered: bool) -> None:
        """Commit, in one round trip with the message that wakes who waits; claims and heartbeats are no news for anybody."""
        _say(connection, f"NOTIFY {_CHANNEL}; COMMIT" if ordered else "COMMIT")

    def lives(self, connection: Connection) -> bool:
        """Tell whether the transaction is still there."""
        return _status(connection) in (TransactionStatus.INTRANS, TransactionStatus.INERROR)

    def spoilt(self, connection: Connection) -> bool:
        """Tell whether a failed statement keeps the work from going on."""
        return _status(connection) == TransactionStatus.INERROR

    # -- waiting for others ------------------------------------------------------------------------------------------------------

    def wait_for_change(self, seen: int | None, timeout_s: float) -> int:
        """Wait until the number of messages heard is another than `seen`, and return it."""
        return self._listener.wait(seen, timeout_s)

    # -- life --------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def migration(self) -> Iterator[Connection]:
        """Give a transaction beside which nobody writes or migrates."""
        with self.writer.connect() as connection, connection.begin():
            driver: Any = connection.connection.driver_connection
            driver.answer_s = _MIGRATION_S
            limit = f"{_MIGRATION_S * 1000:.0f}"
            _say(
                connection,
                f"BEGIN; SET LOCAL statement_timeout = {limit}; SET LOCAL lock_timeout = {limit}; "
                f"SET LOCAL idle_in_transaction_session_timeout = {limit}; SELECT pg_advisory_xact_lock({_ORDER})",
            )
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
            if encoding != "UTF8":
                raise Unavailable(f"the database is encoded in {encoding}: create it anew with ENCODING 'UTF8' TEMPLATE template0")
            yield connection
            _compare_by_bytes(connection)
            _shorten_index(connection)

    def freeze(self, connection: Connection, tables: Sequence[str]) -> None:
        """Lock the tables against writing; reading goes on."""
        limit = f"{_MIGRATION_S * 1000:.0f}"
        _say(connection, f"SET LOCAL idle_in_transaction_session_timeout = {limit}; LOCK TABLE {', '.join(tables)} IN SHARE MODE")

    def weaknesses(self, connection: Connection) -> list[str]:
        """Return what of the server's settings may cost acknowledged data."""
        found = []
        for setting, loss in (
            ("fsync", "a power cut may cost the whole database"),
            ("full_page_writes", "a power cut may damage pages"),
        ):
            if connection.exec_driver_sql(f"SHOW {setting}").scalar() != "on":
                found.append(f"the database server runs with {setting} = off: {loss}; set it to on")
        return found

    def close(self) -> None:
        """Close every connection."""
        self._listener.close()
        self.writer.dispose()
        self.reader.dispose()

    # -- errors ------------------------------------------------------------------------------------------------------------------

    def lost(self, error: BaseException) -> bool:
        """Tell whether `error` says that the connection is gone."""
        state = _state(error)
        return isinstance(_original(error), psycopg.OperationalError) and (not state or state[:2] == "08" or state[:3] == "57P")

    def fatal(self, error: BaseException) -> bool:  # noqa: ARG002 - the same question for every engine
        """Tell whether writing must stop for good: never; a server whose flush fails stops by itself and recovers from its log."""
        return False

    def translated(self, error: BaseException) -> StorageError | None:
        """Return our error for one of the engine's, with cause and remedy; None for what it has no words for."""
        state = _state(error)
        original = _original(error)
        if not state and isinstance(original, psycopg.OperationalError):
            state = next((state for words, state in _AT_THE_DOOR if words in str(original)), "08")
        for table, kind in ((_WORDS, Unavailable), (_REFUSALS, IntegrityError)):
            for states, words in table:
                if state.startswith(states):
                    return kind(words.format(who=self._who()) if "{who}" in words else words)
        return None

    def _who(self) -> str:
        """Say who wants to be let in where."""
        given = self._parameters
        host = given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST") or "this machine"
        name = given.get("dbname") or os.environ.get("PGDATABASE")
        user = given.get("user") or os.environ.get("PGUSER")
        if not user:
            try:
                user = getpass.getuser()
            except (KeyError, OSError):  # a container's user may be a number alone; which of the two is the version's choice
                return f"user number {os.getuid()}, {f'database {name!r}' if name else 'its database'} of {host}"
        return f"user {user!r}, database {(name or user)!r} of {host}"


class _Listener:
    """Hears, on a connection of its own, that somebody committed; one thread that sleeps until then."""

    def __init__(self, backend: PostgresqlBackend) -> None:
        self._backend = backend
        self._condition = threading.Condition()
        self._heard = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stop: tuple[socket.socket, socket.socket] | None = None

    def wait(self, seen: int | None, timeout_s: float) -> int:
        with self._condition:
            if self._thread is None and not self._closed:
                self._stop = socket.socketpair()
                self._thread = threading.Thread(target=self._run, args=(self._stop[1],), name="database-listener", daemon=True)
                self._thread.start()
            self._condition.wait_for(lambda: self._closed or self._heard != seen, timeout_s)
            if self._closed:
                raise Unavailable("the database is closed: the node is stopping")
            return self._heard

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            thread, stop = self._thread, self._stop
        if thread is not None and stop is not None:
            stop[0].close()
            thread.join()
            stop[1].close()

    def _news(self) -> None:
        with self._condition:
            self._heard += 1
            self._condition.notify_all()

    def _run(self, stop: socket.socket) -> None:
        pause = 0.1
        while not self._closed:
            try:
                with self._backend.connect() as connection:
                    connection.execute(f"LISTEN {_CHANNEL}")
                    pause = 0.1
                    self._news()  # whatever was committed while nobody listened
                    self._listen(connection, stop)
            except psycopg.Error as error:
                _log.warning("database.listener_lost", extra={"reason": type(error).__name__})
                stop.settimeout(pause)
                try:
                    stop.recv(1)  # close() ends the pause
                except TimeoutError:
                    pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _listen(self, connection: _Connection, stop: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(stop, selectors.EVENT_READ)
            selector.register(connection.fileno(), selectors.EVENT_READ)
            asked = time.monotonic()
            while not self._closed:
                selector.select(timeout=_LOOK_S)
                if self._closed:
                    return
                connection.pgconn.consume_input()
                heard = False
                while connection.pgconn.notifies() is not None:
                    heard = True
                if heard:
                    self._news()
                elif time.monotonic() - asked >= _LOOK_S:
                    connection.execute("SELECT 1")  # a server that is gone without a word
                    asked = time.monotonic()


def _require_verified(parameters: dict[str, Any]) -> None:
    """Refuse a connection over a network on which the server need not prove who it is."""
    named = parameters.get("hostaddr") or parameters.get("host") or os.environ.get("PGHOSTADDR") or os.environ.get("PGHOST") or ""
    hosts = str(named).split(",")
    if all(_is_this_machine(host) for host in hosts):
        return
    mode = parameters.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    if mode not in ("verify-full", "verify-ca"):
        raise Unavailable(
            f"database.url names another machine, and sslmode={mode} does not prove which one answers: "
            "add sslmode=verify-full and sslrootcert=/path/of/ca.pem (or sslrootcert=system)"
        )


def _is_this_machine(host: str) -> bool:
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _say(connection: Connection, statements: str) -> Any:
    """Run statements without values, in one round trip."""
    driver: Any = connection.connection.driver_connection
    return driver.execute(statements, prepare=False)


def _status(connection: Connection) -> TransactionStatus:
    driver: Any = connection.connection.driver_connection
    return TransactionStatus.UNKNOWN if driver is None or driver.closed else driver.info.transaction_status


def _original(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error


def _state(error: BaseException) -> str:
    return getattr(_original(error), "sqlstate", None) or ""


def _compare_by_bytes(connection: Connection) -> None:
    """Give every text column the collation of bytes, whatever the database's is."""
    found = connection.exec_driver_sql(
        "SELECT c.table_name, c.column_name FROM information_schema.columns c "
        "JOIN information_schema.tables t USING (table_schema, table_name) "
        "WHERE c.table_schema = current_schema() AND t.table_type = 'BASE TABLE' AND c.data_type = 'text' "
        "AND c.collation_name IS DISTINCT FROM 'C' ORDER BY 1, c.ordinal_position"
    ).all()
    tables: dict[str, list[str]] = {}
    for table, column in found:
        tables.setdefault(table, []).append(f'ALTER COLUMN "{column}" TYPE text COLLATE "C"')
    for table, changes in tables.items():
        connection.exec_driver_sql(f'ALTER TABLE "{table}" {", ".join(changes)}')


def _shorten_index(connection: Connection) -> None:
    """Keep the study list's index to what orders it: PostgreSQL holds no entry of more than 2704 bytes, and names may be longer."""
    columns = connection.exec_driver_sql("SELECT indnatts FROM pg_index WHERE indexrelid = to_regclass('ix_studies_list')").scalar()
    if columns is not None and columns > len(_STUDY_ORDER):
        connection.exec_driver_sql("DROP INDEX ix_studies_list")
        connection.exec_driver_sql(f"CREATE INDEX ix_studies_list ON studies ({', '.join(_STUDY_ORDER)})")


_STUDY_ORDER: Final = ("study_date", "study_time", "study_instance_uid")
