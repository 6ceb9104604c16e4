"""`dicom-node trace` for people: what the archive knows of a UID, as lines that answer "where is my study?"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pydicom.uid import UID

from storage.index import QuarantinedInstance
from storage.records import InstanceRecord

Told = Mapping[str, Any]
HEADINGS = {"none": "not archived:", "erased": "erased:"}
STATES = {"ready": "waits", "claimed": "under way", "done": "done", "dead": "given up"}
DOORS = {"dimse": "C-STORE", "dicomweb": "STOW-RS", "node": "made here"}


def lines(found: Told) -> Iterator[str]:
    """Lay out what `Archive.trace` returned; `--json` shows all of it."""
    if found["level"] != "instance":
        yield f"{HEADINGS.get(found['level'], found['level'])} {found['uid']}"
    if found["erased"]:
        yield from _erased(found)
    for instance in found["instances"]:
        yield from _instance(instance)
    for kept in found["quarantined"]:
        yield f"  in quarantine since {_moment(kept['at'])}: {kept['reason']}"
        yield f"    from     {_received(kept['received'])}"
    if not found["instances"]:
        for event in found["audit"]:
            yield f"  {_moment(event['at'])}  {event['action']}: {event['outcome']} ({event['actor']})"


def _erased(found: Told) -> Iterator[str]:
    erased = found["erased"]
    study = "" if erased["study_instance_uid"] == found["uid"] else f" with its study {erased['study_instance_uid']}"
    count = f"{erased['instances']} instance{'s' if erased['instances'] != 1 else ''}"
    yield f"  erased    {_moment(erased['at'])} by {erased['actor']}{study}, {count}; its keys are destroyed"
    yield f"    reason    {erased['reason'] or 'none was given'}"
    if found["instances"]:
        yield "  what follows was received after that"


def quarantined(one: QuarantinedInstance) -> Iterator[str]:
    """Lay out one instance in quarantine."""
    summary, origin = one.record.summary, one.record.origin
    yield f"number {one.id}: instance {summary.sop_instance_uid}"
    yield f"  study     {summary.study_instance_uid}"
    sender = origin.calling_ae_title or origin.address
    how = f"by {DOORS.get(origin.door, origin.door)} from {sender}" if sender else DOORS["node"]
    yield f"  since     {one.quarantined_at:%Y-%m-%d %H:%M:%S} UTC, {how}"
    yield f"  object    {one.record.sealed.object_key}, digest {summary.sha256}"
    yield f"  reason    {one.reason}"


def beside(one: QuarantinedInstance, archived: InstanceRecord | None) -> Iterator[str]:
    """Lay out one instance in quarantine, and where it differs from the archived one of its UID."""
    yield from quarantined(one)
    if archived is None:
        yield "  archived  no instance of this UID"
        return
    yield f"  archived  received {archived.origin.received_at:%Y-%m-%d %H:%M:%S} UTC, digest {archived.summary.sha256}"
    ours, theirs = archived.summary, one.record.summary
    for name in ("sop_class_uid", "study_instance_uid", "series_instance_uid", "transfer_syntax_uid", "byte_count"):
        if getattr(ours, name) != getattr(theirs, name):
            yield f"  differs   {name}: archived {getattr(ours, name)}, in quarantine {getattr(theirs, name)}"
    for keyword in sorted(ours.attributes.keys() | theirs.attributes.keys()):
        mine, other = ours.attributes.get(keyword, ()), theirs.attributes.get(keyword, ())
        if mine != other:
            yield f"  differs   {keyword}: archived {' '.join(mine) or '(none)'}, in quarantine {' '.join(other) or '(none)'}"


def _instance(instance: Told) -> Iterator[str]:
    size = _size(instance["byte_count"])
    yield f"  instance {instance['sop_instance_uid']}"
    yield f"    is        {_name(instance['sop_class_uid'])}, {_name(instance['transfer_syntax_uid'])}, {size}"
    yield f"    of        study {instance['study_instance_uid']}, series {instance['series_instance_uid']}"
    if instance.get("source_sop_instance_uid"):
        yield f"    about     {instance['source_sop_instance_uid']}"
    yield f"    received  {_received(instance['received'])}"
    yield f"    sealed    object {instance['object']['key']} under study key {instance['object']['key_id']}"
    if instance["object"]["landed_on"]:
        node = instance["object"]["landed_on"]
        if {job["state"] for job in instance["jobs"] if job["kind"] == "archive"} == {"dead"}:
            yield f"    lost      it lay on the disk of node {node} alone: what was tried last says more"
        else:
            yield f"    lies on   the disk of node {node}, whose mover brings it into the store"
    yield f"    digest    {instance['digest']} (SHA-256 of the data set as received)"
    for job in instance["jobs"]:
        yield from _job(job)
    if instance["role"] == "source" and not any(job["kind"] == "analyse" for job in instance["jobs"]):
        yield "    analysis  none: not a colour photograph of a class that is analysed, or analysis is switched off"
    for report in instance["reports"]:
        yield f"    {report['kind']:<9} {report['sop_instance_uid']}, {_name(report['sop_class_uid'])}, {_size(report['byte_count'])}"
        for delivery in report["deliveries"]:
            yield f"      to {delivery['lane']}: {_delivery(delivery)}"
        if not report["deliveries"]:
            yield "      not sent: the sender is no peer that takes it, and no route named one (after adding one: requeue the analysis)"
    times = len(instance["audit"])
    yield f"    audit     {times} event{'s' if times != 1 else ''}; --json shows them"


def _job(job: Told) -> Iterator[str]:
    label = {"analyse": "analysis", "archive": "to store"}.get(job["kind"], job["kind"])
    result = job["result"]
    text = f"{STATES[job['state']]}, attempt {job['attempts']}" if job["attempts"] else STATES[job["state"]]
    if job["state"] == "done":
        text = f"{result.get('outcome', 'done')} at {_moment(job['finished_at'])}"
    yield f"    {label:<9} {text} (job {job['id']})"
    if job["reason"]:
        yield f"      last attempt: {job['reason']}"
    if job["state"] == "dead":
        yield f"      again {_again(job)}"
    for name, version in dict(result.get("models", {})).items():
        short, _, digest = str(version).partition(" sha256:")
        yield f"      model {name} {short} ({digest[:12]})"
    for failure in result.get("failures", ()):
        yield f"      without {failure}"


def _delivery(job: Told) -> str:
    if job["state"] == "done":
        return f"arrived {_moment(job['finished_at'])}, answered {job['result'].get('status', '')}"
    text = STATES[job["state"]] + (f" after {job['attempts']} attempt{'s' if job['attempts'] != 1 else ''}" if job["attempts"] else "")
    if job["state"] == "ready" and job["attempts"]:
        text += f", again at {_moment(job['available_at'])}"
    if job["reason"]:
        text += f": {job['reason']}"
    return text + (f"; again {_again(job)}" if job["state"] == "dead" else "")


def _again(job: Told) -> str:
    """Say how a dead job runs again; what was lost with a node cannot, whatever the operator says."""
    if dict(job["result"]).get("outcome") == "lost":
        return "when the instance is sent again: its object was lost with its node"
    return f"with: `dicom-node requeue {job['id']}`"


def _received(received: Told) -> str:
    sender = received["calling_ae_title"] or received["address"] or "this node"
    place = f" at {received['address']}" if received["address"] and received["calling_ae_title"] else ""
    peer = f", peer {received['peer']}" if received["peer"] else ", no configured peer" if received["door"] == "dimse" else ""
    user = f", user {received['user']}" if received.get("user") else ""
    return f"{_moment(received['at'])} by {DOORS.get(received['door'], received['door'])} from {sender}{place}{peer}{user}"


def _name(uid: str) -> str:
    return UID(uid).name


def _size(count: int) -> str:
    return f"{count} bytes" if count < 10_000 else f"{count / 1000:.0f} kB" if count < 10_000_000 else f"{count / 1e6:.0f} MB"


def _parsed(moment: Any) -> datetime:
    return datetime.fromisoformat(str(moment))


def _moment(moment: Any) -> str:
    return f"{_parsed(moment):%Y-%m-%d %H:%M:%S} UTC" if moment else "?"
