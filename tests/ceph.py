"""Ceph as processes of ours: one monitor, one OSD and one radosgw, in a folder of their own; ``make ceph`` installs the programs.

    python -m tests.ceph

starts one, prints how to reach it, and stops it at Ctrl-C. Nothing of it outlives the process that started it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import boto3
from botocore.config import Config

from tests.ports import free_port

PROGRAMS: Final = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
KEY, SECRET = "test-access-key", "test-secret-key-of-length"
MASTER_KEY: Final = "arn:aws:kms:us-east-1:123456789012:key/12345678-1234-1234-1234-123456789012"
"""The one key that its SSE-KMS knows."""
_CLASSES: Final = ("INTELLIGENT_TIERING", "STANDARD_IA")
_START_S: Final = 120.0
_STOP_S: Final = 20.0
_DISK_BYTES: Final = 6 << 30
_CONFIGURATION: Final = """
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{monitor}]
public network = 127.0.0.0/8
ms bind msgr1 = false
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
paxos propose interval = 0.05
paxos min wait = 0.01
mon tick interval = 1
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
pid file =
log file = {folder}/$name.log
log to stderr = false
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
keyring = {folder}/keyring

osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon max pg per osd = 4000
mon data avail warn = 1
mon data avail crit = 1

[mon]
mon data = {folder}/$name

[osd]
osd data = {folder}/$name
osd objectstore = bluestore
osd crush initial weight = 1
osd memory target = 939524096
bluestore block size = {disk}
bluestore fsck on mount = false

[client.rgw]
ms mon client mode = crc
rgw frontends = {frontend}
rgw enable usage log = false
rgw enable ops log = false
rgw crypt require ssl = false
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = {master_key}={secret}
"""


def missing() -> list[str]:
    """Return the programs that are not there; none: all are."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Daemon:
    """One program that stays, with its process; the kernel kills it when its parent is gone.

    Parameters
    ----------
    command
        That keeps it in the foreground.
    log
        Where its words go; Ceph's own log lies beside.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = list(command)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; at once: that it works is to be asked."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        if self._process is None:
            raise RuntimeError(f"{self._command[0]} is not running")
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def words(self) -> str:
        """Return the last words."""
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""

    def end(self, number: signal.Signals) -> None:
        """Send a signal that ends it, and wait; SIGKILL follows where that does not help."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class Ceph:
    """A cluster of one machine, with an S3 service.

    Parameters
    ----------
    folder
        For everything; made anew. Its path should be short: there are sockets in it.
    certificate
        Certificate and key in one file: the S3 service speaks TLS.

    Raises
    ------
    RuntimeError
        A program is missing, or does not start; with its words.
    """

    def __init__(self, folder: Path, *, certificate: Path | None = None) -> None:
        if absent := missing():
            raise RuntimeError(f"{', '.join(absent)} of Ceph: not installed; make ceph installs them")
        folder.mkdir(parents=True)
        self.folder = folder
        self.certificate = certificate
        self.port = free_port()
        self._file = folder / "ceph.conf"
        self._fsid = str(uuid.uuid4())
        self._monitor_port = free_port()
        where = f"127.0.0.1:{self.port}"
        self._file.write_text(
            _CONFIGURATION.format(
                folder=folder,
                fsid=self._fsid,
                monitor=self._monitor_port,
                disk=_DISK_BYTES,
                frontend=f"beast endpoint={where}" if certificate is None else f"beast ssl_endpoint={where} ssl_certificate={certificate}",
                master_key=MASTER_KEY,
                secret=base64.b64encode(secrets.token_bytes(32)).decode(),
            )
        )
        given = ("-c", str(self._file), "--no-mon-config", "-f")
        self.monitor = Daemon(["ceph-mon", "-i", "a", *given], folder / "mon.words")
        self.osd = Daemon(["ceph-osd", "-i", "0", *given], folder / "osd.words")
        self.gateway = Daemon(["radosgw", "-n", "client.rgw", *given], folder / "rgw.words")

    # --- its life ----------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the cluster, start it, make the user."""
        where = f"[v2:127.0.0.1:{self._monitor_port}]"
        monmap = str(self.folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", where, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self.monitor.start()
        self._await(self.monitor, lambda: self.ask("mon", "stat"))
        (self.folder / "osd.0").mkdir()
        osd_id = str(uuid.uuid4())
        self.ask("osd", "new", osd_id)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self.start_osd()
        self._run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", "--access-key", KEY, "--secret-key", SECRET)
        for name in _CLASSES:
            for scope in ("zonegroup", "zone"):
                more = ("--data-pool", "default.rgw.buckets.data") if scope == "zone" else ()
                self._run("radosgw-admin", scope, "placement", "add", f"--rgw-{scope}", "default",
                          "--placement-id", "default-placement", "--storage-class", name, *more)  # fmt: skip
        self.start_gateway()

    def start_osd(self) -> None:
        """Start the OSD, and wait until it is up."""
        self.osd.start()

        def up() -> None:
            if json.loads(self.ask("osd", "stat", "-f", "json"))["num_up_osds"] != 1:
                raise RuntimeError("the OSD is not up")

        self._await(self.osd, up)

    def start_gateway(self) -> None:
        """Start radosgw, and wait until it takes connections."""
        self.gateway.start()
        self._await(self.gateway, lambda: socket.create_connection(("127.0.0.1", self.port), timeout=1).close())

    def kill_gateway(self) -> None:
        """SIGKILL to radosgw."""
        self.gateway.end(signal.SIGKILL)

    def kill_osd(self) -> None:
        """SIGKILL to the OSD; what it took is on its disk."""
        self.osd.end(signal.SIGKILL)
        self.ask("osd", "down", "0")  # nobody else is there to notice

    def freeze_osd(self) -> None:
        """SIGSTOP to the OSD: radosgw takes requests and does not answer."""
        os.kill(self.osd.pid, signal.SIGSTOP)

    def thaw_osd(self) -> None:
        """SIGCONT to the OSD."""
        os.kill(self.osd.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End everything; nothing is kept."""
        for daemon in (self.gateway, self.osd, self.monitor):
            daemon.end(signal.SIGKILL)

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(self, *words: str) -> str:
        """Run a command of ``ceph``; return what it says."""
        return self._run("ceph", "--connect-timeout", "10", *words)

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self._file), *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_START_S)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")
        return done.stdout

    def _await(self, daemon: Daemon, works: Any) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                works()
            except (OSError, RuntimeError) as error:
                if daemon.ended or time.monotonic() > deadline:
                    raise RuntimeError(f"Ceph does not start: {error}; {daemon.words()}") from error
                time.sleep(0.1)
            else:
                return

    # --- S3 ----------------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """URL of the S3 service."""
        return f"{'http' if self.certificate is None else 'https'}://127.0.0.1:{self.port}"

    @property
    def version(self) -> str:
        """What Ceph calls itself, for one ``16.2.15``."""
        return self._run("radosgw", "--version").split()[2]

    def client(self) -> Any:
        """Return boto3's own client, with the user's key."""
        return boto3.session.Session(aws_access_key_id=KEY, aws_secret_access_key=SECRET).client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            verify=None if self.certificate is None else str(self.certificate),
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )

    def new_bucket(self, *, versioned: bool = False, locked: bool = False) -> str:
        """Make a bucket; return its name."""
        bucket = f"bucket-{secrets.token_hex(6)}"
        client = self.client()
        client.create_bucket(Bucket=bucket, **({"ObjectLockEnabledForBucket": True} if locked else {}))
        if versioned:
            client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        client.close()
        return bucket

    def make_bucket(self, bucket: str) -> None:
        """Make a bucket, unless it is there."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        client.close()

    def names(self, bucket: str) -> dict[str, int]:
        """Return name -> bytes of what a bucket holds."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        found = {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}
        client.close()
        return found

    def remove_bucket(self, bucket: str) -> None:
        """Remove a bucket without versions, with all that it holds."""
        client = self.client()
        for name in self.names(bucket):
            client.delete_object(Bucket=bucket, Key=name)
        client.delete_bucket(Bucket=bucket)
        client.close()


@contextmanager
def started(*, certificate: Path | None = None) -> Iterator[Ceph]:
    """Run a cluster in a folder of its own, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="ceph-", dir="/tmp", ignore_cleanup_errors=True) as name:
        ceph = Ceph(Path(name) / "c", certificate=certificate)
        try:
            ceph.make()
            yield ceph
        finally:
            ceph.stop()


def main() -> int:
    """Run one until Ctrl-C, or tell whether that can be."""
    parser = argparse.ArgumentParser(prog="python -m tests.ceph", description="Ceph, with S3, on this machine.")
    parser.add_argument("--installed", action="store_true", help="only say what is missing; the exit status is 0 when nothing is")
    if parser.parse_args().installed:
        absent = missing()
        if absent:
            sys.stdout.write(f"nothing was tried with Ceph: {', '.join(absent)} not installed; make ceph installs them\n")
        return 1 if absent else 0
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with started() as ceph, suppress(KeyboardInterrupt):
        words = (
            f"Ceph {ceph.version} after {time.monotonic() - began:.1f} s: {ceph.endpoint} bucket {ceph.new_bucket()} "
            f"AWS_ACCESS_KEY_ID={KEY} AWS_SECRET_ACCESS_KEY={SECRET} in {ceph.folder}\n"
        )
        sys.stdout.write(words)
        sys.stdout.flush()
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
