"""Uncompressed transfer syntaxes -> Explicit VR Little Endian, as a stream.

Values keep their bytes; what changes is the coding around them: the byte order of Explicit VR Big Endian, the VR that Implicit VR
leaves to the dictionary, the deflation. Sequences come out with undefined length, so that nothing is held in memory.

References
----------
DICOM PS3.5 Section 7.1.2, Section 7.5, Annex A.2; PS3.18 Section 8.7.3
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dicomweb.dataset import (
    ITEM,
    ITEM_DELIMITATION,
    LONG_FORM,
    SEQUENCE_DELIMITATION,
    UNDEFINED,
    WORD_BYTES,
    DataSet,
    Element,
    ItemBegin,
    ItemEnd,
    SequenceBegin,
    resolve_vr,
    swap,
)
from storage.errors import InvalidInstance

PIXEL_REPRESENTATION = 0x00280103
_ITEM = struct.pack("<HHI", ITEM >> 16, ITEM & 0xFFFF, UNDEFINED)
_ITEM_END = struct.pack("<HHI", ITEM_DELIMITATION >> 16, ITEM_DELIMITATION & 0xFFFF, 0)
_SEQUENCE_END = struct.pack("<HHI", SEQUENCE_DELIMITATION >> 16, SEQUENCE_DELIMITATION & 0xFFFF, 0)


def explicit_little_endian(data_set: DataSet) -> Iterator[bytes]:
    """Re-encode a data set without encapsulated pixel data in Explicit VR Little Endian.

    Raises
    ------
    InvalidInstance
        Broken framing, or encapsulated pixel data, which need a codec.
    """
    signed = False
    for event in data_set.walk():
        match event:
            case Element(tag=tag, length=-1):
                raise InvalidInstance(f"element {tag:08X} is encapsulated in an uncompressed transfer syntax")
            case Element():
                if event.tag == PIXEL_REPRESENTATION and event.length == 2:
                    signed = data_set.read(event.offset, 2) in {b"\0\1", b"\1\0"}
                yield from _element(data_set, event, resolve_vr(event.vr, signed=signed))
            case SequenceBegin(tag=tag):
                yield struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, b"SQ", 0, UNDEFINED)
            case ItemBegin():
                yield _ITEM
            case ItemEnd():
                yield _ITEM_END
            case _:
                yield _SEQUENCE_END


def _element(data_set: DataSet, element: Element, vr: str) -> Iterator[bytes]:
    group, number = element.tag >> 16, element.tag & 0xFFFF
    if vr in LONG_FORM or element.length > 0xFFFF:
        # A value too long for the 16-bit length of its VR is UN (PS3.5 6.2.2).
        code = vr if vr in LONG_FORM else "UN"
        yield struct.pack("<HH2sHI", group, number, code.encode("ascii"), 0, element.length)
    else:
        yield struct.pack("<HH2sH", group, number, vr.encode("ascii"), element.length)
    word = 1 if element.order == "<" else WORD_BYTES.get(vr, 1)
    for piece in data_set.chunks(element.offset, element.length):
        yield swap(piece, word) if word > 1 else piece
