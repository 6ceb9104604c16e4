"""The two requests that every instance costs, an object put and read back, without what makes them dear.

botocore builds a request of any of its services from a description of that service, by rules and hooks that cost a multiple of the sending
(about a millisecond of processor each way). Here the request is put together directly; where it goes and how it is signed was asked of
botocore's client once, and signer, credentials, connections, time-outs, proxies and TLS are botocore's own, the same objects that its
client uses. Whatever is unusual is left to that client: `Wire.of` gives nothing for it, and `Wire.send` returns None.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.exceptions import BotoCoreError, ClientError, ResponseStreamingError
from botocore.response import StreamingBody

_PROBE: Final = "probe"
_PLAIN: Final = frozenset({"user-agent"})
"""Headers of a plain request before it is signed; a client that sends more has a setting that is unknown here."""
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
_ELSEWHERE: Final[frozenset[str | int]] = frozenset(
    {301, 302, 307, 308, "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
_ANSWER_BYTES: Final = 1 << 16
"""Most that is read of an error, or of the answer to a put."""


class Elsewhere(Exception):
    """The bucket is to be asked at another place, or as one of another region: botocore's client knows how."""


class _Looked(Exception):
    """Ends the request before it is signed."""


class _Signer(S3SigV4Auth):
    """Signs a body whose SHA-256 is known already: it is among the signed headers, and the service compares."""

    def payload(self, request: Any) -> str:
        return str(request.context["payload"])


@dataclass(frozen=True)
class Wire:
    """Sends plain puts and gets to one bucket, for any number of threads; made by `of`.

    Parameters
    ----------
    session
        botocore's connections, with their time-outs, proxies and TLS.
    credentials
        botocore's, which renew themselves.
    base
        URL of the bucket, without a slash at its end.
    region
        For which a request is signed.
    user_agent
        Who asks.
    """

    session: Any
    credentials: Any
    base: str
    region: str
    user_agent: str

    @classmethod
    def of(cls, client: Any, credentials: Any, bucket: str) -> Wire | None:
        """Return the wire of a boto3 client for a bucket; None when there are no credentials, or the client would do anything unusual.

        Nothing is sent: a request of the client is looked at before it is signed, as its rules, hooks and settings made it.

        Parameters
        ----------
        client
            Of boto3, for S3.
        credentials
            Those of the client's session; None: none were found.
        bucket
            Its name.
        """
        seen: dict[str, Any] = {}

        def look(*, request: Any, region_name: str, signing_name: str, signature_version: Any, **_: Any) -> None:
            signing = request.context.get("signing", {})
            seen.update(
                url=str(request.url),
                region=signing.get("region") or region_name,
                way=(signing.get("signing_name") or signing_name, signature_version, "request_credentials" in signing),
                headers={name.lower(): value for name, value in request.headers.items()},
            )
            raise _Looked

        event = "before-sign.s3.GetObject"
        client.meta.events.register_last(event, look)
        try:
            client.get_object(Bucket=bucket, Key=_PROBE)
        except (_Looked, BotoCoreError, ClientError):
            pass  # if it was not seen, the client says at the first request what is wrong
        finally:
            client.meta.events.unregister(event, look)
        session = getattr(getattr(client, "_endpoint", None), "http_session", None)
        if not seen or credentials is None or session is None:
            return None
        base, mark, rest = seen["url"].rpartition(f"/{_PROBE}")
        if not mark or rest or seen["way"] != ("s3", "s3v4", False) or not seen["headers"].keys() <= _PLAIN:
            return None
        return cls(session, credentials, base, str(seen["region"]), str(seen["headers"].get("user-agent", "")))

    def send(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """Send a request, and return what botocore's client would of it; None, and nothing was sent, when that client has to do it.

        Raises
        ------
        Elsewhere
            The client has to do it, here and from now on. Nothing was carried out.
        botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError
            As the client.
        """
        method = _METHODS.get(operation)
        body = arguments.get("Body", b"")
        named = {name: value for name, value in arguments.items() if name not in ("Key", "Body")}
        if method is None or not isinstance(body, bytes) or not named.keys() <= _HEADERS.keys():
            return None
        if method == "PUT" and ("ChecksumSHA256" not in named or named.get("ContentLength", len(body)) != len(body)):
            return None
        headers = {_HEADERS[name]: str(value) for name, value in named.items()}
        if not all(value.isascii() for value in headers.values()):
            return None
        headers["User-Agent"] = self.user_agent
        if method == "PUT":
            headers["Content-Length"] = str(len(body))
        url = f"{self.base}/{quote(arguments['Key'], safe='/-._~')}"
        request = AWSRequest(method=method, url=url, headers=headers)
        request.context["payload"] = base64.b64decode(named["ChecksumSHA256"]).hex() if method == "PUT" else _EMPTY
        _Signer(self.credentials.get_frozen_credentials(), "s3", self.region).add_auth(request)
        told: Any = dict(request.headers.items())  # as urllib3 takes them
        prepared = AWSPreparedRequest(method, url, told, body or None, stream_output=True)
        response = self.session.send(prepared)
        status = int(response.status_code)
        if status >= 300:
            raise _refusal(operation, status, response)
        answer: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": status}}
        if method == "PUT":
            _drained(response)
            if encryption := response.headers.get("x-amz-server-side-encryption"):
                answer["ServerSideEncryption"] = str(encryption)
            return answer
        length = str(response.headers.get("content-length", ""))
        if not length.isdecimal():
            response.raw.close()
            raise ResponseStreamingError(error="the answer has no Content-Length")
        answer |= {"ContentLength": int(length), "Body": StreamingBody(response.raw, int(length))}
        if "content-range" in response.headers:
            answer["ContentRange"] = response.headers["content-range"]
        return answer


def _drained(response: Any) -> bytes:
    """Read a short answer to its end, so that the connection is used again; one that does not end is cut off, with its connection."""
    try:
        content: bytes = response.raw.read(_ANSWER_BYTES)
        return content
    finally:
        response.raw.close()


def _refusal(operation: str, status: int, response: Any) -> Exception:
    found = _CODE.search(_drained(response))
    code = found[1].decode("ascii") if found else str(status)
    if status in _ELSEWHERE or code in _ELSEWHERE:
        return Elsewhere(code)
    told = {name.lower(): value for name, value in response.headers.items()}
    described: Any = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": told}}
    return ClientError(described, operation)
