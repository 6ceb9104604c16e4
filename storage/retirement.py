"""Retiring a wrapping key: out of the ring once nothing that can be reached needs it.

A rotation re-wraps the rows of study keys, and their documents with them. A document without a row (of an orphan: the database is older
than the bucket, or an admission died before its commit) it does not see, and without the key what that opens would be unreadable. Nor
does it see that an older document came late, and lies in place of the newer one that the row vouches for. So all documents are looked
through before a key goes; what needs it is re-wrapped, or put anew as its row has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from storage.erasure import erased_keys
from storage.errors import InstanceNotFound, IntegrityError, KeyNotHere
from storage.study_keys import document_name

if TYPE_CHECKING:
    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.keys import Ring
    from storage.objects import ObjectStore
    from storage.study_keys import StudyKeys

_PAGE: Final = 500
_AT_ONCE: Final = 8
_log = logging.getLogger(__name__)


class Retirement:
    """Takes wrapping keys out of the ring.

    Parameters
    ----------
    database, study_keys, ring, audit
        The parts it ties together.
    store, spool
        Where documents of keys lie: the archive's, and that of this node if it has one. What other nodes have in theirs is in the store
        too once a rotation is over.
    """

    def __init__(
        self,
        *,
        database: Database,
        study_keys: StudyKeys,
        ring: Ring,
        audit: AuditTrail,
        store: ObjectStore,
        spool: ObjectStore | None = None,
    ) -> None:
        self._database = database
        self._study_keys = study_keys
        self._ring = ring
        self._audit = audit
        self._store = store
        self._spool = spool

    def retire(self, wrapping_key_id: str, *, progress: Callable[[int, int | None], object] = lambda _, __: None) -> int:
        """Re-wrap the documents that need the key, then take it out of the ring.

        Parameters
        ----------
        progress
            Called with the number of documents looked through, and None.

        Returns
        -------
        int
            How many documents were re-wrapped.

        Raises
        ------
        Unavailable
            A study key in the table is wrapped by it: rotate first. Or as `StudyKeys.retire`; or store or key service cannot be used now.
        KeyNotHere
            Study keys are wrapped by another key, which this ring lacks: were it copied to where that key is, nothing would open them.
        """
        if lacking := sorted(key_id for key_id in self._study_keys.counts() if not self._ring.holds(key_id)):
            raise KeyNotHere(
                f"the key ring {self._ring.path} lacks keys that study keys are wrapped by ({', '.join(lacking)}): it is not the newest of "
                "the nodes that share this database; copy the ring that has them here first, or, where each has what the other lacks, "
                "`dicom-node keys merge FILE`, and copy this one to all"
            )
        done = 0
        if wrapping_key_id != self._ring.primary_key_id and self._ring.holds(wrapping_key_id) and self._study_keys.unused(wrapping_key_id):
            store = self._store
            self._study_keys.publish_all(put_document=store.put_document, delete_document=store.delete_document)
            done = sum(self._re_wrap_all(one, wrapping_key_id, progress) for one in (store, self._spool) if one is not None)
        self._study_keys.retire(wrapping_key_id)
        return done

    def _re_wrap_all(self, store: ObjectStore, wrapping_key_id: str, progress: Callable[[int, int | None], object]) -> int:
        seen = done = 0
        names = store.list_documents("keys/")
        with ThreadPoolExecutor(_AT_ONCE if store.remote else 1, "retire") as pool:
            while page := [name.rpartition("/")[2] for name in islice(names, _PAGE)]:
                # what a spool has beside a row is in the store too
                looked = page if store is self._store else sorted(set(page) - self._study_keys.known(page))
                done += sum(pool.map(partial(self._re_wrap, store, wrapping_key_id), looked))
                seen += len(page)
                progress(seen, None)
        return done

    def _re_wrap(self, store: ObjectStore, wrapping_key_id: str, study_key_id: str) -> bool:
        name = document_name(study_key_id)
        try:
            content = store.get_document(name)
            if not _names(content, wrapping_key_id):
                return False
            key = self._study_keys.from_document(content)
        except InstanceNotFound:
            return False
        except IntegrityError as error:  # the key that goes does not open it either
            _log.error("study_key.document_unreadable", extra={"study_key_id": study_key_id, "reason": str(error)})
            return False
        if self._study_keys.known([study_key_id]):
            try:
                self._study_keys.republish(study_key_id, put_document=self._store.put_document, delete_document=self._store.delete_document)
            except IntegrityError as error:  # erased meanwhile; or the row is damaged, and this document is what there is of the key
                _log.error("study_key.unpublished", extra={"study_key_id": study_key_id, "reason": str(error)})
            else:
                return True
        if self._was_erased(key.study_instance_uid, study_key_id):
            store.delete_document(name)  # a death kept the erasure from it; under a key that goes it would be nobody's for ever
            return False
        by, wrapped = self._ring.wrap(key.secret, key.id)
        store.put_document(name, self._study_keys.document(replace(key, wrapping_key_id=by, wrapped=wrapped)))
        if self._was_erased(key.study_instance_uid, study_key_id):  # while it was put: the erasure may have deleted it before
            store.delete_document(name)
            return False
        return True

    def _was_erased(self, study_instance_uid: str, study_key_id: str) -> bool:
        return study_key_id in (erased_keys(self._audit, study_instance_uid) or ())


def _names(content: bytes, wrapping_key_id: str) -> bool:
    """Whether a document says that it is wrapped by this key."""
    try:
        return bool(json.loads(content)["wrapping_key_id"] == wrapping_key_id)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError("a study key's document is damaged: restore it from another copy") from error
