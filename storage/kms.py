"""Wrapping keys that never leave a key service: AWS KMS, or what speaks its protocol. With `storage.s3` the only importer of boto3.

Each call names its encryption context, ``{"dicom-node": purpose, "id": name}``: the service refuses to open what was wrapped for something
else, and its own log (CloudTrail) says which study key was opened when. Credentials come from boto3's standard chain; those that the
service refuses are looked up again, as somebody may have renewed them in their file.

The role of the node needs ``kms:GenerateDataKey``, ``kms:Encrypt`` and ``kms:Decrypt`` on the key, nothing else.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError, PartialCredentialsError

from storage.errors import IntegrityError, StorageError, Unavailable
from storage.keys import KEY_BYTES

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

T = TypeVar("T")
_log = logging.getLogger(__name__)

_CREDENTIALS: Final = (
    "ExpiredTokenException",
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationTokenException",
)
_RENEW_EVERY_S: Final = 1.0
"""Credentials that are refused are looked up again at most so often."""
_DAMAGED: Final = ("InvalidCiphertextException", "IncorrectKeyException")
_REMEDIES: Final[Mapping[str, str]] = {
    "AccessDeniedException": (
        "access is denied: allow kms:GenerateDataKey, kms:Encrypt and kms:Decrypt on this key to the node's role (key policy and role)"
    ),
    "UnrecognizedClientException": "the credentials are not known to the service: look at the role, profile or variables that boto3 finds",
    "InvalidClientTokenId": "the credentials are not known to the service: look at the role, profile or variables that boto3 finds",
    "InvalidSignatureException": "the signature is refused: look at the secret access key and at this machine's clock",
    "ExpiredTokenException": "the credentials have expired: renew them, or give the machine a role",
    "DisabledException": "the key is disabled: enable it in the key service",
    "KMSInvalidStateException": "the key is being deleted or is in another state that forbids its use: cancel the deletion, at once",
    "NotFoundException": "there is no such key in this region of this account: look at ARN, region and endpoint",
    "InvalidKeyUsageException": "the key is none for encryption: a symmetric one (SYMMETRIC_DEFAULT, ENCRYPT_DECRYPT) is needed",
    "ThrottlingException": "the service takes no more requests now: it is tried again later; ask for a higher quota if this stays",
    "LimitExceededException": "a quota of the key service is used up: ask for a higher one",
}
_UNKNOWN: Final = "the service reports {code}: it is tried again later; look at the state of the service if this stays"


class _Made(NamedTuple):
    secret: bytes
    wrapped: bytes
    arn: str


class KmsKey:
    """A ``WrappingKey`` in a key service. Connects when it is first used; for any number of threads.

    Parameters
    ----------
    arn
        Of a symmetric key. When a key comes into the ring an id or alias will do, see `resolved`.
    region
        Empty: the one in the ARN, else what boto3's standard chain says.
    endpoint_url
        Of a compatible service; empty: AWS. Plain ``http`` is refused unless it stays on this machine, since keys cross in clear.
    connect_timeout_s, read_timeout_s, attempts
        Bounds of one request, and how often it is tried (growing delay with jitter).
    pause_s
        For so long after it was found unreachable, the service is not asked again: of many that wait for each other only the first
        waits for the network.

    Raises
    ------
    Unavailable
        An endpoint over plain HTTP.
    """

    def __init__(
        self,
        arn: str,
        *,
        region: str = "",
        endpoint_url: str = "",
        connect_timeout_s: float = 2.0,
        read_timeout_s: float = 5.0,
        attempts: int = 3,
        pause_s: float = 1.0,
    ) -> None:
        if endpoint_url and not _safe(endpoint_url):
            raise Unavailable("the endpoint of the key service is plain HTTP to another machine: use https, the keys cross in clear")
        self._arn = arn
        self._region = region or (arn.split(":")[3] if arn.count(":") >= 5 else "")  # arn:aws:kms:REGION:account:key/…
        self._endpoint_url = endpoint_url
        self._config = Config(
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            retries={"total_max_attempts": attempts, "mode": "standard"},
        )
        self._pause_s = pause_s
        self._away: tuple[float, str] = (0.0, "")
        self._client: KMSClient | None = None
        self._credentials: Any = None
        self._renewed_at = float("-inf")
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """The ARN."""
        return self._arn

    def resolved(self) -> KmsKey:
        """Return this key by its ARN, after a secret went through it once: an alias may point elsewhere tomorrow.

        Raises
        ------
        Unavailable
            The key cannot be used now, for one of the three operations.
        """
        made = self._generate("trial", "")
        if self.unwrap(self.wrap(made.secret, "trial", ""), "trial", "") != made.secret:
            raise Unavailable(f"the key service gives back other bytes than it took for {self._arn}: do not use it")
        key = KmsKey(made.arn, region=self._region, endpoint_url=self._endpoint_url)
        key._config, key._pause_s, key._client, key._credentials = self._config, self._pause_s, self._client, self._credentials
        return key

    def generate(self, purpose: str, name: str) -> tuple[bytes, bytes]:
        """Return a new secret, in clear and wrapped; Unavailable when the key cannot be used now."""
        made = self._generate(purpose, name)
        return made.secret, made.wrapped

    def wrap(self, secret: bytes, purpose: str, name: str) -> bytes:
        """Wrap a secret; Unavailable when the key cannot be used now."""
        context = _context(purpose, name)
        return self._call(lambda kms: kms.encrypt(KeyId=self._arn, Plaintext=secret, EncryptionContext=context)["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, purpose: str, name: str) -> bytes:
        """Return the secret; IntegrityError when this key did not wrap these bytes for this, Unavailable when it cannot be used now."""
        context = _context(purpose, name)
        # the key is named so that the service opens with no other one that the ciphertext may ask for
        return _whole(self._call(lambda kms: kms.decrypt(KeyId=self._arn, CiphertextBlob=wrapped, EncryptionContext=context)["Plaintext"]))

    def document(self) -> dict[str, str]:
        """Return the address; there is nothing secret in it."""
        return {"kind": "kms", "arn": self._arn, "region": self._region, "endpoint_url": self._endpoint_url}

    def _generate(self, purpose: str, name: str) -> _Made:
        context = _context(purpose, name)

        def operation(kms: KMSClient) -> _Made:
            answer = kms.generate_data_key(KeyId=self._arn, NumberOfBytes=KEY_BYTES, EncryptionContext=context)
            return _Made(_whole(answer["Plaintext"]), answer["CiphertextBlob"], answer["KeyId"])

        return self._call(operation)

    def _call(self, operation: Callable[[KMSClient], T]) -> T:
        until, reason = self._away
        if time.monotonic() < until:
            raise Unavailable(reason)
        try:
            client = self._connected()
            try:
                return operation(client)
            except (ClientError, NoCredentialsError, PartialCredentialsError) as error:
                if (isinstance(error, ClientError) and _code(error) not in _CREDENTIALS) or not self._renew(client):
                    raise
            return operation(self._connected())
        except ClientError as error:
            raise self._refused(error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise Unavailable(f"the key service for {self._arn}: no credentials are found: give the machine a role") from error
        except NoRegionError as error:
            raise Unavailable(f"the key service for {self._arn}: no region is known: name the key by its ARN, or set the region") from error
        except (BotoCoreError, OSError) as error:
            reason = f"the key service for {self._arn} is not reachable ({type(error).__name__}): look at network, endpoint and certificate"
            self._away = (time.monotonic() + self._pause_s, reason)
            raise Unavailable(reason) from error
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise Unavailable(
                f"the key service for {self._arn} answers what is no answer ({type(error).__name__}): look at the endpoint"
            ) from error

    def _refused(self, error: ClientError) -> StorageError:
        code = _code(error)
        if code in _DAMAGED:
            return IntegrityError(f"the key service does not open a secret with {self._arn}: damaged, or wrapped for something else")
        return Unavailable(f"the key service for {self._arn}: {_REMEDIES.get(code, _UNKNOWN.format(code=code or 'a fault'))}")

    def _connected(self) -> KMSClient:
        with self._lock:
            return self._client or self._connect(boto3.session.Session())

    def _connect(self, session: boto3.session.Session) -> KMSClient:
        self._client = session.client("kms", region_name=self._region or None, endpoint_url=self._endpoint_url or None, config=self._config)
        self._credentials = session.get_credentials()
        return self._client

    def _renew(self, client: KMSClient) -> bool:
        """Look the credentials up again; False when they are the same as before, or that was done just now."""
        with self._lock:
            if client is not self._client:
                return True  # another thread did
            now = time.monotonic()
            if now - self._renewed_at < _RENEW_EVERY_S:
                return False
            self._renewed_at = now
            session = boto3.session.Session()
            found = _frozen(session.get_credentials())
            if found is None or found == _frozen(self._credentials):
                return False
            self._connect(session)
        _log.warning("key_service.credentials_renewed", extra={"key": self._arn})
        return True


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _frozen(credentials: Any) -> Any:
    """Return the credentials as they are now; None where there are none, or they cannot be had now."""
    try:
        return None if credentials is None else credentials.get_frozen_credentials()
    except (BotoCoreError, OSError) as error:
        _log.warning("key_service.credentials_unknown", extra={"reason": type(error).__name__})
        return None


def _context(purpose: str, name: str) -> dict[str, str]:
    return {"dicom-node": purpose, "id": name}


def _whole(secret: bytes) -> bytes:
    if len(secret) != KEY_BYTES:
        raise IntegrityError(f"the key service gave a secret of {len(secret)} bytes where {KEY_BYTES} belong: something else wrapped it")
    return secret


def _safe(endpoint_url: str) -> bool:
    try:
        parts = urlsplit(endpoint_url)
        host = parts.hostname or ""
        if parts.scheme == "http":
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return parts.scheme == "https" and bool(host)
