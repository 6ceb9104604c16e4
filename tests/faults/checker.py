"""The checker: one program that proves the promises P1 to P8 (threats.md section 3) over a history and the state it led to.

    python -m tests.faults.checker HISTORY FOLDER [FOLDER …]

The first folder is the node's (as ``tests.storage.house`` makes it); it is opened, and it and all further ones are searched for
plaintext. `check` takes values only: whatever ran the node, its history and its state are judged by the same rules.

====== =================================================================================================================
P1     acknowledged: it is there, bit for bit, under the digest that was acknowledged, whenever it was asked for
P2     an acknowledgement for each admission that was committed, and none more; never for what was not sent
P3     one analysis in a final state, one report of a kind, the same bytes at every destination, each with its proof
P4     every request was answered; once nothing was broken any more, nothing was refused
P5     no canary in any file or object
P6     the audit trail is whole, and has a record of every admission, report, delivery and erasure
P7     back after every kill within 30 s and without a hand; nothing left lying, rows and objects one to one
P8     what was poisoned or away stopped nothing else
====== =================================================================================================================
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage.archive import ENDED_BADLY
from storage.objects import ObjectStore
from storage.records import JobKind, JobState
from tests.faults.history import Entry, entries_of
from tests.faults.state import State, state_of
from tests.storage.house import House, build

RECOVERY_S: Final = 30.0
ADMITTED: Final = ("instance.received", "instance.duplicate", "instance.healed")
_BRINGS: Final = ("sent", "concluded")
DIED: Final = "died or hung"


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    promise: str
    uid: str
    words: str

    def __str__(self) -> str:
        return f"{self.promise} {self.uid or '-'}: {self.words}"


class _Case:
    """A history, taken apart."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry.order)
        self.of: dict[str, list[Entry]] = defaultdict(list)
        self.by_uid: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            self.of[entry.event].append(entry)
            if entry.uid:
                self.by_uid[entry.uid].append(entry)
        began = self.of["began"][0] if self.of["began"] else None
        self.peers: list[str] = list(began.detail.get("peers", ())) if began else []
        self.bad_peers: list[str] = list(began.detail.get("bad_peers", ())) if began else []
        self.canaries: list[str] = list(began.detail.get("canaries", ())) if began else []
        self.analysed: bool = bool(began.detail.get("analysed", True)) if began else True
        self.kills = len(self.of["crashed"])
        self.poison = {entry.uid for entry in self.of["failed"] if entry.detail.get("poison")}
        self.healed_at = self.of["healed"][-1].order if self.of["healed"] else None
        self.ended = bool(self.of["ended"])
        self.erased_at = {entry.uid: entry.order for entry in self.entries if entry.event in ("erasing", "erased")}
        self.promised: dict[str, str] = {}
        """UID -> digest that was acknowledged, of what nobody erased since."""
        for entry in self.entries:
            if entry.event == "acked":
                self.promised.setdefault(entry.uid, entry.sha256)
            elif entry.event in ("erasing", "erased"):
                self.promised.pop(entry.uid, None)


def check(entries: Iterable[Entry], state: State) -> list[Violation]:
    """Return every promise that was broken; an empty list is the proof."""
    case = _Case(entries)
    found: list[Violation] = []
    for rule in (_kept, _not_before, _final, _answered, _secret, _recorded, _back, _apart):
        found += rule(case, state)
    return found


def _kept(case: _Case, state: State) -> Iterable[Violation]:
    for uid, sha256 in case.promised.items():
        held = state.instances.get(uid)
        if held is None:
            yield Violation("P1", uid, "acknowledged and lost: the index does not know it")
        elif held.problem:
            yield Violation("P1", uid, f"acknowledged and cannot be read: {held.problem}")
        elif sha256 != held.sha256 or held.read != sha256:
            yield Violation("P1", uid, "acknowledged and altered: it is not what was sent")
    for uid, entries in case.by_uid.items():
        promised = ""
        for entry in entries:
            if entry.event == "acked":
                if promised and entry.sha256 != promised:
                    yield Violation("P1", uid, "two contents were acknowledged under one UID")
                promised = promised or entry.sha256
            elif entry.event in ("erasing", "erased"):
                promised = ""
            elif promised and entry.event == "retrieved" and entry.sha256 != promised:
                yield Violation("P1", uid, "retrieved other bytes than were acknowledged")
            elif promised and (entry.event == "missing" or (entry.event == "queried" and not entry.detail.get("found"))):
                yield Violation("P1", uid, "acknowledged, and a reader was told that it is not there")
            elif entry.event == "committed" and entry.sha256 != promised:
                yield Violation("P1", uid, "storage commitment for what was not acknowledged")


def _not_before(case: _Case, state: State) -> Iterable[Violation]:
    sent = {(entry.uid, entry.sha256) for entry in case.of["sent"]}
    acked = Counter(entry.uid for entry in case.of["acked"])
    for entry in case.of["acked"]:
        if (entry.uid, entry.sha256) not in sent:
            yield Violation("P2", entry.uid, "acknowledged what nobody sent")
    for uid, count in acked.items():
        admitted = sum(state.audit.get(uid, Counter())[action] for action in ADMITTED)
        if count > admitted:
            yield Violation("P2", uid, f"acknowledged {count} times, admitted {admitted} times: acknowledged before the commit")


def _final(case: _Case, state: State) -> Iterable[Violation]:
    contents: dict[str, set[str]] = defaultdict(set)
    for entry in case.entries:
        if entry.event in ("concluded", "delivered"):
            if contents[entry.uid] and entry.sha256 not in contents[entry.uid]:
                yield Violation("P3", entry.uid, "one report UID, several contents")
            contents[entry.uid].add(entry.sha256)
        elif entry.event in ("erasing", "erased"):
            contents.pop(entry.uid, None)  # what comes after an erasure may be another picture under the same UID
    for uid, found in contents.items():
        if len(found) > 1:
            continue
        if uid not in case.erased_at and (held := state.instances.get(uid)) is not None and held.sha256 not in found:
            yield Violation("P3", uid, "the archived report is not the one that was made or delivered")
        elif uid not in case.erased_at and held is None and _source_erased(case, uid) is False:
            yield Violation("P3", uid, "a report was made or delivered and is not archived")
    if not case.ended or not case.analysed:
        return
    delivered = {(entry.uid, entry.detail.get("peer")) for entry in case.of["delivered"]}
    for uid in case.promised:
        analyses = [job for job in state.jobs.get(uid, ()) if job.kind is JobKind.ANALYSE]
        if len(analyses) != 1 or analyses[0].state not in (JobState.DONE, JobState.DEAD):
            yield Violation("P3", uid, f"not one analysis in a final state: {[job.state.value for job in analyses]}")
            continue
        reports = state.reports.get(uid, [])
        if analyses[0].state is JobState.DONE:
            kinds = Counter(kind for _, kind in reports)
            if not reports or max(kinds.values()) > 1:
                yield Violation("P3", uid, f"not exactly one report of a kind: {dict(kinds)}")
        elif reports:
            yield Violation("P3", uid, "given up, and yet there is a report")
        for report, _ in reports:
            held = state.instances.get(report)
            if held is None or held.problem or held.read != held.sha256:
                yield Violation("P3", report, f"the report cannot be read: {held.problem if held else 'no row'}")
            for peer in case.peers:
                jobs = [job for job in state.jobs.get(report, ()) if job.kind is JobKind.DELIVER and job.lane == peer]
                if len(jobs) != 1 or jobs[0].state not in (JobState.DONE, JobState.DEAD):
                    yield Violation("P3", report, f"not one delivery to {peer} in a final state: {[job.state.value for job in jobs]}")
                elif jobs[0].state is JobState.DONE and not ((report, peer) in delivered or not case.of["delivered"]):
                    yield Violation("P3", report, f"the proof says that {peer} has it, and {peer} never got it")


def _source_erased(case: _Case, report: str) -> bool:
    sources = {entry.detail.get("source") for entry in case.of["concluded"] if entry.uid == report}
    return not sources or any(source in case.erased_at for source in sources)


def _answered(case: _Case, state: State) -> Iterable[Violation]:
    killed: dict[int, int] = {}
    for entry in case.of["crashed"]:
        killed[int(entry.detail.get("process_killed", entry.process))] = entry.order
    asked: Counter[tuple[int, str]] = Counter()
    for entry in case.entries:
        asker = (entry.process, entry.uid)
        if entry.event == "sent" and entry.order > killed.get(entry.process, -1):
            asked[asker] += 1
        elif entry.event in ("acked", "refused", "aborted") and entry.order > killed.get(entry.process, -1):
            asked[asker] -= 1
    for (_, uid), open_requests in asked.items():
        if open_requests > 0:
            yield Violation("P4", uid, "sent and never answered")
    if case.healed_at is not None:
        for entry in case.of["refused"]:
            if entry.order > case.healed_at and not entry.detail.get("conflict") and not entry.detail.get("invalid"):
                yield Violation("P4", entry.uid, f"refused although nothing was broken any more: {entry.detail.get('reason')}")


def _secret(case: _Case, state: State) -> Iterable[Violation]:
    for where in state.plaintext:
        yield Violation("P5", "", f"plaintext in {where}")
    for uid, order in case.erased_at.items():
        # a report may be back unsaid, by an analysis killed after its commit, when its picture was sent again
        pictures = [source for source, made in state.reports.items() if uid in {report for report, _ in made}]
        after = [entry for name in (uid, *pictures) for entry in case.by_uid[name] if entry.order > order]
        if uid in state.instances and not any(entry.event in _BRINGS for entry in after):
            yield Violation("P5", uid, "erased and still there")


def _recorded(case: _Case, state: State) -> Iterable[Violation]:
    if state.audit_fault:
        yield Violation("P6", "", state.audit_fault)
    for uid, held in state.instances.items():
        action = "report.concluded" if held.role == "report" else "instance.received"
        count = state.audit.get(uid, Counter())[action] + state.audit.get(uid, Counter())["instance.adopted"]
        if count < 1 or (count > 1 and uid not in case.erased_at):
            yield Violation("P6", uid, f"{count} records of {action} or adoption")
        for job in state.jobs.get(uid, ()):
            if job.kind is JobKind.DELIVER and job.state is JobState.DONE and not state.audit[uid]["report.delivered"]:
                yield Violation("P6", uid, "delivered without a record")
            if job.kind is JobKind.ANALYSE and job.state is JobState.DONE and not state.audit[uid]["analysis.concluded"]:
                yield Violation("P6", uid, "analysed without a record")
            if job.state is JobState.DEAD and DIED not in job.reason and not state.audit[uid][ENDED_BADLY[job.kind]]:
                yield Violation("P6", uid, "given up without a record")
    for entry in case.of["refused"]:
        if entry.detail.get("conflict") and not state.audit.get(entry.uid, Counter())["instance.quarantined"]:
            yield Violation("P6", entry.uid, "refused for other content without a record")
    for entry in case.of["archived"]:
        if not state.audit.get(entry.uid, Counter())["instance.archived"]:
            yield Violation("P6", entry.uid, "brought into the store without a record")


def _back(case: _Case, state: State) -> Iterable[Violation]:
    for entry in case.of["hand"]:
        yield Violation("P7", entry.uid, f"a hand was needed: {entry.detail.get('what')}")
    recoveries = case.of["recovered"]
    for number, crash in enumerate(case.of["crashed"]):
        after = [entry for entry in recoveries if entry.order > crash.order]
        if len(after) < 1 or len(recoveries) <= number:
            yield Violation("P7", "", f"killed at {crash.detail.get('point')} and never back")
    for entry in recoveries:
        if float(entry.detail.get("seconds", 0)) > RECOVERY_S:
            yield Violation("P7", "", f"back after {entry.detail['seconds']} s only")
    if not case.ended:
        return
    for path in state.left_behind:
        yield Violation("P7", "", f"left lying: {path}")
    if state.live_jobs:
        yield Violation("P7", "", f"{state.live_jobs} jobs did not come to an end")
    for uid, held in state.instances.items():
        if held.landed_on:
            yield Violation("P7", uid, f"still on the disk of node {held.landed_on}")
    if state.whole:
        for key in sorted(state.rows - state.objects):
            yield Violation("P1", "", f"a row names object {key}, which is not in the store")
        for key in sorted(state.objects - state.rows):
            yield Violation("P7", "", f"object {key} has no row")


def _apart(case: _Case, state: State) -> Iterable[Violation]:
    if not case.ended:
        return
    for uid in case.promised:
        for job in state.jobs.get(uid, ()):
            given_up = job.kind is JobKind.ANALYSE and job.state is JobState.DEAD and uid not in case.poison
            if given_up and not (DIED in job.reason and case.kills >= job.attempts):
                yield Violation("P8", uid, f"given up, though nothing was wrong with it: {job.reason}")
            if job.kind is JobKind.ANALYSE and job.attempts > 3 and uid in case.poison:  # threats.md: tries of a job 3
                yield Violation("P8", uid, f"poison was tried {job.attempts} times")
        for report, _ in state.reports.get(uid, ()):
            for job in state.jobs.get(report, ()):
                if job.kind is JobKind.DELIVER and job.state is JobState.DEAD and job.lane not in case.bad_peers:
                    yield Violation("P8", report, f"delivery to {job.lane} given up: {job.reason}")


def judge(history: Path, house: House, *, folders: Sequence[Path] = (), others: dict[str, bytes] | None = None) -> list[Violation]:
    """Check a history against an opened house."""
    entries = entries_of(history)
    case = _Case(entries)
    state = state_of(
        index=house.index,
        queue=house.queue,
        audit=house.audit,
        archive=house.archive,
        store=house.store,
        uids=case.by_uid,
        folders=folders or [house.folder],
        canaries=case.canaries,
        others=others,
    )
    return check(entries, state)


def main(arguments: list[str] | None = None) -> int:
    """Judge as asked; the exit status is 0 when every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.checker", description="Prove P1 to P8 over a history and what it left.")
    parser.add_argument("history", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="the node's folder, then others to search for plaintext")
    parser.add_argument("--endpoint", default="", help="of the S3 service; the credentials are in the environment")
    parser.add_argument("--bucket", default="", help="where the objects are, if not in the folder")
    parser.add_argument("--node-id", default="", help="of the node, if it has a spool")
    options = parser.parse_args(arguments)
    if not (options.folders[0] / "node.db").exists():
        parser.error(f"{options.folders[0]} holds no node.db")
    store: ObjectStore | None = None
    if options.bucket:
        from storage.s3 import S3Store  # noqa: PLC0415 - boto3 is slow to import

        store = S3Store(bucket=options.bucket, endpoint_url=options.endpoint or None, region="us-east-1")
    house = build(options.folders[0], store=store, node_id=options.node_id)
    try:
        found = judge(options.history, house, folders=options.folders)
    finally:
        house.close()
    for violation in found:
        sys.stdout.write(f"{violation}\n")
    sys.stdout.write(f"{len(entries_of(options.history))} events, {len(found)} promises broken\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
