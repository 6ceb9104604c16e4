"""`dicom-node keys`: the ring of wrapping keys, and changing them while the node runs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from dicom_node.console import ConfigOption, err, fail, faults_as_sentences, print_rows, progress_bar, runnable, settings_of
from storage.records import AuditEvent

keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The ring of wrapping keys.")

KeyArgument = Annotated[str, typer.Argument(help="Its id, as `keys list` shows it.")]


@keys_app.command("init")
def keys_init(config_file: ConfigOption = None) -> None:
    """Make the key ring with a first key: in the file, or of AWS KMS if [keys] ring = "kms"."""
    from dicom_node.storehouse import database_file, folder, wrapping_key
    from storage.keys import Ring

    with faults_as_sentences():
        settings = settings_of(config_file)
        path = settings.ring_file
        if database_file(settings).exists():
            raise fail(
                f"{database_file(settings)} was made with another ring: put the copy of that ring to {path}; a new one opens nothing"
            )
        folder(path.parent)
        ring = Ring.create(path, wrapping_key(settings))
        typer.echo(f"{path}: made, key {ring.primary_key_id}. Keep a copy in a safe place: without it nothing stored here can be read.")


@keys_app.command("add")
def keys_add(config_file: ConfigOption = None) -> None:
    """Add a key and make it primary; what older keys wrapped stays readable. `keys rotate` then re-wraps that too."""
    from dicom_node.storehouse import wrapping_key
    from storage.keys import Ring

    with faults_as_sentences():
        settings = settings_of(config_file)
        path = settings.ring_file
        key_id = Ring.add(path, wrapping_key(settings))
        typer.echo(f"{path}: key {key_id} added; running processes of this node use it within a second.")
        typer.echo(
            runnable(
                "Renew the copy in the safe place, and give it to every node that shares the database, before `dicom-node keys rotate`."
            )
        )


@keys_app.command("promote")
def keys_promote(key_id: KeyArgument, config_file: ConfigOption = None) -> None:
    """Make a key of the ring primary: it wraps from now on."""
    from storage.keys import Ring

    with faults_as_sentences():
        path = settings_of(config_file).ring_file
        Ring.promote(path, key_id)
        typer.echo(f"{path}: key {key_id} is primary")


@keys_app.command("list")
def keys_list(config_file: ConfigOption = None) -> None:
    """List the keys of the ring (never the keys themselves), and how many study keys each wraps."""
    from dicom_node import storehouse
    from storage.errors import Unavailable
    from storage.keys import Ring

    with faults_as_sentences():
        settings = settings_of(config_file)
        try:
            with storehouse.storage(settings) as parts:
                counts: dict[str, int] | None = parts.study_keys.counts()
        except Unavailable as error:
            err.print(Text(runnable(f"how many study keys each wraps is not known: {error}"), style="dim"))
            counts = None
        print_rows(
            ("key", "made", "use", "wraps", "where"),
            [
                (
                    key.key_id,
                    f"{key.created_at:%Y-%m-%d %H:%M:%S}",
                    "primary" if key.primary else "older",
                    "?" if counts is None else f"{counts.get(key.key_id, 0)} study keys",
                    key.place or "ring file",
                )
                for key in Ring.shown(settings.ring_file)
            ],
        )


@keys_app.command("rotate")
def keys_rotate(config_file: ConfigOption = None) -> None:
    """Re-wrap every study key by the primary key, while the node runs. Objects stay as they are. Killed, it goes on when run again."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        with progress_bar("re-wrapping") as progress:
            done = parts.study_keys.rotate(progress, put_document=parts.store.put_document, delete_document=parts.store.delete_document)
        detail = {"primary": parts.ring.primary_key_id, "re_wrapped": done}
        parts.audit.record(AuditEvent(action="keys.rotated", outcome="success", actor="operator", detail=detail))
        typer.echo(
            runnable(
                f"{done} study keys re-wrapped by {parts.ring.primary_key_id}; older keys may now be removed: `dicom-node keys list`, "
                "`dicom-node keys remove KEY`"
            )
        )


@keys_app.command("remove")
def keys_remove(key_id: KeyArgument, config_file: ConfigOption = None) -> None:
    """Take a key out of the ring, once it wraps nothing any more; documents in the store that no row knows are re-wrapped before."""
    from dicom_node import storehouse
    from storage.retirement import Retirement

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        retirement = Retirement(
            database=parts.database,
            study_keys=parts.study_keys,
            ring=parts.ring,
            audit=parts.audit,
            store=parts.store,
            spool=parts.spool,
        )
        with progress_bar("looking through documents") as progress:
            re_wrapped = retirement.retire(key_id, progress=progress)
        detail = {"key": key_id, "documents_re_wrapped": re_wrapped}
        parts.audit.record(AuditEvent(action="keys.removed", outcome="success", actor="operator", detail=detail))
        typer.echo(f"{parts.ring.path}: key {key_id} removed. Destroy its copies when no backup needs it.")
