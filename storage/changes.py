"""The change feed: what happened to instances, in one order, with a cursor. The audit trail seen through a filter."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, Table, Text

from storage.database import METADATA

SUBSCRIBERS = Table(
    "subscribers",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("cursor", BigInteger, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
)
