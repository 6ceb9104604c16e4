"""The search of the index: one for QIDO-RS and C-FIND alike. A search adds up a few series, and never counts instances."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Column, ColumnElement, Row, Select, bindparam, distinct, func, or_, select

from storage import texts
from storage.errors import InvalidQuery, StorageError
from storage.matching import combined, condition, keys_present, patterns, text
from storage.records import INDEXED, Level, Match, Query
from storage.tables import COLUMN_NAMES, INSTANCE_JOIN, INSTANCES, PATIENTS, SERIES, SERIES_JOIN, STUDIES

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

T = TypeVar("T")

_DEPTH = {Level.PATIENT: 0, Level.STUDY: 1, Level.SERIES: 2, Level.INSTANCE: 3}
_PAGE = 500
_TABLE_OF = {Level.PATIENT: STUDIES, Level.STUDY: STUDIES, Level.SERIES: SERIES, Level.INSTANCE: INSTANCES}
_NEWEST_STUDY = (STUDIES.c.study_date.desc(), STUDIES.c.study_time.desc(), STUDIES.c.study_instance_uid.desc())

# level -> (rows of, key, order of answers)
_SEARCH: Mapping[Level, tuple[Any, Column[Any], tuple[ColumnElement[Any], ...]]] = {
    Level.PATIENT: (PATIENTS, PATIENTS.c.id, (PATIENTS.c.patient_id, PATIENTS.c.id)),
    Level.STUDY: (STUDIES, STUDIES.c.id, _NEWEST_STUDY),
    Level.SERIES: (SERIES_JOIN, SERIES.c.id, (*_NEWEST_STUDY, SERIES.c.series_instance_uid)),
    Level.INSTANCE: (INSTANCE_JOIN, INSTANCES.c.id, (*_NEWEST_STUDY, SERIES.c.series_instance_uid, INSTANCES.c.sop_instance_uid)),
}
_STUDY_ANSWER = (
    STUDIES.c.id.label("study"),
    STUDIES.c.attributes.label("study_attributes"),
    STUDIES.c.modalities,
    STUDIES.c.sop_classes,
)
_SERIES_ANSWER = (SERIES.c.id.label("series"), SERIES.c.attributes.label("series_attributes"), SERIES.c.instance_count.label("in_series"))
_ANSWER: Mapping[Level, tuple[ColumnElement[Any], ...]] = {
    Level.PATIENT: (PATIENTS.c.attributes.label("patient_attributes"),),
    Level.STUDY: _STUDY_ANSWER,
    Level.SERIES: (*_STUDY_ANSWER, *_SERIES_ANSWER),
    Level.INSTANCE: (*_STUDY_ANSWER, *_SERIES_ANSWER, INSTANCES.c.attributes.label("own_attributes")),
}
_COUNTS = (
    select(SERIES.c.study_ref, func.count(), func.sum(SERIES.c.instance_count))
    .where(SERIES.c.study_ref.in_(bindparam("refs", expanding=True)))
    .group_by(SERIES.c.study_ref)
)
_PATIENT_COUNTS = (
    select(STUDIES.c.patient_ref, func.count(distinct(STUDIES.c.id)), func.count(), func.sum(SERIES.c.instance_count))
    .select_from(SERIES_JOIN)
    .where(STUDIES.c.patient_ref.in_(bindparam("refs", expanding=True)))
    .group_by(STUDIES.c.patient_ref)
)


def match(database: Database, query: Query) -> list[Match]:
    """Return what matches, newest study first, then by UID: a stable order over pages.

    Series and instances across studies come newest filed first instead: an order that is walked, not sorted, in a million rows.

    Raises
    ------
    InvalidQuery
        A key that is not indexed or belongs to a lower level; a value that is none of its value representation; a negative limit.
    """
    statement = statement_of(query)
    with database.read() as connection:
        keys = _keys(connection, query, statement)
        return _matches(connection, query.level, keys)


def _keys(connection: Connection, query: Query, statement: Select[Any]) -> list[int]:
    """Return the keys of what matches, in order."""
    return [row[0] for row in connection.execute(statement.where(*_narrowing(connection, query)))]


def _matches(connection: Connection, level: Level, keys: list[int]) -> list[Match]:
    """Return the answers of the rows of a level that are (still) there, in the order of `keys`."""
    source, key, _ = _SEARCH[level]
    found = select(key.label("key"), *_ANSWER[level]).select_from(source)
    rows = {row.key: row for page in pages(keys) for row in connection.execute(found.where(key.in_(page)))}
    counts: dict[int, tuple[int, ...]] = {}
    statement, refs = (_PATIENT_COUNTS, set(rows)) if level is Level.PATIENT else (_COUNTS, {row.study for row in rows.values()})
    for page in pages(sorted(refs)):
        counts.update((ref, tuple(numbers)) for ref, *numbers in connection.execute(statement, {"refs": page}))
    parsed: dict[str, Any] = {}
    return [Match(_answer(rows[one], level, counts, parsed)) for one in keys if one in rows]


def count(database: Database, query: Query) -> int:
    """Return how many match, whatever limit and offset.

    Raises
    ------
    InvalidQuery
        As `match`.
    """
    source, _, _ = _SEARCH[query.level]
    with database.read() as connection:
        conditions = [*_conditions(query), *_narrowing(connection, query)]
        return int(connection.execute(select(func.count()).select_from(source).where(*conditions)).scalar_one())


class Interruptible:
    """A read of the index that another thread can end: it may take long."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._driver: Any = None
        self._cancelled = False

    def cancel(self) -> None:
        """Have the read, which another thread runs, end soon; to be called again for as long as it has not."""
        with self._lock:
            self._cancelled = True
            if self._driver is not None:
                # SQLite's name for it, then that of psycopg; one that comes before the statement has begun is without effect
                stop = getattr(self._driver, "interrupt", None) or self._driver.cancel
                stop()

    def _read(self, take: Callable[[Connection], list[T]]) -> list[T]:
        """Read; nothing when it was cancelled."""
        try:
            with self._database.read() as connection:
                with self._lock:
                    if self._cancelled:
                        return []
                    self._driver = connection.connection.driver_connection
                try:
                    return take(connection)
                finally:
                    with self._lock:  # from here on the connection may be another's
                        self._driver = None
        except StorageError:
            if not self._cancelled:
                raise
            return []


class Finding(Interruptible):
    """A search in two steps: which rows match, which may take long and can be cancelled; then their answers, page by page.

    Between the steps it holds a number for each match, and no transaction: what was erased meanwhile is left out.

    Raises
    ------
    InvalidQuery
        As `match`.
    """

    def __init__(self, database: Database, query: Query) -> None:
        super().__init__(database)
        self._query = query
        self._statement = statement_of(query)
        self._keys: list[int] = []

    def find(self) -> int:
        """Find what matches and return how many; 0 when it was cancelled.

        Raises
        ------
        StorageError
            The database cannot be read.
        """
        self._keys = self._read(lambda connection: _keys(connection, self._query, self._statement))
        return len(self._keys)

    def pages(self) -> Iterator[list[Match]]:
        """Give the answers of what `find` found, in its order, a page at a time.

        Raises
        ------
        StorageError
            The database cannot be read.
        """
        for page in pages(self._keys):
            with self._database.read() as connection:
                found = _matches(connection, self._query.level, page)
            yield found


@dataclass(frozen=True, slots=True)
class Located:
    """What is to be known of an archived instance before it is opened."""

    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    byte_count: int
    """Of its data set, as stored."""


class Locating(Interruptible):
    """Finds the instances that match, at most ``query.limit``.

    Raises
    ------
    InvalidQuery
        As `match`; a search for something else than instances.
    """

    def __init__(self, database: Database, query: Query) -> None:
        super().__init__(database)
        if query.level is not Level.INSTANCE:
            raise InvalidQuery("only instances are located")
        columns = (
            STUDIES.c.study_instance_uid,
            SERIES.c.series_instance_uid,
            INSTANCES.c.sop_class_uid,
            INSTANCES.c.sop_instance_uid,
            INSTANCES.c.transfer_syntax_uid,
            INSTANCES.c.byte_count,
            SERIES.c.series_number,
            INSTANCES.c.instance_number,
        )
        self._query = query
        self._statement = select(*columns).select_from(INSTANCE_JOIN).where(*_conditions(query)).limit(query.limit)

    def locate(self) -> list[Located]:
        """Return them by study, series number and instance number; none when it was cancelled.

        Raises
        ------
        StorageError
            The database cannot be read.
        """
        shared: dict[str, str] = {}  # most instances have their study, series, class and syntax in common
        found = self._read(
            lambda connection: [
                (
                    (row.study_instance_uid, int(row.series_number or 0), row.series_instance_uid, int(row.instance_number or 0)),
                    Located(
                        study_instance_uid=shared.setdefault(row.study_instance_uid, row.study_instance_uid),
                        series_instance_uid=shared.setdefault(row.series_instance_uid, row.series_instance_uid),
                        sop_class_uid=shared.setdefault(row.sop_class_uid, row.sop_class_uid),
                        sop_instance_uid=row.sop_instance_uid,
                        transfer_syntax_uid=shared.setdefault(row.transfer_syntax_uid, row.transfer_syntax_uid),
                        byte_count=row.byte_count,
                    ),
                )
                for row in connection.execute(self._statement.where(*_narrowing(connection, self._query)))
            ]
        )
        found.sort(key=lambda one: (one[0], one[1].sop_instance_uid))
        return [located for _, located in found]


def locate(database: Database, query: Query) -> list[Located]:
    """Locate at once; raises as `Locating` does."""
    return Locating(database, query).locate()


def statement_of(query: Query) -> Select[Any]:
    """Return the statement that selects the keys of what matches, in order; raises as `match`."""
    if query.offset < 0 or (query.limit is not None and query.limit < 0):
        raise InvalidQuery("limit and offset must not be negative")
    source, key, order = _SEARCH[query.level]
    if query.level in (Level.SERIES, Level.INSTANCE) and "StudyInstanceUID" not in keys_present(query.keys):
        order = (key.desc(),)
    statement = select(key).select_from(source).where(*_conditions(query)).order_by(*order)
    if query.limit is not None:
        statement = statement.limit(query.limit)
    return statement.offset(query.offset) if query.offset else statement


def pages(keys: list[T]) -> Iterator[list[T]]:
    """Give the keys in parts that a statement takes."""
    for start in range(0, len(keys), _PAGE):
        yield keys[start : start + _PAGE]


def members(written: str) -> list[str]:
    r"""Return the members of a set written ``\A\B\``."""
    return [member for member in written.split("\\") if member]


def parents(row: Row[Any], parsed: dict[str, Any]) -> dict[str, list[str]]:
    """Return the attributes of a row's study and series; `parsed` remembers what was parsed."""
    merged: dict[str, list[str]] = {}
    for written in (row.study_attributes, row.series_attributes):
        if written not in parsed:
            parsed[written] = json.loads(written)
        merged.update(parsed[written])
    return merged


def _answer(row: Row[Any], level: Level, counts: Mapping[int, tuple[int, ...]], parsed: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    if level is Level.PATIENT:
        of_patient = {keyword: tuple(value) for keyword, value in json.loads(row.patient_attributes).items()}
        numbers = ("NumberOfPatientRelatedStudies", "NumberOfPatientRelatedSeries", "NumberOfPatientRelatedInstances")
        return of_patient | {keyword: (str(number),) for keyword, number in zip(numbers, counts.get(row.key, (0, 0, 0)), strict=True)}
    merged: dict[str, list[str]] = json.loads(row.study_attributes) if level is Level.STUDY else parents(row, parsed)
    if level is Level.INSTANCE:
        merged.update(
            (keyword, value) for keyword, value in json.loads(row.own_attributes).items() if INDEXED[keyword][0] is Level.INSTANCE
        )
    answer = {keyword: tuple(value) for keyword, value in merged.items()}
    answer["ModalitiesInStudy"] = tuple(members(row.modalities))
    answer["SOPClassesInStudy"] = tuple(members(row.sop_classes))
    series, instances = counts[row.study]
    answer["NumberOfStudyRelatedSeries"] = (str(series),)
    answer["NumberOfStudyRelatedInstances"] = (str(instances),)
    if level is not Level.STUDY:
        answer["NumberOfSeriesRelatedInstances"] = (str(row.in_series),)
    return answer


# -- from queries to conditions ------------------------------------------------------------------------------------------------------

_PAIRS = {
    "StudyDate": "StudyTime",
    "SeriesDate": "SeriesTime",
    "PerformedProcedureStepStartDate": "PerformedProcedureStepStartTime",
    "ContentDate": "ContentTime",
}


def _conditions(query: Query) -> list[ColumnElement[bool]]:
    keys = keys_present(query.keys)
    conditions: list[ColumnElement[bool]] = []
    if query.combined_datetime:
        for date, moment in _PAIRS.items():
            if date in keys and moment in keys and _DEPTH[INDEXED[date][0]] <= _DEPTH[query.level]:
                pair = (_columns(query.level, date)[0], keys.pop(date)), (_columns(query.level, moment)[0], keys.pop(moment))
                conditions.append(combined(*pair, keywords=(date, moment)))
    for keyword, value in keys.items():
        if keyword == "ModalitiesInStudy" and query.level is not Level.PATIENT:
            conditions.append(_modality(value))
            continue
        if keyword not in INDEXED:
            raise InvalidQuery(f"{keyword} is no attribute that can be searched by at this level")
        level, vr = INDEXED[keyword]
        if _DEPTH[level] > _DEPTH[query.level]:
            raise InvalidQuery(f"{keyword} is an attribute of a lower level than the search")
        wanted = condition(keyword, vr, _columns(query.level, keyword), value)
        if wanted is not None:
            conditions.append(wanted)
    return conditions


def _narrowing(connection: Connection, query: Query) -> list[ColumnElement[bool]]:
    """Return conditions that all that matches fulfils, and that the engine finds without reading every study; often none."""
    narrowing: list[ColumnElement[bool]] = []
    keys = keys_present(query.keys)
    for keyword in texts.KEYWORDS if "StudyInstanceUID" not in keys else ():
        if keyword in keys and _DEPTH[INDEXED[keyword][0]] <= _DEPTH[query.level]:
            for columns, wanted in patterns(INDEXED[keyword][1], _columns(query.level, keyword), keys[keyword]):
                ids = texts.ids_like(connection, columns, wanted)
                if ids is not None:
                    narrowing.append(columns[0].table.c.id.in_(ids))
    return narrowing


def _columns(level: Level, keyword: str) -> list[Column[Any]]:
    table = PATIENTS if level is Level.PATIENT else _TABLE_OF[INDEXED[keyword][0]]
    return [table.c[name] for name in COLUMN_NAMES[keyword]]


def _modality(value: str) -> ColumnElement[bool]:
    """Return the condition that a series of the study has one of the modalities (separated by backslash or comma)."""
    wanted = [part.strip() for part in value.replace(",", "\\").split("\\") if part.strip()]
    if any(set(part) & set("*?") for part in wanted):
        inner = SERIES.alias("any_series")
        return (
            select(inner.c.id)
            .where(inner.c.study_ref == STUDIES.c.id, or_(*(text(inner.c.modality, part) for part in wanted)))
            .correlate(STUDIES)
            .exists()
        )
    return or_(*(STUDIES.c.modalities.contains(f"\\{part}\\", autoescape=True, escape="!") for part in wanted))
