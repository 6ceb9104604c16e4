"""The search in two steps that C-FIND uses, its cancellation in the database, and what is located for a retrieval; both engines."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from storage.errors import InvalidQuery
from storage.index import Index
from storage.records import Level, Query
from storage.search import Finding, locate
from tests.storage.support import instance

if TYPE_CHECKING:
    from storage.database import Database

SLOW = {
    "sqlite": "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 1000000000) SELECT max(n) FROM c",
    "postgresql": "SELECT pg_sleep(25)",
}


@pytest.fixture
def index(database: Database) -> Index:
    """Return an index of 1200 instances in 600 studies of 300 patients."""
    index = Index(database=database)

    def work(connection: Any) -> None:
        for number in range(1200):
            study = f"1.2.{number // 2}"
            values = {"PatientID": f"P{number // 4}", "SeriesNumber": "2", "InstanceNumber": str(2 - number % 2)}
            index.add(connection, instance(values, study=study, uid=f"{study}.1.{number % 2}"))

    database.write(work)
    return index


@pytest.mark.parametrize("level", list(Level))
def test_the_pages_of_a_finding_are_its_match(database: Database, index: Index, level: Level) -> None:
    """Counted first, then given page by page: the same answers, in the same order, as in one piece."""
    query = Query(level, {"PatientID": "P*"}, limit=900)
    finding = Finding(database, query)
    matches = index.match(query)
    assert finding.find() == len(matches) == min(900, {"PATIENT": 300, "STUDY": 600, "SERIES": 600, "IMAGE": 1200}[level])
    pages = list(finding.pages())
    assert [match for page in pages for match in page] == matches
    assert max(len(page) for page in pages) <= 500


def test_patients_are_counted(index: Index) -> None:
    """A patient's answer says how many studies, series and instances there are."""
    (match,) = index.match(Query(Level.PATIENT, {"PatientID": "P7"}))
    numbers = ("NumberOfPatientRelatedStudies", "NumberOfPatientRelatedSeries", "NumberOfPatientRelatedInstances")
    assert [match.attributes[keyword] for keyword in numbers] == [("2",), ("2",), ("4",)]


@pytest.mark.usefixtures("index")
def test_what_was_erased_between_the_steps_is_left_out(database: Database) -> None:
    """A row that goes away after it was found is no answer, and no error."""
    finding = Finding(database, Query(Level.INSTANCE, {"StudyInstanceUID": "1.2.5"}))
    assert finding.find() == 2
    database.write(lambda connection: connection.exec_driver_sql("DELETE FROM instances WHERE sop_instance_uid = '1.2.5.1.0'"))
    (page,) = finding.pages()
    assert [match.attributes["SOPInstanceUID"] for match in page] == [("1.2.5.1.1",)]


def test_a_finding_is_cancelled_in_the_database(database: Database, index: Index, engine: str) -> None:
    """The statement ends, whichever engine runs it, and the connection serves the next search."""
    reader = database._backend.reader  # the engine, to slow it down

    def slow(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        if statement.startswith("SELECT studies.id"):
            cursor.execute(SLOW[engine])
        return statement, parameters

    finding = Finding(database, Query(Level.STUDY))
    found: list[int] = []
    event.listen(reader, "before_cursor_execute", slow, retval=True)
    try:
        thread = threading.Thread(target=lambda: found.append(finding.find()))
        thread.start()
        time.sleep(0.3)
        began = time.monotonic()
        while thread.is_alive() and time.monotonic() - began < 20:
            finding.cancel()
            thread.join(0.1)
    finally:
        event.remove(reader, "before_cursor_execute", slow)
    assert found == [0]
    assert list(finding.pages()) == []
    assert len(index.match(Query(Level.STUDY, {"StudyInstanceUID": "1.2.5"}))) == 1


@pytest.mark.usefixtures("index")
def test_located_are_the_instances_in_their_order(database: Database) -> None:
    """By study, series number and instance number, with what a sender has to know of them, and no more than the limit."""
    located = locate(database, Query(Level.INSTANCE, {"PatientID": "P0"}, limit=10))
    assert [one.sop_instance_uid for one in located] == ["1.2.0.1.1", "1.2.0.1.0", "1.2.1.1.1", "1.2.1.1.0"]
    assert {(one.sop_class_uid, one.transfer_syntax_uid, one.byte_count) for one in located} == {
        ("1.2.840.10008.5.1.4.1.1.77.1.4", "1.2.840.10008.1.2.1", 1000)
    }
    assert len(locate(database, Query(Level.INSTANCE, {}, limit=7))) == 7
    with pytest.raises(InvalidQuery):
        locate(database, Query(Level.STUDY))
