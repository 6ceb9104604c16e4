"""Reading objects of an S3 bucket: one answer kept open and read as it comes, taken up again where it broke."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from storage.errors import Unavailable
from storage.objects import absent
from storage.s3_client import BROKEN_OFF, SMALL, Deadline, S3Client

_EDGE = 64 << 10
"""Bytes at either end of a larger object that are kept: header and trailer lie there."""
PIECE = 256 << 10
"""Bytes that are fetched at once; whoever reads so many at a time has no two of them joined."""


class ObjectStream:
    """The bytes of one object from the first on. The request is sent at once, the bytes are fetched as they are read.

    Raises
    ------
    botocore.exceptions.ClientError
        There is no such object (404), or it lies in a cold class (InvalidObjectState).
    Unavailable
        The store does not answer.
    """

    def __init__(self, client: S3Client, name: str, doing: str, deadline: Deadline) -> None:
        self._client = client
        self._name = name
        self._doing = doing
        self.at = 0
        answer = client.call("get_object", deadline, doing, expected=(404, "InvalidObjectState"), Key=name)
        self.size = int(answer["ContentLength"])
        self._body: Any = answer["Body"]

    def read(self, length: int, deadline: Deadline) -> bytes:
        """Return the next `length` bytes, fewer only at the end of the object."""
        pieces: list[bytes] = []
        left = min(length, self.size - self.at)
        failures = 0
        while left > 0:
            try:
                if self._body is None:
                    self._body = self._rest(deadline)
                piece = self._body.read(min(left, PIECE))
                if not piece:
                    raise EOFError  # noqa: TRY301 - the connection ended before the object: the same as a broken one
            except (*BROKEN_OFF, EOFError) as error:
                self.close()
                failures += 1
                if failures >= self._client.attempts or not self._client.pause(failures, deadline):
                    raise self._client.unavailable(error, self._doing, "every answer breaks off: ") from error
                continue
            failures = 0
            pieces.append(piece)
            left -= len(piece)
            self.at += len(piece)
            if left and deadline.passed:
                raise Unavailable(f"cannot {self._doing} bucket {self._client.bucket!r}: the bytes come too slowly; look into the network")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _rest(self, deadline: Deadline) -> Any:
        """Ask for what has not come yet."""
        try:
            answer = self._client.call(
                "get_object", deadline, self._doing, expected=(404, 416, "InvalidObjectState"), Key=self._name, Range=f"bytes={self.at}-"
            )
        except ClientError as error:
            raise Unavailable(f"bucket {self._client.bucket!r} lost an object while it was read; look into the store's health") from error
        if answer.get("ContentRange") != f"bytes {self.at}-{self.size - 1}/{self.size}":
            with contextlib.suppress(*BROKEN_OFF):
                answer["Body"].close()
            raise Unavailable(f"bucket {self._client.bucket!r} ignores range requests, or the object was replaced while it was read")
        return answer["Body"]

    def close(self) -> None:
        """Give the connection back, or end it when bytes are still to come; may be called twice."""
        body, self._body = self._body, None
        if body is not None:
            with contextlib.suppress(*BROKEN_OFF):
                body.close()


class S3Reader:
    """An object opened for reading: an ``ObjectReader``.

    An object up to `SMALL` bytes is kept whole and costs one request; a larger one, read from its start to its end in bounded memory, two
    (its trailer is read first). Reads elsewhere cost one request each. Closing it unread moves next to nothing.

    Parameters
    ----------
    deadline
        Makes the deadline of an operation that moves so many bytes.

    Raises
    ------
    As `ObjectStream`.
    """

    def __init__(self, client: S3Client, name: str, object_key: str, deadline: Callable[[int], Deadline]) -> None:
        self._client = client
        self._name = name
        self._object_key = object_key
        self._deadline = deadline
        self._head = b""
        self._tail = b""
        self._stream = ObjectStream(client, name, "read", deadline(0))
        self.size = self._stream.size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; fewer only where the object ends."""
        length = max(0, min(length, self.size - offset))
        if length == 0:
            return b""
        deadline = self._deadline(max(length, SMALL))
        if not self._head:
            self._head = self._stream.read(self.size if self.size <= SMALL else _EDGE, deadline)
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        if offset <= self._stream.at == len(self._head):
            return self._head[offset:] + self._stream.read(offset + length - self._stream.at, deadline)
        if offset == self._stream.at:
            return self._stream.read(length, deadline)
        tail = max(0, self.size - _EDGE)
        if offset < tail:
            return self._range(offset, length, deadline)
        if not self._tail:
            self._tail = self._range(tail, self.size - tail, deadline)
        return self._tail[offset - tail : offset - tail + length]

    def _range(self, offset: int, length: int, deadline: Deadline) -> bytes:
        failures = 0
        while True:
            try:
                answer = self._client.call(
                    "get_object",
                    deadline,
                    "read",
                    expected=(404, 416),
                    Key=self._name,
                    Range=f"bytes={offset}-{offset + length - 1}",
                )
                if answer.get("ContentRange") != f"bytes {offset}-{offset + length - 1}/{self.size}":
                    raise Unavailable(
                        f"bucket {self._client.bucket!r} ignores range requests, or the object was replaced while it was read"
                    )
                with contextlib.closing(answer["Body"]) as body:
                    chunk: bytes = body.read(length)
                if len(chunk) == length:
                    return chunk
                raise EOFError  # noqa: TRY301 - the same as a broken connection
            except ClientError as error:
                raise absent(self._object_key) from error
            except (*BROKEN_OFF, EOFError) as error:
                failures += 1
                if failures >= self._client.attempts or not self._client.pause(failures, deadline):
                    raise self._client.unavailable(error, "read", "every answer breaks off: ") from error

    def close(self) -> None:
        """Give the connection back; may be called twice."""
        self._stream.close()
