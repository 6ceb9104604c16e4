"""Disks that are full, read-only or gone, and a process without descriptors: refused, never lost, and well again without a hand."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from dicom_node.config import load
from dicom_node.environment import findings
from dicom_node.health import not_ready
from dicom_node.storehouse import open_database, storage
from storage.errors import StorageError, Unavailable
from storage.keys import Ring
from storage.objects import DirectoryStore
from storage.room import Room
from tests.postgresql_server import PostgresqlServer
from tests.storage.house import House, build
from tests.storage.samples import Sample, photograph

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB in memory; mounting it needs root."""
    where = tmp_path / "disk"
    where.mkdir()
    with mounted(where, "size=24m,mode=700"):
        yield where


@contextmanager
def mounted(where: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory meanwhile."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


@pytest.fixture
def small_postgresql() -> Iterator[tuple[PostgresqlServer, Path]]:
    """A PostgreSQL that flushes what it writes, alone on a small disk, and that disk."""
    where = Path(tempfile.mkdtemp(prefix="dicom-node-disk-"))  # pytest's own folders let no other user in
    where.chmod(0o755)
    with mounted(where, "size=160m,mode=755"):
        server = PostgresqlServer(where / "postgresql", durable=True, settings={"max_wal_size": "64MB", "min_wal_size": "32MB"})
        yield server, where
        if (where / "postgresql" / "data" / "postmaster.pid").exists():
            server.stop("immediate")
    shutil.rmtree(where)


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes; return the file to remove."""
    ballast = disk / "ballast"
    space = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(space.f_bavail * space.f_frsize - left, 1))
    return ballast


def big() -> Sample:
    """A picture of a megabyte."""
    return photograph(rows=1024, columns=1024)


def readable(house: House, samples: list[Sample]) -> bool:
    """Whether what was acknowledged is all there."""
    return all(house.read(sample.sop_instance_uid) == sample.data_set for sample in samples)


def split(here: Path, landing_at: Path) -> House:
    """A house whose database is in `here`, and whose landing folder and objects are in `landing_at`."""
    (landing_at / "landing").mkdir(parents=True)
    here.mkdir(exist_ok=True)
    (here / "landing").symlink_to(landing_at / "landing")
    return build(here, store=DirectoryStore(landing_at / "objects"), min_free_bytes=0)


@pytest.mark.parametrize("left", [0, 64 << 10, 600 << 10, MIB], ids=["none", "64k", "600k", "all but the end"])
def test_a_full_disk_refuses_and_recovers_alone(disk: Path, tmp_path: Path, left: int) -> None:
    """Full before, during or at the last write: Unavailable (0xA700), nothing left lying; with room again the same is taken (18)."""
    house = split(tmp_path / "house", disk / "spool")
    before, more = big(), big()
    house.ingest(before)
    ballast = fill(disk, left)
    with pytest.raises(Unavailable, match="landing: the disk is full") as refusal:
        house.ingest(more)
    assert refusal.value.failure_reason == 0xA700
    assert readable(house, [before])
    assert [path for path in (disk / "spool" / "landing").rglob("*") if path.is_file()] == []
    ballast.unlink()
    house.ingest(more)
    assert readable(house, [before, more])
    house.close()


def test_control_a_disk_with_room_takes_the_same(disk: Path) -> None:
    """Negative control: what is refused above is refused for the want of room alone."""
    house = build(disk / "house", min_free_bytes=0)
    samples = [big(), big()]
    ballast = fill(disk, 8 * MIB)
    for sample in samples:
        house.ingest(sample)
    ballast.unlink()
    assert readable(house, samples)
    house.close()


def test_a_full_disk_of_the_database_refuses_and_recovers_alone(disk: Path, tmp_path: Path) -> None:
    """Index, queue and audit trail on a full disk, objects on another: no row and no record, so no Success; then all of it (19, 48)."""
    house = split(disk / "house", tmp_path / "elsewhere")
    samples: list[Sample] = [photograph()]
    house.ingest(samples[0])
    ballast = fill(disk, 0)
    refused: list[Sample] = []
    for _ in range(40):  # some pages are free in the log yet
        sample = photograph()
        try:
            house.ingest(sample)
        except Unavailable:
            refused.append(sample)
        else:
            samples.append(sample)
    assert refused
    assert readable(house, samples)
    now = [0.0]
    room = Room(database=house.database, every_s=10.0, monotonic=lambda: now[0])
    with pytest.raises(Unavailable, match="the disk of the data directory is full: free some space"):
        room.check()
    ballast.unlink()
    now[0] += 10.0
    room.check()
    for sample in refused:
        house.ingest(sample)
    assert readable(house, samples + refused)
    assert house.actions().count("instance.received") == len(samples + refused)
    assert house.audit.verify() is None
    house.close()


def ingested(house: House, samples: list[Sample], count: int) -> list[tuple[Sample, Unavailable]]:
    """Have `count` small instances received; those that were acknowledged go to `samples`, the others are returned with their refusals."""
    refused = []
    for _ in range(count):
        sample = photograph()
        try:
            house.ingest(sample)
        except Unavailable as refusal:
            refused.append((sample, refusal))
        else:
            samples.append(sample)
    return refused


@pytest.mark.peer
@pytest.mark.parametrize("log_too", [False, True], ids=["tables", "write-ahead log"])
def test_a_full_disk_of_postgresql_refuses_and_recovers(
    small_postgresql: tuple[PostgresqlServer, Path], tmp_path: Path, *, log_too: bool
) -> None:
    """PostgreSQL finds no room under ingest: no Success, what had one is there; with room again the same process takes the rest (19).

    No room for tables is an error of theirs, after which all goes on by itself. No room for the write-ahead log ends the server, which
    whoever keeps it running starts again; the node only waits.
    """
    server, disk = small_postgresql
    server.execute("CREATE DATABASE node")
    house = build(tmp_path / "house", database_url=server.url("node"))
    samples: list[Sample] = []
    assert ingested(house, samples, 3) == []
    ballast = fill(disk, 0)
    if log_too:
        with suppress(psycopg.Error), psycopg.connect(server.url(), autocommit=True) as connection:
            for _ in range(8):  # segments that are there already are taken first
                connection.execute("SELECT pg_switch_wal()")
                connection.execute("CREATE TEMPORARY TABLE IF NOT EXISTS one (x int)")
                connection.execute("DROP TABLE one")
    refused = ingested(house, samples, 60)
    assert {refusal.failure_reason for _, refusal in refused} == {0xA700}
    if not log_too:
        assert {str(refusal) for _, refusal in refused} == {
            "the disk of the database server is full: free some space there; senders will try again"
        }
    ballast.unlink()
    if log_too:
        assert "PANIC" in (server.folder / "log").read_text()
        with suppress(pytest.fail.Exception):
            server.stop("immediate")  # it may be trying by itself
        server.start()
    house.archive.check()
    for sample, _ in refused:
        house.ingest(sample)
        samples.append(sample)
    assert readable(house, samples)
    assert house.actions().count("instance.received") == len(samples)
    assert house.audit.verify() is None
    assert house.archive.verify().intact
    house.close()


@pytest.mark.peer
def test_no_room_in_postgresql_is_no_readiness(
    small_postgresql: tuple[PostgresqlServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL has no room for its tables, though it reads and commits: /readyz and `dicom-node check` say so while it lasts (19).

    Tried again and again, as a monitor does: what a try leaves behind must not be the room of the next.
    """
    server, disk = small_postgresql
    server.execute("CREATE DATABASE node")
    monkeypatch.setenv("DICOM_NODE_NODE__DATA_DIR", str(tmp_path / "node"))
    monkeypatch.setenv("DICOM_NODE_DATABASE__URL", server.url("node"))
    monkeypatch.setenv("DICOM_NODE_ARCHIVE__STORE", "s3")
    monkeypatch.setenv("DICOM_NODE_ARCHIVE__BUCKET", "nobody-asks-it")
    monkeypatch.setenv("DICOM_NODE_INFERENCE__ENABLED", "false")
    settings = load()
    words = "the disk of the database server is full: free some space there; senders will try again"

    def checked() -> str:
        return next(one.text for one in findings(settings, peers=False) if one.subject in {"database", "keys"})

    settings.ring_file.parent.mkdir(parents=True, mode=0o700)
    Ring.create(settings.ring_file)
    with closing(open_database(settings, Ring.load(settings.ring_file))) as database:
        database.migrate()
    with storage(settings) as parts:
        room = Room(database=parts.database, every_s=0.0)
        assert not_ready({}, parts, room) == []
        ballast = fill(disk, 0)
        parts.archive.check()  # reads, and commits what writes nothing
        assert [not_ready({}, parts, room) for _ in range(5)] == [[words]] * 5
        assert words in checked()
        ballast.unlink()
        assert not_ready({}, parts, room) == []
        assert words not in checked()


@pytest.mark.peer
def test_control_postgresql_with_room_takes_the_same(small_postgresql: tuple[PostgresqlServer, Path], tmp_path: Path) -> None:
    """Negative control: the same server on the same disk refuses nothing while there is room."""
    server, disk = small_postgresql
    server.execute("CREATE DATABASE node")
    house = build(tmp_path / "house", database_url=server.url("node"))
    samples: list[Sample] = []
    fill(disk, 48 * MIB)
    assert ingested(house, samples, 63) == []
    assert readable(house, samples)
    house.close()


def test_a_read_only_disk_refuses_and_still_reads(disk: Path) -> None:
    """Read-only of a sudden: refused in words, what is there is read; writable again, it takes more without a restart (22)."""
    house = build(disk / "house", min_free_bytes=0)
    before, more = photograph(), photograph()
    house.ingest(before)
    # A mount over the mount: the file system itself has open files, and could not be made read-only by hand.
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        with pytest.raises(Unavailable, match="read-only"):
            house.ingest(more)
        assert readable(house, [before])
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    house.ingest(more)
    assert readable(house, [before, more])
    house.close()


def test_a_landing_folder_that_is_gone_refuses(tmp_path: Path) -> None:
    """The landing folder removed under the node: refused in words, what is there is read; put back, it takes more (22)."""
    house = build(tmp_path / "house")
    before, more = photograph(), photograph()
    house.ingest(before)
    shutil.move(tmp_path / "house" / "landing", tmp_path / "gone")
    with pytest.raises(Unavailable, match="the folder is gone"):
        house.ingest(more)
    assert readable(house, [before])
    shutil.move(tmp_path / "gone", tmp_path / "house" / "landing")
    house.ingest(more)
    assert readable(house, [before, more])
    house.close()


def test_no_more_files_refuses_and_recovers_alone(tmp_path: Path) -> None:
    """No file descriptor left: Unavailable and nothing stored by half; with descriptors again the same is taken (21)."""
    house = build(tmp_path / "house")
    before, more = photograph(), photograph()
    house.ingest(before)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refusals = 0
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    try:
        for spare in range(6):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
            try:
                house.ingest(more)
            except StorageError:
                refusals += 1
            else:
                break
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refusals
    house.ingest(more)
    assert readable(house, [before, more])
    assert house.landing_files() == []
    house.close()
