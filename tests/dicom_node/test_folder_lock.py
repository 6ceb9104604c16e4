"""The lock of a data folder: who holds it is the node, and a copy of the folder does not pass for it."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from contextlib import closing
from pathlib import Path

import pytest

from dicom_node import folder_lock
from dicom_node.errors import StartError
from dicom_node.folder_lock import FolderLock


def lock(run: Path, *, shared: bool = False) -> FolderLock:
    """Take it."""
    run.mkdir(exist_ok=True, parents=True)
    return FolderLock(run, shared=shared)


def test_who_shares_the_lock_shares_the_incarnation(tmp_path: Path) -> None:
    """The first begins one, others beside it have the same; after them the next begins another, and knows the first ended."""
    with closing(lock(tmp_path, shared=True)) as first:
        with closing(lock(tmp_path, shared=True)) as second:
            assert second.incarnation == first.incarnation
        assert stat.S_IMODE((tmp_path / "incarnation").stat().st_mode) == 0o600
    with closing(lock(tmp_path)) as third:
        assert third.incarnation.id != first.incarnation.id
        assert third.incarnation.ended == third.incarnation.earlier == {first.incarnation.id}
        with pytest.raises(StartError, match=f"process {os.getpid()}"):
            lock(tmp_path)


def test_a_role_beside_one_of_an_older_version(tmp_path: Path) -> None:
    """Who holds the lock knew no incarnations yet, or the file was removed: said in a sentence, and good again when all have ended."""
    with closing(lock(tmp_path, shared=True)):
        (tmp_path / "incarnation").unlink()
        with pytest.raises(StartError, match="stop all roles of this folder, then start them again"):
            lock(tmp_path, shared=True)
    with closing(lock(tmp_path, shared=True)) as last:
        assert last.incarnation.id


def test_what_killed_starts_left_is_removed(tmp_path: Path) -> None:
    """A start that is killed while it writes leaves a file; the next removes it."""
    left = tmp_path / ".incarnation.0123456789abcdef"
    left.touch()
    with closing(lock(tmp_path)):
        assert not left.exists()


def test_roles_that_start_together_agree(tmp_path: Path) -> None:
    """Eight take the lock at once, again and again: none is refused, and all that hold it together have one incarnation."""
    for _ in range(10):
        start, found = threading.Barrier(8), []

        def take(start: threading.Barrier = start, found: list[FolderLock] = found) -> None:
            start.wait()
            found.append(lock(tmp_path, shared=True))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len({one.incarnation.id for one in found}) == 1
        assert [one.last() for one in found[1:]] == [False] * 7
        for one in found:
            one.close()


@pytest.mark.parametrize("moved", ["copied", "another machine"])
def test_neither_a_copy_nor_another_machine_takes_the_node_for_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str) -> None:
    """What was before is known there, since the file came along; that it ended is not: the lock is another, or on a machine of its own."""
    here = tmp_path / "here"
    with closing(lock(here)) as first:
        if moved == "copied":
            there = shutil.copytree(here, tmp_path / "there")
        else:
            (boot := tmp_path / "boot_id").write_text("another\n")
            monkeypatch.setattr(folder_lock, "_BOOT", boot)
    if moved != "copied":
        there = here
    with closing(lock(there)) as clone:
        assert clone.incarnation.earlier == {first.incarnation.id}
        assert clone.incarnation.ended == frozenset()
        assert clone.incarnation.id != first.incarnation.id


def test_a_spoilt_file_is_no_proof(tmp_path: Path) -> None:
    """After a power cut it may hold anything: the next start makes it anew, and takes nobody for ended."""
    lock(tmp_path).close()
    (tmp_path / "incarnation").write_bytes(b"\xff\0\0 one two three\n\n")
    with closing(lock(tmp_path)) as again:
        assert again.incarnation.earlier == frozenset()
