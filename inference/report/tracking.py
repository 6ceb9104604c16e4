"""Tracking identifiers: one for every group of a document, the same for a lesion in findings and segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from inference.records import Algorithm, Lesion
from inference.report.identity import derived_uid


@dataclass(frozen=True, slots=True)
class Tracked:
    """Tracking Identifier (for people) and Tracking Unique Identifier (for machines)."""

    identifier: str
    uid: str


class Tracker:
    """Hands out tracking identifiers within one source image; never the same one twice.

    Viewers merge groups that share a Tracking Unique Identifier and fail on groups that have none.
    """

    def __init__(self, source_sop_instance_uid: str, *, multi_frame: bool) -> None:
        self._source = source_sop_instance_uid
        self._multi_frame = multi_frame
        self._given: set[str] = set()

    def track(self, frame_number: int | None, algorithm: Algorithm, key: str, name: str) -> Tracked:
        """Identifiers of what `algorithm` calls `key` on a frame (None: on all of them); a key that comes again is numbered on."""
        again = 0
        while True:
            uid = derived_uid(
                "tracking", self._source, str(frame_number), algorithm.name, algorithm.version, algorithm.digest, key, str(again)
            )
            if uid not in self._given:
                break
            again += 1
        self._given.add(uid)
        name = f"{name} ({again + 1})" if again else name
        return Tracked(f"frame-{frame_number}/{name}" if self._multi_frame and frame_number is not None else name, uid)


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A lesion as it is reported: its polygon closed, inside the image, of at most 300 vertices."""

    frame_number: int
    lesion: Lesion
    algorithm: Algorithm
    tracked: Tracked
