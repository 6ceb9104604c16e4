"""Logs and metrics: structlog to standard error, Prometheus counters shared by all processes of the node.

No patient attribute and no instance identifier goes into a log line: a processor drops the keys that could carry one, escapes
control characters and cuts long text (threats.md rows 39 and 89). Who saw what is the audit trail's matter, which is encrypted.

Nobody waits for the log: lines go through a `LogPipe`, and those that cannot be written are dropped and counted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.values import MultiProcessValue

from dicom_node.log_pipe import LogPipe, LogStream

FORBIDDEN_KEYS = frozenset(
    {
        "patient_name", "patient_id", "patient_birth_date", "accession_number", "study_description", "identifier", "data_set",
        "sop_instance_uid", "study_instance_uid", "series_instance_uid",
    }
)  # fmt: skip
LONGEST_VALUE = 500
COUNTER_BYTES = 262_144
"""Of each counter file; far more than all series of one process take."""
PACKAGES = ("dicomweb", "inference", "storage")
"""Ours that speak by the standard library, so that they know nothing of how a node writes its log."""
LINES_DROPPED, LINES_DROPPED_HELP = "dicom_node_log_lines_dropped", "Lines of the log that could not be written."
FLUSH_S = 1.0
"""How long a flush of standard error waits at most: who flushes has something to say before the process ends."""
LIBRARIES = ("aiohttp", "alembic", "asyncio", "boto3", "botocore", "pydicom", "pynetdicom", "s3transfer", "sqlalchemy", "urllib3")


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop what may name a patient, make every text one printable line."""
    for key in FORBIDDEN_KEYS & event.keys():
        event[key] = "(withheld)"
    for key, value in event.items():
        if isinstance(value, str) and key != "exception":
            # The exception text of a fault of ours may span lines; what a peer sent may not.
            clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in value[:LONGEST_VALUE])
            event[key] = clean + ("…" if len(value) > LONGEST_VALUE else "")
    return event


def _named(role: str) -> Any:
    """Make a processor that says which process speaks; not a context variable, since threads do not inherit those."""

    def name(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("role", role)
        return event

    return name


def configure_logging(*, form: str, level: str, role: str) -> LogPipe:
    """Set up logging for this process that serves; called once, from the command line.

    Whatever this process writes to standard error from now on goes through the pipe that is returned, warnings and tracebacks too.

    Parameters
    ----------
    form
        auto, json or console.
    role
        Bound to every line.
    """
    if sys.stderr is None:  # it was closed by whoever started the node
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        _named(role),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not console),
    ]
    # Plain tracebacks: the console's own ones print the local variables of every frame, keys and patient data among them.
    on_console = partial(structlog.dev.ConsoleRenderer, exception_formatter=structlog.dev.plain_traceback)
    renderer: Any = on_console(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer()
    closing: list[Any] = [redact, renderer] if console else [structlog.processors.format_exc_info, redact, renderer]
    number = logging.getLevelNamesMapping()[level.upper()]

    def lost_line(count: int) -> str:
        event: Any = {"event": "log.lines_lost", "lost": count, "reason": "what reads the log took or kept nothing for a while"}
        for processor in [*shared, *closing]:
            event = processor(None, "warning", event)
        return f"{event}\n"

    descriptor = sys.stderr.fileno()
    pipe = LogPipe(descriptor, lost_line=lost_line)
    sys.stderr.flush()
    sys.stderr = cast("TextIO", LogStream(pipe, descriptor=descriptor, flush_s=FLUSH_S))
    stream = cast("TextIO", LogStream(pipe, descriptor=descriptor, flush_s=0))
    structlog.configure(
        processors=[*shared, *closing],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *closing],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(number)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    return pipe


def say(text: str) -> None:
    """Write `text` to standard output, where the process does not wait for who reads it either; for once in a while.

    Standard output is for people; the log goes to standard error.
    """
    if sys.stdout is None:
        return
    sys.stderr.flush()  # what was logged before stands before it
    pipe = LogPipe(sys.stdout.fileno(), lost_line=lambda _: "")
    pipe.write(text)
    pipe.drain(FLUSH_S)


class Metrics:
    """The counters of one process.

    With ``folder`` the values are shared by all processes of the node through files there (prometheus_client's multi-process
    mode); :func:`prepare_metrics` must then have named the folder before prometheus_client was imported.
    """

    def __init__(self) -> None:
        _allocate("counter", "histogram")
        registry = CollectorRegistry()
        self._instances = Counter("dicom_node_instances", "Instances by door and outcome.", ["door", "outcome"], registry=registry)
        self._bytes = Counter("dicom_node_received_bytes", "Data set bytes of stored instances.", ["door"], registry=registry)
        self._associations = Counter("dicom_node_associations", "Associations by outcome.", ["outcome"], registry=registry)
        self._requests = Counter("dicom_node_http_requests", "HTTP requests by transaction and status.", ["transaction", "status"],
                                 registry=registry)  # fmt: skip
        self._analyses = Counter("dicom_node_analyses", "Analyses by outcome.", ["outcome"], registry=registry)
        self._deliveries = Counter(
            "dicom_node_deliveries", "Deliveries of reports by peer and outcome.", ["peer", "outcome"], registry=registry
        )
        self._webhooks = Counter("dicom_node_webhooks", "Posts by subscriber and outcome.", ["subscriber", "outcome"], registry=registry)
        self._audit = Counter("dicom_node_audit_records", "Audit records the repository took.", registry=registry)
        self._audit_failures = Counter("dicom_node_audit_failures", "Attempts to send it audit records that failed.", registry=registry)
        self._duties = Counter("dicom_node_duties", "Rounds of duties by outcome.", ["duty", "outcome"], registry=registry)
        self._moved = Counter("dicom_node_moved", "Objects brought into the store, or not, by outcome.", ["outcome"], registry=registry)
        self._moved_bytes = Counter("dicom_node_moved_bytes", "Bytes brought into the store.", registry=registry)
        self._dimse = Counter("dicom_node_dimse", "Queries, retrievals, commitments: what happened.", ["event"], registry=registry)
        self._stand_in = Gauge(
            "dicom_node_workers_on_stand_in", "Workers that compute on the CPU because another device cannot be used.", ["device"],
            registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        self._refusals = Counter("dicom_node_refusals_dropped", "Refusals that the diary could not take.", registry=registry)
        self._log_lines = Counter(LINES_DROPPED, LINES_DROPPED_HELP, registry=registry)
        self._certificates = Gauge(
            "dicom_node_certificate_seconds", "Until a certificate of ours ends.", ["of"], registry=registry, multiprocess_mode="livemin"
        )
        self._seconds = Histogram(
            "dicom_node_step_seconds", "Duration of the steps.", ["step"], registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )  # fmt: skip
        self.registry = registry

    def instance(self, *, door: str, outcome: str, byte_count: int = 0) -> None:
        """An instance was stored, was a duplicate, or was refused (outcome: the failure reason in hexadecimal)."""
        self._instances.labels(door, outcome).inc()
        if byte_count:
            self._bytes.labels(door).inc(byte_count)

    def association(self, outcome: str) -> None:
        """An association was accepted, rejected or aborted."""
        self._associations.labels(outcome).inc()

    def dimse(self, event: str) -> None:
        """Count a query, a retrieval, or a step of a storage commitment."""
        self._dimse.labels(event).inc()

    def stand_in(self, device: str, *, used: bool) -> None:
        """Note whether this worker computes on the CPU because the `device` asked for cannot be used."""
        _allocate("gauge_livesum")
        self._stand_in.labels(device).set(used)

    def refusals_dropped(self, count: int) -> None:
        """Count refusals that came faster than the diary is written, or while the database was away."""
        self._refusals.inc(count)

    def log_lines_dropped(self, count: int) -> None:
        """Count lines that the log lost."""
        self._log_lines.inc(count)

    def certificate(self, of: str, seconds: float) -> None:
        """Note for how long a certificate is good yet."""
        _allocate("gauge_livemin")
        self._certificates.labels(of).set(seconds)

    def request(self, *, transaction: str, status: int) -> None:
        """An HTTP request was answered."""
        self._requests.labels(transaction, str(status)).inc()

    def analysis(self, outcome: str) -> None:
        """An analysis ended."""
        self._analyses.labels(outcome).inc()

    def delivery(self, *, peer: str, outcome: str) -> None:
        """A report was delivered, refused, or could not be sent."""
        self._deliveries.labels(peer, outcome).inc()

    def webhook(self, *, subscriber: str, outcome: str) -> None:
        """Count a batch of changes that was posted, or could not be."""
        self._webhooks.labels(subscriber, outcome).inc()

    def audit(self, event: str, **labels: Any) -> None:
        """Count what the audit record repository took, or did not."""
        if event == "audit.sent":
            self._audit.inc(labels["records"])
        else:
            self._audit_failures.inc()

    def duty(self, duty: str, outcome: str) -> None:
        """Count a round of a duty."""
        self._duties.labels(duty, outcome).inc()

    def moved(self, outcome: str, byte_count: int = 0) -> None:
        """Count an object that the Mover brought into the store, or failed to."""
        self._moved.labels(outcome).inc()
        self._moved_bytes.inc(byte_count)

    def seconds(self, step: str, value: float) -> None:
        """A step took this long."""
        self._seconds.labels(step).observe(value)


def _allocate(*kinds: str) -> None:
    """Give the counter files of this process their blocks now: they are written through a memory map, where a full disk kills by SIGBUS."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return
    for kind in kinds:
        descriptor = os.open(Path(folder) / f"{kind}_{os.getpid()}.db", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, COUNTER_BYTES)
        finally:
            os.close(descriptor)


def prepare_metrics(folder: Path) -> None:
    """Let this process and its children share their counters; empties what an earlier run left."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for stale in folder.glob("*.db"):
        stale.unlink()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def lines_dropped_of_parent() -> Callable[[int], None]:
    """Give what counts the log's lost lines in the parent, which has no `Metrics`: it imported the library before it named the folder."""
    _allocate("counter")
    value = MultiProcessValue()("counter", LINES_DROPPED, f"{LINES_DROPPED}_total", (), (), LINES_DROPPED_HELP)  # type: ignore[no-untyped-call]
    add: Callable[[int], None] = value.inc
    return add


def forget_process(process_id: int) -> None:
    """Drop the gauges of a child that ended; its counters stay."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        mark_process_dead(process_id)  # type: ignore[no-untyped-call]


def exposition(gauges: Iterable[tuple[str, str, dict[str, str], float]], alone: CollectorRegistry | None = None) -> bytes:
    """The text of /metrics: the counters of all processes, and ``gauges`` as (name, help, labels, value) read just now.

    ``alone``: the counters of the only process, which shares them with none.
    """
    registry = alone or CollectorRegistry()
    if alone is None and os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    made: dict[str, Gauge] = {}
    now = CollectorRegistry()
    for name, text, labels, value in gauges:
        gauge = made.get(name)
        if gauge is None:
            gauge = made[name] = Gauge(name, text, sorted(labels), registry=now)
        (gauge.labels(**labels) if labels else gauge).set(value)
    return generate_latest(registry) + generate_latest(now)
