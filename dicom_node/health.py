"""What /metrics and /readyz tell of a process: the whole node's supervisor, or a role that runs alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from dicom_node.observability import exposition
from dicom_node.supervisor import SERVING
from storage.audit_outbox import degraded
from storage.errors import StorageError
from storage.room import Room

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from dicom_node.config import Settings
    from dicom_node.storehouse import Storehouse

log = structlog.get_logger()
States = Callable[[], Mapping[str, str]]
"""Gives process -> ready, or another word of the supervisor."""


@contextmanager
def served(settings: Settings, parts: Storehouse, states: States, *, alone: CollectorRegistry | None = None) -> Iterator[None]:
    """Serve /metrics, /healthz and /readyz meanwhile, if the configuration says so.

    Parameters
    ----------
    alone
        The counters of a role that runs alone; None: those of all processes of the node. Such roles share a configuration, and where they
        share an address too, one of them has it; the others say so in the log and run without.

    Raises
    ------
    OSError
        The address is taken or not ours, and this is the whole node.
    """
    if not settings.admin.enabled:
        yield
        return
    from dicom_node.admin import AdminServer  # noqa: PLC0415 - aiohttp loads only where it serves

    room = Room(database=parts.database)
    server = AdminServer(
        host=settings.admin.host,
        port=settings.admin.port,
        metrics=lambda: exposition(gauges(settings, states(), parts), alone),
        readiness=lambda: not_ready(states(), parts, room),
        warnings=lambda: [*struggling(states()), *warnings(settings, parts)],
    )
    try:
        server.start()
    except OSError as error:
        if alone is None:
            raise
        where = f"{settings.admin.host}:{settings.admin.port}"
        remedy = "give this process an address of its own: serve --admin-port, or DICOM_NODE_ADMIN__PORT"
        log.warning("admin.not_served", address=where, reason=error.strerror or str(error), remedy=remedy)
        yield
        return
    try:
        yield
    finally:
        server.stop()


def not_ready(states: Mapping[str, str], parts: Storehouse, room: Room) -> list[str]:
    """Return what is not well, in sentences; empty: ready."""
    faults = [f"process {name} is {state}" for name, state in states.items() if state not in SERVING]
    try:
        parts.archive.check()
        room.check()
    except StorageError as error:
        faults.append(str(error))
    return faults


def struggling(states: Mapping[str, str]) -> list[str]:
    """Return which processes do their work in another way than they were asked to, in sentences."""
    return [
        f"degraded: process {name} computes on the CPU, since the device that was asked for cannot be used; its log says why"
        for name, state in states.items()
        if state == "degraded"
    ]


def warnings(settings: Settings, parts: Storehouse) -> list[str]:
    """Return what an operator should look at although instances are taken in, in sentences."""
    if not settings.audit.syslog_host:
        return []
    try:
        waiting = parts.outbox.backlog()
    except StorageError:
        return []  # `not_ready` says it
    section = settings.audit
    words = degraded(waiting, records=section.degraded_after, age_s=section.degraded_s, now=parts.database.clock())
    return [f"degraded: {words}"] if words else []


def gauges(settings: Settings, states: Mapping[str, str], parts: Storehouse) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """Give what is read just now, as (name, help, labels, value)."""
    for name, state in states.items():
        yield "dicom_node_process_ready", "1 when the process runs and is ready.", {"process": name}, float(state in SERVING)
    yield "dicom_node_free_bytes", "Free space of the data folder.", {}, float(shutil.disk_usage(settings.node.data_dir).free)
    try:
        counts, ages = parts.queue.counts(), parts.queue.oldest_unfinished_s()
    except StorageError:
        yield "dicom_node_database_up", "1 when the database answers.", {}, 0.0
        return
    yield "dicom_node_database_up", "1 when the database answers.", {}, 1.0
    yield from _audit_gauges(settings, parts)
    for (kind, state), count in counts.items():
        yield "dicom_node_jobs", "Jobs by kind and state.", {"kind": str(kind), "state": str(state)}, float(count)
    for kind, age in ages.items():
        text = "Age of the oldest job that is not finished: it waits, waits for another try, or is under way."
        yield "dicom_node_oldest_ready_seconds", text, {"kind": str(kind)}, age


def _audit_gauges(settings: Settings, parts: Storehouse) -> Iterator[tuple[str, str, dict[str, str], float]]:
    if not settings.audit.syslog_host:
        return
    try:
        waiting = parts.outbox.backlog()
    except StorageError:
        return  # it was there a moment ago; the next scrape says more
    age = (parts.database.clock() - waiting.oldest_at).total_seconds() if waiting.oldest_at is not None else 0.0
    yield "dicom_node_audit_backlog", "Audit records that the repository has not taken yet.", {}, float(waiting.records)
    yield "dicom_node_audit_backlog_seconds", "Age of the oldest of them.", {}, max(age, 0.0)
