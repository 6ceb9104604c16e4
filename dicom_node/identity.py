"""User identity of an association: user name, user name and passcode, or a token.

References
----------
DICOM PS3.7 Section D.3.3.7 (User Identity Negotiation), RFC 9106 (Argon2)
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Final

import structlog
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from dicom_node.errors import StartError
from dicom_node.throttle import Patience, Throttle
from dicom_node.tokens import TokenRefused, Tokens
from storage.errors import StorageError

log = structlog.get_logger(__name__)

USERNAME, PASSCODE, KERBEROS, SAML, TOKEN = 1, 2, 3, 4, 5
"""User-Identity-Type (PS3.7 Table D.3-14)."""

PASSCODE_BYTES: Final = 1024
_NAME_BYTES: Final = 256
_MEMORY_KIB, _ITERATIONS, _LANES = 19_456, 2, 1
_LEAST_MEMORY_KIB, _MOST_MEMORY_KIB, _MOST_ITERATIONS, _MOST_LANES = 4096, 131_072, 10, 4
_PHC: Final = re.compile(
    r"\$argon2id\$v=19\$m=(?P<m>[0-9]{1,7}),t=(?P<t>[0-9]{1,3}),p=(?P<p>[0-9]{1,3})\$(?P<salt>[A-Za-z0-9+/]{11,64})\$(?P<hash>[A-Za-z0-9+/]{22,86})"
)
_HASHES_AT_ONCE: Final = 2
_QUEUE_S: Final = 10.0
_REMEMBERED: Final = 1024

_PAIR: Final = Patience(free=5, longest_s=60.0)
_ADDRESS: Final = Patience(free=20, longest_s=300.0)
_USER: Final = Patience(free=100, longest_s=60.0)
_TOKENS: Final = Patience(free=50, longest_s=10.0)

WRONG: Final = "user name or passcode is wrong"


def _untold(_principal: Principal, _address: str) -> None:
    """Tell nobody who was identified."""


@dataclass(frozen=True, slots=True)
class User:
    """Who may identify by name."""

    name: str
    passcode_hash: str = ""
    """What ``dicom-node users hash`` prints; empty for a user who identifies by name alone (type 1)."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who was identified."""

    name: str
    kind: int
    """User-Identity-Type."""
    issuer: str = ""
    """Of the token."""
    expires_at: datetime | None = None
    """When the token ends; None: the identity has no end."""
    token_id: str = ""
    """Of a token that counts only once."""


class IdentityRefused(Exception):
    """An identity is not believed. ``reason`` and ``remedy`` are for log and refusal diary; the peer learns neither.

    The reason is the same for an unknown user and a wrong passcode.
    """

    def __init__(self, reason: str, remedy: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy
        self.retry_after_s = retry_after_s
        """Not 0: refused for now, whatever the credentials; a transient rejection."""


def hash_passcode(passcode: bytes) -> str:
    """Return the Argon2id hash of a passcode in PHC form, 19 MiB and two passes.

    Raises
    ------
    ValueError
        The passcode is empty or longer than 1024 bytes.
    """
    if not 0 < len(passcode) <= PASSCODE_BYTES:
        raise ValueError(f"a passcode has 1 to {PASSCODE_BYTES} bytes")
    argon = Argon2id(salt=secrets.token_bytes(16), length=32, iterations=_ITERATIONS, lanes=_LANES, memory_cost=_MEMORY_KIB)
    return argon.derive_phc_encoded(passcode)


class Identities:
    """Verifies who associates.

    Guessing is slowed by back-off: for each pair of address and user, each address, and each user. What others do at other addresses, or to
    other users, keeps nobody out who was let in from his address before. Not more than two passcodes are hashed at once.

    Parameters
    ----------
    users
        Each with a name of its own.
    tokens
        Verifies tokens; None: they are refused.
    plaintext
        Whether credentials may come without TLS from elsewhere than this machine.
    cache_s
        How long a passcode that was right is known to be right without hashing it again, in seconds: a sender that associates for every
        instance pays once.
    clock
        Seconds, monotonic.
    identified
        Told who was identified, and where he calls from, before he is let in; a StorageError keeps him out for now.

    Raises
    ------
    StartError
        A user cannot be used.
    """

    def __init__(
        self,
        users: Iterable[User] = (),
        *,
        tokens: Tokens | None = None,
        plaintext: bool = False,
        cache_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        identified: Callable[[Principal, str], None] = _untold,
    ) -> None:
        users = list(users)
        faults = [fault for user in users if (fault := _fault(user))]
        self._users = {user.name: user for user in users}
        if len(self._users) != len(users):
            faults.append("two users of [identities] bear one name; rename one of them")
        if faults:
            raise StartError(*faults)
        self._tokens = tokens
        self._plaintext = plaintext
        self._cache_s = cache_s
        self._clock = clock
        self._identified = identified
        self._secret = secrets.token_bytes(32)
        hashed = sorted((user.passcode_hash for user in users if user.passcode_hash), key=str)
        self._decoys = [_decoy(passcode_hash) for passcode_hash in hashed] or [hash_passcode(secrets.token_bytes(16))]
        self._working = threading.Semaphore(_HASHES_AT_ONCE)
        self._pairs, self._addresses = Throttle(_PAIR, clock=clock), Throttle(_ADDRESS, clock=clock)
        self._names, self._token_failures = Throttle(_USER, clock=clock), Throttle(_TOKENS, clock=clock)
        self._lock = threading.Lock()
        self._proven: OrderedDict[tuple[str, str], tuple[bytes, float]] = OrderedDict()

    def verify(self, primary: bytes, secondary: bytes, kind: int, address: str, *, secured: bool = True) -> Principal:
        """Identify who associates. May take as long as a few hashes, at most ten seconds more when many wait.

        Parameters
        ----------
        primary, secondary
            Primary-field and Secondary-field of the item.
        kind
            User-Identity-Type.
        address
            Where it comes from: an IP address.
        secured
            Whether it came by TLS.

        Raises
        ------
        IdentityRefused
            It is not believed, or not heard for now.
        """
        if not (secured or self._plaintext or ipaddress.ip_address(address).is_loopback):
            raise IdentityRefused(
                "credentials came without TLS", "switch TLS on for this peer, and change what it sent: others may have read it"
            )
        principal = self._verified(primary, secondary, kind, _source(address))
        try:
            self._identified(principal, address)
        except StorageError as error:
            if principal.token_id and self._tokens is not None:
                self._tokens.give_back(principal.issuer, principal.token_id)
            raise IdentityRefused(f"the login cannot be recorded: {error}", "it may try again", retry_after_s=_QUEUE_S) from error
        return principal

    def _verified(self, primary: bytes, secondary: bytes, kind: int, source: str) -> Principal:
        if kind == USERNAME:
            return self._by_name(primary, source)
        if kind == PASSCODE:
            return self._by_passcode(primary, secondary, source)
        if kind == TOKEN:
            return self._by_token(primary, source)
        name = {KERBEROS: "Kerberos", SAML: "SAML"}.get(kind, f"type {kind}")
        raise IdentityRefused(f"user identity by {name} is not supported", "identify by user name and passcode, or by JSON Web Token")

    def _by_name(self, primary: bytes, source: str) -> Principal:
        name = _name(primary)
        self._heard(self._addresses, source)
        user = self._users.get(name)
        if user is None or user.passcode_hash:
            self._addresses.failed(source)
            raise _wrong()
        return Principal(name, USERNAME)

    def _by_passcode(self, primary: bytes, secondary: bytes, source: str) -> Principal:
        name = _name(primary)
        pair = (source, name)
        if not 0 < len(secondary) <= PASSCODE_BYTES:
            secondary = b""  # wrong whoever it is; hashed nevertheless, so that it takes as long
        mac = hmac.digest(self._secret, secondary, sha256)
        self._heard(self._pairs, pair)
        if self._is_proven(pair, mac):
            return Principal(name, PASSCODE)
        if not self._working.acquire(timeout=_QUEUE_S):
            raise IdentityRefused(
                "too many identities wait to be verified", "let it try again; if this goes on, see who guesses", retry_after_s=_QUEUE_S
            )
        try:
            self._heard(self._pairs, pair)
            if self._is_proven(pair, mac):
                return Principal(name, PASSCODE)
            if pair not in self._proven:
                self._heard(self._addresses, source)
                self._heard(self._names, name)
            if self._is_right(name, secondary):
                self._remember(pair, mac)
                self._pairs.forget(pair)
                return Principal(name, PASSCODE)
            self._pairs.failed(pair)
            self._addresses.failed(source)
            self._names.failed(name)
            raise _wrong()
        finally:
            self._working.release()

    def _by_token(self, primary: bytes, source: str) -> Principal:
        if self._tokens is None or not len(self._tokens):
            raise IdentityRefused("identity by token is not configured", "add the issuer's key to [[identities.keys]]")
        self._heard(self._token_failures, source)
        try:
            claims = self._tokens.verify(primary)
        except TokenRefused as error:
            self._token_failures.failed(source)
            raise IdentityRefused(
                str(error), "get a fresh token from the issuer; compare issuer, audience and key with [[identities.keys]]"
            ) from error
        return Principal(claims.name, TOKEN, claims.issuer, claims.expires_at, claims.token_id)

    def _heard(self, throttle: Throttle, key: object) -> None:
        wait_s = throttle.wait_s(key)
        if wait_s > 0:
            raise IdentityRefused(
                "too many wrong identities", f"let it try again in {wait_s:.0f} s, with the right one", retry_after_s=wait_s
            )

    def _is_right(self, name: str, passcode: bytes) -> bool:
        user = self._users.get(name)
        known = user is not None and bool(user.passcode_hash) and bool(passcode)
        if user is not None and user.passcode_hash:
            expected = user.passcode_hash
        else:  # a hash like that of some user, always the same for a name, so that the time tells nothing
            chosen = int.from_bytes(hmac.digest(self._secret, name.encode(), sha256)[:8], "big") % len(self._decoys)
            expected = self._decoys[chosen]
        try:
            Argon2id.verify_phc_encoded(passcode, expected)
        except InvalidKey:
            return False
        return known

    def _is_proven(self, pair: tuple[str, str], mac: bytes) -> bool:
        with self._lock:
            proven, until = self._proven.get(pair, (b"", 0.0))
        return until > self._clock() and hmac.compare_digest(proven, mac)

    def _remember(self, pair: tuple[str, str], mac: bytes) -> None:
        with self._lock:
            self._proven[pair] = (mac, self._clock() + self._cache_s)
            self._proven.move_to_end(pair)
            if len(self._proven) > _REMEMBERED:
                self._proven.popitem(last=False)


def _wrong() -> IdentityRefused:
    return IdentityRefused(WRONG, "compare both with [[identities.users]]; `dicom-node users hash` makes a new hash")


def _name(primary: bytes) -> str:
    """Read a user name; what cannot be one is the name of nobody."""
    if len(primary) > _NAME_BYTES:
        return ""
    return primary.decode("utf-8", "replace")


def _source(address: str) -> str:
    """Return what counts as one source: an IPv4 address, or the network that one IPv6 subscriber has."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _fault(user: User) -> str:
    if not user.name.strip() or not user.name.isprintable() or len(user.name.encode()) > _NAME_BYTES:
        return "a user of [identities] has no usable name; give it 1 to 256 printable characters"
    if not user.passcode_hash:
        return ""
    found = _PHC.fullmatch(user.passcode_hash)
    if found is None:
        return f"user {user.name}: passcode_hash is no Argon2id hash; make one: `dicom-node users hash`"
    memory, iterations, lanes = int(found["m"]), int(found["t"]), int(found["p"])
    if not (_LEAST_MEMORY_KIB <= memory <= _MOST_MEMORY_KIB and 0 < iterations <= _MOST_ITERATIONS and 0 < lanes <= _MOST_LANES):
        return (
            f"user {user.name}: passcode_hash asks for too much or too little work (m={memory}, t={iterations}, p={lanes}); "
            "make one: `dicom-node users hash`"
        )
    return ""


def _decoy(passcode_hash: str) -> str:
    """A hash of nothing that takes the same work as another."""
    found = _PHC.fullmatch(passcode_hash)
    if found is None:
        raise StartError("a passcode_hash is no Argon2id hash; make one: `dicom-node users hash`")
    length = len(base64.b64decode(found["hash"] + "=" * (-len(found["hash"]) % 4)))
    digest = base64.b64encode(secrets.token_bytes(length)).decode().rstrip("=")
    return f"$argon2id$v=19$m={found['m']},t={found['t']},p={found['p']}${found['salt']}${digest}"
