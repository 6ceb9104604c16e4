"""The read cache: what comes in is what it should be, what is least used goes, nothing depends on it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import secrets
import shutil
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import cache as cache_module
from storage.cache import ReadCache
from storage.objects import ObjectReader

KIBIBYTE = 1024


def key(number: int) -> str:
    """Return an object key."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def fill(cache: ReadCache, number: int, content: bytes) -> bool:
    """Put a copy in, in two pieces."""
    half = len(content) // 2
    return cache.fill(key(number), [content[:half], content[half:]], hashlib.sha256(content).hexdigest(), len(content))


def content_of(reader: ObjectReader | None) -> bytes | None:
    """Read a copy whole."""
    if reader is None:
        return None
    try:
        return reader.read_at(0, reader.size)
    finally:
        reader.close()


def files(folder: Path) -> list[Path]:
    """Return every file of the cache but its lock."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def test_what_was_filled_is_read(tmp_path: Path) -> None:
    """A copy comes back byte for byte; what was never there or was dropped is None."""
    cache = ReadCache(tmp_path / "cache", 1 << 20)
    content = secrets.token_bytes(5000)
    assert fill(cache, 1, content)
    assert content_of(cache.open(key(1))) == content
    assert cache.open(key(2)) is None
    cache.drop(key(1))
    cache.drop(key(1))
    assert cache.open(key(1)) is None


def test_adopted_file_moves_in(tmp_path: Path) -> None:
    """A landed file is renamed in, not copied, and is 0600 there."""
    cache = ReadCache(tmp_path / "cache", 1 << 20)
    landed = tmp_path / "landed"
    landed.write_bytes(b"sealed")
    landed.chmod(0o644)
    inode = landed.stat().st_ino
    assert cache.adopt(landed, key(1))
    assert not landed.exists()
    assert content_of(cache.open(key(1))) == b"sealed"
    [file] = files(tmp_path / "cache")
    assert (file.stat().st_ino, stat.S_IMODE(file.stat().st_mode)) == (inode, 0o600)


def test_modes(tmp_path: Path) -> None:
    """Folders are 0700, files 0600."""
    cache = ReadCache(tmp_path / "cache", 1 << 20)
    fill(cache, 1, b"x" * 10)
    folders = [path for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")] if path.is_dir()]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files(tmp_path / "cache")} == {0o600}


@pytest.mark.parametrize("given", [b"", b"half", b"other by", b"too many bytes"])
def test_wrong_bytes_are_not_kept(tmp_path: Path, given: bytes) -> None:
    """A copy whose length or digest is wrong never gets its name, and leaves no file."""
    cache = ReadCache(tmp_path / "cache", 1 << 20)
    assert not cache.fill(key(1), [given], hashlib.sha256(b"the byte").hexdigest(), 8)
    assert cache.open(key(1)) is None
    assert files(tmp_path / "cache") == []


def test_interrupted_source_leaves_nothing(tmp_path: Path) -> None:
    """What the source of the bytes raises passes through, and no half copy stays."""

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError

    cache = ReadCache(tmp_path / "cache", 1 << 20)
    with pytest.raises(ConnectionError):
        cache.fill(key(1), broken(), "0" * 64, 8)
    assert files(tmp_path / "cache") == []


def test_least_recently_used_go_first(tmp_path: Path) -> None:
    """Over the limit the oldest by use go, one that was read lately stays though it came first."""
    folder = tmp_path / "cache"
    generous, strict = ReadCache(folder, 1 << 20), ReadCache(folder, 60 * KIBIBYTE)
    for number in range(10):
        fill(generous, number, bytes(10 * KIBIBYTE))
        os.utime(folder / key(number)[:2] / key(number), (number, number))
    assert content_of(strict.open(key(0))) is not None
    removed, byte_count = strict.evict()
    left = [number for number in range(10) if content_of(strict.open(key(number))) is not None]
    assert left == [0, 6, 7, 8, 9]
    assert (removed, byte_count) == (5, 50 * KIBIBYTE)
    assert strict.evict() == (0, 0)


def test_limit_is_kept_without_asking(tmp_path: Path) -> None:
    """Filling and adopting evict by themselves: the folder stays within the limit and a sixteenth."""
    cache = ReadCache(tmp_path / "cache", 100 * KIBIBYTE)
    for number in range(60):
        if number % 2:
            fill(cache, number, bytes(5 * KIBIBYTE))
        else:
            landed = tmp_path / "landed"
            landed.write_bytes(bytes(5 * KIBIBYTE))
            cache.adopt(landed, key(number))
        assert sum(file.stat().st_size for file in files(tmp_path / "cache")) <= 107 * KIBIBYTE
    assert content_of(cache.open(key(59))) is not None


def test_many_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eviction that knows only three files at a time still ends under the limit and takes the oldest."""
    monkeypatch.setattr(cache_module, "_BATCH", 3)
    folder = tmp_path / "cache"
    generous, strict = ReadCache(folder, 1 << 20), ReadCache(folder, 20 * KIBIBYTE)
    for number in range(20):
        fill(generous, number, bytes(2 * KIBIBYTE))
        os.utime(folder / key(number)[:2] / key(number), (number, number))
    assert strict.evict() == (11, 22 * KIBIBYTE)
    assert [number for number in range(20) if content_of(strict.open(key(number))) is not None] == list(range(11, 20))


def test_too_large_is_not_taken(tmp_path: Path) -> None:
    """What is larger than the whole cache stays out; a limit of 0 is no cache."""
    cache = ReadCache(tmp_path / "cache", 100)
    landed = tmp_path / "landed"
    landed.write_bytes(bytes(101))
    assert not fill(cache, 1, bytes(101))
    assert not cache.adopt(landed, key(2))
    assert landed.exists()
    assert not fill(ReadCache(tmp_path / "none", 0), 1, b"x")


def test_reader_outlives_its_file(tmp_path: Path) -> None:
    """An eviction, a drop or the removal of the whole folder does not disturb who reads."""
    cache = ReadCache(tmp_path / "cache", 1 << 20)
    fill(cache, 1, b"content")
    reader = cache.open(key(1))
    assert reader is not None
    cache.clear()
    assert files(tmp_path / "cache") == []
    shutil.rmtree(tmp_path / "cache")
    assert reader.read_at(0, 7) == b"content"
    reader.close()
    assert cache.open(key(1)) is None
    assert fill(cache, 1, b"content")
    assert content_of(cache.open(key(1))) == b"content"


def test_disk_that_fails_is_a_cache_that_has_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No error of the cache's disk reaches the caller; it is logged."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = ReadCache(tmp_path / "cache", 1 << 20)
    landed = tmp_path / "landed"
    landed.write_bytes(b"sealed")
    assert not fill(cache, 1, b"x")
    assert not cache.adopt(landed, key(1))
    assert landed.exists()
    assert cache.open(key(1)) is None
    assert cache.evict() == (0, 0)
    assert {record.message for record in caplog.records} == {"cache.failed"}


def test_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """A link under a copy's name gives nothing (threats.md row 91)."""
    cache = ReadCache(tmp_path / "cache", 1 << 20)
    fill(cache, 1, b"content")
    [file] = files(tmp_path / "cache")
    file.unlink()
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    file.symlink_to(secret)
    assert cache.open(key(1)) is None


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A copy of 32 MiB moves in and an eviction runs within 4 MiB of memory."""
    cache = ReadCache(tmp_path / "cache", 64 << 20)
    piece = bytes(1 << 18)
    digest = hashlib.sha256()
    for _ in range(128):
        digest.update(piece)
    tracemalloc.start()
    assert cache.fill(key(1), (piece for _ in range(128)), digest.hexdigest(), 32 << 20)
    cache.evict()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def _hammer(folder: str, seed: int) -> None:
    cache = ReadCache(Path(folder), 200 * KIBIBYTE)
    for number in range(150):
        wanted = (number * 7 + seed) % 60
        content = key(wanted).encode() * 128
        found = content_of(cache.open(key(wanted)))
        if found is None:
            fill(cache, wanted, content)
        elif found != content:
            os._exit(3)
        if number % 40 == 0:
            cache.drop(key(wanted))


def test_several_processes_at_once(tmp_path: Path) -> None:
    """Four processes that fill, read, drop and evict one folder never read a wrong byte, and the limit holds at the end."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_hammer, args=(str(tmp_path / "cache"), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    ReadCache(tmp_path / "cache", 200 * KIBIBYTE).evict()
    assert sum(file.stat().st_size for file in files(tmp_path / "cache")) <= 200 * KIBIBYTE
    assert not [file for file in files(tmp_path / "cache") if file.name.startswith(".")]
