"""S3Store: sealed objects in an S3 bucket. With `storage.s3_client` and `storage.kms` the only importer of boto3."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qsl, quote, urlencode

from botocore.exceptions import ClientError

from storage.errors import ColdObject, IntegrityError, StorageError, Unavailable
from storage.failpoints import unarmed
from storage.objects import (
    CHUNK,
    DOCUMENT_BYTES,
    DOCUMENT_NAME,
    OBJECT_KEY,
    ObjectInfo,
    ObjectReader,
    absent,
    disk_unavailable,
    document_content,
    document_path,
    document_prefix,
    no_document,
    occupied,
    oversized,
    relative_path,
    wrong_length,
)
from storage.s3_client import AddressingStyle, Deadline, S3Client, Window, code_of, retries_of, status_of
from storage.s3_reader import PIECE, ObjectStream, S3Reader

if TYPE_CHECKING:
    from storage.records import SealedObject

COLD_CLASSES = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""Storage classes whose objects must be restored before they can be read."""
_RESTORE_S = MappingProxyType({"Expedited": 300, "Standard": 4 * 3600, "Bulk": 12 * 3600})
_DEEP_RESTORE_S = MappingProxyType({"Expedited": 12 * 3600, "Standard": 12 * 3600, "Bulk": 48 * 3600})
_DEEP = frozenset({"DEEP_ARCHIVE", "DEEP_ARCHIVE_ACCESS"})
_NOT_IMPLEMENTED: frozenset[str | int] = frozenset({"NotImplemented", "MethodNotAllowed", 405, 501})
_TAG_NAME, _TAG_VALUE = re.compile(r"[\w +\-=.:/@]{1,128}"), re.compile(r"[\w +\-=.:/@]{0,256}")
_NO_UPLOADS = _NOT_IMPLEMENTED | {"NoSuchUpload"}  # rclone's answer when there is none
_CLEANING_S = 15.0
"""Deadline for removing what a failed operation left; its own has passed perhaps."""

_log = logging.getLogger(__name__)


class _Held(Enum):
    SAME = "the bytes that were put"
    OTHER = "other bytes"
    NOTHING = "nothing"
    UNKNOWN = "an object in a cold class whose digest the store does not tell"


class S3Store:
    """Objects in an S3 bucket (AWS or a compatible service).

    Credentials come from boto3's standard chain (environment, profile, container or instance role), never from an argument.

    A 200 is no proof: after every upload the object is read back and its SHA-256 compared before ``put`` returns. An object put
    directly into a cold class (GLACIER, DEEP_ARCHIVE) cannot be read back: there the service's own SHA-256 and length are compared,
    which is the service's word, checked by it against the digest that was sent. A service that tells no digest is not believed.
    Let a lifecycle rule move objects instead where that matters.

    Parameters
    ----------
    bucket, prefix, endpoint_url, region, addressing_style, ca_file
        Where; `prefix` is put before every key as it is, so end it with a slash. A node never creates its bucket. See `S3Client`.
    server_side_encryption, kms_key_id
        ``AES256`` or ``aws:kms`` (with the key of `kms_key_id`, else the bucket's), sent with every upload; empty: the bucket's setting.
    storage_class
        Any of the service's, ``INTELLIGENT_TIERING`` for one; empty: the bucket's. Documents always stay in the standard class.
    tags
        Put on every object, with those of ``put``; for lifecycle rules. At most ten in all. Documents have none.
    restore_tier, restore_days
        How objects of a cold class are restored (``Expedited``, ``Standard``, ``Bulk``), and for how long the copy stays.
    connect_timeout_s, read_timeout_s, attempts, sleep
        See `S3Client`.
    deadline_s, minimum_bytes_per_s
        Every operation ends after `deadline_s` seconds, plus the time its bytes take at `minimum_bytes_per_s` (a ``put`` moves them twice).
    multipart_bytes, part_bytes
        Above `multipart_bytes` an object goes up in parts of `part_bytes` (at least 5 MiB). Parts too are read from the disk as they are
        sent: memory does not grow with either.

    Raises
    ------
    ValueError
        More than ten tags, one that S3 does not take, or an unknown tier.
    """

    remote = True

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        region: str | None = None,
        addressing_style: AddressingStyle = "auto",
        ca_file: Path | None = None,
        server_side_encryption: str = "",
        kms_key_id: str = "",
        storage_class: str = "",
        tags: Mapping[str, str] | None = None,
        restore_tier: str = "Standard",
        restore_days: int = 7,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 30.0,
        attempts: int = 6,
        deadline_s: float = 120.0,
        minimum_bytes_per_s: int = 128 << 10,
        multipart_bytes: int = 64 << 20,
        part_bytes: int = 16 << 20,
        sleep: Callable[[float], None] = time.sleep,
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        if restore_tier not in _RESTORE_S:
            raise ValueError(f"a tier of restoring is one of {', '.join(_RESTORE_S)}")
        self._bucket = bucket
        self._prefix = prefix
        self._tags = dict(tags or {})
        self._tagging(None)
        self._restore_tier = restore_tier
        self._restore_days = restore_days
        self._deadline_s = deadline_s
        self._minimum_bytes_per_s = minimum_bytes_per_s
        self._multipart_bytes = multipart_bytes
        self._part_bytes = part_bytes
        self._reach = reach
        self._encryption: dict[str, Any] = {}
        if server_side_encryption:
            self._encryption["ServerSideEncryption"] = server_side_encryption
        if kms_key_id:
            self._encryption["SSEKMSKeyId"] = kms_key_id
        self._class = {"StorageClass": storage_class} if storage_class else {}
        self._unencrypted = False
        self._client = S3Client(
            bucket=bucket,
            endpoint_url=endpoint_url,
            region=region,
            addressing_style=addressing_style,
            ca_file=ca_file,
            connect_timeout_s=connect_timeout_s,
            read_timeout_s=read_timeout_s,
            attempts=attempts,
            sleep=sleep,
        )

    def _deadline(self, byte_count: int = 0) -> Deadline:
        return Deadline(self._deadline_s + byte_count / self._minimum_bytes_per_s)

    def _tagging(self, tags: Mapping[str, str] | None) -> dict[str, str]:
        merged = {**self._tags, **(tags or {})}
        if len(merged) > 10:
            raise ValueError(f"an object has at most ten tags, these are {len(merged)}; shorten [archive] tags")
        for name, value in merged.items():
            if not (_TAG_NAME.fullmatch(name) and _TAG_VALUE.fullmatch(value)):
                raise ValueError(f"the tag {name!r} has a name or value that S3 does not take: letters, digits, spaces and +-=._:/@ alone")
        # a space as %20: radosgw takes a + for itself
        return {"Tagging": urlencode(merged, quote_via=quote)} if merged else {}

    # --- put -------------------------------------------------------------------------------------------------------------

    def put(self, object_key: str, path: Path, sealed: SealedObject, *, tags: Mapping[str, str] | None = None) -> None:
        """Upload with its SHA-256, then read back and compare. See `ObjectStore.put`.

        Whether an answer was lost or another process was faster, the bytes that are read back decide. Only what was read whole and is
        surely other than what was put is removed again.
        """
        name = self._prefix + relative_path(object_key)
        extra = {**self._encryption, **self._class, **self._tagging(tags)}
        deadline = self._deadline(2 * sealed.byte_count)
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                length = os.fstat(file.fileno()).st_size
                if length != sealed.byte_count:
                    raise wrong_length(object_key, length, sealed.byte_count)
                upload = self._put_in_parts if sealed.byte_count > self._multipart_bytes else self._put_whole
                try:
                    ours, checksum = upload(name, file, sealed, extra, deadline)
                    self._reach("object.renamed")
                    self._confirm(name, sealed, checksum, deadline, ours=ours)
                    if upload == self._put_in_parts and "Tagging" in extra:
                        self._keep_tags(name, extra["Tagging"], deadline)
                except Unavailable:
                    _require_unchanged(sealed, file)  # looked at only now: who is at fault, the store or this disk?
                    raise
        except OSError as error:
            raise disk_unavailable(error, path.parent) from error
        self._reach("directory.flushed")

    def _put_whole(self, name: str, file: BinaryIO, sealed: SealedObject, extra: Mapping[str, Any], deadline: Deadline) -> tuple[bool, str]:
        """Return whether what lies under `name` now came from this call (or may have), and the checksum that the store should know."""
        checksum = base64.b64encode(bytes.fromhex(sealed.sha256)).decode()
        try:
            answer = self._client.call(
                "put_object",
                deadline,
                "write",
                expected=(412,),
                body=Window(file, 0, sealed.byte_count, deadline),
                Key=name,
                ContentLength=sealed.byte_count,
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=checksum,
                IfNoneMatch="*",
                **extra,
            )
        except ClientError as error:
            return retries_of(error) > 0, checksum  # 412: the object is there; from our own try perhaps, whose answer got lost
        self._look_for_encryption(answer)
        return True, checksum

    def _put_in_parts(
        self, name: str, file: BinaryIO, sealed: SealedObject, extra: Mapping[str, Any], deadline: Deadline
    ) -> tuple[bool, str]:
        """As `_put_whole`."""
        begun = self._client.call("create_multipart_upload", deadline, "write", Key=name, ChecksumAlgorithm="SHA256", **extra)
        self._look_for_encryption(begun)
        upload: dict[str, Any] = {"Key": name, "UploadId": str(begun["UploadId"])}
        parts: list[dict[str, Any]] = []
        whole, of_digests = hashlib.sha256(), hashlib.sha256()
        try:
            for start in range(0, sealed.byte_count, self._part_bytes):
                length = min(self._part_bytes, sealed.byte_count - start)
                sha256 = hashlib.sha256()
                file.seek(start)
                for offset in range(0, length, CHUNK):
                    chunk = file.read(min(CHUNK, length - offset))
                    sha256.update(chunk)
                    whole.update(chunk)
                of_digests.update(sha256.digest())
                checksum = base64.b64encode(sha256.digest()).decode()
                answer = self._client.call(
                    "upload_part",
                    deadline,
                    "write",
                    body=Window(file, start, length, deadline),
                    **upload,
                    PartNumber=len(parts) + 1,
                    ContentLength=length,
                    ChecksumSHA256=checksum,
                )
                parts.append({"PartNumber": len(parts) + 1, "ETag": answer["ETag"], "ChecksumSHA256": checksum})
            if whole.hexdigest() != sealed.sha256:
                raise _changed(sealed)  # noqa: TRY301 - the handler below aborts the upload
            composite = f"{base64.b64encode(of_digests.digest()).decode()}-{len(parts)}"
            try:
                self._client.call(
                    "complete_multipart_upload",
                    deadline,
                    "write",
                    expected=(412, "NoSuchUpload"),
                    **upload,
                    MultipartUpload={"Parts": parts},
                    IfNoneMatch="*",
                )
            except ClientError as error:
                if status_of(error) == 412:
                    self._abort(upload)
                return retries_of(error) > 0, composite
        except BaseException:
            self._abort(upload)
            raise
        return True, composite

    def _keep_tags(self, name: str, tagging: str, deadline: Deadline) -> None:
        """Give an object that went up in parts its tags, where the service says that it has none: radosgw drops them."""
        try:
            head = self._client.call("head_object", deadline, "read back", expected=(404,), Key=name)
        except ClientError:
            return  # deleted meanwhile
        if head.get("TagCount") == 0:
            tags = [{"Key": key, "Value": value} for key, value in parse_qsl(tagging, keep_blank_values=True)]
            self._client.call("put_object_tagging", deadline, "tag an object of", Key=name, Tagging={"TagSet": tags})

    def _look_for_encryption(self, answer: Mapping[str, Any]) -> None:
        """Say once that a service encrypts nothing though it was asked to. What it holds is sealed by the node in any case."""
        if self._encryption and not self._unencrypted and not answer.get("ServerSideEncryption"):
            self._unencrypted = True
            remedy = (
                "configure the store's encryption, or empty [archive] server_side_encryption; the node's own encryption is not affected"
            )
            _log.warning("store.encryption.ignored", extra={"bucket": self._bucket, "remedy": remedy})

    def _abort(self, upload: Mapping[str, Any]) -> None:
        """Give up an upload: its parts cost money and no listing shows them. Should this fail too, `clean_uploads` finds it."""
        try:
            self._client.call("abort_multipart_upload", Deadline(_CLEANING_S), "clean", expected=("NoSuchUpload", 404), **upload)
        except ClientError:
            return  # there is none any more
        except StorageError as error:
            _log.warning("upload.left", extra={"bucket": self._bucket, "reason": str(error)})

    def clean_uploads(self, older_than: datetime) -> int:
        """Abort uploads in parts below our prefix that were begun before `older_than` (aware) and never ended; return how many.

        A crash of the node leaves them. A service that knows no listing of uploads has none as far as we can tell.
        """
        marks: dict[str, Any] = {}
        cleaned = 0
        while True:
            deadline = self._deadline()
            try:
                page = self._client.call(
                    "list_multipart_uploads", deadline, "list", expected=_NO_UPLOADS, Prefix=self._prefix, MaxUploads=1000, **marks
                )
            except ClientError:
                return cleaned
            for entry in page.get("Uploads", ()):
                if self._object_key_of(str(entry["Key"])) and entry["Initiated"] < older_than:
                    with contextlib.suppress(ClientError):  # it ended meanwhile
                        self._client.call(
                            "abort_multipart_upload",
                            self._deadline(),
                            "clean",
                            expected=("NoSuchUpload", 404),
                            Key=entry["Key"],
                            UploadId=entry["UploadId"],
                        )
                        cleaned += 1
            if not page.get("IsTruncated"):
                return cleaned
            marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    # --- confirm ---------------------------------------------------------------------------------------------------------

    def _confirm(self, name: str, sealed: SealedObject, checksum: str, deadline: Deadline, *, ours: bool) -> None:
        held = _Held.NOTHING
        for attempt in range(self._client.attempts):
            if attempt and not self._client.pause(attempt, deadline):  # a store may show a new object late
                break
            held = self._held(name, sealed, checksum, deadline)
            if held is _Held.SAME:
                return
        if held is _Held.OTHER:
            if not ours:
                raise occupied(sealed.object_key)
            with contextlib.suppress(StorageError):  # what is left is no object of any row; a later put says so again
                self._client.call("delete_object", Deadline(_CLEANING_S), "clean", Key=name)
        raise Unavailable(
            f"bucket {self._bucket!r} answered that it took object {sealed.object_key}, but does not give the same bytes back "
            f"(it holds {held.value}); nothing was acknowledged: look into the store's health before sending again",
        )

    def _held(self, name: str, sealed: SealedObject, checksum: str, deadline: Deadline) -> _Held:
        """Compare what the store holds with what was put, byte by byte where it can be read."""
        digest = hashlib.sha256()
        try:
            with contextlib.closing(ObjectStream(self._client, name, "read back", deadline)) as stream:
                if stream.size != sealed.byte_count:
                    return _Held.OTHER
                while piece := stream.read(PIECE, deadline):
                    digest.update(piece)
        except ClientError as error:
            return self._held_cold(name, sealed, checksum, deadline) if code_of(error) == "InvalidObjectState" else _Held.NOTHING
        return _Held.SAME if digest.hexdigest() == sealed.sha256 else _Held.OTHER

    def _held_cold(self, name: str, sealed: SealedObject, checksum: str, deadline: Deadline) -> _Held:
        try:
            head = self._client.call("head_object", deadline, "read back", expected=(404,), Key=name, ChecksumMode="ENABLED")
        except ClientError:
            return _Held.NOTHING
        if int(head["ContentLength"]) != sealed.byte_count:
            return _Held.OTHER
        told = str(head.get("ChecksumSHA256", ""))
        if told == checksum:
            return _Held.SAME
        # That of an object in parts depends on their size, which may have been another when the object was put.
        return _Held.OTHER if told and "-" not in told + checksum else _Held.UNKNOWN

    # --- read ------------------------------------------------------------------------------------------------------------

    def open(self, object_key: str) -> ObjectReader:
        """Open the object with one request; of an instance of usual size it brings all the bytes that will be read."""
        name = self._prefix + relative_path(object_key)
        deadline = self._deadline()
        try:
            return S3Reader(self._client, name, object_key, self._deadline)
        except ClientError as error:
            if code_of(error) == "InvalidObjectState":
                raise self._restore(name, object_key, deadline) from error
            raise absent(object_key) from error

    def stat(self, object_key: str) -> ObjectInfo:
        """Ask for the object's head: no byte of it moves, and a cold one stays cold."""
        name = self._prefix + relative_path(object_key)
        deadline = self._deadline()
        try:
            head = self._client.call("head_object", deadline, "read", expected=(404,), Key=name)
        except ClientError as error:
            # The answer to a HEAD does not tell a missing object from a missing bucket, which would be no loss of objects.
            self._client.call("head_bucket", deadline, "reach")
            raise absent(object_key) from error
        cold = (head.get("StorageClass") in COLD_CLASSES or "ArchiveStatus" in head) and 'ongoing-request="false"' not in head.get(
            "Restore", ""
        )
        return ObjectInfo(object_key, int(head["ContentLength"]), head["LastModified"].astimezone(UTC), cold)

    def sha256(self, object_key: str) -> str:
        """Ask for the checksum that was sent with the upload and checked by the service; an object in parts has none over the whole."""
        name = self._prefix + relative_path(object_key)
        deadline = self._deadline()
        try:
            head = self._client.call("head_object", deadline, "read", expected=(404,), Key=name, ChecksumMode="ENABLED")
        except ClientError as error:
            self._client.call("head_bucket", deadline, "reach")
            raise absent(object_key) from error
        told = str(head.get("ChecksumSHA256", ""))
        return "" if not told or "-" in told else base64.b64decode(told).hex()

    def _restore(self, name: str, object_key: str, deadline: Deadline) -> StorageError:
        """Start the restore of a cold object, unless one is under way; return the error that says when to come again."""
        try:
            head = self._client.call("head_object", deadline, "restore from", expected=(404,), Key=name)
        except ClientError:
            return absent(object_key)
        archive = str(head.get("ArchiveStatus", ""))  # of intelligent tiering; those come back for good, there is no number of days
        deep = archive in _DEEP or head.get("StorageClass") in _DEEP
        tier = "Standard" if deep and self._restore_tier == "Expedited" else self._restore_tier
        started = "started"
        if 'ongoing-request="true"' in str(head.get("Restore", "")):
            started = "under way"
        else:
            request: dict[str, Any] = {"GlacierJobParameters": {"Tier": tier}}
            if not archive:
                request["Days"] = self._restore_days
            try:
                self._client.call(
                    "restore_object", deadline, "restore from", expected=("RestoreAlreadyInProgress",), Key=name, RestoreRequest=request
                )
            except ClientError:
                started = "under way"
        wait_s = (_DEEP_RESTORE_S if deep else _RESTORE_S)[tier]
        return ColdObject(
            f"object {object_key} lies in the cold class {archive or head.get('StorageClass')}; its restore is {started} "
            f"and takes up to {wait_s // 60} minutes: ask again then",
            wait_s,
        )

    # --- delete, list, check ---------------------------------------------------------------------------------------------

    def delete(self, object_key: str, *, versions: bool = False) -> None:
        """Delete the object; S3 itself is silent about one that is not there. See `ObjectStore.delete`."""
        name = self._prefix + relative_path(object_key)
        if versions:
            self._erase(name)
        else:
            self._delete(name)

    def _delete(self, name: str, **version: Any) -> None:
        with contextlib.suppress(ClientError):  # there is none
            self._client.call("delete_object", self._deadline(), "delete from", expected=(404,), Key=name, **version)

    def _erase(self, name: str) -> None:
        """Remove every version and every mark of deletion; look that none is left.

        A service that knows no versions answers so, and a plain deletion is the erasure.
        """
        for _ in range(self._client.attempts):
            try:
                found = self._versions(name)
            except ClientError:
                self._delete(name)
                return
            if not found:
                return
            for version in found:
                self._delete(name, VersionId=version)
        raise Unavailable(f"bucket {self._bucket!r} keeps versions of an object that were deleted; look for an object lock or replication")

    def _versions(self, name: str) -> list[str]:
        found: list[str] = []
        marks: dict[str, Any] = {}
        while True:
            page = self._client.call(
                "list_object_versions", self._deadline(), "list versions of", expected=_NOT_IMPLEMENTED, Prefix=name, **marks
            )
            for entry in [*page.get("Versions", ()), *page.get("DeleteMarkers", ())]:
                if entry["Key"] == name:
                    found.append(str(entry["VersionId"]))
            if not page.get("IsTruncated"):
                return found
            marks = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}

    def list(self) -> Iterator[ObjectInfo]:
        """Yield every object by rising key (S3 lists in that order), a page in memory; names that are no objects are passed over."""
        for entry in self._entries(self._prefix):
            if object_key := self._object_key_of(str(entry["Key"])):
                modified_at = entry["LastModified"].astimezone(UTC)
                yield ObjectInfo(object_key, int(entry["Size"]), modified_at, entry.get("StorageClass") in COLD_CLASSES)

    def _entries(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        marks: dict[str, Any] = {}
        while True:
            page = self._client.call("list_objects_v2", self._deadline(), "list", Prefix=prefix, **marks)
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            marks = {"ContinuationToken": page["NextContinuationToken"]}

    def _object_key_of(self, name: str) -> str:
        object_key = name[len(self._prefix) + 3 :]
        return object_key if OBJECT_KEY.fullmatch(object_key) and name == self._prefix + relative_path(object_key) else ""

    def check(self) -> None:
        """Ask whether the bucket is there and may be used."""
        self._client.call("head_bucket", self._deadline(), "reach")

    def trial(self) -> bool | None:
        """Do once, with a document that is gone afterwards, what the node does with its bucket, so that a right that lacks is found now.

        Returns whether the bucket keeps versions; None: the service does not tell.

        Raises
        ------
        Unavailable
            The first thing that cannot be done, and why.
        """
        token = secrets.token_hex(16)
        name = f"trial/{token[:2]}/{token}"
        try:
            self.put_document(name, b"dicom-node tries what it may do here")
            if name not in self.list_documents(f"trial/{token[:2]}/"):
                raise Unavailable(f"bucket {self._bucket!r} does not list what was put; look into the store's health")
        except StorageError:
            with contextlib.suppress(StorageError):  # said is what failed first
                self.delete_document(name)
            raise
        self.delete_document(name)
        with contextlib.suppress(ClientError):  # a service without such uploads
            self._client.call("list_multipart_uploads", self._deadline(), "list uploads of", expected=_NO_UPLOADS, MaxUploads=1)
        try:
            told = self._client.call("get_bucket_versioning", self._deadline(), "ask", expected=(*_NOT_IMPLEMENTED, 403))
        except ClientError:
            return None
        return told.get("Status") == "Enabled"

    # --- documents -------------------------------------------------------------------------------------------------------

    def put_document(self, name: str, content: bytes) -> None:
        """Write with Content-MD5 and SHA-256, read back and compare."""
        key = self._prefix + document_path(name)
        deadline = self._deadline()
        answer = self._client.call(
            "put_object",
            deadline,
            "write",
            Key=key,
            Body=document_content(content),
            ContentMD5=base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode(),
            ChecksumSHA256=base64.b64encode(hashlib.sha256(content).digest()).decode(),
            **self._encryption,
        )
        self._look_for_encryption(answer)
        for attempt in range(self._client.attempts):
            if attempt and not self._client.pause(attempt, deadline):
                break
            try:
                if self._read_document(key, deadline) == content:
                    return
            except ClientError:
                continue  # not there yet
        raise Unavailable(
            f"bucket {self._bucket!r} answered that it took document {name}, but does not give the same bytes back; "
            "look into the store's health",
        )

    def get_document(self, name: str) -> bytes:
        """Read the document with one request."""
        try:
            content = self._read_document(self._prefix + document_path(name), self._deadline())
        except ClientError as error:
            raise no_document(name) from error
        if len(content) > DOCUMENT_BYTES:
            raise oversized(name)
        return content

    def _read_document(self, key: str, deadline: Deadline) -> bytes:
        with contextlib.closing(ObjectStream(self._client, key, "read", deadline)) as stream:
            return stream.read(DOCUMENT_BYTES + 1, deadline)

    def delete_document(self, name: str) -> None:
        """Delete every version of the document."""
        self._erase(self._prefix + document_path(name))

    def list_documents(self, prefix: str) -> Iterator[str]:
        """Yield the names as S3 lists them: in rising order."""
        for entry in self._entries(self._prefix + document_prefix(prefix)):
            name = str(entry["Key"])[len(self._prefix) :]
            if DOCUMENT_NAME.fullmatch(name):
                yield name


def _require_unchanged(sealed: SealedObject, file: BinaryIO) -> None:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != sealed.sha256:
        raise _changed(sealed)


def _changed(sealed: SealedObject) -> IntegrityError:
    return IntegrityError(
        f"the landing file of object {sealed.object_key} holds other bytes than were sealed; nothing was stored: look into the disk",
    )
