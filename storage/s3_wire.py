"""The two requests that every instance costs, an object put and read back, without what makes them dear.

botocore builds a request of any of its services from a description of that service, by rules and hooks that cost a multiple of the sending
(about a millisecond of processor each way). Here the request is put together directly; signing, credentials, connections, time-outs and
TLS are botocore's own, the same objects that its client uses. Whatever is unusual is left to that client: `Wire.of` gives nothing for it,
and `Wire.send` returns None.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError
from botocore.response import StreamingBody

_PLAIN_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PROBE: Final = "probe"
_EMPTY: Final = hashlib.sha256().hexdigest()
_HEADERS: Final[Mapping[str, str]] = {
    "ContentLength": "Content-Length",
    "ContentMD5": "Content-MD5",
    "ChecksumAlgorithm": "x-amz-sdk-checksum-algorithm",
    "ChecksumSHA256": "x-amz-checksum-sha256",
    "IfNoneMatch": "If-None-Match",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "StorageClass": "x-amz-storage-class",
    "Tagging": "x-amz-tagging",
    "Range": "Range",
}
_METHODS: Final[Mapping[str, str]] = {"put_object": "PUT", "get_object": "GET"}
_CODE: Final = re.compile(rb"<Code>\s*([\w.]{1,100})\s*</Code>")
_ERROR_BYTES: Final = 1 << 16


class _Signer(S3SigV4Auth):
    """Signs a body whose SHA-256 is known already."""

    def payload(self, request: Any) -> str:
        return str(request.context["payload"])


class Wire:
    """Sends plain puts and gets to one bucket; made by `of`."""

    def __init__(self, client: Any, base: str, region: str) -> None:
        self._session = client._endpoint.http_session  # noqa: SLF001 - its connections and TLS settings: `of` looks whether it is there
        self._credentials = client._request_signer._credentials  # noqa: SLF001 - those that renew themselves
        self._user_agent = client.meta.config.user_agent
        self._base = base
        self._region = region

    @classmethod
    def of(cls, client: Any, bucket: str) -> Wire | None:
        """Return the wire of a boto3 client for a bucket; None when it is an unusual one (an access point, a directory bucket)."""
        if not _PLAIN_BUCKET.fullmatch(bucket) or bucket.endswith("--x-s3"):
            return None
        try:
            url: str = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": _PROBE})
            base, mark, _ = url.partition(f"/{_PROBE}?")
            region = str(client.meta.region_name or "us-east-1")
            return cls(client, base, "us-east-1" if region == "aws-global" else region) if mark else None
        except (BotoCoreError, AttributeError):
            return None  # no credentials yet, or another botocore: its client says what is wrong, or works

    def send(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """Send a request, and return what botocore's client would of it; None when that client has to do it.

        Raises
        ------
        botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError
            As the client.
        """
        method = _METHODS.get(operation)
        body = arguments.get("Body", b"")
        named = {name: value for name, value in arguments.items() if name not in ("Key", "Body")}
        if method is None or not isinstance(body, bytes) or not named.keys() <= _HEADERS.keys() or (body and "ChecksumSHA256" not in named):
            return None
        headers = {_HEADERS[name]: str(value) for name, value in named.items()}
        headers["User-Agent"] = self._user_agent
        digest = base64.b64decode(named["ChecksumSHA256"]).hex() if body else _EMPTY
        request = AWSRequest(
            method=method,
            url=f"{self._base}/{quote(arguments['Key'], safe='/-._~')}",
            headers=headers,
            data=body,
            stream_output=method == "GET",
        )
        request.context["payload"] = digest
        _Signer(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
        response = self._session.send(request.prepare())
        status = int(response.status_code)
        if status in (301, 302, 307, 308):
            response.raw.close()
            return None  # another region: the client follows
        if status >= 300:
            raise _error(operation, status, response)
        answer: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": response.headers}}
        if method == "GET":
            length = int(response.headers["content-length"])
            answer |= {"ContentLength": length, "Body": StreamingBody(response.raw, length)}
            if "content-range" in response.headers:
                answer["ContentRange"] = response.headers["content-range"]
        return answer


def _error(operation: str, status: int, response: Any) -> ClientError:
    content: bytes = response.content if len(response.headers.get("content-length", "")) < 6 else response.raw.read(_ERROR_BYTES)
    found = _CODE.search(content[:_ERROR_BYTES])
    code = found[1].decode("ascii") if found else str(status)
    headers = {name.lower(): value for name, value in response.headers.items()}
    described: Any = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}
    return ClientError(described, operation)
