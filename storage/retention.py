"""Retention: studies are erased when nothing of them came for long enough, unless they are under legal hold.

That is a judgement about time, and a clock that is wrong by years would condemn everything. So the clock is compared with the time of the
last round (at the first: of the newest audit record). Where both are too far from each other nothing is erased, until the clock is right
again or an operator says that it is. The first round erases nothing in any case: that audit record may be of the same wrong clock, and
whoever looks after the node has a day to see it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, exists, func, select

from storage.audit import AUDIT, AuditTrail
from storage.database import from_micros, to_micros, utc_now
from storage.errors import StorageError, Unavailable
from storage.holds import HOLDS
from storage.records import AuditEvent
from storage.tables import INSTANCE_JOIN, INSTANCES, STUDIES

if TYPE_CHECKING:
    from storage.database import Database
    from storage.erasure import Erasure

BELIEVED = timedelta(days=7)
"""How far the clock may be from the time of the last round, which comes daily. Longer than a node is off over holidays; and should a clock
be wrong by less, studies go so much too early, of a retention that is counted in years."""
_NEWEST_RECORD = select(AUDIT.c.at).order_by(AUDIT.c.seq.desc()).limit(1)
_PAGE = 500
_STUDY = 1 << 20
_NEWEST = func.max(INSTANCES.c.received_at).label("newest")
_STUDIES = (
    select(STUDIES.c.id, STUDIES.c.study_instance_uid, _NEWEST, func.count().label("instances"))
    .select_from(INSTANCE_JOIN)
    .where(STUDIES.c.id > bindparam("after"), STUDIES.c.id <= bindparam("last"))
    .where(~exists().where(HOLDS.c.study_instance_uid == STUDIES.c.study_instance_uid))
    .group_by(STUDIES.c.id, STUDIES.c.study_instance_uid)
    .having(bindparam("before") > _NEWEST)
    .order_by(STUDIES.c.id)
)
_IDS = select(STUDIES.c.id).where(STUDIES.c.id > bindparam("after")).order_by(STUDIES.c.id).limit(_PAGE)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DueStudy:
    """A study whose time is over."""

    study_instance_uid: str
    newest_at: datetime
    """When the last of its instances came (reports made here are instances too)."""
    instances: int


class Retention:
    """Lists and erases what is due.

    Parameters
    ----------
    database, erasure
        The parts it ties together.
    days
        A study is due when its newest instance came longer ago; 0: never.
    clock
        Time of day. Ask `doubt` before it is believed.
    """

    def __init__(self, *, database: Database, erasure: Erasure, days: float, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._erasure = erasure
        self._days = days
        self._clock = clock

    def noted(self, noted: str) -> str:
        """Return the time that the clock is compared with: what was noted, at first the newest audit record; empty: nothing was before.

        To be kept before anything is recorded: records of a wrong clock must not vouch for it.
        """
        if noted:
            return noted
        with self._database.read() as connection:
            at = connection.scalar(_NEWEST_RECORD)
        return "" if at is None else from_micros(at).isoformat()

    def doubt(self, noted: str) -> str:
        """Return why the clock is not believed, given what was noted; empty when it is."""
        now = self._clock()
        last = datetime.fromisoformat(noted) if noted else now
        if abs(now - last) <= BELIEVED:
            return ""
        return (
            f"the clock says {now:%Y-%m-%d %H:%M} UTC, {abs(now - last).days} days {'after' if now > last else 'before'} the last "
            "time it was believed: nothing is erased. Set it right; if it is, say so: `dicom-node retention --confirm-clock`"
        )

    def believed(self, noted: str) -> str:
        """Return what is to be noted of a clock that is believed; it never goes back."""
        now = self._clock().isoformat()
        return max(now, noted, key=datetime.fromisoformat) if noted else now

    def note_doubt(self, doubt: str) -> None:
        """Record in the audit trail that nothing was erased, and why."""
        AuditTrail(database=self._database).record(AuditEvent(action="retention.held", outcome=doubt, actor="retention"))

    def confirm_clock(self, *, actor: str) -> str:
        """Record that an operator says that the clock is right; return what is to be noted of it."""
        now = self._clock().isoformat()
        event = AuditEvent(action="retention.clock_confirmed", outcome="success", actor=actor, detail={"clock": now})
        AuditTrail(database=self._database).record(event)
        return now

    def due(self) -> Iterator[DueStudy]:
        """Give what is due now, oldest filed first; changes nothing. Studies under hold are never due."""
        if self._days > 0:
            yield from self._before(self._clock() - timedelta(days=self._days))

    def erase_due(self, *, pace: Callable[[int], object] = lambda _: None) -> int:
        """Erase what is due, one study after the other, each with its audit record; return how many.

        Parameters
        ----------
        pace
            Called after each study with a megabyte, so that they go no faster than so many a second; may raise to stop.

        Raises
        ------
        Unavailable
            The database; what was erased stays so.
        """
        if self._days <= 0:
            return 0
        before = self._clock() - timedelta(days=self._days)
        count = 0
        for study in self._before(before):
            try:
                reason = f"retention: nothing came for {self._days:g} days"
                self._erasure.erase_study(study.study_instance_uid, actor="retention", reason=reason, received_before=before)
                count += 1
            except Unavailable:
                raise
            except StorageError as error:  # erased, put under hold, or more of it came, since it was listed
                _log.info("retention.passed_over", extra={"reason": str(error)})
            pace(_STUDY)
        return count

    def _before(self, before: datetime) -> Iterator[DueStudy]:
        after = 0
        while True:
            with self._database.read() as connection:
                ids = list(connection.scalars(_IDS, {"after": after}))
                if not ids:
                    return
                rows = connection.execute(_STUDIES, {"after": after, "last": ids[-1], "before": to_micros(before)}).all()
            after = ids[-1]
            for row in rows:
                yield DueStudy(row.study_instance_uid, from_micros(row.newest), row.instances)
