"""Work queue: one holder at a time, every job ends, walked as a state machine on the real database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import delete

from storage.errors import LeaseLost, StorageError
from storage.records import Job, JobKind, JobState, NewJob
from storage.work import JOBS, TRANSITIONS, Step, WorkQueue, growing_delay

if TYPE_CHECKING:
    from storage.database import Database

START = datetime(2026, 1, 1, tzinfo=UTC)
ANALYSE, DELIVER, ARCHIVE = JobKind.ANALYSE, JobKind.DELIVER, JobKind.ARCHIVE


class Time:
    """A wall clock that can be set and a monotonic clock that only goes on."""

    def __init__(self) -> None:
        self.wall, self.ticks = START, 1000.0

    def clock(self) -> datetime:
        return self.wall

    def monotonic(self) -> float:
        return self.ticks

    def passes(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.ticks += seconds


@pytest.fixture
def moment() -> Time:
    """Return the clocks of a test."""
    return Time()


def make_queue(database: Database, moment: Time, **options: Any) -> WorkQueue:
    """Return a queue with leases of 60 s, three attempts, and a delay of 10 s for each attempt."""
    given: dict[str, Any] = {
        "lease_s": 60,
        "attempts": {ANALYSE: 3, DELIVER: 3},
        "delay": lambda attempts: 10.0 * attempts,
        "horizon_s": 600,
    }
    return WorkQueue(database=database, clock=moment.clock, monotonic=moment.monotonic, **{**given, **options})


@pytest.fixture
def queue(database: Database, moment: Time) -> WorkQueue:
    """Return a queue over the empty database."""
    return make_queue(database, moment)


def add(database: Database, queue: WorkQueue, uid: str = "1.2", kind: JobKind = ANALYSE, lane: str = "", **payload: Any) -> int:
    """Enqueue one job in a transaction of its own."""
    return database.write(lambda connection: queue.enqueue(connection, NewJob(kind, uid, lane, payload)))


def claimed(queue: WorkQueue, kind: JobKind = ANALYSE, **options: Any) -> Job:
    """Claim, and fail the test when there is nothing."""
    job = queue.claim(kind, owner="test", **options)
    assert job is not None
    return job


def claimed_attempts(queue: WorkQueue, uid: str) -> int:
    """Return the attempts of the one job about `uid`."""
    (job,) = queue.jobs_of(uid)
    return job.attempts


def test_a_job_goes_from_ready_to_done(database: Database, queue: WorkQueue, moment: Time) -> None:
    """Claim gives what was enqueued; finish keeps result and time; then there is nothing more to claim."""
    number = add(database, queue, "1.5", answer=42)
    moment.passes(5)
    job = claimed(queue)
    assert (job.id, job.sop_instance_uid, job.payload, job.attempts, job.state) == (number, "1.5", {"answer": 42}, 1, JobState.CLAIMED)
    assert (job.created_at, job.first_claimed_at) == (START, START + timedelta(seconds=5))
    moment.passes(5)
    queue.finish(job, {"models": ["a"]})
    (done,) = queue.jobs_of("1.5")
    assert (done.state, done.result, done.finished_at, done.lease_token) == (
        JobState.DONE,
        {"models": ["a"]},
        START + timedelta(seconds=10),
        "",
    )
    assert queue.claim(ANALYSE, owner="test") is None


def test_the_same_job_is_enqueued_once(database: Database, queue: WorkQueue) -> None:
    """The same kind, instance, lane and payload is one job for ever; another of any of them is another job."""
    first = add(database, queue, "1.2", DELIVER, "pacs", a=1, b=2)
    assert add(database, queue, "1.2", DELIVER, "pacs", b=2, a=1) == first
    queue.finish(claimed(queue, DELIVER), {})
    assert add(database, queue, "1.2", DELIVER, "pacs", a=1, b=2) == first
    others = [add(database, queue, "1.3", DELIVER, "pacs", a=1, b=2), add(database, queue, "1.2", ANALYSE, "pacs", a=1, b=2)]
    others += [add(database, queue, "1.2", DELIVER, "other", a=1, b=2), add(database, queue, "1.2", DELIVER, "pacs", a=1)]
    assert len({first, *others}) == 5
    assert queue.counts()[DELIVER, JobState.DONE] == 1


def test_a_job_dies_with_its_transaction(database: Database, queue: WorkQueue) -> None:
    """A work that raises after enqueueing leaves no job."""

    def work(connection: Any) -> None:
        queue.enqueue(connection, NewJob(ANALYSE, "1.2"))
        raise LookupError

    with pytest.raises(LookupError):
        database.write(work)
    assert queue.jobs_of("1.2") == []


def test_finishing_is_part_of_the_callers_transaction(database: Database, queue: WorkQueue) -> None:
    """finish_in in a work that raises leaves the job claimed; a lost lease undoes the whole work (no second result)."""
    add(database, queue)
    job = claimed(queue)

    def work(connection: Any) -> None:
        queue.finish_in(connection, job, {})
        raise LookupError

    with pytest.raises(LookupError):
        database.write(work)
    assert queue.jobs_of("1.2")[0].state is JobState.CLAIMED
    queue.finish(job, {})

    def again(connection: Any) -> None:
        queue.enqueue(connection, NewJob(ANALYSE, "1.9"))
        queue.finish_in(connection, job, {"second": True})

    with pytest.raises(LeaseLost):
        database.write(again)
    assert queue.jobs_of("1.9") == []
    assert queue.jobs_of("1.2")[0].result == {}


def test_jobs_are_claimed_in_order_and_once(database: Database, queue: WorkQueue, moment: Time) -> None:
    """The one that waits longest comes first, and no job is given to two."""
    numbers = []
    for uid in ("1.1", "1.2", "1.3"):
        numbers.append(add(database, queue, uid))
        moment.passes(1)
    assert [claimed(queue).id for _ in numbers] == numbers
    assert queue.claim(ANALYSE, owner="test") is None


def test_lanes_are_apart(database: Database, queue: WorkQueue) -> None:
    """A claim in a lane gets that lane's jobs only; lanes() names those with due work; without a lane all are served."""
    for uid, lane in (("1.1", "a"), ("1.2", "b"), ("1.3", "b"), ("1.4", "c")):
        add(database, queue, uid, DELIVER, lane)
    assert queue.lanes(DELIVER) == ["a", "b", "c"]
    assert queue.lanes(ANALYSE) == []
    assert [claimed(queue, DELIVER, lane="b").sop_instance_uid for _ in range(2)] == ["1.2", "1.3"]
    assert queue.claim(DELIVER, lane="b", owner="test") is None
    assert queue.lanes(DELIVER) == ["a", "c"]
    assert [claimed(queue, DELIVER).sop_instance_uid for _ in range(2)] == ["1.1", "1.4"]
    assert queue.claim(DELIVER, owner="test") is None


def test_failures_are_retried_with_growing_delay_then_dead(database: Database, queue: WorkQueue, moment: Time) -> None:
    """Each retry waits longer; after the last attempt the job is dead with its reason; first_claimed_at stays frozen."""
    add(database, queue)
    for attempt in (1, 2):
        job = claimed(queue)
        assert (job.attempts, job.first_claimed_at) == (attempt, START)
        assert queue.fail(job, "no luck", retryable=True) is JobState.READY
        moment.passes(10 * attempt - 0.001)
        assert queue.claim(ANALYSE, owner="test") is None
        moment.passes(0.001)
    assert queue.fail(claimed(queue), "no luck at all", retryable=True) is JobState.DEAD
    (dead,) = queue.dead(ANALYSE)
    assert (dead.state, dead.reason, dead.attempts, dead.first_claimed_at) == (JobState.DEAD, "no luck at all", 3, START)
    moment.passes(1_000_000)
    assert queue.claim(ANALYSE, owner="test") is None


def test_what_cannot_be_retried_is_dead_at_once(database: Database, queue: WorkQueue) -> None:
    """A failure that is not retryable ends the job at the first attempt."""
    add(database, queue)
    assert queue.fail(claimed(queue), "never", retryable=False) is JobState.DEAD


def test_released_work_costs_no_attempt(database: Database, queue: WorkQueue, moment: Time) -> None:
    """A job that is given back can be given back for ever, at once or after a time."""
    add(database, queue)
    for _ in range(10):
        queue.release(claimed(queue))
    job = claimed(queue)
    assert job.attempts == 1
    queue.release(job, after_s=30)
    moment.passes(29)
    assert queue.claim(ANALYSE, owner="test") is None
    moment.passes(1)
    assert claimed(queue).attempts == 1


def test_a_heartbeat_keeps_the_lease_and_silence_loses_it(database: Database, queue: WorkQueue, moment: Time) -> None:
    """While the heart beats nobody gets the job; 60 s of silence and it is another's: whatever the first holder does is LeaseLost."""
    add(database, queue)
    job = claimed(queue)
    for _ in range(5):
        moment.passes(50)
        queue.heartbeat(job)
    moment.passes(59)
    assert queue.claim(ANALYSE, owner="other") is None
    moment.passes(1)
    second = claimed(queue)
    assert (second.id, second.attempts) == (job.id, 2)
    for attempt in (
        lambda: queue.heartbeat(job),
        lambda: queue.finish(job, {}),
        lambda: queue.fail(job, "late", retryable=True),
        lambda: queue.fail(job, "late", retryable=False),
        lambda: queue.release(job),
    ):
        with pytest.raises(LeaseLost):
            attempt()
    queue.finish(second, {"by": "second"})
    assert queue.jobs_of("1.2")[0].result == {"by": "second"}


def test_poison_that_kills_its_workers_ends_dead(database: Database, queue: WorkQueue, moment: Time) -> None:
    """A job whose lease ran out as often as it may be tried is dead, and the queue moves on (threats rows 30 and 61)."""
    add(database, queue, "1.666")
    for attempt in (1, 2, 3):
        assert (claimed(queue).sop_instance_uid, claimed_attempts(queue, "1.666")) == ("1.666", attempt)
        moment.passes(61)
    add(database, queue, "1.7")
    assert claimed(queue).sop_instance_uid == "1.7"
    (poison,) = queue.jobs_of("1.666")
    assert poison.state is JobState.DEAD
    assert "3 workers" in poison.reason


def test_a_death_is_told_in_its_own_transaction(database: Database, moment: Time) -> None:
    """Whoever finds a job dead tells `exhausted`, once, before it claims the next one; what that raises undoes the burial."""
    told: list[tuple[str, str]] = []
    queue = make_queue(database, moment, exhausted=lambda _, job, reason: told.append((job.sop_instance_uid, reason)))
    add(database, queue, "1.666")
    for _ in range(3):
        claimed(queue)
        moment.passes(61)
    assert (queue.claim(ANALYSE, owner="test"), told) == (None, [("1.666", "3 workers died or hung over it")])
    assert queue.claim(ANALYSE, owner="test") is None
    assert len(told) == 1


def test_a_job_with_a_home_is_for_that_node_only(database: Database, moment: Time) -> None:
    """Nodes claim what is for any node and their own, in order of waiting; a lane whose work is all another's is no lane."""
    here, there, nowhere = (make_queue(database, moment, home=home) for home in ("a" * 16, "b" * 16, ""))
    for uid, home in (("1.1", "a" * 16), ("1.2", ""), ("1.3", "b" * 16), ("1.4", "a" * 16)):
        database.write(lambda connection, uid=uid, home=home: here.enqueue(connection, NewJob(DELIVER, uid, "pacs", home=home)))
        moment.passes(1)
    assert [claimed(here, DELIVER).sop_instance_uid for _ in range(3)] == ["1.1", "1.2", "1.4"]
    assert (here.claim(DELIVER, owner="test"), here.claim(DELIVER, lane="pacs", owner="test"), here.lanes(DELIVER)) == (None, None, [])
    assert (nowhere.claim(DELIVER, owner="test"), nowhere.lanes(DELIVER)) == (None, [])
    assert there.lanes(DELIVER) == ["pacs"]
    assert claimed(there, DELIVER).home == "b" * 16


def test_a_job_at_home_nowhere_any_more_is_for_all(database: Database, moment: Time) -> None:
    """After rehome every node may claim what is about the instance, and only that; it lives and dies with its transaction."""
    here, there = (make_queue(database, moment, home=home) for home in ("a" * 16, "b" * 16))
    for uid in ("1.1", "1.2"):
        database.write(lambda connection, uid=uid: here.enqueue(connection, NewJob(ANALYSE, uid, home="a" * 16)))

    def work(connection: Any) -> None:
        here.rehome(connection, "1.2")
        raise LookupError

    with pytest.raises(LookupError):
        database.write(work)
    assert there.claim(ANALYSE, owner="test") is None
    database.write(lambda connection: here.rehome(connection, "1.2"))
    assert (claimed(there).sop_instance_uid, there.claim(ANALYSE, owner="test")) == ("1.2", None)


def test_an_archive_job_never_dies_of_failing(database: Database, moment: Time) -> None:
    """The only copy of a landed instance lies on one disk: whatever fails, and however often, the job goes on."""
    queue = WorkQueue(database=database, clock=moment.clock, monotonic=moment.monotonic, delay=lambda _: 1.0)
    add(database, queue, kind=ARCHIVE)
    for _ in range(110):
        assert queue.fail(claimed(queue, ARCHIVE), "the store is away", retryable=True) is JobState.READY
        moment.passes(1)
        claimed(queue, ARCHIVE)
        moment.passes(61)


def test_jobs_of_erased_instances_are_gone(database: Database, queue: WorkQueue) -> None:
    """cancel_in deletes every job about the instances, in whatever state; a holder can do nothing with its job any more."""
    for uid in ("1.1", "1.2", "1.3"):
        add(database, queue, uid)
    add(database, queue, "1.2", DELIVER, "pacs")
    held, kept = claimed(queue), claimed(queue)
    assert database.write(lambda connection: queue.cancel_in(connection, ["1.1", "1.3", "1.1", "9.9"])) == 2
    assert [len(queue.jobs_of(uid)) for uid in ("1.1", "1.2", "1.3")] == [0, 2, 0]
    with pytest.raises(LeaseLost):
        queue.finish(held, {})
    queue.finish(kept, {})


def test_an_operator_requeues(database: Database, queue: WorkQueue, moment: Time) -> None:
    """Dead and done jobs get fresh attempts, keep when they were first claimed; others are refused."""
    number = add(database, queue)
    with pytest.raises(StorageError, match="neither dead nor done"):
        queue.requeue(number)
    queue.fail(claimed(queue), "never", retryable=False)
    moment.passes(100)
    assert queue.requeue_dead(DELIVER) == 0
    assert queue.requeue_dead(ANALYSE) == 1
    job = claimed(queue)
    assert (job.attempts, job.first_claimed_at) == (1, START)
    queue.finish(job, {"x": 1})
    queue.requeue(number)
    assert claimed(queue).result == {}
    with pytest.raises(StorageError):
        queue.requeue(999)


def test_counts_and_age_for_metrics(database: Database, queue: WorkQueue, moment: Time) -> None:
    """Every kind and state is counted; the age is that of the oldest unfinished job, whether it waits, waits for a retry or is held."""
    for uid in ("1.1", "1.2"):
        add(database, queue, uid)
        moment.passes(1)
    queue.fail(claimed(queue), "later", retryable=True)
    moment.passes(1)
    queue.finish(claimed(queue), {})
    assert queue.oldest_unfinished_s() == {ANALYSE: 3.0, DELIVER: 0.0, ARCHIVE: 0.0}
    moment.passes(60)
    held = claimed(queue)
    assert held.sop_instance_uid == "1.1"
    add(database, queue, "1.3")
    assert queue.oldest_unfinished_s()[ANALYSE] == 63.0
    queue.finish(held, {})
    moment.passes(4)
    assert queue.oldest_unfinished_s()[ANALYSE] == 4.0
    counts = queue.counts()
    assert len(counts) == len(JobKind) * len(JobState)
    assert {key: number for key, number in counts.items() if number} == {(ANALYSE, JobState.READY): 1, (ANALYSE, JobState.DONE): 2}


@pytest.mark.parametrize("step", [-3600, -10 * 365 * 86400])
def test_a_clock_put_back_stops_nothing(database: Database, queue: WorkQueue, moment: Time, step: float) -> None:
    """In a running process leases and delays go on by the monotonic clock (threats row 42)."""
    add(database, queue, "1.1")
    job = claimed(queue)
    moment.wall += timedelta(seconds=step)
    add(database, queue, "1.2")
    assert claimed(queue).sop_instance_uid == "1.2"
    moment.passes(30)
    queue.heartbeat(job)
    moment.passes(59)
    assert [found.sop_instance_uid for found in iter(lambda: queue.claim(ANALYSE, owner="x"), None)] == ["1.2"]
    moment.passes(2)
    assert claimed(queue).sop_instance_uid == "1.1"


def test_a_process_started_after_the_clock_was_put_back(database: Database, queue: WorkQueue, moment: Time) -> None:
    """Times further ahead than anything is planned are a wrong clock's: the jobs are due, and the old holder is fenced."""
    add(database, queue, "1.1")
    add(database, queue, "1.2")
    job = claimed(queue)
    moment.wall -= timedelta(days=365)
    fresh = make_queue(database, moment)
    assert fresh.lanes(ANALYSE) == [""]
    assert {claimed(fresh).sop_instance_uid for _ in range(2)} == {"1.1", "1.2"}
    with pytest.raises(LeaseLost):
        queue.finish(job, {})


def test_a_clock_put_forward_gives_no_second_result(database: Database, queue: WorkQueue, moment: Time) -> None:
    """A jump ahead ends the lease early; the job runs twice, its result is taken once."""
    add(database, queue)
    job = claimed(queue)
    moment.wall += timedelta(days=3650)
    queue.finish(claimed(queue), {"winner": 2})
    with pytest.raises(LeaseLost):
        queue.finish(job, {"winner": 1})
    assert queue.jobs_of("1.2")[0].result == {"winner": 2}


def test_the_default_delay_grows_and_outlasts_three_days() -> None:
    """Delays grow to about an hour, and a hundred attempts last longer than a destination that is down for three days."""
    delays = [growing_delay(attempts) for attempts in range(1, 100)]
    assert 4 <= delays[0] <= 6
    assert all(2880 <= delay <= 4320 for delay in delays[12:])
    assert sum(delays) > 3 * 86400


def test_every_state_but_the_last_two_has_a_way_out_and_all_are_reached() -> None:
    """The table is whole: every step is in it, each has one target, every state can be reached and be left."""
    assert {step for _, step in TRANSITIONS} == set(Step)
    assert {state for state, _ in TRANSITIONS} == set(JobState) == set(TRANSITIONS.values())
    for step in Step:
        assert len({after for (_, taken), after in TRANSITIONS.items() if taken is step}) == 1


class QueueMachine(RuleBasedStateMachine):
    """Random walks over a real database, checked step by step against TRANSITIONS and a model of attempts and leases."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.time = Time()
        self.state: dict[int, JobState] = {}
        self.due: dict[int, float] = {}
        self.attempts: dict[int, int] = {}
        self.first: dict[int, datetime | None] = {}
        self.holder: dict[int, Job] = {}
        self.old: list[Job] = []

    database: Database

    @initialize()
    def open(self) -> None:
        self.database.write(lambda connection: connection.execute(delete(JOBS)))
        self.queue = make_queue(self.database, self.time)

    def take(self, number: int, step: Step) -> None:
        self.state[number] = TRANSITIONS[self.state[number], step]

    @rule(target=jobs, name=st.integers(1, 4))
    def enqueue(self, name: int) -> int:
        number = add(self.database, self.queue, f"1.{name}")
        if number not in self.state:
            self.state[number], self.due[number], self.attempts[number], self.first[number] = JobState.READY, self.time.ticks, 0, None
        return number

    @rule(seconds=st.sampled_from([0.5, 9, 10, 20, 30, 59, 60, 61]))
    def wait(self, seconds: float) -> None:
        self.time.passes(seconds)

    @rule(seconds=st.integers(-7200, 0))
    def clock_is_put_back(self, seconds: int) -> None:
        self.time.wall += timedelta(seconds=seconds)

    @rule()
    def claim(self) -> None:
        job = self.queue.claim(ANALYSE, owner="machine")
        live = {number: due for number, due in self.due.items() if due <= self.time.ticks + 1e-4}
        for number in sorted(live, key=lambda number: (live[number], number)):
            if self.state[number] is JobState.CLAIMED:
                self.old.append(self.holder.pop(number))
                if self.attempts[number] >= 3:
                    self.take(number, Step.EXHAUST)
                    del self.due[number]
                    continue
                self.take(number, Step.RECLAIM)
            else:
                self.take(number, Step.CLAIM)
            assert job is not None
            assert job.id == number
            self.attempts[number] += 1
            self.first[number] = self.first[number] or self.time.wall
            self.due[number] = self.time.ticks + 60
            self.holder[number] = job
            return
        assert job is None

    def holds(self, number: int) -> Job | None:
        return self.holder.get(number)

    @rule(number=jobs)
    def heartbeat(self, number: int) -> None:
        job = self.holds(number)
        if job is not None:
            self.queue.heartbeat(job)
            self.take(number, Step.RENEW)
            self.due[number] = self.time.ticks + 60

    @rule(number=jobs)
    def finish(self, number: int) -> None:
        job = self.holder.pop(number, None)
        if job is not None:
            self.queue.finish(job, {"done": True})
            self.take(number, Step.FINISH)
            del self.due[number]
            self.old.append(job)

    @rule(number=jobs, retryable=st.booleans())
    def fail(self, number: int, retryable: bool) -> None:
        job = self.holder.pop(number, None)
        if job is not None:
            after = self.queue.fail(job, "failed", retryable=retryable)
            if retryable and self.attempts[number] < 3:
                self.take(number, Step.RETRY)
                self.due[number] = self.time.ticks + 10 * self.attempts[number]
            else:
                self.take(number, Step.BURY)
                del self.due[number]
            assert after is self.state[number]
            self.old.append(job)

    @rule(number=jobs)
    def release(self, number: int) -> None:
        job = self.holder.pop(number, None)
        if job is not None:
            self.queue.release(job)
            self.take(number, Step.RELEASE)
            self.attempts[number] -= 1
            self.due[number] = self.time.ticks
            self.old.append(job)

    @rule(number=jobs)
    def requeue(self, number: int) -> None:
        if (self.state[number], Step.REQUEUE) in TRANSITIONS:
            self.queue.requeue(number)
            self.take(number, Step.REQUEUE)
            self.attempts[number], self.due[number] = 0, self.time.ticks
        else:
            with pytest.raises(StorageError):
                self.queue.requeue(number)

    @rule()
    def who_lost_the_lease_can_do_nothing(self) -> None:
        for job in self.old[-3:]:
            for attempt in (self.queue.heartbeat, lambda held: self.queue.finish(held, {}), self.queue.release):
                with pytest.raises(LeaseLost):
                    attempt(job)

    @invariant()
    def the_database_agrees(self) -> None:
        for number in self.state:
            with self.database.read() as connection:
                row = connection.exec_driver_sql(f"SELECT state, attempts, due_at IS NULL AS ended FROM jobs WHERE id = {number}").one()  # noqa: S608
            assert (row.state, row.attempts) == (self.state[number], self.attempts[number])
            assert bool(row.ended) == (self.state[number] in (JobState.DONE, JobState.DEAD))
        for job in (found for name in range(1, 5) for found in self.queue.jobs_of(f"1.{name}")):
            assert job.first_claimed_at == self.first[job.id]


def test_random_walks_follow_the_table(database: Database, engine: str) -> None:
    """Whatever is done in whatever order, and with the clock put back in between, state and attempts are what TRANSITIONS say."""
    machine = type("QueueMachine", (QueueMachine,), {"database": database})
    examples = 25 if engine == "sqlite" else 10
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    )
