"""Do two databases hold the same index? Compared row by row; the numbers that each gave its rows do not count."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, FromClause, Select, and_, func, or_, select

from storage.database import Database
from storage.study_keys import STUDY_KEYS
from storage.tables import INSTANCE_JOIN, INSTANCES, PATIENTS, QUARANTINE, REPORTS, SERIES, SERIES_JOIN, STUDIES, TEXTS, TRIGRAMS

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row, Table

_PAGE = 500
_JSON = frozenset({"attributes", "extra", "models"})
"""Columns of JSON text: the order of members says nothing."""
_UID = STUDIES.c.study_instance_uid

# name: (rows of, natural key, columns that are numbers or times of one database alone, columns of parents by which they are named)
_TABLES: Mapping[str, tuple[FromClause, Table, tuple[ColumnElement[Any], ...], frozenset[str], tuple[ColumnElement[Any], ...]]] = {
    "patients": (PATIENTS, PATIENTS, (PATIENTS.c.identity,), frozenset({"id"}), ()),
    "studies": (
        STUDIES.join(PATIENTS, STUDIES.c.patient_ref == PATIENTS.c.id),
        STUDIES,
        (_UID,),
        frozenset({"id", "patient_ref"}),
        (PATIENTS.c.identity,),
    ),
    "series": (SERIES_JOIN, SERIES, (_UID, SERIES.c.series_instance_uid), frozenset({"id", "study_ref"}), ()),
    "instances": (
        INSTANCE_JOIN,
        INSTANCES,
        (INSTANCES.c.sop_instance_uid,),
        frozenset({"id", "series_ref"}),
        (_UID, SERIES.c.series_instance_uid),
    ),
    "quarantine": (QUARANTINE, QUARANTINE, (QUARANTINE.c.sop_instance_uid, QUARANTINE.c.sha256), frozenset({"id"}), ()),
    "reports": (REPORTS, REPORTS, (REPORTS.c.sop_instance_uid,), frozenset(), ()),
    "texts": (TEXTS, TEXTS, (TEXTS.c.value,), frozenset({"id"}), ()),
    "trigrams": (
        TRIGRAMS.join(TEXTS, TRIGRAMS.c.text_ref == TEXTS.c.id),
        TRIGRAMS,
        (TEXTS.c.value, TRIGRAMS.c.trigram),
        frozenset({"text_ref"}),
        (),
    ),
    "study_keys": (STUDY_KEYS, STUDY_KEYS, (STUDY_KEYS.c.id,), frozenset(), ()),
}


def differences(first: Database, second: Database, *, at_most: int = 100) -> list[str]:
    """Return how the index of `second` differs from that of `first`, in sentences without identities; empty when they are equal.

    Patients, studies, series, instances, quarantine, reports, texts and study keys. Memory does not grow with them.
    """
    found: list[str] = []
    for name, (rows, table, key, own, parents) in _TABLES.items():
        columns = [*(column for column in table.c if column.name not in own), *(column.label(f"of_{column.name}") for column in parents)]
        statement = select(*(part.label(f"key_{number}") for number, part in enumerate(key)), *columns).select_from(rows)
        with first.read() as one, second.read() as two:
            counts = [int(connection.execute(select(func.count()).select_from(table)).scalar_one()) for connection in (one, two)]
            if counts[0] != counts[1]:
                found.append(f"{name}: {counts[0]} rows here, {counts[1]} there")
            for number, row in enumerate(_walk(one, statement, key), 1):
                same = [part == row[place] for place, part in enumerate(key)]
                other = two.execute(statement.where(and_(*same))).first()
                if other is None:
                    found.append(f"{name}: row {number} is not there")
                elif tuple(row) != tuple(other) and (names := _unequal(row, other)):
                    found.append(f"{name}: row {number} differs in {', '.join(names)}")
                if len(found) >= at_most:
                    return [*found, "and perhaps more"]
    return found


def _unequal(row: Row[Any], other: Row[Any]) -> list[str]:
    return [
        column
        for column, here, there in zip(row._fields, row, other, strict=True)
        if here != there and not (column in _JSON and json.loads(here) == json.loads(there))
    ]


def _walk(connection: Connection, statement: Select[Any], key: tuple[ColumnElement[Any], ...]) -> Iterator[Row[Any]]:
    """Give the rows by rising key, a page in memory."""
    after: tuple[Any, ...] | None = None
    ordered = statement.order_by(*key).limit(_PAGE)
    while True:
        page = ordered if after is None else ordered.where(_beyond(key, after))
        rows = connection.execute(page).all()
        yield from rows
        if len(rows) < _PAGE:
            return
        after = tuple(rows[-1])[: len(key)]


def _beyond(key: tuple[ColumnElement[Any], ...], after: tuple[Any, ...]) -> ColumnElement[bool]:
    beyond = key[0] > after[0]
    return beyond if len(key) == 1 else or_(beyond, and_(key[0] == after[0], key[1] > after[1]))
