"""Storage commitments: those that peers ask of us, and those that we ask of the peers that got our reports (PS3.4 Annex J)."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, Table, Text

from storage.database import METADATA

COMMITMENTS = Table(
    "commitments",
    METADATA,
    Column("digest", Text, primary_key=True),  # of Transaction UID, peer and direction
    Column("transaction_uid", Text, nullable=False),
    Column("peer", Text, nullable=False),
    Column("asked_here", Integer, nullable=False),  # 1: a peer asked us; 0: we asked it
    Column("instances", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("asked_at", BigInteger, nullable=False),
    Column("due_at", BigInteger, nullable=False),
)
