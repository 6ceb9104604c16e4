"""The trigrams of names and descriptions: they only narrow a search, never change it, and go when what they stand for goes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import sqlalchemy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from storage.index import Index
from storage.records import Level, Query
from storage.removal import instances_in, remove_in
from storage.search import count, locate, match, statement_of
from storage.tables import PATIENTS, STUDIES, TEXTS, TRIGRAMS
from storage.texts import ids_like, trigrams
from tests.storage.support import instance

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

_STUDIES = itertools.count(1)
_NAME = st.text("abB^ é", max_size=9)
_NAMES = st.one_of(_NAME, st.tuples(_NAME, _NAME, _NAME).map("=".join))
_WANTED = st.text("abB^ é*?=", max_size=9)
_DESCRIPTION = st.text("abB!%_\\ ", max_size=9)
_WANTED_DESCRIPTION = st.text("abB!%_\\ *?", max_size=9)


def file(database: Database, *values: dict[str, str], patient: str = "") -> list[str]:
    """File a study for each set of values, of a patient each unless one is named; their UIDs."""
    index = Index(database=database)
    studies = [f"1.2.{next(_STUDIES)}" for _ in values]

    def work(connection: Connection) -> None:
        for study, attributes in zip(studies, values, strict=True):
            index.add(connection, instance({"PatientID": patient or f"P{study}", **attributes}, study=study))

    database.write(work)
    return studies


def erase(database: Database, *studies: str) -> None:
    """Remove the rows of studies."""

    def work(connection: Connection) -> None:
        for study in studies:
            remove_in(connection, instances_in(connection, study))

    database.write(work)


def held(database: Database) -> set[tuple[str, str]]:
    """Return each text with each of its trigrams, as the tables have them."""
    with database.read() as connection:
        joined = select(TEXTS.c.value, TRIGRAMS.c.trigram).join(TRIGRAMS, TRIGRAMS.c.text_ref == TEXTS.c.id)
        found = {(row.value, row.trigram) for row in connection.execute(joined)}
        assert {text for text, _ in found} == set(connection.scalars(select(TEXTS.c.value)))
        assert len(found) == connection.scalar(select(sqlalchemy.func.count()).select_from(TRIGRAMS))
    return found


def due(database: Database) -> set[tuple[str, str]]:
    """Return each text of a study or patient with each of its runs of three characters."""
    groups = ("alphabetic", "ideographic", "phonetic")
    with database.read() as connection:
        texts = {
            text
            for table, more in ((STUDIES, ["study_description"]), (PATIENTS, []))
            for row in connection.execute(select(*(table.c[name] for name in [*(f"patient_name_{group}" for group in groups), *more])))
            for text in row
        }
    return {(text, text[start : start + 3]) for text in texts for start in range(len(text) - 2)}


@given(
    filed=st.lists(st.tuples(_NAMES, _DESCRIPTION), max_size=4),
    wanted=_WANTED,
    wanted_description=st.one_of(st.just(""), _WANTED_DESCRIPTION),
    level=st.sampled_from(Level),
    cut=st.tuples(st.booleans(), st.integers(0, 6), st.integers(3, 9)),
)
@example([("aab", "")], "aab^*^*", "", Level.STUDY, (False, 0, 3))  # components that are not there
@example([("aab", "")], "*^^^*", "", Level.STUDY, (False, 0, 3))
@example([("aab=aab^b", "")], "*=*b^b*", "", Level.PATIENT, (False, 0, 3))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_narrowed_search_finds_what_reading_everything_finds(
    database: Database,
    filed: list[tuple[str, str]],
    wanted: str,
    wanted_description: str,
    level: Level,
    cut: tuple[bool, int, int],
) -> None:
    """For any names, descriptions and patterns, parts of what was filed among them: the same rows in the same order, at each level."""
    file(database, *({"PatientName": name, "StudyDescription": description} for name, description in filed))
    part, first, last = cut
    if part and filed:
        wanted = f"*{filed[0][0][first:last]}{wanted[:1]}"
        wanted_description = wanted_description and f"*{filed[0][1][first:last]}*"
    keys = {"PatientName": wanted, "StudyDescription": wanted_description if level is not Level.PATIENT else ""}
    query = Query(level, keys)
    with database.read() as connection:
        rows = list(connection.scalars(statement_of(query)))
    assert count(database, query) == len(rows)
    uid = {Level.PATIENT: "PatientID", Level.STUDY: "StudyInstanceUID", Level.SERIES: "SeriesInstanceUID", Level.INSTANCE: "SOPInstanceUID"}
    found = [one.attributes[uid[level]] for one in match(database, query)]
    assert len(found) == len(set(found)) == len(rows)
    if level is Level.INSTANCE:
        assert len(locate(database, query)) == len(rows)
    assert held(database) == due(database)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("*son^anna", ["johnson^anna", "son^anna"]),
        ("?ohnson*", ["johnson^anna", "johnson^eva"]),
        ("*hns*eva", ["johnson^eva"]),
        ("*xyz*", []),
        ("*on*", None),
        ("*o?n*", None),
    ],
)
def test_a_pattern_leads_to_the_rows(database: Database, wanted: str, found: list[str] | None) -> None:
    """Three characters in a row are enough, wherever they stand; with fewer every row is looked at."""
    file(database, *({"PatientName": name} for name in ("Johnson^Anna", "Johnson^Eva", "Son^Anna", "Smith^Anna")))
    with database.read() as connection:
        ids = ids_like(connection, [STUDIES.c.patient_name_alphabetic, STUDIES.c.patient_name_phonetic], wanted)
        names = select(STUDIES.c.patient_name_alphabetic).where(STUDIES.c.id.in_(ids or [])).order_by(STUDIES.c.patient_name_alphabetic)
        assert (None if ids is None else list(connection.scalars(names))) == found


def test_what_is_frequent_is_read_as_before(database: Database) -> None:
    """More texts or more rows than it pays to name lead nowhere, and the search finds them all the same."""
    file(database, *({"PatientName": f"Many{number}", "StudyDescription": "Wound"} for number in range(501)))
    with database.read() as connection:
        assert ids_like(connection, [STUDIES.c.patient_name_alphabetic], "*any*") is None
        assert ids_like(connection, [STUDIES.c.study_description], "*oun*") is None
        assert len(ids_like(connection, [STUDIES.c.patient_name_alphabetic], "*any12*") or []) == 11
    for keys in ({"PatientName": "*any*"}, {"StudyDescription": "*oun*"}):
        assert count(database, Query(Level.STUDY, keys)) == 501


def test_a_text_goes_with_the_last_row_that_has_it(database: Database) -> None:
    """Erased is what nobody else is called, and nothing else: not in a study, not as the first name that a patient was filed under."""
    one, two = file(database, {"PatientName": "Doe^Jane"}, {"PatientName": "Roe^Jane"}, patient="P1")
    (other,) = file(database, {"PatientName": "Smith", "StudyDescription": "Roe^jane"})
    erase(database, one)
    assert {text for text, _ in held(database)} == {"doe^jane", "roe^jane", "smith", "Roe^jane"}
    erase(database, other)
    assert {text for text, _ in held(database)} == {"doe^jane", "roe^jane"}
    file(database, {"PatientName": "ROE^Jane"})
    erase(database, two)
    assert {text for text, _ in held(database)} == {"roe^jane"}
    assert held(database) == due(database)


def test_trigrams() -> None:
    """Each run once, by characters, not bytes."""
    assert trigrams("") == trigrams("ab") == []
    assert trigrams("ababab") == ["aba", "bab"]
    assert trigrams("山田^太郎") == ["^太郎", "山田^", "田^太"]
