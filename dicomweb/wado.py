"""WADO-RS: instances, metadata, bulk data and frames out.

What is sent is what is stored; the one conversion is from the uncompressed syntaxes to Explicit VR Little Endian. Every
instance of an answer is opened before its first byte is sent; when one fails later all the same, the connection is closed without the
closing delimiter, so that no client takes a short answer for a whole one.

References
----------
DICOM PS3.18 Section 10.4 Retrieve Transaction
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import struct
import termios
from collections.abc import Callable, Iterator, Sequence

from aiohttp import web

from dicomweb.context import Services, accepted, gathered, instance_url, uid
from dicomweb.dataset import WORD_BYTES, DataSet, swap
from dicomweb.errors import BadRequest, NotAcceptable, NotFound
from dicomweb.frames import compressed_frames, find_pixels, frame_pieces
from dicomweb.metadata import find_bulk, instance_json
from dicomweb.multipart import MultipartWriter
from dicomweb.negotiate import Container, OctetPlan, json_type, plan_instances, plan_octets
from dicomweb.transcode import explicit_little_endian
from storage.errors import StorageError
from storage.part10 import part10_prefix
from storage.records import InstanceRecord
from storage.stored import StoredInstance

_log = logging.getLogger(__name__)
DICOM = "application/dicom"
_FRAME_LIST = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")
_BULK_PATH = re.compile(r"[0-9A-Fa-f]{8}(/[1-9][0-9]{0,6}/[0-9A-Fa-f]{8}){0,64}")
_ALL_FRAMES = 100_000
_SLOWEST = 1024
"""Bytes a second that a client must take."""
Part = tuple[str, Callable[[], Iterator[bytes]]]
"""Content-Type and content of a part of an answer."""


class Retrieve:
    """GET (and HEAD) of studies, series, instances and what is in them."""

    def __init__(self, services: Services) -> None:
        self._services = services

    # --- instances -------------------------------------------------------------------------------------------------------------------

    async def instances(self, request: web.Request) -> web.StreamResponse:
        """Give every instance of a study or series, or the one: 200, 404, 406."""
        services = self._services
        records = await self._records(request)
        single = bool(uid(request, "instance"))
        plan = plan_instances(accepted(request), [record.summary.transfer_syntax_uid for record in records], single=single)
        await services.pool.run(self._openable, records)
        parts = [self._instance(record, target) for record, target in zip(records, plan.transfer_syntax_uids, strict=True)]
        return await self._send(request, plan.container, DICOM, parts)

    def _instance(self, record: InstanceRecord, transfer_syntax_uid: str) -> Part:
        def content() -> Iterator[bytes]:
            summary = record.summary
            with self._services.archive.open(summary.sop_instance_uid) as stored:
                if transfer_syntax_uid == summary.transfer_syntax_uid:
                    yield from stored.part10()
                    return
                yield part10_prefix(
                    sop_class_uid=summary.sop_class_uid,
                    sop_instance_uid=summary.sop_instance_uid,
                    transfer_syntax_uid=transfer_syntax_uid,
                )
                yield from gathered(explicit_little_endian(self._data_set(stored)))

        return f"{DICOM}; transfer-syntax={transfer_syntax_uid}", content

    # --- metadata --------------------------------------------------------------------------------------------------------------------

    async def metadata(self, request: web.Request) -> web.StreamResponse:
        """Give the DICOM JSON of every instance, bulk by URL: 200, 404, 406."""
        services = self._services
        media_type = json_type(accepted(request))
        base = services.base_url(request)
        records = await self._records(request)
        await services.pool.run(self._openable, records)

        def documents() -> Iterator[bytes]:
            for index, record in enumerate(records):
                yield b"[" if index == 0 else b",\n"
                yield self._document(record, base)
            yield b"]"

        return await self._stream(request, media_type, gathered(documents()))

    def _document(self, record: InstanceRecord, base: str) -> bytes:
        summary = record.summary
        own = instance_url(base, summary.study_instance_uid, summary.series_instance_uid, summary.sop_instance_uid)
        with self._services.archive.open(summary.sop_instance_uid) as stored:
            text = instance_json(self._data_set(stored), lambda path: f"{own}/bulkdata/{path}", self._services.limits.inline)
        return text.encode("utf-8", "replace")

    # --- bulk data and frames --------------------------------------------------------------------------------------------------------

    async def bulk_data(self, request: web.Request) -> web.StreamResponse:
        """Give one value that the metadata named by URL: 200, 404, 406."""
        path = request.match_info["path"]
        if not _BULK_PATH.fullmatch(path):
            raise NotFound("no such bulk data; take the BulkDataURI from the metadata as it is")
        (record,) = await self._records(request)
        plan, parts = await self._services.pool.run(self._bulk, request, record, path.split("/"))
        return await self._send(request, plan.container, plan.media_type, parts)

    def _bulk(self, request: web.Request, record: InstanceRecord, path: Sequence[str]) -> tuple[OctetPlan, list[Part]]:
        with self._services.archive.open(record.summary.sop_instance_uid) as stored:
            data_set = self._data_set(stored)
            bulk = find_bulk(data_set, path)
            if bulk.element.length < 0 and len(path) == 1:
                return self._frames(request, record, stored, None)
        plan = plan_octets(
            accepted(request),
            record.summary.transfer_syntax_uid,
            encapsulated=bulk.element.length < 0,
            single=True,
            own_type=bulk.media_type,
        )

        def content(data_set: DataSet) -> Iterator[bytes]:
            element = bulk.element
            # the first fragment is the offset table
            spans = list(data_set.fragments(element.offset))[1:] if element.length < 0 else [(element.offset, element.length)]
            word = WORD_BYTES.get(bulk.vr, 1) if element.order == ">" else 1
            for offset, length in spans:
                for piece in data_set.chunks(offset, length):
                    yield swap(piece, word) if word > 1 else piece

        return plan, [(plan.content_type, self._reading(record, content))]

    async def frames(self, request: web.Request) -> web.StreamResponse:
        """Give the frames of the list in the path, in its order: 200, 400, 404, 406."""
        text = request.match_info["frames"]
        limit = self._services.limits.frame_list
        if not _FRAME_LIST.fullmatch(text):
            raise BadRequest("the frame list is no list of numbers from 1, separated by commas")
        numbers = [int(number) for number in text.split(",")]
        if 0 in numbers or len(numbers) > limit:
            raise BadRequest(f"frames are numbered from 1, and at most {limit} are given at once")
        (record,) = await self._records(request)
        plan, parts = await self._services.pool.run(self._open_frames, request, record, numbers)
        return await self._send(request, plan.container, plan.media_type, parts)

    def _open_frames(self, request: web.Request, record: InstanceRecord, numbers: list[int]) -> tuple[OctetPlan, list[Part]]:
        with self._services.archive.open(record.summary.sop_instance_uid) as stored:
            return self._frames(request, record, stored, numbers)

    def _frames(
        self, request: web.Request, record: InstanceRecord, stored: StoredInstance, numbers: list[int] | None
    ) -> tuple[OctetPlan, list[Part]]:
        """Plan an answer of frames; None means all of them."""
        data_set = self._data_set(stored)
        pixels = find_pixels(data_set)
        if numbers is None and pixels.frames > _ALL_FRAMES:
            raise NotAcceptable(f"more than {_ALL_FRAMES} frames; ask for them by the frames resource")
        wanted = list(range(1, pixels.frames + 1)) if numbers is None else numbers
        if max(wanted) > pixels.frames:
            raise NotFound(f"the instance has {pixels.frames} frame(s)")
        plan = plan_octets(accepted(request), record.summary.transfer_syntax_uid, encapsulated=pixels.encapsulated, single=len(wanted) == 1)
        contents: list[Callable[[DataSet], Iterator[bytes]]]
        if pixels.encapsulated:
            contents = [
                lambda data_set, spans=spans: (piece for span in spans for piece in data_set.chunks(*span))  # type: ignore[misc]
                for spans in compressed_frames(data_set, pixels, wanted)
            ]
        else:
            if pixels.frame_bits * pixels.frames > pixels.element.length * 8 or not pixels.frame_bits:
                raise NotFound("the pixel data are shorter than the frames they should hold")
            contents = [lambda data_set, number=number: frame_pieces(data_set, pixels, number) for number in wanted]  # type: ignore[misc]
        return plan, [(plan.content_type, self._reading(record, content)) for content in contents]

    def _reading(self, record: InstanceRecord, content: Callable[[DataSet], Iterator[bytes]]) -> Callable[[], Iterator[bytes]]:
        def read() -> Iterator[bytes]:
            with self._services.archive.open(record.summary.sop_instance_uid) as stored:
                yield from content(self._data_set(stored))

        return read

    # --- in common -------------------------------------------------------------------------------------------------------------------

    async def _records(self, request: web.Request) -> list[InstanceRecord]:
        study, series, instance = (uid(request, name) for name in ("study", "series", "instance"))
        services = self._services
        records: list[InstanceRecord] = await services.pool.run(services.index.instances, study, series or None, instance or None)
        what = request.path.removeprefix(services.base_path)
        await services.note(request, "instance.retrieved", instance or series or study, resource=what, instances=len(records))
        return records

    def _openable(self, records: Sequence[InstanceRecord]) -> None:
        """Raise now what would otherwise break an answer that has begun."""
        self._services.archive.require_readable(records)

    def _data_set(self, stored: StoredInstance) -> DataSet:
        return DataSet(stored.read, stored.record.summary.transfer_syntax_uid, inflate_bytes=self._services.limits.inflate_bytes)

    async def _send(self, request: web.Request, container: Container, media_type: str, parts: Sequence[Part]) -> web.StreamResponse:
        if container is Container.SINGLE:
            ((content_type, content),) = parts
            return await self._stream(request, content_type, content())
        writer = MultipartWriter(media_type)

        def body() -> Iterator[bytes]:
            for content_type, content in parts:
                yield writer.begin({"Content-Type": content_type})
                yield from content()
            yield writer.end()

        return await self._stream(request, writer.content_type, gathered(body()))

    async def _stream(self, request: web.Request, content_type: str, pieces: Iterator[bytes]) -> web.StreamResponse:
        """Send pieces that blocking code makes. The first is made before the head is sent: its failure still gets an honest status."""
        pool, limits = self._services.pool, self._services.limits
        response = web.StreamResponse(headers={"Content-Type": content_type, "Cache-Control": "private, no-cache"})
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        try:
            piece = await pool.run(next, pieces, b"")
            await response.prepare(request)
            while piece:
                await _write(request, response, piece, limits.idle_s)
                piece = await pool.run(next, pieces, b"")
            await response.write_eof()
        except (StorageError, ConnectionError, TimeoutError) as error:
            if not response.prepared:
                raise
            # Never a short answer that looks whole: neither closing delimiter nor last chunk.
            _log.warning("retrieve.broken_off", extra={"reason": type(error).__name__})
            _hang_up(request)
        except BaseException:
            if response.prepared:
                _hang_up(request)
            raise
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                await pool.run(close)
        return response


async def _write(request: web.Request, response: web.StreamResponse, piece: bytes, idle_s: float) -> None:
    """Write a piece, for as long as the client goes on taking some of it in every idle time.

    How long a piece takes says nothing: the kernel lets us write on only when a good part of its buffer is free, which may be megabytes.

    Raises
    ------
    TimeoutError
        It took less than the slowest rate.
    """
    left = _on_the_way(request) + len(piece)
    writing = asyncio.ensure_future(response.write(piece))
    try:
        while not (await asyncio.wait({writing}, timeout=idle_s))[0]:
            before, left = left, _on_the_way(request)
            if before - left < idle_s * _SLOWEST:
                raise TimeoutError("the client does not read")
        await writing
    finally:
        writing.cancel()


def _on_the_way(request: web.Request) -> int:
    """Bytes of the answer that the client has not acknowledged: in our buffer and in the kernel's."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    (queued,) = struct.unpack("i", fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(queued) + transport.get_write_buffer_size()


def _hang_up(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
