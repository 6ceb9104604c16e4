"""StowClient: the node as a user agent of STOW-RS.

References
----------
DICOM PS3.18 Section 10.5 Store Transaction
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

BATCH = 10
"""Instances in one request: few enough that progress shows and a cut costs little."""

FAILURE_MEANINGS = {
    0xA700: "out of resources, try again later",
    0xA900: "data set does not match its SOP class or the study in the URL",
    0xC000: "cannot understand",
    0xC122: "transfer syntax not supported",
    0x0110: "processing failure",
    0x0111: "same SOP Instance UID with other content is stored there",
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
}


class Uploadable(Protocol):
    """An instance that can be read as a Part 10 file."""

    @property
    def sop_instance_uid(self) -> str:
        """SOP Instance UID (0008,0018)."""

    def part10(self) -> Iterator[bytes]:
        """The file, chunk by chunk."""


@dataclass(frozen=True, slots=True)
class StowAnswer:
    """What the origin server said of one instance; ``failure_reason`` is 0 when it was stored."""

    sop_instance_uid: str
    failure_reason: int
    text: str


class StowError(Exception):
    """The request as a whole failed: unreachable, refused, or not understood; the message says what to do."""


class StowClient:
    """Stores instances at ``{base_url}/studies``.

    Parameters
    ----------
    base_url
        http or https URL ending before ``/studies``.
    timeout_s
        Longest silence of the server.
    """

    def __init__(self, *, base_url: str, timeout_s: float = 60.0) -> None:
        self._url = base_url.rstrip("/") + "/studies"
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=timeout_s)

    async def store(self, instances: Sequence[Uploadable], progress: Callable[[int, int | None], None]) -> list[StowAnswer]:
        """Store all, in requests of a few instances each.

        Raises
        ------
        StowError
            A request failed as a whole; what earlier ones stored stays stored, and storing again is harmless.
        """
        answers: list[StowAnswer] = []
        async with aiohttp.ClientSession(timeout=self._timeout) as session:
            for start in range(0, len(instances), BATCH):
                batch = instances[start : start + BATCH]
                answers += await self._request(session, batch)
                progress(len(answers), len(instances))
        return answers

    async def _request(self, session: aiohttp.ClientSession, batch: Sequence[Uploadable]) -> list[StowAnswer]:
        boundary = f"dicom-node-{secrets.token_hex(16)}"
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
        }
        try:
            async with session.post(self._url, data=_body(batch, boundary), headers=headers) as response:
                text = await response.text()
                status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StowError(f"{self._url}: {str(error) or 'no answer in time'}; check the URL and that the server runs") from error
        if status not in {200, 202, 409}:
            raise StowError(f"{self._url}: answered {status}: {text[:300]}")
        try:
            return _answers(json.loads(text), batch)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            text = f"{self._url}: answered {status} with a body that is no STOW-RS response; is this a DICOMweb server?"
            raise StowError(text) from error


async def _body(batch: Sequence[Uploadable], boundary: str) -> AsyncIterator[bytes]:
    for instance in batch:
        yield f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode("ascii")
        chunks = instance.part10()
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode("ascii")


def _answers(body: dict[str, Any], batch: Sequence[Uploadable]) -> list[StowAnswer]:
    said: dict[str, StowAnswer] = {}
    for item in body.get("00081199", {}).get("Value", []):
        uid = item["00081155"]["Value"][0]
        said[uid] = StowAnswer(uid, 0, "stored")
    for item in body.get("00081198", {}).get("Value", []):
        uid = item["00081155"]["Value"][0]
        reason = int(item["00081197"]["Value"][0])
        comment = item.get("00000902", {}).get("Value", [""])[0]
        text = f"refused, 0x{reason:04X} {comment or FAILURE_MEANINGS.get(reason, 'no known reason')}"
        said[uid] = StowAnswer(uid, reason, text)
    unnamed = "refused, the server named no reason"
    uids = [instance.sop_instance_uid for instance in batch]
    return [said.get(uid) or StowAnswer(uid, 0xC000, unnamed) for uid in uids]
