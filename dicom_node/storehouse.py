"""Opens the archive of a configuration for one process: keys, database, object store, spool, cache, and what ties them together."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy import make_url

from dicom_node.config import peer_of
from dicom_node.peers import Peer, Peers
from dicom_node.security import ClientTls
from inference.pipeline import analysable
from storage.archive import ENDED_BADLY, Acknowledge, Archive
from storage.audit import AuditTrail
from storage.audit_outbox import AuditOutbox
from storage.cache import ReadCache
from storage.database import Database
from storage.errors import StorageError, Unavailable
from storage.failpoints import failpoint_from_environment
from storage.holds import Holds
from storage.index import Index
from storage.keys import Ring
from storage.known_peers import KnownPeers
from storage.nodes import Nodes
from storage.objects import DirectoryStore, ObjectStore
from storage.records import AuditEvent, Job, JobKind, Limits, NewJob, Origin, Summary
from storage.study_keys import StudyKeys
from storage.work import DEFAULT_ATTEMPTS, WorkQueue, growing_delay

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from dicom_node.config import Settings
    from storage.keys import WrappingKey

log = structlog.get_logger()

_USED = ("application.started", "archive.moved", "archive.reindexed", "archive.restored")
"""Actions that say of an audit trail that it is the trail of this store; others an operator may have caused before the first start."""


@dataclass(frozen=True, slots=True)
class Storehouse:
    """What lies in the storage package, made for one process."""

    archive: Archive
    index: Index
    queue: WorkQueue
    audit: AuditTrail
    database: Database
    ring: Ring
    study_keys: StudyKeys
    store: ObjectStore
    spool: DirectoryStore | None
    cache: ReadCache | None
    nodes: Nodes
    holds: Holds
    peers: Peers
    """Of the configuration, and those that are added while the node runs."""
    outbox: AuditOutbox
    node_id: str


def folder(path: Path) -> Path:
    """Make a folder that only the node's user may enter, unless it is there."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def database_file(settings: Settings) -> Path:
    """Where the embedded database lies."""
    return settings.node.data_dir.resolve() / "index.db"


def open_database(settings: Settings, ring: Ring) -> Database:
    """Open the database that the configuration names; nothing is read yet."""
    if not settings.database.url:
        return Database(url=f"sqlite:///{database_file(settings)}", key=ring.database_key())
    url = make_url(settings.database.url)
    password = settings.database.password.get_secret_value()
    if password:
        url = url.set(password=password)
    return Database(url=url.render_as_string(hide_password=False), key=None)


def object_store(settings: Settings) -> ObjectStore:
    """Make the store that the configuration names."""
    reach = failpoint_from_environment(os.environ)
    archive = settings.archive
    if archive.store == "s3":
        from storage.s3 import S3Store  # boto3 loads only where it is used

        return S3Store(
            bucket=archive.bucket,
            prefix=archive.prefix,
            endpoint_url=archive.endpoint_url or None,
            region=archive.region or None,
            addressing_style=archive.addressing_style,
            ca_file=archive.ca_file,
            server_side_encryption=archive.server_side_encryption,
            kms_key_id=archive.kms_key_id,
            storage_class=archive.storage_class,
            tags=dict(tag.split("=", 1) for tag in archive.tags),
            restore_tier=archive.restore_tier,
            restore_days=archive.restore_days,
            attempts=archive.attempts,
            deadline_s=archive.deadline_s,
            reach=reach,
        )
    return DirectoryStore(folder(settings.node.data_dir / "objects"), reach=reach)


def node_id(settings: Settings, database: Database) -> str:
    """Return the identity of this node, made once for its data folder; on return a power cut cannot take it.

    Raises
    ------
    storage.errors.Unavailable
        The file holds none: another must not be made, since what waits in `landed` is known under the old one.
    """
    path = folder(settings.node.data_dir) / "node_id"
    if not path.exists():
        _make_node_id(path)
    known = path.read_bytes().strip()
    if re.fullmatch(rb"[0-9a-f]{16}", known) is None:
        raise Unavailable(
            f"{path} holds no identity (16 hexadecimal digits): a power cut or a full disk may have emptied it; write this node's back "
            f"into it, as `dicom-node nodes` of another node or the table `nodes` of the database has it{_registered(settings, database)}. "
            "Only if this node never ran before, or nothing lies in `landed`, remove the file: the next start makes a new identity"
        )
    return known.decode("ascii")


def _make_node_id(path: Path) -> None:
    fresh = path.with_name(f".node_id.{secrets.token_hex(8)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{secrets.token_hex(8)}\n".encode("ascii"))
        os.fsync(descriptor)
        path.hardlink_to(fresh)  # whoever comes second keeps the first one's
    except FileExistsError:
        log.debug("node_id.made_elsewhere")
    finally:
        os.close(descriptor)
        fresh.unlink()
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _registered(settings: Settings, database: Database) -> str:
    """Return the identities under which this host and folder are registered, in words; empty where none can be read."""
    try:
        nodes = Nodes(database=database).all()
    except StorageError:
        return ""
    here = (socket.gethostname(), str(settings.node.data_dir.resolve()))
    ids = [one.node_id for one in nodes if (one.host, one.data_dir) == here]
    return f": for this host and folder {' or '.join(ids)}" if ids else ""


def wrapping_key(settings: Settings) -> WrappingKey | None:
    """Return the key that a new ring gets as the configuration says; None: one of its own in the file."""
    if settings.keys.ring == "file":
        return None
    from storage.kms import KmsKey

    return KmsKey(settings.keys.kms_key_id, region=settings.keys.kms_region, endpoint_url=settings.keys.kms_endpoint_url).resolved()


def foreign_ring(settings: Settings, study_keys: StudyKeys, ring: Ring) -> str:
    """Return what is wrong when the database was written with wrapping keys that this ring lacks; empty when all is right."""
    unknown = sorted(key_id for key_id in study_keys.counts() if not ring.holds(key_id))
    if not unknown:
        return ""
    return (
        f"{settings.ring_file}: the database was written with another ring (keys {', '.join(unknown)} are missing here); "
        "copy the ring of the nodes that share it, then start again"
    )


def foreign_store(settings: Settings, parts: Storehouse) -> str:
    """Return what is wrong when a database that was never used is given to a store that was; empty when all is right.

    A node would take all that lies there for what crashes left. The store is asked before the database is asked again: another first node
    enters the register before it stores anything.

    Raises
    ------
    storage.errors.StorageError
        Database or store cannot be asked: the first node of an archive has to see both.
    """
    if not _is_unused(parts):
        return ""
    there = next(parts.store.list_documents("keys/"), None) or next(parts.store.list(), None)
    if there is None or not _is_unused(parts):
        return ""
    s3 = settings.archive.store == "s3"
    place = f"bucket {settings.archive.bucket}" if s3 else str(settings.node.data_dir.resolve() / "objects")
    named = "the database that database.url names" if settings.database.url else str(database_file(settings))
    other = "an empty bucket or another archive.prefix" if s3 else "another node.data_dir"
    return (
        f"{named} is new, and {place} holds the objects of an archive: nothing was changed. If the name (database.url) is wrong, mend it. "
        "If the index was lost, `dicom-node restore FOLDER` brings a backup of it here, and `dicom-node reindex` makes it anew from what "
        f"lies there; if it is to move here, `dicom-node migrate`. After one of them the node starts. For a new archive name {other}"
    )


def _is_unused(parts: Storehouse) -> bool:
    """Tell whether no node ever entered this database, and nothing was filed in it, by a restore or reindex either."""
    return (
        not parts.nodes.all()
        and not parts.study_keys.counts()
        and next(parts.index.all_objects(), None) is None
        and not any(entry.event.action in _USED for entry in parts.audit.entries())
    )


def peers_of(settings: Settings) -> list[Peer]:
    """Return the peers of the configuration."""
    return [peer_of(section) for section in settings.peers]


def client_tls(settings: Settings) -> ClientTls | None:
    """Make the TLS of our calls; None when the configuration names nobody who may vouch for peers."""
    if settings.tls.authorities is None:
        return None
    return ClientTls(settings.tls.authorities, settings.tls.certificate, settings.tls.key)


def acknowledging(settings: Settings, peers: Peers) -> Callable[[Origin], Acknowledge]:
    """Return what Success means for a sender: its own policy, else that of the archive."""

    def policy(origin: Origin) -> Acknowledge:
        peer = peers.get(origin.peer) if origin.peer else None
        return (peer.acknowledge if peer is not None else "") or settings.archive.acknowledge

    return policy


@contextmanager
def storage(settings: Settings) -> Iterator[Storehouse]:
    """Open the archive of ``settings`` for one process.

    Raises
    ------
    storage.errors.Unavailable
        There is none yet, or it cannot be opened; the message says what to do.
    """
    if not settings.database.url and not database_file(settings).exists():
        raise Unavailable(
            f"there is no archive in {settings.node.data_dir.resolve()} yet; name its configuration with --config, or bring an index here "
            "(`dicom-node migrate`, `dicom-node restore FOLDER` or `dicom-node reindex`), which has to be done before any start, or, for a "
            "new archive, start the node once"
        )
    ring = Ring.load(settings.ring_file)
    database = open_database(settings, ring)
    try:
        parts = _assembled(settings, ring, database)
        try:
            yield parts
        finally:
            parts.archive.close()
    finally:
        database.close()


def _assembled(settings: Settings, ring: Ring, database: Database) -> Storehouse:
    reach = failpoint_from_environment(os.environ)
    data_dir = settings.node.data_dir
    identity = node_id(settings, database)
    index = Index(database=database)
    audit = AuditTrail(database=database)
    outbox = AuditOutbox(database=database, from_beginning=settings.audit.from_beginning, refuse_after=settings.audit.refuse_after)
    peers = Peers(peers_of(settings), added=KnownPeers(database=database, audit=audit).all)
    queue = WorkQueue(
        database=database,
        home=identity,
        lease_s=settings.node.lease_s,
        attempts={**DEFAULT_ATTEMPTS, JobKind.DELIVER: settings.delivery.attempts},
        delay=partial(growing_delay, first_s=settings.delivery.first_delay_s, longest_s=settings.delivery.longest_delay_s),
        exhausted=partial(_record_exhausted, audit),
    )
    study_keys = StudyKeys(database=database, ring=ring, cache_s=settings.keys.cache_s, cache_keys=settings.keys.cache_keys, reach=reach)
    store = object_store(settings)
    spool = DirectoryStore(folder(data_dir / "landed"), reach=reach) if store.remote else None
    cache = ReadCache(data_dir / "cache", settings.archive.cache_bytes) if store.remote and settings.archive.cache_bytes else None

    def jobs_for(summary: Summary, _origin: Origin) -> Sequence[NewJob]:
        wanted = settings.inference.enabled and analysable(summary)
        return (NewJob(JobKind.ANALYSE, summary.sop_instance_uid),) if wanted else ()

    archive = Archive(
        database=database,
        index=index,
        queue=queue,
        audit=audit,
        store=store,
        study_keys=study_keys,
        landing=folder(data_dir / "landing"),
        limits=Limits(
            object_bytes=settings.limits.object_bytes,
            depth=settings.limits.depth,
            elements=settings.limits.elements,
            inflate_ratio=settings.limits.inflate_ratio,
            inflate_bytes=settings.limits.inflate_bytes,
        ),
        jobs_for=jobs_for,
        spool=spool,
        cache=cache,
        node_id=identity,
        acknowledge=acknowledging(settings, peers),
        max_bytes_in_flight=settings.archive.max_bytes_in_flight,
        pixels_equal=_pixels_equal,
        on_conflict=settings.archive.on_conflict,
        accept_sop_class=partial(_accepts, unknown=settings.dimse.unknown_sop_classes),
        min_free_bytes=settings.archive.min_free_bytes,
        require_room=outbox.require_room,
        reach=reach,
    )
    return Storehouse(
        archive=archive,
        index=index,
        queue=queue,
        audit=audit,
        database=database,
        ring=ring,
        study_keys=study_keys,
        store=store,
        spool=spool,
        cache=cache,
        nodes=Nodes(database=database, shared=bool(settings.database.url)),
        holds=Holds(database=database, audit=audit),
        peers=peers,
        outbox=outbox,
        node_id=identity,
    )


def _record_exhausted(audit: AuditTrail, connection: Connection, job: Job, reason: str) -> None:
    """Write into the audit trail, and the log, that a job is dead whose workers died before they could say so themselves."""
    detail: dict[str, Any] = {"job": job.id, "attempts": job.attempts, "lane": job.lane}
    action = ENDED_BADLY[job.kind]
    audit.append(connection, AuditEvent(action=action, outcome=reason, actor="node", subject=job.sop_instance_uid, detail=detail))
    log.error("job.dead", job=job.id, kind=str(job.kind), reason=reason)


# Every process of the node imports this file; what only some of them need, or only at times, is imported where it is used, since a
# codec or a network library costs more than the rest of a start.


def _pixels_equal(first: bytes, second: bytes) -> bool:
    from inference.pixels import pixels_equal

    return pixels_equal(first, second)


def _accepts(sop_class_uid: str, *, unknown: bool) -> bool:
    from dicom_node.dimse.scp import is_storage

    return is_storage(sop_class_uid, unknown=unknown)
