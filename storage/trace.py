"""Where is my study? All that the archive knows of a UID, as one tree that is ready for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage.errors import InstanceNotFound
from storage.records import InstanceRecord, Job, JobKind, Level, Query

if TYPE_CHECKING:
    from datetime import datetime

    from storage.audit import AuditTrail
    from storage.index import Index
    from storage.work import WorkQueue


def trace(uid: str, *, index: Index, queue: WorkQueue, audit: AuditTrail) -> dict[str, Any]:
    """Return the history of an instance, series or study.

    ``level`` is instance, series, study, erased for a study or an instance that was here and is no more, or none for a UID that was only
    ever refused or kept aside. ``erased`` is None, or says of the last erasure of the study: ``study_instance_uid``, ``at``, ``actor``,
    ``reason``, ``instances`` (how many went); with instances, they came again afterwards. ``instances`` holds for each
    received instance: identity, ``received`` (from whom, when, by which door), ``digest``, ``object`` (key, key id, sealed digest),
    ``jobs`` (states, attempts, reasons, results), ``reports`` (kind, models, their objects, and ``deliveries`` with proof) and ``audit``.
    A report stands under its source; asked by its own UID it stands alone, with ``source_sop_instance_uid``.

    Raises
    ------
    InstanceNotFound
        Nobody ever spoke of this UID here.
    """
    level, records = _records(uid, index)
    quarantined = [
        {"reason": kept.reason, "at": _time(kept.quarantined_at), **_identity(kept.record)}
        for kept in index.quarantined()
        if uid in (kept.record.summary.sop_instance_uid, kept.record.summary.series_instance_uid, kept.record.summary.study_instance_uid)
    ]
    own_events = [] if level == "instance" else _events(uid, audit)
    erased = _erased(uid if level in ("study", "none") else "", own_events, audit)
    if erased is not None and level == "none" and not quarantined:
        level = "erased"
    if not records and not quarantined and not own_events:
        raise InstanceNotFound("no study, series or instance of this UID was ever received here")
    by_uid = {record.summary.sop_instance_uid: record for record in records}
    under_source: set[str] = set()
    instances = []
    for record in records:
        if record.role == "report" and level != "instance":
            continue
        told = _instance(record, index, queue, audit)
        under_source.update(report["sop_instance_uid"] for report in told["reports"])
        instances.append(told)
    # Reports whose source lies in another study or series of the node.
    instances += [
        _instance(record, index, queue, audit)
        for record in records
        if record.role == "report" and level != "instance" and record.summary.sop_instance_uid not in under_source
    ]
    return {
        "uid": uid,
        "level": level,
        "instances": instances,
        "quarantined": quarantined,
        "erased": erased,
        "audit": own_events,
        "archived": len(by_uid),
    }


def _records(uid: str, index: Index) -> tuple[str, list[InstanceRecord]]:
    try:
        return "instance", [index.find(uid)]
    except InstanceNotFound:
        pass
    try:
        return "study", index.instances(uid)
    except InstanceNotFound:
        pass
    found = index.match(Query(level=Level.SERIES, keys={"SeriesInstanceUID": uid}))
    if not found:
        return "none", []
    records: list[InstanceRecord] = []
    for match in found:
        records += index.instances(match.attributes["StudyInstanceUID"][0], uid)
    return "series", records


def _erased(uid: str, events: list[dict[str, Any]], audit: AuditTrail) -> dict[str, Any] | None:
    """Tell of the erasure of a study, or of the one that an instance was of: its arrival names the study."""
    if not uid:
        return None
    named = [uid, *reversed([str(event["detail"]["study_instance_uid"]) for event in events if event["detail"].get("study_instance_uid")])]
    for study in dict.fromkeys(named):
        for event in reversed(events if study == uid else _events(study, audit)):
            if event["action"] == "study.erased":
                detail = event["detail"]
                told = {"reason": detail.get("reason", ""), "instances": detail.get("instances", 0)}
                return {"study_instance_uid": study, "at": event["at"], "actor": event["actor"], **told}
    return None


def _instance(record: InstanceRecord, index: Index, queue: WorkQueue, audit: AuditTrail) -> dict[str, Any]:
    uid = record.summary.sop_instance_uid
    told = _identity(record) | {
        "role": record.role,
        "jobs": [_job(job) for job in queue.jobs_of(uid)],
        "reports": [],
        "audit": _events(uid, audit),
    }
    if record.role == "report":
        told["source_sop_instance_uid"] = index.source_of(uid)
        return told
    for report in index.reports_of(uid):
        archived = index.find(report.sop_instance_uid)
        told["reports"].append(
            _identity(archived)
            | {
                "kind": report.kind,
                "models": dict(report.models),
                "deliveries": [_job(job) for job in queue.jobs_of(report.sop_instance_uid) if job.kind is JobKind.DELIVER],
                "audit": _events(report.sop_instance_uid, audit),
            },
        )
    return told


def _identity(record: InstanceRecord) -> dict[str, Any]:
    summary, origin = record.summary, record.origin
    return {
        "sop_instance_uid": summary.sop_instance_uid,
        "sop_class_uid": summary.sop_class_uid,
        "series_instance_uid": summary.series_instance_uid,
        "study_instance_uid": summary.study_instance_uid,
        "transfer_syntax_uid": summary.transfer_syntax_uid,
        "byte_count": summary.byte_count,
        "digest": summary.sha256,
        "received": {
            "door": origin.door,
            "at": _time(origin.received_at),
            "address": origin.address,
            "calling_ae_title": origin.calling_ae_title,
            "called_ae_title": origin.called_ae_title,
            "peer": origin.peer,
            "user": origin.user,
        },
        "object": {
            "key": record.sealed.object_key,
            "key_id": record.sealed.key_id,
            "byte_count": record.sealed.byte_count,
            "sha256": record.sealed.sha256,
            "landed_on": record.landed_on,
        },
    }


def _job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": str(job.kind),
        "state": str(job.state),
        "lane": job.lane,
        "attempts": job.attempts,
        "reason": job.reason,
        "result": dict(job.result),
        "created_at": _time(job.created_at),
        "first_claimed_at": _time(job.first_claimed_at),
        "available_at": _time(job.available_at),
        "finished_at": _time(job.finished_at),
    }


def _events(uid: str, audit: AuditTrail) -> list[dict[str, Any]]:
    return [
        {
            "at": _time(entry.at),
            "action": entry.event.action,
            "outcome": entry.event.outcome,
            "actor": entry.event.actor,
            "detail": dict(entry.event.detail),
        }
        for entry in audit.events_of(uid)
    ]


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
