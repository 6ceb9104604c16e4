"""The Query/Retrieve information models: their levels, and the unique keys that lead down to an entity.

References
----------
DICOM PS3.4 C.3 and C.6 (information models), C.4.1.2.1 and C.4.2.2.1 (baseline behaviour), C.5 (extended negotiation)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pydicom.datadict import tag_for_keyword

from dicom_node.dimse.identifier import QUERY_RETRIEVE_LEVEL, Identifier, InvalidIdentifier
from storage.records import Level

DEPTH: Mapping[Level, int] = MappingProxyType({Level.PATIENT: 0, Level.STUDY: 1, Level.SERIES: 2, Level.INSTANCE: 3})
UNIQUE_KEYS: Mapping[Level, str] = MappingProxyType(
    {
        Level.PATIENT: "PatientID",
        Level.STUDY: "StudyInstanceUID",
        Level.SERIES: "SeriesInstanceUID",
        Level.INSTANCE: "SOPInstanceUID",
    }
)
MAXIMUM_UIDS: Final = 10_000
"""Of one list of UIDs."""
_UID_LENGTH = 64


@dataclass(frozen=True, slots=True)
class InformationModel:
    """A hierarchy of levels, the root first."""

    name: str
    levels: tuple[Level, ...]
    find: str
    """SOP Class UID of its C-FIND; those of C-MOVE and C-GET follow it."""

    @property
    def move(self) -> str:
        """SOP Class UID of its C-MOVE."""
        return self.find[:-1] + "2"

    @property
    def get(self) -> str:
        """SOP Class UID of its C-GET."""
        return self.find[:-1] + "3"

    def require_level(self, identifier: Identifier) -> None:
        """Check that the level is one of the model's.

        Raises
        ------
        InvalidIdentifier
            It is not.
        """
        if identifier.level not in self.levels:
            raise InvalidIdentifier(f"the {self.name} model has no level {identifier.level}", offending=(QUERY_RETRIEVE_LEVEL,))

    def path(self, identifier: Identifier) -> dict[str, str]:
        """Return the unique keys of the levels above that of the Identifier, each a single value.

        Raises
        ------
        InvalidIdentifier
            One is missing, or is no single value.
        """
        found: dict[str, str] = {}
        for level in self.levels[: self.levels.index(identifier.level)]:
            keyword = UNIQUE_KEYS[level]
            value = identifier.keys.get(keyword, "")
            if not value or set(value) & set("*?\\"):
                problem = "has to be a single value" if value else "is missing"
                raise InvalidIdentifier(
                    f"{keyword} {problem} at level {identifier.level}, unless relational is negotiated", offending=(_tag(keyword),)
                )
            found[keyword] = value
        return found


MODELS: Final = (
    InformationModel("Patient Root", tuple(Level), "1.2.840.10008.5.1.4.1.2.1.1"),
    InformationModel("Study Root", (Level.STUDY, Level.SERIES, Level.INSTANCE), "1.2.840.10008.5.1.4.1.2.2.1"),
    InformationModel("Patient/Study Only", (Level.PATIENT, Level.STUDY), "1.2.840.10008.5.1.4.1.2.3.1"),
)
"""Patient/Study Only is retired since 2004, and still asked for."""


def uids(keyword: str, value: str) -> list[str]:
    """Return the members of a list of UIDs, each once; what is too long for a UID matches nothing and is left out.

    Raises
    ------
    InvalidIdentifier
        There are too many.
    """
    members = {part.strip() for part in value.split("\\")}
    found = sorted(part for part in members if 0 < len(part) <= _UID_LENGTH)
    if len(found) > MAXIMUM_UIDS:
        raise InvalidIdentifier(f"more than {MAXIMUM_UIDS} values of {keyword}; ask in parts", offending=(_tag(keyword),))
    return found


def _tag(keyword: str) -> int:
    return tag_for_keyword(keyword) or 0
