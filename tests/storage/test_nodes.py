"""The register of nodes: a copied folder is refused while the other lives, whatever the clocks say, and a node is known after a restore."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete

from storage.database import Database
from storage.errors import StorageError, Unavailable
from storage.nodes import NODES, Nodes

NODE = "00000000000000aa"
HERE = {"node_id": NODE, "host": "one", "data_dir": "/data", "version": "1"}
THERE = HERE | {"host": "two"}


class Watched:
    """Stands in for the time that passes while a node is watched: the other does what it does meanwhile."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.waited_s = 0.0
        self.meanwhile = meanwhile

    def __call__(self, seconds: float) -> None:
        """Let the time pass."""
        self.waited_s += seconds
        self.meanwhile()


def test_a_copied_folder_is_refused_while_the_other_lives(database: Database) -> None:
    """The same identity from elsewhere is refused until the first stopped in order, or says nothing while it is watched."""
    other = Nodes(database=database)
    other.enter(**HERE)
    other.enter(**HERE)  # started again in its place
    watched = Watched(lambda: other.seen(**HERE))
    nodes = Nodes(database=database, wait=watched)
    with pytest.raises(Unavailable, match="is a copy of that one"):
        nodes.enter(**THERE)
    watched.meanwhile = lambda: None
    nodes.enter(**THERE)
    assert watched.waited_s <= 60
    with pytest.raises(Unavailable, match="lives on two"):
        Nodes(database=database, wait=lambda _: nodes.seen(**THERE)).enter(**HERE)
    nodes.leave(NODE)
    watched.waited_s = 0
    nodes.enter(**HERE)
    assert watched.waited_s == 0


@pytest.mark.parametrize("off", [timedelta(days=3650), timedelta(days=-3650)], ids=["ahead", "behind"])
def test_no_clock_decides_whether_a_node_lives(database: Database, off: timedelta) -> None:
    """The other was seen in ten years, or ten years ago: while it goes on it is alive, and silent it may be moved."""
    clock = database.clock
    other = Nodes(database=database)
    database.clock = lambda: datetime.now(UTC) + off
    other.enter(**HERE)
    database.clock = clock

    def lives() -> None:
        database.clock = lambda: datetime.now(UTC) + off
        other.seen(**HERE)
        database.clock = clock

    with pytest.raises(Unavailable):
        Nodes(database=database, wait=lambda _: lives()).enter(**THERE)
    silent = Nodes(database=database, wait=lambda _: None)
    assert [node.node_id for node in silent.living()] == []
    if off > timedelta():
        assert [node.node_id for node in Nodes(database=database, wait=lambda _: lives()).living()] == [NODE]
        with pytest.raises(Unavailable, match="says that it lives"):
            Nodes(database=database, wait=lambda _: lives()).give_up(NODE, actor="operator")
    silent.enter(**THERE)
    assert [(node.host, node.seen_at <= datetime.now(UTC)) for node in silent.all()] == [("two", True)]


def test_a_node_is_given_up_only_when_it_is_silent(database: Database) -> None:
    """Seen in the last minutes it is not; later, or stopped in order, it is, once; coming back, it is itself again."""
    now = [datetime(2026, 11, 21, tzinfo=UTC)]
    database.clock = lambda: now[0]
    nodes = Nodes(database=database, wait=lambda _: None)
    with pytest.raises(StorageError, match="no node"):
        nodes.give_up(NODE, actor="operator")
    nodes.enter(**HERE)
    now[0] += timedelta(minutes=4)
    with pytest.raises(Unavailable, match="was seen 240 seconds ago"):
        nodes.give_up(NODE, actor="operator")
    now[0] += timedelta(minutes=2)
    for _ in range(2):
        nodes.give_up(NODE, actor="operator")
    assert [node.state for node in nodes.all()] == ["lost"]
    nodes.leave(NODE)
    assert [node.state for node in nodes.all()] == ["lost"]
    nodes.seen(**HERE)
    assert [node.state for node in nodes.all()] == ["seen"]
    nodes.leave(NODE)
    assert [node.state for node in nodes.all()] == ["stopped"]
    nodes.give_up(NODE, actor="operator")
    nodes.enter(**THERE)
    assert [(node.state, node.host) for node in nodes.all()] == [("seen", "two")]


def test_a_living_node_is_known_in_a_restored_database(database: Database) -> None:
    """The database was put back from before the node came: its next sign of life registers it."""
    nodes = Nodes(database=database)
    nodes.enter(**HERE)
    database.write(lambda connection: connection.execute(delete(NODES)))
    nodes.seen(**HERE)
    (node,) = nodes.all()
    assert (node.node_id, node.host) == (NODE, "one")
