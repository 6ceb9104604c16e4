"""Intake: one instance on its way in. Scanned, digested and sealed as it streams; nothing of it is ever whole in memory.

OPEN takes bytes, COMMITTED gave its receipt, CLOSED was refused or given up; there is no way back. A landing file exists in OPEN only.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from storage.envelope import Sealer
from storage.errors import MismatchedInstance, StorageError, UnsupportedInstance
from storage.records import Announced, InstanceRecord, Limits, Origin, Receipt, SealedObject, Summary
from storage.scan import DataSetScanner

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

    from storage.envelope import Segments
    from storage.landing import Landing, LandingFile
    from storage.study_keys import StudyKey, StudyKeys

_log = logging.getLogger(__name__)


class IntakeState(StrEnum):
    """Life of an intake."""

    OPEN = "open"
    COMMITTED = "committed"
    CLOSED = "closed"


class Vessel:
    """What the next instance is taken into: a landing file, and the sealer that writes to it. Made before anything is known of it.

    Parameters
    ----------
    landing, segments
        Where the file is made, and memory for the sealer.

    Raises
    ------
    Unavailable
        The disk takes nothing.
    """

    __slots__ = ("file", "sealer")

    def __init__(self, landing: Landing, segments: Segments) -> None:
        self.file = landing.create()
        try:
            self.sealer = Sealer(secrets.token_hex(16), self.file.write, segments)
        except BaseException:
            self.file.discard()
            raise

    def discard(self) -> None:
        """Remove it; for one that was not used."""
        self.file.discard()


class Intake:
    """Takes the data set bytes of one instance, chunk by chunk. Made by ``Archive.receive``; usable from one thread at a time.

    A context manager: leaving it without ``commit`` gives the instance up. After any error the intake is closed and its landing
    file is gone; after ``commit`` it goes with ``settle``, or on leaving.
    """

    def __init__(
        self,
        *,
        origin: Origin,
        role: str,
        transfer_syntax_uid: str,
        announced: Announced,
        limits: Limits,
        study_keys: StudyKeys,
        vessel: Callable[[], Vessel],
        accept_sop_class: Callable[[str], bool],
        report: Mapping[str, Any] | None,
        admit: Callable[[InstanceRecord, LandingFile, StudyKey], Receipt],
        refused: Callable[[Origin, Announced, StorageError], None],
        reach: Callable[[str], None],
    ) -> None:
        self._origin = origin
        self._role = role
        self._announced = announced
        self._study_keys = study_keys
        self._accept_sop_class = accept_sop_class
        self._report = report
        self._admit = admit
        self._refused = refused
        self._reach = reach
        self._state = IntakeState.OPEN
        self._touched = False
        made: Vessel | None = None
        try:
            made = vessel()
            self._scanner = DataSetScanner(transfer_syntax_uid, limits)
        except StorageError as error:
            self._state = IntakeState.CLOSED
            if made is not None:
                made.discard()
            refused(origin, announced, error)
            raise
        self._file, self._sealer = made.file, made.sealer
        reach("intake.opened")

    @property
    def state(self) -> IntakeState:
        """Where in its life the intake is."""
        return self._state

    def write(self, chunk: Buffer) -> None:
        """Take the next bytes of the data set, as many or few as there are.

        Raises
        ------
        InvalidInstance, UnsupportedInstance
            As soon as the scanner knows that the bytes are no acceptable data set.
        Unavailable
            The disk takes no more bytes.
        """
        self._require_open()
        try:
            self._file.reserve(memoryview(chunk).nbytes)
            self._scanner.feed(chunk)
            self._sealer.update(chunk)
        except StorageError as error:
            self._close(error)
            raise
        except BaseException:
            self.abort()
            raise
        if not self._touched:
            self._touched = True
            self._reach("intake.first_chunk")

    def commit(self) -> Receipt:
        """End the data set, make it durable, admit it. Only the returned receipt allows a door to answer Success.

        Raises
        ------
        InvalidInstance
            The framing does not end here, or what the data set says of itself does not fit.
        MismatchedInstance
            It is not the instance that was announced.
        UnsupportedInstance
            Its SOP class is not accepted.
        ConflictingInstance
            The same SOP Instance UID is archived with other content.
        Unavailable
            Disk, store or database could not take it; nothing was promised, send again.
        """
        self._require_open()
        try:
            record, study_key = self.seal()
            receipt = self._admit(record, self._file, study_key)
        except StorageError as error:
            self._close(error)
            raise
        except BaseException:
            self.abort()
            raise
        self._state = IntakeState.COMMITTED
        self._file.release()
        self._reach("receipt.ready")
        return receipt

    def settle(self) -> None:
        """Remove what the store did not take of the landing file of an instance that was committed; nothing else. It can wait."""
        if self._state is IntakeState.COMMITTED:
            self._file.discard()

    def seal(self) -> tuple[InstanceRecord, StudyKey]:
        """End the data set and seal it under its study's key; the first half of `commit`."""
        self._require_open()
        summary = self._scanner.finish()
        self._compare(summary)
        footer = record_to_footer(summary, self._origin, self._role, report=self._report)
        study_key = self._study_keys.current(summary.study_instance_uid)
        sealed = self._sealer.finish(footer, study_key, self._study_keys)
        self._reach("intake.sealed")
        return InstanceRecord(summary=summary, sealed=sealed, origin=self._origin, role=self._role), study_key

    @property
    def landing_file(self) -> LandingFile:
        """Where the sealed bytes lie."""
        return self._file

    def abort(self) -> None:
        """Give the instance up: the landing file is removed, nothing is recorded. No error when there is nothing to give up."""
        if self._state is IntakeState.OPEN:
            self._state = IntakeState.CLOSED
            self._file.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()
        self.settle()

    def _require_open(self) -> None:
        if self._state is not IntakeState.OPEN:
            raise RuntimeError(f"this intake is {self._state}; receive() gives a new one for each instance")

    def _close(self, error: StorageError) -> None:
        self.abort()
        self._refused(self._origin, self._announced, error)

    def _compare(self, summary: Summary) -> None:
        """Compare the data set with what was announced; an instance is stored under neither identity when they differ."""
        for name, said, found in (
            ("SOP Class UID", self._announced.sop_class_uid, summary.sop_class_uid),
            ("SOP Instance UID", self._announced.sop_instance_uid, summary.sop_instance_uid),
            ("Study Instance UID", self._announced.study_instance_uid, summary.study_instance_uid),
        ):
            if said and said != found:
                raise MismatchedInstance(f"the {name} of the data set is not the announced one; the sender must send them alike")
        if not self._accept_sop_class(summary.sop_class_uid):
            raise UnsupportedInstance(
                f"SOP class {summary.sop_class_uid} is not accepted here; allow unknown SOP classes in the configuration if it should be",
            )


def record_to_footer(summary: Summary, origin: Origin, role: str, *, report: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what the encrypted footer of an object keeps, so that the index can be rebuilt from the store alone.

    `report`, of a report made here: ``source_sop_instance_uid``, ``kind``, ``models`` and ``deliver_to``.
    """
    return {
        "version": 1,
        "role": role,
        **({"report": dict(report)} if report else {}),
        "origin": {
            "door": origin.door,
            "received_at": origin.received_at.isoformat(),
            "address": origin.address,
            "calling_ae_title": origin.calling_ae_title,
            "called_ae_title": origin.called_ae_title,
            "peer": origin.peer,
            **({"user": origin.user} if origin.user else {}),
        },
        "summary": {
            "sop_class_uid": summary.sop_class_uid,
            "sop_instance_uid": summary.sop_instance_uid,
            "study_instance_uid": summary.study_instance_uid,
            "series_instance_uid": summary.series_instance_uid,
            "transfer_syntax_uid": summary.transfer_syntax_uid,
            "byte_count": summary.byte_count,
            "sha256": summary.sha256,
            "attributes": {keyword: list(values) for keyword, values in summary.attributes.items()},
            "specific_character_set": list(summary.specific_character_set),
            "has_pixel_data": summary.has_pixel_data,
            "pixel_data_offset": summary.pixel_data_offset,
            "document_title_code": summary.document_title_code,
            "manufacturer_model_name": summary.manufacturer_model_name,
            "software_versions": summary.software_versions,
        },
    }


def footer_to_record(footer: Mapping[str, Any], sealed: SealedObject) -> InstanceRecord:
    """Return the record that a footer keeps; the way back of `record_to_footer`.

    Raises
    ------
    KeyError, TypeError, ValueError
        The footer was written by another version of the format.
    """
    if footer["version"] != 1:
        raise ValueError(f"object footer of version {footer['version']}; this node reads version 1")
    summary = dict(footer["summary"])
    summary["attributes"] = {keyword: tuple(values) for keyword, values in summary["attributes"].items()}
    summary["specific_character_set"] = tuple(summary["specific_character_set"])
    origin = dict(footer["origin"])
    origin["received_at"] = datetime.fromisoformat(origin["received_at"])
    return InstanceRecord(summary=Summary(**summary), sealed=sealed, origin=Origin(**origin), role=footer["role"])
