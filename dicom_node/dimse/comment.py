"""What fits into an Error Comment (0000,0902): the essence of an error's sentence, in the 64 characters of an LO.

Messages of the archive are cause and remedy, and longer; the node's log has them whole.
"""

from __future__ import annotations

import re

LENGTH = 64
"""Of a value of VR LO (PS3.5 Section 6.2)."""
_LEAST = 12
"""A first part that is shorter says too little by itself."""
_SHORTER: tuple[tuple[str, str], ...] = (
    # Said often, and too long as it stands: the cause in fewer words.
    ("an instance of this SOP Instance UID and other content is archived", "other content is archived under this SOP Instance UID"),
    ("a report of this SOP Instance UID and other content is archived", "other content is archived under this SOP Instance UID"),
    ("the study is archived with another Patient ID or Issuer of Patient ID", "the study is archived under another Patient ID or Issuer"),
    ("MiB are received and not committed yet", "MiB are received, not committed"),
    ("the database file cannot be opened for writing", "the database cannot be written"),
    ("the disk of the data directory reports an input/output error", "the node's disk reports an I/O error"),
    ("the embedded database needs a key of 32 bytes", "the database has no key"),
    ("the connection to the database was lost, or cannot be made", "the node's database cannot be reached"),
    ("the database refuses the user or the password", "the node's database refuses its password"),
    ("the database asks for a password and none is given", "the node's database wants a password"),
    ("the database server's certificate does not prove who it is", "the node's database shows a wrong certificate"),
    ("the database user may not do this", "the node's database user may not do this"),
    ("the database server is out of memory or has an input/output error", "the node's database server has a fault"),
    ("another session holds a lock of the database for too long", "the node's database is locked"),
    ("the transaction stood still for too long, and the database ended it", "the node's database ended the transaction"),
    ("two sessions were in each other's way and the database undid one", "the node's database undid the transaction"),
    ("the keys of the study changed while this instance arrived", "the study's keys changed meanwhile, perhaps erased"),
    ("the wrapping key was retired while this instance arrived", "the wrapping key was retired meanwhile"),
    ("the file of trusted certificates", "a certificate file of the node is missing"),
    ("in the middle of the compressed stream", "inside the compressed stream"),
    ("the deflated data set ends", "the data set ends"),
    ("the landing file of object", "a landing file of the node was changed; "),
    (" runs past the enclosing sequence or item", " runs past its item"),
    ("no answer before the deadline", "no answer in time"),
    ("the key service gives back other bytes than it took", "the key service gives back other bytes; "),
    ("the key service gave a secret", "the key service gave a wrong secret; "),
    ("another key ring lies at", "the node's key ring was replaced: "),
    ("the database was moved and is used no more", "the node's database was moved"),
    ("the database is a copy that was not finished", "the node's database is an unfinished copy"),
    ("pages of the database are damaged", "the node's database is damaged"),
    ("the key does not open the database, or its first page is damaged", "the node's key does not open its database"),
    ("the file system cannot hold a write-ahead log", "the node's disk holds no write-ahead log"),
)
_PLACE = re.compile(r"^(?:cannot (.+?) bucket '[^']*' at \S+: |/\S*: )")
_TAG = re.compile(r"^(\([0-9A-F]{4},[0-9A-F]{4}\)) at byte \d+[^:]*: ")
_CLAUSE = re.compile(r"[;:.,](?= )| \(|$")


def in_brief(text: str) -> str:
    """Return what is most worth knowing of a sentence, in at most 64 characters; a short one as it is.

    Whole clauses, as many as there is room for; where the first alone is too long, its words, with an ellipsis.
    """
    if len(text) <= LENGTH:
        return text
    text = _PLACE.sub(lambda found: f"cannot {found[1]} the bucket: " if found[1] else "the node's disk: ", text)
    text = _TAG.sub(r"\1 ", text)
    for long, short in _SHORTER:
        if long in text:
            text = text.replace(long, short)
    ends = [found.start() for found in _CLAUSE.finditer(text) if _LEAST <= found.start() <= LENGTH]
    if ends:
        return text[: ends[-1]]
    head, _, tail = text[: LENGTH - 3].rpartition(" ")
    return (head or tail).rstrip(",;:( ") + "..."
