"""The DIMSE door of a configuration, and how we call peers: parts of the composition root."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from dicom_node.clerk import CommitmentClerk
from dicom_node.config import Settings, is_loopback
from dicom_node.dimse.commitment import CommitmentCaller, CommitmentSCP
from dicom_node.dimse.query import QuerySCP
from dicom_node.dimse.receive import ReceiveLimits
from dicom_node.dimse.retrieve import RetrieveSCP
from dicom_node.dimse.scp import StorageSCP, is_storage
from dicom_node.dimse.scu import StorageSCU
from dicom_node.dimse.slots import Slots
from dicom_node.errors import StartError
from dicom_node.identity import PASSCODE, TOKEN, Identities, Principal, User
from dicom_node.security import ServerTls
from dicom_node.storehouse import client_tls
from dicom_node.tokens import TokenKey, Tokens
from storage.audit_logins import Logins
from storage.commitment_check import CommitmentCheck
from storage.commitments import Commitments, Patience, Proofs
from storage.refusals import Refusals
from storage.visits import Visits

if TYPE_CHECKING:
    import threading

    from dicom_node.observability import Metrics
    from dicom_node.storehouse import Storehouse
    from storage.audit import AuditTrail

log = structlog.get_logger()

_WATCH_S = 3600.0


def server_tls(settings: Settings) -> ServerTls | None:
    """Make the TLS of the door; None without."""
    tls = settings.tls
    if not tls.enabled:
        return None
    if tls.certificate is None or tls.key is None:
        raise StartError("tls.certificate: TLS needs a certificate and its key; name both files")
    return ServerTls(tls.certificate, tls.key, authorities=tls.authorities, client=tls.client, revocations=tls.revocations)


def identities(settings: Settings, audit: AuditTrail) -> Identities | None:
    """Make what verifies user identities, and records them; None when they are not looked at."""
    section = settings.identities
    if section.mode == "ignore":
        return None
    keys = [TokenKey(key.kid, key.algorithm, key.file, key.issuer, key.audience, key.name_claim) for key in section.keys]
    users = [User(user.name, user.passcode_hash.get_secret_value()) for user in section.users]
    logins = Logins(audit=audit)

    def identified(principal: Principal, address: str) -> None:
        by = {PASSCODE: "passcode", TOKEN: "token"}.get(principal.kind, "name")
        logins.note(principal.name, address=address, by=by, issuer=principal.issuer)

    tokens = Tokens(keys, once=section.token_once) if keys else None
    return Identities(users, tokens=tokens, plaintext=section.plaintext, identified=identified)


def trusts_callers(settings: Settings) -> bool:
    """Whether callers that are no peer are let in."""
    return settings.dimse.accept_unknown_peers == "loopback" and is_loopback(settings.dimse.host)


def proofs(settings: Settings, parts: Storehouse) -> Proofs:
    """Make the register of the commitments that we ask of peers."""
    patience = Patience(answer_s=settings.delivery.commitment_answer_s)
    return Proofs(database=parts.database, audit=parts.audit, queue=parts.queue, index=parts.index, patience=patience)


def commitments(settings: Settings, parts: Storehouse) -> Commitments:
    """Make the register of the commitments that peers ask of us."""
    return Commitments(database=parts.database, audit=parts.audit, patience=Patience(wait_s=settings.dimse.commitment_wait_s))


def commitment_check(settings: Settings, parts: Storehouse) -> CommitmentCheck:
    """Make what reads instances again before they are committed."""
    return CommitmentCheck(
        index=parts.index,
        places=parts.archive.places,
        study_keys=parts.study_keys,
        audit=parts.audit,
        supported=partial(is_storage, unknown=settings.dimse.unknown_sop_classes),
    )


def commitment_clerk(settings: Settings, parts: Storehouse, *, reach: Callable[[str], None], metrics: Metrics) -> CommitmentClerk:
    """Make what sees to storage commitment, in the courier."""
    return CommitmentClerk(
        commitments=commitments(settings, parts),
        proofs=proofs(settings, parts),
        check=commitment_check(settings, parts),
        caller=CommitmentCaller(ae_title=settings.dimse.ae_title, answer_s=settings.delivery.timeout_s, tls=client_tls(settings)),
        peers=parts.peers,
        reach=reach,
        observe=lambda event, **_: metrics.dimse(event),
    )


@contextmanager
def dimse_door(settings: Settings, parts: Storehouse, metrics: Metrics) -> Iterator[StorageSCP]:
    """Make the door with all its services, not listening yet."""
    section = settings.dimse
    observe = partial(_observe, metrics)
    tls = server_tls(settings)
    diary = Refusals(database=parts.database, audit=parts.audit, lost=metrics.refusals_dropped)
    with diary as refusals, Visits(database=parts.database) as visits:
        services = (
            QuerySCP(
                database=parts.database,
                audit=parts.audit,
                ae_title=section.ae_title,
                unknown_peers=trusts_callers(settings),
                maximum_rows=section.find_rows,
                search_s=section.find_s,
                observe=observe,
            ),
            RetrieveSCP(
                database=parts.database,
                archive=parts.archive,
                audit=parts.audit,
                peers=parts.peers,
                sender=StorageSCU(ae_title=section.ae_title, answer_s=settings.delivery.timeout_s, tls=client_tls(settings)),
                unknown_peers=trusts_callers(settings),
                maximum_instances=section.retrieve_instances,
                search_s=section.find_s,
                observe=observe,
            ),
            CommitmentSCP(
                commitments=commitments(settings, parts),
                check=commitment_check(settings, parts),
                proofs=proofs(settings, parts),
                references=section.commitment_references,
                diary=refusals,
                observe=observe,
            ),
        )
        path = settings.node.data_dir / "run" / "associations"
        yield StorageSCP(
            archive=parts.archive,
            peers=parts.peers,
            ae_title=section.ae_title,
            host=section.host,
            port=section.port,
            maximum_associations=section.maximum_associations,
            accept_unknown_peers=trusts_callers(settings),
            unknown_sop_classes=section.unknown_sop_classes,
            association_requests_per_s=section.association_requests_per_s,
            association_request_burst=section.association_request_burst,
            limits=ReceiveLimits(handshake_s=section.handshake_s, idle_s=section.idle_s, minimum_bytes_per_s=section.minimum_bytes_per_s),
            message_bytes=settings.limits.object_bytes + 64 * 1024**2,
            services=services,
            slots=Slots(total=section.maximum_associations, path=path) if section.processes > 1 else None,
            tls=tls.context if tls is not None else None,
            certificate_ended=tls.ended if tls is not None else None,
            identities=identities(settings, parts.audit),
            identity_required=settings.identities.mode == "required",
            refusals=refusals,
            visited=visits.note,
            observe=observe,
        )


def watch_certificates(settings: Settings, stop: threading.Event, gauge: Callable[[str, float], None]) -> None:
    """Say in time that a certificate of ours ends, until `stop` is set; returns at once without TLS."""
    both = [(name, tls) for name, tls in (("door", server_tls(settings)), ("calls", client_tls(settings))) if tls is not None]
    while both:
        for name, tls in both:
            for warning in tls.warnings():
                log.warning("tls.certificate_ends", of=name, reason=warning)
            if (ends := tls.expires_at()) is not None:
                gauge(name, (ends - datetime.now(UTC)).total_seconds())
        if stop.wait(_WATCH_S):
            return


def _observe(metrics: Metrics, event: str, **labels: Any) -> None:
    kind, _, what = event.partition(".")
    if kind == "association":
        metrics.association(what)
    elif event == "instance.received":
        metrics.instance(door="dimse", outcome=labels["outcome"], byte_count=labels["byte_count"])
        metrics.seconds("receive", labels["seconds"])
    elif event == "instance.refused":
        metrics.instance(door="dimse", outcome=f"0x{labels['status']:04X}")
    elif kind == "instance":
        metrics.instance(door="dimse", outcome=what)
    else:
        metrics.dimse(event)
        if "seconds" in labels:
            metrics.seconds(kind, labels["seconds"])
