"""The change feed over HTTP: what has happened since a cursor, at once or as soon as something does. See docs/changefeed.md.

A request that waits holds no thread: one thread of the door watches the database for all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web

from dicomweb.context import Services, raw_parameters
from dicomweb.errors import BadRequest, Busy
from storage.changes import KINDS, LIMIT, ChangeFeed, Page
from storage.errors import StorageError

_log = logging.getLogger(__name__)

LONGEST_WAIT_S = 30
WAITING = 256
"""Requests that may wait at once."""
_LOOK_S = 0.5
"""How often a waiting request looks whether its client is gone or the door closes, and how long the watcher's thread waits at most."""
_GATHER_S = 0.05
"""What happens within this time is told together."""
_NUMBER = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class Asked:
    """The query parameters, read and checked."""

    since: int = 0
    limit: int = 100
    wait: int = 0
    kinds: frozenset[str] = KINDS


def parse_parameters(raw: list[tuple[str, str]]) -> Asked:
    """Read the still percent-encoded parameters of ``/changefeed``.

    Raises
    ------
    BadRequest
        An unknown parameter, one that is given twice, or a value out of range.
    """
    given: dict[str, str] = {}
    for name, value in raw:
        if name not in {"since", "limit", "wait", "kinds"}:
            raise BadRequest("the change feed takes the parameters since, limit, wait and kinds, and no other")
        if name in given:
            raise BadRequest(f"{name} is given twice")
        given[name] = urllib.parse.unquote(value)
    kinds = frozenset(given["kinds"].split(",")) if "kinds" in given else KINDS
    if not kinds <= KINDS:
        raise BadRequest(f"kinds is no list, with commas, of {', '.join(sorted(KINDS))}")
    return Asked(
        since=_number(given, "since", 0, 0, 2**63 - 1),
        limit=_number(given, "limit", 100, 1, LIMIT),
        wait=_number(given, "wait", 0, 0, LONGEST_WAIT_S),
        kinds=kinds,
    )


def _number(given: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = given.get(name, str(default))
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise BadRequest(f"{name} is no whole number from {least} to {most}")
    return int(text)


class Changes:
    """GET (and HEAD) of the change feed.

    Parameters
    ----------
    services
        What all transactions share.
    feed
        Where changes come from.
    closing
        Whether the door is about to close: nothing waits any longer.
    """

    def __init__(self, services: Services, feed: ChangeFeed, closing: Callable[[], bool]) -> None:
        self._services = services
        self._feed = feed
        self._closing = closing
        self._watch = _Watch(feed)
        self._waiting = 0

    async def changes(self, request: web.Request) -> web.StreamResponse:
        """/changefeed: 200, 400, 503.

        The trail keeps every answer that shows something. An empty one shows nothing and leaves no record, and the record of a read
        is itself no change: nobody who follows the feed is woken by who reads it.
        """
        asked = parse_parameters(raw_parameters(request))
        page = await self._page(asked, asked.since)
        if not page.changes and asked.wait:
            page = await self._wait(request, asked, page)
        if page.changes:
            await self._services.note(request, "changefeed.read", "", since=asked.since, up_to=page.cursor, changes=len(page.changes))
        return _answer({"changes": [change.document() for change in page.changes], "cursor": page.cursor, "more": page.more})

    async def latest(self, request: web.Request) -> web.StreamResponse:
        """/changefeed/latest: 200, 400, 503."""
        if raw_parameters(request):
            raise BadRequest("the latest cursor takes no parameters")
        return _answer({"cursor": await self._services.pool.run(self._feed.latest)})

    async def close(self) -> None:
        """End the watcher's thread."""
        await self._watch.close()

    async def _page(self, asked: Asked, cursor: int) -> Page:
        return await self._services.pool.run(partial(self._feed.since, cursor, limit=asked.limit, kinds=asked.kinds))

    async def _wait(self, request: web.Request, asked: Asked, page: Page) -> Page:
        if self._waiting >= WAITING:
            raise Busy(f"{WAITING} requests wait for changes; try again later, or ask without wait")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + asked.wait
        self._waiting += 1
        try:
            while not page.changes and (left := deadline - loop.time()) > 0 and not self._closing() and request.transport is not None:
                if page.more or await self._watch.news(page.cursor, min(left, _LOOK_S)):
                    page = await self._page(asked, page.cursor)
        finally:
            self._waiting -= 1
        return page


class _Watch:
    """Tells the requests that wait that there is a change; one thread, however many wait, and none at work when nobody does."""

    def __init__(self, feed: ChangeFeed) -> None:
        self._feed = feed
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="changefeed")
        self._task: asyncio.Task[None] | None = None
        self._waiting = 0
        self._seen = 0
        self._newest = 0
        self._news = asyncio.Event()

    async def news(self, cursor: int, within_s: float) -> bool:
        """Wait until there may be a change behind `cursor`; False when the time went by without one."""
        if self._task is None or self._task.done():
            if self._task is not None:
                self._task.result()  # a fault of ours in the watcher ends here, not in silence
            self._seen = self._newest = cursor
            self._task = asyncio.create_task(self._run())
        self._waiting += 1
        try:
            async with asyncio.timeout(within_s):
                while self._newest <= cursor:
                    await self._news.wait()
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1
        return True

    async def close(self) -> None:
        """End task and thread."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self._executor.shutdown)

    async def _run(self) -> None:
        idle = 0
        while idle < 2:  # a request that goes on waiting is between two calls of `news` for a moment
            idle = 0 if self._waiting else idle + 1
            try:
                page = await asyncio.get_running_loop().run_in_executor(self._executor, self._look, self._seen)
            except StorageError as error:
                _log.warning("changefeed.unavailable", extra={"reason": str(error)})
                await asyncio.sleep(_LOOK_S)
                continue
            self._seen = page.cursor
            if page.changes:
                # Who joined with an older cursor than the watcher began with looks once too often, never once too seldom.
                self._newest = page.cursor
                self._news.set()
                self._news = asyncio.Event()
            await asyncio.sleep(_GATHER_S)

    def _look(self, cursor: int) -> Page:
        self._feed.changed(_LOOK_S)
        return self._feed.since(cursor, limit=LIMIT)


def _answer(document: dict[str, Any]) -> web.Response:
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    return web.Response(body=json.dumps(document, separators=(",", ":")).encode("ascii"), headers=headers)
