"""Statements of the hot path: built by SQLAlchemy like all others, compiled once, run by the driver itself.

SQLAlchemy's way from a statement to the driver costs some 60 µs a statement, more than SQLite's own work, and an instance on its way in
needs nine of them. What is left out here are its events, result objects and type conversions; a statement that needs a conversion is
refused when it is first used. Errors are SQLAlchemy's, as if it had run the statement.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import sqlalchemy.exc
from sqlalchemy import Executable

from storage.database import storable

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect


@dataclass(frozen=True, slots=True)
class _Made:
    """A statement as one driver takes it."""

    text: str
    constants: Mapping[str, Any]
    """Values that the statement itself holds."""
    ordered: Callable[[Mapping[str, Any]], tuple[Any, ...]] | None
    """Puts the values into their order, for a driver that counts them; None for one that takes them by name."""
    error: type[BaseException]
    dialect: Dialect


class Prepared:
    """A statement with bound parameters, to be run many times.

    Parameters
    ----------
    statement
        Without conversions of values or results, and without ``IN`` over a list: integers and text as they are.
    columns
        Of an insert: the columns that get values; None for all of the table.
    """

    def __init__(self, statement: Executable, *, columns: Iterable[str] | None = None) -> None:
        self._statement: Any = statement
        self._columns = None if columns is None else list(columns)
        self._made: dict[str, _Made] = {}  # by the engine's name; the same whoever makes it
        given = getattr(statement, "selected_columns", None)
        names = [column.key for column in (getattr(statement, "_returning", ()) if given is None else given)]
        row: Any = namedtuple("Row", names)  # type: ignore[misc] # noqa: PYI024 - names are known at run time only
        self._row: Callable[[Sequence[Any]], Any] | None = row._make if names else None

    def run(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Run in the transaction of `connection` and return the driver's cursor.

        Raises
        ------
        sqlalchemy.exc.DBAPIError
            As `Connection.execute` does.
        """
        dialect = connection.dialect
        made = self._made.get(dialect.name)
        if made is None:
            made = self._made.setdefault(dialect.name, _made(self._statement, self._columns, dialect))
        if made.constants:
            values = {**made.constants, **values}
        for value in values.values():
            if type(value) is str and "\0" in value:  # the same on both engines; one of them refuses NUL
                values = {name: storable(one) if isinstance(one, str) else one for name, one in values.items()}
                break
        driver: Any = connection.connection.dbapi_connection  # the driver's own with both drivers
        try:
            return driver.execute(made.text, values if made.ordered is None else made.ordered(values))
        except made.error as error:
            base: Any = made.error
            # without the values, which may be a patient's
            raise sqlalchemy.exc.DBAPIError.instance(made.text, None, error, base, hide_parameters=True, dialect=made.dialect) from error

    def first(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Run, and return the first row with its columns as attributes, None when there is none."""
        if self._row is None:
            raise TypeError("this statement gives no rows")
        cursor = self.run(connection, values)
        found = cursor.fetchone()
        cursor.close()  # a statement that is not read to its end would keep a savepoint from being released
        return None if found is None else self._row(found)

    def all(self, connection: Connection, values: Mapping[str, Any]) -> list[Any]:
        """Run, and return all rows, as :meth:`first`."""
        if self._row is None:
            raise TypeError("this statement gives no rows")
        return [self._row(found) for found in self.run(connection, values).fetchall()]

    def scalar(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Run, and return the first column of the first row, None when there is none."""
        cursor = self.run(connection, values)
        found = cursor.fetchone()
        cursor.close()
        return None if found is None else found[0]


def _made(statement: Any, columns: list[str] | None, dialect: Dialect) -> _Made:
    """Compile for an engine; TypeError for what SQLAlchemy would have to convert."""
    compiled: Any = statement.compile(dialect=dialect, column_keys=columns)
    if compiled.post_compile_params or compiled.literal_execute_params:
        raise TypeError("a statement that is written anew for each use is not prepared")
    constants = {}
    for bind, name in compiled.bind_names.items():
        if bind.type.dialect_impl(dialect).bind_processor(dialect) is not None:
            raise TypeError(f"the value {name} of a prepared statement would have to be converted")
        if not bind.required:
            constants[name] = bind.effective_value
    ordered = None
    if compiled.positional:
        names = compiled.positiontup or ()
        getter = itemgetter(*names) if names else None
        ordered = (lambda _: ()) if getter is None else getter if len(names) > 1 else lambda values, get=getter: (get(values),)
    error = getattr(dialect.dbapi, "Error", Exception)
    return _Made(str(compiled), constants, ordered, error, dialect)
