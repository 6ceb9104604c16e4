"""The lock of a data folder: one whole node holds it, or the roles of one node that run each by themselves share it.

Whoever takes it while nobody holds it begins an incarnation of the node (`storage.nodes.Incarnation`): a random number in a file beside
the lock, which the others read. With each stands where it was: on which machine since when, and which file the lock is. A later one that
finds the very same lock free there knows that the earlier ended; a copy of the folder, or another machine, does not.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path
from typing import Final

from dicom_node.errors import StartError
from storage.nodes import Incarnation

_KEPT: Final = 256
"""Incarnations that are remembered. One that was forgotten is watched instead of believed to have ended."""
_PATIENCE_S: Final = 5.0
"""How long a role waits where another is just starting or stopping, or `dicom-node check` looks."""
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class FolderLock:
    """The lock of a data folder, held from here to `close`.

    Parameters
    ----------
    run
        The folder ``run`` in the data folder; it is there.
    shared
        Together with others that share it.

    Raises
    ------
    StartError
        Another holds it.
    OSError
        The folder cannot be used.
    """

    def __init__(self, run: Path, *, shared: bool) -> None:
        self._file = run / "incarnation"
        self._descriptor = os.open(run / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            place = os.fstat(self._descriptor)
            self._place = f"{_boot()}:{place.st_dev}:{place.st_ino}"
            self._take(shared=shared)
            self.incarnation = self._read()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self, *, shared: bool) -> None:
        deadline = time.monotonic() + (_PATIENCE_S if shared else 0.0)
        while True:
            if self._locked(fcntl.LOCK_EX):
                self._begin()
                # Between the two locks another may begin one more incarnation; what is read afterwards holds.
                if not shared or self._locked(fcntl.LOCK_SH):
                    return
            elif shared and self._locked(fcntl.LOCK_SH):
                return
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
        folder = self._file.parent.parent
        raise StartError(f"another node (process {holder or 'unknown'}) uses {folder}; stop it, or name another node.data_dir")

    def _locked(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _begin(self) -> None:
        """Write down a new incarnation, before those that were."""
        for left in self._file.parent.glob(".incarnation.*"):  # of a start that was killed
            left.unlink(missing_ok=True)
        lines = [f"{secrets.token_hex(8)} {self._place}", *(" ".join(one) for one in self._known())][:_KEPT]
        fresh = self._file.with_name(f".incarnation.{secrets.token_hex(8)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, ("\n".join(lines) + "\n").encode("ascii"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fresh.replace(self._file)

    def _known(self) -> list[tuple[str, str]]:
        try:
            lines = self._file.read_text(encoding="ascii", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [(words[0], words[1]) for line in lines if len(words := line.split()) == 2]

    def _read(self) -> Incarnation:
        known = self._known()
        if not known:
            folder = self._file.parent.parent
            raise StartError(
                f"a role of an older version of the node uses {folder}, or the file {self._file} was removed while a role ran: "
                "stop all roles of this folder, then start them again"
            )
        (current, _), *before = known
        ended = frozenset(number for number, place in before if place == self._place)
        return Incarnation(current, ended=ended, earlier=frozenset(number for number, _ in before))

    def last(self) -> bool:
        """Whether no other process holds this lock; for one that ends, since it may lose its own by asking."""
        return self._locked(fcntl.LOCK_EX)

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


def _boot() -> str:
    """Return what is another after each start of the machine; where none can tell, another each time."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)
