"""One study key, opened, and the document that the object store keeps of it: JSON that shows neither the key nor the study."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.errors import IntegrityError
from storage.keys import derive_key

_FORMAT: Final = "dicom-node study key 1"
_ID: Final = re.compile(r"[0-9a-f]{32}")
_DOCUMENT_BYTES: Final = 65_536
_PURPOSE: Final = b"dicom-node study key document 1"


@dataclass(frozen=True, slots=True)
class StudyKey:
    """A key of one study, opened."""

    id: str
    """32 hexadecimal digits, random."""
    study_instance_uid: str
    secret: bytes = field(repr=False)
    """32 bytes; wraps data keys."""
    wrapping_key_id: str
    wrapped: bytes = field(repr=False)
    """The secret as the ring wrapped it."""
    created_at: datetime
    stored: bool = False
    """Whether its document is known to be in the object store."""
    doubt: int = 0
    """If not: which replacing of it the row told of when it was read, negative; 0: none."""


def document_name(study_key_id: str) -> str:
    """Return the name of a study key's document in the object store."""
    return f"keys/{study_key_id[:2]}/{study_key_id}"


def write_document(key: StudyKey) -> bytes:
    """Return the document of a key; the UID of the study is encrypted under the key itself."""
    plain = {
        "format": _FORMAT,
        "id": key.id,
        "wrapping_key_id": key.wrapping_key_id,
        "wrapped": base64.b64encode(key.wrapped).decode("ascii"),
        "created_at": key.created_at.isoformat(),
    }
    # the derived key serves this one message, the same whenever it is written: a constant nonce repeats nothing else
    study = _cipher(key.secret).encrypt(bytes(12), key.study_instance_uid.encode("ascii"), _bound(key.id, plain["created_at"]))
    return json.dumps({**plain, "study": base64.b64encode(study).decode("ascii")}, sort_keys=True).encode() + b"\n"


def read_document(content: bytes, unwrap: Callable[[str, bytes, str], bytes]) -> StudyKey:
    """Return the key that a document keeps; the way back of `write_document`.

    Parameters
    ----------
    content
        From the store: nothing in it is believed before it is authenticated.
    unwrap
        ``Ring.unwrap``.

    Raises
    ------
    IntegrityError
        The document is damaged, or `unwrap` does not open it.
    Unavailable
        As `unwrap`.
    """
    try:
        if len(content) > _DOCUMENT_BYTES:
            raise ValueError("length")  # noqa: TRY301 - one sentence for all that is wrong with it
        found: dict[str, str] = json.loads(content)
        if found["format"] != _FORMAT or not _ID.fullmatch(found["id"]):
            raise ValueError("format")  # noqa: TRY301
        wrapped, study = (base64.b64decode(found[name], validate=True) for name in ("wrapped", "study"))
        created_at = datetime.fromisoformat(found["created_at"])
        wrapping_key_id = str(found["wrapping_key_id"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"a study key's document is damaged ({type(error).__name__}): restore it from another copy") from error
    secret = unwrap(wrapping_key_id, wrapped, found["id"])
    try:
        uid = _cipher(secret).decrypt(bytes(12), study, _bound(found["id"], found["created_at"])).decode("ascii")
    except (InvalidTag, ValueError) as error:
        raise IntegrityError("a study key's document was changed: restore it from another copy") from error
    return StudyKey(found["id"], uid, secret, wrapping_key_id, wrapped, created_at, stored=True)


def _cipher(secret: bytes) -> AESGCM:
    return AESGCM(derive_key(secret, salt=None, info=_PURPOSE))


def _bound(study_key_id: str, created_at: str) -> bytes:
    return f"{study_key_id} {created_at}".encode()
