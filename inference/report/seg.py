"""The lesion mask as a DICOM Segmentation, BINARY (PS3.3 A.51), in the pixels of the source image.

Photographs have no frame of reference, so there is none here either: frames are tied to the source's by Derivation Image Sequence with
Spatial Locations Preserved, of a multi-frame source with Referenced Frame Number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.records import Algorithm
from inference.report import codes
from inference.report.codes import CodingSchemes, coded
from inference.report.encode import Element, encode
from inference.report.header import Source
from inference.report.identity import derived_uid
from inference.report.modules import ObjectIdentity
from inference.report.tracking import Tracked
from inference.report.values import paragraphs, shortened

SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One segment. ``frames``: by frame number of the source, an array (rows, columns) and the value it has inside the segment."""

    label: str
    tracked: Tracked
    algorithm: Algorithm
    frames: dict[int, tuple[NDArray[Any], int]]


def packed(masks: Iterable[NDArray[np.bool_]]) -> bytes:
    """Pixel Data of 1 bit: first pixel in the lowest bit, frames without padding between them (PS3.5 Section 8.1.1), even length."""
    out = bytearray()
    rest = np.zeros(0, dtype=bool)  # bits of the last frame that did not fill a byte
    for mask in masks:
        bits = np.concatenate([rest, mask.ravel()]) if len(rest) else mask.ravel()
        whole = len(bits) // 8 * 8
        out += np.packbits(bits[:whole], bitorder="little").tobytes()
        rest = bits[whole:]
    out += np.packbits(rest, bitorder="little").tobytes()
    return bytes(out) + b"\0" * (len(out) % 2)


def _segment(number: int, segment: Segment, schemes: CodingSchemes) -> list[Element]:
    algorithm = segment.algorithm
    identification: list[Element] = [
        (0x0066002F, "SQ", (coded(codes.ARTIFICIAL_INTELLIGENCE, schemes),)),
        (0x00660031, "LO", shortened(algorithm.version) or "-"),
        (0x00660032, "LT", shortened(f"sha256 {algorithm.digest}", 1024)),
        (0x00660036, "LO", shortened(algorithm.name) or "-"),
    ]
    return [
        (0x00620003, "SQ", (coded(codes.MORPHOLOGICALLY_ABNORMAL_STRUCTURE, schemes),)),
        (0x00620004, "US", number),
        (0x00620005, "LO", shortened(segment.label) or "-"),
        (0x00620007, "SQ", (identification,)),
        (0x00620008, "CS", "AUTOMATIC"),
        (0x00620009, "LO", shortened(algorithm.name) or "-"),
        (0x0062000F, "SQ", (coded(codes.SKIN_LESION, schemes),)),
        (0x00620020, "UT", paragraphs(segment.tracked.identifier)),
        (0x00620021, "UI", segment.tracked.uid),
    ]


def _derivation(source: Source, frame_number: int, schemes: CodingSchemes) -> list[Element]:
    image: list[Element] = [
        (0x00081150, "UI", source.sop_class_uid),
        (0x00081155, "UI", source.sop_instance_uid),
        (0x0028135A, "CS", "YES"),  # Spatial Locations Preserved
        (0x0040A170, "SQ", (coded(codes.SOURCE_FOR_PROCESSING, schemes),)),
    ]
    if source.multi_frame:
        image.append((0x00081160, "IS", str(frame_number)))
    return [(0x00082112, "SQ", (image,)), (0x00089215, "SQ", (coded(codes.SEGMENTATION_DERIVATION, schemes),))]


def segmentation(segments: Sequence[Segment], *, identity: ObjectIdentity, source: Source, schemes: CodingSchemes) -> bytes:
    """Encode a Segmentation; `segments`: at least one, each on at least one frame, all of one shape.

    References
    ----------
    DICOM PS3.3 A.51 and C.8.20; C.7.6.17 Multi-frame Dimension Module
    """
    frames = [
        (number, frame, *segment.frames[frame]) for number, segment in enumerate(segments, start=1) for frame in sorted(segment.frames)
    ]
    rows, columns = frames[0][2].shape
    organisation = derived_uid("dimension organization", identity.sop_instance_uid)

    def dimension(pointer: int, group: int, label: str) -> list[Element]:
        return [(0x00209164, "UI", organisation), (0x00209165, "AT", pointer), (0x00209167, "AT", group), (0x00209421, "LO", label)]

    dimensions = [dimension(0x0062000B, 0x0062000A, "Referenced Segment Number")]
    if source.multi_frame:
        dimensions.append(dimension(0x00209057, 0x00209111, "In-Stack Position Number"))
    per_frame: list[list[Element]] = []
    for number, frame_number, _, _ in frames:
        content: list[Element] = [(0x00209157, "UL", (number, frame_number) if source.multi_frame else number)]
        if source.multi_frame:  # the stack is the source's sequence of frames
            content += [(0x00209056, "SH", "1"), (0x00209057, "UL", frame_number)]
        per_frame.append(
            [
                (0x00089124, "SQ", (_derivation(source, frame_number, schemes),)),
                (0x00209111, "SQ", (content,)),
                (0x0062000A, "SQ", ([(0x0062000B, "US", number)],)),
            ]
        )
    instance: list[Element] = [(0x00081150, "UI", source.sop_class_uid), (0x00081155, "UI", source.sop_instance_uid)]
    return encode(
        [
            *identity.elements(SEGMENTATION_STORAGE, "SEG", "segmentation", source),
            *source.lossy,
            (0x00080008, "CS", "DERIVED\\PRIMARY"),
            (0x00081115, "SQ", ([(0x0020000E, "UI", source.series_instance_uid), (0x0008114A, "SQ", (instance,))],)),
            (0x00200020, "CS", source.patient_orientation),
            (0x00209221, "SQ", ([(0x00209164, "UI", organisation)],)),
            (0x00209222, "SQ", dimensions),
            (0x00280002, "US", 1),
            (0x00280004, "CS", "MONOCHROME2"),
            (0x00280008, "IS", str(len(frames))),
            (0x00280010, "US", rows),
            (0x00280011, "US", columns),
            (0x00280100, "US", 1),
            (0x00280101, "US", 1),
            (0x00280102, "US", 0),
            (0x00280103, "US", 0),
            (0x00620001, "CS", "BINARY"),
            (0x00620002, "SQ", [_segment(number, segment, schemes) for number, segment in enumerate(segments, start=1)]),
            (0x00620013, "CS", "NO"),  # Segments Overlap
            (0x00700080, "CS", "SKIN_LESION"),
            (0x00700081, "LO", "AI, not verified by a clinician; not for clinical use"),
            (0x00700084, "PN", ""),
            (0x20500020, "CS", "IDENTITY"),
            (0x52009229, "SQ", ([],)),
            (0x52009230, "SQ", per_frame),
            (0x7FE00010, "OB", packed(labels == value for _, _, labels, value in frames)),
        ]
    )
