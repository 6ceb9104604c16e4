"""The history of a run: what was asked, answered and seen, one JSON line each, by every process that took part.

Each line is one ``write`` to a file opened for appending: lines of several processes never mix, and a process that is killed leaves
whole lines. ``order`` is the monotonic clock, which all processes of the machine share. The file lies outside of what is hit.

============ ============================================================ ==============================================
event        said by                                                      fields besides uid and sha256
============ ============================================================ ==============================================
began        the run                                                      peers, canaries, analysed (of every instance?)
sent         a sender, before the first byte                              origin
acked        a sender that was answered with Success
refused      a sender that was refused                                    reason, conflict (other content under this UID?)
aborted      a sender that went away in the middle
queried      a reader                                                     found
retrieved    a reader that was given the bytes
missing      a reader that was told: no such instance, or damaged         reason
archived     the Mover, when the store has it
concluded    a worker: `uid` is the report's                              source
failed       a worker: the analysis did not work out                      reason, poison
delivered    a destination that took a report                             peer
proved       a courier that recorded the destination's answer             peer
committed    a requestor of storage commitment that was told success
erasing      an operator, before
erased       an operator, when it was done
crashed      the run: the process was killed                              point, process_killed
recovered    the run: it works again                                      seconds
hand         the run: somebody had to do something by hand                what
fault        the run: something broke                                     name
healed       the run: from here on nothing is broken
ended        the run: all work was given time to end
============ ============================================================ ==============================================
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

EVENTS: Final = frozenset(
    (
        "began", "sent", "acked", "refused", "aborted", "queried", "retrieved", "missing", "archived", "concluded", "failed", "delivered",
        "proved", "committed", "erasing", "erased", "crashed", "recovered", "hand", "fault", "healed", "ended",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    event: str
    order: int
    """Nanoseconds of the monotonic clock."""
    process: int
    uid: str = ""
    sha256: str = ""
    """Of the data set, hexadecimal."""
    detail: Mapping[str, Any] = field(default_factory=dict)


class History:
    """Writes the history of one process. A context manager; may be handed to a forked child, which then writes for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def say(self, event: str, uid: str = "", sha256: str = "", **detail: Any) -> None:
        """Append one event; it survives the process from here on."""
        if event not in EVENTS:
            raise ValueError(f"no event {event!r}; the table above names them")
        values: dict[str, Any] = {"event": event, "order": time.monotonic_ns(), "process": os.getpid(), "uid": uid, "sha256": sha256}
        os.write(self._descriptor, (json.dumps({**values, "detail": detail}, separators=(",", ":")) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def entries_of(path: Path) -> list[Entry]:
    """Read a history back, in order of time.

    Raises
    ------
    ValueError
        A line is no event; a history that cannot be read proves nothing.
    """
    return sorted(_entries(path.read_text().splitlines()), key=lambda entry: entry.order)


def _entries(lines: Iterable[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            entry = Entry(**found)
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of the history is no event: {line[:80]!r}") from error
        if entry.event not in EVENTS:
            raise ValueError(f"line {number} of the history: no event {entry.event!r}")
        yield entry


def digest(data_set: bytes) -> str:
    """SHA-256 of a data set, as receipts and histories have it."""
    return hashlib.sha256(data_set).hexdigest()
