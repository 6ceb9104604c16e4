"""Index: what is filed is found as the standard matches, on the right patient, once."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import ConflictingInstance, InstanceNotFound, IntegrityError, InvalidQuery
from storage.index import Index
from storage.matching import pattern
from storage.records import INDEXED, InstanceRecord, Level, Query, ReportRecord
from storage.search import statement_of
from tests.storage.support import instance, open_database

if TYPE_CHECKING:
    from storage.database import Database


@pytest.fixture
def index(database: Database) -> Index:
    """Return an index over the empty database."""
    return Index(database=database)


def file(database: Database, index: Index, *records: InstanceRecord) -> None:
    """File each record in a transaction of its own."""
    for record in records:
        database.write(lambda connection, record=record: index.add(connection, record))


def found(index: Index, level: Level = Level.STUDY, limit: int | None = None, offset: int = 0, **keys: str) -> list[str]:
    """Return the UIDs (patients: IDs) that match, in order."""
    unique = {
        Level.PATIENT: "PatientID",
        Level.STUDY: "StudyInstanceUID",
        Level.SERIES: "SeriesInstanceUID",
        Level.INSTANCE: "SOPInstanceUID",
    }
    query = Query(level, keys, limit, offset)
    matches = [match.attributes[unique[level]][0] for match in index.match(query)]
    if limit is None and not offset:
        assert index.count(query) == len(matches)
    return matches


# -- filing ----------------------------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_whole(database: Database, index: Index) -> None:
    """Every field of an instance's record is read back as it was filed, its own words where they differ from its parents' too."""
    first = instance({"StudyDescription": "Skin", "PatientSex": "F", "Manufacturer": "A", "InstanceNumber": "1"})
    second = instance({"StudyDescription": "Haut", "InstanceNumber": "2", "PatientName": ("Doe^J=山田", "Roe")}, role="report")
    file(database, index, first, second)
    for record in (first, second):
        assert index.find(record.summary.sop_instance_uid) == record
    assert database.write(lambda c: index.find_in(c, "9.9")) is None
    with pytest.raises(InstanceNotFound):
        index.find("9.9")


def test_the_same_instance_is_filed_once(database: Database, index: Index) -> None:
    """A second instance of a UID is refused and changes no count."""
    record = instance()
    file(database, index, record)
    with pytest.raises(ConflictingInstance):
        file(database, index, record)
    assert index.match(Query(Level.STUDY))[0].attributes["NumberOfStudyRelatedInstances"] == ("1",)


@pytest.mark.parametrize("other", [{"PatientID": "P2"}, {"PatientID": ""}, {"IssuerOfPatientID": "B"}, {"PatientID": "p1"}])
def test_a_study_belongs_to_one_patient(database: Database, index: Index, other: dict[str, str]) -> None:
    """A Study Instance UID with another Patient ID or issuer is refused, in a known and in a new series (threats row 44)."""
    file(database, index, instance(series="1.2.3.1"))
    for series in ("1.2.3.1", "1.2.3.2"):
        with pytest.raises(ConflictingInstance, match="Patient ID"):
            file(database, index, instance(other, series=series))
    assert found(index, Level.SERIES) == ["1.2.3.1"]
    assert len(found(index, Level.INSTANCE)) == 1


def test_the_same_patient_id_of_two_issuers_is_two_patients(database: Database, index: Index) -> None:
    """Patients are told apart by ID and issuer; without an ID each study is a patient of its own."""
    file(
        database,
        index,
        instance({"IssuerOfPatientID": "A"}, study="1.1"),
        instance({"IssuerOfPatientID": "B"}, study="1.2"),
        instance({"IssuerOfPatientID": "A"}, study="1.3"),
        instance({"PatientID": "", "PatientName": "Ann"}, study="1.4"),
        instance({"PatientID": "", "PatientName": "Bob"}, study="1.5"),
    )
    assert found(index, Level.PATIENT) == ["", "", "P1", "P1"]
    names = {
        match.attributes["StudyInstanceUID"]: match.attributes["PatientName"]
        for match in index.match(Query(Level.STUDY, {"PatientName": "*n*"}))
    }
    assert names[("1.4",)] == ("Ann",)
    assert found(index, Level.PATIENT, PatientName="Bob", PatientID="") == [""]


def test_a_rolled_back_series_is_not_remembered(database: Database, index: Index) -> None:
    """A series that was made in a work that raised does not exist for the next instance, which makes it again."""
    record = instance({"PatientID": "P9"}, series="1.2.3.7")

    def fail(connection: Any) -> None:
        index.add(connection, record)
        raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            database.write(fail)
    file(database, index, instance({"PatientID": "P1"}, series="1.2.3.7"), instance({"PatientID": "P1"}, series="1.2.3.7"))
    assert found(index, Level.PATIENT) == ["P1"]
    assert index.match(Query(Level.STUDY))[0].attributes["NumberOfStudyRelatedInstances"] == ("2",)


def test_counts_and_sets_of_a_study(database: Database, index: Index) -> None:
    """Modalities, SOP classes and counts are those of all series, reports included, and each level is answered with those above it."""
    file(
        database,
        index,
        instance({"Modality": "XC"}, series="1.2.3.1", sop_class_uid="1.2.840.1"),
        instance({"Modality": "XC"}, series="1.2.3.1", sop_class_uid="1.2.840.1"),
        instance({"Modality": "DMS"}, series="1.2.3.2", sop_class_uid="1.2.840.2"),
        instance({"Modality": "SR"}, series="1.2.3.3", sop_class_uid="1.2.840.3", role="report"),
        instance({"Modality": ""}, series="1.2.3.4", sop_class_uid="1.2.840.3"),
        instance({"Modality": "CT"}, study="1.7"),
    )
    (study,) = index.match(Query(Level.STUDY, {"StudyInstanceUID": "1.2.3"}))
    counts = {"ModalitiesInStudy": ("DMS", "SR", "XC"), "NumberOfStudyRelatedSeries": ("4",), "NumberOfStudyRelatedInstances": ("5",)}
    counts["SOPClassesInStudy"] = ("1.2.840.1", "1.2.840.2", "1.2.840.3")
    assert study.attributes.items() >= counts.items()
    (series,) = index.match(Query(Level.SERIES, {"SeriesInstanceUID": "1.2.3.1"}))
    assert (
        series.attributes.items() >= {**counts, "NumberOfSeriesRelatedInstances": ("2",), "Modality": ("XC",), "PatientID": ("P1",)}.items()
    )
    (one,) = index.match(Query(Level.INSTANCE, {"SOPClassUID": "1.2.840.2"}))
    assert one.attributes.items() >= {**counts, "NumberOfSeriesRelatedInstances": ("1",), "SOPClassUID": ("1.2.840.2",)}.items()
    for value, wanted in (
        ("SR", ["1.2.3"]),
        ("S", []),
        ("CT\\SR", ["1.7", "1.2.3"]),
        ("*M*", ["1.2.3"]),
        ("D*S", ["1.2.3"]),
        ("X*T", []),
        ("", ["1.7", "1.2.3"]),
    ):
        assert found(index, ModalitiesInStudy=value) == wanted, value
    assert found(index, Level.SERIES, ModalitiesInStudy="DMS", Modality="XC") == ["1.2.3.1"]


# -- retrieving ------------------------------------------------------------------------------------------------------------------------


def test_instances_of_a_study_in_order(database: Database, index: Index) -> None:
    """Instances come by series number and instance number, as numbers; wrong parents are InstanceNotFound."""
    records = [
        instance({"SeriesNumber": "10", "InstanceNumber": "1"}, series="1.2.3.1", uid="1.9.1"),
        instance({"SeriesNumber": "2", "InstanceNumber": "10"}, series="1.2.3.2", uid="1.9.2"),
        instance({"SeriesNumber": "2", "InstanceNumber": "9"}, series="1.2.3.2", uid="1.9.3"),
        instance({"SeriesNumber": "2"}, series="1.2.3.2", uid="1.9.4"),
    ]
    file(database, index, *records, instance(study="1.7", series="1.7.1", uid="1.9.5"))
    order = [record.summary.sop_instance_uid for record in index.instances("1.2.3")]
    assert order == ["1.9.4", "1.9.3", "1.9.2", "1.9.1"]
    assert len(index.instances("1.2.3", "1.2.3.2")) == 3
    assert index.instances("1.2.3", "1.2.3.1", "1.9.1") == [records[0]]
    for wrong in (("1.8",), ("1.2.3", "1.7.1"), ("1.7", "1.2.3.1"), ("1.2.3", "1.2.3.2", "1.9.1"), ("1.7", None, "1.9.1")):
        with pytest.raises(InstanceNotFound):
            index.instances(*wrong)


def test_reports_and_their_sources(database: Database, index: Index) -> None:
    """A report leads to its source and back; the same again is harmless, another source is not; unknown instances are refused."""
    source, summary, mask = instance(uid="1.9.1"), instance(uid="1.9.2", role="report"), instance(uid="1.9.3", role="report")
    file(database, index, source, summary, mask)
    reports = [ReportRecord("1.9.3", "1.9.1", "segmentation", {"b": "2"}), ReportRecord("1.9.2", "1.9.1", "summary", {"b": "2", "a": "1"})]
    for report in [*reports, *reports]:
        database.write(lambda connection, report=report: index.add_report(connection, report))
    assert index.reports_of("1.9.1") == reports
    assert index.source_of("1.9.2") == "1.9.1"
    assert index.find("1.9.2").role == "report"
    with pytest.raises(ConflictingInstance):
        database.write(lambda connection: index.add_report(connection, ReportRecord("1.9.2", "1.9.3", "summary", {})))
    with pytest.raises(IntegrityError):
        database.write(lambda connection: index.add_report(connection, ReportRecord("1.9.9", "1.9.1", "summary", {})))
    with pytest.raises(InstanceNotFound):
        index.source_of("1.9.1")


def test_quarantine_keeps_the_record_once(database: Database, index: Index) -> None:
    """What is kept aside is listed with its reason and found by no search; the same content again is not kept twice."""
    record, second = instance(uid="1.9.1", content="other"), instance(uid="1.9.1", content="third")
    file(database, index, instance(uid="1.9.1"))
    kept = [database.write(lambda c, r=r: index.quarantine(c, r, "other content")) for r in (record, record, second)]
    assert kept == [True, False, True]
    assert [(entry.record, entry.reason) for entry in index.quarantined()] == [(record, "other content"), (second, "other content")]
    assert len(found(index, Level.INSTANCE)) == 1


def test_every_object_is_known(database: Database, index: Index) -> None:
    """Over more than a page, all_objects gives each object once, quarantine marked; known_objects tells orphans apart."""
    records = [instance() for _ in range(1203)]
    database.write(lambda connection: [index.add(connection, record) for record in records])
    aside = instance(content="aside")
    database.write(lambda connection: index.quarantine(connection, aside, "why"))
    objects = list(index.all_objects())
    assert [known.object_key for known in objects] == [record.sealed.object_key for record in [*records, aside]]
    assert [known.quarantined for known in objects] == [False] * 1203 + [True]
    assert (objects[0].sha256, objects[0].byte_count, objects[0].key_id) == (records[0].sealed.sha256, 1100, "key-1")
    keys = [known.object_key for known in objects]
    assert index.known_objects([*keys, "orphan"]) == set(keys)
    assert len(index.match(Query(Level.INSTANCE))) == 1203


# -- matching --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(database: Database, index: Index) -> Index:
    """Return an index of six studies that differ in everything that is matched."""
    rows = [
        (
            "1.1",
            {
                "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう",
                "PatientID": "A-1",
                "StudyDate": "20240115",
                "StudyTime": "0930",
                "StudyDescription": "Mole 100%",
            },
        ),
        (
            "1.2",
            {
                "PatientName": "MÜLLER^Anna",
                "PatientID": "A_2",
                "StudyDate": "20240115",
                "StudyTime": "101500.25",
                "StudyDescription": "mole_map",
            },
        ),
        (
            "1.3",
            {
                "PatientName": "Müller^Bernd^^Dr",
                "PatientID": "B!3",
                "StudyDate": "2023.12.31",
                "StudyTime": "235959",
                "StudyDescription": "Mole*map",
            },
        ),
        ("1.4", {"PatientName": "smith", "PatientID": "B?4", "StudyDate": "20230101", "StudyTime": "00", "StudyDescription": "Follow-up"}),
        (
            "1.5",
            {
                "PatientName": "SMITHSON^Jo=",
                "PatientID": "C\\5",
                "StudyDate": "",
                "StudyTime": "",
                "StudyDescription": "'; DROP TABLE studies; --",
            },
        ),
        ("1.6", {"PatientName": "", "PatientID": "C6", "StudyDate": "nonsense", "StudyTime": "99:99", "StudyDescription": ""}),
    ]
    file(
        database,
        index,
        *(
            instance({"SeriesNumber": str(n), "InstanceNumber": f"0{n}", "Rows": "512", **values}, study=study)
            for n, (study, values) in enumerate(rows)
        ),
    )
    return index


@pytest.mark.parametrize(
    ("keys", "studies"),
    [
        ({}, "213465"),
        ({"PatientName": "", "StudyDate": "", "StudyDescription": "*"}, "213465"),
        # person names: each group, without regard to case, trailing empty components insignificant
        ({"PatientName": "yamada^tarou"}, "1"),
        ({"PatientName": "Yamada"}, ""),
        ({"PatientName": "yamada*"}, "1"),
        ({"PatientName": "山田*"}, "1"),
        ({"PatientName": "*太郎"}, "1"),
        ({"PatientName": "やまだ^たろう"}, "1"),
        ({"PatientName": "Yamada^Tarou=山田^太郎"}, "1"),
        ({"PatientName": "=山田*"}, "1"),
        ({"PatientName": "山田*=*"}, ""),
        ({"PatientName": "y*う"}, ""),
        ({"PatientName": "müller*"}, "23"),
        ({"PatientName": "Mu\u0308ller^Anna"}, "2"),
        ({"PatientName": "MÜLLER^B????^^dr"}, "3"),
        ({"PatientName": "Smith^^"}, "4"),
        ({"PatientName": "smith^*"}, "4"),
        ({"PatientName": "smith*"}, "45"),
        ({"PatientName": "*^*"}, "213465"),
        # text: case counts, everything but * and ? is literal
        ({"StudyDescription": "Mole 100%"}, "1"),
        ({"StudyDescription": "mole*"}, "2"),
        ({"StudyDescription": "Mole*"}, "13"),
        ({"StudyDescription": "?ole?map"}, "23"),
        ({"StudyDescription": "*%"}, "1"),
        ({"StudyDescription": "*_*"}, "2"),
        ({"StudyDescription": "'; DROP TABLE studies; --"}, "5"),
        ({"StudyDescription": "*'*"}, "5"),
        ({"PatientID": "A*"}, "21"),
        ({"PatientID": "A__"}, ""),
        ({"PatientID": "B!*"}, "3"),
        ({"PatientID": "C\\*"}, "5"),
        ({"PatientID": "*?*?*?*"}, "21345"),
        # lists of UIDs, by backslash and comma; no wildcards
        ({"StudyInstanceUID": "1.4"}, "4"),
        ({"StudyInstanceUID": "1.4\\1.1, 9.9"}, "14"),
        ({"StudyInstanceUID": "1.*"}, ""),
        # dates and times
        ({"StudyDate": "20240115"}, "21"),
        ({"StudyDate": "20230101-20231231"}, "34"),
        ({"StudyDate": "20231231-"}, "213"),
        ({"StudyDate": "-20231231"}, "34"),
        ({"StudyDate": "2024.01.15"}, "21"),
        ({"StudyTime": "09"}, "1"),
        ({"StudyTime": "093000"}, "1"),
        ({"StudyTime": "10:15"}, "2"),
        ({"StudyTime": "0930-1015"}, "21"),
        ({"StudyTime": "-093000"}, "14"),
        ({"StudyTime": "101500.250001-"}, "3"),
        ({"StudyDate": "20240115", "StudyTime": "0000-1000", "PatientName": "ya*"}, "1"),
    ],
)
def test_matching(shelf: Index, keys: dict[str, str], studies: str) -> None:
    """Universal, single value, list of UID, wildcard and range matching give the studies named, newest first (PS3.4 C.2.2.2)."""
    order = [f"1.{digit}" for digit in studies]
    dated = [uid for uid in order if uid in {"1.1", "1.2", "1.3", "1.4"}]
    undated = sorted((uid for uid in order if uid in {"1.5", "1.6"}), reverse=True)
    assert sorted(found(shelf, **keys)) == sorted(order)
    assert found(shelf, **keys) == dated + undated


def test_date_and_time_as_one_range(shelf: Index) -> None:
    """Asked so, a date and a time range are one range of moments; else each is matched by itself."""
    keys = {"StudyDate": "20231231-20240115", "StudyTime": "2300-1000"}
    apart = shelf.match(Query(Level.STUDY, {"StudyDate": "20231231-20240115", "StudyTime": "0900-1000"}))
    assert [match.attributes["StudyInstanceUID"] for match in apart] == [("1.1",)]
    together = shelf.match(Query(Level.STUDY, keys, combined_datetime=True))
    assert [match.attributes["StudyInstanceUID"] for match in together] == [("1.1",), ("1.3",)]


def test_numbers_match_by_value(shelf: Index) -> None:
    """Whole numbers match whatever their leading zeros."""
    assert found(shelf, Level.INSTANCE, InstanceNumber="3", Rows="0512") == found(shelf, Level.INSTANCE, StudyInstanceUID="1.4")
    assert found(shelf, Level.SERIES, SeriesNumber="+3") == ["1.4.1"]


@pytest.mark.parametrize(
    "query",
    [
        Query(Level.STUDY, {"StudyDate": "2024"}),
        Query(Level.STUDY, {"StudyDate": "20240101-x"}),
        Query(Level.STUDY, {"StudyDate": "-"}),
        Query(Level.STUDY, {"StudyTime": "noon"}),
        Query(Level.SERIES, {"SeriesNumber": "one"}),
        Query(Level.INSTANCE, {"Rows": "1; DROP TABLE studies"}),
        Query(Level.STUDY, {"NoSuchKeyword": "x"}),
        Query(Level.STUDY, {"Modality": "XC"}),
        Query(Level.PATIENT, {"StudyDate": "20240101"}),
        Query(Level.PATIENT, {"ModalitiesInStudy": "XC"}),
        Query(Level.STUDY, limit=-1),
        Query(Level.STUDY, offset=-1),
    ],
)
def test_what_cannot_be_matched_is_said(shelf: Index, query: Query) -> None:
    """Nonsense values, unknown and misplaced keys are InvalidQuery, never everything and never nothing."""
    with pytest.raises(InvalidQuery):
        shelf.match(query)


def test_pages_are_stable_and_whole(shelf: Index) -> None:
    """Limit and offset cut the same order into pages, at every level; beyond the end there is nothing."""
    for level in Level:
        whole = found(shelf, level)
        assert len(whole) == 6
        assert [uid for start in range(0, 8, 2) for uid in found(shelf, level, limit=2, offset=start)] == whole
        assert found(shelf, level, limit=0) == []
        assert found(shelf, level, offset=4) == whole[4:]


def test_every_indexed_keyword_is_matched_and_returned(database: Database, index: Index) -> None:
    """For each keyword of INDEXED: a search by the value that was filed finds the instance and gives the value back; another does not."""
    samples = {
        "PN": "Doe^J",
        "LO": "Text",
        "SH": "Text",
        "CS": "CODE",
        "DA": "20240102",
        "TM": "101112",
        "IS": "7",
        "US": "7",
        "UI": "1.2.3",
    }
    others = {
        **samples,
        "PN": "Roe",
        "LO": "Other",
        "SH": "Other",
        "CS": "OTHER",
        "DA": "20240103",
        "TM": "101113",
        "IS": "8",
        "US": "8",
        "UI": "1.2.4",
    }
    record = instance(
        {keyword: samples[vr] for keyword, (_, vr) in INDEXED.items()}, study="1.2.3", series="1.2.3", uid="1.2.3", sop_class_uid="1.2.3"
    )
    file(database, index, record)
    for keyword, (_, vr) in INDEXED.items():
        (match,) = index.match(Query(Level.INSTANCE, {keyword: samples[vr]}))
        assert match.attributes[keyword] == (samples[vr],)
        assert index.match(Query(Level.INSTANCE, {keyword: others[vr]})) == []


_LETTERS = st.text("ab*?%_!\\^=é", max_size=6)


@given(values=st.lists(st.text("ab%_!\\é", max_size=6), min_size=1, max_size=8), wanted=_LETTERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wildcards_match_as_shells_match(database: Database, values: list[str], wanted: str) -> None:
    """For any text, the LIKE pattern in the real database matches exactly what an independent matcher of * and ? matches."""
    expected = [bool(fnmatch.fnmatchcase(value, wanted.replace("[", "[[]"))) for value in values]
    with database.read() as connection:
        like = sqlalchemy.text("SELECT CAST(:value AS TEXT) LIKE CAST(:wanted AS TEXT) ESCAPE '!'")
        got = [bool(connection.execute(like, {"value": value, "wanted": pattern(wanted)}).scalar()) for value in values]
    assert got == expected


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)  # its words for a plan
def test_a_search_reads_its_index_and_sorts_nothing(shelf: Index, database: Database) -> None:
    """A viewer's study list, by whatever it filters, walks the covering index in the order of the answer."""
    keys = {"PatientName": "*a*", "PatientID": "*1*", "ModalitiesInStudy": "XC", "StudyDate": "20000101-", "ReferringPhysicianName": "*q*"}
    query = Query(Level.STUDY, keys, 101)
    with database.read() as connection:
        compiled = statement_of(query).compile(connection, compile_kwargs={"literal_binds": True})
        plan = " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}".replace("%%", "%")))
    assert "COVERING INDEX ix_studies_list" in plan
    assert "TEMP B-TREE" not in plan


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)  # its words for a plan
@pytest.mark.parametrize("level", [Level.SERIES, Level.INSTANCE])
def test_a_search_across_studies_sorts_nothing(shelf: Index, database: Database, level: Level) -> None:
    """The first page of all series or instances stops after a page, however many there are."""
    with database.read() as connection:
        compiled = statement_of(Query(level, {}, 101)).compile(connection, compile_kwargs={"literal_binds": True})
        plan = " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}"))
    assert "TEMP B-TREE" not in plan
    within = found(shelf, level, StudyInstanceUID="1.1\\1.2")
    assert len(within) == 2


_FILER = """
import sys
from storage.index import Index
from tests.storage.support import instance, open_database
database = open_database(sys.argv[1])
index = Index(database=database)
who = sys.argv[2]
for number in range(60):
    sop_class_uid = f"1.2.840.{who}.{number % 2}"
    record = instance({"Modality": who}, series=f"1.2.3.{number % 3}", uid=f"1.9.{who}.{number}", sop_class_uid=sop_class_uid)
    database.write(lambda connection: index.add(connection, record))
database.close()
"""


def test_two_processes_file_into_one_study(index: Index, place: str) -> None:
    """Two processes that file into the same series at once make each row once, and counts and sets hold both."""
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", _FILER, place, who]) for who in ("1", "2")]
    assert [process.wait(120) for process in processes] == [0, 0]
    (study,) = index.match(Query(Level.STUDY))
    assert study.attributes["NumberOfStudyRelatedInstances"] == ("120",)
    assert study.attributes["NumberOfStudyRelatedSeries"] == ("3",)
    assert set(study.attributes["SOPClassesInStudy"]) == {"1.2.840.1.0", "1.2.840.1.1", "1.2.840.2.0", "1.2.840.2.1"}
    assert [match.attributes["NumberOfSeriesRelatedInstances"] for match in index.match(Query(Level.SERIES))] == [("40",)] * 3
    other = open_database(place)
    assert len(Index(database=other).instances("1.2.3")) == 120
    other.close()
