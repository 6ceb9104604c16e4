"""The register of nodes: a copied folder is refused while the other lives, and a living node is known even after a restore."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete

from storage.database import Database
from storage.errors import Unavailable
from storage.nodes import NODES, Nodes

HERE = {"node_id": "00000000000000aa", "host": "one", "data_dir": "/data", "version": "1"}


def test_a_copied_folder_is_refused_while_the_other_lives(database: Database) -> None:
    """The same identity from elsewhere is refused until the first stopped, or has said nothing for a minute."""
    now = [datetime(2026, 11, 21, tzinfo=UTC)]
    database.clock = lambda: now[0]
    nodes = Nodes(database=database)
    nodes.enter(**HERE)
    nodes.enter(**HERE)  # started again in its place
    with pytest.raises(Unavailable, match="is a copy of that one"):
        nodes.enter(**HERE | {"host": "two"})
    now[0] += timedelta(seconds=61)
    nodes.enter(**HERE | {"host": "two"})
    with pytest.raises(Unavailable):
        nodes.enter(**HERE)
    nodes.leave(HERE["node_id"])
    nodes.enter(**HERE)


def test_a_living_node_is_known_in_a_restored_database(database: Database) -> None:
    """The database was put back from before the node came: its next sign of life registers it."""
    nodes = Nodes(database=database)
    nodes.enter(**HERE)
    database.write(lambda connection: connection.execute(delete(NODES)))
    nodes.seen(**HERE)
    (node,) = nodes.all()
    assert (node.node_id, node.host) == (HERE["node_id"], "one")
