"""User Identity Negotiation with DCMTK: names, passcodes and tokens over TLS, the positive response, and who is turned away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from dicom_node.identity import Identities, User, hash_passcode
from dicom_node.security import ServerTls
from dicom_node.tokens import TokenKey, Tokens
from tests.certificates import Authority
from tests.dicom_node.door import Door, Rooms, draw, open_door, open_rooms, save
from tests.interop.test_dcmtk import run

pytestmark = pytest.mark.peer

USERS = [User("alice", hash_passcode(b"correct horse")), User("scanner")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates and keys."""
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooms]:
    """One archive for the module."""
    rooms = open_rooms(tmp_path_factory.mktemp("rooms"))
    yield rooms
    rooms.database.close()


@pytest.fixture(scope="module")
def issuer() -> ed25519.Ed25519PrivateKey:
    """Issues tokens."""
    return ed25519.Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def door(rooms: Rooms, folder: Path, issuer: ed25519.Ed25519PrivateKey) -> Iterator[Door]:
    """A door by TLS that asks for an identity."""
    public = issuer.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "issuer.pem").write_bytes(public)
    tokens = Tokens([TokenKey("one", "EdDSA", folder / "issuer.pem", "https://issuer", "DERM_NODE")])
    authority = Authority(folder)
    pair = authority.issue("door")
    authority.issue("modality")
    tls = ServerTls(pair.certificate, pair.key, authorities=authority.file)
    with open_door(rooms, tls=tls.context, identities=Identities(USERS, tokens=tokens), identity_required=True) as door:
        yield door


def send(door: Door, folder: Path, tmp_path: Path, *options: object) -> int:
    """Send an instance with storescu; returns how many arrived."""
    path = save(draw(), tmp_path / "picture.dcm")
    count = door.rooms.count()
    tls = ["+tls", folder / "modality.key", folder / "modality.crt", "+cf", folder / "authority.pem"]
    done = run("storescu", "-v", "-aec", "DERM_NODE", "-to", "10", *tls, *options, "127.0.0.1", door.port, path)
    stored = door.rooms.count() - count
    assert (done.returncode == 0) == (stored == 1), done.stderr
    return stored


def token(issuer: ed25519.Ed25519PrivateKey, path: Path, **changes: object) -> Path:
    """A token in a file, as storescu wants it."""
    claims = {"sub": "alice", "iss": "https://issuer", "aud": "DERM_NODE", "exp": int(time.time()) + 600, **changes}
    path.write_text(jwt.encode(claims, issuer, "EdDSA"))
    return path


@pytest.mark.parametrize("response", [[], ["-rsp"]], ids=["plain", "positive response"])
def test_who_comes_in(door: Door, folder: Path, tmp_path: Path, issuer: ed25519.Ed25519PrivateKey, response: list[str]) -> None:
    """A user with the right passcode, one without any, and one with a token store; who asks for a positive response gets it."""
    assert send(door, folder, tmp_path, "-usr", "alice", "-pwd", "correct horse", *response)
    assert send(door, folder, tmp_path, "-usr", "scanner", *response)
    assert send(door, folder, tmp_path, "--jwt", token(issuer, tmp_path / "jwt"), *response)


def test_who_does_not(door: Door, folder: Path, tmp_path: Path, issuer: ed25519.Ed25519PrivateKey) -> None:
    """Nobody, a wrong passcode, an unknown user, no passcode, an expired or foreign token, Kerberos: rejected before anything is stored."""
    ticket = tmp_path / "ticket"
    ticket.write_bytes(b"ticket")
    for options in (
        [],
        ["-usr", "alice", "-pwd", "wrong"],
        ["-usr", "alice", "-epw"],
        ["-usr", "alice"],
        ["-usr", "nobody", "-pwd", "correct horse"],
        ["--jwt", token(issuer, tmp_path / "old", exp=int(time.time()) - 100)],
        ["--jwt", token(issuer, tmp_path / "other", aud="OTHER")],
        ["--jwt", token(ed25519.Ed25519PrivateKey.generate(), tmp_path / "forged")],
        ["-kt", ticket],
        ["--saml", ticket],
    ):
        assert not send(door, folder, tmp_path, *options), options
    assert send(door, folder, tmp_path, "-usr", "alice", "-pwd", "correct horse")
