"""Who writes, and under which identifiers: derived from the content, never random, so that a second run says the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """The equipment that makes the reports (Enhanced General Equipment, PS3.3 C.7.5.2); all four are written and never empty."""

    manufacturer: str
    model_name: str
    software_version: str
    serial_number: str


def derived_uid(*parts: str) -> str:
    """UID of the form 2.25.<number>, the number being the first 128 bit of SHA-256 over `parts`; at most 44 characters.

    The parts are written as JSON, so that ("a", "bc") and ("ab", "c") differ.

    References
    ----------
    DICOM PS3.5 Section B.2
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


@dataclass(frozen=True, slots=True)
class Instant:
    """One moment as DICOM writes it: ``date`` (DA), ``time`` (TM) and ``offset`` (Timezone Offset From UTC, 0008,0201)."""

    date: str
    time: str
    offset: str

    @classmethod
    def parse(cls, text: str, *, offset: str | None = None) -> Instant:
        """Read ISO 8601 with a UTC offset; `offset` (``+HHMM``) names the zone to express it in.

        One data set has one offset for all its dates and times: the source's, where the source states it, because its Study Time is copied.

        Raises
        ------
        ValueError
            Not ISO 8601, or without a UTC offset: what was meant could not be told.
        """
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError(f"the time of analysis {text!r} has no UTC offset: freeze it with one (2026-01-31T12:00:00+00:00)")
        if offset is not None:
            minutes = int(offset[1:3]) * 60 + int(offset[3:5])
            moment = moment.astimezone(timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes)))
        fraction = f".{moment.microsecond:06d}" if moment.microsecond else ""
        return cls(moment.strftime("%Y%m%d"), moment.strftime("%H%M%S") + fraction, moment.strftime("%z")[:5])
