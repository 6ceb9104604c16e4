"""The short way of the two common requests does what botocore's client does, and leaves it whatever is unusual."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from storage.s3_wire import Wire
from tests.faults.lying_s3 import LyingS3, error

Buckets = Callable[[], tuple[str, str, Path]]


def client_of(endpoint: str) -> Any:
    """Return boto3's client."""
    return boto3.session.Session().client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", config=Config(s3={"addressing_style": "path"}, user_agent="test")
    )


def put_of(name: str, content: bytes, **more: Any) -> dict[str, Any]:
    """Return the arguments of a put."""
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return {"Key": name, "Body": content, "ContentLength": len(content), "ChecksumSHA256": digest, **more}


def wire_of(client: Any, bucket: str) -> Wire:
    """Return the wire, which there must be."""
    wire = Wire.of(client, bucket)
    assert wire is not None
    return wire


@pytest.mark.parametrize("name", ["ab/cd", "with space/é+%~(1)", "a/b.c~d!"])
def test_put_and_get_as_the_client_does(s3_bucket: Buckets, name: str) -> None:
    """What the wire puts the client reads, and the other way round, whatever the name."""
    endpoint, bucket, _ = s3_bucket()
    client = client_of(endpoint)
    wire = wire_of(client, bucket)
    assert wire.send("put_object", put_of(name, b"by the wire")) is not None
    assert client.get_object(Bucket=bucket, Key=name)["Body"].read() == b"by the wire"
    client.put_object(Bucket=bucket, Key=name, Body=b"by the client")
    answer = wire.send("get_object", {"Key": name})
    assert answer is not None
    assert (answer["ContentLength"], answer["Body"].read()) == (13, b"by the client")
    part = wire.send("get_object", {"Key": name, "Range": "bytes=3-5"})
    assert part is not None
    assert (part["ContentRange"], part["Body"].read()) == ("bytes 3-5/13", b"the")


def test_a_signature_binds_the_body(s3_bucket: Buckets) -> None:
    """The digest is among the signed headers: a body that is another one is refused by a service that looks."""
    with LyingS3(seed=1) as s3:
        wire = wire_of(client_of(s3.endpoint), s3.bucket)
        with pytest.raises(ClientError, match="BadDigest"):
            wire.send("put_object", {**put_of("ab/cd", b"what was meant"), "Body": b"what was sent!"})
        assert s3.objects() == {}


@pytest.mark.parametrize(
    ("fault", "code", "status"), [(error(503, "SlowDown"), "SlowDown", 503), (error(403, "AccessDenied"), "AccessDenied", 403)]
)
def test_an_error_is_told_as_the_client_tells_it(s3_bucket: Buckets, fault: Any, code: str, status: int) -> None:
    """Code and status of a refusal, and of a missing object, are those that the client gives."""
    with LyingS3(seed=1) as s3:
        client = client_of(s3.endpoint)
        wire = wire_of(client, s3.bucket)
        with pytest.raises(ClientError) as missing:
            wire.send("get_object", {"Key": "ab/none"})
        with pytest.raises(ClientError) as expected:
            client.get_object(Bucket=s3.bucket, Key="ab/none")
        assert missing.value.response["Error"]["Code"] == expected.value.response["Error"]["Code"] == "NoSuchKey"
        s3.fail(fault, times=1)
        with pytest.raises(ClientError) as refused:
            wire.send("get_object", {"Key": "ab/none"})
        assert refused.value.response["Error"]["Code"] == code
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == status


def test_an_object_is_not_replaced(s3_bucket: Buckets) -> None:
    """The condition that nothing is there goes along: the second put is a 412."""
    with LyingS3(seed=1) as s3:
        wire = wire_of(client_of(s3.endpoint), s3.bucket)
        wire.send("put_object", put_of("ab/cd", b"first", IfNoneMatch="*"))
        with pytest.raises(ClientError) as refused:
            wire.send("put_object", put_of("ab/cd", b"other", IfNoneMatch="*"))
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
        assert s3.objects() == {"ab/cd": b"first"}


def test_the_unusual_is_left_to_the_client(s3_bucket: Buckets) -> None:
    """Access points, directory buckets, other operations, streamed bodies, arguments that are not known, and redirections."""
    endpoint, bucket, _ = s3_bucket()
    client = client_of(endpoint)
    assert Wire.of(client, "arn:aws:s3:us-east-1:123456789012:accesspoint/one") is None
    assert Wire.of(client, "one--usw2-az1--x-s3") is None
    wire = wire_of(client, bucket)
    assert wire.send("head_object", {"Key": "ab/cd"}) is None
    assert wire.send("put_object", {"Key": "ab/cd", "Body": object()}) is None
    assert wire.send("put_object", {"Key": "ab/cd", "Body": b"no digest"}) is None
    assert wire.send("get_object", {"Key": "ab/cd", "VersionId": "1"}) is None
    with LyingS3(seed=1) as s3:
        s3.fail(error(307, "TemporaryRedirect"), times=1)
        assert wire_of(client_of(s3.endpoint), s3.bucket).send("get_object", {"Key": "ab/cd"}) is None
