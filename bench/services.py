"""The other programs that a measurement needs, each on a port of its own: an S3 service, PostgreSQL, the node's Mover."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

KEY, SECRET = "bench-access-key", "bench-secret-key-of-length"


def rclone() -> str | None:
    """Return the program that serves S3, None where there is none."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


@contextmanager
def s3_service(folder: Path) -> Iterator[str]:
    """Serve S3 over `folder`, whose sub-folders are the buckets, and give the URL; credentials are in the environment meanwhile."""
    program = rclone()
    if program is None:
        raise RuntimeError("rclone is missing: it comes with requirements/dev.txt")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [program, "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    # 0s would make it spin
    command += ["--vfs-cache-mode", "off", "--dir-cache-time", "10ms"]
    # it would read and digest again what it wrote; the node does that, and its work is what is measured
    command += ["--etag-hash", "", "--ignore-checksum", "--no-checksum", str(folder)]
    credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in credentials}
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _await_port(port, process)
            os.environ.update(credentials)
            yield f"http://127.0.0.1:{port}"
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            process.terminate()
            process.wait()


@contextmanager
def mover(folder: Path, endpoint: str, bucket: str, node_id: str, database_url: str = "") -> Iterator[None]:
    """Run the Mover of the node in `folder` as the process of its own that it is."""
    command = [sys.executable, "-m", "bench.mover", str(folder), endpoint, bucket, node_id, database_url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the sign to stop
        process.wait()


@contextmanager
def in_memory(*, wanted: bool) -> Iterator[Path]:
    """Give a folder that is removed afterwards: on the RAM disk, or on the disk of the temporary files."""
    place = Path("/dev/shm")  # noqa: S108 - a folder of a random name is made there
    with tempfile.TemporaryDirectory(prefix="dicom-node-bench-", dir=place if wanted and place.is_dir() else None) as name:
        yield Path(name)


def load() -> float:
    """Return how many tasks the machine had to do on average during the last minute, ours included."""
    return os.getloadavg()[0]


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("rclone serve s3 did not start: see its log beside its folder") from None
            time.sleep(0.05)
        else:
            return
