"""DICOM JSON of a stored instance: everything but the bulk, which is given by URL.

Written element by element as text, so that a hostile data set costs no tree of objects. One value that cannot be decoded comes
out empty; it never takes the others with it.

References
----------
DICOM PS3.18 Annex F DICOM JSON Model, Section 10.4.1.1.2 Metadata Resources
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dicomweb.dataset import (
    BULK_TAGS,
    WORD_BYTES,
    DataSet,
    Element,
    ItemBegin,
    ItemEnd,
    SequenceBegin,
    SequenceEnd,
    dictionary_vr,
    resolve_vr,
    swap,
)
from dicomweb.transcode import PIXEL_REPRESENTATION
from storage.charset import decode
from storage.errors import InstanceNotFound, InvalidInstance

SPECIFIC_CHARACTER_SET = 0x00080005
ENCAPSULATED_DOCUMENT, MIME_TYPE = 0x00420011, 0x00420012
_MIME = re.compile(r"[a-z0-9.+-]{1,31}/[a-z0-9.+-]{1,31}")
BINARY = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q", "FL": "f", "FD": "d"}
_CODES = frozenset({"AE", "AS", "CS", "DA", "DT", "TM", "UI"})
_ONE_TEXT = frozenset({"LT", "ST", "UT", "UR"})
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_SAFE_INTEGER = 2**53


@dataclass(frozen=True, slots=True)
class InlineLimits:
    """What goes into the document and what is given by URL."""

    binary_bytes: int = 1_024
    """Longer values of OB, OW … are bulk data."""
    value_bytes: int = 65_536
    """Longer values of any VR are bulk data."""
    total_bytes: int = 8 * 1024**2
    """When the document's values have used this up, every value longer than 256 bytes is bulk data."""


def person_name(text: str) -> dict[str, str] | None:
    """Split one person name into its component groups (PS3.18 F.2.2); None for an empty name."""
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("=", 2), strict=False)
    return {name: value.rstrip(" \0") for name, value in groups if value.strip(" \0")} or None


def integer(text: str) -> int | None:
    """Read an IS value; None if it is none. ``1.0`` is seen in the field and taken."""
    if _INTEGER.fullmatch(text):
        return int(text)
    number = decimal(text)
    return int(number) if number is not None and number.is_integer() else None


def decimal(text: str) -> float | None:
    """Read a DS value; None if it is none or not finite."""
    number = float(text) if _DECIMAL.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def json_values(vr: str, raw: bytes, character_set: Sequence[str], order: str = "<") -> list[Any]:
    """Decode the value of an element to the values of DICOM JSON; empty and undecodable ones are None.

    Parameters
    ----------
    vr
        Two letters, not SQ and not one of `BINARY`.
    raw
        The value as stored.
    character_set
        Defined terms of Specific Character Set.
    order
        Byte order of numbers, ``<`` or ``>``.
    """
    if vr in _NUMBERS or vr == "AT":
        return _binary_numbers(vr, raw, order)
    text = decode(raw, () if vr in _CODES else character_set)
    if vr in _ONE_TEXT:
        return [text.rstrip(" \0") or None]
    values: list[Any] = [part.strip(" \0") if vr not in {"PN", "UC"} else part.rstrip(" \0") for part in text.split("\\")]
    if vr == "PN":
        return [person_name(value) for value in values]
    if vr == "IS":
        return [integer(value) for value in values]
    if vr == "DS":
        return [decimal(value) for value in values]
    return [value or None for value in values]


def _binary_numbers(vr: str, raw: bytes, order: str) -> list[Any]:
    code = "H" if vr == "AT" else _NUMBERS[vr]
    size = struct.calcsize(order + code)
    if len(raw) % (2 * size if vr == "AT" else size):
        return []  # no whole number of values: which bytes belong to which is not known
    numbers = struct.unpack(f"{order}{len(raw) // size}{code}", raw)
    if vr == "AT":
        return [f"{group:04X}{element:04X}" for group, element in zip(numbers[::2], numbers[1::2], strict=True)]
    if vr in {"FL", "FD"}:
        return [number if math.isfinite(number) else None for number in numbers]  # JSON has no NaN
    # Beyond 2**53 a number would be rounded by JavaScript: a string is allowed for SV and UV (PS3.18 Table F.2.3-1).
    return [number if abs(number) <= _SAFE_INTEGER else str(number) for number in numbers]


@dataclass(slots=True)
class _Level:
    """What is in force inside one data set or item."""

    character_set: tuple[str, ...]
    signed: bool
    tag: int = 0
    """Of the sequence that is open in it."""
    items: int = 0
    tags: set[int] = field(default_factory=set)

    def opens(self, tag: int) -> str:
        """Return what stands before the next attribute: nothing, or a comma.

        Raises
        ------
        InvalidInstance
            The element stands twice: a name must not (PS3.5 7.1, RFC 8259).
        """
        if tag in self.tags:
            raise InvalidInstance(f"element ({tag >> 16:04X},{tag & 0xFFFF:04X}) stands twice in one data set or item")
        self.tags.add(tag)
        return "," if len(self.tags) > 1 else ""


def instance_json(data_set: DataSet, bulk_url: Callable[[str], str], limits: InlineLimits | None = None) -> str:
    """Write the DICOM JSON object of one instance.

    Parameters
    ----------
    data_set
        The stored data set. It is read only up to encapsulated pixel data; native pixel data are stepped over.
    bulk_url
        ``7FE00010`` or ``54000100/1/54001010`` (tag, item from 1, tag …) -> URL at which the value is served.

    Raises
    ------
    InvalidInstance
        The framing is broken.
    """
    limits = limits or InlineLimits()
    out: list[str] = ["{"]
    levels = [_Level((), signed=False)]
    used = 0
    for event in data_set.walk():
        level = levels[-1]
        match event:
            case Element():
                if event.tag == SPECIFIC_CHARACTER_SET and 0 <= event.length <= 256:
                    terms = data_set.read(event.offset, event.length).decode("latin-1").split("\\")
                    level.character_set = tuple(term.strip(" \0") for term in terms)
                elif event.tag == PIXEL_REPRESENTATION and event.length == 2:
                    level.signed = struct.unpack(event.order + "H", data_set.read(event.offset, 2)) == (1,)
                cap = limits.value_bytes if used < limits.total_bytes else 256
                text = _element(data_set, event, level, lambda tag: bulk_url(_path(levels, tag)), limits, cap)
                used += len(text)
                out.append(f'{level.opens(event.tag)}"{event.tag:08X}":{text}')
                if event.length < 0 and len(levels) == 1:
                    break  # encapsulated pixel data: what may follow (padding, signatures) is not worth reading all fragments
            case SequenceBegin(tag=tag):
                out.append(f'{level.opens(tag)}"{tag:08X}":{{"vr":"SQ","Value":[')
                level.tag, level.items = tag, 0
            case ItemBegin():
                out.append("{" if level.items == 0 else ",{")
                level.items += 1
                levels.append(_Level(level.character_set, level.signed))
            case ItemEnd():
                out.append("}")
                levels.pop()
            case SequenceEnd():
                # An empty sequence has no Value (PS3.18 F.2.5).
                if level.items:
                    out.append("]}")
                else:
                    out[-1] = out[-1].removesuffix(',"Value":[') + "}"
    out.append("}")
    return "".join(out)


def _path(levels: Sequence[_Level], tag: int) -> str:
    return "/".join([*(f"{level.tag:08X}/{level.items}" for level in levels[:-1]), f"{tag:08X}"])


def _element(data_set: DataSet, element: Element, level: _Level, url: Callable[[int], str], limits: InlineLimits, cap: int) -> str:
    vr = resolve_vr(element.vr, signed=level.signed)
    if vr == "UN" and (known := resolve_vr(dictionary_vr(element.tag), signed=level.signed)) != "SQ":
        # A public attribute that lost its VR on the way, in a transfer through a node that did not know it (PS3.5 6.2.2, Note 2).
        vr, element = known, replace(element, order="<")
    if not element.length:
        return json.dumps({"vr": vr})
    longest = min(limits.binary_bytes, cap) if vr in BINARY else cap
    if element.length < 0 or element.length > longest or element.tag in BULK_TAGS:
        return json.dumps({"vr": vr, "BulkDataURI": url(element.tag)})
    raw = data_set.read(element.offset, element.length)
    if vr in BINARY:
        if element.order == ">":
            raw = swap(raw, WORD_BYTES.get(vr, 1))
        return json.dumps({"vr": vr, "InlineBinary": base64.b64encode(raw).decode("ascii")})
    values = json_values(vr, raw, level.character_set, element.order)
    if element.tag == SPECIFIC_CHARACTER_SET and any(values):
        values = ["ISO_IR 192"]  # what the document itself is written in
    if all(value is None for value in values):
        return json.dumps({"vr": vr})
    return json.dumps({"vr": vr, "Value": values}, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class BulkData:
    """A value that is served by URL."""

    element: Element
    vr: str
    media_type: str = ""
    """What the object says the value is; of encapsulated documents only."""


def find_bulk(data_set: DataSet, path: Sequence[str]) -> BulkData:
    """Find the value that a path of `instance_json` names.

    Raises
    ------
    InstanceNotFound
        The data set has no such value.
    """
    wanted = tuple(part.upper() for part in path)
    here: list[str] = []
    document: BulkData | None = None
    for event in data_set.walk():
        match event:
            case Element(tag=tag) if document is not None:
                # Its media type follows it, when it is stated at all.
                if tag == MIME_TYPE and not here and 0 < event.length <= 64:
                    text = data_set.read(event.offset, event.length).decode("latin-1").strip(" \0").lower()
                    return replace(document, media_type=text if _MIME.fullmatch(text) else "")
                if tag > MIME_TYPE:
                    break
            case Element(tag=tag) if (*here, f"{tag:08X}") == wanted:
                found = BulkData(event, resolve_vr(event.vr, signed=False))
                if tag != ENCAPSULATED_DOCUMENT:
                    return found
                document = found
            case SequenceBegin(tag=tag):
                here += [f"{tag:08X}", "0"]
            case ItemBegin():
                here[-1] = str(int(here[-1]) + 1)
            case SequenceEnd():
                del here[-2:]
            case _:
                pass
    if document is None:
        raise InstanceNotFound("the instance has no such bulk data")
    return document
