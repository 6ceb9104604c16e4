"""`dicom-node peers` and `dicom-node refusals`: who we talk with, while the node runs, and who was turned away."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.text import Text

from dicom_node.config import Settings, is_loopback
from dicom_node.console import ConfigOption, err, fail, faults_as_sentences, out, print_rows, runnable, settings_of
from dicom_node.peers import REPORT_KINDS, Peer, clashes, faults, merged
from storage.actor import operator

if TYPE_CHECKING:
    from dicom_node.storehouse import Storehouse
    from storage.known_peers import KnownPeer, KnownPeers
    from storage.refusals import Refusal

peers_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The peers: who may call, and where reports go.")

NameArgument = Annotated[str, typer.Argument(help="Its name, as routes, logs and `peers list` call it.")]


def _known(parts: Storehouse) -> KnownPeers:
    from storage.known_peers import KnownPeers

    return KnownPeers(database=parts.database, audit=parts.audit)


def _configured(settings: Settings) -> list[Peer]:
    from dicom_node.storehouse import peers_of

    return list(peers_of(settings))


@dataclass(frozen=True, slots=True)
class _Listed:
    """The peers as they are now."""

    current: Mapping[str, Peer]
    added: Mapping[str, KnownPeer]
    """Of those, the ones that are not of the configuration."""
    passed_over: Mapping[str, str]
    """Name of an added one -> why it does not hold."""

    def named(self, name: str) -> Peer:
        if name in self.passed_over:
            raise fail(f"peer {name} was added and is passed over: {self.passed_over[name]}")
        if name not in self.current:
            raise fail(f"no peer is called {name}; known: {', '.join(self.current) or 'none'}")
        return self.current[name]


def _peers(settings: Settings, parts: Storehouse) -> _Listed:
    rows = _known(parts).all()
    configured = _configured(settings)
    current, passed_over = merged(configured, rows)
    names = {peer.name for peer in configured} | passed_over.keys()
    return _Listed(current, {one.name: one for one in rows if one.name not in names}, passed_over)


@peers_app.command("add")
def peers_add(
    name: NameArgument,
    ae_title: Annotated[str, typer.Option("--ae-title", help="Its AE title, as it calls itself.")],
    host: Annotated[str, typer.Option(help="Its address or host name; a network (10.20.0.0/16) or * for one that only calls.")] = "*",
    port: Annotated[int, typer.Option(help="Its port; 0: it is never called.")] = 0,
    store: Annotated[bool, typer.Option("--store/--no-store", help="It may store here.")] = True,
    retrieve: Annotated[bool, typer.Option("--retrieve/--no-retrieve", help="It may query and retrieve here.")] = True,
    deliver: Annotated[str, typer.Option(help="What it is sent of our results: sr,seg; empty: nothing.")] = ",".join(REPORT_KINDS),
    acknowledge: Annotated[str, typer.Option(help="What Success means for it: land or archive. Default: as [archive].")] = "",
    certificate: Annotated[str, typer.Option(help="Certificate it must show by TLS: SHA-256 fingerprint, or a name in it.")] = "",
    tls: Annotated[bool, typer.Option("--tls", help="Call it by TLS.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Ask it for storage commitment of our reports.")] = False,
    max_associations: Annotated[int, typer.Option(help="Associations it may hold here at once; 0: no quota of its own.")] = 0,
    config_file: ConfigOption = None,
) -> None:
    """Add a peer, without a restart: every process of every node knows it within two seconds."""
    from dicom_node import storehouse

    peer = Peer(
        name=name,
        ae_title=ae_title,
        host=host,
        port=port,
        accept=store,
        retrieve=retrieve,
        deliver=tuple(dict.fromkeys(filter(None, (kind.strip() for kind in deliver.split(","))))),
        max_associations=max_associations,
        certificate=_certificate(certificate),
        tls=tls,
        commit=commit,
        acknowledge=cast("Literal['', 'land', 'archive']", acknowledge),
    )
    with faults_as_sentences():
        settings = settings_of(config_file)
        if found := faults(peer):
            raise fail(*_sentences(found))
        configured = _configured(settings)

        def check(added: Sequence[KnownPeer]) -> None:
            if found := clashes(peer, [*configured, *_readable(added)]):
                raise _ClashError(*_sentences(found))

        with storehouse.storage(settings) as parts:
            try:
                _known(parts).add(peer.name, peer.settings(), actor=operator(), check=check)
            except _ClashError as error:
                raise fail(*error.args) from error
    typer.echo(f"peer {peer.name} added: {_in_words(peer)}. Every process knows it within two seconds.")
    for hint in _hints(peer, settings):
        err.print(Text(runnable(hint), style="dim"))


def _certificate(text: str) -> str:
    from dicom_node.security import certificate_setting

    try:
        return certificate_setting(text)
    except ValueError:
        return text  # `faults` says what is wrong with it


class _ClashError(Exception):
    """The peer cannot stand beside those that are there; one sentence each."""


def _readable(added: Sequence[KnownPeer]) -> Iterator[Peer]:
    for one in added:
        with suppress(ValueError):  # said in the log of every process; its name is taken all the same
            yield Peer.of_settings(one.name, one.settings)


def _sentences(found: Sequence[tuple[str, str]]) -> list[str]:
    options = {"name": "NAME", "accept": "--no-store"}
    return [f"{options.get(key) or '--' + key.replace('_', '-')}: {words}" for key, words in found]


def _in_words(peer: Peer) -> str:
    where = f" at {peer.host}" + (f" port {peer.port}" if peer.callable and peer.port else "") + (" by TLS" if peer.tls else "")
    may = [word for word, allowed in (("store", peer.accept), ("query and retrieve", peer.retrieve)) if allowed]
    return f"{peer.ae_title}{where}, may {' and '.join(may) or 'do nothing'} here"


def _hints(peer: Peer, settings: Settings) -> list[str]:
    hints = []
    if peer.callable and not peer.port:
        hints.append("it has no port, so nothing is sent to it; for reports remove it and add it again with --port")
    elif peer.callable:
        hints.append(f"does it answer?  `dicom-node peers echo {peer.name}`")
    if settings.dimse.enabled and is_loopback(settings.dimse.host) and not is_loopback(peer.host):
        hints.append(f"the node listens on {settings.dimse.host} alone; for calls from elsewhere set dimse.host and start it again")
    return hints


@peers_app.command("list")
def peers_list(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """List the peers of the configuration, and those that were added; when each associated last, and was refused last."""
    from dicom_node import storehouse
    from storage.refusals import Refusals
    from storage.visits import last_visits

    with faults_as_sentences():
        settings = settings_of(config_file)
        with storehouse.storage(settings) as parts:
            peers = _peers(settings, parts)
            refused, seen = Refusals(database=parts.database).last_of_peers(), last_visits(parts.database)
        told = [
            {
                "name": peer.name,
                **peer.settings(),
                "source": "added" if peer.name in peers.added else "configuration",
                "last_seen": seen[peer.name].last_at.isoformat() if peer.name in seen else None,
                "last_refused": refused[peer.name].isoformat() if peer.name in refused else None,
            }
            for peer in peers.current.values()
        ]
        if as_json:
            typer.echo(json.dumps(told, indent=2))
            return
        print_rows(
            ("name", "AE title", "host", "port", "stores", "retrieves", "is sent", "TLS", "source", "last seen", "last refused"),
            [
                (
                    peer.name,
                    peer.ae_title,
                    peer.host,
                    str(peer.port or "-"),
                    _yes(peer.accept),
                    _yes(peer.retrieve),
                    ",".join(peer.deliver) if peer.callable and peer.port else "-",
                    _yes(peer.tls),
                    str(row["source"]),
                    _moment(seen[peer.name].last_at) if peer.name in seen else "-",
                    _moment(refused.get(peer.name)) or "-",
                )
                for peer, row in zip(peers.current.values(), told, strict=True)
            ],
        )
        for name, reason in peers.passed_over.items():
            err.print(Text(runnable(f"{name} was added and is passed over: {reason}; `dicom-node peers remove {name}`"), style="dim"))
        if not peers.current:
            err.print(Text(runnable("none yet: `dicom-node peers add NAME --ae-title TITLE --host HOST --port PORT`"), style="dim"))


@peers_app.command("show")
def peers_show(name: NameArgument, config_file: ConfigOption = None) -> None:
    """Show everything about a peer: its settings, when it associated last, what waits for it, and what it was refused."""
    from dicom_node import storehouse
    from storage.refusals import Refusals
    from storage.visits import last_visits

    with faults_as_sentences():
        settings = settings_of(config_file)
        with storehouse.storage(settings) as parts:
            peers = _peers(settings, parts)
            peer, origin = peers.named(name), peers.added.get(name)
            waiting = _known(parts).waiting(name)
            seen = last_visits(parts.database).get(name)
            refused = Refusals(database=parts.database).all(limit=10, peer=name)
        for key, value in {"name": name, **peer.settings()}.items():
            shown = ", ".join(value) if isinstance(value, list) else _yes(value) if isinstance(value, bool) else str(value)
            typer.echo(f"{key + ':':<18}{shown or '-'}")
        source = "configuration" if origin is None else f"added {_moment(origin.added_at)} by {origin.added_by}"
        typer.echo(f"{'source:':<18}{source}")
        typer.echo(f"{'last seen:':<18}{f'{_moment(seen.last_at)} at {seen.address}' if seen is not None else '-'}")
        typer.echo(f"{'reports waiting:':<18}{waiting}")
        if refused:
            typer.echo("refused:")
            _print_refusals(refused)


@peers_app.command("echo")
def peers_echo(
    name: Annotated[str | None, typer.Argument(help="Its name.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="Every peer that can be called.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Verify the way to a peer (C-ECHO), and say what is wrong. `dicom-node doctor` looks at more."""
    from dicom_node import storehouse
    from dicom_node.dimse.scu import StorageSCU
    from dicom_node.errors import DeliveryError

    with faults_as_sentences():
        if (name is None) is not every:
            raise fail("name a peer, or use --all")
        settings = settings_of(config_file)
        with storehouse.storage(settings) as parts:
            peers = _peers(settings, parts)
            callable_ones = [peer for peer in peers.current.values() if peer.callable and peer.port]
            wanted = callable_ones if name is None else [peers.named(name)]
        scu = StorageSCU(ae_title=settings.dimse.ae_title, connect_s=5.0, answer_s=10.0, tls=storehouse.client_tls(settings))
        failed = 0
        for peer in wanted:
            try:
                scu.echo(peer)
            except DeliveryError as error:
                _verdict("no", f"{peer.name}: {error}")
                failed += 1
            else:
                _verdict("ok", f"{peer.name}: {peer.ae_title} at {peer.host} port {peer.port} answers C-ECHO")
        if failed:
            raise fail(f"{failed} of {len(wanted)} did not answer; `dicom-node doctor NAME` says more")


@peers_app.command("remove")
def peers_remove(name: NameArgument, config_file: ConfigOption = None) -> None:
    """Remove a peer that was added. Its associations under way go on; what waits for it stays, until a peer of that name is back."""
    from dicom_node import storehouse

    with faults_as_sentences():
        settings = settings_of(config_file)
        with storehouse.storage(settings) as parts:
            known = _known(parts)
            if not known.remove(name, actor=operator()):
                if any(peer.name == name for peer in _configured(settings)):
                    raise fail(f"peer {name} stands in the configuration; take its [[peers]] entry out there, and start the node again")
                raise fail(f"no peer is called {name}; `dicom-node peers list` shows which there are")
            waiting = known.waiting(name)
    typer.echo(f"peer {name} removed; every process forgets it within two seconds")
    if waiting:
        err.print(f"{waiting} report{'s wait' if waiting != 1 else ' waits'} for it, until a peer of that name is there again", style="dim")
    for route in settings.routes:
        if name in (*route.to, route.from_):
            err.print(f"the route from {route.from_} to {', '.join(route.to)} names it", style="dim")


def refusals(
    peer: Annotated[
        str | None, typer.Option("--peer", help="Of this peer alone; an AE title or an address will do.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Who was turned away at the DICOM door, why, and what helps: associations, presentation contexts, instances."""
    from dicom_node import storehouse
    from storage.refusals import Refusals

    with faults_as_sentences():
        with storehouse.storage(settings_of(config_file)) as parts:
            found = Refusals(database=parts.database).all(limit=limit, peer=peer)
        if as_json:
            typer.echo(json.dumps([_jsonable(one) for one in found], indent=2))
            return
        _print_refusals(found)
        if not found:
            err.print("nothing was refused" + (f" to {peer}" if peer else ""), style="dim")


def _print_refusals(found: Sequence[Refusal]) -> None:
    if not found:
        return
    rows = [(_moment(one.last_at), f"{one.count}x", one.kind, _who(one)) for one in found]
    header = ("last", "times", "refused", "to")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    out.print(Text("  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip(), style="bold"))
    for one, row in zip(found, rows, strict=True):
        out.print(Text("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))
        out.print(Text(f"    why: {one.reason}"))
        if one.remedy:
            out.print(Text(f"    do:  {runnable(one.remedy)}", style="green"))


def _who(refusal: Refusal) -> str:
    title = f"'{refusal.calling_ae_title}' " if refusal.calling_ae_title else ""
    return (f"{refusal.peer}: " if refusal.peer else "") + f"{title}at {refusal.address or 'an unknown address'}"


def _jsonable(refusal: Refusal) -> dict[str, Any]:
    return {**asdict(refusal), "first_at": refusal.first_at.isoformat(), "last_at": refusal.last_at.isoformat()}


def _verdict(mark: str, text: str) -> None:
    out.print(Text(f"{mark:>3}  ", style="green" if mark == "ok" else "bold red") + Text(runnable(text)))


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
