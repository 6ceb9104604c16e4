"""Token buckets of addresses: how many go on in a time, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dicom_node.dimse.crowds import Crowds


def test_a_burst_then_the_rate() -> None:
    """After a pause the burst goes at once, then so many a second; another address has its own."""
    crowds: Crowds[int] = Crowds(rate=10.0, burst=3)
    assert [crowds.enter(number, address="a", caller="T", now=0.0) for number in range(5)] == [True] * 3 + [False] * 2
    assert crowds.enter(9, address="b", caller="T", now=0.0)
    assert crowds.next_at() == 0.1
    assert list(crowds.ready(0.05)) == []
    assert list(crowds.ready(0.11)) == [3]
    assert list(crowds.ready(10.0)) == [4]
    assert crowds.next_at() is None


def test_callers_take_turns() -> None:
    """Of those that wait at one address he goes first whose last turn is longest ago, whoever asked more often."""
    crowds: Crowds[str] = Crowds(rate=1.0, burst=1)
    assert crowds.enter("first", address="a", caller="GREEDY", now=0.0)
    for number in range(4):
        assert not crowds.enter(f"greedy {number}", address="a", caller="GREEDY", now=0.0)
    for number in range(2):
        assert not crowds.enter(f"honest {number}", address="a", caller="HONEST", now=0.0)
    order = list(crowds.ready(1.0))
    assert not crowds.enter("new", address="a", caller="NEW", now=1.0)
    order += [one for second in range(2, 8) for one in crowds.ready(float(second))]
    assert order == ["honest 0", "new", "greedy 0", "honest 1", "greedy 1", "greedy 2", "greedy 3"]


def test_a_turn_that_is_not_used_goes_to_the_next() -> None:
    """Who has gone meanwhile takes nobody's turn."""
    crowds: Crowds[int] = Crowds(rate=1.0, burst=1)
    assert crowds.enter(0, address="a", caller="T", now=0.0)
    assert not any(crowds.enter(number, address="a", caller="T", now=0.0) for number in range(1, 5))
    came = []
    for one in crowds.ready(1.0):
        came.append(one)
        if one < 3:
            crowds.give_back("a")
    assert came == [1, 2, 3]


def test_no_rate() -> None:
    """Without a rate it is everybody's turn."""
    crowds: Crowds[int] = Crowds(rate=0.0, burst=1)
    assert all(crowds.enter(number, address="a", caller="T", now=0.0) for number in range(1000))
    assert crowds.next_at() is None


def test_callers_that_are_remembered_are_bounded() -> None:
    """A thousand names that call from one address are not remembered for ever, and everybody has his turn."""
    crowds: Crowds[int] = Crowds(rate=1.0, burst=1)
    assert crowds.enter(-1, address="a", caller=-1, now=0.0)
    for number in range(1000):
        assert not crowds.enter(number, address="a", caller=number, now=0.0)
    came = [one for second in range(1, 1001) for one in crowds.ready(float(second))]
    assert sorted(came) == list(range(1000))
    assert len(crowds._crowds["a"].by_caller) <= 257


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([b"1", b"2"]), st.floats(0.0, 0.5), st.booleans()), max_size=60))
def test_nobody_is_lost_or_given_twice(steps: list[tuple[str, bytes, float, bool]]) -> None:
    """Everybody goes once, now or later, unless he left; and never more than burst and rate allow."""
    crowds: Crowds[int] = Crowds(rate=5.0, burst=2)
    now, gone, left, waiting = 0.0, [], set(), {}
    for number, (address, title, pause, leaves) in enumerate(steps):
        now += pause
        gone += crowds.ready(now)
        if crowds.enter(number, address=address, caller=title, now=now):
            gone.append(number)
        elif leaves:
            crowds.leave(number, address=address, caller=title)
            left.add(number)
        else:
            waiting[number] = (address, title)
        for which in ("a", "b"):
            assert sum(steps[one][0] == which for one in gone) <= 2 + 5.0 * now + 1e-6
    gone += crowds.ready(now + 100.0)
    for _ in range(len(steps)):
        now += 1000.0
        gone += crowds.ready(now)
    assert sorted(gone) == sorted(set(range(len(steps))) - left)
    assert crowds.next_at() is None
