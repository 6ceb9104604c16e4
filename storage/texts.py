"""Texts that are searched with wildcards: each once, and the runs of three characters that it holds.

No index in the order of texts helps to find ``*son^Anna``. So every name and every description that any patient or study has is kept once
(`TEXTS`), and for each of its trigrams a row says so (`TRIGRAMS`). A pattern's trigrams lead to the few texts that may match, these to the
rows. It is written when a study has a text that none had before, which is seldom, and taken back when the last row with it is erased.

This only ever narrows what is looked at, and the search's own condition decides. A pattern without three characters in a row, or one that
matches too much for it to pay, is answered as without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Column, bindparam, delete, exists, func, insert, or_, select

from storage.matching import pattern
from storage.prepared import Prepared
from storage.tables import PATIENTS, STUDIES, TEXTS, TRIGRAMS

if TYPE_CHECKING:
    from sqlalchemy import Connection

_LENGTH: Final = 3
_ASKED: Final = 12
"""Trigrams of a pattern that are looked at."""
_JOINED: Final = 3
"""Rarest trigrams that a text must have, before it is looked at."""
_COMMON: Final = (1000, 20_000)
"""How many texts with a trigram are counted at most, at first and if all of a pattern's have so many; with more it does not pay."""
_PLACES: Final = [f"trigram_{place}" for place in range(_ASKED)]
_MOST: Final = 500
"""Texts, and rows with them, that a search is narrowed to."""

_NAMES: Final = tuple(
    table.c[f"patient_name_{group}"] for table in (STUDIES, PATIENTS) for group in ("alphabetic", "ideographic", "phonetic")
)
_COLUMNS: Final = (*_NAMES, STUDIES.c.study_description)
"""All that have their texts here; each has an index."""
_COLUMN_NAMES: Final = {table.name: [column.name for column in _COLUMNS if column.table is table] for table in (STUDIES, PATIENTS)}
KEYWORDS: Final = ("PatientName", "StudyDescription")
"""Attributes whose texts these are."""

_FIND_TEXT = Prepared(select(TEXTS.c.id).where(TEXTS.c.value == bindparam("value_")))
_ADD_TEXT = Prepared(insert(TEXTS).returning(TEXTS.c.id), columns=("value",))
_ADD_TRIGRAMS = insert(TRIGRAMS).inline()
_IN_USE = tuple(Prepared(select(column.table.c.id).where(column == bindparam("value_")).limit(1)) for column in _COLUMNS)
_DELETE_TEXT = Prepared(delete(TEXTS).where(TEXTS.c.id == bindparam("ref")))
_DELETE_TRIGRAM = delete(TRIGRAMS).where(TRIGRAMS.c.trigram == bindparam("trigram_"), TRIGRAMS.c.text_ref == bindparam("ref"))


def _counts(most: int) -> Prepared:
    """Count the texts that have each of some trigrams, in one statement."""
    found = [select(TRIGRAMS.c.text_ref).where(TRIGRAMS.c.trigram == bindparam(name)).limit(most).subquery() for name in _PLACES]
    return Prepared(
        select(
            *(select(func.count()).select_from(one).scalar_subquery().label(name) for name, one in zip(_PLACES, found, strict=True)),
        )
    )


def _texts(number: int) -> Prepared:
    """Select the texts that have all of some trigrams and are like a pattern, one more than are of use."""
    first, *others = [TRIGRAMS.alias(name) for name in _PLACES[:number]]
    conditions = [
        first.c.trigram == bindparam(first.name),
        *(exists().where(one.c.trigram == bindparam(one.name), one.c.text_ref == first.c.text_ref) for one in others),
        TEXTS.c.id == first.c.text_ref,
        TEXTS.c.value.like(bindparam("like"), escape="!"),
    ]
    return Prepared(select(TEXTS.c.value).where(*conditions).limit(_MOST + 1))


_COUNTS: Final = tuple((most, _counts(most)) for most in _COMMON)
_LIKE: Final = {number: _texts(number) for number in range(1, _JOINED + 1)}


def trigrams(text: str) -> list[str]:
    """Return the runs of three characters in a text, each once, in order."""
    return sorted({text[start : start + _LENGTH] for start in range(len(text) - _LENGTH + 1)})


# -- writing ---------------------------------------------------------------------------------------------------------------------------


def note_in(connection: Connection, row: Mapping[str, Any]) -> None:
    """Note the texts of a new row of the studies, if they are new."""
    for text in dict.fromkeys(row[name] for name in _COLUMN_NAMES[STUDIES.name]):
        found = trigrams(text)
        if found and _FIND_TEXT.scalar(connection, {"value_": text}) is None:
            ref = _ADD_TEXT.scalar(connection, {"value": text})
            connection.execute(_ADD_TRIGRAMS, [{"trigram": trigram, "text_ref": ref} for trigram in found])


def texts_in(connection: Connection, *, studies: Sequence[int], patients: Sequence[int]) -> set[str]:
    """Return the texts of rows, to be asked before they are removed."""
    found: set[str] = set()
    for table, ids in ((STUDIES, studies), (PATIENTS, patients)):
        columns = [table.c[name] for name in _COLUMN_NAMES[table.name]]
        found.update(text for row in connection.execute(select(*columns).where(table.c.id.in_(ids))) for text in row)
    return found


def forget_unused_in(connection: Connection, texts: Iterable[str]) -> None:
    """Remove those of the texts that no row has any more."""
    for text in sorted(texts):
        ref = _FIND_TEXT.scalar(connection, {"value_": text})
        if ref is not None and all(statement.scalar(connection, {"value_": text}) is None for statement in _IN_USE):
            connection.execute(_DELETE_TRIGRAM, [{"trigram_": trigram, "ref": ref} for trigram in trigrams(text)])
            _DELETE_TEXT.run(connection, {"ref": ref})


# -- searching -------------------------------------------------------------------------------------------------------------------------


def ids_like(connection: Connection, columns: Sequence[Column[Any]], wanted: str) -> list[int] | None:
    """Return the ids of all rows that have a text like `wanted` (with ``*`` and ``?``) in one of the columns, all of one table.

    Returns
    -------
    list of int or None
        None when this index is no help: no three characters in a row, or too much matches.
    """
    rarest = _rarest(connection, wanted)
    if rarest is None:
        return None
    named = dict(zip(_PLACES, rarest, strict=False))
    values = [row.value for row in _LIKE[len(rarest)].all(connection, {**named, "like": pattern(wanted)})]
    if len(values) > _MOST:
        return None
    if not values:
        return []
    ids = select(columns[0].table.c.id).where(or_(*(column.in_(values) for column in columns))).limit(_MOST + 1)
    found = connection.scalars(ids).all()
    return None if len(found) > _MOST else list(found)


def _rarest(connection: Connection, wanted: str) -> list[str] | None:
    """Return the trigrams of a pattern that the fewest texts have, rarest first; None when there is none that is rare enough."""
    asked = sorted({trigram for run in re.split(r"[*?]+", wanted) for trigram in trigrams(run)})
    asked = asked[:: -(-len(asked) // _ASKED) or 1]
    if not asked:
        return None
    named = dict(zip(_PLACES, [*asked, *[""] * (_ASKED - len(asked))], strict=True))
    for most, statement in _COUNTS:
        counted = sorted(zip(statement.first(connection, named), asked, strict=False))
        if counted[0][0] < most:
            return [trigram for _, trigram in counted[:_JOINED]]
    return None
