"""S3Store: sealed objects in an S3 bucket. With the key management service to come, the only importer of boto3."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from urllib3.exceptions import HTTPError

from storage.errors import StorageError, Unavailable
from storage.failpoints import unarmed
from storage.objects import CHUNK, OBJECT_KEY, ObjectInfo, ObjectReader, absent, disk_unavailable, occupied, relative_path

if TYPE_CHECKING:
    from storage.records import SealedObject

_BROKEN_OFF = (BotoCoreError, HTTPError, OSError)
"""What reading a body raises; botocore translates most, but not all, of what lies under it."""


def _wait(attempt: int) -> None:
    time.sleep(random.uniform(0.05, 0.2) * 2**attempt)  # noqa: S311 - jitter, no secret


# --- S3 --------------------------------------------------------------------------------------------------------------


class S3Store:
    """Objects in an S3 bucket (AWS or a compatible service).

    Credentials come from boto3's standard chain (environment, profile, container or instance role), never from an
    argument. A 200 is no proof: after every upload the object is read back and its SHA-256 compared before ``put``
    returns (policy ``archive``).

    Parameters
    ----------
    bucket, prefix, endpoint_url, region
        Where; `prefix` is put before every key as it is, so end it with a slash. A node never creates its bucket.
    server_side_encryption, storage_class
        Passed on with every upload when not empty (``AES256``, ``aws:kms``; ``STANDARD_IA`` …).
    connect_timeout_s, read_timeout_s, attempts
        Bounds of one request, and how often it is tried (growing delay with jitter).
    multipart_bytes, part_bytes
        Above `multipart_bytes` an object goes up in parts of `part_bytes` (at least 5 MiB), each held in memory once.
    pause
        Waits before the n-th repetition of a reading (the upload's own are botocore's).
    """

    remote = True

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        region: str | None = None,
        server_side_encryption: str = "",
        storage_class: str = "",
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 30.0,
        attempts: int = 4,
        multipart_bytes: int = 64 * 1024**2,
        part_bytes: int = 16 * 1024**2,
        pause: Callable[[int], None] = _wait,
        reach: Callable[[str], None] = unarmed,
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._attempts = attempts
        self._multipart_bytes = multipart_bytes
        self._part_bytes = part_bytes
        self._pause = pause
        self._reach = reach
        self._extra: dict[str, str] = {}
        if server_side_encryption:
            self._extra["ServerSideEncryption"] = server_side_encryption
        if storage_class:
            self._extra["StorageClass"] = storage_class
        self._client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=region,
            config=Config(
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
                retries={"total_max_attempts": attempts, "mode": "standard"},
                max_pool_connections=64,
                # Checksums are ours, given with each request; the automatic ones use trailers that few compatible services know.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                # A service of one's own rarely has a name per bucket; AWS itself prefers names.
                s3={"addressing_style": "path" if endpoint_url else "auto"},
            ),
        )

    def put(self, object_key: str, path: Path, sealed: SealedObject, *, tags: Mapping[str, str] | None = None) -> None:  # noqa: ARG002 - next commit
        """Upload with Content-MD5 and SHA-256, read back, compare. See `ObjectStore.put`."""
        name = self._prefix + relative_path(object_key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise disk_unavailable(error, path.parent) from error
        with os.fdopen(descriptor, "rb") as file:
            try:
                if sealed.byte_count > self._multipart_bytes:
                    self._put_in_parts(name, file)
                else:
                    self._put_whole(name, file, sealed)
            except (BotoCoreError, ClientError) as error:
                # 412: the object is there. Was it our own upload, whose answer got lost? The digest tells.
                if not (isinstance(error, ClientError) and _status_of(error) == 412):
                    raise self._unavailable(error, "write") from error
                if self._read_back(name) != (sealed.byte_count, sealed.sha256):
                    raise occupied(object_key) from error
            except OSError as error:
                raise disk_unavailable(error, path.parent) from error
        self._reach("object.renamed")
        self._confirm(object_key, name, sealed)
        self._reach("directory.flushed")

    def _put_whole(self, name: str, file: BinaryIO, sealed: SealedObject) -> None:
        md5 = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(CHUNK):
            md5.update(chunk)
        file.seek(0)
        self._client.put_object(
            Bucket=self._bucket,
            Key=name,
            Body=file,
            ContentLength=sealed.byte_count,
            ContentMD5=base64.b64encode(md5.digest()).decode(),
            ChecksumSHA256=base64.b64encode(bytes.fromhex(sealed.sha256)).decode(),
            IfNoneMatch="*",
            **self._extra,
        )

    def _put_in_parts(self, name: str, file: BinaryIO) -> None:
        upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=name, ChecksumAlgorithm="SHA256", **self._extra)["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            while part := file.read(self._part_bytes):
                digest = base64.b64encode(hashlib.sha256(part).digest()).decode()
                answer = self._client.upload_part(
                    Bucket=self._bucket,
                    Key=name,
                    UploadId=upload,
                    PartNumber=len(parts) + 1,
                    Body=part,
                    ContentMD5=base64.b64encode(hashlib.md5(part, usedforsecurity=False).digest()).decode(),
                    ChecksumSHA256=digest,
                )
                parts.append({"PartNumber": len(parts) + 1, "ETag": answer["ETag"], "ChecksumSHA256": digest})
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except BaseException:
            # Unfinished parts cost money and are seen by no listing. Should this fail too, the bucket's lifecycle rule ends them.
            with contextlib.suppress(BotoCoreError, ClientError):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload)
            raise

    def _confirm(self, object_key: str, name: str, sealed: SealedObject) -> None:
        for attempt in range(self._attempts):
            if attempt:
                self._pause(attempt)  # a store may show a new object late
            if self._read_back(name) == (sealed.byte_count, sealed.sha256):
                return
        with contextlib.suppress(BotoCoreError, ClientError):
            self._client.delete_object(Bucket=self._bucket, Key=name)
        raise Unavailable(
            f"bucket {self._bucket!r} answered that it took object {object_key}, but does not give the same bytes back; "
            "nothing was acknowledged: look into the store's health before sending again",
        )

    def _read_back(self, name: str) -> tuple[int, str]:
        """Return byte count and SHA-256 of what the store holds; (-1, "") when it holds nothing, or breaks off."""
        digest = hashlib.sha256()
        count = 0
        try:
            body = self._client.get_object(Bucket=self._bucket, Key=name)["Body"]
            with contextlib.closing(body):
                while chunk := body.read(CHUNK):
                    digest.update(chunk)
                    count += len(chunk)
        except ClientError as error:
            if _status_of(error) == 404 and _code_of(error) != "NoSuchBucket":
                return -1, ""
            raise self._unavailable(error, "read back") from error
        except NoCredentialsError as error:
            raise self._unavailable(error, "read back") from error
        except _BROKEN_OFF:
            return -1, ""
        return count, digest.hexdigest()

    def open(self, object_key: str) -> ObjectReader:
        """Open the object with one request, which brings its size and its first bytes."""
        return _S3Reader(self, self._prefix + relative_path(object_key), object_key)

    def get_range(self, name: str, object_key: str, offset: int, length: int) -> tuple[bytes, int]:
        """Return the bytes of a range and the size of the whole object; a broken-off body is asked for again."""
        last: Exception | None = None
        for attempt in range(self._attempts):
            if attempt:
                self._pause(attempt)
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=name, Range=f"bytes={offset}-{offset + length - 1}")
                with contextlib.closing(answer["Body"]) as body:
                    chunk: bytes = body.read(length + 1)
                size = int(answer.get("ContentRange", "/-1").rpartition("/")[2])
                if size < 0:
                    raise Unavailable(f"bucket {self._bucket!r} ignores range requests; use a store that knows them")
                if len(chunk) == max(0, min(length, size - offset)):
                    return chunk, size
            except ClientError as error:
                code = _code_of(error)
                if _status_of(error) == 416:
                    return b"", self._size(name)
                if _status_of(error) == 404 and code != "NoSuchBucket":
                    raise absent(object_key) from error
                raise self._unavailable(error, "read") from error
            except NoCredentialsError as error:
                raise self._unavailable(error, "read") from error
            except _BROKEN_OFF as error:
                last = error
        raise Unavailable(f"bucket {self._bucket!r} breaks off every read of object {object_key}; look into network and store") from last

    def _size(self, name: str) -> int:
        try:
            return int(self._client.head_object(Bucket=self._bucket, Key=name)["ContentLength"])
        except (BotoCoreError, ClientError) as error:
            raise self._unavailable(error, "read") from error

    def delete(self, object_key: str, *, versions: bool = False) -> None:  # noqa: ARG002 - next commit
        """Delete the object; S3 itself is silent about one that is not there."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + relative_path(object_key))
        except ClientError as error:
            if _code_of(error) != "NoSuchKey":
                raise self._unavailable(error, "delete") from error
        except BotoCoreError as error:
            raise self._unavailable(error, "delete") from error

    def list(self) -> Iterator[ObjectInfo]:
        """Yield every object by rising key (S3 lists in that order); names that are no objects are passed over."""
        try:
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix):
                for entry in page.get("Contents", ()):
                    name = str(entry["Key"])[len(self._prefix) :]
                    if OBJECT_KEY.fullmatch(name[3:]) and name == relative_path(name[3:]):
                        yield ObjectInfo(name[3:], int(entry["Size"]), entry["LastModified"].astimezone(UTC))
        except (BotoCoreError, ClientError) as error:
            raise self._unavailable(error, "list") from error

    def check(self) -> None:
        """Ask whether the bucket is there and may be used."""
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            raise self._unavailable(error, "reach") from error

    def _unavailable(self, error: Exception, doing: str) -> StorageError:
        where = f"cannot {doing} bucket {self._bucket!r} at {self._client.meta.endpoint_url}"
        if isinstance(error, NoCredentialsError):
            return Unavailable(f"{where}: no credentials found; give them by environment, profile or role")
        if isinstance(error, ClientError):
            code, status = _code_of(error), _status_of(error)
            if code == "NoSuchBucket" or (status == 404 and doing == "reach"):
                return Unavailable(f"{where}: there is no such bucket; create it, or correct [archive] bucket")
            if status in (401, 403):
                return Unavailable(f"{where}: access denied ({code}); check the credentials and the policy of bucket and key")
            if code in ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"):
                return Unavailable(
                    f"{where}: the bytes changed on the way ({code}); look into the network and the disk of the landing folder"
                )
            return Unavailable(f"{where}: the store answered {status} {code}; try again later")
        return Unavailable(f"{where}: {type(error).__name__}; check the endpoint, the network and the TLS certificate")


class _S3Reader:
    """Keeps the first bytes of the object, so that a small instance costs one request."""

    def __init__(self, store: S3Store, name: str, object_key: str) -> None:
        self._store = store
        self._name = name
        self._object_key = object_key
        self._head, self.size = store.get_range(name, object_key, 0, CHUNK + (64 << 10))

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        if length == 0:
            return b""
        return self._store.get_range(self._name, self._object_key, offset, length)[0]

    def close(self) -> None:
        self._head = b""


def _code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
