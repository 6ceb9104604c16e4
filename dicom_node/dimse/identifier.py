"""The Identifier of a query or retrieval: a data set of a stranger, read in bounds, and the data sets that answer it.

References
----------
DICOM PS3.4 C.4.1.1.3, C.4.2.1.4 and C.4.3.1.3 (Identifier); PS3.5 Section 7 (encoding), Section 6.1 (character sets)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pydicom.datadict import dictionary_has_tag, keyword_for_tag

from dicomweb.dataset import LONG_FORM, DataSet, Element, ItemBegin, ItemEnd, SequenceBegin, SequenceEnd, dictionary_vr
from storage import charset
from storage.errors import InvalidInstance
from storage.records import Level

IMPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2.1"
TRANSFER_SYNTAXES: Final = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN)
"""What Identifiers are read and written in."""

DOES_NOT_MATCH: Final = 0xA900
"""Error: Identifier does not match SOP Class."""
UNABLE_TO_PROCESS: Final = 0xC000
"""Failed: Unable to process."""

SPECIFIC_CHARACTER_SET: Final = 0x00080005
QUERY_RETRIEVE_LEVEL: Final = 0x00080052

_ELEMENTS = 4096
"""Of one Identifier, those in sequences counted."""
_VALUE_BYTES = 1024 * 1024
"""Of one value: 10 000 UIDs take 650 000."""
_SHORT = 0xFFFF
_IN_CHARACTER_SET = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
_NUMBERS: Mapping[str, str] = {"US": "H", "SS": "h", "UL": "I", "SL": "i"}


class InvalidIdentifier(Exception):
    """The Identifier cannot be answered.

    Parameters
    ----------
    reason
        Cause, and remedy where there is one; nothing that the peer wrote.
    status
        What the response says.
    offending
        Tags of the elements that are wrong, for Offending Element (0000,0901).
    """

    def __init__(self, reason: str, *, status: int = DOES_NOT_MATCH, offending: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.status = status
        self.offending = offending


@dataclass(frozen=True, slots=True)
class Identifier:
    """A request's Identifier."""

    level: Level
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keyword -> value as the standard writes it, without padding; Unicode. No sequences."""
    sequences: tuple[int, ...] = ()
    """Tags of the sequences of the data dictionary that are asked for."""
    beyond: bool = False
    """It also asks for what no answer can hold: unknown or private attributes, or keys inside of sequences."""


def read_identifier(encoded: bytes, transfer_syntax_uid: str) -> Identifier:
    """Read the Identifier of a request.

    Raises
    ------
    InvalidIdentifier
        Broken framing, a VR that is not the attribute's, too much of anything, or no level.
    """
    values, sequences, beyond = _collect(encoded, transfer_syntax_uid)
    terms = tuple(term.strip() for term in _ascii(values.pop(SPECIFIC_CHARACTER_SET, b"")).split("\\"))
    level_name = _ascii(values.pop(QUERY_RETRIEVE_LEVEL, b"")).strip(" \0")
    try:
        level = Level(level_name)
    except ValueError:
        known = ", ".join(one.value for one in Level)
        what = "Query/Retrieve Level is none of" if level_name else "Query/Retrieve Level is missing; give one of"
        raise InvalidIdentifier(f"{what} {known}", offending=(QUERY_RETRIEVE_LEVEL,)) from None
    keys: dict[str, str] = {}
    for tag, value in values.items():
        vr, keyword = dictionary_vr(tag), keyword_for_tag(tag)
        if vr in _NUMBERS:
            keys[keyword] = _numbers(tag, vr, value)
        else:
            text = charset.decode(value, terms) if vr in _IN_CHARACTER_SET else _ascii(value)
            keys[keyword] = text.strip(" \0")
    return Identifier(level, keys, sequences, beyond)


def _collect(encoded: bytes, transfer_syntax_uid: str) -> tuple[dict[int, bytes], tuple[int, ...], bool]:
    """Walk the data set: values at its top by tag, sequences at its top, and whether there was more than those."""
    view = memoryview(encoded)
    data_set = DataSet(lambda offset, length: bytes(view[offset : offset + length]), transfer_syntax_uid)
    values: dict[int, bytes] = {}
    sequences: dict[int, None] = {}
    beyond = False
    depth = 0
    try:
        for count, event in enumerate(data_set.walk()):
            if count >= _ELEMENTS:
                raise InvalidIdentifier(f"more than {_ELEMENTS} elements in the Identifier", status=UNABLE_TO_PROCESS)
            match event:
                case SequenceBegin(tag=tag):
                    if not depth:
                        beyond |= _announce(tag, "SQ", values, sequences)
                    depth += 1
                case SequenceEnd():
                    depth -= 1
                case Element() if depth:
                    beyond |= event.length != 0
                case Element(tag=tag, vr=vr, offset=offset, length=length):
                    if _announce(tag, vr, values, sequences):
                        beyond = True
                        continue
                    if not 0 <= length <= _VALUE_BYTES:
                        raise InvalidIdentifier(f"a value longer than {_VALUE_BYTES} bytes", offending=(tag,))
                    values[tag] = data_set.read(offset, length)
                case ItemBegin() | ItemEnd():
                    pass
    except InvalidInstance as error:
        raise InvalidIdentifier(f"the Identifier is no data set: {error}", status=UNABLE_TO_PROCESS) from error
    return values, tuple(sequences), beyond


def _announce(tag: int, vr: str, values: Mapping[int, bytes], sequences: dict[int, None]) -> bool:
    """Check an element at the top before its value is looked at. True: it is nothing that the data dictionary knows."""
    if tag in values or tag in sequences:
        raise InvalidIdentifier("an attribute stands in the Identifier twice", offending=(tag,))
    if tag >> 16 & 1 or not dictionary_has_tag(tag) or not keyword_for_tag(tag):
        return True
    of_dictionary = dictionary_vr(tag)
    if vr not in {of_dictionary, "UN", *of_dictionary.split(" or ")}:
        raise InvalidIdentifier(f"an attribute of VR {of_dictionary} is given in another VR", offending=(tag,))
    if of_dictionary == "SQ":
        sequences[tag] = None
        return vr != "SQ"
    return False


def _ascii(value: bytes) -> str:
    return value.decode("ascii", "replace")


def _numbers(tag: int, vr: str, value: bytes) -> str:
    code = _NUMBERS[vr]
    size = struct.calcsize(code)
    if len(value) % size:
        raise InvalidIdentifier(f"a number of VR {vr} has another length than {size} bytes", offending=(tag,))
    return "\\".join(str(number) for (number,) in struct.iter_unpack(f"<{code}", value))


# -- answers -------------------------------------------------------------------------------------------------------------------------


def write_element(tag: int, vr: str, value: bytes, *, explicit: bool) -> bytes:
    """Encode an element, Little Endian; `value` is padded here. One that is too long for its VR becomes empty."""
    if len(value) % 2:
        value += b"\0" if vr == "UI" else b" "
    group, number = tag >> 16, tag & 0xFFFF
    if not explicit:
        return struct.pack("<HHI", group, number, len(value)) + value
    if vr in LONG_FORM:
        return struct.pack("<HH2sHI", group, number, vr.encode("ascii"), 0, len(value)) + value
    if len(value) > _SHORT:
        value = b""
    return struct.pack("<HH2sH", group, number, vr.encode("ascii"), len(value)) + value


def text_value(vr: str, values: Iterable[str]) -> bytes:
    """Encode the values of an attribute as the index holds them; what is no number becomes no value where one is needed."""
    if vr not in _NUMBERS:
        return "\\".join(values).encode("utf-8", "replace")
    code = _NUMBERS[vr]
    try:
        return b"".join(struct.pack(f"<{code}", int(value)) for value in values)
    except (ValueError, struct.error):
        return b""


def write_identifier(elements: Iterable[tuple[int, str, bytes]], *, explicit: bool) -> bytes:
    """Encode an answer from (tag, VR, value) in the order of the tags, with (0008,0005) when it is not all ASCII.

    Values of text are in UTF-8 (ISO_IR 192).
    """
    held = list(elements)
    head = b""
    if not all(value.isascii() for _, vr, value in held if vr in _IN_CHARACTER_SET):
        head = write_element(SPECIFIC_CHARACTER_SET, "CS", b"ISO_IR 192", explicit=explicit)
    return head + b"".join(write_element(tag, vr, value, explicit=explicit) for tag, vr, value in held)


def uid_list(tag: int, uids: Iterable[str], *, explicit: bool) -> bytes:
    """Encode an element of UIDs, as many of them as its VR has room for."""
    value = "\\".join(uids)
    if explicit and len(value) > _SHORT - 1:
        value = value[: value.rindex("\\", 0, _SHORT)]
    return write_element(tag, "UI", value.encode("ascii", "replace"), explicit=explicit)
