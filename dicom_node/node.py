"""The composition root: makes every object, hands each what it needs, starts and stops them. Nothing else knows the settings."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from dicom_node.config import Settings
from dicom_node.config_faults import entry
from dicom_node.console import command_line
from dicom_node.errors import StartError
from dicom_node.folder_lock import FolderLock
from dicom_node.health import served
from dicom_node.observability import Metrics, configure_logging, forget_process, lines_dropped_of_parent, prepare_metrics, say
from dicom_node.peers import Peers
from dicom_node.routes import ABSENT, Route, Routing
from dicom_node.storehouse import (
    Storehouse,
    client_tls,
    database_file,
    folder,
    foreign_ring,
    foreign_store,
    object_store,
    open_database,
    storage,
    wrapping_key,
)
from dicom_node.supervisor import (
    DEGRADED,
    READY,
    Supervisor,
    end_at_once,
    end_in_time,
    give_signs_of_life,
    stop_on_signals,
    stop_with_parent,
)
from storage.errors import StorageError
from storage.failpoints import failpoint_from_environment
from storage.keys import Ring
from storage.nodes import CLOCK_OFF, SEEN_EVERY_S, Replaced, clock_words
from storage.records import AuditEvent
from storage.ring_identity import RingIdentity

if TYPE_CHECKING:
    from dicom_node.webhooks import WebhookSender
    from inference.bundle import ModelBundle
    from inference.report import NodeIdentity

log = structlog.get_logger()

ROLES = ("dimse", "web", "worker", "courier", "mover")
PRESENCE_S = 2.0
CLOCK_TOLD_EVERY_S = 3600.0
"""How often a clock that is off is told in the log."""
STOP_GRACE_S = 10.0
"""Beyond node.drain_s: what does not end in this time waits for something that does not answer, and is left behind."""
PORT_WAIT_S = 15.0
"""How long a start waits for ports that the children of a killed node are still giving back."""


def model_bundles(settings: Settings) -> tuple[ModelBundle, ...]:
    """Load the bundles: the shipped ones, or those the configuration names.

    Raises
    ------
    inference.errors.ModelUnavailable
        One cannot be used; the message says why.
    """
    from inference.bundle import load_bundles  # only workers and `check` need models

    return load_bundles(settings.inference.bundles)


def _ensure_keys(settings: Settings) -> None:
    path = settings.ring_file
    if path.exists():
        return
    if database_file(settings).exists() or any((settings.node.data_dir / "objects").glob("*/*")):
        raise StartError(f"the key ring {path} is missing although data exists; put its copy back: without it nothing stored can be read")
    if settings.database.url:
        raise StartError(
            f"the key ring {path} is missing: make it once with `dicom-node keys init`, and give every node that shares the database a copy"
        )
    if settings.archive.store == "s3" and next(object_store(settings).list(), None) is not None:
        raise StartError(
            f"the key ring {path} is missing although bucket {settings.archive.bucket} holds objects; put the ring's copy back, "
            "or name another archive.prefix for a new archive"
        )
    folder(path.parent)
    Ring.create(path, wrapping_key(settings))
    log.warning("keys.made", file=str(path), advice="keep a copy elsewhere: without it nothing stored here can be read")


def _prepare(settings: Settings) -> None:
    """Bring keys and database schema to where this program needs them; safe beside other nodes that do the same."""
    _ensure_keys(settings)
    database = open_database(settings, Ring.load(settings.ring_file))
    try:
        database.migrate()
    finally:
        database.close()


@contextmanager
def alone(settings: Settings) -> Iterator[Storehouse]:
    """Open the archive, prepared, while no node runs on the data folder or shares the database: for commands that rebuild it.

    Raises
    ------
    StartError
        A node runs.
    storage.errors.StorageError
        Keys, database or store cannot be used.
    """
    lock = _locked_folder(settings)
    try:
        _prepare(settings)
        with storage(settings) as parts:
            if living := parts.nodes.living():
                raise StartError(*(f"node {one.node_id} on {one.host} uses the database; stop it first" for one in living))
            yield parts
    finally:
        lock.close()


@contextmanager
def _present(settings: Settings, parts: Storehouse, lock: FolderLock, replaced: Callable[[], object], role: str = "node") -> Iterator[None]:
    """Be in the register of nodes, and say from time to time that this one lives; `lock` is that of its data folder.

    Start and stop are in the audit trail, of each role that is started by itself; who was killed says nothing at its end. `replaced` is
    called when another incarnation of the node turns up, and has to see that nothing more is taken in.
    """
    if fault := foreign_ring(settings, parts.study_keys, parts.ring) or foreign_store(settings, parts):
        raise StartError(fault)
    identity = RingIdentity(database=parts.database, audit=parts.audit, ring=parts.ring)
    if fault := identity.fault():
        raise StartError(fault)
    identity.bind()  # before the register: of two first nodes with a ring each, one never was there
    told = {"host": socket.gethostname(), "data_dir": str(settings.node.data_dir.resolve()), "version": version("dicom-node")}
    parts.nodes.enter(node_id=parts.node_id, incarnation=lock.incarnation, **told)
    process = {"node": parts.node_id, "role": role, "version": told["version"], "process": os.getpid()}
    parts.audit.record(AuditEvent("application.started", "success", "node", detail=process))
    gone = threading.Event()

    def say() -> None:
        clock_told_at = -CLOCK_TOLD_EVERY_S
        while not gone.wait(SEEN_EVERY_S):
            try:
                ahead = parts.nodes.seen(node_id=parts.node_id, incarnation=lock.incarnation, **told)
            except Replaced as error:
                log.critical("node.replaced", reason=str(error))
                replaced()
                return
            except StorageError as error:
                log.warning("node.unseen", reason=str(error))
                continue
            if abs(ahead) > CLOCK_OFF and time.monotonic() - clock_told_at >= CLOCK_TOLD_EVERY_S:
                clock_told_at = time.monotonic()
                log.warning("node.clock_off", ahead_s=round(ahead.total_seconds(), 1), reason=clock_words(ahead))

    thread = threading.Thread(target=say, name="presence", daemon=True)
    thread.start()
    try:
        yield
    finally:
        gone.set()
        thread.join(PRESENCE_S)  # a database that does not answer must not keep the node from stopping
        if not thread.is_alive():
            with suppress(StorageError):
                parts.audit.record(AuditEvent("application.stopped", "success", "node", detail=process))
        if not thread.is_alive() and lock.last():  # while another role of it runs, the node lives, and a copy of its folder must be refused
            with suppress(StorageError):  # the others notice within a minute
                parts.nodes.leave(parts.node_id, lock.incarnation)


# --- the whole node --------------------------------------------------------------------------------------------------


def serve(settings: Settings, config_file: Path | None) -> None:
    """Prepare the archive, start a process a role, keep them running until SIGTERM or SIGINT.

    Raises
    ------
    StartError
        Another node uses the folder, a port is taken, keys or archive cannot be opened.
    """
    stop = stop_on_signals()
    end_in_time(stop, settings.node.drain_s + STOP_GRACE_S)
    data_dir = settings.node.data_dir
    lock = _locked_folder(settings)
    pipe = configure_logging(form=settings.logging.format, level=settings.logging.level, role="node")
    try:
        prepare_metrics(data_dir / "run" / "metrics")  # behind the lock: the counters of a node that runs are not ours to empty
        pipe.counted_by(lines_dropped_of_parent())
        _prepare(settings)
        _await_ports(settings, stop)
        cut = threading.Event()

        def replaced() -> None:
            cut.set()
            stop.set()

        with storage(settings) as parts, _present(settings, parts, lock, replaced):
            removed = parts.archive.sweep()
            log.info("node.starting", version=version("dicom-node"), data_dir=str(data_dir.resolve()), swept=removed)
            _supervise(settings, config_file, parts, stop, cut)
        if cut.is_set():
            raise StartError("another incarnation of this node was started meanwhile; the log says where (node.replaced)")
    except StorageError as error:
        raise StartError(str(error)) from error
    finally:
        lock.close()


def _locked_folder(settings: Settings, *, shared: bool = False) -> FolderLock:
    """Lock the data folder for this node alone, or for the roles of one node that run each by itself."""
    data_dir = settings.node.data_dir
    try:
        folder(data_dir)
        return FolderLock(folder(data_dir / "run"), shared=shared)
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name a folder this user may write"
        raise StartError(f"node.data_dir: {data_dir} cannot be used ({error.strerror}); {remedy}") from error


def _roles(settings: Settings) -> list[str]:
    roles = []
    if settings.dimse.enabled:
        roles += ["dimse"] * settings.dimse.processes
    if settings.dicomweb.enabled:
        roles.append("web")
    if settings.inference.enabled:
        roles += ["worker"] * settings.inference.workers
    if settings.delivery.enabled or settings.webhooks or settings.dimse.enabled:  # it also answers requests for storage commitment
        roles.append("courier")
    roles.append("mover")
    return roles


def _await_ports(settings: Settings, stop: threading.Event) -> None:
    deadline = time.monotonic() + PORT_WAIT_S
    while faults := _taken(settings):
        if stop.is_set() or time.monotonic() > deadline:
            raise StartError(*faults)
        stop.wait(0.2)


def _taken(settings: Settings) -> list[str]:
    faults = []
    for name, section in (("dimse", settings.dimse), ("dicomweb", settings.dicomweb), ("admin", settings.admin)):
        if not section.enabled or section.port == 0:
            continue
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(section.host, section.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            faults.append(f"{name}.port: {section.host}:{section.port} cannot be listened on ({error.strerror}); "
                          f"stop what uses it, or choose another port")  # fmt: skip
    return faults


def _supervise(settings: Settings, config_file: Path | None, parts: Storehouse, stop: threading.Event, cut: threading.Event) -> None:
    supervisor = Supervisor(roles=_roles(settings), config=config_file, on_exit=forget_process, silence_s=settings.node.silence_s)
    with served(settings, parts, supervisor.states):
        supervisor.run(stop, drain_s=settings.node.drain_s, on_ready=lambda: _say_ready(settings, config_file), cut=cut)
    log.info("node.stopped")


def _say_ready(settings: Settings, config_file: Path | None) -> None:
    log.info("node.ready")
    lines = ["", "The node is ready. Send a first image from a second terminal:", f"    {command_line('send --demo', config_file)}"]
    if settings.dimse.enabled:
        lines.append(f"    storescu -R -xy -aec {settings.dimse.ae_title} {settings.dimse.host} {settings.dimse.port} FILE.dcm")
    lines += ["and ask where it is:", f"    {command_line('trace UID', config_file)}", ""]
    if settings.dicomweb.enabled:
        lines.append(f"DICOMweb: http://{settings.dicomweb.host}:{settings.dicomweb.port}{settings.dicomweb.base_path}")
    if settings.admin.enabled:
        lines.append(f"Health and metrics: http://{settings.admin.host}:{settings.admin.port}/readyz and /metrics")
    lines += [f"Data: {settings.node.data_dir.resolve()} (encrypted; keep a copy of {settings.ring_file})", "Stop: Ctrl-C", ""]
    say("\n".join(lines))


# --- one role --------------------------------------------------------------------------------------------------------


def serve_role(settings: Settings, role: str, *, lifeline: int, status: int) -> None:
    """Run one role in this process until SIGTERM, SIGINT or the end of the parent.

    Parameters
    ----------
    lifeline, status
        Descriptors of the supervisor's pipes; -1 without a supervisor.

    Raises
    ------
    StartError
        No such role, or it cannot start.
    """
    if role not in ROLES:
        raise StartError(f"--role {role}: use one of {', '.join(ROLES)}")
    stop = stop_on_signals()
    end_in_time(stop, settings.node.drain_s + STOP_GRACE_S)
    alone = lifeline < 0
    if not alone:
        stop_with_parent(lifeline, stop)
    pipe = configure_logging(form=settings.logging.format, level=settings.logging.level, role=role)

    run: Callable[..., None] = {"dimse": _dimse, "web": _web, "worker": _worker, "courier": _courier, "mover": _mover}[role]
    with ExitStack() as stack:
        lock = _locked_folder(settings, shared=True) if alone else None
        if lock is not None:
            stack.callback(lock.close)
        try:
            if alone:
                _prepare(settings)
            parts = stack.enter_context(storage(settings))
            if lock is not None:
                stack.enter_context(_present(settings, parts, lock, end_at_once, role))
                parts.archive.sweep()

            metrics, state = Metrics(), {role: "starting"}
            pipe.counted_by(metrics.log_lines_dropped)
            if alone:
                stack.enter_context(served(settings, parts, lambda: {role: "stopping"} if stop.is_set() else state, alone=metrics.registry))

            def ready(*, degraded: bool = False) -> None:
                log.debug("process.ready")
                state[role] = "degraded" if degraded else "ready"
                if status >= 0:
                    give_signs_of_life(status, stop, parts.archive.check, well=DEGRADED if degraded else READY)

            run(settings, parts, metrics, stop, ready)
        except StorageError as error:
            raise StartError(str(error)) from error
        except OSError as error:
            raise StartError(f"{role}: {error.strerror or error}; check host and port of its section") from error


def _dimse(settings: Settings, parts: Storehouse, metrics: Metrics, stop: threading.Event, ready: Callable[[], None]) -> None:
    from dicom_node.dimse_door import dimse_door, watch_certificates

    with dimse_door(settings, parts, metrics) as scp:
        scp.start()
        gc.collect()
        gc.freeze()  # what was imported stays for good: collections that look at it again and again cost a tenth of the rate
        ready()
        threading.Thread(target=watch_certificates, args=(settings, stop, metrics.certificate), name="certificates", daemon=True).start()
        stop.wait()
        scp.stop(settings.node.drain_s)


def _web(settings: Settings, parts: Storehouse, metrics: Metrics, stop: threading.Event, ready: Callable[[], None]) -> None:
    from dicomweb.app import make_app  # only this role needs it
    from dicomweb.context import WebLimits
    from dicomweb.multipart import MultipartLimits
    from dicomweb.server import serve
    from storage.changes import ChangeFeed

    app = make_app(
        archive=parts.archive,
        index=parts.index,
        audit=parts.audit,
        base_path=settings.dicomweb.base_path,
        limits=WebLimits(multipart=MultipartLimits(parts=settings.limits.parts)),
        workers=settings.dicomweb.threads,
        node_ae_title=settings.dimse.ae_title,
        public_url=settings.dicomweb.public_url,
        trusted_proxy=settings.dicomweb.trusted_proxy,
        cors_origins=settings.dicomweb.cors_origins,
        changefeed=ChangeFeed(database=parts.database) if settings.dicomweb.changefeed else None,
        meter=metrics,
    )

    async def run() -> None:
        serving = await serve(app, host=settings.dicomweb.host, port=settings.dicomweb.port, drain_s=settings.node.drain_s)
        ready()
        await asyncio.to_thread(stop.wait)
        await serving.close()

    asyncio.run(run())


def _worker(settings: Settings, parts: Storehouse, metrics: Metrics, stop: threading.Event, ready: Callable[..., None]) -> None:
    from inference.errors import DeviceLost, InferenceError  # torch loads in workers alone
    from inference.pipeline import Pipeline
    from inference.report import CodingSchemes, build_reports
    from inference.runner import ModelRunner
    from inference.worker import Worker, nowhere

    def observe(event: str, **labels: Any) -> None:
        if event == "analysis.concluded":
            metrics.analysis(labels["outcome"])
            metrics.seconds("analyse", labels["seconds"])
        else:
            metrics.analysis(event.removeprefix("analysis."))

    threads = settings.inference.threads or max(1, (os.cpu_count() or 1) // settings.inference.workers)
    identity, installation_uid = node_identity(parts)
    schemes = CodingSchemes(settings.reports.private_scheme, settings.reports.icd11_scheme, settings.reports.icd11_release)
    reach = failpoint_from_environment(os.environ)
    try:
        runner = ModelRunner(model_bundles(settings), threads=threads, device=settings.inference.device, fall_back=True, reach=reach)
        pipeline = Pipeline(model=runner, profile=settings.node.profile, max_frames=settings.limits.frames, observe=metrics.seconds)
    except InferenceError as error:
        raise StartError(f"inference.bundles: {error}") from error
    worker = Worker(
        archive=parts.archive,
        index=parts.index,
        queue=parts.queue,
        pipeline=pipeline,
        reports=partial(build_reports, node=identity, schemes=schemes),
        installation_uid=installation_uid,
        deliver_to=routing(settings, parts.peers).destinations if settings.delivery.enabled else nowhere,
        max_pixels=settings.limits.pixels,
        max_bytes=settings.limits.object_bytes,
        reach=reach,
        heartbeat_s=settings.node.lease_s / 3,
        wait=parts.database.changed,
        observe=observe,
    )
    metrics.stand_in(settings.inference.device, used=bool(runner.fault))
    if runner.fault:
        log.error(
            "worker.degraded",
            reason=runner.fault,
            effect="it computes on the CPU, slower",
            remedy="mend the device and start the node again, or set [inference] device to auto or cpu",
        )
    ready(degraded=bool(runner.fault))
    try:
        worker.run(stop)
    except DeviceLost as error:
        effect = "the picture was given back, and the worker ends; another takes its place"
        log.error("worker.device_lost", reason=str(error), effect=effect)  # noqa: TRY400 - a sentence for a person
        stop.set()  # so that it ends in time whatever the driver does yet
        raise SystemExit(1) from error


def _courier(settings: Settings, parts: Storehouse, metrics: Metrics, stop: threading.Event, ready: Callable[[], None]) -> None:
    from dicom_node.courier import Courier
    from dicom_node.dimse.scu import StorageSCU
    from dicom_node.dimse_door import commitment_clerk

    def observe(event: str, **labels: Any) -> None:
        metrics.delivery(peer=labels["peer"], outcome=event.removeprefix("delivery."))
        if "seconds" in labels:
            metrics.seconds("deliver", labels["seconds"])

    with ThreadPoolExecutor(1, thread_name_prefix="webhooks") as pool:
        sending = pool.submit(_webhooks(settings, parts, metrics).run, stop) if settings.webhooks else None
        if sending is not None:
            sending.add_done_callback(lambda _: stop.set())  # should it end by a fault, the process ends and the supervisor makes another
        try:
            ready()
            if settings.delivery.enabled or settings.dimse.enabled:
                reach = failpoint_from_environment(os.environ)
                tls = client_tls(settings)
                sender = StorageSCU(ae_title=settings.dimse.ae_title, answer_s=settings.delivery.timeout_s, tls=tls)
                Courier(
                    archive=parts.archive,
                    queue=parts.queue,
                    peers=parts.peers,
                    sender=sender if settings.delivery.enabled else None,
                    clerk=commitment_clerk(settings, parts, reach=reach, metrics=metrics),
                    reach=reach,
                    heartbeat_s=settings.node.lease_s / 3,
                    wait=parts.database.changed,
                    observe=observe,
                ).run(stop)
            stop.wait()
        finally:
            stop.set()  # or the process would live on with webhooks and no courier
        if sending is not None:
            sending.result()


def _webhooks(settings: Settings, parts: Storehouse, metrics: Metrics) -> WebhookSender:
    from dicom_node.webhooks import Webhook, WebhookSender
    from storage.changes import KINDS

    def observe(event: str, **labels: Any) -> None:
        metrics.webhook(subscriber=labels["subscriber"], outcome=event.removeprefix("webhook."))

    hooks = []
    for index, hook in enumerate(settings.webhooks):
        signing = tuple(secret.get_secret_value() for secret in hook.secrets)
        try:
            hooks.append(
                Webhook(
                    name=hook.name,
                    url=hook.url,
                    secrets=signing,
                    kinds=frozenset(hook.kinds) or KINDS,
                    ca_file=hook.ca_file,
                    from_beginning=hook.from_beginning,
                )
            )
        except ValueError as error:
            raise StartError(f"{entry('webhooks', index, {'name': hook.name})}, {error}") from error
    return WebhookSender(
        database=parts.database,
        audit=parts.audit,
        webhooks=hooks,
        holder=f"{parts.node_id} {os.getpid()} {secrets.token_hex(4)}",
        reach=failpoint_from_environment(os.environ),
        observe=observe,
    )


def _mover(settings: Settings, parts: Storehouse, metrics: Metrics, stop: threading.Event, ready: Callable[[], None]) -> None:
    from dicom_node.audit_sink import sending
    from storage.duties import Duties
    from storage.mover import Mover

    def observe(event: str, **labels: Any) -> None:
        metrics.moved(event.rpartition(".")[2], labels.get("byte_count", 0))
        if "seconds" in labels:
            metrics.seconds("archive", labels["seconds"])

    def done(_event: str, **labels: Any) -> None:
        metrics.duty(labels["duty"].partition(" ")[0], "failed" if labels["failed"] else "done")

    holder = f"{parts.node_id} {os.getpid()} {secrets.token_hex(4)}"
    reach = failpoint_from_environment(os.environ)
    caretaker = parts.archive.caretaker(
        duties=Duties(database=parts.database, holder=holder),
        scrub_days=settings.care.scrub_days,
        scrub_bytes_per_s=settings.care.scrub_bytes_per_s,
        orphan_grace=timedelta(hours=settings.care.orphan_grace_hours),
        retention_days=settings.care.retention_days,
        observe=done,
    )
    mover = Mover(
        archive=parts.archive,
        queue=parts.queue,
        at_once=settings.archive.movers,
        bytes_per_s=settings.archive.mover_bytes_per_s,
        heartbeat_s=settings.node.lease_s / 3,
        wait=parts.database.changed,
        reach=reach,
        observe=observe,
    )
    auditing = sending(settings, parts, holder=holder, stop=stop, reach=reach, observe=metrics.audit)
    with auditing, ThreadPoolExecutor(1, thread_name_prefix="caretaker") as pool:
        caring = pool.submit(caretaker.run, stop)
        caring.add_done_callback(lambda _: stop.set())  # should it end by a fault, the process ends and the supervisor makes another
        try:
            ready()
            mover.run(stop)
        finally:
            stop.set()  # or the process would live on with a caretaker and no mover
        caring.result()


def node_identity(parts: Storehouse) -> tuple[NodeIdentity, str]:
    """Return who we are in reports: the equipment, and the Device Observer UID, both stable for an installation (its key ring)."""
    from inference.report import NodeIdentity
    from inference.report.identity import derived_uid

    secret = parts.ring.derive("installation").hex()
    uid = derived_uid("installation", secret)
    return NodeIdentity("dicom-node", "dicom-node", version("dicom-node"), uid[-16:]), uid


def routing(settings: Settings, peers: Peers) -> Routing:
    """Make the routes of the configuration."""
    made = Routing(peers=peers, routes=[Route(route.from_, route.to) for route in settings.routes])
    for name in made.nobodys():
        log.warning("route.nobody", peer=name, reason=ABSENT.format(name=name))
    return made
