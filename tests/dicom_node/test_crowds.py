"""Token buckets of addresses: how many go on in a time, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dicom_node.dimse.crowds import Crowds


def test_a_burst_then_the_rate() -> None:
    """After a pause the burst goes at once, then so many a second; another address has its own."""
    crowds: Crowds[int] = Crowds(rate=10.0, burst=3)
    assert [crowds.enter(number, address="a", title=b"T", now=0.0) for number in range(5)] == [True] * 3 + [False] * 2
    assert crowds.enter(9, address="b", title=b"T", now=0.0)
    assert crowds.next_at() == 0.1
    assert list(crowds.ready(0.05)) == []
    assert list(crowds.ready(0.11)) == [3]
    assert list(crowds.ready(10.0)) == [4]
    assert crowds.next_at() is None


def test_titles_take_turns() -> None:
    """Of those that wait at one address the AE titles come in turn, whoever asked more often."""
    crowds: Crowds[str] = Crowds(rate=1.0, burst=1)
    assert crowds.enter("first", address="a", title=b"GREEDY", now=0.0)
    for number in range(4):
        assert not crowds.enter(f"greedy {number}", address="a", title=b"GREEDY", now=0.0)
    assert not crowds.enter("honest", address="a", title=b"HONEST", now=0.0)
    order = [one for second in range(1, 6) for one in crowds.ready(float(second))]
    assert order == ["greedy 0", "honest", "greedy 1", "greedy 2", "greedy 3"]


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([b"1", b"2"]), st.floats(0.0, 0.5), st.booleans()), max_size=60))
def test_nobody_is_lost_or_given_twice(steps: list[tuple[str, bytes, float, bool]]) -> None:
    """Everybody goes once, now or later, unless he left; and never more than burst and rate allow."""
    crowds: Crowds[int] = Crowds(rate=5.0, burst=2)
    now, gone, left, waiting = 0.0, [], set(), {}
    for number, (address, title, pause, leaves) in enumerate(steps):
        now += pause
        gone += crowds.ready(now)
        if crowds.enter(number, address=address, title=title, now=now):
            gone.append(number)
        elif leaves:
            crowds.leave(number, address=address, title=title)
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
