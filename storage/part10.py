"""The file format around a data set: preamble and file meta information (group 0002).

Both belong to the wrapper, not to the instance: they are read for the transfer syntax, then dropped, and what is served carries ours.

Rules where real files differ: the meta information ends where File Meta Information Group Length says, if an element ends there;
where it is absent or wrong, it ends before the first element that is not of group 0002. A file without preamble and prefix, without
transfer syntax, or with one unknown here is refused: guessing an encoding may archive something else than was meant.

References
----------
DICOM PS3.10 Section 7
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from storage.errors import InvalidInstance, UnsupportedInstance
from storage.iod import TRANSFER_SYNTAXES
from storage.records import Announced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

IMPLEMENTATION_CLASS_UID: Final = "2.25.262571574529720672698744484494606589699"
IMPLEMENTATION_VERSION_NAME: Final = "DICOM_NODE_0"

META_LIMIT: Final = 65_536
"""Most bytes of preamble and file meta information."""

_PREFIX_END = 132
_HEADER = struct.Struct("<HH2sH")
_LONG_FORMS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})


class Part10Parser:
    """Takes a DICOM file chunk by chunk and hands on the bytes of its data set.

    Memory is bounded by the chunk and :data:`META_LIMIT`. Not to be used again after it raised.

    Attributes
    ----------
    transfer_syntax_uid : str or None
        None until the file meta information is complete; known before the first data set byte is handed on.
    announced : Announced
        Media Storage SOP Class and Instance UID. Real files often carry those of the instance they were copied from, so a
        difference from the data set is worth a warning at most.
    """

    def __init__(self) -> None:
        self.transfer_syntax_uid: str | None = None
        self.announced = Announced()
        self._head = bytearray()
        self._at = _PREFIX_END
        self._stated_end = 0
        self._texts: dict[int, str] = {}

    def feed(self, chunk: Buffer) -> Iterator[memoryview | bytes]:
        """Take the next bytes of the file; the data set bytes among them are in the result.

        The work is done at the call, not as the result is drawn. What is handed on is a view of `chunk` and lives as long.

        Raises
        ------
        InvalidInstance
            No DICOM file, or malformed file meta information.
        UnsupportedInstance
            The transfer syntax is unknown here.
        """
        if self.transfer_syntax_uid is not None:
            view = memoryview(chunk)
            return iter((view,) if view else ())
        self._head += memoryview(chunk)
        if len(self._head) < _PREFIX_END:
            return iter(())
        if self._head[128:132] != b"DICM":
            raise InvalidInstance("no DICOM file: bytes 128 to 131 are not DICM; files without preamble are refused")
        if not self._parse():
            return iter(())
        rest = bytes(self._head[self._at :])
        self._head.clear()
        return iter((rest,) if rest else ())

    def finish(self) -> None:
        """Confirm, after the last byte, that there was a whole file.

        Raises
        ------
        InvalidInstance
            The file ends within the preamble or the file meta information, or has no data set.
        """
        if self.transfer_syntax_uid is None:
            raise InvalidInstance("the file ends before its data set, which preamble and file meta information (group 0002) precede")

    def _parse(self) -> bool:
        """Walk the elements of group 0002 as far as the bytes go; tell whether the group is complete."""
        head = self._head
        while True:
            at = self._at
            if len(head) - at < 8:
                return False
            group, element, vr, length = _HEADER.unpack_from(head, at)
            named = vr.isalpha() and vr.isupper()
            if group != 0x0002 or (at == self._stated_end and not named):
                self._conclude()
                return True
            if not named:
                raise InvalidInstance(f"(0002,{element:04X}) at byte {at}: group 0002 must be Explicit VR Little Endian (PS3.10 7.1)")
            start = at + 8
            if vr in _LONG_FORMS:
                if len(head) - at < 12:
                    return False
                length = int.from_bytes(head[at + 8 : at + 12], "little")
                start = at + 12
            if start + length > META_LIMIT:
                raise InvalidInstance(f"(0002,{element:04X}) at byte {at}: a length of {length} bytes passes the limit of {META_LIMIT}")
            if len(head) < start + length:
                return False
            value = bytes(head[start : start + length])
            self._at = start + length
            if element == 0x0000 and length == 4:
                self._stated_end = self._at + int.from_bytes(value, "little")
            else:
                self._texts.setdefault(element, value.decode("ascii", "replace").strip(" \0"))

    def _conclude(self) -> None:
        transfer_syntax_uid = self._texts.get(0x0010, "")
        if not transfer_syntax_uid:
            raise InvalidInstance("the file meta information has no Transfer Syntax UID (0002,0010), so the data set cannot be read")
        if transfer_syntax_uid not in TRANSFER_SYNTAXES:
            raise UnsupportedInstance("Transfer Syntax UID (0002,0010) is unknown here; convert the file to a known one")
        self.transfer_syntax_uid = transfer_syntax_uid
        self.announced = Announced(sop_class_uid=self._texts.get(0x0002, ""), sop_instance_uid=self._texts.get(0x0003, ""))


def part10_prefix(*, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Return preamble, prefix and file meta information of ours, to stand before the bytes of a data set.

    Raises
    ------
    ValueError
        A UID is empty, not ASCII or longer than 64 characters.

    References
    ----------
    DICOM PS3.10 Table 7.1-1
    """
    elements = bytearray(struct.pack("<HH2sHIH", 0x0002, 0x0001, b"OB", 0, 2, 0x0100))
    for element, vr, text, pad in (
        (0x0002, b"UI", sop_class_uid, b"\0"),
        (0x0003, b"UI", sop_instance_uid, b"\0"),
        (0x0010, b"UI", transfer_syntax_uid, b"\0"),
        (0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\0"),
        (0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "),
    ):
        if not text.isascii() or not 1 <= len(text) <= 64:
            raise ValueError(f"(0002,{element:04X}) needs 1 to 64 ASCII characters")
        value = text.encode("ascii")
        value += pad * (len(value) % 2)
        elements += _HEADER.pack(0x0002, element, vr, len(value)) + value
    return bytes(128) + b"DICM" + _HEADER.pack(0x0002, 0x0000, b"UL", 4) + struct.pack("<I", len(elements)) + bytes(elements)
