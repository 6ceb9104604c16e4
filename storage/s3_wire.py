"""The two requests that every instance costs, an object put and read back, without what makes them dear.

botocore builds a request of any of its services from a description of that service, by rules and hooks that cost a multiple of the sending
(about a millisecond of processor each way). Here the request is put together directly; where it goes, how it is signed, how patient to be
and whom to trust was asked of botocore's client once, and the credentials are its own. Whatever is unusual, proxies and certificates of the
node among it, is left to that client: `Wire.of` gives nothing for it, and `Wire.send` returns None.
"""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote, urlsplit

from botocore.exceptions import BotoCoreError, ClientError, ResponseStreamingError
from botocore.httpsession import create_urllib3_context, get_cert_path

from storage.s3_connection import Answer, Connections
from storage.s3_signature import Signer

_PROBE: Final = "probe"
_PLAIN: Final = frozenset({"user-agent"})
"""Headers of a plain request before it is signed; a client that sends more has a setting that is unknown here."""
_EMPTY: Final = hashlib.sha256().hexdigest()
_HEADERS: Final[Mapping[str, str]] = {
    "ContentLength": "content-length",
    "ContentMD5": "content-md5",
    "ChecksumAlgorithm": "x-amz-sdk-checksum-algorithm",
    "ChecksumSHA256": "x-amz-checksum-sha256",
    "IfNoneMatch": "if-none-match",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "StorageClass": "x-amz-storage-class",
    "Tagging": "x-amz-tagging",
    "Range": "range",
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


@dataclass(frozen=True)
class Wire:
    """Sends plain puts and gets to one bucket, for any number of threads; made by `of`.

    Parameters
    ----------
    connections
        To the service.
    credentials
        botocore's, which renew themselves.
    base
        URL of the bucket, without a slash at its end.
    signer
        For the bucket's region.
    always
        Headers of every request.
    """

    connections: Connections
    credentials: Any
    base: str
    signer: Signer
    always: Mapping[str, str]

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
        if not seen or credentials is None:
            return None
        base, mark, rest = seen["url"].rpartition(f"/{_PROBE}")
        if not mark or rest or seen["way"] != ("s3", "s3v4", False) or not seen["headers"].keys() <= _PLAIN:
            return None
        connections = _connections(client, base)
        if connections is None:
            return None
        always = {"host": _host(base), "accept-encoding": "identity", "user-agent": str(seen["headers"].get("user-agent", ""))}
        return cls(connections, credentials, base, Signer(str(seen["region"])), always)

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
        if not all(value.isascii() and value.isprintable() for value in headers.values()):
            return None
        payload = _EMPTY
        if method == "PUT":
            headers["content-length"] = str(len(body))
            payload = base64.b64decode(named["ChecksumSHA256"]).hex()
        target = f"{urlsplit(self.base).path}/{quote(arguments['Key'], safe='/-._~')}"
        credentials = self.credentials.get_frozen_credentials()
        headers = self.signer.headers(method, target, {**self.always, **headers}, payload, credentials, datetime.now(UTC))
        response = self.connections.ask(method, target, headers, body)
        if response.status >= 300:
            raise _refusal(operation, response)
        answer: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": response.status}}
        if method == "PUT":
            _drained(response)
            if encryption := response.headers.get("x-amz-server-side-encryption"):
                answer["ServerSideEncryption"] = encryption
            return answer
        length = response.headers.get("content-length", "")
        if not length.isdecimal():
            response.body.close()
            raise ResponseStreamingError(error="the answer has no Content-Length")
        answer |= {"ContentLength": int(length), "Body": response.body}
        if "content-range" in response.headers:
            answer["ContentRange"] = response.headers["content-range"]
        return answer


def _connections(client: Any, base: str) -> Connections | None:
    """Return connections like those of the client, to where `base` is; None when there is a proxy on the way, or anything else unusual."""
    session = getattr(getattr(client, "_endpoint", None), "http_session", None)
    if session is None or session._proxy_config.proxy_url_for(base) or session._cert_file:  # noqa: SLF001 - held by a test
        return None
    where, timeout = urlsplit(base), session._timeout  # noqa: SLF001
    if where.scheme not in ("http", "https") or where.hostname is None:
        return None
    tls = None
    if where.scheme == "https":
        authorities = get_cert_path(session._verify)  # noqa: SLF001
        if not authorities:
            return None
        try:
            tls = create_urllib3_context()
            tls.load_verify_locations(cafile=authorities)
        except OSError:
            return None  # the client says at its first request what is wrong with the file
        tls.verify_mode, tls.check_hostname = ssl.CERT_REQUIRED, True
    return Connections(
        endpoint_url=base,
        host=where.hostname,
        port=where.port or (443 if tls else 80),
        tls=tls,
        connect_timeout_s=float(timeout.connect_timeout),
        read_timeout_s=float(timeout.read_timeout),
    )


def _host(base: str) -> str:
    where = urlsplit(base)
    host = f"[{where.hostname}]" if where.hostname and ":" in where.hostname else str(where.hostname)
    usual = {"http": 80, "https": 443}[where.scheme]
    return host if where.port in (None, usual) else f"{host}:{where.port}"


def _drained(response: Answer) -> bytes:
    """Read a short answer to its end, so that the connection is used again; one that does not end is cut off, with its connection."""
    try:
        return response.body.read(_ANSWER_BYTES)
    finally:
        response.body.close()


def _refusal(operation: str, response: Answer) -> Exception:
    status = response.status
    found = _CODE.search(_drained(response))
    code = found[1].decode("ascii") if found else str(status)
    if status in _ELSEWHERE or code in _ELSEWHERE:
        return Elsewhere(code)
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": dict(response.headers)}
    described: Any = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": metadata}
    return ClientError(described, operation)
