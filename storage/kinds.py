"""Which kinds of instances came last: SOP class and transfer syntax; what a peer that retrieves should be able to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from storage.tables import INSTANCES

if TYPE_CHECKING:
    from storage.database import Database


def newest_kinds(database: Database, count: int = 1000) -> list[tuple[str, str]]:
    """Return SOP class and transfer syntax of the `count` instances that came last, each pair once, in order.

    Raises
    ------
    Unavailable, IntegrityError
        As ``Database.read``.
    """
    newest = select(INSTANCES.c.sop_class_uid, INSTANCES.c.transfer_syntax_uid).order_by(INSTANCES.c.id.desc()).limit(count).subquery()
    statement = select(newest.c.sop_class_uid, newest.c.transfer_syntax_uid).distinct()
    with database.read() as connection:
        return sorted((row.sop_class_uid, row.transfer_syntax_uid) for row in connection.execute(statement))
