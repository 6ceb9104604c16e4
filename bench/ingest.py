"""Ingest into the archive with each kind of store: directory, S3 with policy `land`, S3 with policy `archive`. Interleaved.

What a door adds (association, HTTP) is the same for each and is measured elsewhere. The S3 service and the Mover run on the same machine,
and take their share of it. The Mover gives way to senders for a while, so the rate of `land` is that of a burst, with the backlog brought
afterwards; its sustained rate counts both.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.data_sets import KINDS, Pattern
from bench.services import in_memory, load, mover, rclone, s3_service
from storage.records import Origin
from storage.s3 import S3Store
from tests.postgresql_server import PostgresqlServer, started
from tests.storage.house import House, build

SECONDS = 3.0
"""A turn of one contender."""
MOST_BYTES = 256 * 1024**2
"""Of a turn, which ends then: the RAM disk holds all turns of a row."""
PER_STUDY = 10
THREADS = (1, 8)
CONTENDERS = ("directory", "land", "archive")
NODE = "00000000000000b1"


@dataclass
class Turn:
    """What one contender did in one turn."""

    rate: float
    """Instances a second."""
    cpu_ms: float
    """Of the receiving process, for one instance; what the machine's other work disturbs least."""
    seconds: float
    """How long it took."""
    drained_s: float = 0.0
    """How long the Mover needed for the rest afterwards."""

    @property
    def sustained(self) -> float:
        """Instances a second when receiving and bringing are counted together: what goes on for ever."""
        return self.rate * self.seconds / (self.seconds + self.drained_s)


def receive(house: House, pattern: Pattern, *, threads: int, seconds: float, per_study: int = PER_STUDY) -> Turn:
    """Receive instances of a pattern for some seconds, a study at a time in each thread."""
    end = time.perf_counter() + seconds
    most = max(MOST_BYTES // (pattern.byte_count * threads), 1)
    numbers = [0] * threads
    faults: list[BaseException] = []

    def association(thread: int) -> None:
        study = series = ""
        try:
            for number in range(most):
                if time.perf_counter() >= end:
                    return
                if number % per_study == 0:
                    study, series = pattern.new_uid(), pattern.new_uid()
                origin = Origin("dimse", datetime.now(UTC), "192.0.2.1", f"SENDER{thread}", "DERM_NODE")
                with house.archive.receive(origin, transfer_syntax_uid=pattern.transfer_syntax_uid) as intake:
                    for chunk in pattern.chunks(pattern.new_uid(), study, series):
                        intake.write(chunk)
                    intake.commit()
                numbers[thread] += 1
        except BaseException as error:  # noqa: BLE001 - raised below
            faults.append(error)

    workers = [threading.Thread(target=association, args=(thread,)) for thread in range(threads)]
    began, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    passed, cpu = time.perf_counter() - began, time.process_time() - cpu
    if faults:
        raise faults[0]
    return Turn(sum(numbers) / passed, cpu * 1000 / max(sum(numbers), 1), passed)


def drained(house: House) -> float:
    """Wait until the Mover has brought everything; seconds."""
    began = time.perf_counter()
    while any(True for _ in house.archive.places.landed()):
        time.sleep(0.05)
    return time.perf_counter() - began


def database_url(server: PostgresqlServer | None, name: str) -> str:
    """Make a database on the server; SQLite in the folder without one."""
    if server is None:
        return ""
    server.execute(f"CREATE DATABASE {name}")
    return server.url(name)


@contextmanager
def houses(folder: Path, server: PostgresqlServer | None) -> Iterator[dict[str, House]]:
    """Open one archive for each contender."""
    with ExitStack() as stack:
        elsewhere = stack.enter_context(in_memory(wanted=True)) / "s3"  # another machine's disk: flushes do not wait for its writing
        (elsewhere / "land").mkdir(parents=True)
        (elsewhere / "archive").mkdir()
        endpoint = stack.enter_context(s3_service(elsewhere))
        urls = {name: database_url(server, f"{name}_{folder.name}") for name in CONTENDERS}
        made = {"directory": build(folder / "directory", database_url=urls["directory"])}
        for name in ("land", "archive"):
            made[name] = build(
                folder / name,
                store=S3Store(bucket=name, endpoint_url=endpoint, region="us-east-1"),
                node_id=NODE,
                database_url=urls[name],
                acknowledge=lambda _, policy=name: policy,
            )
        stack.enter_context(mover(folder / "land", endpoint, "land", NODE, urls["land"]))
        try:
            yield made
        finally:
            for house in made.values():
                house.close()


def measured(folder: Path, rounds: int, server: PostgresqlServer | None, *, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Let the contenders take turns; return medians and ratios to the directory store by kind and number of threads."""
    found: dict[str, Any] = {}
    for kind, threads in itertools.product(kinds, THREADS):
        place = folder / f"{kind}{threads}"
        with houses(place, server) as contenders:
            pattern = Pattern.drawn(kind)
            turns: dict[str, list[Turn]] = {name: [] for name in contenders}
            for house in contenders.values():  # connections, prepared statements, keys
                receive(house, pattern, threads=threads, seconds=0.3)
            drained(contenders["land"])
            for turn in range(rounds):
                order = CONTENDERS[turn % 3 :] + CONTENDERS[: turn % 3]
                for name in order:
                    result = receive(contenders[name], pattern, threads=threads, seconds=SECONDS)
                    if name == "land":
                        result.drained_s = drained(contenders[name])
                    turns[name].append(result)
            found[f"{kind} {threads}"] = line = _summary(turns)
            print(f"  {kind:<6}{threads} at once  " + "  ".join(_words(name, line[name]) for name in CONTENDERS), flush=True)
    return found


def run(rounds: int, *, engines: tuple[str, ...] = ("SQLite", "PostgreSQL")) -> dict[str, Any]:
    """Measure on each database, on the RAM disk (what the program costs) and on the disk (what a user gets)."""
    results: dict[str, Any] = {}
    if rclone() is None:
        print("ingest: rclone is not installed (requirements/dev.txt); not measured")
        return results
    for engine, memory in itertools.product(engines, (True, False)):
        name = f"{engine}, {'RAM disk' if memory else 'disk'}"
        print(f"ingest, {name}; load {load():.1f}")
        with ExitStack() as stack:
            server = stack.enter_context(started(durable=not memory)) if engine == "PostgreSQL" else None
            folder = stack.enter_context(in_memory(wanted=memory))
            results[name] = {**measured(folder, rounds, server), "load afterwards": load()}
    return results


def _summary(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for name, all_turns in turns.items():
        ratios = [turn.rate / base.rate for turn, base in zip(all_turns, turns["directory"], strict=True)]
        line[name] = {
            "per second": round(statistics.median(turn.rate for turn in all_turns), 1),
            "ratio": round(statistics.median(ratios), 3),
            "cpu ms": round(statistics.median(turn.cpu_ms for turn in all_turns), 2),
            "rates": [round(turn.rate, 1) for turn in all_turns],
        }
        if name == "land":
            sustained = [turn.sustained / base.rate for turn, base in zip(all_turns, turns["directory"], strict=True)]
            line[name]["sustained per second"] = round(statistics.median(turn.sustained for turn in all_turns), 1)
            line[name]["sustained ratio"] = round(statistics.median(sustained), 3)
            line[name]["drained s"] = round(statistics.median(turn.drained_s for turn in all_turns), 2)
    return line


def _words(name: str, line: dict[str, Any]) -> str:
    ratio = "" if name == "directory" else f" = {line['ratio']:.2f}"
    sustained = f", sustained {line['sustained ratio']:.2f}" if "sustained ratio" in line else ""
    return f"{name} {line['per second']:.0f}/s{ratio}{sustained} ({line['cpu ms']:.1f} ms CPU)"
