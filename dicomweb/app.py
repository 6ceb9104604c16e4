"""The HTTP door: routes, the checks that every request passes, and the one place where an error becomes a response.

References
----------
DICOM PS3.18 Section 10 Studies Service and Resources
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime

from aiohttp import web
from aiohttp.typedefs import Middleware

from dicomweb.changefeed import Changes
from dicomweb.context import Meter, NoMeter, Pool, Services, WebLimits, utc_now
from dicomweb.errors import BadRequest, Busy, Forbidden, WebError, WrongMediaType, from_storage, problem
from dicomweb.qido import Search
from dicomweb.stow import Store
from dicomweb.wado import Retrieve
from storage.archive import Archive
from storage.audit import AuditTrail
from storage.changes import ChangeFeed
from storage.errors import StorageError
from storage.index import Index

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)
# A path that hides something: encoded slash, backslash, percent sign or control character, empty or dot segment.
_HIDDEN = re.compile(r"%(2f|5c|25|7f|[01][0-9a-f])|//|\\|(^|/)(\.|%2e){1,2}(/|$)", re.IGNORECASE)
_SAFETY: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Server": "dicom-node",
}


def make_app(
    *,
    archive: Archive,
    index: Index,
    audit: AuditTrail,
    base_path: str = "/dicomweb",
    limits: WebLimits | None = None,
    workers: int = 8,
    node_ae_title: str = "",
    public_url: str = "",
    trusted_proxy: bool = False,
    cors_origins: Sequence[str] = (),
    meter: Meter | None = None,
    changefeed: ChangeFeed | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> web.Application:
    """Build the DICOMweb application; it owns its threads and nothing else.

    Parameters
    ----------
    archive, index
        Where instances go and come from.
    audit
        Who searched and retrieved what.
    base_path
        Path before ``/studies``; empty for none.
    limits
        What one request may cost.
    workers
        Threads for blocking work.
    node_ae_title
        Noted as the called AE title of what comes in.
    public_url
        Base of the URLs that are handed out, with `base_path`, when clients reach the node by another name; empty: the request's Host.
    trusted_proxy
        Whether X-Forwarded-Proto and X-Forwarded-Host are believed.
    cors_origins
        Origins of web pages that may call the node, each as ``https://host[:port]``; ``*`` for every one, without credentials.
    meter
        Counts instances and requests.
    changefeed
        Served at ``{base_path}/changefeed``; without it there is no such resource.

    Raises
    ------
    ValueError
        An origin is no origin.
    """
    for origin in cors_origins:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise ValueError(f"cors_origins: {origin!r} is no origin; write https://host[:port], without a path")
    services = Services(
        archive=archive,
        index=index,
        audit=audit,
        pool=Pool(workers),
        limits=limits or WebLimits(),
        meter=meter or NoMeter(),
        base_path=base_path.rstrip("/"),
        public_url=public_url,
        trusted_proxy=trusted_proxy,
        node_ae_title=node_ae_title,
        clock=clock,
    )
    door = _Door(services, frozenset(cors_origins))
    # Outermost first: answers made from an error are counted too.
    app = web.Application(middlewares=[door.count, door.explain, door.guard], client_max_size=1024**2)
    app.on_response_prepare.append(door.complete)
    app[TRAFFIC] = door.traffic
    _routes(app, services)
    if changefeed is not None:
        changes = Changes(services, changefeed, closing=lambda: door.traffic.closing)
        _add_route(app, services.base_path + "/changefeed", "changefeed", changes.changes, None)
        _add_route(app, services.base_path + "/changefeed/latest", "changefeed", changes.latest, None)
        app.on_cleanup.append(lambda _: changes.close())

    async def close(_: web.Application) -> None:
        await asyncio.to_thread(services.pool.close)

    app.on_cleanup.append(close)
    return app


def _routes(app: web.Application, services: Services) -> None:
    store, retrieve, search = Store(services), Retrieve(services), Search(services)
    studies = services.base_path + "/studies"
    study = studies + "/{study}"
    series = study + "/series/{series}"
    instance = series + "/instances/{instance}"
    # path: (name of the transaction, GET, POST)
    table: Sequence[tuple[str, str, Handler, Handler | None]] = (
        (studies, "search", search.studies, store.handle),
        (study, "retrieve", retrieve.instances, store.handle),
        (study + "/metadata", "metadata", retrieve.metadata, None),
        (study + "/series", "search", search.series, None),
        (study + "/instances", "search", search.instances, None),
        (series, "retrieve", retrieve.instances, None),
        (series + "/metadata", "metadata", retrieve.metadata, None),
        (series + "/instances", "search", search.instances, None),
        (instance, "retrieve", retrieve.instances, None),
        (instance + "/metadata", "metadata", retrieve.metadata, None),
        (instance + "/bulkdata/{path:.+}", "bulkdata", retrieve.bulk_data, None),
        (instance + "/frames/{frames}", "frames", retrieve.frames, None),
        (services.base_path + "/series", "search", search.series, None),
        (services.base_path + "/instances", "search", search.instances, None),
    )
    for path, transaction, get, post in table:
        _add_route(app, path, transaction, get, post)


def _add_route(app: web.Application, path: str, transaction: str, get: Handler, post: Handler | None) -> None:
    resource = app.router.add_resource(path)
    methods = ["GET", "HEAD", "OPTIONS"] + (["POST"] if post else [])
    resource.add_route("GET", _named(transaction, get))
    resource.add_route("HEAD", _named(transaction, get))
    resource.add_route("OPTIONS", _named("options", _Options(methods).handle))
    if post:
        resource.add_route("POST", _named("store", post))


class Traffic:
    """What runs at the door just now."""

    def __init__(self) -> None:
        self.requests = 0
        self.closing = False
        """No new request is taken, also on connections that are open."""
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """Note that a request begins."""
        self.requests += 1
        self._idle.clear()

    def end(self) -> None:
        """Note that a request has ended."""
        self.requests -= 1
        if not self.requests:
            self._idle.set()

    async def drain(self, within_s: float) -> None:
        """Take no new request, and wait for the running ones at most so long."""
        self.closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()


TRANSACTION = web.RequestKey("transaction", str)
TRAFFIC = web.AppKey("traffic", Traffic)


def _named(transaction: str, handler: Handler) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        request[TRANSACTION] = transaction
        return await handler(request)

    return handle


class _Options:
    """Says what a resource can do; the answer to a CORS preflight gets its headers from `_Door`."""

    def __init__(self, methods: Sequence[str]) -> None:
        self._allow = ", ".join(methods)

    async def handle(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=204, headers={"Allow": self._allow})


class _Door:
    """The middlewares."""

    def __init__(self, services: Services, cors_origins: frozenset[str]) -> None:
        self._services = services
        self._origins = cors_origins
        self.traffic = Traffic()

    @property
    def count(self) -> Middleware:
        """Count every answer once."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            response = await handler(request)
            self._services.meter.request(transaction=request.get(TRANSACTION, "none"), status=response.status)
            return response

        return middleware

    async def complete(self, request: web.Request, response: web.StreamResponse) -> None:
        """Put the headers of safety and CORS on every answer, also one that is streamed."""
        response.headers.update(self.headers(request))

    def headers(self, request: web.Request) -> dict[str, str]:
        """Headers that every answer carries."""
        headers = dict(_SAFETY)
        origin = request.headers.get("Origin", "")
        if not self._origins:
            return headers | {"Cross-Origin-Resource-Policy": "same-origin"}
        headers["Vary"] = "Origin"
        if origin not in self._origins and "*" not in self._origins:
            return headers | {"Cross-Origin-Resource-Policy": "same-origin"}
        named = origin in self._origins
        headers |= {
            "Access-Control-Allow-Origin": origin if named else "*",
            "Access-Control-Expose-Headers": "Content-Type, Content-Length, Warning, Retry-After",
            "Cross-Origin-Resource-Policy": "cross-origin",
        }
        if named:
            headers["Access-Control-Allow-Credentials"] = "true"  # never together with *
        if request.method == "OPTIONS":
            headers |= {
                "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
                "Access-Control-Allow-Headers": "Accept, Authorization, Content-Type",
                "Access-Control-Max-Age": "600",
            }
        return headers

    @property
    def explain(self) -> Middleware:
        """Every error becomes a problem document here, and only here."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                return await handler(request)
            except WebError as error:
                failure = error
            except StorageError as error:
                failure = from_storage(error)
                if failure.status >= 500:
                    _log.warning("request.failed", extra={"reason": f"0x{error.failure_reason:04X} {error}"})
            except web.HTTPException as error:
                allow = error.headers.get("Allow")
                failure = WebError(_of_framework(error.status), headers={"Allow": allow} if allow else None)
                failure.status = error.status
            except Exception as error:  # noqa: BLE001 - the edge: a fault of ours must not end the server or show its inside
                # Where, but not the words: those may hold what a data set held.
                where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-4:]]
                _log.error("request.fault", extra={"reason": type(error).__name__, "where": " ".join(where)})
                failure = WebError("a fault of the node; its log tells more")
            return self._problem(request, failure)

        return middleware

    def _problem(self, request: web.Request, failure: WebError) -> web.Response:
        body = b"" if request.method == "HEAD" else json.dumps(problem(failure.status, failure.detail, failure.extra)).encode()
        response = web.Response(status=failure.status, body=body, headers={"Content-Type": "application/problem+json", **failure.headers})
        if self.traffic.closing or (request.can_read_body and not request.content.at_eof()):
            response.force_close()  # the rest of a body is not waited for
        return response

    @property
    def guard(self) -> Middleware:
        """What is refused whatever the resource."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self.traffic.closing:
                raise Busy("the node is shutting down; try again later")
            if self.traffic.requests >= self._services.limits.requests:
                raise Busy(f"{self._services.limits.requests} requests are running; try again later")
            path = request.rel_url.raw_path
            if _HIDDEN.search(path):
                raise BadRequest("the path holds an encoded or empty part that no resource has")
            coding = request.headers.get("Content-Encoding", "identity").strip().lower()
            if coding not in {"", "identity"}:
                raise WrongMediaType("a content coding is not taken; send the body as it is")
            origin = request.headers.get("Origin")
            if request.method == "POST" and origin is not None and not self._may_write(request, origin):
                raise Forbidden("web pages of this origin may not store here; allow it by cors_origins")
            self.traffic.begin()
            try:
                return await handler(request)
            finally:
                self.traffic.end()

        return middleware

    def _may_write(self, request: web.Request, origin: str) -> bool:
        own = "/".join(self._services.base_url(request).split("/")[:3])
        return origin in self._origins or "*" in self._origins or origin.lower() == own.lower()


def _of_framework(status: int) -> str:
    return {
        404: "no such resource; the service's root is <base>/studies",
        405: "this method is not allowed on this resource",
        413: "the request is too large",
        417: "this expectation cannot be met",
    }.get(status, "the request cannot be answered")
