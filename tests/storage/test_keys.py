"""Claims on the ring: one whole file at any moment, running processes follow it, and what was wrapped is opened by its key alone."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap, aes_key_wrap

from storage.errors import IntegrityError, KeyNotHere, Unavailable
from storage.keys import FileKey, Ring, derive_key

NAME = "a" * 32


def primary_of(path: Path) -> str:
    """Return the primary key as the file says."""
    return str(json.loads(path.read_text())["primary"])


@pytest.mark.parametrize(
    ("key", "data", "wrapped"),
    [
        ("000102030405060708090A0B0C0D0E0F", "00112233445566778899AABBCCDDEEFF", "1FA68B0A8112B447AEF34BD8FB5A7B829D3E862371D2CFE5"),
        (
            "000102030405060708090A0B0C0D0E0F1011121314151617",
            "00112233445566778899AABBCCDDEEFF",
            "96778B25AE6CA435F92B5B97C050AED2468AB8A17AD84E5D",
        ),
        (
            "000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F",
            "00112233445566778899AABBCCDDEEFF",
            "64E8C3F9CE0F5BA263E9777905818A2A93C8191E7D6E8AE7",
        ),
        (
            "000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F",
            "00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F",
            "28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21",
        ),
    ],
)
def test_published_vectors(key: str, data: str, wrapped: str) -> None:
    """RFC 3394 sections 4.1, 4.3, 4.5 and 4.6; the last is the form that ring and study keys use."""
    assert aes_key_wrap(bytes.fromhex(key), bytes.fromhex(data)).hex().upper() == wrapped
    assert aes_key_unwrap(bytes.fromhex(key), bytes.fromhex(wrapped)).hex().upper() == data


def test_ring_wraps_as_documented(tmp_path: Path) -> None:
    """Another implementation opens a study key with what the file says: HKDF of the key's secret, then RFC 3394."""
    path = tmp_path / "ring.json"
    wrapping_key_id, secret, wrapped = Ring.create(path).generate(NAME)
    stored = base64.b64decode(json.loads(path.read_text())["keys"][wrapping_key_id]["secret"])
    assert aes_key_unwrap(derive_key(stored, salt=None, info=f"dicom-node study key {NAME}".encode()), wrapped) == secret


def test_create_add_promote_remove(tmp_path: Path) -> None:
    """A new key becomes primary, the former goes on opening until it is removed, and the database's key stays what it was."""
    path = tmp_path / "ring.json"
    first = Ring.create(path)
    old_id, secret, wrapped = first.generate(NAME)
    new_id = Ring.add(path)
    ring = Ring.load(path)
    assert ring.primary_key_id == new_id != old_id
    assert [(info.key_id, info.primary, info.place) for info in ring.keys()] == [(old_id, False, ""), (new_id, True, "")]  # noqa: SIM118 - no mapping
    assert Ring.shown(path) == ring.keys()
    assert all(info.created_at.tzinfo for info in Ring.shown(path))
    assert ring.unwrap(old_id, wrapped, NAME) == secret
    again_id, again = ring.wrap(secret, NAME)
    assert again_id == new_id
    Ring.promote(path, old_id)
    assert Ring.load(path).generate(NAME)[0] == old_id
    Ring.promote(path, new_id)
    Ring.remove(path, old_id)
    last = Ring.load(path)
    assert last.unwrap(new_id, again, NAME) == secret
    with pytest.raises(KeyNotHere, match=f"lacks key {old_id}"):
        last.unwrap(old_id, wrapped, NAME)
    assert first.database_key() == ring.database_key() == last.database_key()
    assert len(last.database_key()) == 32
    assert last.derive("audit") == first.derive("audit") != last.database_key()
    assert Ring.create(tmp_path / "other.json").database_key() != last.database_key()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_what_cannot_be_removed_or_promoted(tmp_path: Path) -> None:
    """The primary key stays, and an unknown id is a sentence; the file is not touched."""
    path = tmp_path / "ring.json"
    ring = Ring.create(path)
    before = path.read_bytes()
    with pytest.raises(Unavailable, match="is the primary key"):
        Ring.remove(path, ring.primary_key_id)
    with pytest.raises(Unavailable, match="keys list"):
        Ring.remove(path, "0" * 16)
    with pytest.raises(Unavailable, match="keys list"):
        Ring.promote(path, "0" * 16)
    assert path.read_bytes() == before


def test_wrapped_for_one_study_key_only(tmp_path: Path) -> None:
    """A wrapped secret moved to another study key's row, damaged, or taken for the ring's own, is refused."""
    ring = Ring.create(tmp_path / "ring.json")
    key_id, _, wrapped = ring.generate(NAME)
    for bytes_, name in ((wrapped, "b" * 32), (wrapped[:-1], NAME), (b"", NAME), (wrapped[:-1] + bytes((wrapped[-1] ^ 1,)), NAME)):
        with pytest.raises(IntegrityError):
            ring.unwrap(key_id, bytes_, name)
    key = FileKey()
    with pytest.raises(IntegrityError):
        key.unwrap(key.wrap(bytes(32), "ring secret", NAME), "study key", NAME)


def test_a_running_process_follows_the_file(tmp_path: Path) -> None:
    """It wraps under a new primary key, opens with a key that was added, and forgets a removed one, without a restart."""
    path = tmp_path / "ring.json"
    running = Ring.create(path)
    eager = Ring.load(path, look_every_s=0)
    old_id = running.primary_key_id
    new_id = Ring.add(path)
    assert eager.generate(NAME)[0] == new_id
    # the other may not have looked yet, but opens what the first has wrapped
    key_id, wrapped = eager.wrap(bytes(32), NAME)
    assert running.unwrap(key_id, wrapped, NAME) == bytes(32)
    assert running.generate(NAME)[0] == new_id
    Ring.remove(path, old_id)
    assert not running.holds(old_id)
    assert running.holds(new_id)
    assert [info.key_id for info in eager.keys()] == [new_id]  # noqa: SIM118 - no mapping


def test_it_looks_once_in_a_while_only(tmp_path: Path) -> None:
    """Between two looks the file is not asked: sealing under load costs no system call for it."""
    path = tmp_path / "ring.json"
    Ring.create(path)
    ring = Ring.load(path, look_every_s=3600)
    path.rename(tmp_path / "away")
    assert len(ring.generate(NAME)[1]) == 32


def test_a_lost_ring_makes_no_new_keys(tmp_path: Path) -> None:
    """Without its file, or with another ring's in its place, a running process opens what it knows, and wraps nothing new."""
    path = tmp_path / "ring.json"
    Ring.create(path)
    ring = Ring.load(path, look_every_s=0)
    key_id, secret, wrapped = ring.generate(NAME)
    kept = path.rename(tmp_path / "kept.json")
    with pytest.raises(Unavailable, match="no key ring"):
        ring.generate(NAME)
    assert ring.unwrap(key_id, wrapped, NAME) == secret
    with pytest.raises(Unavailable, match="no key ring"):
        ring.unwrap("0" * 16, wrapped, NAME)
    Ring.create(path)
    with pytest.raises(Unavailable, match="another key ring"):
        ring.wrap(secret, NAME)
    with pytest.raises(Unavailable, match="another key ring"):
        ring.unwrap("0" * 16, wrapped, NAME)
    kept.replace(path)
    assert ring.generate(NAME)[0] == key_id


def test_ring_is_for_its_owner_only(tmp_path: Path) -> None:
    """The file is made 0600 whatever the umask; one that others can read is refused with the remedy."""
    path = tmp_path / "ring.json"
    mask = os.umask(0)
    try:
        Ring.create(path)
        Ring.add(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for mode in (0o640, 0o604, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(Unavailable, match="chmod 600"):
            Ring.load(path)
        with pytest.raises(Unavailable, match="chmod 600"):
            Ring.add(path)


def test_create_never_replaces(tmp_path: Path) -> None:
    """An existing ring is kept, byte for byte."""
    path = tmp_path / "ring.json"
    Ring.create(path)
    before = path.read_bytes()
    with pytest.raises(Unavailable, match="keys add"):
        Ring.create(path)
    assert path.read_bytes() == before


def test_faults_name_the_remedy(tmp_path: Path) -> None:
    """A missing ring, directory or permission is a sentence, not a traceback."""
    with pytest.raises(Unavailable, match="keys init"):
        Ring.load(tmp_path / "none.json")
    with pytest.raises(Unavailable, match="make it"):
        Ring.create(tmp_path / "none" / "ring.json")
    with pytest.raises(Unavailable, match="cannot be read"):
        Ring.load(tmp_path)


def _damaged(path: Path) -> list[bytes]:
    whole = path.read_bytes()
    document = json.loads(whole)
    key_id, entry = next(iter(document["keys"].items()))
    other = base64.b64encode(bytes(40)).decode()
    variants = [b"", b"{}", b"[]", b"null", b"\xff", whole[: len(whole) // 2]]
    for name, value in (
        ("format", "dicom-node key ring 1"),
        ("id", "0" * 16),
        ("id", "?"),
        ("primary", "none"),
        ("keys", {}),
        ("keys", []),
        ("keys", {key_id: {**entry, "kind": "other"}}),
        ("keys", {key_id: {**entry, "secret": base64.b64encode(bytes(32)).decode()}}),
        ("keys", {key_id: {**entry, "secret": "AAAA"}}),
        ("keys", {key_id: {**entry, "created_at": "yesterday"}}),
        ("keys", {key_id: {"kind": "kms", "arn": "a"}}),
        ("keys", {key_id: entry, "../../x": entry}),
        ("secret", "AAAA"),
        ("secret", other),
        ("secret", "?"),
        ("secret", 1),
    ):
        variants.append(json.dumps({**document, name: value}).encode())
    return variants


def test_damaged_ring(tmp_path: Path) -> None:
    """Whatever the file holds, it is refused in a sentence that shows no secret, and `add` does not touch it."""
    path = tmp_path / "ring.json"
    Ring.create(path)
    secret = next(iter(json.loads(path.read_text())["keys"].values()))["secret"]
    for variant in _damaged(path):
        path.write_bytes(variant)
        with pytest.raises(Unavailable, match="restore the file from its backup") as refusal:
            Ring.load(path)
        assert secret not in str(refusal.value)
        with pytest.raises(Unavailable):
            Ring.add(path)
        assert path.read_bytes() == variant


def test_no_secret_is_shown(tmp_path: Path) -> None:
    """What a log or a traceback prints of a key holds none of its secret."""
    key = FileKey(bytes(range(32)))
    assert "\\x01" not in repr(key)
    assert "secret" not in repr(key)


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    """Changes wait for each other; a reader in between always finds a whole ring."""
    path = tmp_path / "ring.json"
    Ring.create(path)
    added: list[str] = []
    threads = [threading.Thread(target=lambda: added.append(Ring.add(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        Ring.load(path)
    for thread in threads:
        thread.join()
    assert {info.key_id for info in Ring.shown(path)} > set(added)
    assert len(set(added)) == 8


_CHANGING = """
import sys
from storage.keys import Ring
path = sys.argv[1]
while True:
    former = Ring.load(path).primary_key_id
    Ring.add(path)
    Ring.promote(path, former)
    for info in Ring.shown(path):
        if not info.primary:
            Ring.remove(path, info.key_id)
    sys.stdout.write(".")
    sys.stdout.flush()
"""


def test_killed_while_changing(tmp_path: Path) -> None:
    """A process killed at any moment of a change leaves a whole ring that opens what the former one wrapped."""
    path = tmp_path / "ring.json"
    ring = Ring.create(path)
    key_id, secret, wrapped = ring.generate(NAME)
    for number in range(6):
        process = subprocess.Popen([sys.executable, "-c", _CHANGING, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1 + 7 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        now = Ring.load(path)
        assert now.unwrap(key_id, wrapped, NAME) == secret
        assert now.database_key() == ring.database_key()
        Ring.promote(path, key_id)
    assert primary_of(path) == key_id
