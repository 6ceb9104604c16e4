"""Settings: conf/node.toml, then ``DICOM_NODE_<SECTION>__<KEY>`` of the environment, then secret files.

Every fault is reported at once, each with its key path and its remedy. Nothing outside this package sees these classes:
``node.build`` hands each part what it needs by keyword.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError, field_validator, model_validator

from dicom_node import config_faults
from dicom_node.peers import NAME, RESERVED_NAMES, Peer
from dicom_node.peers import faults as peer_faults

_LISTS = frozenset({"peers", "routes", "webhooks"})
ENVIRONMENT_PREFIX = "DICOM_NODE_"
ALIASES: Mapping[str, tuple[str, str]] = {"DICOM_AET": ("dimse", "ae_title"), "DICOM_PORT": ("dimse", "port")}

# PS3.5 Section 6.2, VR AE: no backslash, no control characters, not only spaces.
AETitle = Annotated[
    str, StringConstraints(min_length=1, max_length=16, pattern=r"^[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]*[\x21-\x5b\x5d-\x7e])?$")
]
Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
ReportKind = Literal["sr", "seg"]


class ConfigurationError(Exception):
    """The configuration cannot be used. ``faults``: one line a fault, each with key path and remedy."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Section(BaseModel):
    """A table of the configuration: frozen, unknown keys refused (a typo in a security option must not pass)."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeSection(Section):
    """The installation as a whole."""

    data_dir: Path = Field(Path("var"), description="Folder for landing area, objects, index and key ring; must be durable storage.")
    profile: Literal["dermatology"] = Field("dermatology", description="Which analyses run, and in which order.")
    lease_s: float = Field(30.0, ge=1, description="The work of a process that died is taken over after this many seconds.")
    silence_s: float = Field(
        120.0, ge=10, description="A process of the node that gives no sign of life for this long is killed and started again."
    )
    drain_s: float = Field(
        20.0,
        ge=0,
        description="On stop: seconds given to open associations, requests and jobs, then they are cut; ten more for what hangs.",
    )


class DimseSection(Section):
    """The DIMSE door: verification, storage, query and retrieve, storage commitment."""

    enabled: bool = Field(default=True, description="Listen for DICOM associations.")
    ae_title: AETitle = Field("DERM_NODE", description="Our AE title; associations called otherwise are rejected.")
    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback needs a peer, see without_peers.")
    without_peers: Literal["refuse", "listen"] = Field(
        "refuse",
        description="Beyond loopback, when no [[peers]] entry may store: refuse to start, or listen and reject whoever was not added "
        "with `dicom-node peers add`.",
    )
    port: Port = Field(11112, description="TCP port.")
    processes: int = Field(1, ge=1, le=32, description="Receiving processes; they share the port.")
    maximum_associations: int = Field(
        200,
        ge=1,
        le=10_000,
        description="Open associations at once, of all processes; more are rejected as transient. One caller gets "
        "three quarters of them unless its max_associations says otherwise.",
    )
    association_requests_per_s: float = Field(
        100.0,
        ge=0,
        description="Association requests of one address that a receiving process looks at in a second; more wait for their turn, the "
        "AE titles there one after the other. 0: as many as come.",
    )
    association_request_burst: int = Field(200, ge=1, description="So many of them at once after a pause.")
    accept_unknown_peers: Literal["loopback", "never"] = Field(
        "loopback",
        description="Whether callers that are no peer may store, query and retrieve: while we listen on loopback, or never.",
    )
    unknown_sop_classes: bool = Field(default=False, description="Also accept private and unknown storage SOP classes.")
    handshake_s: float = Field(10.0, gt=0, description="From connection to a whole association request, TLS included; else it is closed.")
    idle_s: float = Field(60.0, gt=0, description="An association without a byte for this long is aborted.")
    minimum_bytes_per_s: int = Field(1024, ge=0, description="A message that comes more slowly than this over idle_s is aborted; 0: never.")
    find_rows: int = Field(10_000, ge=1, description="C-FIND: most matches of one query; then it ends with 0xA700.")
    find_s: float = Field(25.0, gt=0, description="C-FIND, C-MOVE, C-GET: longest search.")
    retrieve_instances: int = Field(65_535, ge=1, le=65_535, description="C-MOVE, C-GET: most instances of one request; more is 0xA701.")
    commitment_references: int = Field(10_000, ge=1, description="Storage commitment: most references of one request.")
    commitment_wait_s: float = Field(
        3600.0,
        ge=0,
        description="Storage commitment: wait so long for an instance that is not in the store yet.",
    )


class TlsSection(Section):
    """TLS of the DIMSE door, and of calls to peers with tls = true (PS3.15, BCP 195)."""

    enabled: bool = Field(default=False, description="The DIMSE door speaks TLS, and nothing else.")
    certificate: Path | None = Field(None, description="Our certificate and intermediates (PEM); files are followed.")
    key: Path | None = Field(None, description="Its private key (PEM, not encrypted).")
    authorities: Path | None = Field(None, description="Who may vouch for callers, and for the peers that we call (PEM).")
    client: Literal["required", "optional", "none"] = Field("required", description="Whether callers must show a certificate.")
    revocations: Path | None = Field(None, description="Certificate revocation lists, one of each authority (PEM); empty: not looked at.")


class UserSection(Section):
    """One user of User Identity Negotiation."""

    name: str = Field(min_length=1, max_length=128, description="User name.")
    passcode_hash: SecretStr = Field(SecretStr(""), description="What `dicom-node users hash` prints; empty: the name alone identifies.")


class TokenKeySection(Section):
    """One key of issuers of JSON Web Tokens."""

    kid: str = Field(description="The key's id, as tokens name it.")
    algorithm: Literal["RS256", "PS256", "ES256", "EdDSA", "HS256"] = Field(description="The only one tried with this key.")
    file: Path = Field(description="PEM public key; for HS256 the secret.")
    issuer: str = Field(description="Required iss.")
    audience: str = Field(description="Required aud.")
    name_claim: str = Field("sub", description="Which claim names the user.")


class IdentitiesSection(Section):
    """Who identifies when associating (User Identity Negotiation, PS3.7 D.3.3.7)."""

    mode: Literal["ignore", "optional", "required"] = Field("ignore", description="ignore: not looked at; optional: verified when given.")
    plaintext: bool = Field(default=False, description="Take credentials without TLS from other machines.")
    users: tuple[UserSection, ...] = Field((), description="[[identities.users]]: name and passcode_hash (`dicom-node users hash`).")
    keys: tuple[TokenKeySection, ...] = Field(
        (), description="[[identities.keys]]: kid, algorithm, file, issuer, audience, name_claim of who issues tokens."
    )
    token_once: bool = Field(default=False, description="A token counts only once; it needs a jti.")


class DicomwebSection(Section):
    """The HTTP door (STOW-RS, WADO-RS, QIDO-RS)."""

    enabled: bool = Field(default=True, description="Listen for DICOMweb.")
    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback needs trusted_proxy.")
    port: Port = Field(8080, description="TCP port.")
    base_path: str = Field("/dicomweb", pattern=r"^(/[A-Za-z0-9._-]+)*$", description="Path before /studies.")
    public_url: str = Field("", description="Base of URLs we hand out, when clients reach us by another name; empty: the request's Host.")
    trusted_proxy: bool = Field(
        default=False, description="true: a proxy that terminates TLS and authenticates stands in front; its X-Forwarded-* are believed."
    )
    cors_origins: tuple[str, ...] = Field((), description="Origins of browsers' viewers that may call us; empty: none.")
    changefeed: bool = Field(default=True, description="Serve the change feed at {base_path}/changefeed.")
    threads: int = Field(8, ge=1, le=64, description="Requests that touch the archive at once.")


class AdminSection(Section):
    """Metrics and health, on an address of their own."""

    enabled: bool = Field(default=True, description="Serve /metrics, /healthz and /readyz; a role that runs alone serves its own.")
    host: str = Field("127.0.0.1", description="Address to listen on; these pages hold no patient data and need no login.")
    port: Port = Field(8081, description="TCP port; several roles alone on one address: give each its own by serve --admin-port.")


class ArchiveSection(Section):
    """Where sealed objects live, and what Success means."""

    store: Literal["directory", "s3"] = Field("directory", description="Local folder, or an S3 bucket.")
    acknowledge: Literal["land", "archive"] = Field(
        "land",
        description="Success after: land = flushed on this node's disk, which must be durable; archive = in the store, digest confirmed. "
        "A peer may have its own. With a directory both are the same.",
    )
    on_conflict: Literal["quarantine", "refuse"] = Field(
        "quarantine",
        description="Same SOP Instance UID, other content: the first stays; the second is put aside, or dropped. Its sender is refused.",
    )
    min_free_bytes: int = Field(512 * 1024**2, ge=0, description="Below this much free disk, instances are refused as out of resources.")
    max_bytes_in_flight: int = Field(
        8 * 1024**3, ge=0, description="Bytes a process has received and not committed yet, above which it refuses more; 0: no limit."
    )
    cache_bytes: int = Field(
        4 * 1024**3, ge=0, description="s3: disk for encrypted copies of what is read or was just brought; 0: none are kept."
    )
    movers: int = Field(4, ge=1, le=64, description="s3, land: objects brought into the bucket at the same time.")
    mover_bytes_per_s: int = Field(0, ge=0, description="s3, land: bandwidth towards the bucket; 0: as fast as it goes.")
    bucket: str = Field("", description="s3: the bucket, made beforehand.")
    prefix: str = Field("", description="s3: put before every object key.")
    endpoint_url: str = Field("", description="s3: for stores other than AWS.")
    region: str = Field("", description="s3: region name; empty: the standard chain decides.")
    addressing_style: Literal["auto", "path", "virtual"] = Field("auto", description="s3: the bucket in the path or in the host name.")
    ca_file: Path | None = Field(None, description="s3: certificates of the authority of an endpoint of one's own (PEM).")
    server_side_encryption: Literal["", "AES256", "aws:kms"] = Field(
        "", description="s3: asked of the bucket for every object, on top of our own encryption; empty: the bucket's setting."
    )
    kms_key_id: str = Field("", description="s3: key for aws:kms; empty: the account's default.")
    storage_class: str = Field("", description="s3: for example STANDARD_IA or INTELLIGENT_TIERING; empty: the bucket's default.")
    tags: tuple[str, ...] = Field((), description="s3: name=value, put on every object for lifecycle rules.")
    restore_tier: Literal["Standard", "Bulk", "Expedited"] = Field(
        "Standard", description="s3: how cold objects are restored when asked for."
    )
    restore_days: int = Field(7, ge=1, description="s3: for how long a restored copy stays.")
    attempts: int = Field(6, ge=1, le=20, description="s3: tries of one request.")
    deadline_s: float = Field(120.0, ge=1, description="s3: longest time for one object, beyond the time its bytes take.")


class LimitsSection(Section):
    """Hard limits on what a peer may send, and on what is decoded."""

    object_bytes: int = Field(2 * 1024**3, ge=1024, description="Largest data set.")
    depth: int = Field(64, ge=1, description="Deepest nesting of sequences.")
    elements: int = Field(1_000_000, ge=1, description="Most elements in one data set.")
    inflate_ratio: int = Field(200, ge=1, description="Deflated transfer syntax: most bytes out for a byte in.")
    inflate_bytes: int = Field(2 * 1024**3, ge=1024, description="Deflated transfer syntax: most bytes out.")
    parts: int = Field(10_000, ge=1, description="Most parts in one STOW-RS request.")
    pixels: int = Field(400_000_000, ge=1, description="Most pixels (rows x columns x frames) decoded for one analysis.")
    frames: int = Field(16, ge=1, description="Most frames of one instance analysed; the report says when it had more.")


class KeysSection(Section):
    """The wrapping keys: a ring of keys in a file, or of keys that never leave AWS KMS."""

    ring: Literal["file", "kms"] = Field(
        "file", description="What kind of key a new ring gets: one kept in the ring file, or one of AWS KMS."
    )
    file: Path | None = Field(
        None, description="The ring file; empty: keys/ring.json in data_dir. Keep a copy elsewhere: without it nothing can be read."
    )
    kms_key_id: str = Field("", description="kms: key id, ARN or alias of the key of a new ring.")
    kms_region: str = Field("", description="kms: region; empty: the standard chain decides.")
    kms_endpoint_url: str = Field("", description="kms: for services other than AWS.")
    cache_s: float = Field(
        60.0,
        ge=0,
        description="Seconds an opened study key is used without asking again: how long an erased key may work elsewhere, "
        "and how long work goes on without KMS.",
    )
    cache_keys: int = Field(10_000, ge=1, description="Most opened study keys a process remembers.")


class DatabaseSection(Section):
    """Index, queue and audit trail."""

    url: str = Field(
        "",
        description="Empty: the embedded encrypted database in data_dir. Several nodes share "
        "postgresql://user@host/name?sslmode=verify-full; its password comes from DICOM_NODE_DATABASE__PASSWORD(_FILE).",
    )
    password: SecretStr = Field(SecretStr(""), description="Of the PostgreSQL user; give it by environment or file.")

    @field_validator("url")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value and not value.startswith(("postgresql://", "postgresql+psycopg://")):
            raise ValueError("use postgresql://user@host/name, or leave it empty for the embedded database")
        return value


class CareSection(Section):
    """What the node does by itself over time."""

    scrub_days: float = Field(30.0, ge=0, description="Every object is read again and compared once in so many days; 0: never.")
    scrub_bytes_per_s: int = Field(20 * 1024**2, ge=0, description="How fast the scrub reads; 0: as fast as it goes.")
    orphan_grace_hours: float = Field(24.0, ge=1, description="Age at which an object without a row is adopted or removed.")
    retention_days: float = Field(0.0, ge=0, description="Studies whose newest instance came longer ago are erased; 0: never.")


class InferenceSection(Section):
    """The laboratory."""

    enabled: bool = Field(default=True, description="Analyse what arrives.")
    workers: int = Field(1, ge=1, le=64, description="Worker processes.")
    threads: int = Field(0, ge=0, description="Threads of the network in each worker; 0: as many as processors, shared among the workers.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where networks run; auto: cuda when present; cuda: the CPU stands in, and says so, while there is none."
    )
    bundles: tuple[str, ...] = Field(
        (),
        description="Folders of model bundles, each optionally pinned as folder@sha256:digest; "
        "a later one replaces an earlier one of the same task. Empty: the shipped ones.",
    )


class ReportsSection(Section):
    """How findings are written as DICOM."""

    private_scheme: str = Field("99DERMNODE", pattern=r"^99[A-Z0-9_]{1,14}$", description="Coding scheme designator of our own codes.")
    icd11_scheme: str = Field("99ICD11", pattern=r"^99[A-Z0-9_]{1,14}$", description="Coding scheme designator for ICD-11 MMS.")
    icd11_release: str = Field("2025-01", description="ICD-11 MMS release named as the scheme's version.")


class DeliverySection(Section):
    """Reports on their way out."""

    enabled: bool = Field(default=True, description="Send reports to peers.")
    attempts: int = Field(100, ge=1, description="Tries of one report at one peer, over three days, before `dicom-node requeue` is needed.")
    first_delay_s: float = Field(5.0, gt=0, description="Wait after the first failed try; doubles with each.")
    longest_delay_s: float = Field(3600.0, gt=0, description="Longest wait between tries.")
    timeout_s: float = Field(30.0, gt=0, description="Seconds a peer may take to answer.")
    commitment_answer_s: float = Field(
        86400.0,
        gt=0,
        description="Peers with commit = true: not committed in this time, and the report is sent again.",
    )


class AuditSection(Section):
    """A copy of the audit trail elsewhere: an Audit Record Repository (DICOM PS3.15 A.5 messages, syslog over TLS)."""

    syslog_host: str = Field("", description="Name or address of the repository, as its certificate bears it; empty: nothing is sent.")
    syslog_port: Annotated[int, Field(ge=1, le=65535)] = Field(6514, description="Its TCP port for syslog over TLS.")
    authorities: Path | None = Field(None, description="Who may vouch for the repository (PEM); empty: as tls.authorities.")
    certificate: Path | None = Field(None, description="Our certificate, should the repository ask for one (PEM); files are followed.")
    key: Path | None = Field(None, description="Its private key (PEM, not encrypted).")
    source_id: str = Field("", description="AuditSourceID, the same for nodes that share a database; empty: dimse.ae_title.")
    site: str = Field("", description="AuditEnterpriseSiteID; empty: none.")
    from_beginning: bool = Field(
        default=True,
        description="Whether a first repository is sent all that was ever recorded, or what is recorded from now on.",
    )
    degraded_after: int = Field(10_000, ge=0, description="Records that wait, above which /readyz says so, at 200; 0: never.")
    degraded_s: float = Field(3600.0, ge=0, description="Age in seconds of the oldest that waits, above which it does; 0: never.")
    refuse_after: int = Field(
        0, ge=0, description="Records that wait, above which instances are refused as out of resources until they are taken; 0: never."
    )


class LoggingSection(Section):
    """Application logs; they never hold patient attributes."""

    format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else JSON lines.")
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")


class PeerSection(Section):
    """One DICOM application entity we talk with."""

    name: Name = Field(description="How routes, logs and the command line call it.")
    ae_title: AETitle = Field(description="Its AE title.")
    host: str = Field(
        "*",
        description="Its address or host name; or, for one that only calls, a network (10.20.0.0/16), or * for anywhere.",
    )
    port: Port = Field(0, description="Its port; 0: it is never called.")
    accept: bool = Field(default=True, description="It may store here.")
    retrieve: bool = Field(default=True, description="It may query and retrieve here.")
    deliver: tuple[ReportKind, ...] = Field(("sr", "seg"), description="What it is sent of our results.")
    acknowledge: Literal["", "land", "archive"] = Field("", description="What Success means for it; empty: as [archive].")
    max_associations: int = Field(0, ge=0, description="How many it may hold here at once; 0: three quarters of all.")
    certificate: str = Field("", description="With TLS: SHA-256 fingerprint, or a name, of the certificate that it must show; empty: any.")
    tls: bool = Field(default=False, description="Call it by TLS.")
    commit: bool = Field(default=False, description="Ask it for storage commitment of our reports; what it does not commit is sent again.")


class RouteSection(Section):
    """Where reports go. Without a route: back to the sender, if it is a peer."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    from_: str = Field("*", alias="from", description="Name of the sending peer; dicomweb for the HTTP door; * for any.")
    to: tuple[str, ...] = Field(description="Names of peers, of the configuration or added; what is for one that is not there yet waits.")


class WebhookSection(Section):
    """One subscriber of the change feed."""

    name: Name = Field(description="How logs and the cursor call it; the cursor is kept under it.")
    url: str = Field(pattern=r"^https?://\S+$", description="Where changes are posted; https unless it is this machine.")
    secrets: tuple[SecretStr, ...] = Field(
        description="Of the signature (HMAC-SHA256), at least 32 characters each; two while one is being changed."
    )
    kinds: tuple[str, ...] = Field((), description="Changes wanted, as docs/changefeed.md names them; empty: all.")
    ca_file: Path | None = Field(None, description="Certificates of the authority of the receiver (PEM).")
    from_beginning: bool = Field(default=False, description="Whether a new subscriber is told all that ever happened.")


class Settings(Section):
    """The whole configuration."""

    node: NodeSection = NodeSection()
    dimse: DimseSection = DimseSection()
    tls: TlsSection = TlsSection()
    identities: IdentitiesSection = IdentitiesSection()
    dicomweb: DicomwebSection = DicomwebSection()
    admin: AdminSection = AdminSection()
    archive: ArchiveSection = ArchiveSection()
    limits: LimitsSection = LimitsSection()
    keys: KeysSection = KeysSection()
    database: DatabaseSection = DatabaseSection()
    care: CareSection = CareSection()
    inference: InferenceSection = InferenceSection()
    reports: ReportsSection = ReportsSection()
    delivery: DeliverySection = DeliverySection()
    audit: AuditSection = AuditSection()
    logging: LoggingSection = LoggingSection()
    peers: tuple[PeerSection, ...] = ()
    routes: tuple[RouteSection, ...] = ()
    webhooks: tuple[WebhookSection, ...] = ()

    @model_validator(mode="after")
    def _coherent(self) -> Settings:
        faults = list(_incoherences(self))
        if faults:
            raise ConfigurationError(faults)
        return self

    @property
    def ring_file(self) -> Path:
        """Where the key ring lies."""
        return self.keys.file or self.node.data_dir / "keys" / "ring.json"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _incoherences(settings: Settings) -> list[str]:
    faults: list[str] = []
    names = [peer.name for peer in settings.peers]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"peers: the name {name!r} stands twice; give each peer a name of its own")
    for index, section in enumerate(settings.peers):
        faults += [f"peers.{index}.{key}: {words}" for key, words in peer_faults(peer_of(section))]
    titles = [(peer.ae_title, peer.host) for peer in settings.peers if peer.accept]
    for title, host in sorted({title for title in titles if titles.count(title) > 1}):
        faults.append(f"peers: AE title {title!r} at {host!r} stands twice with accept = true; a sender must be one peer")
    faults += _tls_faults(settings)
    faults += _audit_faults(settings)
    elsewhere = settings.dimse.enabled and not is_loopback(settings.dimse.host)
    if elsewhere and settings.dimse.without_peers == "refuse" and not any(peer.accept for peer in settings.peers):
        faults.append(
            f"dimse.host: {settings.dimse.host} is reachable from elsewhere but no peer may store; add a [[peers]] entry for each sender, "
            'or set dimse.without_peers = "listen" and use `dicom-node peers add`, or listen on 127.0.0.1'
        )
    if settings.dicomweb.enabled and not is_loopback(settings.dicomweb.host) and not settings.dicomweb.trusted_proxy:
        faults.append(
            f"dicomweb.host: {settings.dicomweb.host} is reachable from elsewhere and this release has no login of its own; "
            "put an authenticating TLS proxy in front and set dicomweb.trusted_proxy = true, or listen on 127.0.0.1"
        )
    for index, route in enumerate(settings.routes):
        where = config_faults.entry("routes", index)
        if route.from_ not in {"*", "dicomweb"} and not re.fullmatch(NAME, route.from_):
            faults.append(f"{where}, from: {route.from_!r} can be the name of no peer; name one, or dicomweb, or *")
        for target in route.to:
            peer = next((peer for peer in settings.peers if peer.name == target), None)
            if target in RESERVED_NAMES or not re.fullmatch(NAME, target):
                faults.append(f"{where}, to: {target!r} can be the name of no peer; name one, or several")
            elif peer is not None and (not peer_of(peer).callable or not peer.port):
                faults.append(f"{where}, to: peer {target!r} has no host and port to deliver to; add both")
    if settings.archive.store == "s3" and not settings.archive.bucket:
        faults.append('archive.bucket: store = "s3" needs the name of a bucket')
    faults += [f"archive.tags: {tag!r} is not name=value" for tag in settings.archive.tags if not re.fullmatch(r"[^=]+=[^=]*", tag)]
    if settings.keys.ring == "kms" and not settings.keys.kms_key_id:
        faults.append('keys.kms_key_id: ring = "kms" needs the id, ARN or alias of a key')
    if settings.database.url and settings.archive.store != "s3":
        faults.append(
            'archive.store: with a PostgreSQL database several nodes share the objects too: use store = "s3", or leave database.url empty'
        )
    hooks = [hook.name for hook in settings.webhooks]
    for name in sorted({name for name in hooks if hooks.count(name) > 1}):
        faults.append(f"webhooks: the name {name!r} stands twice; give each subscriber a name of its own")
    for index, hook in enumerate(settings.webhooks):
        where = config_faults.entry("webhooks", index, {"name": hook.name})
        if not hook.secrets or any(len(secret.get_secret_value()) < 32 for secret in hook.secrets):
            faults.append(f"{where}, secrets: give one or two secrets of at least 32 characters")
        if hook.url.startswith("http://") and not is_loopback(urlsplit(hook.url).hostname or ""):
            faults.append(f"{where}, url: what is not this machine needs https")
    return faults


def _tls_faults(settings: Settings) -> list[str]:
    tls, faults = settings.tls, []
    if tls.enabled and (tls.certificate is None or tls.key is None):
        faults.append("tls.certificate: TLS needs a certificate and its key; name both files, or set tls.enabled = false")
    if tls.enabled and tls.client != "none" and tls.authorities is None:
        faults.append('tls.authorities: callers are asked for certificates; name who may vouch for them, or set tls.client = "none"')
    if settings.identities.token_once and settings.dimse.processes > 1:
        faults.append("identities.token_once: each receiving process remembers its own tokens; set dimse.processes = 1, or false here")
    for index, peer in enumerate(settings.peers):
        if peer.tls and tls.authorities is None:
            faults.append(f"peers.{index}.tls: name in tls.authorities who may vouch for peer {peer.name}")
        if peer.certificate and not (tls.enabled or peer.tls):
            faults.append(f"peers.{index}.certificate: without TLS no certificate is shown; set tls.enabled = true, or leave it empty")
    return faults


def _audit_faults(settings: Settings) -> list[str]:
    audit, faults = settings.audit, []
    if audit.syslog_host and audit.authorities is None and settings.tls.authorities is None:
        faults.append("audit.authorities: the audit trail goes out by TLS alone; name who may vouch for the repository")
    if re.search(r"[/\s]", audit.syslog_host):
        faults.append(f"audit.syslog_host: {audit.syslog_host!r} is no host name or address; the port stands in audit.syslog_port")
    if (audit.certificate is None) != (audit.key is None):
        faults.append("audit.certificate: a certificate needs its private key, and a key its certificate; name both files, or none")
    if audit.refuse_after and not audit.syslog_host:
        faults.append("audit.refuse_after: nothing takes the records, so that all would be refused; name audit.syslog_host, or set it to 0")
    return faults


def peer_of(section: PeerSection) -> Peer:
    """Make the peer that a section describes."""
    return Peer(**section.model_dump())


def _environment_overrides(environ: Mapping[str, str], faults: list[str], sources: dict[tuple[str, str], str]) -> dict[str, dict[str, Any]]:
    overrides: dict[str, dict[str, Any]] = {}

    def put(section: str, key: str, value: str, source: str) -> None:
        model = Settings.model_fields.get(section)
        if model is None or section in _LISTS:
            faults.append(
                f"{source}: no section {section!r}{config_faults.nearest(section, Settings.model_fields)}; "
                "sections that the environment can set: " + ", ".join(name for name in Settings.model_fields if name not in _LISTS)
            )
            return
        known = model.annotation.model_fields if model.annotation is not None else {}
        if key not in known:
            faults.append(f"{source}: section [{section}] has no key {key!r}{config_faults.nearest(key, known)}; known: {', '.join(known)}")
            return
        listed = "tuple" in str(known[key].annotation)
        sources[section, key] = source
        overrides.setdefault(section, {})[key] = tuple(filter(None, (item.strip() for item in value.split(",")))) if listed else value

    for name, (section, key) in ALIASES.items():
        if name in environ:
            put(section, key, environ[name], name)
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX) or "__" not in name:
            continue
        section, _, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        value = environ[name]
        model = Settings.model_fields.get(section)
        known = model.annotation.model_fields if model is not None and model.annotation is not None and section not in _LISTS else {}
        if key.endswith("_file") and key not in known:
            key = key.removesuffix("_file")
            try:
                value = Path(value).read_text(encoding="utf-8").rstrip("\r\n")
            except OSError as error:
                faults.append(f"{name}: the file cannot be read ({error.strerror}); mount it or unset the variable")
                continue
        put(section, key, value, name)
    return overrides


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the configuration.

    Parameters
    ----------
    path
        The TOML file; None: ``$DICOM_NODE_CONFIG``, else the defaults alone.

    Raises
    ------
    ConfigurationError
        With every fault at once.
    """
    environ = os.environ if environ is None else environ
    if path is None and environ.get("DICOM_NODE_CONFIG"):
        path = Path(environ["DICOM_NODE_CONFIG"])
    faults: list[str] = []
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError([f"{path}: cannot be read ({error.strerror}); name an existing file with --config"]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError([config_faults.unreadable(path, error)]) from error
    sources: dict[tuple[str, str], str] = {}
    for section, values in _environment_overrides(environ, faults, sources).items():
        under = table.setdefault(section, {})
        if isinstance(under, dict):
            under.update(values)
    try:
        settings = Settings.model_validate(table)
    except ValidationError as error:
        faults.extend(config_faults.sentence(fault, Settings, table, sources) for fault in error.errors())
    except ConfigurationError as error:
        faults.extend(error.faults)
    else:
        if not faults:
            return settings
    raise ConfigurationError(faults)


def _default_of(value: Any) -> str:
    if value is None:
        return '""'
    if isinstance(value, SecretStr):
        return '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return f'"{value}"'


def _sections() -> list[tuple[str, type[Section], bool]]:
    listed: list[tuple[str, type[Section], bool]] = [
        (name, type(field.default), False) for name, field in Settings.model_fields.items() if isinstance(field.default, Section)
    ]
    return [*listed, ("peers", PeerSection, True), ("routes", RouteSection, True), ("webhooks", WebhookSection, True)]


def example_toml() -> str:
    """``conf/node.toml``: every key with its default and what it means."""
    lines = [
        "# dicom-node: every key, with its default. Each may also be given as DICOM_NODE_<SECTION>__<KEY> in the environment,",
        "# and from a file as DICOM_NODE_<SECTION>__<KEY>_FILE. `dicom-node check` names every fault.",
        "",
    ]
    for name, model, many in _sections():
        lines.append(f"# {(model.__doc__ or '').strip().splitlines()[0]}")
        comment = "# " if many else ""
        lines.append(f"{comment}[[{name}]]" if many else f"[{name}]")
        for key, field in model.model_fields.items():
            lines.append(f"# {field.description}")
            shown = _EXAMPLES[name].get(key, _default_of(field.default)) if many else _default_of(field.default)
            unset = "# " if many or field.default is None else ""
            lines.append(f"{unset}{field.alias or key} = {shown}")
        lines.append("")
    return "\n".join(lines)


_EXAMPLES: Mapping[str, Mapping[str, str]] = {
    "peers": {"name": '"pacs"', "ae_title": '"PACS"', "host": '"192.0.2.10"', "port": "104"},
    "routes": {"to": '["pacs"]'},
    "webhooks": {
        "name": '"ris"',
        "url": '"https://ris.example/hook"',
        "secrets": '["32 characters or more, for example of openssl rand -hex 32"]',
    },
}


def reference_markdown() -> str:
    """``docs/configuration.md``: the reference, from the same source."""
    lines = [
        "# Configuration",
        "",
        "Made by `dicom-node config --reference` from the settings; do not edit. The file is TOML",
        "(`--config FILE` or `DICOM_NODE_CONFIG`); `conf/node.toml` holds every key with its default.",
        "The environment overrides the file: `DICOM_NODE_<SECTION>__<KEY>`, lists with commas;",
        "with `_FILE` behind it, the value is read from the file named.",
        "`DICOM_AET` and `DICOM_PORT` are accepted for `dimse.ae_title` and `dimse.port`.",
        "",
    ]
    for name, model, many in _sections():
        lines += [
            f"## `{f'[[{name}]]' if many else f'[{name}]'}`",
            "",
            (model.__doc__ or "").strip().splitlines()[0],
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"`{_default_of(field.default)}`"
            lines.append(f"| `{field.alias or key}` | {default} | {field.description} |")
        lines.append("")
    return "\n".join(lines)
