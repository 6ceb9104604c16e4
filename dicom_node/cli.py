"""The command line. Results go to standard output, everything else to standard error; a fault is a sentence, not a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.text import Text

from dicom_node import config
from dicom_node.cli_archive import backup, duties, erase, hold_app, migrate, nodes_app, quarantine_app, reindex, restore, retention
from dicom_node.cli_keys import keys_app
from dicom_node.cli_peers import peers_app, refusals
from dicom_node.cli_users import users_app
from dicom_node.conformance import conformance
from dicom_node.console import ConfigOption, command_line, err, fail, faults_as_sentences, out, progress_bar, runnable, settings_of
from dicom_node.doctor import doctor
from dicom_node.errors import StartError
from storage.actor import operator
from storage.records import AuditEvent, JobKind

_MARKS = {True: ("ok", "green"), False: ("no", "bold red"), None: ("-", "yellow")}
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False,
                  help="A DICOM node for dermatology: archives encrypted, analyses, answers with Structured Reports.")  # fmt: skip
app.add_typer(keys_app, name="keys")
app.add_typer(peers_app, name="peers")
app.add_typer(users_app, name="users")
app.add_typer(hold_app, name="hold")
app.add_typer(quarantine_app, name="quarantine")
app.add_typer(nodes_app, name="nodes")


@app.command()
def serve(
    config_file: ConfigOption = None,
    role: Annotated[
        str | None, typer.Option(help="Run one role alone: dimse, web, worker, courier or mover. Default: all, supervised.")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Serve /metrics, /healthz and /readyz of this process on this port instead of admin.port.", show_default=False),
    ] = None,
    lifeline: Annotated[int, typer.Option(hidden=True)] = -1,
    status: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Run the node until SIGTERM or Ctrl-C."""
    from dicom_node import node  # the other commands should not pay for the doors

    with faults_as_sentences():
        settings = settings_of(config_file)
        if admin_port is not None:
            if not 0 < admin_port <= 65535:
                raise fail(f"--admin-port {admin_port}: use 1 to 65535")
            settings = settings.model_copy(update={"admin": settings.admin.model_copy(update={"port": admin_port})})
        try:
            if role is None:
                node.serve(settings, config_file)
            else:
                node.serve_role(settings, role, lifeline=lifeline, status=status)
        except StartError as error:
            if lifeline < 0:
                raise fail(*error.faults) from error
            # Under the supervisor this is a log line among others.
            for fault in error.faults:
                structlog.get_logger().error("process.cannot_start", reason=runnable(fault))
            raise typer.Exit(1) from error


@app.command()
def check(config_file: ConfigOption = None) -> None:
    """Check configuration and environment: every fault with its remedy."""
    from dicom_node.environment import findings

    with faults_as_sentences():
        settings = settings_of(config_file)
        failed = 0
        for finding in findings(settings):
            mark, style = _MARKS[finding.passed]
            out.print(Text(f"{mark:>3}  ", style=style) + Text(f"{finding.subject}: ", style="bold") + Text(runnable(finding.text)))
            failed += finding.passed is False
        if failed:
            raise fail(f"{failed} of the checks failed; the lines marked 'no' say what to do")


@app.command("config")
def config_command(
    config_file: ConfigOption = None,
    reference: Annotated[bool, typer.Option("--reference", help="Print the configuration reference (Markdown).")] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a configuration file with every key and its default.")] = False,
) -> None:
    """Print the configuration in force as JSON, the reference, or an example file."""
    with faults_as_sentences():
        if reference:
            typer.echo(config.reference_markdown(), nl=False)
        elif example:
            typer.echo(config.example_toml(), nl=False)
        else:
            typer.echo(settings_of(config_file).model_dump_json(indent=2, by_alias=True))


@app.command()
def send(
    files: Annotated[
        list[Path] | None, typer.Argument(help="DICOM files, or JPEG and PNG pictures to be wrapped.", show_default=False)
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Draw a skin picture and send that; needs no file.")] = False,
    to: Annotated[
        str | None,
        typer.Option(
            help="host:port of a DICOM node, or an http(s) URL ending before /studies. Default: the configured node.", show_default=False
        ),
    ] = None,
    called_ae_title: Annotated[str | None, typer.Option("--called", help="AE title of the receiver.", show_default=False)] = None,
    calling_ae_title: Annotated[str, typer.Option("--calling", help="Our AE title.")] = "DICOM_NODE_SEND",
    tls: Annotated[bool, typer.Option("--tls", help="Call --to by TLS, as the [tls] section says.")] = False,
    save_only: Annotated[bool, typer.Option("--save-only", help="Write what would be sent to .dcm files and send nothing.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for --save-only.")] = Path(),
    modality: Annotated[str, typer.Option(help="Of wrapped pictures: photo or dermoscopic.")] = "photo",
    patient_id: Annotated[str, typer.Option(help="Of wrapped pictures.")] = "",
    patient_name: Annotated[str, typer.Option(help="Of wrapped pictures: Family^Given.")] = "",
    patient_birth_date: Annotated[str, typer.Option(help="Of wrapped pictures: YYYYMMDD.")] = "",
    patient_sex: Annotated[str, typer.Option(help="Of wrapped pictures: M, F or O.")] = "",
    accession_number: Annotated[str, typer.Option(help="Of wrapped pictures.")] = "",
    study_description: Annotated[str, typer.Option(help="Of wrapped pictures.")] = "",
    study_instance_uid: Annotated[str, typer.Option(help="Of wrapped pictures: put them into this study.")] = "",
    body_site: Annotated[str, typer.Option(help="Of wrapped pictures: head, face, forearm, back … (a wrong one lists all).")] = "",
    laterality: Annotated[str, typer.Option(help="Of wrapped pictures: left, right, both or none.")] = "",
    config_file: ConfigOption = None,
) -> None:
    """Send DICOM files or pictures by C-STORE or STOW-RS."""
    from dicom_node import sending
    from dicom_node.photograph import PhotographOptions

    with faults_as_sentences():
        settings = settings_of(config_file)
        if not files and not demo:
            raise fail("nothing to send; name files, or use --demo")
        if modality not in {"photo", "dermoscopic"}:
            raise fail(f"--modality {modality}: use photo or dermoscopic")
        options = PhotographOptions(
            dermoscopic=modality == "dermoscopic" or (demo and not files),
            patient_id=patient_id, patient_name=patient_name, patient_birth_date=patient_birth_date, patient_sex=patient_sex,
            accession_number=accession_number, study_description=study_description, study_instance_uid=study_instance_uid,
            body_site=body_site, laterality=laterality,
        )  # fmt: skip
        try:
            items = sending.collect(files or [], demo=demo, options=options)
            if save_only:
                for path in sending.save(items, output):
                    typer.echo(str(path))
                return
            target = sending.target(settings, to=to, called_ae_title=called_ae_title, calling_ae_title=calling_ae_title, tls=tls)
            with progress_bar(f"sending to {target.label}") as progress:
                answers = sending.send(items, target, progress=progress)
        except sending.SendError as error:
            raise fail(*error.faults) from error
        refused = 0
        for answer in answers:
            typer.echo(f"{answer.text}  {answer.sop_instance_uid}  {answer.source}")
            refused += not answer.stored
        if refused:
            raise fail(f"{refused} of {len(answers)} were not stored")
        if answers and to is None:
            err.print(f"Where is it?  {command_line(f'trace {answers[0].sop_instance_uid}', config_file)}", style="dim")


@app.command()
def trace(
    uid: Annotated[str, typer.Argument(help="SOP, Series or Study Instance UID.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Where is my study: from whom, when, digest, object, jobs, models, reports, deliveries."""
    from dicom_node import storehouse, tracing

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        found = parts.archive.trace(uid)
        if as_json:
            typer.echo(json.dumps(found, indent=2, default=str))
            return
        for line in tracing.lines(found):
            typer.echo(runnable(line))


@app.command()
def requeue(
    job_ids: Annotated[list[int] | None, typer.Argument(help="Numbers of jobs, as trace shows them.", show_default=False)] = None,
    dead: Annotated[str | None, typer.Option("--dead", help="All dead jobs: analyse, deliver or archive.", show_default=False)] = None,
    config_file: ConfigOption = None,
) -> None:
    """Let dead or finished jobs run again. A repeated analysis writes the same reports, under the same UIDs."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        if dead is not None and dead not in set(JobKind):
            raise fail(f"--dead {dead}: use {' or '.join(JobKind)}")
        if not job_ids and dead is None:
            raise fail(f"name job numbers, or --dead {', --dead '.join(JobKind)}")
        for job_id in job_ids or []:
            parts.queue.requeue(job_id)
        count = len(job_ids or []) + (parts.queue.requeue_dead(JobKind(dead)) if dead is not None else 0)
        detail = {"jobs": job_ids or [], "dead": dead or ""}
        parts.audit.record(AuditEvent(action="job.requeued", outcome="success", actor=operator(), detail=detail))
        typer.echo(f"{count} job{'s' if count != 1 else ''} will run again")


@app.command()
def verify(config_file: ConfigOption = None) -> None:
    """Re-read every object: digests against the index, both directions, and the audit chain."""
    from dicom_node import storehouse

    with faults_as_sentences(), storehouse.storage(settings_of(config_file)) as parts:
        with progress_bar("verifying") as progress:
            report = parts.archive.verify(progress=progress)
        for line in report.lines():
            typer.echo(line)
        if not report.intact:
            raise fail(
                "the archive is not intact; the lines above name each object, and what was lost with its node, which is to be sent again. "
                "Keep the data, restore what is gone or damaged from a copy, verify again"
            )


for command in (doctor, conformance, refusals, erase, retention, backup, restore, reindex, migrate, duties):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # until `serve` configures the log of a node
    app()
