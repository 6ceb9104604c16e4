"""The DICOM conformance statement, made from the configuration and from the tables by which the doors work.

References
----------
DICOM PS3.2 Annex A (outline of a conformance statement)
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from dicom_node.audit_message import LONGEST
from dicom_node.console import ConfigOption, fail, faults_as_sentences, settings_of
from dicom_node.document import Document
from storage import errors
from storage.records import INDEXED, Level

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dicom_node.config import Settings

ROUTES: Final = (
    # path after base_path, methods, transaction of PS3.18, what goes over the wire
    (
        "/studies",
        "POST",
        "STOW-RS",
        'in: `multipart/related; type="application/dicom"`, `application/dicom`; out: `application/dicom+json`',
    ),
    ("/studies/{study}", "POST", "STOW-RS", "the same; instances of another study fail"),
    ("/studies", "GET", "QIDO-RS, studies", "`application/dicom+json`, `application/json`"),
    ("/series", "GET", "QIDO-RS, series", "the same"),
    ("/instances", "GET", "QIDO-RS, instances", "the same"),
    ("/studies/{study}/series", "GET", "QIDO-RS, series of a study", "the same"),
    ("/studies/{study}/instances", "GET", "QIDO-RS, instances of a study", "the same"),
    ("/studies/{study}/series/{series}/instances", "GET", "QIDO-RS, instances of a series", "the same"),
    ("/studies/{study}", "GET", "WADO-RS, study", '`multipart/related; type="application/dicom"`'),
    ("/studies/{study}/series/{series}", "GET", "WADO-RS, series", "the same"),
    ("/studies/{study}/series/{series}/instances/{instance}", "GET", "WADO-RS, instance", "the same, or `application/dicom`"),
    ("/studies/{study}/metadata", "GET", "WADO-RS, metadata", "`application/dicom+json`, `application/json`"),
    ("/studies/{study}/series/{series}/metadata", "GET", "WADO-RS, metadata", "the same"),
    ("/studies/{study}/series/{series}/instances/{instance}/metadata", "GET", "WADO-RS, metadata", "the same"),
    (
        "/studies/{study}/series/{series}/instances/{instance}/frames/{frames}",
        "GET",
        "WADO-RS, frames",
        "as stored: `application/octet-stream`, or `image/jpeg`, `image/jls`, `image/jp2`, `image/jphc`, `image/dicom-rle` …",
    ),
    ("/studies/{study}/series/{series}/instances/{instance}/bulkdata/{path}", "GET", "WADO-RS, bulk data", "as the BulkDataURI names it"),
)
"""What the HTTP door answers besides HEAD and OPTIONS; a test compares it with the router."""
COMPUTED: Final = (
    # keys that are counted or gathered when they are asked for; a test compares them with the service
    ("NumberOfPatientRelatedStudies", Level.PATIENT),
    ("NumberOfPatientRelatedSeries", Level.PATIENT),
    ("NumberOfPatientRelatedInstances", Level.PATIENT),
    ("ModalitiesInStudy", Level.STUDY),
    ("SOPClassesInStudy", Level.STUDY),
    ("NumberOfStudyRelatedSeries", Level.STUDY),
    ("NumberOfStudyRelatedInstances", Level.STUDY),
    ("NumberOfSeriesRelatedInstances", Level.SERIES),
)
REPORTS: Final = ("1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.66.4")
"""What goes out to peers by itself: Comprehensive 3D SR, Segmentation."""
_C_STORE_ERRORS: Final = (
    errors.Unavailable,
    errors.MismatchedInstance,
    errors.InvalidInstance,
    errors.ConflictingInstance,
    errors.UnsupportedInstance,
)


def served() -> Mapping[str, tuple[str, ...]]:
    """Return what the DIMSE door serves besides Verification and Storage: abstract syntax -> transfer syntaxes, as the services say."""
    from dicom_node.dimse.commitment import PUSH_MODEL
    from dicom_node.dimse.identifier import TRANSFER_SYNTAXES
    from dicom_node.dimse.information_model import MODELS

    models = {uid: TRANSFER_SYNTAXES for model in MODELS for uid in (model.find, model.move, model.get)}
    return {**models, PUSH_MODEL: TRANSFER_SYNTAXES}


def stored_classes() -> list[str]:
    """Return the storage SOP classes of PS3.6 that the DIMSE door accepts, in order of name."""
    from pydicom._uid_dict import UID_dictionary

    from dicom_node.dimse.scp import is_storage

    return sorted((uid for uid in UID_dictionary if is_storage(uid, unknown=False)), key=_name)


def statement(settings: Settings) -> Document:
    """Make the conformance statement of a configuration."""
    document = Document("DICOM conformance statement of dicom-node")
    document.paragraph(
        f"dicom-node {version('dicom-node')}. Made by `dicom-node conformance` from the configuration in force and from the tables by "
        "which the node works; do not edit. The outline is that of PS3.2 Annex A."
    )
    _overview(document, settings)
    _introduction(document)
    _networking(document, settings)
    _dicomweb(document, settings)
    document.heading(1, "Media interchange")
    document.paragraph("None: the node reads and writes no media. `dicom-node send` reads files in the format of PS3.10.")
    _character_sets(document)
    _security(document, settings)
    _annexes(document, settings)
    return document


def _overview(document: Document, settings: Settings) -> None:
    document.heading(1, "Conformance statement overview")
    document.paragraph(
        "dicom-node is an archive for dermatology that analyses the photographs it gets and answers with Structured Reports. It takes any "
        "composite instance by C-STORE or STOW-RS, keeps its data set byte for byte, encrypted, and gives it back by C-MOVE, C-GET "
        "or WADO-RS."
    )
    rows = [("Verification", "yes", "yes"), ("Storage: every composite storage SOP class (annex)", "yes", "yes")]
    for uid in REPORTS:
        rows.append((_name(uid), "yes", "yes"))
    services = served()
    if not settings.dimse.enabled:
        document.paragraph("The DIMSE door is switched off in this configuration (`dimse.enabled = false`): as SCP it offers nothing.")
        rows = [(name, as_scu, "no") for name, as_scu, _ in rows]
        services = {}
    rows += [(_name(uid), "yes" if "Commitment" in _name(uid) else "no", "yes") for uid in services]
    document.table(("Network service (SOP class)", "as user (SCU)", "as provider (SCP)"), rows)
    web = "yes" if settings.dicomweb.enabled else "no"
    document.table(
        ("DICOMweb service", "as user agent", "as origin server"),
        [("STOW-RS", "`dicom-node send`", web), ("QIDO-RS", "no", web), ("WADO-RS", "no", web)],
    )


def _introduction(document: Document) -> None:
    document.heading(1, "Introduction")
    document.paragraph(
        "For those who connect other systems: readers know the DICOM standard. That two statements fit together does not prove that two "
        "systems do; `dicom-node doctor` tries it against each peer, and `dicom-node refusals` says what was turned away and why."
    )
    document.table(
        ("Abbreviation", "Meaning"),
        [
            ("AE", "application entity"),
            ("SCU, SCP", "service class user, provider"),
            ("peer", "an AE that the node knows by name: configured, or added by `dicom-node peers add`"),
            ("report", "what the node makes of an analysis: Comprehensive 3D SR, Segmentation"),
        ],
    )


def _networking(document: Document, settings: Settings) -> None:
    from dicom_node.dimse.receive import ReceiveLimits
    from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

    section = settings.dimse
    limits = ReceiveLimits(handshake_s=section.handshake_s, idle_s=section.idle_s, minimum_bytes_per_s=section.minimum_bytes_per_s)
    title = section.ae_title
    document.heading(1, "Networking")
    document.heading(2, "Implementation model")
    document.paragraph(
        f"One application entity, `{title}`. As acceptor it answers C-ECHO, stores, answers queries and retrievals, and commits. As "
        "initiator it takes reports to peers, gives instances to the destination of a C-MOVE, asks peers for storage commitment of reports "
        "and reports on what they asked to be committed. What comes by HTTP and by DIMSE is one archive."
    )
    document.heading(2, f"AE specification: {title}")
    document.heading(3, "Association policies")
    document.table(
        ("Property", "Value"),
        [
            ("Application context", "1.2.840.10008.3.1.1.1"),
            ("Implementation Class UID", IMPLEMENTATION_CLASS_UID),
            ("Implementation Version Name", IMPLEMENTATION_VERSION_NAME),
            ("Maximum length received", f"{limits.maximum_pdu_length} bytes"),
            ("Associations as acceptor", f"{section.maximum_associations} at once; of one caller three quarters, or its own quota"),
            ("Associations as initiator", "8 peers at once for reports, one association each; and one for each C-MOVE under way"),
            ("Asynchronous operations window", "not negotiated: one operation at a time"),
            ("Association request", f"complete {limits.handshake_s:g} s after the connection, at most {limits.handshake_pdu_length} bytes"),
            ("Idle association", f"aborted after {limits.idle_s:g} s without a PDU, or below {limits.minimum_bytes_per_s} bytes a second"),
            ("Largest data set", f"{settings.limits.object_bytes} bytes"),
            ("Command set, and Identifier of other messages", f"at most {limits.command_bytes} and {limits.foreign_bytes} bytes"),
            ("SCP/SCU role selection", "for storage classes where the caller retrieves by C-GET; for storage commitment"),
            ("SOP class extended negotiation", "relational queries and retrieval, combined date and time matching"),
            ("Answer of a peer we call", f"awaited for {settings.delivery.timeout_s:g} s"),
        ],
    )  # fmt: skip
    document.heading(3, "Association acceptance")
    unknown = settings.dimse.accept_unknown_peers
    document.bullets(
        f"The called AE title must be `{title}`; else A-ASSOCIATE-RJ (1, 1, 7).",
        "The calling AE title and address must be those of a peer; "
        + ("callers of this machine are let in while the node listens on loopback; " if unknown == "loopback" else "")
        + "else A-ASSOCIATE-RJ (1, 1, 3).",
        "With TLS the certificate must be that of the peer, where one is named for it; else A-ASSOCIATE-RJ (1, 1, 3).",
        f"User identity: {_identity(settings)}",
        "Beyond the limit, or the caller's quota: A-ASSOCIATE-RJ (2, 3, 2).",
        "A peer that may not store, or not query and retrieve, is refused the presentation contexts of that, or the operation.",
        "Of the transfer syntaxes of a presentation context the first one proposed that is supported is accepted.",
    )
    if settings.dimse.enabled:
        _accepted(document, settings)
    document.heading(3, "Association initiation")
    document.paragraph(
        "For a report that is due for a peer; failed deliveries are tried again with growing delay "
        f"(first {settings.delivery.first_delay_s:g} s, at most {settings.delivery.longest_delay_s:g} s, "
        f"{settings.delivery.attempts} tries)."
    )
    document.table(
        ("Abstract syntax", "UID", "Transfer syntaxes proposed", "Role"),
        [
            *((_name(uid), uid, "Explicit VR Little Endian; Implicit VR Little Endian in a context of its own", "SCU") for uid in REPORTS),
            ("any stored SOP class (C-MOVE)", "see annex", "as stored; Explicit and Implicit VR Little Endian if convertible", "SCU"),
            ("Storage Commitment Push Model", "1.2.840.10008.1.20.1", "Explicit VR Little Endian, Implicit VR Little Endian", "SCU, SCP"),
            ("Verification", "1.2.840.10008.1.1", "Implicit VR Little Endian, Explicit VR Little Endian", "SCU"),
        ],
    )  # fmt: skip
    document.heading(3, "Status of C-STORE")
    _c_store(document)
    if settings.dimse.enabled:
        _query_retrieve(document, settings)
        _commitment(document, settings)
    document.heading(2, "Network interfaces")
    document.paragraph("TCP/IP, version 4 and 6, as the operating system gives them. Host names of peers are resolved at each call.")
    document.heading(2, "Configuration")
    document.table(
        ("Parameter", "Value", "Setting"),
        [
            ("AE title", f"`{title}`", "`dimse.ae_title`"),
            ("TCP port", str(settings.dimse.port), "`dimse.port`"),
            ("Address", f"`{settings.dimse.host}`", "`dimse.host`"),
            ("Private and unknown storage SOP classes", _yes(settings.dimse.unknown_sop_classes), "`dimse.unknown_sop_classes`"),
            ("Instance of the same UID and other content", settings.archive.on_conflict, "`archive.on_conflict`"),
            ("TLS", "yes" if settings.tls.enabled else "no", "`[tls]`"),
            ("User identity", settings.identities.mode, "`[identities]`"),
            ("Success means", settings.archive.acknowledge, "`archive.acknowledge`; a peer may have its own"),
            ("Peers", "AE title, address or network, port, rights", "`[[peers]]`, `dicom-node peers`"),
        ],
    )


def _accepted(document: Document, settings: Settings) -> None:
    document.table(
        ("Abstract syntax", "UID", "Transfer syntaxes accepted", "Role"),
        [
            ("Verification", "1.2.840.10008.1.1", "Implicit and Explicit VR Little Endian, Explicit VR Big Endian, deflated", "SCP"),
            (
                "every storage SOP class" + (", private and unknown ones too" if settings.dimse.unknown_sop_classes else ""),
                "see annex",
                "every one in the annex",
                "SCP; SCU where the caller retrieves by C-GET",
            ),
            *((_name(uid), uid, ", ".join(map(_name, syntaxes)), "SCP") for uid, syntaxes in served().items()),
        ],
    )


def _c_store(document: Document) -> None:
    document.paragraph("As provider. Success is answered when the instance is durable; what is not durable is never answered with it.")
    rows = [("0000", "Success", "durable; or the same instance was here already")]
    for error in _C_STORE_ERRORS:
        words = (error.__doc__ or "").splitlines()[0].rstrip(".")
        rows.append((f"{error.failure_reason:04X}", "Refused, try again" if error.retryable else "Error", words))
    rows.append(("0124", "Refused", "not authorised: the peer may not store (`accept = false`)"))
    rows.append((f"{errors.StorageError.failure_reason:04X}", "Error", "processing failure; Error Comment and the node's log say which"))
    document.table(("Status", "Kind", "Meaning"), rows)
    document.paragraph(
        "As user. 0000, warnings (Bxxx, 0001, 0107, 0116) and 0111 Duplicate SOP Instance mean that the peer has the report; A7xx "
        "and broken "
        "associations are tried again; everything else ends the delivery until an operator lets it run again (`dicom-node requeue`)."
    )


def _query_retrieve(document: Document, settings: Settings) -> None:
    from dicom_node.dimse.information_model import MODELS

    document.heading(3, "Query and retrieve")
    document.table(
        ("Information model", "Levels", "C-FIND", "C-MOVE", "C-GET"),
        [(model.name, ", ".join(level.value for level in model.levels), model.find, model.move, model.get) for model in MODELS],
    )
    document.table(
        ("Level", "Attributes matched and returned"),
        [(level.value, ", ".join(keyword for keyword, (of, _) in INDEXED.items() if of is level)) for level in Level],
    )
    document.table(("Level", "Counted or gathered"), [(level.value, keyword) for keyword, level in COMPUTED])
    document.bullets(
        "Matching: single value, list of UID, universal, wildcard (`*`, `?`) in text, range in dates and times. Names without "
        "regard to case, "
        "in all component groups. TimezoneOffsetFromUTC is returned and not matched.",
        "Without relational queries negotiated the unique keys of the levels above must be single values.",
        f"C-FIND: 0000, FF00, FF01 pending, FE00 cancelled, A700 beyond {settings.dimse.find_rows} matches or {settings.dimse.find_s:g} s, "
        "A900 and C000 for an Identifier that "
        "cannot be answered, 0122.",
        "C-MOVE and C-GET: 0000, FF00, B000 some sub-operations failed, FE00, A701 more than "
        f"{settings.dimse.retrieve_instances} instances, A702 none could be done, A801 Move Destination unknown, A900, C000, 0122. Move "
        "Destinations are peers with address and port.",
        "Instances go out as they are stored; where the receiver lacks that transfer syntax, in Explicit or Implicit VR Little "
        "Endian, if the "
        "pixel data can be decoded.",
    )


def _commitment(document: Document, settings: Settings) -> None:
    document.heading(3, "Storage commitment")
    document.bullets(
        "As provider: an N-ACTION request is durable before it is answered. An instance is committed when it was read again from the store "
        "and its digest is that of the index; the failure reasons are 0110, 0112 no such instance, 0119 class-instance conflict, 0131 "
        "duplicate transaction UID, 0213 resource limitation.",
        f"At most {settings.dimse.commitment_references} references in a request. An instance that is not in the store yet is waited for, "
        f"at most {settings.dimse.commitment_wait_s:g} s.",
        "The N-EVENT-REPORT comes on the association of the request while that is open and idle; else on one of ours, with role selection.",
        "As user: of peers with `commit = true` reports are committed; what is not committed within "
        f"{settings.delivery.commitment_answer_s:g} s is sent again.",
    )


def _dicomweb(document: Document, settings: Settings) -> None:
    from dicomweb.context import WebLimits

    section, limits = settings.dicomweb, WebLimits()
    document.heading(1, "DICOMweb")
    if not section.enabled:
        document.paragraph("Switched off in this configuration (`dicomweb.enabled = false`).")
        return
    document.paragraph(f"Origin server at `http://{section.host}:{section.port}{section.base_path}` (PS3.18 Section 10); HTTP 1.1.")
    document.table(
        ("Resource", "Method", "Transaction", "Media types"),
        [(f"`{section.base_path}{path}`", method, transaction, media) for path, method, transaction, media in ROUTES],
    )
    document.bullets(
        "`HEAD` wherever there is `GET`. Change feed at "
        + (f"`{section.base_path}/changefeed`, not of the standard." if section.changefeed else "no resource: switched off."),
        "STOW-RS: 200, 202, 409 with Failure Reason as C-STORE; 400, 406, 408, 413, 415; 503 and 507 with `Retry-After`. At most "
        f"{settings.limits.parts} parts, {limits.body_bytes} bytes, {limits.uploads} requests at once.",
        f"QIDO-RS: attributes of the table under query and retrieve, and ModalitiesInStudy; at most {limits.results} results an answer, "
        "`limit` and `offset`; `fuzzymatching` is answered with literal matching and a warning.",
        "WADO-RS: `transfer-syntax=*` gives instances as stored; without it Explicit VR Little Endian, and 406 for what is stored "
        "compressed.",
        "Not supported: rendered resources, WADO-URI, XML, UPS-RS, DELETE.",
    )


def _character_sets(document: Document) -> None:
    from pydicom.charset import python_encoding

    document.heading(1, "Support of character sets")
    document.paragraph(
        "Data sets are kept as they came, in any character set. Text that is searched is decoded by the defined terms below, with code "
        "extensions (ISO 2022); what a term cannot explain is replaced, in the index alone. Answers to queries are UTF-8 (ISO_IR 192)."
    )
    document.paragraph(
        ", ".join(f"`{term}`" for term in sorted(term for term in python_encoding if term)) + "; and the default repertoire."
    )


def _identity(settings: Settings) -> str:
    if settings.identities.mode == "ignore":
        return "not looked at in this configuration."
    who = "must" if settings.identities.mode == "required" else "may"
    return (
        f"callers {who} identify themselves, by user name, user name and passcode, or JSON Web Token; what cannot be verified is rejected, "
        "A-ASSOCIATE-RJ (1, 1, 1), and (2, 1, 1) when it is tried too often."
    )


def _secured(settings: Settings) -> str:
    tls = settings.tls
    if not tls.enabled:
        return "In this configuration the DIMSE door speaks no TLS (`tls.enabled = false`); peers with `tls = true` are called by TLS."
    asked = {"required": "must show a certificate", "optional": "may show a certificate", "none": "are asked for no certificate"}
    lists = "revocation lists are looked at" if tls.revocations is not None else "revocation lists are not looked at"
    return f"In this configuration the DIMSE door speaks TLS and nothing else; callers {asked[tls.client]}; {lists}."


def _security(document: Document, settings: Settings) -> None:
    document.heading(1, "Security")
    document.bullets(
        "Secure transport: TLS after the BCP 195 profile (PS3.15 Annex B): TLS 1.3, and TLS 1.2 with ECDHE and AEAD suites alone; "
        "certificates are changed while the node runs. " + _secured(settings),
        "Association level: calling AE title together with address or network, called AE title, and with TLS the peer's certificate.",
        f"User identity negotiation (PS3.7 D.3.3.7): {_identity(settings)}",
        "At rest: every object is encrypted (AES-256-GCM, a key for each study); the embedded database is encrypted.",
        f"Audit trail: who stored, searched, retrieved, changed and erased what; hash-chained. {_audited(settings)}",
        "De-identification: none. Digital signatures: kept, not verified.",
    )
    if settings.dicomweb.enabled:
        document.paragraph(
            "The HTTP door has no login of its own; beyond loopback it needs an authenticating proxy that ends TLS "
            "(`dicomweb.trusted_proxy`)."
        )


def _audited(settings: Settings) -> str:
    where = settings.audit.syslog_host
    here = f"to `{where}`, port {settings.audit.syslog_port}" if where else "nowhere (`audit.syslog_host` is empty)"
    return (
        "Audit Trail Message Format Profile (PS3.15 A.5) and Transmission Profile SYSLOG-TLS (A.6), settings of section `[audit]`; in this "
        f"configuration it is sent {here}. Messages have at most {LONGEST} octets. STRUCTURED-DATA: `[meta sequenceId]`, the number of the "
        "record. UserIDs: our AuditSourceID, and names of peers, AE titles, addresses or `operator:USER@HOST`, as in "
        "`dicom-node trace`. Extensions: "
        "a second EventTypeCode of scheme 99DERMNODE, and a participant object of role 13 that holds the record and its hash. The Patient "
        "is told by ID, and where the index knows no patient, not at all."
    )


def _annexes(document: Document, settings: Settings) -> None:
    from storage.iod import TRANSFER_SYNTAXES

    document.heading(1, "Annexes")
    document.heading(2, "Objects made by the node")
    document.table(
        ("Object", "SOP class", "Content"),
        [
            ("summary, findings", _name(REPORTS[0]), "TID 1500 Measurement Report, in the study of the image, evidence referenced"),
            ("segmentation", _name(REPORTS[1]), "binary, of the lesion, in the geometry of the image"),
        ],
    )
    document.paragraph(
        f"Private codes have the scheme `{settings.reports.private_scheme}`, ICD-11 MMS `{settings.reports.icd11_scheme}` "
        f"(release {settings.reports.icd11_release}). SOP Instance UIDs are derived: the same analysis makes the same UIDs."
    )
    document.heading(2, "Private attributes")
    document.paragraph(
        "None in stored or made objects. In answers of STOW-RS (0009,1001) UT of creator `DICOM_NODE`: the whole reason of a failure."
    )
    document.heading(2, "Transfer syntaxes stored")
    document.table(("Name", "UID"), [(_name(uid), uid) for uid in TRANSFER_SYNTAXES])
    document.heading(2, "Storage SOP classes accepted")
    document.table(("Name", "UID"), [(_name(uid), uid) for uid in stored_classes()])


def _name(uid: str) -> str:
    from pydicom.uid import UID

    name = str(UID(uid).name)
    return _NAMES.get(uid, name)


_NAMES: Mapping[str, str] = {
    # of PS3.6, and not yet of the library's dictionary
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}


def _yes(value: bool) -> str:
    return "accepted" if value else "refused"


def conformance(
    as_html: Annotated[bool, typer.Option("--html", help="As one HTML page; default: Markdown.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; default: standard output.", show_default=False)] = None,
    config_file: ConfigOption = None,
) -> None:
    """Print the DICOM conformance statement (PS3.2) of the configuration in force."""
    with faults_as_sentences():
        document = statement(settings_of(config_file))
        text = document.html() if as_html else document.markdown()
        if output is None:
            typer.echo(text, nl=False)
            return
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise fail(f"{output}: cannot be written ({error.strerror}); name another file with --output") from error
