"""The soak counts what was done and says what broke."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.faults import soak
from tests.faults.soak import Piece, Soak, pieces_of
from tests.faults.tally import heard


def test_what_was_asked_for_is_done_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Schedules and kill points run until the counts are reached; the last line says how much it was, with its seeds."""
    done = Soak({"kills": 12}, seed=3, report=print).run(processes=2)
    assert done.counts["kills"] >= 12
    assert done.counts["acknowledged"] > 0
    assert (done.counts["broken"], done.broken) == (0, [])
    assert "kept: python -m tests.faults.walk --store directory --points 8 --seed 3" in capsys.readouterr().out


def test_broken_promises_are_counted_and_shown() -> None:
    """A piece that broke a promise, or did not come to its end, counts as broken; its command and all it said are shown."""
    told: list[str] = []
    one = Soak({"schedules": 100}, seed=1, report=told.append)
    piece = Piece("schedules", ("tests.faults.schedules", "--runs", "100", "--seed", "1"), 100)
    one.take(piece, 1, 'seed 44:\n  P1 2.25.1: lost\ntally {"schedules": 100, "broken": 2}\n')
    one.take(piece, -9, "killed")
    assert (one.done.counts["schedules"], one.done.counts["broken"]) == (100, 3)
    assert one.done.broken == [str(piece)] * 2
    assert "P1 2.25.1: lost" in "".join(told)
    assert "3 broken promises" in one.done.line()


def test_each_piece_has_seeds_of_its_own() -> None:
    """No two pieces of a part are the same command, however long the soak is; schedules follow each other without a gap."""
    for part in soak.PARTS:
        some = [str(piece) for piece in islice(pieces_of(part, 7), 200)]
        assert len(set(some)) == 200
    assert [piece.arguments[-1] for piece in islice(pieces_of("schedules", 7), 3)] == ["7", "107", "207"]


def test_asked_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a count and a time it says what to give."""
    with pytest.raises(SystemExit):
        soak.main([])
    assert "say how much" in capsys.readouterr().err
    assert heard("no tally") == {}
