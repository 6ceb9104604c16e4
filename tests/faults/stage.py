"""Where the schedules of a process play: a migrated folder to start from, a small disk, an S3 service that lies, or Ceph."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from storage.s3 import S3Store
from tests import ceph
from tests.faults import lying_s3
from tests.faults.lying_s3 import LyingS3
from tests.storage.house import build

NODE_ID: Final = "0123456789abcdef"
_DISK_MIB: Final = 48
_LIVES_OF_A_SERVICE: Final = 100


class Radosgw:
    """Ceph's radosgw in the place of a `LyingS3`: whatever fault is asked for, it is killed, and healing it is starting it again.

    Parameters
    ----------
    running
        Ceph.
    """

    def __init__(self, running: ceph.Ceph) -> None:
        self._running = running
        self.bucket = running.new_bucket()
        self.endpoint = running.endpoint
        self.spoilt: frozenset[str] = frozenset()
        self._dead = False

    def fail(self, fault: lying_s3.Fault, **_: object) -> None:
        """Kill it."""
        self._running.kill_gateway()
        self._dead = True

    def heal(self) -> None:
        """Start it again."""
        if self._dead:
            self._running.start_gateway()
            self._dead = False

    def objects(self) -> dict[str, bytes]:
        """Return what it keeps: name -> bytes."""
        client = self._running.client()
        return {name: client.get_object(Bucket=self.bucket, Key=name)["Body"].read() for name in self._running.names(self.bucket)}

    def remove(self, name: str) -> None:
        """Delete an object out of band."""
        self._running.client().delete_object(Bucket=self.bucket, Key=name)

    def stop(self) -> None:
        """Leave it to whoever started it."""


class Stage:
    """What the schedules of a process share: a migrated folder to start from, a small disk, and the S3 service."""

    def __init__(self, root: Path, *, dishonest: str = "", radosgw: ceph.Ceph | None = None) -> None:
        self.root = root
        self.radosgw = radosgw
        self.dishonest = dishonest
        self.reach: Callable[[str], None] = lambda _: None
        self._lives = 0
        self._service: LyingS3 | Radosgw | None = None
        self._store: S3Store | None = None
        build(root / "template", node_id=NODE_ID).close()
        self.disk = root / "disk"
        self.disk.mkdir()
        self.small_disk = self._mount()  # last: what is mounted must be unmounted

    def _mount(self) -> bool:
        """Have a disk that can be filled, where we may."""
        if os.geteuid() != 0:
            return False
        options = f"size={_DISK_MIB}m,mode=700"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.disk], capture_output=True, check=False)
        return done.returncode == 0

    def service(self) -> tuple[LyingS3 | Radosgw, S3Store]:
        """Give an empty S3 service and its store."""
        self._lives += 1
        if self._service is None or self._store is None or self._lives % _LIVES_OF_A_SERVICE == 0:
            self._stop_service()
            self._service = LyingS3() if self.radosgw is None else Radosgw(self.radosgw)
            self._store = S3Store(
                bucket=self._service.bucket,
                endpoint_url=self._service.endpoint,
                region="us-east-1",
                attempts=2,
                sleep=lambda _: None,
                reach=self._reached,
            )
        self._service.heal()
        for name in self._service.objects():
            self._service.remove(name)
        return self._service, self._store

    def _reached(self, name: str) -> None:
        self.reach(name)

    def _stop_service(self) -> None:
        if self._service is not None:
            self._service.stop()

    def close(self) -> None:
        """End the service, give the disk back."""
        self._stop_service()
        if self.small_disk:
            subprocess.run(["umount", "--lazy", self.disk], check=True, capture_output=True)


@contextmanager
def stage(folder: Path | None = None, *, dishonest: str = "", radosgw: bool = False) -> Iterator[Stage]:
    """Set a stage, in memory where there is such a file system; `dishonest` names a protection to take away.

    With `radosgw` every store is a bucket of Ceph, whose gateway is killed; else it is a directory or a lying service.
    """
    memory = Path("/dev/shm")
    where = folder or (memory if os.access(memory, os.W_OK) else None)
    before = {name: os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED")}
    os.environ.update(AWS_ACCESS_KEY_ID=ceph.KEY, AWS_SECRET_ACCESS_KEY=ceph.SECRET, AWS_EC2_METADATA_DISABLED="true")
    with (
        tempfile.TemporaryDirectory(prefix="schedules-", dir=where) as root,
        ceph.started() if radosgw else nullcontext() as running,
    ):
        made = Stage(Path(root), dishonest=dishonest, radosgw=running)
        try:
            yield made
        finally:
            made.close()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
