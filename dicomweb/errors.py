"""What the HTTP door refuses, and the one table from error to response.

::

    WebError                     HTTP status
    ├── BadRequest               400  the request cannot be understood
    ├── Forbidden                403  a browser of a foreign origin
    ├── NotFound                 404  no such resource
    ├── Deadline                 408  the body did not arrive in time
    ├── NotAcceptable            406  nothing on offer fits the Accept header
    ├── TooLarge                 413  a configured limit
    ├── WrongMediaType           415  the body is of a type that is not taken
    └── Busy                     503  too much at once, try again

Errors of the archive (`storage.errors`) join them in `TABLE`.

References
----------
DICOM PS3.18 Section 8.5 Status Codes; RFC 9110 Section 15; RFC 9457 (problem details)
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from storage.errors import (
    ColdObject,
    InstanceNotFound,
    IntegrityError,
    InvalidInstance,
    InvalidQuery,
    LostObject,
    StorageError,
    Unavailable,
)


class WebError(Exception):
    """The request is refused; the message names cause and remedy and holds no patient data."""

    status = 500

    def __init__(self, detail: str, *, headers: Mapping[str, str] | None = None, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        """More members of the problem document, for example what was stored before the body broke off."""


class BadRequest(WebError):
    """The request cannot be understood."""

    status = 400


class Forbidden(WebError):
    """The request comes from a web page of another origin that is not allowed here."""

    status = 403


class NotFound(WebError):
    """No such resource; the same words whether it never existed or is not yours."""

    status = 404


class NotAcceptable(WebError):
    """Nothing that is on offer fits what the client accepts."""

    status = 406


class Deadline(WebError):
    """The body did not arrive within the absolute deadline."""

    status = 408


class TooLarge(WebError):
    """The request exceeds a configured limit."""

    status = 413


class WrongMediaType(WebError):
    """The body is of a media type or content coding that is not taken."""

    status = 415


class Busy(WebError):
    """Too many requests at once."""

    status = 503

    def __init__(self, detail: str, *, retry_after_s: int = 5, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)}, extra=extra)


TITLES: Mapping[int, str] = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    408: "Request Timeout",
    410: "Gone",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    500: "Internal Server Error",
    503: "Service Unavailable",
    507: "Insufficient Storage",
}

TABLE: Mapping[type[StorageError], tuple[int, str]] = {
    # error of the archive: (status, what the client is told: never the message, which may name an object)
    InstanceNotFound: (404, "no such study, series or instance under this parent"),
    ColdObject: (503, "the instances lie in cold storage; their restore has begun, ask again after the time that Retry-After says"),
    Unavailable: (503, "the archive cannot be read or written now; nothing was lost, try again later"),
    LostObject: (410, "an instance was lost with the disk that it lay on and has to be sent again; others can be retrieved one by one"),
    IntegrityError: (500, "the stored bytes failed their integrity check; the operator has been alarmed"),
    InvalidInstance: (500, "the stored instance cannot be read"),
    InvalidQuery: (400, ""),  # its message names a keyword and what is expected, never a value
    StorageError: (500, "the archive could not do this"),
}


def disk_full(error: BaseException | None) -> bool:
    """Whether an error was caused by a full disk or an exhausted quota: 507 rather than 503."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        error = error.__cause__ or error.__context__
    return False


def from_storage(error: StorageError) -> WebError:
    """Translate an error of the archive by `TABLE`; the most derived class that is listed decides."""
    status, detail = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    if error.retryable and disk_full(error):
        status, detail = 507, "the archive's disk is full; nothing was lost, try again when the operator has made room"
    retry_after_s = error.retry_after_s if isinstance(error, ColdObject) else 30
    web = WebError(detail or str(error), headers={"Retry-After": str(retry_after_s)} if error.retryable else None)
    web.status = status
    return web


def problem(status: int, detail: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Build a problem document (RFC 9457, application/problem+json)."""
    return {**(extra or {}), "type": "about:blank", "title": TITLES.get(status, "Error"), "status": status, "detail": detail}
