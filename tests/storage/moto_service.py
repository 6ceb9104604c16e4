"""moto's S3 server, for what rclone does not know: versions, tags, encryption, storage classes and restores."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import ThreadedMotoServer


class MotoService:
    """The server as tests see it that would take radosgw as well (`tests.ceph.Ceph`).

    Parameters
    ----------
    endpoint
        Its URL.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def client(self) -> Any:
        """Return boto3's own client, to look behind the store's back."""
        return client_of(self.endpoint)

    def new_bucket(self, *, versioned: bool = False) -> str:
        """Make a bucket; return its name."""
        return new_bucket(self.endpoint, versioned=versioned)


@contextmanager
def moto_server() -> Iterator[str]:
    """Run the server in a thread; yield its URL. Any credentials do."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def client_of(endpoint: str) -> Any:
    """Return boto3's own client, to look behind the store's back."""
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")


def new_bucket(endpoint: str, *, versioned: bool = False) -> str:
    """Make a bucket; return its name."""
    bucket = f"bucket-{secrets.token_hex(6)}"
    client = client_of(endpoint)
    client.create_bucket(Bucket=bucket)
    if versioned:
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    return bucket
