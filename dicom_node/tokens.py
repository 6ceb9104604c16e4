"""JSON Web Tokens as identities: the key decides the algorithm, and a token names nothing that we would fetch.

References
----------
RFC 7519 (JWT), RFC 7515 (JWS), RFC 8725 (best current practices), DICOM PS3.7 Section D.3.3.7.1 (User-Identity-Type 5)
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from dicom_node.errors import StartError

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256"]
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_TOKEN_BYTES: Final = 16_384
_NAME: Final = 256
_SECRET_BYTES: Final = 32
_REMEMBERED: Final = 10_000
_LAST_SECOND: Final = 253_402_300_799  # of the year 9999
_CURVES: Final = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}
_HEADERS: Final = frozenset({"alg", "typ", "kid", "cty", "x5t", "x5t#S256"})
"""What a token's header may hold. Keys in it, or addresses of keys (jwk, jku, x5c, x5u), and what must be understood (crit) are refused."""


class TokenRefused(Exception):
    """A token is not believed; the message says why and holds nothing of it."""


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A key, and what a token signed with it must say.

    Parameters
    ----------
    kid
        The token's header must name it, unless it is the only key.
    algorithm
        The only one that is tried with this key.
    file
        PEM public key; for HS256 a file of at least 32 bytes, the secret.
    issuer, audience
        Required values of ``iss`` and ``aud``.
    name_claim
        Which claim names the user.
    """

    kid: str
    algorithm: Algorithm
    file: Path
    issuer: str
    audience: str
    name_claim: str = "sub"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a believed token says."""

    name: str
    issuer: str
    expires_at: datetime
    token_id: str = ""
    """Its ``jti``, where tokens count only once."""


class Tokens:
    """Verifies tokens.

    Parameters
    ----------
    keys
        Each with a kid of its own.
    leeway_s
        By how much clocks may differ.
    once
        Whether a token counts only once: it needs a ``jti`` then, which this process remembers until the token ends.

    Raises
    ------
    StartError
        A key cannot be used, or is not of its algorithm.
    """

    def __init__(self, keys: Iterable[TokenKey], *, leeway_s: float = 60.0, once: bool = False) -> None:
        self._keys = {key.kid: (key, _load(key)) for key in keys}
        self._leeway_s = leeway_s
        self._once = once
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], float] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def verify(self, token: bytes) -> Claims:
        """Believe a token, or not.

        Raises
        ------
        TokenRefused
            Why not.
        """
        if len(token) > _TOKEN_BYTES:
            raise TokenRefused("the token is too long")
        header = _header(token)
        key, material = self._key_of(header)
        if header.get("alg") != key.algorithm:
            raise TokenRefused("the token's algorithm is not that of its key")
        try:
            claims = jwt.decode(
                token,
                material,
                algorithms=[key.algorithm],
                issuer=key.issuer,
                audience=key.audience,
                leeway=self._leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
            expires = float(min(int(claims["exp"]), _LAST_SECOND))
        except jwt.ExpiredSignatureError as error:
            raise TokenRefused("the token has expired") from error
        except jwt.ImmatureSignatureError as error:
            raise TokenRefused("the token is not valid yet") from error
        except jwt.InvalidSignatureError as error:
            raise TokenRefused("the token's signature is wrong") from error
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError) as error:
            raise TokenRefused("the token is of another issuer, or for another audience") from error
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise TokenRefused("the token lacks a claim, or one is malformed") from error
        name = claims.get(key.name_claim)
        if not isinstance(name, str) or not 0 < len(name) <= _NAME or not name.isprintable():
            raise TokenRefused("the token names no user")
        token_id = self._use(key.issuer, claims.get("jti"), expires) if self._once else ""
        return Claims(name, key.issuer, datetime.fromtimestamp(expires, UTC), token_id)

    def give_back(self, issuer: str, token_id: str) -> None:
        """Let a token count again whose use came to nothing."""
        with self._lock:
            self._seen.pop((issuer, token_id), None)

    def _key_of(self, header: dict[str, Any]) -> tuple[TokenKey, PublicKey | bytes]:
        kid = header.get("kid")
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        found = self._keys.get(kid) if isinstance(kid, str) else None
        if found is None:
            raise TokenRefused("the token's key is not known")
        return found

    def _use(self, issuer: str, jti: object, expires: float) -> str:
        if not isinstance(jti, str) or not 0 < len(jti) <= _NAME:
            raise TokenRefused("the token has no identifier (jti), and tokens count only once")
        now = time.time()
        with self._lock:
            if (issuer, jti) in self._seen and self._seen[issuer, jti] + self._leeway_s >= now:
                raise TokenRefused("the token was used before")
            if len(self._seen) >= _REMEMBERED:
                self._seen = {used: end for used, end in self._seen.items() if end + self._leeway_s >= now}
            if len(self._seen) >= _REMEMBERED:
                raise TokenRefused("too many tokens are remembered as used")
            self._seen[issuer, jti] = expires
        return jti


def _header(token: bytes) -> dict[str, Any]:
    parts = token.split(b".")
    if len(parts) != 3 or not all(parts):  # an empty signature is none
        raise TokenRefused("the token is not signed")
    try:
        text = base64.b64decode(parts[0] + b"=" * (-len(parts[0]) % 4), altchars=b"-_", validate=True)
        header = json.loads(text, object_pairs_hook=_unique)
    except (binascii.Error, ValueError, RecursionError) as error:
        raise TokenRefused("the token's header cannot be read") from error
    if not isinstance(header, dict):
        raise TokenRefused("the token's header cannot be read")
    foreign = set(header) - _HEADERS
    if foreign:
        raise TokenRefused("the token's header holds what is not allowed there (keys, addresses of keys, extensions)")
    if str(header.get("typ", "JWT")).lower() not in ("jwt", "at+jwt"):
        raise TokenRefused("the token is of another type")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _load(key: TokenKey) -> PublicKey | bytes:
    try:
        data = key.file.read_bytes()
    except OSError as error:
        raise StartError(f"token key {key.kid}: {key.file} cannot be read ({error.strerror}); correct its path or permissions") from error
    if key.algorithm == "HS256":
        secret = data.strip()
        if len(secret) < _SECRET_BYTES or secret.startswith((b"-----BEGIN", b"ssh-")):
            raise StartError(f"token key {key.kid}: {key.file} must hold a secret of at least 32 bytes, and nothing that is public")
        return secret
    try:
        public = load_pem_public_key(data)
    except ValueError as error:
        raise StartError(f"token key {key.kid}: {key.file} holds no public key in PEM form; the issuer gives it") from error
    if isinstance(public, rsa.RSAPublicKey) and key.algorithm.startswith(("RS", "PS")) and public.key_size >= 2048:
        return public
    if isinstance(public, ec.EllipticCurvePublicKey) and _CURVES.get(key.algorithm) == public.curve.name:
        return public
    if isinstance(public, ed25519.Ed25519PublicKey) and key.algorithm == "EdDSA":
        return public
    raise StartError(
        f"token key {key.kid}: {key.file} is no key for {key.algorithm} (RSA of 2048 bits or more, the curve of its name, Ed25519)"
    )
