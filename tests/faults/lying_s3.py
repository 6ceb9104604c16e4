"""LyingS3: a small S3 service in memory that follows a script of faults. A real HTTP server on a port of its own.

Without a script it is honest: it compares Content-MD5 and ``x-amz-checksum-sha256``, keeps ``If-None-Match: *``, gives ranges, pages,
parts, tags, storage classes (a GLACIER object must be restored before it can be read), and 404 for what is not there. Signatures are
not compared. With a script it lies:

    with LyingS3(seed=7) as s3:
        store = S3Store(bucket=s3.bucket, endpoint_url=s3.endpoint, region="us-east-1")   # any credentials in the environment
        s3.fail(HALF, operation="put", times=1)            # one put is answered with 200 and keeps half the bytes
        s3.fail(SLOW_DOWN, probability=0.5)                # half of all requests
        s3.fail(cut_response(100), operation="get")        # every get ends after 100 bytes of its body
        s3.fail(HANG, operation="get", times=1)            # no byte comes, until `heal` or the end
        s3.heal()                                          # honest again
        s3.remove(name); s3.replace(name, b"…"); s3.roll_back(name)     # out of band
        s3.objects()                                       # name -> bytes: what it really keeps
        s3.requests                                        # [(operation, name), …] in order of arrival

Operations: ``put get head delete list check begin part complete abort uploads versions restore tag`` (a put is an object in one request;
``begin part complete abort uploads`` are of uploads in parts). A rule without an operation meets all of them. Of several rules the
first that fires is followed. The server may be shut (`stop`, as when the service is down) and started again on the same port with
its objects kept (`start`).
"""

from __future__ import annotations

import base64
import hashlib
import random
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

OPERATIONS = frozenset("put get head delete list check begin part complete abort uploads versions restore tag".split())  # noqa: SIM905
PAGE = 1000


# --- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to misbehave; see the constants and functions below."""

    name: str
    status: int = 0
    code: str = ""
    number: int = 0
    seconds: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()


NOTHING = Fault("nothing")
"""A put, a part or a completion is answered with 200, nothing is kept."""
HALF = Fault("half")
"""A put or a part is answered with 200, the first half of the bytes is kept."""
OTHER = Fault("other")
"""A put or a part is answered with 200, other bytes of the same length are kept. At a get: other bytes are given."""
HANG = Fault("hang")
"""No byte of an answer comes, until `LyingS3.heal`, `LyingS3.stop` or the end."""
LOST_ANSWER = Fault("lost answer")
"""The request is carried out, the connection closed without an answer."""
HALF_AND_LOST = Fault("half and lost")
"""A put keeps the first half of the bytes, the connection is closed without an answer."""
WRONG_ETAG = Fault("wrong etag")
"""The ETag is that of other bytes, as it is with SSE-KMS."""
RESET = Fault("reset")
"""The connection is reset before an answer."""


def error(status: int, code: str, **headers: str) -> Fault:
    """Answer with an error; nothing is carried out. ``retry_after="1"`` and the like become headers."""
    return Fault("error", status, code, headers=tuple((name.replace("_", "-"), value) for name, value in headers.items()))


def done_but(status: int, code: str) -> Fault:
    """Carry the request out, yet answer with an error."""
    return Fault("done but", status, code)


def cut_request(at_byte: int) -> Fault:
    """Close the connection when so many bytes of the request's body were read; nothing is carried out."""
    return Fault("cut request", number=at_byte)


def cut_response(at_byte: int) -> Fault:
    """Send the headers and so many bytes of the body, then close the connection. A request is carried out before."""
    return Fault("cut response", number=at_byte)


def late(reads: int) -> Fault:
    """Keep what is put, but answer the first `reads` gets and heads of it with 404 (eventual consistency)."""
    return Fault("late", number=reads)


def slow(seconds: float) -> Fault:
    """Wait before the answer."""
    return Fault("slow", seconds=seconds)


TAGS_DROPPED = Fault("tags dropped")
"""Upload in parts as to radosgw: it forgets the tags, and says so where it is asked for a head."""
INTERNAL_ERROR = error(500, "InternalError")
BAD_GATEWAY = error(502, "BadGateway")
SLOW_DOWN = error(503, "SlowDown")
TOO_MANY_REQUESTS = error(429, "TooManyRequestsException")
BAD_DIGEST = error(400, "BadDigest")
REQUEST_TIMEOUT = error(400, "RequestTimeout")
DENIED = error(403, "AccessDenied")
EXPIRED_TOKEN = error(400, "ExpiredToken")
NO_BUCKET = error(404, "NoSuchBucket")


@dataclass(slots=True)
class _Rule:
    fault: Fault
    operation: str
    times: int | None
    probability: float


@dataclass(slots=True)
class _Object:
    content: bytes
    headers: dict[str, str]
    modified_at: datetime
    hidden: int = 0
    restored: bool = False
    restoring: bool = False

    @property
    def cold(self) -> bool:
        return self.headers.get("x-amz-storage-class") in ("GLACIER", "DEEP_ARCHIVE") and not self.restored


@dataclass(slots=True)
class _Upload:
    name: str
    headers: dict[str, str]
    begun_at: datetime
    parts: dict[int, bytes] = field(default_factory=dict)


# --- the service -----------------------------------------------------------------------------------------------------


class LyingS3:
    """The service and its script. A context manager; started at once.

    Parameters
    ----------
    bucket
        The one bucket there is.
    seed
        Of the dice that `probability` throws.
    """

    def __init__(self, bucket: str = "bucket", seed: int = 0) -> None:
        self.bucket = bucket
        self.requests: list[tuple[str, str]] = []
        self.heads: list[dict[str, str]] = []
        """Headers of each request (lower-case names), beside `requests`."""
        self._lock = threading.RLock()
        self._dice = random.Random(seed)
        self._rules: list[_Rule] = []
        self._kept: dict[str, _Object] = {}
        self.spoilt: set[str] = set()
        """Names of what it keeps otherwise than it was put."""
        self._before: dict[str, list[_Object]] = defaultdict(list)
        self._uploads: dict[str, _Upload] = {}
        self._numbers = 0
        self._healed = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        """URL of the service; the bucket stands in the path."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen (again, on the same port)."""
        self._healed.clear()
        self._server = _Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be down: no connection is taken, those there are are closed. What is kept stays kept."""
        if self._server is None or self._thread is None:
            return
        self._healed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()
        self._server = self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # the script

    def fail(self, fault: Fault, *, operation: str = "", times: int | None = None, probability: float = 1.0) -> None:
        """Follow `fault` from now on: for `operation` alone, so many `times` (None: for ever), with that probability a request."""
        if operation and operation not in OPERATIONS:
            raise ValueError(f"an operation is one of {', '.join(sorted(OPERATIONS))}")
        with self._lock:
            self._rules.append(_Rule(fault, operation, times, probability))

    def heal(self) -> None:
        """Forget the script: be honest, let hanging requests end, show what was late."""
        with self._lock:
            self._rules.clear()
            for kept in self._kept.values():
                kept.hidden = 0
            self._healed.set()
            self._healed = threading.Event()

    # what is kept

    def tagging(self, name: str) -> str:
        """Return the tags of an object as they were sent with it, or later."""
        with self._lock:
            return self._kept[name].headers.get("x-amz-tagging", "")

    def objects(self) -> dict[str, bytes]:
        """Return what is really kept: name -> bytes."""
        with self._lock:
            return {name: kept.content for name, kept in self._kept.items()}

    def uploads(self) -> list[str]:
        """Return the names of uploads in parts that were begun and neither completed nor aborted."""
        with self._lock:
            return [upload.name for upload in self._uploads.values()]

    def headers_of(self, name: str) -> dict[str, str]:
        """Return the headers that came with an object (tags, encryption, storage class)."""
        with self._lock:
            return dict(self._kept[name].headers)

    def count(self, operation: str) -> int:
        """Return how many requests of an operation came."""
        with self._lock:
            return sum(1 for asked, _ in self.requests if asked == operation)

    def remove(self, name: str) -> None:
        """Delete an object out of band."""
        with self._lock:
            self._before[name].append(self._kept.pop(name))

    def replace(self, name: str, content: bytes) -> None:
        """Replace the bytes of an object out of band."""
        with self._lock:
            self._keep(name, content, self._kept[name].headers)

    def roll_back(self, name: str) -> None:
        """Bring the object back to what it was before it was last replaced or removed, out of band."""
        with self._lock:
            self._kept[name] = self._before[name].pop()

    def age_uploads(self, begun_at: datetime) -> None:
        """Let all open uploads have been begun at `begun_at`."""
        with self._lock:
            for upload in self._uploads.values():
                upload.begun_at = begun_at

    def finish_restores(self) -> None:
        """Let every restore under way be finished."""
        with self._lock:
            for kept in self._kept.values():
                if kept.restoring:
                    kept.restored, kept.restoring = True, False

    def _keep(self, name: str, content: bytes, headers: dict[str, str], hidden: int = 0) -> None:
        if name in self._kept:
            self._before[name].append(self._kept[name])
        self._kept[name] = _Object(content, headers, datetime.now(UTC).replace(microsecond=0), hidden)

    def _fault(self, operation: str, name: str, headers: dict[str, str]) -> Fault | None:
        with self._lock:
            self.requests.append((operation, name))
            self.heads.append(headers)
            for rule in self._rules:
                if rule.operation in ("", operation) and rule.times != 0 and self._dice.random() < rule.probability:
                    if rule.times is not None:
                        rule.times -= 1
                    return rule.fault
        return None

    def _number(self) -> int:
        with self._lock:
            self._numbers += 1
            return self._numbers


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: LyingS3) -> None:
        self.service = service
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: a peer that goes away is part of the play."""


class _Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class _Answer(Exception):
    """Ends a request from any depth."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    # one request

    def _serve(self) -> None:
        service = self.server.service
        parts = urlsplit(self.path)
        self._query = parse_qs(parts.query, keep_blank_values=True)
        bucket, _, self._name = unquote(parts.path).removeprefix("/").partition("/")
        self._given = {name.lower(): value for name, value in self.headers.items()}
        operation = self._operation()
        self._script = service._fault(operation, self._name, self._given)
        fault = self._script
        length = int(self._given.get("content-length", 0))
        try:
            if fault is not None and fault.name == "cut request":
                self.rfile.read(min(fault.number, length))
                self._hang_up()
            self._body = self.rfile.read(length)
            if fault is not None:
                self._misbehave(fault)
            if bucket != service.bucket:
                raise _Refusal(404, "NoSuchBucket")  # noqa: TRY301
            with service._lock:
                status, headers, content = getattr(self, "_" + operation)()
            if fault is not None and fault.name == "done but":
                raise _Refusal(fault.status, fault.code)  # noqa: TRY301
            self._answer(status, headers, content)
        except _Refusal as refusal:
            self._refuse(refusal.status, refusal.code, fault.headers if fault is not None else ())
        except _Answer:
            self.close_connection = True

    do_PUT = do_GET = do_HEAD = do_DELETE = do_POST = _serve  # noqa: N815 - the names of the library

    def _operation(self) -> str:
        query = self._query
        match self.command:
            case "PUT":
                return "part" if "partNumber" in query else "tag" if "tagging" in query else "put"
            case "HEAD":
                return "head" if self._name else "check"
            case "DELETE":
                return "abort" if "uploadId" in query else "delete"
            case "POST":
                return "begin" if "uploads" in query else "restore" if "restore" in query else "complete"
        if self._name:
            return "get"
        return "uploads" if "uploads" in query else "versions" if "versions" in query else "list"

    def _misbehave(self, fault: Fault) -> None:
        match fault.name:
            case "error":
                raise _Refusal(fault.status, fault.code)
            case "hang":
                self.server.service._healed.wait()
                self._hang_up()
            case "slow":
                self.server.service._healed.wait(fault.seconds)
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                raise _Answer

    def _hang_up(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            time.sleep(0)  # the peer was faster
        raise _Answer

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        fault = self._script.name if self._script is not None else ""
        if fault in ("lost answer", "half and lost"):
            self._hang_up()
        if fault == "wrong etag" and "ETag" in headers:
            headers = {**headers, "ETag": '"00000000000000000000000000000000"'}
        if fault == "other" and self.command == "GET":
            content = _other(content, 2)  # not the lie of a put, which it would make good
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._script is not None and fault == "cut response":
            self.wfile.write(content[: self._script.number])
            self.wfile.flush()
            self._hang_up()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # the operations; each returns status, headers, body

    def _kept(self) -> _Object:
        kept = self.server.service._kept.get(self._name)
        if kept is None:
            raise _Refusal(404, "NoSuchKey")
        if kept.hidden > 0:
            kept.hidden -= 1
            raise _Refusal(404, "NoSuchKey")
        return kept

    def _checked(self) -> bytes:
        """Return the body after it was compared with the digests that came with it; what the script keeps of it."""
        if self._given.get("content-encoding", "").startswith("aws-chunked"):
            raise _Refusal(501, "NotImplemented")
        md5 = base64.b64encode(hashlib.md5(self._body, usedforsecurity=False).digest()).decode()
        sha256 = base64.b64encode(hashlib.sha256(self._body).digest()).decode()
        if self._given.get("content-md5", md5) != md5 or self._given.get("x-amz-checksum-sha256", sha256) != sha256:
            raise _Refusal(400, "BadDigest")
        match self._script.name if self._script is not None else "":
            case "half" | "half and lost":
                return self._body[: len(self._body) // 2]
            case "other":
                return _other(self._body)
        return self._body

    def _put(self) -> tuple[int, dict[str, str], bytes]:
        service = self.server.service
        fault = self._script
        content = self._checked()
        if self._given.get("if-none-match") == "*" and self._name in service._kept:
            raise _Refusal(412, "PreconditionFailed")
        if fault is None or fault.name != "nothing":
            service._keep(
                self._name, content, _kept_headers(self._given), fault.number if fault is not None and fault.name == "late" else 0
            )
            (service.spoilt.discard if content == self._body else service.spoilt.add)(self._name)
        return 200, {"ETag": _etag(self._body)}, b""

    def _get(self) -> tuple[int, dict[str, str], bytes]:
        kept = self._kept()
        if kept.cold:
            raise _Refusal(403, "InvalidObjectState")
        headers, content = _describe(kept), kept.content
        del headers["Content-Length"]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self._given.get("range", ""))
        if asked is None:
            return 200, headers, content
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            raise _Refusal(416, "InvalidRange")
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]

    def _head(self) -> tuple[int, dict[str, str], bytes]:
        kept = self._kept()
        headers = _describe(kept)
        if self._given.get("x-amz-checksum-mode") == "ENABLED" and "x-amz-checksum-sha256" in kept.headers:
            headers["x-amz-checksum-sha256"] = kept.headers["x-amz-checksum-sha256"]
        if self._script is TAGS_DROPPED:
            headers["x-amz-tagging-count"] = str(len(parse_qs(kept.headers.get("x-amz-tagging", ""))))
        return 200, headers, b""

    def _tag(self) -> tuple[int, dict[str, str], bytes]:
        pairs = re.findall(r"<Key>(.*?)</Key><Value>(.*?)</Value>", self._body.decode())
        self._kept().headers["x-amz-tagging"] = urlencode(pairs, quote_via=quote)
        return 200, {}, b""

    def _delete(self) -> tuple[int, dict[str, str], bytes]:
        service = self.server.service
        if self._name in service._kept:
            service._before[self._name].append(service._kept.pop(self._name))
        return 204, {}, b""

    def _check(self) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, b""

    def _list(self) -> tuple[int, dict[str, str], bytes]:
        after = self._query.get("continuation-token", [""])[0]
        names = sorted(name for name in self.server.service._kept if name.startswith(self._query.get("prefix", [""])[0]) and name > after)
        page = names[: min(PAGE, int(self._query.get("max-keys", [str(PAGE)])[0]))]
        entries = "".join(_entry(name, self.server.service._kept[name]) for name in page)
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(page) < len(names) else ""
        truncated = "true" if more else "false"
        return 200, {}, f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{entries}</ListBucketResult>".encode()

    def _versions(self) -> tuple[int, dict[str, str], bytes]:
        """List the one version there is of each object, as a bucket without versions does."""
        prefix = self._query.get("prefix", [""])[0]
        entries = "".join(
            _entry(name, kept, "Version", "<VersionId>null</VersionId>")
            for name, kept in sorted(self.server.service._kept.items())
            if name.startswith(prefix)
        )
        return 200, {}, f"<ListVersionsResult><IsTruncated>false</IsTruncated>{entries}</ListVersionsResult>".encode()

    def _begin(self) -> tuple[int, dict[str, str], bytes]:
        service = self.server.service
        upload = f"upload-{service._number()}"
        headers = _kept_headers(self._given)
        if self._script is TAGS_DROPPED:
            headers.pop("x-amz-tagging", None)
        service._uploads[upload] = _Upload(self._name, headers, datetime.now(UTC).replace(microsecond=0))
        return (
            200,
            {},
            f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode(),
        )

    def _upload(self) -> _Upload:
        try:
            return self.server.service._uploads[self._query["uploadId"][0]]
        except KeyError as error:
            raise _Refusal(404, "NoSuchUpload") from error

    def _part(self) -> tuple[int, dict[str, str], bytes]:
        upload = self._upload()
        content = self._checked()
        if self._script is None or self._script.name != "nothing":
            upload.parts[int(self._query["partNumber"][0])] = content
        return 200, {"ETag": _etag(self._body)}, b""

    def _complete(self) -> tuple[int, dict[str, str], bytes]:
        service = self.server.service
        upload = self._upload()
        if self._given.get("if-none-match") == "*" and self._name in service._kept:
            raise _Refusal(412, "PreconditionFailed")
        asked = [int(number) for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", self._body.decode())]
        content = b"".join(upload.parts.get(number, b"") for number in asked)
        del service._uploads[self._query["uploadId"][0]]
        match self._script.name if self._script is not None else "":
            case "nothing":
                pass
            case "half":
                service._keep(self._name, content[: len(content) // 2], upload.headers)
                service.spoilt.add(self._name)
            case "other":
                service._keep(self._name, _other(content), upload.headers)
                service.spoilt.add(self._name)
            case _:
                digests = b"".join(hashlib.sha256(upload.parts.get(number, b"")).digest() for number in asked)
                checksum = f"{base64.b64encode(hashlib.sha256(digests).digest()).decode()}-{len(asked)}"
                hidden = self._script.number if self._script is not None and self._script.name == "late" else 0
                service._keep(self._name, content, {**upload.headers, "x-amz-checksum-sha256": checksum}, hidden)
        return 200, {}, b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"

    def _abort(self) -> tuple[int, dict[str, str], bytes]:
        self._upload()
        del self.server.service._uploads[self._query["uploadId"][0]]
        return 204, {}, b""

    def _uploads(self) -> tuple[int, dict[str, str], bytes]:
        prefix = self._query.get("prefix", [""])[0]
        entries = "".join(
            f"<Upload><Key>{escape(upload.name)}</Key><UploadId>{number}</UploadId><Initiated>{upload.begun_at:%Y-%m-%dT%H:%M:%S.000Z}"
            "</Initiated></Upload>"
            for number, upload in self.server.service._uploads.items()
            if upload.name.startswith(prefix)
        )
        return 200, {}, f"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>{entries}</ListMultipartUploadsResult>".encode()

    def _restore(self) -> tuple[int, dict[str, str], bytes]:
        kept = self._kept()
        if kept.restoring:
            raise _Refusal(409, "RestoreAlreadyInProgress")
        if not kept.cold:
            return 200, {}, b""
        kept.restoring = True
        return 202, {}, b""


_KEPT_HEADERS = ("x-amz-tagging", "x-amz-server-side-encryption", "x-amz-storage-class", "x-amz-checksum-sha256")


def _kept_headers(given: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in given.items() if name.startswith(_KEPT_HEADERS)}


def _describe(kept: _Object) -> dict[str, str]:
    headers = {
        "ETag": _etag(kept.content),
        "Content-Length": str(len(kept.content)),
        "Last-Modified": f"{kept.modified_at:%a, %d %b %Y %H:%M:%S} GMT",
        "x-amz-storage-class": kept.headers.get("x-amz-storage-class", ""),
    }
    if kept.restoring:
        headers["x-amz-restore"] = 'ongoing-request="true"'
    if kept.restored:
        headers["x-amz-restore"] = 'ongoing-request="false", expiry-date="Fri, 01 Jan 2100 00:00:00 GMT"'
    return {name: value for name, value in headers.items() if value}


def _entry(name: str, kept: _Object, kind: str = "Contents", more: str = "") -> str:
    return (
        f"<{kind}><Key>{escape(name)}</Key>{more}<Size>{len(kept.content)}</Size><ETag>{escape(_etag(kept.content))}</ETag>"
        f"<LastModified>{kept.modified_at:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
        f"<StorageClass>{kept.headers.get('x-amz-storage-class', 'STANDARD')}</StorageClass></{kind}>"
    )


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _other(content: bytes, bit: int = 1) -> bytes:
    return bytes(byte ^ bit for byte in content[:1000]) + content[1000:]
