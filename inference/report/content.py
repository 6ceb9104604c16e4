"""Content items of a Structured Report (PS3.3 C.17.3): one method a value type, each giving the elements of one item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from inference.records import Code
from inference.report import codes
from inference.report.codes import CodingSchemes, coded
from inference.report.encode import Element, encode
from inference.report.values import paragraphs

Item = list[Element]

CONTAINS = "CONTAINS"
HAS_CONCEPT_MOD = "HAS CONCEPT MOD"
HAS_OBS_CONTEXT = "HAS OBS CONTEXT"
HAS_ACQ_CONTEXT = "HAS ACQ CONTEXT"
SELECTED_FROM = "SELECTED FROM"

_LONGEST_DECIMAL_STRING = 16  # bytes of a DS, PS3.5 Table 6.2-1


def decimal_string(value: float) -> str:
    """Write a number as DS: four digits after the point, no trailing zeros, at most 16 bytes."""
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    if text == "-0":
        return "0"
    return text if len(text) <= _LONGEST_DECIMAL_STRING else f"{value:.9e}"


class ContentItems:
    """Makes the items of one document; remembers codes it has encoded, as a document repeats few of them many times."""

    def __init__(self, schemes: CodingSchemes) -> None:
        self._schemes = schemes
        self._encoded: dict[Code, bytes] = {}

    @property
    def designators(self) -> frozenset[str]:
        """Coding schemes used so far, as written."""
        return frozenset(self._schemes.designator(code.scheme_designator) for code in self._encoded)

    def coded(self, code: Code) -> tuple[bytes]:
        """Value of a Code Sequence attribute: its one item."""
        encoded = self._encoded.get(code)
        if encoded is None:
            encoded = self._encoded[code] = encode(coded(code, self._schemes))
        return (encoded,)

    def _item(self, relationship: str | None, value_type: str, name: Code, children: Sequence[Item]) -> Item:
        item: Item = [(0x0040A040, "CS", value_type), (0x0040A043, "SQ", self.coded(name))]
        if relationship is not None:
            item.append((0x0040A010, "CS", relationship))
        if children:
            item.append((0x0040A730, "SQ", children))
        return item

    def container(self, relationship: str | None, name: Code, children: Sequence[Item], *, template: str | None = None) -> Item:
        """CONTAINER; `template` is the identifier of the DCMR template it begins. No relationship: the root."""
        item = self._item(relationship, "CONTAINER", name, children)
        item.append((0x0040A050, "CS", "SEPARATE"))
        if template is not None:
            item.append((0x0040A504, "SQ", ([(0x00080105, "CS", "DCMR"), (0x0040DB00, "CS", template)],)))
        return item

    def code(self, relationship: str, name: Code, value: Code, children: Sequence[Item] = ()) -> Item:
        """CODE."""
        return [*self._item(relationship, "CODE", name, children), (0x0040A168, "SQ", self.coded(value))]

    def text(self, relationship: str, name: Code, text: str) -> Item:
        """TEXT."""
        return [*self._item(relationship, "TEXT", name, ()), (0x0040A160, "UT", paragraphs(text))]

    def uid_reference(self, relationship: str, name: Code, uid: str) -> Item:
        """UIDREF."""
        return [*self._item(relationship, "UIDREF", name, ()), (0x0040A124, "UI", uid)]

    def number(self, relationship: str, name: Code, value: float, unit: Code) -> Item:
        """NUM; what is no finite number is written as missing, with Not a number as its qualifier (CID 42)."""
        item = self._item(relationship, "NUM", name, ())
        if math.isfinite(value):
            measured: Item = [(0x0040A30A, "DS", decimal_string(value)), (0x004008EA, "SQ", self.coded(unit))]
            return [*item, (0x0040A300, "SQ", (measured,))]
        return [*item, (0x0040A300, "SQ", ()), (0x0040A301, "SQ", self.coded(codes.NOT_A_NUMBER))]

    def image(
        self,
        relationship: str,
        name: Code | None,
        sop_class_uid: str,
        sop_instance_uid: str,
        *,
        frame: int | None = None,
        children: Sequence[Item] = (),
    ) -> Item:
        """IMAGE; `frame`: 1-based, only for a multi-frame source (PS3.3 Table C.18.4-1)."""
        reference: Item = [(0x00081150, "UI", sop_class_uid), (0x00081155, "UI", sop_instance_uid)]
        if frame is not None:
            reference.append((0x00081160, "IS", str(frame)))
        item: Item = [(0x0040A010, "CS", relationship), (0x0040A040, "CS", "IMAGE"), (0x00081199, "SQ", (reference,))]
        if name is not None:
            item.append((0x0040A043, "SQ", self.coded(name)))
        if children:
            item.append((0x0040A730, "SQ", children))
        return item

    def polyline(self, relationship: str, name: Code, points: NDArray[Any], image: Item) -> Item:
        """SCOORD of type POLYLINE; `points`: float32, shape (vertices, 2), (column, row); `image`: what it is selected from."""
        item = self._item(relationship, "SCOORD", name, (image,))
        return [*item, (0x00700022, "FL", points), (0x00700023, "CS", "POLYLINE")]
