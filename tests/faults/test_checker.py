"""The checker is checked: a whole run passes, and each doctored history or state is caught under the promise it breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from storage.records import Job, JobKind, JobState
from tests.faults import checker
from tests.faults.checker import Violation, check, judge
from tests.faults.ground import PEERS, report_of, sample, work_off
from tests.faults.history import Entry, History, digest, entries_of
from tests.faults.state import Held, State
from tests.storage.house import House, build

SOURCE, REPORT, PICTURE, MADE = "2.25.1.1", "2.25.1.9", "aa", "bb"


def history(*more: Entry) -> list[Entry]:
    """A run without a fault: sent, acknowledged, concluded, delivered; with more events in it."""
    events = (
        Entry("began", 1, 1, detail={"peers": ["pacs"]}),
        Entry("sent", 10, 1, SOURCE, PICTURE),
        Entry("acked", 20, 1, SOURCE, PICTURE),
        Entry("concluded", 30, 1, REPORT, MADE, {"source": SOURCE}),
        Entry("delivered", 40, 1, REPORT, MADE, {"peer": "pacs"}),
        Entry("ended", 1000, 1),
    )
    return [*events, *more]


def job(kind: JobKind, uid: str, state: JobState = JobState.DONE, **fields: object) -> Job:
    """A job as the queue has it at the end."""
    lane = "pacs" if kind is JobKind.DELIVER else ""
    return Job(1, kind, state, lane, uid, 1, None, **fields)  # type: ignore[arg-type]


def state() -> State:
    """What that run leaves."""
    return State(
        instances={SOURCE: Held("source", PICTURE, "k1", "", PICTURE), REPORT: Held("report", MADE, "k2", "", MADE)},
        reports={SOURCE: [(REPORT, "summary")]},
        jobs={SOURCE: [job(JobKind.ANALYSE, SOURCE)], REPORT: [job(JobKind.DELIVER, REPORT)]},
        audit={
            SOURCE: Counter({"instance.received": 1, "analysis.concluded": 1}),
            REPORT: Counter({"report.concluded": 1, "report.delivered": 1}),
        },
        rows={"k1", "k2"},
        objects={"k1", "k2"},
    )


def promises(found: list[Violation]) -> set[str]:
    """The promises that were broken."""
    return {violation.promise for violation in found}


def test_a_run_without_a_fault_passes() -> None:
    """Nothing is found where nothing is wrong."""
    assert check(history(), state()) == []


@pytest.mark.parametrize(
    ("promise", "entry"),
    [
        ("P1", Entry("retrieved", 500, 1, SOURCE, "ff")),
        ("P1", Entry("missing", 500, 1, SOURCE)),
        ("P1", Entry("queried", 500, 1, SOURCE, detail={"found": False})),
        ("P1", Entry("acked", 500, 1, SOURCE, "ff")),
        ("P1", Entry("acked", 500, 1, "2.25.1.2", "ff")),
        ("P1", Entry("committed", 500, 1, "2.25.1.2", "ff")),
        ("P2", Entry("acked", 500, 1, SOURCE, PICTURE)),
        ("P2", Entry("acked", 500, 1, "2.25.1.2", "ff")),
        ("P3", Entry("delivered", 500, 1, REPORT, "ff", {"peer": "pacs"})),
        ("P3", Entry("concluded", 500, 1, REPORT, "ff", {"source": SOURCE})),
        ("P3", Entry("concluded", 500, 1, "2.25.1.8", "cc", {"source": SOURCE})),
        ("P4", Entry("sent", 500, 1, SOURCE, PICTURE)),
        ("P6", Entry("refused", 500, 1, SOURCE, "ff", {"conflict": True})),
        ("P6", Entry("archived", 500, 1, SOURCE)),
        ("P7", Entry("crashed", 500, 1, detail={"point": "index.begin"})),
        ("P7", Entry("hand", 500, 1, detail={"what": "a file was removed"})),
        ("P7", Entry("recovered", 500, 1, detail={"seconds": 31})),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.event}-{value.uid}",
)
def test_a_doctored_history_is_caught(promise: str, entry: Entry) -> None:
    """Each event that must not be is found, under the promise it breaks."""
    assert promise in promises(check(history(entry), state()))


def test_another_picture_after_an_erasure_has_another_report() -> None:
    """What was erased may come again under its UID with other content, and so may its report; without the erasure that breaks P3."""
    again = Entry("concluded", 600, 1, REPORT, "ff", {"source": SOURCE})
    erased = (
        Entry("erasing", 500, 1, SOURCE),
        Entry("erasing", 501, 1, REPORT),
        Entry("erased", 510, 1, SOURCE),
        Entry("erased", 511, 1, REPORT),
    )
    told = "one report UID, several contents"
    assert told in [one.words for one in check(history(again), state())]
    assert told not in [one.words for one in check(history(*erased, again), state())]


def test_a_report_is_back_after_its_picture_was_sent_again() -> None:
    """An analysis killed after its commit says nothing; its report is no rest of what was erased when the picture came again."""
    erased = (
        Entry("erasing", 500, 1, SOURCE),
        Entry("erasing", 501, 1, REPORT),
        Entry("erased", 510, 1, SOURCE),
        Entry("erased", 511, 1, REPORT),
    )
    told = "erased and still there"
    assert [one.uid for one in check(history(*erased), state()) if one.words == told] == [SOURCE, REPORT]
    again = (Entry("sent", 600, 1, SOURCE, PICTURE), Entry("acked", 610, 1, SOURCE, PICTURE))
    assert [one.uid for one in check(history(*erased, *again), state()) if one.words == told] == []


def refused_after_healing() -> list[Entry]:
    """The node is healed, and refuses all the same."""
    events = (
        Entry("healed", 500, 1),
        Entry("sent", 510, 1, SOURCE, PICTURE),
        Entry("refused", 520, 1, SOURCE, PICTURE, {"reason": "full"}),
    )
    return history(*events)


def test_a_refusal_when_all_is_well_is_caught() -> None:
    """What recovers does so alone: a refusal after everything was healed breaks P4."""
    assert promises(check(refused_after_healing(), state())) == {"P4"}


def lose(kept: State) -> None:  # noqa: D103 - the names of these say what they do to the state
    del kept.instances[SOURCE]


def alter(kept: State) -> None:  # noqa: D103
    kept.instances[SOURCE] = replace(kept.instances[SOURCE], read="ff")


def store_under_another_digest(kept: State) -> None:  # noqa: D103
    kept.instances[SOURCE] = replace(kept.instances[SOURCE], sha256="ff", read="ff")


def make_unreadable(kept: State) -> None:  # noqa: D103
    kept.instances[SOURCE] = replace(kept.instances[SOURCE], read="", problem="IntegrityError")


def lose_the_object(kept: State) -> None:  # noqa: D103
    kept.objects.remove("k1")


def forget_the_reception(kept: State) -> None:  # noqa: D103
    kept.audit[SOURCE]["instance.received"] = 0


def receive_twice(kept: State) -> None:  # noqa: D103
    kept.audit[SOURCE]["instance.received"] = 2


def break_the_chain(kept: State) -> None:  # noqa: D103
    kept.audit_fault = "record 3 is missing"


def forget_the_delivery(kept: State) -> None:  # noqa: D103
    kept.audit[REPORT]["report.delivered"] = 0


def analyse_twice(kept: State) -> None:  # noqa: D103
    kept.jobs[SOURCE] *= 2


def never_analyse(kept: State) -> None:  # noqa: D103
    kept.jobs[SOURCE] = [job(JobKind.ANALYSE, SOURCE, JobState.CLAIMED)]


def give_up(kept: State) -> None:  # noqa: D103
    kept.jobs[SOURCE] = [job(JobKind.ANALYSE, SOURCE, JobState.DEAD, reason="it did not work")]
    kept.reports.clear()
    kept.audit[SOURCE]["analysis.refused"] = 1


def report_twice(kept: State) -> None:  # noqa: D103
    kept.reports[SOURCE].append((REPORT + ".1", "summary"))


def never_report(kept: State) -> None:  # noqa: D103
    kept.reports.clear()


def alter_the_report(kept: State) -> None:  # noqa: D103
    kept.instances[REPORT] = replace(kept.instances[REPORT], read="ff")


def never_deliver(kept: State) -> None:  # noqa: D103
    kept.jobs[REPORT] = []


def give_the_delivery_up(kept: State) -> None:  # noqa: D103
    kept.jobs[REPORT] = [job(JobKind.DELIVER, REPORT, JobState.DEAD, reason="refused")]
    kept.audit[REPORT]["delivery.given_up"] = 1


def leave_a_file(kept: State) -> None:  # noqa: D103
    kept.left_behind.append("landing/x")


def leave_an_object(kept: State) -> None:  # noqa: D103
    kept.objects.add("k3")


def leave_a_job(kept: State) -> None:  # noqa: D103
    kept.live_jobs = 1


def leave_it_landed(kept: State) -> None:  # noqa: D103
    kept.instances[SOURCE] = replace(kept.instances[SOURCE], landed_on="0123456789abcdef")


def write_plaintext(kept: State) -> None:  # noqa: D103
    kept.plaintext.append("node.log: Canary^Test")


@pytest.mark.parametrize(
    ("promise", "doctor"),
    [
        ("P1", lose), ("P1", alter), ("P1", store_under_another_digest), ("P1", make_unreadable), ("P1", lose_the_object),
        ("P2", forget_the_reception), ("P3", analyse_twice), ("P3", never_analyse), ("P3", report_twice), ("P3", never_report),
        ("P3", alter_the_report), ("P3", never_deliver), ("P5", write_plaintext), ("P6", break_the_chain), ("P6", forget_the_reception),
        ("P6", receive_twice), ("P6", forget_the_delivery), ("P7", leave_a_file), ("P7", leave_an_object), ("P7", leave_a_job),
        ("P7", leave_it_landed), ("P8", give_up), ("P8", give_the_delivery_up),
    ],
)  # fmt: skip
def test_a_doctored_state_is_caught(promise: str, doctor: Callable[[State], None]) -> None:
    """Each thing that must not be at the end is found, under the promise it breaks."""
    kept = state()
    doctor(kept)
    assert promise in promises(check(history(), kept))


def test_an_erased_instance_may_be_gone() -> None:
    """What an operator erased is no loss; acknowledged again afterwards, it is."""
    gone = State()
    erased = [Entry("erasing", 500, 1, SOURCE), Entry("erased", 510, 1, SOURCE), Entry("erased", 511, 1, REPORT)]
    assert check(history(*erased), replace(gone, audit={SOURCE: Counter({"instance.received": 1})})) == []
    again = [Entry("sent", 600, 1, SOURCE, PICTURE), Entry("acked", 610, 1, SOURCE, PICTURE)]
    assert "P1" in promises(check(history(*erased, *again), gone))


def test_who_died_answers_no_more() -> None:
    """A request that was open when its process was killed is no lie."""
    events = (
        Entry("sent", 500, 1, SOURCE, PICTURE),
        Entry("crashed", 510, 1, detail={"point": "index.begin"}),
        Entry("recovered", 520, 1, detail={"seconds": 1}),
    )
    assert check(history(*events), state()) == []


# --- the same over real parts ------------------------------------------------------------------------------------------


def lived(folder: Path) -> tuple[Path, House]:
    """A real run of four instances with its history."""
    house = build(folder / "house")
    path = folder / "history.jsonl"
    with History(path) as said:
        said.say("began", peers=PEERS, canaries=["Canary^Test"])
        for seed in range(4):
            one = sample(seed)
            said.say("sent", one.sop_instance_uid, digest(one.data_set))
            said.say("acked", one.sop_instance_uid, house.ingest(one).sha256)
        work_off(house)
        for seed in range(4):
            made = report_of(seed)
            said.say("concluded", made.sop_instance_uid, digest(made.data_set), source=sample(seed).sop_instance_uid)
        said.say("ended")
    return path, house


def test_a_real_run_passes_and_its_damages_are_caught(tmp_path: Path) -> None:
    """Over real parts: a whole run passes; a flipped bit, a lost object, a plain file and a changed audit record are caught."""
    path, house = lived(tmp_path)
    assert judge(path, house) == []
    held = house.index.find(sample(1).sop_instance_uid).sealed.object_key
    stored = house.folder / "objects" / held[:2] / held
    sound = stored.read_bytes()
    stored.write_bytes(sound[:200] + bytes([sound[200] ^ 1]) + sound[201:])
    assert promises(judge(path, house)) == {"P1"}
    stored.unlink()
    assert promises(judge(path, house)) == {"P1"}
    stored.write_bytes(sound)
    (house.folder / "crash.dump").write_bytes(b"patient Canary^Test")
    assert promises(judge(path, house)) == {"P5"}
    (house.folder / "crash.dump").unlink()
    house.database.write(lambda connection: connection.exec_driver_sql("UPDATE audit SET actor = 'nobody' WHERE seq = 2"))
    assert promises(judge(path, house)) == {"P6"}
    house.close()


def test_the_program_judges_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m tests.faults.checker HISTORY FOLDER``: 0 for a run that kept its promises, 1 with the broken ones else."""
    path, house = lived(tmp_path)
    house.close()
    assert checker.main([str(path), str(house.folder)]) == 0
    with History(path) as said:
        said.say("acked", "2.25.99", "ff")
    assert checker.main([str(path), str(house.folder)]) == 1
    assert "P1 2.25.99: acknowledged and lost" in capsys.readouterr().out


def test_a_history_that_cannot_be_read_proves_nothing(tmp_path: Path) -> None:
    """A line that is no event is an error, never passed over."""
    path = tmp_path / "history.jsonl"
    path.write_text('{"event":"acked","order":1,"process":1}\n{"event":"ack')
    with pytest.raises(ValueError, match="line 2"):
        entries_of(path)
    with History(tmp_path / "other.jsonl") as said, pytest.raises(ValueError, match="no event"):
        said.say("stored")
