"""Growth: how fast an archive with 10^4, 10^5 and 10^6 instances in its index takes instances in, and finds them."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from bench.data_sets import Pattern
from bench.ingest import receive
from bench.population import (
    COMMIT,
    PER_STUDY,
    file_in,
    patient_id,
    patient_name,
    patient_of,
    populate,
    record,
    study_date,
    study_instance_uid,
)
from bench.services import in_memory, load
from storage.copying import copy_database
from storage.records import Level, Query
from tests.postgresql_server import PostgresqlServer, started
from tests.storage.house import House, build

MARKS = (10_000, 100_000, 1_000_000)
ASKED = 40
"""Questions of a kind in one round."""
GROUP = 20
"""Instances in one commit: as many associations."""
SERVER = {"shared_buffers": "256MB", "autovacuum_naptime": "1min", "max_wal_size": "2GB"}


def _study(keyword: str, value: Callable[[int], str], *, limit: int | None = 100) -> Callable[[int], Query]:
    return lambda study: Query(Level.STUDY, {keyword: value(study)}, limit=limit)


def _family(study: int) -> str:
    return patient_name(patient_of(study)).partition("^")[0]


SEARCHES: Mapping[str, Callable[[int], Query]] = {
    "patient ID": _study("PatientID", lambda study: patient_id(patient_of(study))),
    "Study Instance UID": _study("StudyInstanceUID", study_instance_uid),
    "accession number": _study("AccessionNumber", lambda study: f"A{10**8 + study}"),
    "name, wildcard at its end": _study("PatientName", lambda study: f"{_family(study)}*"),
    "a day": _study("StudyDate", study_date),
    "a week, first 100": _study("StudyDate", lambda study: f"{study_date(study - 140)}-{study_date(study)}"),
    "newest 50": lambda _: Query(Level.STUDY, {}, limit=50),
    "patient by name": lambda study: Query(Level.PATIENT, {"PatientName": patient_name(patient_of(study))}, limit=100),
    "series of a study": lambda study: Query(Level.SERIES, {"StudyInstanceUID": study_instance_uid(study)}),
    "instances of a study": lambda study: Query(Level.INSTANCE, {"StudyInstanceUID": study_instance_uid(study)}),
    "name, wildcard at its beginning": _study("PatientName", lambda study: f"*{patient_name(patient_of(study))[3:]}"),
    "name without its first letter": _study("PatientName", lambda study: f"*{patient_name(patient_of(study))[1:]}"),
    "word that no description has": lambda _: Query(Level.STUDY, {"StudyDescription": "*Melanoma*"}, limit=50),
    "word in the description, newest 50": lambda _: Query(Level.STUDY, {"StudyDescription": "*Wound*"}, limit=50),
}
"""What viewers and people ask. To "wildcard at its beginning" the answer grows with the archive: 2 studies of 10^4, some 30 of 10^6."""


def prepared(folder: Path, marks: tuple[int, ...] = MARKS) -> dict[int, Path]:
    """Build one archive for each mark, on SQLite, each a copy of the next larger one on its way; their folders."""
    at, last = 0, marks[-1]
    for mark in marks:
        house = build(folder / f"SQLite-{last}")
        for done in populate(house, at, mark):
            if done % (last // 20) < COMMIT:
                print(f"  {done} instances; load {load():.1f}", flush=True)
        house.close()
        at = mark
        if mark != last:
            shutil.copytree(folder / f"SQLite-{last}", folder / f"SQLite-{mark}")
    return {mark: folder / f"SQLite-{mark}" for mark in marks}


def moved(folders: Mapping[int, Path], server: PostgresqlServer) -> dict[int, House]:
    """Copy the databases to PostgreSQL, as ``dicom-node migrate`` does; open an archive on each."""
    houses = {}
    for mark, folder in folders.items():
        server.execute(f"CREATE DATABASE mark_{mark}")
        target = folder.with_name(f"PostgreSQL-{mark}")
        target.mkdir()
        shutil.copy(folder / "keys.json", target / "keys.json")
        houses[mark] = build(target, database_url=server.url(f"mark_{mark}"))
        source = build(folder)
        began = time.perf_counter()
        rows = sum(copy_database(source.database, houses[mark].database).values())
        source.close()
        print(f"  {rows} rows of {mark} instances copied to PostgreSQL, and compared: {time.perf_counter() - began:.0f} s", flush=True)
        server.execute("VACUUM ANALYZE", database=f"mark_{mark}")
    return houses


def filed(house: House, first: int, seconds: float) -> tuple[float, int]:
    """File instances from `first` on in group commits, as ingest does, for some seconds; instances a second, and the next number."""
    numbers, began = first, time.perf_counter()
    while time.perf_counter() - began < seconds:
        key = house.study_keys.current(study_instance_uid(numbers // PER_STUDY))
        rows = [(key, record(number, key.id)) for number in range(numbers, numbers + GROUP // 2)]
        numbers += GROUP // 2
        key = house.study_keys.current(study_instance_uid(numbers // PER_STUDY))
        rows += [(key, record(number, key.id)) for number in range(numbers, numbers + GROUP // 2)]
        numbers += GROUP // 2
        house.database.write(partial(file_in, house=house, rows=rows))
    return (numbers - first) / (time.perf_counter() - began), numbers


def measured(houses: Mapping[int, House], rounds: int, seconds: float = 3.0) -> dict[str, Any]:
    """Ask and file in turns; medians, and the ratio of the largest to the smallest."""
    marks = sorted(houses)
    times: dict[str, dict[int, list[tuple[float, float]]]] = {name: {mark: [] for mark in marks} for name in SEARCHES}
    rates: dict[str, dict[int, list[float]]] = {name: {mark: [] for mark in marks} for name in ("index alone", "archive, 1", "archive, 8")}
    tiny = Pattern.drawn("tiny")
    fresh = int(time.time()) * 100_000  # beyond all that was ever filed
    numbers = dict.fromkeys(marks, fresh)
    random = Random(3)
    for turn in range(-1, rounds):  # the first round warms caches, and is thrown away
        order = marks[turn % len(marks) :] + marks[: turn % len(marks)]
        for name, query in SEARCHES.items():
            studies = [random.randrange(200, marks[0] // PER_STUDY) for _ in range(ASKED)]
            for mark in order:
                for study in studies:
                    wanted = query(study * (mark // marks[0]))
                    began, cpu = time.perf_counter(), time.thread_time()
                    houses[mark].index.match(wanted)
                    if turn >= 0:
                        times[name][mark].append(((time.perf_counter() - began) * 1000, (time.thread_time() - cpu) * 1000))
        for mark in order:
            rate, numbers[mark] = filed(houses[mark], numbers[mark], seconds)
            one, eight = (receive(houses[mark], tiny, threads=threads, seconds=seconds).rate for threads in (1, 8))
            if turn >= 0:
                for name, value in (("index alone", rate), ("archive, 1", one), ("archive, 8", eight)):
                    rates[name][mark].append(value)
    return _summary(marks, times, rates)


def run(rounds: int, marks: tuple[int, ...] = MARKS) -> dict[str, Any]:
    """Measure on both databases, on the disk."""
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(in_memory(wanted=False))
        print(f"growth: building; load {load():.1f}", flush=True)
        folders = prepared(folder, marks)
        server = stack.enter_context(started(durable=True, settings=SERVER))
        moved_houses = moved(folders, server)
        for engine, houses in (("SQLite", {mark: build(place) for mark, place in folders.items()}), ("PostgreSQL", moved_houses)):
            print(f"growth, {engine}; load {load():.1f}", flush=True)
            results[engine] = {**measured(houses, rounds), "load afterwards": load()}
            for house in houses.values():
                house.close()
    return results


def _summary(marks: list[int], times: Any, rates: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"search ms": {}, "ingest per second": {}}
    for name, by_mark in times.items():
        line = {
            mark: {**_percentiles([wall for wall, _ in by_mark[mark]]), "cpu p95": _percentiles([c for _, c in by_mark[mark]])["p95"]}
            for mark in marks
        }
        growth = line[marks[-1]]["p95"] / line[marks[0]]["p95"]
        found["search ms"][name] = {**{str(mark): value for mark, value in line.items()}, "p95 ratio": round(growth, 2)}
        print(
            f"  {name:<36}"
            + "  ".join(f"{mark}: {v['p50']:.2f} / {v['p95']:.2f} ms ({v['cpu p95']:.2f} CPU)" for mark, v in line.items())
            + f"  = {growth:.2f}"
        )
    for name, by_mark in rates.items():
        ratios = [last / first for last, first in zip(by_mark[marks[-1]], by_mark[marks[0]], strict=True)]
        found["ingest per second"][name] = {
            **{str(mark): round(statistics.median(by_mark[mark]), 1) for mark in marks},
            "ratio": round(statistics.median(ratios), 3),
        }
        print(f"  ingest, {name:<14}" + "  ".join(f"{mark}: {statistics.median(by_mark[mark]):.0f}/s" for mark in marks), end="")
        print(f"  = {statistics.median(ratios):.2f}", flush=True)
    return found


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20)
    return {"p50": round(statistics.median(values), 3), "p95": round(cuts[-1], 3)}
