"""Backup: what it takes to have the archive again on an empty machine, in one folder; and the way back.

::

    backup.json                 what the newest backup is; written last, so a backup that was cut short is none
    index-20260304T050607Z.db   the database as it was then, on SQLite whatever it runs on, encrypted with the ring's database key
    ring.json                   the key ring, if asked for: whoever has it too can read everything
    objects/                    a directory store: the objects and documents (incremental). A bucket is its own copy: it has versions,
    objects-20260304T050607Z    and here its objects are listed with their digests
    landed/                     objects on this node's disk alone

The database is copied first, so that every object it names is there when the objects are. What is archived after the backup is in the
bucket, or in the objects' folder if that survived: `storage.orphans` takes it in after a restore (``restored=True``). An erased study stays
readable in a backup as long as an older ``index-….db`` keeps its key: `keep` says how many are kept. With the last of them that names
its objects these go too.

What lies in a backup rots as everything does: each run reads a sixteenth of the objects that it finds there, and puts damaged ones anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from storage.copying import copy_database
from storage.database import Database, utc_now
from storage.errors import InstanceNotFound, IntegrityError, StorageError, Unavailable
from storage.index import Index
from storage.objects import CHUNK, DirectoryStore, disk_unavailable
from storage.places import chunks_of, digest_of
from storage.records import JobKind
from storage.tables import INSTANCES, QUARANTINE

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.index import ArchivedObject
    from storage.keys import Ring
    from storage.objects import ObjectReader, ObjectStore
    from storage.work import WorkQueue

_FORMAT = "dicom-node backup 1"
_MARKS = "quarantine/"
_KINDS = ("keys/", _MARKS)
_SHARES = 16
"""After so many runs every object in a backup was read again: object keys are random, their first digit says in which run."""
_PAGE = 500
_log = logging.getLogger(__name__)
Progress = Callable[[str, int], None]
"""Told what is being copied, and how many are done."""


@dataclass(slots=True)
class BackedUp:
    """What a backup holds."""

    made_at: datetime
    database: str
    """Name of the file."""
    objects: int = 0
    """Of the archive, at that time."""
    copied: int = 0
    """Of them, copied now; the others were there."""
    landed: int = 0
    verified: int = 0
    """Of those that were there: read again now."""
    mended: list[str] = field(default_factory=list)
    """Object keys of what was damaged in the backup, and was copied anew."""
    removed: int = 0
    """Objects that none of the kept databases names any more."""
    damaged: list[str] = field(default_factory=list)
    """Object keys of what is not what was archived: not copied."""


@dataclass(slots=True)
class Restored:
    """What was brought back."""

    rows: int = 0
    objects: int = 0
    documents: int = 0
    landed: int = 0
    """Objects that had been on the lost node's disk alone, and are in the store now."""
    lost: list[str] = field(default_factory=list)
    """Object keys of what is in neither backup nor store."""


def back_up(
    folder: Path,
    *,
    database: Database,
    index: Index,
    store: ObjectStore,
    ring: Ring,
    spool: DirectoryStore | None = None,
    data_dir: Path | None = None,
    with_ring: bool = False,
    keep: int = 7,
    verify: bool = False,
    clock: Callable[[], datetime] = utc_now,
    progress: Progress = lambda _what, _done: None,
) -> BackedUp:
    """Make a backup in `folder`, or bring the one there up to date. The archive goes on meanwhile.

    Parameters
    ----------
    data_dir
        Where the node keeps what is its own: no backup is made there.
    keep
        How many copies of the database are kept.
    verify
        Read every object that is in the backup already, not a sixteenth of them.

    Raises
    ------
    StorageError
        `folder` is `data_dir`, or lies in it.
    Unavailable
        Database, store or disk; the backup that was there stays good.
    """
    if data_dir is not None and folder.resolve().is_relative_to(data_dir.resolve()):
        raise StorageError(
            f"{folder} lies in {data_dir}, where the node keeps the archive itself: what takes one takes the other, and both have a folder "
            "`objects`; nothing was written. Name a folder on another disk"
        )
    try:
        _make(folder)
        moment = clock().astimezone(UTC)
        made = BackedUp(moment, f"index-{moment:%Y%m%dT%H%M%SZ}.db")
        number = _runs(folder) + 1
        share = f"{number % _SHARES:x}"
        due: Callable[[str], bool] = (lambda _object_key: True) if verify else (lambda object_key: object_key.startswith(share))
        _copy_out(folder, made.database, database, ring, progress)
        if store.remote:
            made.objects = _list_objects(folder / f"objects-{moment:%Y%m%dT%H%M%SZ}", index, progress)
        else:
            _copy_objects(folder / "objects", index, store, made, due, progress)
        if spool is not None:
            _copy_landed(folder / "landed", index, spool, made, due, progress)
        if with_ring:
            _replace(folder / "ring.json", ring.path.read_bytes())
        told = {"format": _FORMAT, "made_at": moment.isoformat(), "database": made.database, "objects": made.objects, "runs": number}
        _replace(folder / "backup.json", json.dumps(told, indent=2).encode() + b"\n")
        _forget_old(folder, keep, made)
        if not store.remote:
            made.removed = _forget_objects(folder, index, ring)
    except OSError as error:
        raise disk_unavailable(error, folder) from error
    return made


def restore(
    folder: Path,
    *,
    database: Database,
    store: ObjectStore,
    ring: Ring,
    index: Index,
    queue: WorkQueue,
    progress: Progress = lambda _what, _done: None,
) -> Restored:
    """Bring the newest backup in `folder` into an empty database and, for a directory, an empty store. Nothing else may run.

    For a bucket nothing is copied: it is there. Then take in what was archived after the backup, and verify.

    Raises
    ------
    Unavailable
        There is no whole backup; the database is not empty; database, store or disk is away. Run it again.
    IntegrityError
        The ring does not open the backup, or an object of it is damaged.
    """
    told = newest(folder)
    found = Restored()
    source = Database(url=f"sqlite:///{(folder / str(told['database'])).absolute()}", key=ring.database_key())
    try:
        found.rows = sum(copy_database(source, database, progress).values())
    finally:
        source.close()
    objects = folder / "objects"
    if objects.is_dir() and not store.remote:
        kept = DirectoryStore(objects)
        survived = {name for name in kept.list_documents(_MARKS) if _has(store, name.rpartition("/")[2])}
        for known in index.all_objects():
            if known.landed_on:
                continue
            found.objects += _put_back(known, kept, store, found)
            progress("objects", found.objects)
        for kind in _KINDS:
            for name in kept.list_documents(kind):
                # where the store survived, what it says is newer: a key that was wrapped anew, a mark that an operator's decision removed
                if name not in survived and (kind == _MARKS or not _has_document(store, name)):
                    store.put_document(name, kept.get_document(name))
                    found.documents += 1
    _settle_landed(folder / "landed", database, store, index, queue, found)
    return found


def restore_ring(folder: Path, path: Path) -> None:
    """Put the key ring of a backup to `path`, where there is none.

    Raises
    ------
    Unavailable
        The backup holds none (it lies elsewhere, as it should), or there is one already, or the disk.
    """
    try:
        content = (folder / "ring.json").read_bytes()
    except FileNotFoundError as error:
        raise Unavailable(f"{folder} holds no key ring: bring the ring from where its copy is kept to {path}") from error
    except OSError as error:
        raise disk_unavailable(error, folder) from error
    if path.exists():
        raise Unavailable(f"{path} is there already: a ring is never written over; move it aside")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(path, content)
    except OSError as error:
        raise disk_unavailable(error, path) from error


def newest(folder: Path) -> dict[str, Any]:
    """Return what ``backup.json`` says.

    Raises
    ------
    Unavailable
        There is no whole backup.
    """
    try:
        told: dict[str, Any] = json.loads((folder / "backup.json").read_bytes())
        if told["format"] != _FORMAT or not (folder / str(told["database"])).is_file():
            raise ValueError("format")  # noqa: TRY301 - one sentence for all that is wrong with it
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{folder} holds no whole backup: name the folder that `backup` wrote to") from error
    return told


def _runs(folder: Path) -> int:
    """Return how often a backup was made in `folder`; 0 where none is, or that does not say."""
    try:
        return int(newest(folder).get("runs", 0))
    except (Unavailable, ValueError, TypeError):
        return 0


# --- out ------------------------------------------------------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(one for one in (folder, *folder.parents) if one.exists())
        raise Unavailable(
            f"{file} is a file, and a backup is a folder; nothing was written. Name a new folder, or the one of an earlier backup"
        ) from error


def _copy_out(folder: Path, name: str, database: Database, ring: Ring, progress: Progress) -> None:
    """Copy the database to a new file under a passing name; it gets its own when it is whole."""
    part = folder / f".{name}.{secrets.token_hex(4)}"
    try:
        target = Database(url=f"sqlite:///{part.absolute()}", key=ring.database_key())
        try:
            copy_database(database, target, progress)
        finally:
            target.close()  # the last connection folds the write-ahead log into the file
        part.rename(folder / name)
        _flush(folder)
    finally:
        for left in folder.glob(f"{part.name}*"):
            left.unlink()


def _list_objects(path: Path, index: Index, progress: Progress) -> int:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    count = 0
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as file:
            for known in index.all_objects():
                file.write(f"{known.object_key} {known.byte_count} {known.sha256}\n")
                count += 1
                progress("objects", count)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)
    return count


def _copy_objects(folder: Path, index: Index, store: ObjectStore, made: BackedUp, due: Callable[[str], bool], progress: Progress) -> None:
    kept = DirectoryStore(folder)
    for known in index.all_objects():
        if not known.landed_on:
            made.objects += 1
            made.copied += _keep_one(known.object_key, known.byte_count, known.sha256, store, kept, made, verify=due(known.object_key))
            progress("objects", made.objects)
    for kind in _KINDS:
        names = set(store.list_documents(kind))
        for name in sorted(names):
            try:
                content = store.get_document(name)
            except InstanceNotFound:
                continue  # erased meanwhile
            kept.put_document(name, content)
        for name in set(kept.list_documents(kind)) - names:
            kept.delete_document(name)  # of an erased key: it must not stay


def _copy_landed(folder: Path, index: Index, spool: DirectoryStore, made: BackedUp, due: Callable[[str], bool], progress: Progress) -> None:
    kept = DirectoryStore(folder)
    wanted = set()
    for info in spool.list():
        record = index.record_of_object(info.object_key)
        if record is not None and record.landed_on:
            wanted.add(info.object_key)
            sealed = record.sealed
            _keep_one(info.object_key, sealed.byte_count, sealed.sha256, spool, kept, made, verify=due(info.object_key))
            made.landed += 1
            progress("landed", made.landed)
    for info in list(kept.list()):
        if info.object_key not in wanted:
            kept.delete(info.object_key)  # it is in the store now


def _keep_one(
    object_key: str, byte_count: int, sha256: str, source: ObjectStore, kept: DirectoryStore, made: BackedUp, *, verify: bool
) -> int:
    """Have an object in the backup, whole if it is to be verified; return whether it was copied."""
    there = _is_whole(kept, object_key, byte_count, sha256 if verify else "")
    if there:
        made.verified += verify
        return 0
    copied = _copy_file(object_key, byte_count, sha256, source, kept, made.damaged)
    if there is not None and copied:
        _log.warning("backup.mended", extra={"object_key": object_key})
        made.mended.append(object_key)
    return copied


def _is_whole(kept: DirectoryStore, object_key: str, byte_count: int, sha256: str) -> bool | None:
    """Tell whether an object in the backup has its length, and its digest if one is given; None when there is none."""
    try:
        if kept.stat(object_key).byte_count != byte_count:
            return False
        if not sha256:
            return True
        reader = kept.open(object_key)
    except InstanceNotFound:
        return None
    except IntegrityError:
        return False
    try:
        return digest_of(reader) == sha256
    except Unavailable:
        return False  # a bad sector: a new file lies elsewhere
    finally:
        reader.close()


def _copy_file(object_key: str, byte_count: int, sha256: str, source: ObjectStore, target: DirectoryStore, damaged: list[str]) -> int:
    """Copy an object, over what is there; return whether it was. What is not what was archived replaces nothing."""
    try:
        reader = source.open(object_key)
    except InstanceNotFound:
        damaged.append(object_key)
        return 0
    try:
        written = _write(target.path_of(object_key), reader, byte_count, sha256)
    finally:
        reader.close()
    if not written:
        damaged.append(object_key)
    return int(written)


def _forget_old(folder: Path, keep: int, made: BackedUp) -> None:
    for pattern, ours in (("index-*.db", made.database), ("objects-*", made.database.replace("index-", "objects-").removesuffix(".db"))):
        others = sorted(path for path in folder.glob(pattern) if path.name != ours)  # a clock put back names the newest like the oldest
        for path in others[: len(others) - (max(keep, 1) - 1)] if len(others) >= max(keep, 1) else ():
            path.unlink()


def _forget_objects(folder: Path, index: Index, ring: Ring) -> int:
    """Remove the objects that neither the archive nor any kept copy of its database names; return how many.

    A copy that cannot be asked (of an older schema, or of another ring) may name them all: then nothing goes.
    """
    kept = DirectoryStore(folder / "objects")
    databases: list[Database] = []
    removed = 0
    try:
        for path in sorted(folder.glob("index-*.db")):
            databases.append(Database(url=f"sqlite:///{path.absolute()}", key=ring.database_key()))
        indexes = [index, *(Index(database=database) for database in databases)]
        objects = kept.list()
        while page := [info.object_key for info in islice(objects, _PAGE)]:
            unnamed = set(page)
            for one in indexes:
                unnamed -= one.known_objects(sorted(unnamed))
            for object_key in sorted(unnamed):
                kept.delete(object_key)
                removed += 1
    except (Unavailable, IntegrityError) as error:
        _log.warning("backup.objects_kept", extra={"reason": str(error)})
    finally:
        for database in databases:
            database.close()
    return removed


# --- and back -------------------------------------------------------------------------------------------------------------------------


def _put_back(known: ArchivedObject, kept: DirectoryStore, store: ObjectStore, found: Restored) -> int:
    if not isinstance(store, DirectoryStore):
        raise TypeError("objects are copied back into a directory alone")
    if _is_whole(store, known.object_key, known.byte_count, ""):
        return 0
    damaged: list[str] = []
    copied = _copy_file(known.object_key, known.byte_count, known.sha256, kept, store, damaged)
    found.lost += damaged
    return copied


def _has(store: ObjectStore, object_key: str) -> bool:
    try:
        store.stat(object_key)
    except InstanceNotFound:
        return False
    return True


def _has_document(store: ObjectStore, name: str) -> bool:
    try:
        store.get_document(name)
    except InstanceNotFound:
        return False
    return True


def _settle_landed(folder: Path, database: Database, store: ObjectStore, index: Index, queue: WorkQueue, found: Restored) -> None:
    """Bring what had landed on the lost node into the store, from the backup, unless the Mover had done so before the loss."""
    kept = DirectoryStore(folder) if folder.is_dir() else None
    for object_key in list(_landed(database)):
        record = index.record_of_object(object_key)
        if record is None:
            continue
        try:
            there = store.stat(object_key).byte_count == record.sealed.byte_count
        except InstanceNotFound:
            there = False
        if not there and kept is not None:
            try:
                kept.stat(object_key)
            except InstanceNotFound:
                found.lost.append(object_key)
                continue
            store.put(object_key, kept.path_of(object_key), record.sealed, tags={"role": record.role})
        elif not there:
            found.lost.append(object_key)
            continue

        def arrived(connection: Connection, key: str, home: str, uid: str) -> None:
            index.arrived_in_store(connection, key, landed_on=home)
            queue.rehome(connection, uid, kinds=tuple(JobKind))  # the Mover's too: whoever claims it finds nothing to bring

        database.write(partial(arrived, key=object_key, home=record.landed_on, uid=record.summary.sop_instance_uid))
        found.landed += 1


def _landed(database: Database) -> Iterator[str]:
    with database.read() as connection:
        for table in (INSTANCES, QUARANTINE):
            yield from connection.scalars(select(table.c.object_key).where(table.c.landed_on != ""))


# --- files ----------------------------------------------------------------------------------------------------------------------------


def _write(path: Path, reader: ObjectReader, byte_count: int, sha256: str) -> bool:
    """Write an object's bytes to a new file, flush it and its folder; False, and no file, when other bytes are read back."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "r+b") as file:
            for chunk in chunks_of(reader):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest, count = hashlib.sha256(), 0
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                count += len(chunk)
        if (count, digest.hexdigest()) != (byte_count, sha256):
            return False
        part.rename(path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)
    return True


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    _flush(path.parent)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
