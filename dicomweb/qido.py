"""QIDO-RS: search for studies, series and instances.

References
----------
DICOM PS3.18 Section 8.3.4 Query Parameters, Section 10.6 Search Transaction
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from aiohttp import web
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag, tag_for_keyword

from dicomweb.context import Services, accepted, instance_url, raw_parameters, uid
from dicomweb.errors import BadRequest
from dicomweb.metadata import decimal, integer, person_name
from dicomweb.negotiate import json_type
from storage.records import INDEXED, Level, Match, Query

_HEX = re.compile(r"[0-9A-Fa-f]{8}")
_NUMBER = re.compile(r"[0-9]{1,18}")
_PASSED_OVER = frozenset({"accept", "charset", "emptyvaluematching", "multiplevaluematching"})
_COMPUTED: Mapping[str, Level] = MappingProxyType(
    {
        "ModalitiesInStudy": Level.STUDY,
        "SOPClassesInStudy": Level.STUDY,
        "NumberOfStudyRelatedSeries": Level.STUDY,
        "NumberOfStudyRelatedInstances": Level.STUDY,
        "NumberOfSeriesRelatedInstances": Level.SERIES,
    }
)
_ALWAYS: Mapping[Level, tuple[str, ...]] = MappingProxyType(
    {
        # PS3.18 Tables 10.6.3-3, -4 and -5: present in every answer, empty when not known
        Level.STUDY: (
            "StudyDate", "StudyTime", "AccessionNumber", "InstanceAvailability", "ModalitiesInStudy", "ReferringPhysicianName",
            "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID", "NumberOfStudyRelatedSeries",
            "NumberOfStudyRelatedInstances",
        ),
        Level.SERIES: (
            "Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber", "NumberOfSeriesRelatedInstances",
            "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime", "RequestAttributesSequence",
        ),
        Level.INSTANCE: ("SOPClassUID", "SOPInstanceUID", "InstanceAvailability", "InstanceNumber"),
    }
)  # fmt: skip
_WHEN_KNOWN: Mapping[Level, tuple[str, ...]] = MappingProxyType(
    {
        Level.STUDY: ("TimezoneOffsetFromUTC", "StudyDescription", "SOPClassesInStudy"),
        Level.SERIES: ("TimezoneOffsetFromUTC",),
        Level.INSTANCE: ("TimezoneOffsetFromUTC", "Rows", "Columns", "BitsAllocated", "NumberOfFrames"),
    }
)
_LEVELS = (Level.STUDY, Level.SERIES, Level.INSTANCE)
_FUZZY = "The fuzzymatching parameter is not supported. Only literal matching has been performed."


@dataclass(slots=True)
class Parameters:
    """The query parameters of a search, read and checked."""

    keys: dict[str, str] = field(default_factory=dict)
    include: set[str] = field(default_factory=set)
    include_all: bool = False
    limit: int | None = None
    offset: int = 0
    fuzzy: bool = False


def attribute(name: str) -> str:
    """Keyword of an attribute that is given by keyword or by eight hexadecimal digits.

    Raises
    ------
    BadRequest
        It is neither, is private, or is an attribute inside of a sequence.
    """
    if _HEX.fullmatch(name):
        tag = int(name, 16)
        keyword = keyword_for_tag(tag) if dictionary_has_tag(tag) else ""
    else:
        keyword = name if tag_for_keyword(name) is not None else ""
    if not keyword:
        raise BadRequest(
            "a query parameter is no attribute that is known here: give keyword or eight hexadecimal digits; "
            "private attributes and sequence paths are not searched"
        )
    return keyword


def parse_parameters(raw: Iterable[tuple[str, str]], *, maximum: int) -> Parameters:
    """Read the still percent-encoded parameters of a search.

    Raises
    ------
    BadRequest
        Too many, an unknown one, a number that is none, or an attribute that is given twice.
    """
    parameters = Parameters()
    for count, (raw_name, raw_value) in enumerate(raw):
        if count >= maximum:
            raise BadRequest(f"more than {maximum} query parameters")
        try:
            name = urllib.parse.unquote_plus(raw_name, errors="strict")
            value = urllib.parse.unquote_plus(raw_value, errors="strict")
        except UnicodeDecodeError as error:
            raise BadRequest("a query parameter is not UTF-8") from error
        if "\0" in value:
            raise BadRequest("a query parameter holds a NUL")
        match name:
            case "limit" | "offset":
                if not _NUMBER.fullmatch(value):
                    raise BadRequest(f"{name} is no non-negative whole number")
                if name == "limit":
                    parameters.limit = int(value)
                else:
                    parameters.offset = int(value)
            case "fuzzymatching":
                if value.lower() not in {"true", "false"}:
                    raise BadRequest("fuzzymatching is neither true nor false")
                parameters.fuzzy = value.lower() == "true"
            case "includefield":
                _include(parameters, value)
            case _ if name in _PASSED_OVER:
                pass
            case _:
                _key(parameters, attribute(name), value)
    return parameters


def _include(parameters: Parameters, value: str) -> None:
    for part in value.split(","):
        name = part.strip()
        if name.lower() == "all":
            parameters.include_all = True
        elif name:
            # A path into a sequence and a private attribute are allowed here; what is not in the index cannot be given (PS3.18 8.3.4.3).
            head = name.split(".")[0]
            known = _HEX.fullmatch(head) is not None and not dictionary_has_tag(int(head, 16))
            if not known:
                parameters.include.add(attribute(head))


def _key(parameters: Parameters, keyword: str, value: str) -> None:
    if keyword in parameters.keys:
        if INDEXED.get(keyword, (None, ""))[1] != "UI":
            raise BadRequest(f"{keyword} is given twice")
        value = "\\".join(part for part in (parameters.keys[keyword], value) if part)
    parameters.keys[keyword] = value


def restrict(keys: dict[str, str], keyword: str, value: str) -> bool:
    """Add a UID of the path to the keys; False if the keys ask for another one, so that nothing can match."""
    asked = [part for part in re.split(r"[\\,]", keys.get(keyword, "")) if part.strip("*")]
    keys[keyword] = value
    return not asked or value in asked


def vr_of(keyword: str) -> str:
    """VR of an attribute of an answer."""
    return INDEXED[keyword][1] if keyword in INDEXED else str(dictionary_VR(keyword))


def json_value(keyword: str, values: tuple[str, ...]) -> dict[str, Any]:
    """Write one attribute in DICOM JSON; without Value when there is none."""
    vr = vr_of(keyword)
    converted: list[Any]
    match vr:
        case "PN":
            converted = [person_name(value) for value in values]
        case "IS" | "US":
            converted = [integer(value.strip()) for value in values]
        case "DS":
            converted = [decimal(value.strip()) for value in values]
        case _:
            converted = [value or None for value in values]
    return {"vr": vr, "Value": converted} if any(value is not None for value in converted) else {"vr": vr}


def answer(match: Match, level: Level, top: Level, parameters: Parameters, base: str) -> dict[str, Any]:
    """Write one result.

    Parameters
    ----------
    level
        What was searched for.
    top
        The highest level whose attributes are not given by the path, and so belong into the result.
    """
    known = match.attributes
    keywords: dict[str, None] = {}
    for one in _LEVELS[_LEVELS.index(top) : _LEVELS.index(level) + 1]:
        keywords |= dict.fromkeys(_ALWAYS[one])
        keywords |= dict.fromkeys(keyword for keyword in _WHEN_KNOWN[one] if known.get(keyword))
    keywords |= dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")[: _LEVELS.index(level) + 1])
    keywords |= dict.fromkeys(keyword for keyword in parameters.keys if keyword in known)
    if parameters.include_all:
        keywords |= dict.fromkeys(known)
    keywords |= dict.fromkeys(keyword for keyword in parameters.include if _available(keyword, level))
    texts = {keyword: known.get(keyword, ()) for keyword in keywords}
    texts["InstanceAvailability"] = ("ONLINE",)
    if "ModalitiesInStudy" in texts and not texts["ModalitiesInStudy"]:
        texts["ModalitiesInStudy"] = ("OT",)  # computed; viewers' study lists break without a value
    study, series, instance = (known.get(name, ("",))[0] for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
    url = instance_url(base, study, series if level is not Level.STUDY else "", instance if level is Level.INSTANCE else "")
    result = {f"{tag_for_keyword(keyword):08X}": json_value(keyword, values) for keyword, values in texts.items()}
    result["00081190"] = {"vr": "UR", "Value": [url]}
    if not all(value.isascii() for values in texts.values() for value in values):
        result["00080005"] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    return dict(sorted(result.items()))


def _available(keyword: str, level: Level) -> bool:
    """Whether an attribute can be included in an answer of this level."""
    of = INDEXED[keyword][0] if keyword in INDEXED else _COMPUTED.get(keyword)
    return of is Level.PATIENT or (of in _LEVELS and _LEVELS.index(of) <= _LEVELS.index(level))


class Search:
    """GET (and HEAD) of the search resources."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def studies(self, request: web.Request) -> web.StreamResponse:
        """/studies: 200, 400, 406."""
        return await self._search(request, Level.STUDY)

    async def series(self, request: web.Request) -> web.StreamResponse:
        """/series and /studies/{study}/series: 200, 400, 406."""
        return await self._search(request, Level.SERIES)

    async def instances(self, request: web.Request) -> web.StreamResponse:
        """/instances, /studies/{study}/instances, /studies/{study}/series/{series}/instances: 200, 400, 406."""
        return await self._search(request, Level.INSTANCE)

    async def _search(self, request: web.Request, level: Level) -> web.StreamResponse:
        services = self._services
        media_type = json_type(accepted(request))
        base = services.base_url(request)
        parameters = parse_parameters(raw_parameters(request), maximum=services.limits.query_parameters)
        study, series = uid(request, "study"), uid(request, "series")
        keys = dict(parameters.keys)
        above = (("StudyInstanceUID", study), ("SeriesInstanceUID", series))
        possible = [restrict(keys, keyword, value) for keyword, value in above if value]
        limit = min(services.limits.results, services.limits.results if parameters.limit is None else parameters.limit)
        query = Query(level, keys, limit=limit, offset=min(parameters.offset, 2**62))
        matches, left = await services.pool.run(self._match, query) if all(possible) else ([], 0)
        await services.note(request, "study.searched", study, level=str(level), keys=keys, matches=len(matches))
        top = _LEVELS[min(_LEVELS.index(level), bool(study) + bool(series))]
        body = json.dumps([answer(match, level, top, parameters, base) for match in matches], ensure_ascii=False).encode("utf-8", "replace")
        response = web.Response(body=body, headers={"Content-Type": media_type, "Cache-Control": "private, no-cache"})
        for warning in _warnings(parameters, left):
            response.headers.add("Warning", f'299 {base}: "{warning}"')
        return response

    def _match(self, query: Query) -> tuple[list[Match], int]:
        """Results of a page, and how many more there are behind it."""
        if query.limit == 0:
            return [], 0
        matches = self._services.index.match(query)
        left = self._services.index.count(query) - query.offset - len(matches) if len(matches) == query.limit else 0
        return matches, max(0, left)


def _warnings(parameters: Parameters, left: int) -> Iterator[str]:
    if parameters.fuzzy:
        yield _FUZZY
    if left:
        yield f"There are {left} additional results that can be requested"
