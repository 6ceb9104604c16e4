"""(tag, VR, value) triples to Explicit VR Little Endian bytes: all of PS3.5 Section 7 that a report needs.

A library that builds, checks and deep-copies object trees needs a quarter of a second for a report; plain tuples need a few milliseconds.
What is written here is read back by pydicom, highdicom, DCMTK and dicom3tools in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Element: TypeAlias = tuple[int, str, Any]
"""Tag as one number (0xGGGGEEEE), Value Representation, value.

``SQ``: a sequence of items, each an iterable of elements or bytes that are already encoded. ``US UL``: int or a sequence of int.
``FL FD``: a sequence or array of float. ``AT``: a tag. ``OB``: bytes. The rest: str, several values joined by backslashes.
"""

LONG_LENGTH = frozenset({"OB", "OW", "SQ", "UC", "UN", "UR", "UT"})
"""Value Representations with a 32 bit length in explicit VR (PS3.5 Section 7.1.2), as far as they are written here."""

_NUMBERS = {"US": "H", "UL": "I"}
_FLOATS = {"FL": "<f4", "FD": "<f8"}
_HEAD = struct.Struct("<HH2sH")
_LONG_HEAD = struct.Struct("<HH2s2xI")
_ITEM = struct.Struct("<HHI")


def _value(vr: str, value: Any) -> bytes:
    if vr == "SQ":
        out = bytearray()
        for item in value:
            data = item if isinstance(item, bytes) else encode(item)
            out += _ITEM.pack(0xFFFE, 0xE000, len(data))
            out += data
        return bytes(out)
    if vr in _NUMBERS:
        numbers: Sequence[int] = (value,) if isinstance(value, int) else value
        return struct.pack(f"<{len(numbers)}{_NUMBERS[vr]}", *numbers)
    if vr in _FLOATS:
        floats: NDArray[np.floating[Any]] = np.asarray(value, dtype=_FLOATS[vr])
        return floats.tobytes()
    if vr == "AT":
        return struct.pack("<HH", value >> 16, value & 0xFFFF)
    # errors="replace": a lone surrogate in a model's label becomes a question mark, never a lost report
    data = value if isinstance(value, bytes) else value.encode("utf-8", "replace")
    if len(data) % 2:
        data += b"\0" if vr in {"UI", "OB"} else b" "
    return data


def encode(elements: Iterable[Element]) -> bytes:
    """Encode a data set, or an item of a sequence; the elements are sorted by tag, lengths are defined and even.

    Raises
    ------
    ValueError
        A value is longer than the 65534 bytes its VR can hold.

    References
    ----------
    DICOM PS3.5 Sections 7.1.2 and 7.5
    """
    out = bytearray()
    for tag, vr, value in sorted(elements, key=itemgetter(0)):
        data = _value(vr, value)
        if vr in LONG_LENGTH:
            out += _LONG_HEAD.pack(tag >> 16, tag & 0xFFFF, vr.encode(), len(data))
        elif len(data) > 0xFFFE:
            raise ValueError(f"a value of ({tag >> 16:04X},{tag & 0xFFFF:04X}) has {len(data)} bytes, VR {vr} holds 65534: shorten it")
        else:
            out += _HEAD.pack(tag >> 16, tag & 0xFFFF, vr.encode(), len(data))
        out += data
    return bytes(out)
