"""The refusal diary: who was refused what, when, why, and what helps; bounded, one row for what repeats."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Table, Text

from storage.database import METADATA

REFUSALS = Table(
    "refusals",
    METADATA,
    Column("digest", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("peer", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("calling_ae_title", Text, nullable=False),
    Column("called_ae_title", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("remedy", Text, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("first_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
)
Index("ix_refusals_last_at", REFUSALS.c.last_at)
