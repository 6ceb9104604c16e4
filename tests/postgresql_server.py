"""A real PostgreSQL on a port and in a folder of its own, which tests may stop, kill and start again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.ports import free_port

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "logging_collector": "off",
    "autovacuum_naptime": "10min",
    "max_wal_size": "256MB",
}


def programs() -> Path:
    """Folder of the newest PostgreSQL's programs; its absence skips the test, and fails it in CI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    beside = shutil.which("initdb")
    if found:
        return found[-1].parent
    if beside:
        return Path(beside).parent
    reason = "PostgreSQL is missing; make peers installs it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class PostgresqlServer:
    """One server.

    Parameters
    ----------
    folder
        For data and socket; made anew.
    durable
        False: nothing is flushed, which is quicker; what is killed is lost.
    settings
        Of postgresql.conf, besides those above.
    """

    def __init__(self, folder: Path, *, durable: bool, settings: Mapping[str, str] | None = None) -> None:
        self._bin = programs()
        self.folder = folder
        self._data = folder / "data"
        self.port = free_port()
        # PostgreSQL refuses to run as root.
        self._user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "-D", str(self._data), "-U", "node", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        given = {**_SETTINGS, "port": str(self.port), "unix_socket_directories": str(folder), **(settings or {})}
        if not durable:
            given |= {"fsync": "off", "full_page_writes": "off"}
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in given.items())
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        as_user: list[str] = []
        if os.geteuid() == 0:
            as_user = ["setpriv", f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups"]
        done = subprocess.run([*as_user, str(self._bin / program), *arguments], capture_output=True, text=True, cwd="/", check=False)
        if done.returncode:
            log = self.folder / "log"
            pytest.fail(f"{program} failed: {done.stderr or done.stdout} {log.read_text()[-2000:] if log.exists() else ''}")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self._run("pg_ctl", "start", "-w", "-s", "-t", "60", "-D", str(self._data), "-l", str(self.folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        """Stop it: smart, fast, or immediate, which is a crash with recovery at the next start."""
        self._run("pg_ctl", "stop", "-w", "-s", "-t", "60", "-m", mode, "-D", str(self._data))

    def as_standby(self) -> None:
        """Start it as a standby, which is read but takes no writes until it is promoted."""
        (self._data / "standby.signal").touch()
        self.start()

    def promote(self) -> None:
        """Make a standby the primary, and wait until it is."""
        self._run("pg_ctl", "promote", "-w", "-s", "-t", "60", "-D", str(self._data))

    def present(self, certificate: Path, private_key: Path) -> None:
        """Offer TLS with this certificate from now on."""
        for source, name in ((certificate, "server.crt"), (private_key, "server.key")):
            target = self._data / name
            shutil.copy(source, target)
            target.chmod(0o600)
            os.chown(target, self._user.pw_uid, self._user.pw_gid)
        self.execute("ALTER SYSTEM SET ssl = on")
        self._run("pg_ctl", "reload", "-s", "-D", str(self._data))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and all of its processes."""
        parent = int((self._data / "postmaster.pid").read_text().splitlines()[0])
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for process in [*map(int, children), parent]:
            os.kill(process, number)

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database."""
        return f"postgresql://node@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, *, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement in a session of its own, in autocommit mode."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


@contextmanager
def started(*, durable: bool, settings: Mapping[str, str] | None = None) -> Iterator[PostgresqlServer]:
    """Start a server: a durable one on a disk, another in memory."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="dicom-node-postgresql-", dir=memory if memory.is_dir() and not durable else None))
    folder.chmod(0o755)
    server: PostgresqlServer | None = None
    try:
        server = PostgresqlServer(folder, durable=durable, settings=settings)
        yield server
    finally:
        if server is not None and (folder / "data" / "postmaster.pid").exists():
            server.signal(signal.SIGCONT)
            server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)
