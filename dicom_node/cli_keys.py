"""`dicom-node keys`: the ring of wrapping keys, and changing them while the node runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dicom_node.console import ConfigOption, err, fail, faults_as_sentences, print_rows, progress_bar, runnable, settings_of
from storage.actor import operator
from storage.records import AuditEvent

if TYPE_CHECKING:
    from dicom_node.storehouse import Storehouse
    from storage.keys import KeyInfo

keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The ring of wrapping keys.")

KeyArgument = Annotated[str, typer.Argument(help="Its id, as `keys list` shows it.")]


@keys_app.command("init")
def keys_init(config_file: ConfigOption = None) -> None:
    """Make the key ring with a first key: in the file, or of AWS KMS if [keys] ring = "kms". The first start records it (keys.bound)."""
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
def keys_add(
    promote: Annotated[
        bool, typer.Option("--promote", help="Use it at once: for one node alone, where no other has a copy of the ring.")
    ] = False,
    config_file: ConfigOption = None,
) -> None:
    """Add a key, which wraps nothing before `keys promote`: every node needs it in its copy of the ring first."""
    from dicom_node import storehouse
    from storage.keys import Ring

    with faults_as_sentences():
        settings = settings_of(config_file)
        with storehouse.storage(settings) as parts:
            parts.audit.head()  # what cannot be recorded is not begun
            path = settings.ring_file
            key_id = Ring.add(path, storehouse.wrapping_key(settings), promote=promote)
            place = _one(path, key_id).place
            typer.echo(f"{path}: key {key_id} added{', and primary: running processes use it within a second' if promote else ''}.")
            _record(parts, "keys.added", key=key_id, place=place or "ring file", primary=promote)
        following = "`dicom-node keys rotate`" if promote else f"`dicom-node keys promote {key_id}`, then `dicom-node keys rotate`"
        typer.echo(
            runnable(
                f"Renew the copy in the safe place, and copy the ring to every node that shares the database. After that: {following}."
            )
        )


@keys_app.command("promote")
def keys_promote(key_id: KeyArgument, config_file: ConfigOption = None) -> None:
    """Make a key primary: it wraps from now on. Every node needs it in its copy of the ring before."""
    from dicom_node import storehouse
    from storage.keys import Ring

    with faults_as_sentences():
        settings = settings_of(config_file)
        with storehouse.storage(settings) as parts:
            parts.audit.head()
            path = settings.ring_file
            former = parts.ring.primary_key_id
            Ring.promote(path, key_id)
            typer.echo(f"{path}: key {key_id} is primary; running processes of this node use it within a second.")
            _record(parts, "keys.promoted", key=key_id, former=former)
        typer.echo(
            runnable(
                "Copy the ring to every node that shares the database, so that none goes on wrapping by the former one; then "
                "`dicom-node keys rotate`."
            )
        )


@keys_app.command("merge")
def keys_merge(
    file: Annotated[Path, typer.Argument(help="Another ring file.", exists=True, dir_okay=False)], config_file: ConfigOption = None
) -> None:
    """Take the keys of another ring file into this ring, as older ones: where keys were added on two nodes, or to a new ring."""
    from dicom_node import storehouse
    from storage.keys import Ring

    with faults_as_sentences(), ExitStack() as stack:
        settings = settings_of(config_file)
        parts = None
        if settings.database.url or storehouse.database_file(settings).exists():  # else the first start records the keys
            parts = stack.enter_context(storehouse.storage(settings))
            parts.audit.head()
        new = Ring.merge(settings.ring_file, file)
        typer.echo(f"{settings.ring_file}: {len(new)} keys taken from {file}{': ' if new else ''}{', '.join(new)}")
        if parts is not None and new:
            _record(parts, "keys.added", keys=new, file=str(file), primary=False)


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
        shown = Ring.shown(settings.ring_file)
        lacking = sorted((counts or {}).keys() - {key.key_id for key in shown})
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
                for key in shown
            ]
            + [(key_id, "?", "of another node", f"{(counts or {})[key_id]} study keys", "NOT in this ring") for key_id in lacking],
        )


@keys_app.command("rotate")
def keys_rotate(config_file: ConfigOption = None) -> None:
    """Re-wrap every study key by the primary key, while the node runs. Objects stay as they are. Killed, it goes on when run again."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        with progress_bar("re-wrapping") as progress:
            done = parts.study_keys.rotate(progress, put_document=parts.store.put_document, delete_document=parts.store.delete_document)
        _record(parts, "keys.rotated", primary=parts.ring.primary_key_id, re_wrapped=done)
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
    from storage.keys import Ring
    from storage.retirement import Retirement

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        parts.audit.head()  # what cannot be recorded is not begun
        gone = _one(parts.ring.path, key_id)
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
        typer.echo(f"{parts.ring.path}: key {key_id} removed. {_afterwards(gone, Ring.shown(parts.ring.path))}")
        _record(parts, "keys.removed", key=key_id, place=gone.place or "ring file", documents_re_wrapped=re_wrapped)


def _one(path: Path, key_id: str) -> KeyInfo:
    """Return what may be shown of a key; Unavailable when it is not in the ring."""
    from storage.errors import Unavailable
    from storage.keys import Ring

    for key in Ring.shown(path):
        if key.key_id == key_id:
            return key
    raise Unavailable(f"no key {key_id} is in the ring {path}: `dicom-node keys list` shows what is")


def _afterwards(gone: KeyInfo, left: Sequence[KeyInfo]) -> str:
    """Say what is to be done with a key that was removed."""
    copies = "Copy the ring to every node, and renew the copy in the safe place."
    if not gone.place:
        return f"{copies} Destroy the old copies when no backup needs it."
    if same := [key.key_id for key in left if key.place == gone.place]:
        return f"{copies} {gone.place} stays in use, as key {', '.join(same)}: do NOT delete it in the key service."
    return (
        f"{copies} {gone.place} is used by this ring no more: disable it in the key service, and delete it when no backup of database or "
        "ring needs it."
    )


def _record(parts: Storehouse, action: str, **detail: Any) -> None:
    from storage.ring_identity import SUBJECT

    parts.audit.record(AuditEvent(action=action, outcome="success", actor=operator(), subject=SUBJECT, detail=detail))
