"""The short way of the two common requests does what botocore's client does, and leaves it whatever is unusual."""

from __future__ import annotations

import base64
import hashlib
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import ClientError

from storage.errors import Unavailable
from storage.s3_client import Deadline, S3Client
from storage.s3_wire import Wire
from tests.faults.lying_s3 import LyingS3, error

Buckets = Callable[[], tuple[str, str, Path]]
DUAL = {"use_dualstack_endpoint": True}
CREDENTIALS = Credentials("test-access-key", "test-secret-key-of-length")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any credentials, and no settings of whoever runs this."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-1")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


def client_of(endpoint: str | None, **settings: Any) -> Any:
    """Return boto3's client."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.pop("region", "us-east-1"),
        config=Config(
            user_agent="test",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            parameter_validation=False,
            **settings,
        ),
    )


def store_of(s3: LyingS3) -> S3Client:
    """Return a client of ours."""
    return S3Client(bucket=s3.bucket, endpoint_url=s3.endpoint, region="us-east-1", attempts=3, sleep=lambda _: None)


def put_of(name: str, content: bytes, **more: Any) -> dict[str, Any]:
    """Return the arguments of a put."""
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return {"Key": name, "Body": content, "ContentLength": len(content), "ChecksumSHA256": digest, **more}


def wire_of(client: Any, bucket: str) -> Wire:
    """Return the wire, which there must be."""
    wire = Wire.of(client, CREDENTIALS, bucket)
    assert wire is not None
    return wire


class Turning:
    """Credentials that are others at each request, as those of a role after some time."""

    def __init__(self) -> None:
        self.asked = 0

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return the next ones."""
        self.asked += 1
        return ReadOnlyCredentials(f"key{self.asked}", "secret", f"token{self.asked}")


ENDLESS = 64 << 20


@contextmanager
def answering(answer: bytes, taken: list[int] | None = None) -> Iterator[str]:
    """Serve HTTP that answers anything with these bytes and, after an x, with more of them for as long as somebody reads, 64 MiB at most.

    `taken` gets the number of bytes that were written of those.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            written = 0
            with suppress(OSError):
                self.wfile.write(answer)
                while answer.endswith(b"x") and written < ENDLESS:
                    self.wfile.write(b"x" * 65536)
                    written += 65536
            if taken is not None:
                taken.append(written)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


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


def test_the_same_headers_as_the_client(s3_bucket: Buckets) -> None:
    """Encryption, key, class, tags, condition, checksum and range go along exactly as the client sends them, and are signed."""
    content = b"content"
    more = {
        "ChecksumAlgorithm": "SHA256",
        "IfNoneMatch": "*",
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "arn:aws:kms:us-east-1:123456789012:key/12345678-1234-1234-1234-123456789012",
        "StorageClass": "INTELLIGENT_TIERING",
        "Tagging": "role=source&a+b=c%2Fd",
    }
    changing = {"authorization", "x-amz-date", "amz-sdk-invocation-id", "amz-sdk-request"}
    changing.add("expect")  # a small body goes with the headers at once
    with LyingS3() as s3:
        client = client_of(s3.endpoint)
        wire = wire_of(client, s3.bucket)
        client.put_object(Bucket=s3.bucket, **put_of("ab/client", content, **more))
        wire.send("put_object", put_of("ab/wire", content, **more))
        client.get_object(Bucket=s3.bucket, Key="ab/wire", Range="bytes=0-3")["Body"].read()
        wire.send("get_object", {"Key": "ab/wire", "Range": "bytes=0-3"})
        by_client, by_wire, ranged, ranged_by_wire = (
            {name: value for name, value in heads.items() if name not in changing} for heads in s3.heads
        )
        assert by_wire == by_client
        assert ranged_by_wire == ranged
        by_them, signed = (heads["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";") for heads in s3.heads[:2])
        # what is on the way may change the others: the client signs none of them
        assert set(signed) <= set(by_them)
        assert {"x-amz-checksum-sha256", "x-amz-content-sha256", "if-none-match", "x-amz-server-side-encryption"} <= set(signed)


def test_credentials_are_asked_for_each_time(s3_bucket: Buckets) -> None:
    """Those of a role renew themselves: each request is signed by what they are then, and carries their token."""
    with LyingS3() as s3:
        wire = Wire.of(client_of(s3.endpoint), Turning(), s3.bucket)
        assert wire is not None
        wire.send("put_object", put_of("ab/cd", b"x"))
        wire.send("get_object", {"Key": "ab/cd"})
        assert [heads["x-amz-security-token"] for heads in s3.heads] == ["token1", "token2"]
        assert ["key1/" in s3.heads[0]["authorization"], "key2/" in s3.heads[1]["authorization"]] == [True, True]


def test_one_connection_for_all(s3_bucket: Buckets) -> None:
    """Puts, refusals, bodies read and bodies closed unread but short: the next request goes the same connection."""
    with LyingS3() as s3:
        client = client_of(s3.endpoint)
        wire = wire_of(client, s3.bucket)
        for number in range(5):
            wire.send("put_object", put_of(f"ab/{number}", b"content"))
            with pytest.raises(ClientError):
                wire.send("get_object", {"Key": "ab/none"})
            answer = wire.send("get_object", {"Key": f"ab/{number}"})
            assert answer is not None
            assert answer["Body"].read(7) == b"content"
            answer["Body"].close()
        assert wire.connections.at_rest == 1


def test_an_answer_that_does_not_end(s3_bucket: Buckets) -> None:
    """A refusal of endless length is cut off, and so is its connection: nothing grows, nothing waits."""
    taken: list[int] = []
    with answering(b"HTTP/1.1 500 Oh\r\nContent-Length: 99999999999\r\n\r\n<Error><Code>InternalError</Code>x", taken) as endpoint:
        with pytest.raises(ClientError) as refused:
            wire_of(client_of(endpoint), "bucket").send("get_object", {"Key": "ab/cd"})
        assert refused.value.response["Error"]["Code"] == "InternalError"
        with pytest.raises(ClientError):
            wire_of(client_of(endpoint), "bucket").send("put_object", put_of("ab/cd", b"x"))
    assert len(taken) == 2
    assert max(taken) < ENDLESS // 2  # what the two ends of the connection hold, and no more


@pytest.mark.parametrize("broken", ["<Size>abc</Size>", "<LastModified>yesterday</LastModified>"])
def test_an_answer_that_cannot_be_read(s3_bucket: Buckets, broken: str) -> None:
    """What botocore cannot make a number or a time of is Unavailable, like every broken answer, and no other kind of error."""
    page = f"<ListBucketResult><Contents>{broken}</Contents></ListBucketResult>".encode()
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page)) as endpoint:
        client = S3Client(bucket="bucket", endpoint_url=endpoint, region="us-east-1", attempts=1)
        with pytest.raises(Unavailable, match="ResponseParserError; check the endpoint"):
            client.call("list_objects_v2", Deadline(10), "list")


def test_an_answer_without_a_length(s3_bucket: Buckets) -> None:
    """What cannot be told whole from half is a broken answer, and the node says Unavailable."""
    with answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ncontent") as endpoint:
        client = S3Client(bucket="bucket", endpoint_url=endpoint, region="us-east-1", attempts=2, sleep=lambda _: None)
        with pytest.raises(Unavailable, match="ResponseStreamingError"):
            client.call("get_object", Deadline(10), "read", Key="ab/cd")


@pytest.mark.parametrize(
    "fault", [error(301, "PermanentRedirect"), error(307, "TemporaryRedirect"), error(400, "AuthorizationHeaderMalformed")]
)
def test_a_bucket_that_is_elsewhere(s3_bucket: Buckets, fault: Any) -> None:
    """A redirection is the client's to follow, and all that comes after: it remembers where the bucket is. Nothing is lost on the way."""
    with LyingS3() as s3:
        client = store_of(s3)
        assert client._wire is not None
        s3.fail(fault, times=1)
        content = put_of("ab/cd", b"content")
        del content["Body"]
        client.call("put_object", Deadline(10), "write", Body=b"content", **content)
        assert client._wire is None
        assert s3.objects() == {"ab/cd": b"content"}
        assert client.call("get_object", Deadline(10), "read", Key="ab/cd")["Body"].read() == b"content"


def test_renewed_credentials_renew_the_wire(s3_bucket: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that expired is looked up again, and the short way signs by the new one."""
    with LyingS3() as s3:
        client = store_of(s3)
        before = client._wire
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-key-2")
        s3.fail(error(400, "ExpiredToken"), times=1)
        content = put_of("ab/cd", b"content")
        client.call("put_object", Deadline(10), "write", **content)
        assert client._wire is not before
        assert "access-key-2/" in s3.heads[-1]["authorization"]


def test_the_same_credentials_are_not_renewed(
    s3_bucket: Buckets, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused, and found again as they were: the error is told at once and nothing is said to be renewed; with others, it is."""
    with LyingS3() as s3:
        client = store_of(s3)
        s3.fail(error(403, "InvalidAccessKeyId"), operation="put")
        with pytest.raises(Unavailable, match="renew them"):
            client.call("put_object", Deadline(10), "write", **put_of("ab/cd", b"content"))
        assert s3.count("put") == 1
        assert "store.credentials.renewed" not in caplog.messages
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key-2")
        client._renewed_at = float("-inf")
        with pytest.raises(Unavailable, match="renew them"):
            client.call("put_object", Deadline(10), "write", **put_of("ab/cd", b"content"))
        assert s3.count("put") == 3
        assert caplog.messages.count("store.credentials.renewed") == 1


@pytest.mark.parametrize(
    ("endpoint", "settings", "base", "region"),
    [
        (None, {"region": "eu-central-1"}, "https://bucket.s3.eu-central-1.amazonaws.com", "eu-central-1"),
        (None, {"region": None}, "https://bucket.s3.amazonaws.com", "us-east-1"),
        (None, {"region": "eu-west-1", "s3": DUAL}, "https://bucket.s3.dualstack.eu-west-1.amazonaws.com", "eu-west-1"),
        ("http://127.0.0.1:9/", {"region": "r1"}, "http://127.0.0.1:9/bucket", "r1"),
        ("https://s3.example/below", {}, "https://s3.example/below/bucket", "us-east-1"),
        ("https://s3.example", {"s3": {"addressing_style": "virtual"}}, "https://bucket.s3.example", "us-east-1"),
    ],
)  # fmt: skip
def test_where_the_bucket_is(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, settings: dict[str, Any], base: str, region: str
) -> None:
    """The rules are botocore's: regions, dual stack, endpoints with a path, bucket in the path or in the host's name."""
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    wire = wire_of(client_of(endpoint, **settings), "bucket")
    assert (wire.base, wire.signer.region) == (base, region)


def test_a_file_that_holds_no_certificate(tmp_path: Path) -> None:
    """It is no traceback at the start, but a sentence that names the setting."""
    wrong = tmp_path / "ca.pem"
    wrong.write_text("no certificate")
    with pytest.raises(Unavailable, match=r"correct \[archive\] ca_file"):
        S3Client(bucket="bucket", endpoint_url="https://127.0.0.1:9", region="us-east-1", ca_file=wrong)


def test_a_bundle_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that the environment names is botocore's to complain of, at the first request."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert Wire.of(client_of("https://127.0.0.1:9"), CREDENTIALS, "bucket") is None


def test_the_unusual_is_left_to_the_client(s3_bucket: Buckets) -> None:
    """Directory buckets, other signatures, more headers, other operations, streamed bodies, unknown arguments, no credentials."""
    endpoint, bucket, _ = s3_bucket()
    client = client_of(endpoint)
    assert Wire.of(client_of(None, region="us-west-2"), CREDENTIALS, "one--usw2-az1--x-s3") is None
    assert Wire.of(client_of(endpoint, signature_version="s3"), CREDENTIALS, bucket) is None
    assert Wire.of(client_of(endpoint, signature_version=UNSIGNED), CREDENTIALS, bucket) is None
    assert Wire.of(client, CREDENTIALS, "no bucket") is None
    assert Wire.of(client, None, bucket) is None
    more = client_of(endpoint)
    more.meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: params["headers"].update({"x-amz-request-payer": "requester"})
    )
    assert Wire.of(more, CREDENTIALS, bucket) is None
    wire = wire_of(client, bucket)
    assert wire.send("head_object", {"Key": "ab/cd"}) is None
    assert wire.send("put_object", {"Key": "ab/cd", "Body": object()}) is None
    assert wire.send("put_object", {"Key": "ab/cd", "Body": b"no digest"}) is None
    assert wire.send("put_object", {**put_of("ab/cd", b"other length"), "ContentLength": 3}) is None
    assert wire.send("get_object", {"Key": "ab/cd", "VersionId": "1"}) is None
    client.put_object(Bucket=bucket, Key="ab/cd", Body=b"x")  # what was looked at left nothing behind
    assert client.get_object(Bucket=bucket, Key="ab/cd")["Body"].read() == b"x"
