"""Where the node of a walk keeps its objects: a directory, or a bucket of a real S3 service, with or without a spool."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from storage.database import Clock, utc_now
from storage.failpoints import unarmed
from storage.objects import ObjectStore
from storage.s3 import S3Store
from tests import ceph
from tests.ports import free_port
from tests.storage.house import House, build

Kind = Literal["directory", "archive", "land"]
Service = Literal["rclone", "radosgw"]
KINDS: Final[tuple[Kind, ...]] = ("directory", "archive", "land")
SERVICES: Final[tuple[Service, ...]] = ("rclone", "radosgw")
NODE_ID: Final = "0123456789abcdef"
_START_S = 30.0


@dataclass(frozen=True, slots=True)
class Site:
    """Opens the houses of a walk.

    Parameters
    ----------
    kind
        ``directory``; or a bucket: ``archive`` answers when the object is there, ``land`` when it is in the spool.
    endpoint, buckets
        Of the S3 service, and the folder whose sub-folders are its buckets.
    rotates
        The wrapping key is rotated between the instances.
    radosgw
        The S3 service, where it is that of Ceph; its buckets are in no folder.
    """

    kind: Kind = "directory"
    endpoint: str = ""
    buckets: Path = Path()
    rotates: bool = False
    radosgw: ceph.Ceph | None = None

    def bucket_of(self, folder: Path) -> str:
        """Name of the bucket that belongs to a node's folder."""
        return f"bucket-{folder.parent.name}-{folder.name}".lower().replace("_", "-")

    def store(self, folder: Path, reach: Callable[[str], None] = unarmed) -> ObjectStore | None:
        """Return the store; None for the directory in the folder."""
        if self.kind == "directory":
            return None
        bucket = self.bucket_of(folder)
        if self.radosgw is None:
            (self.buckets / bucket).mkdir(exist_ok=True)
        else:
            self.radosgw.make_bucket(bucket)
        os.environ.update(AWS_ACCESS_KEY_ID=ceph.KEY, AWS_SECRET_ACCESS_KEY=ceph.SECRET, AWS_EC2_METADATA_DISABLED="true")
        return S3Store(bucket=bucket, endpoint_url=self.endpoint, region="us-east-1", addressing_style="path", reach=reach)

    def open(self, folder: Path, *, reach: Callable[[str], None] = unarmed, clock: Clock = utc_now) -> House:
        """Make or open the house in `folder`."""
        policy = "archive" if self.kind == "archive" else "land"
        node_id = NODE_ID if self.kind == "land" else ""
        store = self.store(folder, reach)
        return build(folder, store=store, reach=reach, clock=clock, node_id=node_id, acknowledge=lambda _: policy)

    def forget(self, folder: Path) -> None:
        """Remove the folder and its bucket."""
        shutil.rmtree(folder)
        if self.radosgw is not None:
            self.radosgw.remove_bucket(self.bucket_of(folder))
        elif self.kind != "directory":
            shutil.rmtree(self.buckets / self.bucket_of(folder), ignore_errors=True)


@contextmanager
def site(kind: Kind, folder: Path, *, rotates: bool = False, service: Service = "rclone") -> Iterator[Site]:
    """Give a site; for a bucket, ``rclone serve s3`` runs meanwhile over a folder in `folder`, or Ceph."""
    if kind == "directory":
        yield Site(kind, rotates=rotates)
        return
    if service == "radosgw":
        with ceph.started() as running:
            yield Site(kind, running.endpoint, rotates=rotates, radosgw=running)
        return
    buckets = folder / "buckets"
    buckets.mkdir()
    beside = Path(sys.executable).with_name("rclone")
    port = free_port()
    command = [
        str(beside) if beside.exists() else "rclone", "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{ceph.KEY},{ceph.SECRET}", "--vfs-cache-mode", "off", "--dir-cache-time", "10ms", str(buckets),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("rclone serve s3 did not start") from None
                time.sleep(0.05)
        yield Site(kind, f"http://127.0.0.1:{port}", buckets, rotates=rotates)
    finally:
        process.terminate()
        process.wait()
