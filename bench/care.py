"""Care of an archive of ten thousand objects in a bucket: rotation of its study keys while instances come and are read; reindex."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from bench.data_sets import Pattern
from bench.ingest import NODE, database_url
from bench.services import in_memory, load, rclone, s3_service
from storage.differences import differences
from storage.keys import Ring
from storage.records import Origin
from storage.reindex import Reindex
from storage.s3 import S3Store
from tests.postgresql_server import PostgresqlServer, started
from tests.storage.house import House, analyse, build

OBJECTS = 10_000
ENGINES = ("SQLite", "PostgreSQL")
THREADS = 8


def receive_one(house: House, pattern: Pattern) -> str:
    """Receive one instance, the only one of its study; its SOP Instance UID."""
    sop, study, series = (pattern.new_uid() for _ in range(3))
    with house.archive.receive(Origin("dimse", datetime.now(UTC), "192.0.2.1"), transfer_syntax_uid=pattern.transfer_syntax_uid) as intake:
        for chunk in pattern.chunks(sop, study, series):
            intake.write(chunk)
        intake.commit()
    return sop


@contextmanager
def opened(folder: Path, endpoint: str, url: str) -> Iterator[House]:
    """Open the archive of `folder`, policy archive; every process of a node does so."""
    store = S3Store(bucket="care", endpoint_url=endpoint, region="us-east-1")
    house = build(folder, store=store, node_id=NODE, database_url=url, acknowledge=lambda _: "archive")
    try:
        yield house
    finally:
        house.close()


def filled(house: House, objects: int) -> list[str]:
    """Receive so many instances, each the first of its study: as many keys as objects. Their SOP Instance UIDs."""
    pattern = Pattern.drawn("tiny")
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        uids = list(pool.map(lambda _: receive_one(house, pattern), range(objects)))
    print(
        f"  {objects} objects, a study and a key each: {objects / (time.perf_counter() - began):.0f}/s received; load {load():.1f}",
        flush=True,
    )
    return uids


def rotation(folder: Path, endpoint: str, url: str, uids: list[str]) -> dict[str, Any]:
    """Add a key and re-wrap everything by it in one process' archive, while another's receives and reads; then take the old key out."""
    stop = threading.Event()
    received: list[str] = []
    failed: list[BaseException] = []
    read = itertools.count()
    pattern = Pattern.drawn("tiny")

    def others(house: House, *, reading: bool, seed: int) -> None:
        random = Random(seed)
        while not stop.is_set():
            try:
                if reading:
                    house.read(uids[random.randrange(len(uids))])
                    next(read)
                else:
                    received.append(receive_one(house, pattern))
            except Exception as error:  # noqa: BLE001 - counted: none is allowed to fail
                failed.append(error)

    before = Ring.load(folder / "keys.json").primary_key_id
    with ExitStack() as stack:
        working = stack.enter_context(opened(folder, endpoint, url))
        threads = [threading.Thread(target=others, args=(working,), kwargs={"reading": seed % 2 == 0, "seed": seed}) for seed in range(4)]
        for thread in threads:
            thread.start()
        Ring.add(folder / "keys.json")
        operator = stack.enter_context(opened(folder, endpoint, url))
        began = time.perf_counter()
        store = operator.store
        done = operator.study_keys.rotate(put_document=store.put_document, delete_document=store.delete_document)
        seconds = time.perf_counter() - began
        stop.set()
        for thread in threads:
            thread.join()
        # what was under way when the key was added may have come under the old one after the last pass
        while not operator.study_keys.unused(before):
            operator.study_keys.rotate(put_document=store.put_document, delete_document=store.delete_document)
        operator.study_keys.retire(before)
    with opened(folder, endpoint, url) as later:  # nothing remembered: the new key alone opens everything
        for uid in Random(5).sample([*uids, *received], min(500, len(uids))):
            later.read(uid)
    found = {
        "study keys": done,
        "seconds": round(seconds, 1),
        "keys per second": round(done / seconds),
        "received meanwhile": len(received),
        "read meanwhile": next(read),
        "failed": [f"{type(error).__name__}: {error}" for error in failed],
        "old key removed": True,
        "read afterwards": min(500, len(uids)),
    }
    print(f"  rotation: {found}; load {load():.1f}", flush=True)
    return found


def reindexed(folder: Path, endpoint: str, url: str, new_url: str) -> dict[str, Any]:
    """Fill a new database from the bucket and the ring alone, and compare it with the old one row by row."""
    rebuilt = folder.with_name(f"{folder.name}-rebuilt")
    rebuilt.mkdir()
    shutil.copy(folder / "keys.json", rebuilt / "keys.json")
    with opened(folder, endpoint, url) as old, opened(rebuilt, endpoint, new_url) as new:
        passes: dict[str, float] = {}
        began = time.perf_counter()
        result = Reindex(
            database=new.database,
            index=new.index,
            queue=new.queue,
            audit=new.audit,
            study_keys=new.study_keys,
            places=new.archive.places,
            jobs_for=analyse,
        ).run(lambda name, _done, _total: passes.__setitem__(name, round(time.perf_counter() - began, 1)))
        seconds = time.perf_counter() - began
        found = differences(old.database, new.database)
    line = {
        "objects": result.objects,
        "seconds": round(seconds, 1),
        "objects per second": round(result.objects / seconds),
        "passes end at": passes,
        "differences": found,
        "found": asdict(result),
    }
    print(f"  reindex: {line}; load {load():.1f}", flush=True)
    return line


def run(sections: set[str], objects: int = OBJECTS) -> dict[str, Any]:
    """Measure on both databases, on the RAM disk: S3 is another machine's disk."""
    results: dict[str, Any] = {}
    if rclone() is None:
        print("rotation, reindex: rclone is not installed (requirements/dev.txt); not measured")
        return results
    for engine in ENGINES:
        print(f"{' and '.join(sorted(sections))}, {engine}; load {load():.1f}")
        with ExitStack() as stack:
            server: PostgresqlServer | None = stack.enter_context(started(durable=False)) if engine == "PostgreSQL" else None
            folder = stack.enter_context(in_memory(wanted=True))
            (folder / "s3" / "care").mkdir(parents=True)
            endpoint = stack.enter_context(s3_service(folder / "s3"))
            url = database_url(server, "care")
            with opened(folder / "node", endpoint, url) as house:
                uids = filled(house, objects)
            results[engine] = {}
            if "rotation" in sections:
                results[engine]["rotation"] = rotation(folder / "node", endpoint, url, uids)
            if "reindex" in sections:
                results[engine]["reindex"] = reindexed(folder / "node", endpoint, url, database_url(server, "rebuilt"))
    return results
