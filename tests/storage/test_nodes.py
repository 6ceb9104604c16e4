"""The register of nodes: a copied folder is refused while the other lives, whatever the clocks say, and a node is known after a restore."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, update

from storage.database import Database
from storage.errors import StorageError, Unavailable
from storage.nodes import NODES, Incarnation, Nodes, Replaced, clock_words

NODE = "00000000000000aa"
FIRST, SECOND = Incarnation("first"), Incarnation("second", earlier=frozenset({"first"}))
HERE = {"node_id": NODE, "incarnation": FIRST, "host": "one", "data_dir": "/data", "version": "1"}
THERE = HERE | {"incarnation": SECOND, "host": "two"}
CLONED = HERE | {"incarnation": SECOND}
AGAIN = HERE | {"incarnation": Incarnation("second", earlier=frozenset({"first"}), ended=frozenset({"first"}))}


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
    nodes.leave(NODE, SECOND)
    watched.waited_s = 0
    nodes.enter(**HERE)
    assert watched.waited_s == 0


def test_a_clone_is_told_from_the_node_by_its_incarnation_alone(database: Database) -> None:
    """Host and path are equal, as on a cloned machine: the clone is refused while the node lives, and watched before it is let in."""
    nodes = Nodes(database=database)
    nodes.enter(**HERE)
    watched = Watched(lambda: nodes.seen(**HERE))
    with pytest.raises(Unavailable, match="is a copy of that one"):
        Nodes(database=database, wait=watched).enter(**CLONED)
    assert watched.waited_s
    # one process more of the node, whatever its container is called, and the node that was killed in this folder, are let in at once
    at_once = Nodes(database=database, wait=lambda _: pytest.fail("it is watched"))
    at_once.enter(**HERE | {"host": "two"})
    at_once.enter(**AGAIN | {"host": "three"})


def test_roles_that_start_at_once_wait_for_the_same(database: Database) -> None:
    """Two processes of one incarnation watch the one before; the first to enter is no reason to refuse the second."""
    nodes = Nodes(database=database)
    nodes.enter(**HERE)
    entering = Nodes(database=database, wait=lambda _: None)
    Nodes(database=database, wait=lambda _: entering.enter(**CLONED)).enter(**CLONED | {"host": "two"})
    assert [node.host for node in nodes.all()] == ["two"]


def test_who_was_replaced_is_told_and_changes_nothing(database: Database) -> None:
    """A clone came in while the node was silent: the node hears of it at its next sign of life, and does not sign off the clone."""
    nodes = Nodes(database=database, wait=lambda _: None)
    nodes.enter(**HERE)
    nodes.enter(**CLONED)
    with pytest.raises(Replaced, match="copy of the other"):
        nodes.seen(**HERE)
    nodes.leave(NODE, FIRST)
    assert [node.state for node in nodes.all()] == ["seen"]
    nodes.seen(**CLONED)


def test_a_database_put_back_to_an_earlier_incarnation_ends_nobody(database: Database) -> None:
    """What is in the row was this node before: its next sign of life takes its place."""
    nodes = Nodes(database=database, wait=lambda _: None)
    nodes.enter(**HERE)
    nodes.seen(**CLONED)
    with pytest.raises(Replaced):
        nodes.seen(**HERE)


def test_a_database_of_its_own_is_never_watched(database: Database) -> None:
    """It lies in the data folder: whoever holds the folder's lock is the node."""
    nodes = Nodes(database=database, shared=False, wait=lambda _: pytest.fail("it is watched"))
    nodes.enter(**HERE)
    nodes.enter(**THERE)
    nodes.seen(**HERE)


def test_what_an_older_version_registered_goes_by_host_and_path(database: Database) -> None:
    """It was killed and the program changed: it is let in at once in its place, and watched elsewhere."""
    nodes = Nodes(database=database)
    nodes.enter(**HERE)
    database.write(lambda connection: connection.execute(update(NODES).values(incarnation=None)))
    with pytest.raises(Unavailable):
        Nodes(database=database, wait=lambda _: nodes.seen(**HERE)).enter(**THERE)
    database.write(lambda connection: connection.execute(update(NODES).values(incarnation=None)))
    nodes.enter(**CLONED)


def test_how_far_a_clock_is_off_is_kept(database: Database, engine: str) -> None:
    """Each sign of life compares it with the database server's, and returns what it found; SQLite has no clock of its own."""
    nodes = Nodes(database=database)
    nodes.enter(**HERE)
    for hours in (1, -1, 0):
        database.clock = lambda hours=hours: datetime.now(UTC) + timedelta(hours=hours)
        ahead = nodes.seen(**HERE)
        (node,) = nodes.all()
        assert node.clock_ahead == ahead
        # the server runs on this machine; time went by between our asking and its answer
        expected = timedelta(hours=hours if engine == "postgresql" else 0)
        assert abs(expected) - timedelta(minutes=5) < abs(ahead) <= abs(expected)
        assert (ahead < timedelta()) == (expected < timedelta())
    assert "59.0 s behind the database server's" in clock_words(timedelta(seconds=-59))


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
    nodes.leave(NODE, FIRST)
    assert [node.state for node in nodes.all()] == ["lost"]
    nodes.seen(**HERE)
    assert [node.state for node in nodes.all()] == ["seen"]
    nodes.leave(NODE, FIRST)
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
