"""multipart/related, read and written as a stream.

The reader is a push parser without input or output of its own: bytes in, events out, memory bounded by its limits whatever
the size of a part. It accepts what RFC 2046 allows (preamble, epilogue, padding after a delimiter, parts without headers,
every punctuation in the boundary) and nothing else.

References
----------
RFC 2046 Section 5.1, RFC 2387; DICOM PS3.18 Section 8.6.1.2
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from dicomweb.errors import BadRequest, TooLarge

_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_HEADER_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


@dataclass(frozen=True, slots=True)
class PartBegin:
    """The headers of a part are complete; names in lower case."""

    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PartData:
    """Some content of the part that is open."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class PartEnd:
    """The delimiter that closes the part has been seen: the part is whole."""


Event = PartBegin | PartData | PartEnd


@dataclass(frozen=True, slots=True)
class MultipartLimits:
    """What a multipart body may cost."""

    parts: int = 10_000
    header_bytes: int = 8_192
    """Of one part, all its headers together."""
    header_count: int = 32
    preamble_bytes: int = 65_536
    padding_bytes: int = 64
    """White space between a delimiter and its line end; more is content."""


class _State(Enum):
    PREAMBLE = auto()
    HEADERS = auto()
    CONTENT = auto()
    EPILOGUE = auto()


class MultipartReader:
    """Push parser of one multipart body.

    Parameters
    ----------
    boundary
        The boundary parameter of the Content-Type, without quotes.
    limits
        What the body may cost.

    Raises
    ------
    BadRequest
        The boundary breaks the grammar of RFC 2046 Section 5.1.1.
    """

    def __init__(self, boundary: str, limits: MultipartLimits | None = None) -> None:
        if not _BOUNDARY.fullmatch(boundary):
            raise BadRequest("the boundary parameter is not 1 to 70 characters of RFC 2046 5.1.1")
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._limits = limits or MultipartLimits()
        # A line end before the body lets the first delimiter match like every other one.
        self._rest = b"\r\n"
        self._state = _State.PREAMBLE
        self._searched = 0
        self._preamble = 0
        self._headers: dict[str, str] = {}
        self._header_bytes = 0
        self._skip = 0
        self.parts = 0
        """Parts begun so far."""

    def feed(self, chunk: bytes | bytearray | memoryview) -> Iterator[Event]:
        """Take the next bytes of the body and give what became known by them.

        Raises
        ------
        BadRequest
            A header line breaks its grammar.
        TooLarge
            More parts, headers or preamble than the limits allow.
        """
        if self._state is _State.EPILOGUE:
            return
        data = self._rest + bytes(chunk) if self._rest else bytes(chunk)
        self._rest = b""
        position = 0
        while True:
            if self._state is _State.EPILOGUE:
                return
            if self._state is _State.HEADERS:
                end = data.find(b"\r\n", position + self._searched)
                if end < 0:
                    self._keep_header_rest(data, position)
                    return
                self._searched = 0
                line = data[position:end]
                position = end + 2
                if line:
                    self._header(line)
                    continue
                # The empty line's own line end may belong to the next delimiter (a part without content): look at it again
                # as if it were content, and drop it if it turns out to be no delimiter.
                position -= 2
                self._skip = 2
                headers, self._headers, self._header_bytes = self._headers, {}, 0
                self._state = _State.CONTENT
                yield PartBegin(headers)
                continue
            # PREAMBLE or CONTENT: look for the delimiter.
            found = data.find(self._delimiter, position)
            if found < 0:
                keep = self._tail(data, position)
                yield from self._content(data, position, keep)
                self._rest = data[keep:]
                return
            yield from self._content(data, position, found)
            length = self._look(data, found)
            if length is None:
                self._rest = data[found:]
                return
            if not length:
                # The boundary's letters, but no delimiter line: content.
                yield from self._content(data, found, found + len(self._delimiter))
                position = found + len(self._delimiter)
                continue
            if self._state is _State.CONTENT:
                self._skip = 0
                yield PartEnd()
            position = found + length
            if data.startswith(b"--", found + len(self._delimiter)):
                self._state = _State.EPILOGUE
                return
            self.parts += 1
            if self.parts > self._limits.parts:
                raise TooLarge(f"more than {self._limits.parts} parts in one request; send them in several")
            self._state = _State.HEADERS

    def finish(self) -> None:
        """Declare the body complete.

        Raises
        ------
        BadRequest
            The closing delimiter was not seen: the body is empty or was cut.
        """
        if self._state is not _State.EPILOGUE:
            what = "no delimiter of the announced boundary" if self._state is _State.PREAMBLE else "no closing delimiter: the body was cut"
            raise BadRequest(f"the multipart body has {what}")

    def _look(self, data: bytes, at: int) -> int | None:
        """Length of the delimiter line at `at`; 0 if it is none, None if more bytes are needed."""
        after = at + len(self._delimiter)
        following = data[after : after + self._limits.padding_bytes + 2]
        if following.startswith(b"--"):
            return len(self._delimiter) + 2
        padding = len(following) - len(following.lstrip(b" \t"))
        if following == b"-":
            return None
        if padding > self._limits.padding_bytes:
            return 0
        line_end = following[padding : padding + 2]
        if line_end == b"\r\n":
            return len(self._delimiter) + padding + 2
        return None if line_end in {b"", b"\r"} else 0

    def _tail(self, data: bytes, position: int) -> int:
        """Where the end of `data` begins that may be the beginning of a delimiter (its only CR is its first byte)."""
        last = data.rfind(b"\r", max(position, len(data) - len(self._delimiter) + 1))
        return last if last >= 0 and self._delimiter.startswith(data[last:]) else len(data)

    def _content(self, data: bytes, start: int, end: int) -> Iterator[Event]:
        skipped = min(self._skip, end - start)
        self._skip -= skipped
        start += skipped
        if end <= start:
            return
        if self._state is _State.PREAMBLE:
            self._preamble += end - start
            if self._preamble > self._limits.preamble_bytes:
                raise TooLarge(f"more than {self._limits.preamble_bytes} bytes before the first delimiter of the announced boundary")
            return
        yield PartData(memoryview(data)[start:end])

    def _keep_header_rest(self, data: bytes, position: int) -> None:
        self._rest = data[position:]
        if self._header_bytes + len(self._rest) > self._limits.header_bytes:
            raise TooLarge(f"more than {self._limits.header_bytes} bytes of headers in one part")
        self._searched = max(0, len(self._rest) - 1)

    def _header(self, line: bytes) -> None:
        self._header_bytes += len(line) + 2
        if self._header_bytes > self._limits.header_bytes or len(self._headers) >= self._limits.header_count:
            raise TooLarge(f"more than {self._limits.header_count} headers or {self._limits.header_bytes} bytes of them in one part")
        name, colon, value = line.partition(b":")
        if not colon or not _HEADER_NAME.fullmatch(name) or b"\0" in value or b"\n" in value or b"\r" in value:
            raise BadRequest("a part has a header line that is no 'Name: value'")
        self._headers[name.decode("ascii").lower()] = value.strip(b" \t").decode("latin-1")


class MultipartWriter:
    """Frames the parts of an answer.

    Parameters
    ----------
    media_type
        The type parameter: what the parts are.
    """

    def __init__(self, media_type: str) -> None:
        # 32 random hexadecimal digits: that they occur in the data is as unlikely as guessing a key.
        self.boundary = secrets.token_hex(16)
        self.content_type = f'multipart/related; type="{media_type}"; boundary={self.boundary}'
        self._first = True

    def begin(self, headers: Mapping[str, str]) -> bytes:
        """Delimiter and headers that open the next part."""
        opening = "" if self._first else "\r\n"
        self._first = False
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{opening}--{self.boundary}\r\n{lines}\r\n".encode("latin-1")

    def end(self) -> bytes:
        """Give the closing delimiter; only when every part was written whole."""
        return f"\r\n--{self.boundary}--\r\n".encode("ascii")
