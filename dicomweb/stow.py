"""STOW-RS: instances in.

`StoreSession` is the synchronous half: body bytes in, each part through `storage.part10` into an intake of the archive as it
arrives, one outcome a part. `Store` is the HTTP half: negotiation, deadlines, the answer.

A part is committed when its own closing delimiter has been seen, never before: a body that is cut leaves nothing of the part
that was cut.

References
----------
DICOM PS3.18 Section 10.5 Store Transaction, Annex I Store Instances Response Module
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.client_exceptions import ClientError
from aiohttp.http_exceptions import HttpProcessingError

from dicomweb.context import PIECE, Meter, Services, WebLimits, accepted, client_address, instance_url, uid
from dicomweb.dataset import DataSet, Element
from dicomweb.errors import BadRequest, Busy, Deadline, TooLarge, WebError, WrongMediaType, disk_full
from dicomweb.multipart import MultipartReader, PartBegin, PartData, PartEnd
from dicomweb.negotiate import json_type, parse_media_type
from storage.archive import Intake
from storage.errors import InvalidInstance, StorageError
from storage.part10 import Part10Parser
from storage.records import Announced, Origin, Receipt
from storage.scan import valid_uid

_log = logging.getLogger(__name__)
DICOM = "application/dicom"
_HEAD = 4_096
"""Bytes of a data set that are kept to name it when it is refused: SOP Class and Instance UID come first."""
_PROCESSING_FAILURE = 0x0110
Receive = Callable[..., Intake]


@dataclass(frozen=True, slots=True)
class Stored:
    """One part is durable."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Failed:
    """One part was refused."""

    sop_class_uid: str
    """Empty if it could not be read."""
    sop_instance_uid: str
    reason: int
    """Failure Reason (0008,1197)."""
    text: str
    """Cause and remedy; no patient data."""
    retryable: bool
    disk_full: bool


@dataclass(slots=True)
class _Part:
    parser: Part10Parser
    intake: Intake | None = None
    failure: Failed | None = None
    head: bytes = b""
    byte_count: int = 0


class StoreSession:
    """The parts of one STOW-RS body, from one thread at a time.

    Parameters
    ----------
    receive
        ``Archive.receive``.
    origin
        Who sends.
    boundary
        Of the multipart body; None for a body that is one bare application/dicom file.
    study_instance_uid
        From the path; empty if the path has none.
    """

    def __init__(
        self, *, receive: Receive, origin: Origin, boundary: str | None, study_instance_uid: str, limits: WebLimits, meter: Meter
    ) -> None:
        self._receive = receive
        self._origin = origin
        self._announced = Announced(study_instance_uid=study_instance_uid)
        self._limits = limits
        self._meter = meter
        self._reader = None if boundary is None else MultipartReader(boundary, limits.multipart)
        self._part: _Part | None = None
        self._byte_count = 0
        self.outcomes: list[Stored | Failed] = []

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body.

        Raises
        ------
        BadRequest, TooLarge
            The body cannot be understood or exceeds a limit. What `outcomes` says is stored stays stored.
        """
        if not chunk:
            return
        self._byte_count += len(chunk)
        if self._byte_count > self._limits.body_bytes:
            raise TooLarge(f"the body is longer than {self._limits.body_bytes} bytes; send the instances in several requests")
        if self._reader is None:
            if self._part is None:
                self._begin({})
            self._data(memoryview(chunk))
            return
        for event in self._reader.feed(chunk):
            match event:
                case PartBegin(headers=headers):
                    self._begin(headers)
                case PartData(data=data):
                    self._data(data)
                case PartEnd():
                    self._end()

    def finish(self) -> None:
        """Declare the body complete.

        Raises
        ------
        BadRequest
            It is empty, was cut, or holds no part.
        """
        if self._reader is None:
            if self._part is None:
                raise BadRequest("the body is empty")
            self._end()
            return
        self._reader.finish()
        if not self.outcomes:
            raise BadRequest("the multipart body holds no part")

    def abort(self) -> None:
        """Give up the part that is open; what is stored stays."""
        part, self._part = self._part, None
        if part is not None and part.intake is not None:
            part.intake.abort()

    def _begin(self, headers: Any) -> None:
        self._part = _Part(Part10Parser())
        try:
            fits = parse_media_type(headers.get("content-type", DICOM)).name == DICOM
        except BadRequest:
            fits = False
        if not fits:
            self._fail(self._part, InvalidInstance("the Content-Type of this part is not application/dicom"))
        elif headers.get("content-transfer-encoding", "binary").lower() not in {"binary", "8bit"}:
            self._fail(self._part, InvalidInstance("the Content-Transfer-Encoding of this part is not binary"))

    def _data(self, data: memoryview) -> None:
        part = self._part
        if part is None or part.failure is not None:
            return
        try:
            for piece in part.parser.feed(data):
                if part.intake is None:
                    part.intake = self._receive(
                        self._origin, transfer_syntax_uid=part.parser.transfer_syntax_uid or "", announced=self._announced
                    )
                if len(part.head) < _HEAD:
                    part.head += bytes(piece[: _HEAD - len(part.head)])
                part.byte_count += len(piece)
                part.intake.write(piece)
        except StorageError as error:
            self._fail(part, error)

    def _end(self) -> None:
        part, self._part = self._part, None
        if part is None:
            return
        if part.failure is None:
            try:
                part.parser.finish()
                if part.intake is None:
                    raise InvalidInstance("the file holds no data set")
                receipt = part.intake.commit()
            except StorageError as error:
                self._fail(part, error)
            else:
                self.outcomes.append(Stored(receipt))
                part.intake.settle()
                self._meter.instance(door="dicomweb", outcome=receipt.outcome.value, byte_count=part.byte_count)
                return
        if part.failure is not None:
            self.outcomes.append(part.failure)
            reason = f"0x{part.failure.reason:04X} {part.failure.text}"
            _log.warning("instance.refused", extra={"peer": self._origin.address, "reason": reason})
            self._meter.instance(door="dicomweb", outcome=f"0x{part.failure.reason:04X}")

    def _fail(self, part: _Part, error: StorageError) -> None:
        sop_class_uid, sop_instance_uid = _identity(part)
        part.failure = Failed(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            reason=error.failure_reason,
            text=str(error),
            retryable=error.retryable,
            disk_full=error.retryable and disk_full(error),
        )
        part.head = b""
        if part.intake is not None:
            part.intake.abort()


def _identity(part: _Part) -> tuple[str, str]:
    """SOP Class and Instance UID of a refused part: from the data set as far as it is readable, else from its file meta information."""
    found = {0x00080016: part.parser.announced.sop_class_uid, 0x00080018: part.parser.announced.sop_instance_uid}
    head = part.head
    with suppress(InvalidInstance):
        data_set = DataSet(lambda offset, length: head[offset : offset + length], part.parser.transfer_syntax_uid or "")
        for event in data_set.walk():
            if not isinstance(event, Element) or event.tag > 0x00080018:
                break
            if event.tag in found and 0 < event.length <= 64:
                found[event.tag] = data_set.read(event.offset, event.length).decode("latin-1").strip("\0 ")
    sop_class_uid, sop_instance_uid = found.values()
    return (sop_class_uid, sop_instance_uid) if valid_uid(sop_class_uid) and valid_uid(sop_instance_uid) else ("", "")


def response_module(outcomes: Sequence[Stored | Failed], base: str) -> dict[str, Any]:
    """Build the Store Instances Response Module in DICOM JSON (PS3.18 Annex I.2).

    The reason for people is in Error Comment (0000,0902), where other archives put it too, cut to the 64 characters of its VR, and
    whole in a private element whose creator is DICOM_NODE.
    """
    stored = [outcome.receipt for outcome in outcomes if isinstance(outcome, Stored)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    studies = {receipt.study_instance_uid for receipt in stored}
    document: dict[str, Any] = {"00081190": {"vr": "UR"}}
    if len(studies) == 1:
        document["00081190"]["Value"] = [instance_url(base, *studies)]
    named = [outcome for outcome in failed if outcome.sop_instance_uid]
    unnamed = [outcome for outcome in failed if not outcome.sop_instance_uid]
    if named:
        items = [_reference(one.sop_class_uid, one.sop_instance_uid) | _why(one) for one in named]
        document["00081198"] = {"vr": "SQ", "Value": items}
    if stored:
        document["00081199"] = {"vr": "SQ", "Value": [_success(receipt, base) for receipt in stored]}
    if unnamed:
        document["0008119A"] = {"vr": "SQ", "Value": [_why(one) for one in unnamed]}
    return document


def _reference(sop_class_uid: str, sop_instance_uid: str) -> dict[str, Any]:
    return {"00081150": {"vr": "UI", "Value": [sop_class_uid]}, "00081155": {"vr": "UI", "Value": [sop_instance_uid]}}


def _success(receipt: Receipt, base: str) -> dict[str, Any]:
    url = instance_url(base, receipt.study_instance_uid, receipt.series_instance_uid, receipt.sop_instance_uid)
    item = {**_reference(receipt.sop_class_uid, receipt.sop_instance_uid), "00081190": {"vr": "UR", "Value": [url]}}
    if receipt.warnings:
        text = "; ".join(receipt.warnings)
        item["00081196"] = {"vr": "US", "Value": [0xB007]}  # Data Set does not match SOP Class, stored nevertheless
        item |= _comment(text)
    return item


def _why(failed: Failed) -> dict[str, Any]:
    return {"00081197": {"vr": "US", "Value": [failed.reason]}, **_comment(failed.text)}


def _comment(text: str) -> dict[str, Any]:
    short = text if len(text) <= 64 else text[:63] + "…"
    return {
        "00000902": {"vr": "LO", "Value": [short.replace("\\", "/")]},
        "00090010": {"vr": "LO", "Value": ["DICOM_NODE"]},
        "00091001": {"vr": "UT", "Value": [text]},
    }


def status_of(outcomes: Sequence[Stored | Failed]) -> int:
    """HTTP status of a body that was understood (PS3.18 Table 10.5.3-1)."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    if len(failed) < len(outcomes):
        warned = any(outcome.receipt.warnings for outcome in outcomes if isinstance(outcome, Stored))
        return 202 if failed or warned else 200
    if all(outcome.retryable for outcome in failed):
        return 507 if any(outcome.disk_full for outcome in failed) else 503
    return 409


class Store:
    """POST studies, POST studies/{study}."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._uploads = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Store every part of the body; the answer names each.

        Answers 200, 202, 409 with the Store Instances Response Module; 503 or 507 with it when nothing could be stored now; 400, 406,
        408, 413, 415 with a problem document, which says in ``stored`` what of the body is durable nevertheless.
        """
        services = self._services
        study = uid(request, "study")
        media_type = json_type(accepted(request))  # before anything is stored
        boundary = _boundary(request)
        base = services.base_url(request)
        if (request.content_length or 0) > services.limits.body_bytes:
            raise TooLarge(f"the body is longer than {services.limits.body_bytes} bytes; send the instances in several requests")
        if self._uploads >= services.limits.uploads:
            raise Busy(f"{services.limits.uploads} uploads are running; try again later")
        origin = Origin(
            door="dicomweb",
            received_at=services.clock(),
            address=client_address(request, trusted_proxy=services.trusted_proxy),
            called_ae_title=services.node_ae_title,
        )
        session = StoreSession(
            receive=services.archive.receive,
            origin=origin,
            boundary=boundary,
            study_instance_uid=study,
            limits=services.limits,
            meter=services.meter,
        )
        self._uploads += 1
        try:
            await self._receive(request, session)
        except WebError as error:
            if any(isinstance(outcome, Stored) for outcome in session.outcomes):
                error.extra["stored"] = response_module(session.outcomes, base)
            raise
        finally:
            self._uploads -= 1
            await services.pool.run(session.abort)
        status = status_of(session.outcomes)
        return web.Response(
            status=status,
            body=json.dumps(response_module(session.outcomes, base), ensure_ascii=False).encode(),
            headers={"Content-Type": media_type} | ({"Retry-After": "30"} if status in {503, 507} else {}),
        )

    async def _receive(self, request: web.Request, session: StoreSession) -> None:
        pool, limits = self._services.pool, self._services.limits
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limits.receive_s
        held: list[bytes] = []
        length = 0
        while True:
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + limits.idle_s)):
                    chunk = await request.content.readany()
            except TimeoutError as error:
                raise Deadline(f"the body did not arrive within {limits.receive_s:g} s, or paused for {limits.idle_s:g} s") from error
            except (ClientError, HttpProcessingError, web.RequestPayloadError, ConnectionError, EOFError) as error:
                raise BadRequest("the body broke off or its transfer coding is malformed") from error
            if chunk:
                held.append(chunk)
                length += len(chunk)
            if length >= PIECE or not chunk:
                await pool.run(session.feed, b"".join(held))
                held, length = [], 0
            if not chunk and request.content.at_eof():
                await pool.run(session.finish)
                return


def _boundary(request: web.Request) -> str | None:
    """Boundary of the multipart body, None for a single part.

    Raises
    ------
    WrongMediaType
        The body is neither multipart/related of application/dicom nor application/dicom.
    BadRequest
        There is no boundary.
    """
    on_offer = 'send multipart/related; type="application/dicom"; boundary=…, or application/dicom'
    try:
        media = parse_media_type(request.headers.get("Content-Type", ""))
    except BadRequest as error:
        raise WrongMediaType(f"missing or malformed Content-Type; {on_offer}") from error
    if media.name == DICOM:
        return None
    if media.name != "multipart/related" or media.parameter("type").lower() not in {DICOM, ""}:
        raise WrongMediaType(f"this media type is not taken; {on_offer}")
    if not media.parameter("boundary"):
        raise BadRequest("the Content-Type has no boundary parameter")
    return media.parameter("boundary")
