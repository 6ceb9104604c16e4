"""Peers that were added while the node runs, beside those of the configuration."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Table, Text

from storage.database import METADATA

KNOWN_PEERS = Table(
    "peers",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("settings", Text, nullable=False),
    Column("added_at", BigInteger, nullable=False),
    Column("added_by", Text, nullable=False),
)
