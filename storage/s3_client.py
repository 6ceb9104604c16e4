"""How requests reach an S3 service: one client, deadlines, repetitions with jitter, credentials renewed, errors as sentences.

With `storage.s3` and `storage.kms` the only importer of boto3.
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, SSLError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from storage.errors import StorageError, Unavailable
from storage.s3_wire import Elsewhere, Wire

AddressingStyle = Literal["auto", "path", "virtual"]

SMALL: Final = (1 << 20) + (64 << 10)
"""Bytes that may be in memory at once for one request or one open object: an instance of usual size."""
BROKEN_OFF = (BotoCoreError, ResponseParserError, HTTPError, OSError)
"""What a connection raises; botocore translates most, but not all, of what lies under it."""

_log = logging.getLogger(__name__)

_CREDENTIALS = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired", "SignatureDoesNotMatch", "RequestExpired"}
)
_CHANGED_ON_THE_WAY = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
_NOT_TAKEN = frozenset({"InvalidArgument", "InvalidStorageClass", "InvalidRequest", "InvalidTag", "InvalidEncryptionAlgorithmError"})
_AGAIN = _CHANGED_ON_THE_WAY | {
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "RequestLimitExceeded",
    "OperationAborted",
    "ConditionalRequestConflict",
}
_OTHER_REGION = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException", "301", "307"}
)
_UNTOLD = frozenset({"", "301", "307", "400", "401", "403"})
"""What stands for the error code where there is none: the answer to a HEAD has no body."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0
_RENEW_EVERY_S = 1.0


class Deadline:
    """The moment at which an operation gives up, on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left; negative afterwards."""
        return self._end - time.monotonic()

    @property
    def passed(self) -> bool:
        """Whether it is too late."""
        return self.left_s <= 0


class Window:
    """A piece of an open file as a request's body: read from the disk as it is sent, never whole in memory unless it is `SMALL`.

    An error of the disk, or the end of the deadline, stops the sending and is kept in ``failure``: botocore would hide it among those
    of the network.
    """

    def __init__(self, file: BinaryIO, start: int, length: int, deadline: Deadline) -> None:
        self._file = file
        self._start = start
        self._length = length
        self._deadline = deadline
        self._at = 0
        self.failure: OSError | None = None

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes, the rest when negative."""
        if self._deadline.passed:
            raise TimeoutError("the deadline of the operation has passed")
        left = self._length - self._at
        try:
            self._file.seek(self._start + self._at)
            chunk = self._file.read(left if size < 0 else min(size, left))
        except OSError as error:
            self.failure = error
            raise
        self._at += len(chunk)
        return chunk

    def whole(self) -> bytes:
        """Return all of it."""
        self._at = 0
        return self.read()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move as a file does."""
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at


class S3Client:
    """Requests to one bucket, each repeated until it is answered for good, the tries are used up, or the deadline passes.

    Between two tries it waits a random time below a doubling limit (at least what ``Retry-After`` asks for). Repeated are broken
    connections, time-outs, 429, 5xx, and bytes that changed on the way. Credentials that the service refuses as expired or unknown are
    looked up again by the standard chain, so that renewed ones need no restart.

    Parameters
    ----------
    bucket, endpoint_url, region
        Where.
    addressing_style
        ``virtual``: the bucket in the host name, ``path``: in the path, ``auto``: in the path of an endpoint of one's own, which rarely
        has a name per bucket; in the name at AWS.
    ca_file
        Certificates of the authorities trusted for the endpoint instead of the system's. There is no way not to verify.
    connect_timeout_s, read_timeout_s
        Of one connection: until it is made, and between two pieces of data. A deadline may be overrun by one of them.
    attempts
        Tries of one request.
    sleep
        Waits the given seconds.

    Raises
    ------
    Unavailable
        `ca_file` is missing, or holds no certificates.
    """

    def __init__(
        self,
        *,
        bucket: str,
        endpoint_url: str | None = None,
        region: str | None = None,
        addressing_style: AddressingStyle = "auto",
        ca_file: Path | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 30.0,
        attempts: int = 6,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if ca_file is not None and not ca_file.is_file():
            raise Unavailable(f"the file of trusted certificates {ca_file} of the object store is missing; correct [archive] ca_file")
        if ca_file is not None:
            try:
                ssl.create_default_context(cafile=ca_file)
            except OSError as error:
                raise Unavailable(
                    f"the file of trusted certificates {ca_file} of the object store cannot be used ({error.strerror or error}): it holds "
                    "certificates in PEM form, and this user may read it; correct [archive] ca_file"
                ) from error
        self.bucket = bucket
        self.attempts = attempts
        self._sleep = sleep
        style = ("path" if endpoint_url else "auto") if addressing_style == "auto" else addressing_style
        # Over TLS nobody changes a body, and the SHA-256 of an object is among the signed headers.
        particular: Any = {"addressing_style": style}
        if not (endpoint_url and endpoint_url.startswith("http://")):
            particular["payload_signing_enabled"] = False
        self._options: dict[str, Any] = {
            "endpoint_url": endpoint_url,
            "region_name": region,
            "verify": str(ca_file) if ca_file is not None else None,
            "config": Config(
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
                retries={"total_max_attempts": 1, "mode": "standard"},  # repetitions are ours: they know the deadline
                max_pool_connections=64,
                # What a request costs before it leaves the process: arguments are checked by types here, the long name is made anew
                # for each.
                parameter_validation=False,
                user_agent="dicom-node",
                tcp_keepalive=True,
                # Checksums are ours, given with each request; the automatic ones use trailers that few compatible services know.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3=particular,
            ),
        }
        self._renewing = threading.Lock()
        self._renewed_at = float("-inf")
        self._connect(boto3.session.Session())

    def _connect(self, session: boto3.session.Session) -> None:
        """Make a client of a session that has found its credentials, or none."""
        client: Any = session.client("s3", **self._options)
        client.meta.events.register("before-parse.s3.HeadBucket", partial(_name_a_region, client.meta.region_name))
        self._credentials = session.get_credentials()
        self._client, self._wire = client, Wire.of(client, self._credentials, self.bucket)

    def call(
        self,
        operation: str,
        deadline: Deadline,
        doing: str,
        *,
        expected: Collection[str | int] = (),
        body: Window | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Send one request of `operation` (a method's name of boto3's client) and return the answer.

        Parameters
        ----------
        doing
            A verb for the message of an error.
        expected
            Error codes and HTTP statuses that are an answer here: their ``ClientError`` is raised at once and as it is. A missing
            bucket never is.
        body
            Sent as the request's body, from its start at every try. A small one goes as bytes at the first: with the headers at once,
            where what is streamed waits for the service's word to go on, and goes in many small pieces. Later tries stream, since one
            piece has to be through within a time-out.

        Raises
        ------
        botocore.exceptions.ClientError
            An expected one. Its ``RetryAttempts`` is the number of tries before.
        Unavailable
            Any other failure.
        OSError
            The disk did not give the body.
        """
        attempt = 0
        while True:
            client = self._client
            try:
                if body is not None:
                    arguments["Body"] = body.whole() if not attempt and len(body) <= SMALL else body
                    body.seek(0)
                answer = self._send(client, operation, arguments)
            except (*BROKEN_OFF, ClientError) as error:
                if body is not None and body.failure is not None:
                    raise body.failure from error
                if isinstance(error, ClientError) and _is_expected(error, expected):
                    response: Any = error.response
                    response.setdefault("ResponseMetadata", {})["RetryAttempts"] = attempt
                    raise
                attempt += 1
                if attempt >= self.attempts or not self._worth_repeating(client, error, operation):
                    raise self.unavailable(self._told(client, error, operation), doing) from error
                if not self.pause(attempt, deadline, _retry_after_s(error)):
                    raise self.unavailable(error, doing, "no answer before the deadline; the last was ") from error
            else:
                return answer

    def _send(self, client: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Send one request once: by the short way, where there is one for it."""
        wire = self._wire
        answer: dict[str, Any] | None = None
        if wire is not None:
            try:
                answer = wire.send(operation, arguments)
            except Elsewhere as elsewhere:
                self._leave_wire(client, str(elsewhere))
        if answer is None:
            try:
                answer = dict(getattr(client, operation)(Bucket=self.bucket, **arguments))
            except ValueError as error:  # botocore reads the numbers and times of an answer as they come
                raise ResponseParserError(str(error)) from error
        return answer

    def _leave_wire(self, client: Any, code: str) -> None:
        """Leave everything to `client` from now on, which follows redirections and remembers them."""
        with self._renewing:
            if client is self._client:
                self._wire = None
        _log.warning("store.redirected", extra={"bucket": self.bucket, "reason": code, "remedy": "set [archive] region to the bucket's"})

    def pause(self, attempt: int, deadline: Deadline, least_s: float = 0.0) -> bool:
        """Wait before the try after the `attempt`-th; False, at once, when the deadline would pass meanwhile."""
        pause_s = max(least_s, random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)))  # noqa: S311 - jitter, no secret
        if pause_s >= deadline.left_s:
            return False
        self._sleep(pause_s)
        return True

    def _worth_repeating(self, client: Any, error: Exception, operation: str) -> bool:
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return self._renew(client)
        if isinstance(error, ClientError):
            code, status = code_of(error), status_of(error)
            if code in _CREDENTIALS or (status in (400, 403) and operation.startswith("head_")):  # the answer to a HEAD has no code
                return self._renew(client)
            return status >= 500 or status == 429 or code in _AGAIN
        return not isinstance(error, SSLError)

    def _told(self, client: Any, error: Exception, operation: str) -> Exception:
        """Return the error with its code: the answer to a HEAD has none, so that a listing is asked why it was refused."""
        if not (isinstance(error, ClientError) and operation.startswith("head_") and code_of(error) in _UNTOLD):
            return error
        try:
            client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
        except ClientError as told:
            return told if status_of(told) in (301, 307, 400, 401, 403, 404) else error
        except BROKEN_OFF as broken:
            _log.debug("store.reason_unknown", extra={"bucket": self.bucket, "reason": type(broken).__name__})
        return error

    def _renew(self, client: Any) -> bool:
        """Look the credentials up again; False when they are the same as before, or that was done just now."""
        with self._renewing:
            if client is not self._client:
                return True  # another thread did
            now = time.monotonic()
            if now - self._renewed_at < _RENEW_EVERY_S:
                return False
            self._renewed_at = now
            session = boto3.session.Session()
            found = _frozen(session.get_credentials())
            if found is None or found == _frozen(self._credentials):
                return False
            self._connect(session)
        _log.warning("store.credentials.renewed", extra={"bucket": self.bucket})
        return True

    def unavailable(self, error: Exception, doing: str, before: str = "") -> StorageError:
        """Return the error that says what could not be done, why, and what to do about it."""
        where = f"cannot {doing} bucket {self.bucket!r} at {self._client.meta.endpoint_url}: {before}"
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return Unavailable(
                f"{where}no credentials found; give the node AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or its machine a role"
            )
        if isinstance(error, ClientError):
            code, status = code_of(error), status_of(error)
            if code == "NoSuchBucket" or (status == 404 and doing == "reach"):
                return Unavailable(f"{where}there is no such bucket; create it, or correct [archive] bucket")
            if code in _OTHER_REGION:
                asked, named = self._client.meta.region_name, _region_of(error)
                remedy = f"set [archive] region to {named!r}" if named and named != asked else "correct [archive] region or endpoint_url"
                return Unavailable(f"{where}the bucket is not of region {asked!r} ({status} {code}); {remedy}")
            if code == "RequestTimeTooSkewed":
                return Unavailable(f"{where}the clocks of this machine and of the store differ; set the clock")
            if code in _CREDENTIALS:
                return Unavailable(f"{where}access denied ({code}); the credentials are expired or unknown: renew them")
            if status in (401, 403):
                return Unavailable(f"{where}access denied ({code}); check the credentials and the policy of bucket and key")
            if code in _CHANGED_ON_THE_WAY:
                return Unavailable(f"{where}the bytes changed on the way ({code}); look into the network and the memory of this machine")
            if code in _NOT_TAKEN:
                settings = "[archive] storage_class, server_side_encryption, kms_key_id and tags"
                return Unavailable(
                    f"{where}the store does not take such a request ({status} {code}); check {settings} against what it knows"
                )
            return Unavailable(f"{where}the store answered {status} {code}; try again later")
        if isinstance(error, SSLError):
            return Unavailable(
                f"{where}the store's certificate is not trusted, or names another host; give the certificate of its authority as "
                "[archive] ca_file, or correct [archive] endpoint_url",
            )
        return Unavailable(f"{where}{type(error).__name__}; check the endpoint and the network")


def code_of(error: ClientError) -> str:
    """Return the error code of an answer."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """Return the HTTP status of an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def retries_of(error: ClientError) -> int:
    """Return how many tries came before the one that was answered so."""
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def _frozen(credentials: Any) -> tuple[str, str, str | None] | None:
    """Return key, secret and token as they are now; None where there are none, or they cannot be had now."""
    try:
        frozen = None if credentials is None else credentials.get_frozen_credentials()
    except BROKEN_OFF as error:
        _log.warning("store.credentials.unknown", extra={"reason": type(error).__name__})
        return None
    return None if frozen is None else (frozen.access_key, frozen.secret_key, frozen.token)


def _name_a_region(region: str, response_dict: dict[str, Any], **_: Any) -> None:
    """Name the region that was asked for in a redirection that names none: botocore would ask for it by the same request, without end."""
    headers = response_dict["headers"]
    if response_dict["status_code"] in (301, 302, 307) and "x-amz-bucket-region" not in headers:
        headers["x-amz-bucket-region"] = region


def _region_of(error: ClientError) -> str:
    """Return the region that a store says a bucket is of; empty when it says none."""
    headers: Mapping[str, str] = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    described: Mapping[str, Any] = error.response.get("Error", {})
    return str(headers.get("x-amz-bucket-region") or described.get("Region") or "")


def _is_expected(error: ClientError, expected: Collection[str | int]) -> bool:
    code = code_of(error)
    return code != "NoSuchBucket" and (code in expected or status_of(error) in expected)


def _retry_after_s(error: Exception) -> float:
    if not isinstance(error, ClientError):
        return 0.0
    asked = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(asked) if asked.isdecimal() else 0.0
