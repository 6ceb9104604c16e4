"""`dicom-node check`: does this configuration work on this machine? Each finding says what to do."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from dicom_node.config import Settings, is_loopback
from dicom_node.peers import Peer, Peers, merged
from storage.database import Clock, utc_now
from storage.errors import StorageError

if TYPE_CHECKING:
    from storage.database import Database
    from storage.keys import Ring


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    subject: str
    passed: bool | None
    """None: nothing is wrong with it, but it is worth knowing."""
    text: str


def findings(settings: Settings, *, peers: bool = True, clock: Clock = utc_now) -> Iterator[Finding]:
    """Look at everything the node needs, without starting it; changed is nothing but missing folders, which are made.

    In a bucket a document is put and removed again, and a key of the ring is tried with a secret that nothing is sealed with.

    Parameters
    ----------
    peers
        Whether to call them too.
    clock
        This machine's.
    """
    yield Finding("configuration", passed=True, text="every key is known and coherent")
    yield _folder(settings.node.data_dir)
    yield _space(settings)
    yield _keys(settings)
    yield from _clock(settings, clock)
    yield from _ports(settings)
    yield _store(settings)
    yield from _audit(settings)
    yield from _models(settings)
    known = _known(settings)
    yield from _routes(settings, known)
    if peers:
        yield from _peers(settings, known)


def _folder(path: Path) -> Finding:
    subject = "node.data_dir"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        return Finding(subject, passed=False, text=f"{path} cannot be made ({error.strerror}); name a folder this user may write")
    if not os.access(path, os.W_OK | os.X_OK):
        return Finding(subject, passed=False, text=f"{path} is not writable for this user; change its owner or name another folder")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return Finding(subject, passed=False, text=f"{path} is open to other users; chmod 700 {path}")
    return Finding(subject, passed=True, text=f"{path.resolve()} is ours alone and writable")


def _space(settings: Settings) -> Finding:
    path = settings.node.data_dir
    subject = "archive.min_free_bytes"
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(subject, passed=False, text=f"free space of {path} cannot be read ({error.strerror})")
    needed = settings.archive.min_free_bytes
    if free < needed:
        return Finding(
            subject, passed=False, text=f"{free >> 20} MiB free, {needed >> 20} MiB needed before instances are accepted; free some"
        )
    return Finding(subject, passed=True, text=f"{free >> 20} MiB free")


def _keys(settings: Settings) -> Finding:
    from dicom_node.storehouse import database_file, foreign_ring, open_database  # what is not looked at is not loaded
    from storage.audit import AuditTrail
    from storage.keys import Ring
    from storage.ring_identity import RingIdentity
    from storage.study_keys import StudyKeys

    path = settings.ring_file
    if not path.exists():
        if database_file(settings).exists():
            text = f"{path} is missing although data exists; put the ring's copy back: without it nothing can be read"
            return Finding("keys", passed=False, text=text)
        if settings.database.url:
            text = (
                f"{path} is missing; make it once with `dicom-node keys init`, and give every node that shares the database a copy "
                "(the database was not tried)"
            )
            return Finding("keys", passed=False, text=text)
        return Finding("keys", passed=True, text=f"{path} will be made at the first start; keep a copy of it elsewhere")
    try:
        ring = Ring.load(path)
        if not settings.database.url and not database_file(settings).exists():
            if fault := _unusable(ring):
                return Finding("keys", passed=False, text=fault)
            return Finding("keys", passed=True, text=f"{path} is readable for us alone")
        database = open_database(settings, ring)
        try:
            weaknesses = database.weaknesses()
            want_of_room = _want_of_room(database)
            fault = foreign_ring(settings, StudyKeys(database=database, ring=ring), ring)
            fault = fault or RingIdentity(database=database, audit=AuditTrail(database=database), ring=ring).fault()
        finally:
            database.close()
    except StorageError as error:
        return Finding("keys", passed=False, text=str(error))
    if not fault:
        fault = _unusable(ring)
    if fault:
        return Finding("keys", passed=False, text=fault)
    if want_of_room or weaknesses:
        return Finding("database", passed=False, text="; ".join([*want_of_room, *weaknesses]))
    return Finding("keys", passed=True, text=f"{path} is readable for us alone, and opens the database")


def _clock(settings: Settings, clock: Clock) -> Iterator[Finding]:
    """Compare `clock` with that of a database which other nodes share; `_keys` says when it cannot be asked."""
    from dicom_node.storehouse import open_database
    from storage.keys import Ring
    from storage.nodes import CLOCK_OFF, clock_ahead, clock_words

    if not settings.database.url or not settings.ring_file.exists():
        return
    try:
        database = open_database(settings, Ring.load(settings.ring_file))
        try:
            with database.read() as connection:
                ahead = timedelta(microseconds=clock_ahead(connection, clock))
        finally:
            database.close()
    except StorageError:
        return
    if abs(ahead) > CLOCK_OFF:
        yield Finding("clock", passed=None, text=clock_words(ahead))
    else:
        yield Finding("clock", passed=True, text="it agrees with the database server's")


def _unusable(ring: Ring) -> str:
    """Say why the ring's primary key cannot be used, a key of KMS perhaps that this node has no right to; empty when it can."""
    name = secrets.token_hex(16)
    try:
        wrapping_key_id, secret, wrapped = ring.generate(name)
        if ring.unwrap(wrapping_key_id, wrapped, name) != secret:
            return "the primary key of the ring does not open what it closed"
    except StorageError as error:
        return str(error)
    return ""


def _want_of_room(database: Database) -> list[str]:
    from storage.room import Room

    try:
        Room(database=database).check()
    except StorageError as error:
        return [str(error)]
    return []


def _ports(settings: Settings) -> Iterator[Finding]:
    running = _running(settings.node.data_dir / "run" / "node.lock")
    for name, section in (("dimse", settings.dimse), ("dicomweb", settings.dicomweb), ("admin", settings.admin)):
        if not section.enabled:
            continue
        subject = f"{name}.port"
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(section.host, section.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if running:
                yield Finding(subject, passed=True, text=f"{section.host}:{section.port} is in use by the running node (process {running})")
                continue
            text = f"{section.host}:{section.port} cannot be listened on ({error.strerror}); stop what uses it, or choose another"
            yield Finding(subject, passed=False, text=text)
        else:
            yield Finding(subject, passed=True, text=f"{section.host}:{section.port} is free")


def _running(lock: Path) -> str:
    """Process id of the node that runs on this folder; empty when none does."""
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock.read_text(encoding="ascii", errors="replace").strip() or "unknown"
    except OSError:
        return ""
    return ""


def _store(settings: Settings) -> Finding:
    from dicom_node.storehouse import object_store
    from storage.s3 import S3Store

    versions: bool | None = True
    try:
        store = object_store(settings)
        store.check()
        if isinstance(store, S3Store):
            versions = store.trial()
    except StorageError as error:
        return Finding("archive.store", passed=False, text=str(error))
    except OSError as error:
        text = f"{settings.node.data_dir} cannot be used ({error.strerror}); name a folder this user may write"
        return Finding("archive.store", passed=False, text=text)
    if settings.archive.store != "s3":
        return Finding("archive.store", passed=True, text="folder objects in node.data_dir can be reached")
    text = f"bucket {settings.archive.bucket} can be reached, written, read, listed and cleared"
    if versions is None:
        return Finding("archive.store", passed=True, text=f"{text}; whether it keeps versions it does not tell")
    if not versions:
        return Finding("archive.store", passed=None, text=f"{text}, but keeps no versions: what anybody deletes there is gone")
    return Finding("archive.store", passed=True, text=f"{text}, and keeps versions")


def _audit(settings: Settings) -> Iterator[Finding]:
    if not settings.audit.syslog_host:
        return
    from dicom_node.audit_sink import repository_of, tried
    from dicom_node.errors import StartError

    try:
        repository = repository_of(settings)
    except StartError as error:
        yield Finding("audit.syslog_host", passed=False, text=str(error))
        return
    if repository is not None:
        fault = tried(repository)
        text = (
            f"{fault}; audit records wait until it takes them" if fault else f"{repository.name} takes connections, and ends them in order"
        )
        yield Finding("audit.syslog_host", passed=not fault, text=text)


def _models(settings: Settings) -> Iterator[Finding]:
    if not settings.inference.enabled:
        return
    from dicom_node.node import model_bundles
    from inference.errors import InferenceError
    from inference.runner import ModelRunner

    try:
        bundles = model_bundles(settings)
        ModelRunner(bundles, threads=1, device=settings.inference.device)  # builds each network and loads its weights, as a worker does
    except InferenceError as error:
        yield Finding("inference.bundles", passed=False, text=str(error))
        return
    for bundle in bundles:
        yield Finding("inference.bundles", passed=True, text=f"{bundle.card.name} {bundle.card.version} ({bundle.digest[:12]})")


def _known(settings: Settings) -> list[Peer]:
    """Return the peers of the configuration, and those that were added where the database can be read; `_keys` says when it cannot."""
    from dicom_node.storehouse import database_file, open_database, peers_of
    from storage.audit import AuditTrail
    from storage.keys import Ring
    from storage.known_peers import KnownPeers

    configured = peers_of(settings)
    if not settings.ring_file.exists() or not (settings.database.url or database_file(settings).exists()):
        return configured
    try:
        database = open_database(settings, Ring.load(settings.ring_file))
        try:
            added = KnownPeers(database=database, audit=AuditTrail(database=database)).all()
        finally:
            database.close()
    except StorageError:
        return configured
    return list(merged(configured, added)[0].values())


def _routes(settings: Settings, known: list[Peer]) -> Iterator[Finding]:
    from dicom_node.routes import ABSENT, Route, Routing

    routing = Routing(peers=Peers(known), routes=[Route(route.from_, route.to) for route in settings.routes])
    for name in routing.nobodys():
        yield Finding("routes", passed=None, text=ABSENT.format(name=name))


def _peers(settings: Settings, known: list[Peer]) -> Iterator[Finding]:
    from dicom_node.dimse.scu import StorageSCU
    from dicom_node.errors import DeliveryError
    from dicom_node.storehouse import client_tls

    if settings.dimse.enabled and not is_loopback(settings.dimse.host) and not any(peer.accept for peer in known):
        yield Finding("peers", passed=None, text="nobody may store: every caller is rejected; `dicom-node peers add` changes that")
    scu = StorageSCU(ae_title=settings.dimse.ae_title, connect_s=5.0, answer_s=5.0, tls=client_tls(settings))
    for peer in known:
        if not peer.callable or not peer.port:
            yield Finding(f"peer {peer.name}", passed=True, text=f"{peer.ae_title} may call; it is never called: it has no host and port")
            continue
        try:
            scu.echo(peer)
        except DeliveryError as error:
            yield Finding(f"peer {peer.name}", passed=False, text=f"{error}; reports wait until it answers")
        else:
            yield Finding(f"peer {peer.name}", passed=True, text=f"{peer.ae_title} at {peer.host}:{peer.port} answers C-ECHO")
