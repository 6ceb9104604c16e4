"""Is it the same picture in another transfer syntax? Header for header and pixel for pixel, or the answer is no."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pydicom
from pydicom.valuerep import PersonName

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PIXEL_DATA = 0x7FE00010
# What a change of transfer syntax may change beside the pixel data: how samples lie in memory, tables of the fragments, padding.
_ENCODING = frozenset({0x00280004, 0x00280006, 0x7FE00001, 0x7FE00002, 0xFFFCFFFC, _PIXEL_DATA})


def same_picture(first: bytes, second: bytes, pixels_equal: Callable[[bytes, bytes], bool]) -> bool:
    """Compare two Part 10 instances of different transfer syntaxes.

    Every element of the header must be there in both with the same value, down through sequences, and the decoded pixels must be equal.
    What cannot be read or decoded is not the same: the careful answer is a conflict, which loses nothing.
    """
    try:
        headers = [pydicom.dcmread(io.BytesIO(part10), stop_before_pixels=False) for part10 in (first, second)]
        if list(_flat(headers[0])) != list(_flat(headers[1])):
            return False
        del headers
        return pixels_equal(first, second)
    except Exception:  # noqa: BLE001 - the edge to decoders: they raise anything on odd bytes, and "not comparable" is an answer here
        return False


def _flat(data_set: Dataset) -> Iterator[tuple[int, Any]]:
    for element in data_set:
        tag = int(element.tag)
        if tag in _ENCODING or not tag & 0xFFFF:
            continue
        if element.VR == "SQ":
            yield tag, len(element.value)
            for item in element.value:
                yield from _flat(item)
        else:
            yield tag, _plain(element.value)


def _plain(value: object) -> object:
    """Return a value that compares by content, whatever the encoding's type of it was."""
    if value is None or value == "":
        return ()
    if isinstance(value, (bytes, PersonName)):
        return value
    if isinstance(value, (list, pydicom.multival.MultiValue)):
        return tuple(str(part) for part in value)
    return (str(value),)
