"""Commands of those who look after the archive: nodes, duties, legal holds, erasure, quarantine, moving the database."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from dicom_node.config import Settings
from dicom_node.console import ConfigOption, err, fail, faults_as_sentences, print_rows, progress_bar, runnable, settings_of
from storage.actor import operator
from storage.records import AuditEvent

hold_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Legal holds: studies that neither retention nor an operator may erase."
)
quarantine_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Instances put aside: their UID was known with other content, or another patient."
)
nodes_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="The nodes that share the database.")


StudyArgument = Annotated[str, typer.Argument(help="Study Instance UID.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the audit trail.")]
NumberArgument = Annotated[int, typer.Argument(help="Its number, as `quarantine list` shows it.")]


@nodes_app.callback()
def nodes(context: typer.Context, config_file: ConfigOption = None) -> None:
    """List the nodes that share the database, when each was seen last, and how many objects lie on its disk alone."""
    from dicom_node import storehouse
    from storage.nodes import Lying

    if context.invoked_subcommand is not None:
        if config_file is not None:
            context.default_map = {context.invoked_subcommand: {"config_file": str(config_file)}}
        return
    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        lying, now = parts.nodes.lying(), parts.database.clock()
        rows = []
        for one in parts.nodes.all():
            seen = f"{one.seen_at:%Y-%m-%d %H:%M:%S}" if one.state == "seen" else one.state
            ahead = " (ahead: a clock is wrong)" if one.state == "seen" and one.seen_at > now + timedelta(minutes=1) else ""
            its = lying.pop(one.node_id, Lying())
            mark = " *" if one.node_id == parts.node_id else ""
            started, clock = f"{one.started_at:%Y-%m-%d %H:%M:%S}", f"{one.clock_ahead.total_seconds():+.1f} s"
            rows.append(
                (one.node_id + mark, one.host, one.version, started, seen + ahead, clock, *map(str, (its.waiting, its.lost, one.data_dir)))
            )
        rows += [(node_id, "?", "?", "?", "not registered", "?", str(its.waiting), str(its.lost), "?") for node_id, its in lying.items()]
        print_rows(("node", "host", "version", "started", "seen", "clock", "to bring", "lost", "data folder"), rows)
        told = "* this node; times are UTC; clock: against the database server's; to bring: objects that lie on its disk alone yet"
        err.print(told, style="dim")


@nodes_app.command("lost")
def nodes_lost(
    node_id: Annotated[str, typer.Argument(help="Its id, as `nodes` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Declare that a node and its disk never come back: what lay there alone is looked for, and recorded as lost where it is nowhere."""
    from dicom_node import storehouse
    from storage.loss import Loss
    from storage.nodes import Lying

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        its = parts.nodes.lying().get(node_id, Lying())
        if not yes and not typer.confirm(
            f"Declare node {node_id} lost? {its.waiting} objects lie on its disk alone. If the disk lives, mount it elsewhere instead",
            err=True,
        ):
            raise typer.Exit(1)
        loss = Loss(
            database=parts.database,
            index=parts.index,
            queue=parts.queue,
            audit=parts.audit,
            places=parts.archive.places,
            nodes=parts.nodes,
        )
        with progress_bar("looking for its objects") as progress:
            losses = loss.declare(node_id, actor=operator(), progress=progress)
        typer.echo(f"node {node_id} is declared lost: {losses}")
        if losses.lost:
            typer.echo("Have the lost instances sent again: what arrives takes their place. The audit trail names them (instance.lost).")


def duties(config_file: ConfigOption = None) -> None:
    """List what the nodes do by themselves from time to time: when it was done last, how it ended, when it is due."""
    from dicom_node import storehouse
    from storage.duties import Duties

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        print_rows(
            ("duty", "last round ended", "due", "under way at", "outcome"),
            [
                (
                    duty.name,
                    f"{duty.finished_at:%Y-%m-%d %H:%M:%S}" if duty.finished_at else "never",
                    f"{duty.due_at:%Y-%m-%d %H:%M:%S}",
                    duty.holder,
                    runnable(duty.outcome),
                )
                for duty in Duties(database=parts.database, holder="").all()
            ],
        )


@hold_app.command("place")
def hold_place(study_instance_uid: StudyArgument, reason: ReasonOption, config_file: ConfigOption = None) -> None:
    """Put a study under hold, whether or not it is here yet."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        new = parts.holds.place(study_instance_uid, reason=reason, actor=operator())
        typer.echo("under hold" if new else "it was under hold already; nothing was changed")


@hold_app.command("lift")
def hold_lift(study_instance_uid: StudyArgument, reason: ReasonOption, config_file: ConfigOption = None) -> None:
    """End the hold of a study."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        if not parts.holds.lift(study_instance_uid, reason=reason, actor=operator()):
            raise fail("this study is not under hold; `dicom-node hold list` shows those that are")
        typer.echo("the hold is lifted")


@hold_app.command("list")
def hold_list(config_file: ConfigOption = None) -> None:
    """List the studies under hold."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        for hold in parts.holds.all():
            typer.echo(f"{hold.study_instance_uid}  since {hold.placed_at:%Y-%m-%d %H:%M:%S} UTC by {hold.placed_by}: {hold.reason}")


def erase(
    reason: ReasonOption,
    study: Annotated[str, typer.Option("--study", help="Study Instance UID.", show_default=False)] = "",
    patient: Annotated[str, typer.Option("--patient", help="Patient ID: every study of the patient.", show_default=False)] = "",
    issuer: Annotated[str, typer.Option("--issuer", help="Issuer of the Patient ID, if there is one.", show_default=False)] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Erase a study or a patient for good: rows, objects of every version, and the keys, so that no copy anywhere opens any more."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        if bool(study) == bool(patient):
            raise fail("name a study by --study, or a patient by --patient")
        what = f"study {study}" if study else f"every study of patient {patient}"
        if not yes and not typer.confirm(f"Erase {what}? It cannot be undone", err=True):
            raise typer.Exit(1)
        erasure = parts.archive.erasure()
        if study:
            erased = erasure.erase_study(study, actor=operator(), reason=reason)
        else:
            erased = erasure.erase_patient(patient, issuer, actor=operator(), reason=reason)
        if not erased.instances and not erased.objects:
            typer.echo(f"{what} was erased before: what a crash had left of it was deleted now")
            return
        typer.echo(
            f"{len(erased.study_instance_uids)} studies, {erased.instances} instances, {len(erased.study_key_ids)} study keys erased; "
            "backups of the database keep the wrapped keys until they are gone themselves (docs/operations.md)"
        )
        if not erased.complete:
            raise fail(f"{erased.left} objects or documents could not be deleted now; their keys are gone, the sweep deletes the rest")


@quarantine_app.command("list")
def quarantine_list(config_file: ConfigOption = None) -> None:
    """List what was put aside, oldest first."""
    from dicom_node import storehouse, tracing

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        kept = parts.archive.quarantine().all()
        for one in kept:
            for line in tracing.quarantined(one):
                typer.echo(line)
        err.print(f"{len(kept)} in quarantine", style="dim")


@quarantine_app.command("show")
def quarantine_show(number: NumberArgument, config_file: ConfigOption = None) -> None:
    """Show one, beside the archived instance of its UID."""
    from dicom_node import storehouse, tracing

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        one, archived = parts.archive.quarantine().show(number)
        for line in tracing.beside(one, archived):
            typer.echo(line)


@quarantine_app.command("accept")
def quarantine_accept(number: NumberArgument, reason: ReasonOption, config_file: ConfigOption = None) -> None:
    """Archive it in the place of the instance of its UID, which is put aside in its stead; it is analysed anew."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        record = parts.archive.quarantine().accept(number, actor=operator(), reason=reason)
        typer.echo(f"accepted: {record.summary.sop_instance_uid}")
        for one in parts.archive.quarantine().all():
            if one.record.summary.sop_instance_uid == record.summary.sop_instance_uid:
                typer.echo(f"what was archived until now is number {one.id} in quarantine: {one.reason}")


@quarantine_app.command("drop")
def quarantine_drop(
    number: NumberArgument,
    reason: ReasonOption,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Delete it for good."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        if not yes and not typer.confirm(f"Delete number {number} of the quarantine? It cannot be undone", err=True):
            raise typer.Exit(1)
        parts.archive.quarantine().drop(number, actor=operator(), reason=reason)
        typer.echo("deleted")


def migrate(
    to: Annotated[Path, typer.Option("--to", help="Configuration file whose [database] is the new one; it must be empty.")],
    config_file: ConfigOption = None,
) -> None:
    """Move index, queue and audit trail into another database, for example from SQLite to PostgreSQL; the node may run.

    While it copies, senders are told to try again. At the end the old database refuses every use: start the node with the new
    configuration. The ring moves with it: its copy has to be in the new place before.
    """
    from dicom_node import storehouse
    from storage.audit import AuditTrail
    from storage.copying import move_database
    from storage.keys import Ring

    with faults_as_sentences():
        old, new = settings_of(config_file), settings_of(to)
        ring = Ring.load(old.ring_file)
        if not new.ring_file.exists():
            raise fail(f"there is no key ring at {new.ring_file}: copy {old.ring_file} there; what is archived opens with that ring alone")
        moved = Ring.load(new.ring_file)
        if moved.database_key() != ring.database_key():
            raise fail(f"{new.ring_file} is another ring: put a copy of {old.ring_file} there; what is archived opens with that ring alone")
        source, target = storehouse.open_database(old, ring), storehouse.open_database(new, moved)
        try:
            target.migrate()
            with progress_bar("moving") as progress:
                counted = move_database(source, target, lambda _table, rows: progress(rows, None))
            detail = {"from": _called(old), "to": _called(new), "rows": sum(counted.values())}
            AuditTrail(database=target).record(AuditEvent(action="archive.moved", outcome="success", actor=operator(), detail=detail))
        finally:
            source.close()
            target.close()
        for name, rows in counted.items():
            typer.echo(f"{rows:>9}  {name}")
        typer.echo(f"every table compared. The old database is retired: stop the node, and start it with --config {to}")


def _called(settings: Settings) -> str:
    """Return what the database of a configuration is called in the audit trail: no password, nor what else stands behind the name."""
    from sqlalchemy import make_url

    from dicom_node.storehouse import database_file

    if not settings.database.url:
        return str(database_file(settings))
    url = make_url(settings.database.url)
    return f"{url.database} of {url.host or 'this machine'}"


def retention(
    confirm_clock: Annotated[bool, typer.Option("--confirm-clock", help="Say that the clock is right, where retention doubts it.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """List the studies that retention would erase now, and changes nothing. The duty of that name erases them (care.retention_days)."""
    from dicom_node import storehouse
    from storage.duties import Duties

    with faults_as_sentences():
        settings = settings_of(config_file)
        if not settings.care.retention_days:
            typer.echo("care.retention_days is 0: nothing is ever erased by itself")
            return
        with storehouse.storage(settings) as parts:
            judge = parts.archive.retention(days=settings.care.retention_days)
            duties = Duties(database=parts.database, holder=operator())
            if confirm_clock:
                duties.put("retention", cursor=judge.confirm_clock(actor=operator()))
                typer.echo("noted: what is due now is erased at the next round, within a minute")
            count = 0
            for due in judge.due():
                typer.echo(f"{due.study_instance_uid}  newest instance {due.newest_at:%Y-%m-%d}  {due.instances} instances")
                count += 1
            err.print(f"{count} due", style="dim")
            if doubt := judge.doubt(judge.noted(next((duty.cursor for duty in duties.all() if duty.name == "retention"), ""))):
                raise fail(doubt)


def backup(
    folder: Annotated[Path, typer.Argument(help="Where to; the same folder again brings it up to date.")],
    with_ring: Annotated[
        bool, typer.Option("--with-ring", help="Put the key ring beside it: then whoever has the folder can read everything.")
    ] = False,
    keep: Annotated[int, typer.Option(min=1, help="How many copies of the database are kept.")] = 7,
    verify: Annotated[bool, typer.Option("--verify", help="Read every object that is there already; else a sixteenth of them.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Copy the database, and the objects of a folder store, while the node runs; encrypted as they are, objects incrementally."""
    from dicom_node import storehouse
    from storage.backup import back_up

    with faults_as_sentences(), storehouse.storage(settings := settings_of(config_file)) as parts:
        with progress_bar("backing up") as progress:
            made = back_up(
                folder,
                database=parts.database,
                index=parts.index,
                store=parts.store,
                ring=parts.ring,
                spool=parts.spool,
                data_dir=settings.node.data_dir,
                with_ring=with_ring,
                keep=keep,
                verify=verify,
                progress=lambda _what, done: progress(done, None),
            )
        detail = {
            "folder": str(folder),
            "objects": made.objects,
            "with_ring": with_ring,
            "verified": made.verified,
            "mended": len(made.mended),
            "removed": made.removed,
        }
        parts.audit.record(AuditEvent(action="archive.backed_up", outcome="success", actor=operator(), detail=detail))
        objects = (
            f"{made.objects} objects stay in the bucket" if parts.store.remote else f"{made.objects} objects ({made.copied} copied now)"
        )
        typer.echo(f"{folder}: {made.database}, {objects}, {made.landed} landed")
        if not with_ring:
            typer.echo(f"The key ring is not in it: keep a copy of {parts.ring.path} elsewhere.")
        if made.verified or made.removed:
            typer.echo(f"{made.verified} objects that were there read again; {made.removed} removed that no kept database names")
        for object_key in made.mended:
            err.print(f"object {object_key} was damaged in the backup; it was copied anew: look after that disk", style="bold red")
        for object_key in made.damaged:
            err.print(f"object {object_key} is not what was archived; it was not copied", style="bold red")
        if made.damaged:
            raise fail(f"{len(made.damaged)} objects are damaged: `dicom-node verify` says more")


def restore(
    folder: Annotated[Path, typer.Argument(help="What `backup` wrote.")],
    config_file: ConfigOption = None,
) -> None:
    """Bring the newest backup into an empty data folder or database, take in what the store got since, and verify all of it."""
    from dicom_node import node, tracing
    from storage.backup import newest, restore_ring
    from storage.backup import restore as bring_back

    with faults_as_sentences():
        settings = settings_of(config_file)
        newest(folder)
        if not settings.ring_file.exists():
            restore_ring(folder, settings.ring_file)
        with node.alone(settings) as parts:
            with progress_bar("restoring") as progress:
                found = bring_back(
                    folder,
                    database=parts.database,
                    store=parts.store,
                    ring=parts.ring,
                    index=parts.index,
                    queue=parts.queue,
                    progress=lambda _what, done: progress(done, None),
                )
            typer.echo(
                f"{found.rows} rows, {found.objects} objects, {found.documents} documents, {found.landed} landed objects brought back"
            )
            swept = parts.archive.orphans().sweep(grace=timedelta(), restored=True)
            typer.echo(f"taken in since the backup: {swept}")
            typer.echo("What was erased since the backup is here again: erase it again.")
            kept = parts.archive.quarantine().all()
            for one in kept:
                for line in tracing.quarantined(one):
                    typer.echo(line)
            if kept:
                typer.echo(f"{len(kept)} in quarantine, as the marks in the store say, or for what was archived first")
            with progress_bar("verifying") as progress:
                report = parts.archive.verify(progress=progress)
            for line in report.lines():
                typer.echo(runnable(line))
            parts.audit.record(
                AuditEvent(
                    action="archive.restored",
                    outcome="success" if report.intact and not found.lost else "incomplete",
                    actor=operator(),
                    detail={"folder": str(folder), "rows": found.rows, "objects": found.objects, "lost": len(found.lost)},
                )
            )
            if found.lost or not report.intact:
                raise fail(f"{len(found.lost)} objects are in neither backup nor store; the lines above say what else is missing")


def reindex(
    deliver: Annotated[
        bool, typer.Option("--deliver", help="Deliver every report again: what was delivered already nobody knows.")
    ] = False,
    config_file: ConfigOption = None,
) -> None:
    """Make index, keys and quarantine anew from the store and the ring alone, into an empty database. Killed, it goes on when run again."""
    from dicom_node import node

    with faults_as_sentences(), node.alone(settings_of(config_file)) as parts, progress_bar("reindexing") as progress:
        found = parts.archive.reindex(deliver=deliver).run(lambda _pass, done, total: progress(done, total))
    typer.echo(str(found))
    if found.unreadable or found.without_key:
        raise fail("some objects could not be opened; the lines above count them, the log names them")
