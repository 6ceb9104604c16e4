"""Webhooks: the change feed taken to those who want to be told, signed, in order, at least once.

A subscriber gets one request at a time; the next follows when it has answered 2xx, and only then does its cursor move. What it did not
answer is sent again, so it may see a change twice (the same `cursor`), and never misses one. Of all nodes one sends to a subscriber at a
time (a duty); should two overlap, the one that was overtaken moves no cursor.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import aiohttp
import structlog

from dicom_node.config import is_loopback
from storage.changes import KINDS, ChangeFeed, Page, Subscriber, Subscribers
from storage.duties import Duties
from storage.errors import LeaseLost, StorageError
from storage.failpoints import unarmed
from storage.work import growing_delay

if TYPE_CHECKING:
    from storage.audit import AuditTrail
    from storage.database import Database

T = TypeVar("T")

log = structlog.get_logger(__name__)

DELIVERY = "Dicom-Node-Delivery"
"""Header: subscriber, and the cursors between which the changes lie."""
TIMESTAMP = "Dicom-Node-Timestamp"
"""Header: seconds since 1970 when this attempt was signed."""
SIGNATURE = "Dicom-Node-Signature"
"""Header: ``v1=`` and the hexadecimal HMAC-SHA256 of timestamp, full stop and body; one for each secret, with commas."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_STAMP = re.compile(r"[0-9]{1,12}")
_SECRET_CHARACTERS = 32
_FAR = 1000
"""Records of no interest after which the cursor is noted although nothing was sent."""


class BadSignature(Exception):
    """The request was not signed with one of our secrets, or not lately: answer 401 and do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A subscriber, as configured.

    Raises
    ------
    ValueError
        A value cannot be; the message begins with the name of the field.
    """

    name: str
    """Letters, digits, ``-`` and ``_``. The cursor is kept under this name."""
    url: str
    """https; http only on this machine."""
    secrets: tuple[str, ...] = field(repr=False)
    """One, or two while the one is replaced by the other; every request is signed with each."""
    kinds: frozenset[str] = KINDS
    ca_file: Path | None = None
    """Certificates that its own is checked against; those of the system without it."""
    from_beginning: bool = False
    """Whether a new subscriber is told all that ever happened, or only what happens from now on."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError("name: use 1 to 64 letters, digits, - and _")
        parts = _split(self.url)
        if not parts.hostname or parts.scheme not in {"http", "https"} or parts.username is not None or parts.fragment:
            raise ValueError("url: write https://host[:port]/path, without user name and fragment")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError("url: changes leave this machine by https alone")
        if not 1 <= len(self.secrets) <= 2 or any(len(secret) < _SECRET_CHARACTERS for secret in self.secrets):
            raise ValueError(
                f"secrets: give one, or two during a change, of {_SECRET_CHARACTERS} characters or more (openssl rand -hex 32)"
            )
        if not self.kinds or not self.kinds <= KINDS:
            raise ValueError(f"kinds: there are {', '.join(sorted(KINDS))}")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is only looked at when it is asked for
    except ValueError as error:
        raise ValueError(f"url: {error}") from error
    return parts


def sign(body: bytes, *, timestamp: str, secrets: Sequence[str]) -> str:
    """Return the value of the header `SIGNATURE`."""
    return ",".join(f"v1={_mac(body, timestamp, secret)}" for secret in secrets)


def verify_signature(
    body: bytes, *, timestamp: str, signature: str, secrets: Sequence[str], max_age_s: float = 300.0, now: float | None = None
) -> None:
    """Check, as a receiver, that a request comes from a node that has one of `secrets`, and was signed lately.

    Parameters
    ----------
    body
        As it came, byte for byte.
    timestamp, signature
        Values of the headers `TIMESTAMP` and `SIGNATURE`; empty when they are missing.
    max_age_s
        Seconds by which the timestamp may differ from `now`, in either direction.
    now
        Seconds since 1970; the time of day without it.

    Raises
    ------
    BadSignature
        It does not, or was not.
    """
    given = [part.strip().removeprefix("v1=") for part in signature.split(",") if part.strip().startswith("v1=")]
    if not _STAMP.fullmatch(timestamp) or not given:
        raise BadSignature(f"the headers {TIMESTAMP} and {SIGNATURE} are missing or malformed")
    # Every pair is compared, so that the time tells nothing about which one fits.
    fits = [hmac.compare_digest(_mac(body, timestamp, secret).encode(), one.encode()) for secret in secrets for one in given[:4]]
    if not any(fits):
        raise BadSignature("the request was not signed with a secret that is known here")
    if abs((time.time() if now is None else now) - int(timestamp)) > max_age_s:
        raise BadSignature(f"the signature is not of the last {max_age_s:g} s: a replay, or a clock is wrong")


def _mac(body: bytes, timestamp: str, secret: str) -> str:
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Means:
    """What every line of a sender works with."""

    feed: ChangeFeed
    subscribers: Subscribers
    duties: Duties
    clock: Callable[[], datetime]
    timeout_s: float
    batch: int
    delay: Callable[[int], float]
    lease_s: float
    reach: Callable[[str], None]
    observe: Callable[..., None]


class _News:
    """Wakes all lines at once. Who takes the mark before it looks, and waits for that mark, misses nothing."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def mark(self) -> asyncio.Event:
        """Return what the next news will set."""
        return self._event

    def tell(self) -> None:
        """There is news."""
        event, self._event = self._event, asyncio.Event()
        event.set()


class _Line:
    """Serves one subscriber."""

    def __init__(self, webhook: Webhook, means: _Means, pool: ThreadPoolExecutor, news: _News) -> None:
        self._webhook = webhook
        self._means = means
        self._pool = pool
        self._news = news
        self._duty = f"webhook {webhook.name}"
        self._held_since: float | None = None  # monotonic; None while another process may hold the duty
        self._looked = (0, 0)  # the cursor that was read, and up to where nothing of interest follows it
        self._session: aiohttp.ClientSession | None = None

    async def serve(self) -> None:
        """Send for ever."""
        while True:
            mark = self._news.mark()
            try:
                if not await self._hold():
                    await asyncio.sleep(self._means.lease_s / 4)
                    continue
                pause = await self._step()
            except LeaseLost as error:
                log.warning("webhook.lease_lost", subscriber=self._webhook.name, reason=str(error))
                self._held_since, pause = None, 0.0
            except StorageError as error:
                log.warning("webhook.storage_unavailable", subscriber=self._webhook.name, reason=str(error))
                pause = 1.0
            if pause:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await mark.wait()

    async def close(self) -> None:
        """Close the connection, and leave the duty to others."""
        await self._hang_up()
        if self._held_since is None:
            return
        try:
            await self._in_thread(self._means.duties.finish, self._duty, every_s=0.0, outcome="stopped")
        except StorageError as error:
            log.warning("webhook.duty_kept", subscriber=self._webhook.name, reason=str(error))

    async def _in_thread(self, work: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *arguments, **keywords))

    async def _hold(self) -> bool:
        """Take the duty, or renew it in good time; False while another process has it."""
        now = time.monotonic()
        if self._held_since is None or now - self._held_since > self._means.lease_s / 4:
            duty = await self._in_thread(self._means.duties.take, self._duty, every_s=0.0)
            self._held_since = None if duty is None else now
        return self._held_since is not None

    async def _step(self) -> float:
        """Send what is next, if anything; return for how many seconds there is nothing to do unless there is news."""
        means, webhook = self._means, self._webhook
        rest = means.lease_s / 4
        subscriber = await self._in_thread(means.subscribers.find, webhook.name, from_beginning=webhook.from_beginning)
        if (left := self._due_in(subscriber)) > 0:
            return min(left, rest)
        read, looked = self._looked
        cursor = looked if read == subscriber.cursor else subscriber.cursor
        page = await self._in_thread(means.feed.since, cursor, limit=means.batch, kinds=webhook.kinds)
        if page.changes:
            means.reach("webhook.claimed")
            await self._deliver(subscriber, page)
        else:
            self._looked = (subscriber.cursor, page.cursor)
            if page.cursor - subscriber.cursor >= _FAR:
                await self._in_thread(means.subscribers.advance, subscriber, page.cursor)
        return 0.0 if page.more else rest

    def _due_in(self, subscriber: Subscriber) -> float:
        """Seconds until a failed attempt may be made again; a time that no delay gives is the work of a wrong clock, and counts as due."""
        if not subscriber.failures:
            return 0.0
        left = (subscriber.due_at - self._means.clock()).total_seconds()
        return 0.0 if left > 2 * self._means.delay(subscriber.failures) else left

    async def _deliver(self, subscriber: Subscriber, page: Page) -> None:
        means, name = self._means, self._webhook.name
        began = time.monotonic()
        problem = await self._post(page)
        if problem:
            await self._hang_up()  # the next attempt looks up name and certificates again
            failures = subscriber.failures + 1
            pause = means.delay(failures)
            means.observe("webhook.failed", subscriber=name, failures=failures)
            log.warning("webhook.failed", subscriber=name, failures=failures, reason=problem, again_in_s=round(pause, 1))
            await self._in_thread(means.subscribers.fail, subscriber, problem, after_s=pause)
            return
        means.reach("webhook.answered")
        await self._in_thread(means.subscribers.advance, subscriber, page.cursor, changes=len(page.changes))
        means.reach("webhook.advanced")
        means.observe("webhook.delivered", subscriber=name, changes=len(page.changes), seconds=time.monotonic() - began)
        log.info("webhook.delivered", subscriber=name, changes=len(page.changes), cursor=page.cursor)

    async def _post(self, page: Page) -> str:
        """Make one request; return why it failed, nothing when it did not. What the receiver writes into its answer is not read."""
        webhook = self._webhook
        document = {"subscriber": webhook.name, "changes": [change.document() for change in page.changes], "cursor": page.cursor}
        body = json.dumps(document, separators=(",", ":")).encode("ascii")
        timestamp = str(int(self._means.clock().timestamp()))
        headers = {
            DELIVERY: f"{webhook.name}/{page.changes[0].cursor}-{page.changes[-1].cursor}",
            TIMESTAMP: timestamp,
            SIGNATURE: sign(body, timestamp=timestamp, secrets=webhook.secrets),
        }
        try:
            session = self._open()
            async with session.post(webhook.url, data=body, headers=headers, allow_redirects=False) as response:
                status = response.status
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError, SSLError too
            said = f": {error}" if str(error) else ""
            return f"no answer ({type(error).__name__}{said})"[:300]
        if 200 <= status < 300:
            return ""
        redirected = "; redirects are not followed: configure the URL where it leads" if 300 <= status < 400 else ""
        return f"the receiver answered {status} instead of 2xx{redirected}"

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = ssl.create_default_context(cafile=self._webhook.ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, ssl=context),
                timeout=aiohttp.ClientTimeout(total=self._means.timeout_s),  # absolute: a receiver that drips bytes ends too
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"User-Agent": "dicom-node", "Content-Type": "application/json"},
            )
        return self._session

    async def _hang_up(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def unobserved(event: str, **labels: Any) -> None:
    """Observe nothing."""


class WebhookSender:
    """Sends.

    Parameters
    ----------
    database, audit
        Where feed and cursors are; the audit trail keeps what left the house.
    webhooks
        To whom.
    holder
        Who this is among all processes of all nodes.
    timeout_s
        For a whole request, from looking up the name to the head of the answer.
    batch
        Most changes of one request.
    delay
        Attempts in a row that failed -> seconds to the next.
    poll_s
        What happens within this time goes together.
    lease_s
        After this time without a sign another process takes over from one that died; more than `timeout_s`.
    reach
        Failpoints: webhook.claimed, webhook.answered, webhook.advanced.
    observe
        Told ``webhook.delivered`` (subscriber, changes, seconds), ``webhook.failed`` (subscriber, failures).

    Raises
    ------
    ValueError
        Two webhooks of one name, or a lease that is no longer than a request.
    """

    def __init__(
        self,
        *,
        database: Database,
        audit: AuditTrail,
        webhooks: Sequence[Webhook],
        holder: str,
        timeout_s: float = 30.0,
        batch: int = 100,
        delay: Callable[[int], float] = growing_delay,
        poll_s: float = 0.2,
        lease_s: float = 90.0,
        reach: Callable[[str], None] = unarmed,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        if len({webhook.name for webhook in webhooks}) != len(webhooks):
            raise ValueError("two webhooks have the same name")
        if lease_s < 2 * timeout_s:
            raise ValueError("lease_s must be twice timeout_s at least, or a slow receiver would lose us the lease")
        self._database = database
        self._webhooks = tuple(webhooks)
        self._poll_s = poll_s
        self._means = _Means(
            feed=ChangeFeed(database=database),
            subscribers=Subscribers(database=database, audit=audit),
            duties=Duties(database=database, holder=holder, lease_s=lease_s),
            clock=database.clock,
            timeout_s=timeout_s,
            batch=batch,
            delay=delay,
            lease_s=lease_s,
            reach=reach,
            observe=observe,
        )

    def run(self, stop: threading.Event) -> None:
        """Send until `stop` is set. A request under way is broken off then, and made again by whoever sends next."""
        if not self._webhooks:
            stop.wait()
            return
        with ThreadPoolExecutor(4, thread_name_prefix="webhooks") as pool, ThreadPoolExecutor(1, thread_name_prefix="webhooks") as watcher:
            asyncio.run(self._run(stop, pool, watcher))

    async def _run(self, stop: threading.Event, pool: ThreadPoolExecutor, watcher: ThreadPoolExecutor) -> None:
        news = _News()
        lines = [_Line(webhook, self._means, pool, news) for webhook in self._webhooks]
        tasks = [asyncio.create_task(line.serve()) for line in lines]
        tasks.append(asyncio.create_task(self._watch(news, watcher)))
        try:
            while not stop.is_set():
                done, _ = await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # they end by a fault of ours alone
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for line in lines:
                await line.close()

    async def _watch(self, news: _News, watcher: ThreadPoolExecutor) -> None:
        while True:
            try:
                changed = await asyncio.get_running_loop().run_in_executor(watcher, self._database.changed, 0.3)
            except StorageError as error:
                log.warning("webhook.storage_unavailable", reason=str(error))
                await asyncio.sleep(1.0)
                continue
            if changed:
                news.tell()
                await asyncio.sleep(self._poll_s)
