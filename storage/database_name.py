"""What a database is called, for people: the file, or the name and server, and never a password."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection


def name_of(connection: Connection) -> str:
    """Return ``the database file /path/index.db`` or ``the database 'derm' of db.example``."""
    if connection.dialect.name == "postgresql":
        driver: Any = connection.connection.driver_connection
        return f"the database {driver.info.dbname!r} of {driver.info.host or 'this machine'}"
    file = next((row.file for row in connection.exec_driver_sql("PRAGMA database_list") if row.name == "main"), "")
    return f"the database file {file}"
