"""Reindex: so many objects archived, the database lost, the index rebuilt from the store alone and compared table by table.

.venv/bin/python -m bench.reindex --objects 10000 --folder /dev/shm/reindex
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from pathlib import Path

from storage.differences import differences
from storage.records import JobKind, NewReport
from tests.storage.house import House, build
from tests.storage.samples import new_uid, photograph, report


def fill(house: House, objects: int) -> None:
    """Archive instances of studies of ten, a report for each second one."""
    made = 0
    while made < objects:
        study, series, patient = new_uid(), new_uid(), f"P-{made // 15 % 500}"
        for number in range(10):
            sample = photograph(study=study, series=series, patient_id=patient)
            house.ingest(sample)
            made += 1
            job = house.queue.claim(JobKind.ANALYSE, owner="bench")
            if job is not None and number % 2:
                drawn = report(source=sample, sop=f"{sample.sop_instance_uid}1", patient_id=patient)
                new = NewReport("summary", drawn.data_set, deliver_to=("pacs",), models={"derm": "1"})
                house.archive.conclude(job, reports=[new], result={})
                made += 1


def main() -> None:
    """Fill, lose, rebuild, compare; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, required=True)
    chosen = parser.parse_args()
    house = build(chosen.folder / "old")
    began = time.monotonic()
    fill(house, chosen.objects)
    count = len(house.objects())
    print(f"{count} objects archived in {time.monotonic() - began:.1f} s")
    (chosen.folder / "new").mkdir()
    shutil.copy(chosen.folder / "old" / "keys.json", chosen.folder / "new" / "keys.json")
    again = build(chosen.folder / "new", store=house.store)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    found = again.archive.reindex().run()
    took = time.monotonic() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"reindex: {found}")
    print(f"reindex: {took:.1f} s, {count / took:.0f} objects/s, peak memory + {grown / 1024:.0f} MiB")
    began = time.monotonic()
    faults = differences(house.database, again.database)
    print(f"compared in {time.monotonic() - began:.1f} s: {faults or 'equal'}")
    house.close()
    again.close()
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
