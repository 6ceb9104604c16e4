"""Claims on sealed objects: Tink reads them, nothing else of them can be changed, and a range costs only its segments."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tink
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap, aes_key_wrap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tink import secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

from storage.envelope import SEGMENT, FileKeyring, Opener, Sealer
from storage.errors import IntegrityError, Unavailable
from storage.records import SealedObject

KEY = "0123456789abcdef" * 2
FOOTER = {"summary": {"rows": "8"}, "received_at": "2026-01-01T00:00:00+00:00", "name": "Grüße"}
FIRST = SEGMENT - 40 - 16
"""Plaintext bytes of the first segment."""
FULL = SEGMENT - 16


class FixedKeyring:
    """A key ring of one given data key, so that another implementation can be handed it; keeps what it wrapped."""

    def __init__(self) -> None:
        self.data_key = b""

    def wrap(self, data_key: bytes) -> tuple[str, bytes]:
        """Remember the data key."""
        self.data_key = data_key
        return "k1", aes_key_wrap(bytes(32), data_key)

    def unwrap(self, key_id: str, wrapped: bytes) -> bytes:
        """Unwrap by RFC 3394, as any ring."""
        assert key_id == "k1"
        return aes_key_unwrap(bytes(32), wrapped)


class Blob:
    """An object in memory that counts the reads of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    def read_at(self, offset: int, length: int) -> bytes:
        """Read as a store does: fewer bytes at the end."""
        self.reads.append((offset, length))
        return self.data[offset : offset + length]


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> FileKeyring:
    """A ring of two keys, in a file."""
    path = tmp_path_factory.mktemp("keys") / "ring.json"
    FileKeyring.create(path)
    FileKeyring.add(path)
    return FileKeyring.load(path)


def seal(ring: Any, plain: bytes, *, object_key: str = KEY, step: int = 0, footer: Any = None) -> tuple[bytes, SealedObject]:
    """Seal `plain` in chunks of `step` bytes."""
    out = io.BytesIO()
    sealer = Sealer(ring, object_key, out.write)
    for at in range(0, len(plain), step or max(len(plain), 1)):
        sealer.update(memoryview(plain)[at : at + (step or len(plain))])
    sealed = sealer.finish(FOOTER if footer is None else footer)
    return out.getvalue(), sealed


def open_all(ring: Any, data: bytes, object_key: str = KEY) -> bytes:
    """Open and read everything that can be read."""
    opener = Opener(ring, object_key, Blob(data).read_at, len(data))
    opener.verify_all()
    opener.footer()
    return opener.read(0, opener.plaintext_size)


def header_length(data: bytes | bytearray) -> int:
    """Find the end of our header by its published layout."""
    at = 10
    for _ in range(3):
        at += 2 + int.from_bytes(data[at : at + 2], "big")
    return at


def tink_primitive(data_key: bytes) -> streaming_aead.StreamingAead:
    """Make Tink's own primitive over a raw AES256_GCM_HKDF_1MB key."""
    streaming_aead.register()
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(
        version=0,
        key_value=data_key,
        params=aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
            ciphertext_segment_size=SEGMENT, derived_key_size=32, hkdf_hash_type=common_pb2.SHA256
        ),
    )
    keyset = tink_pb2.Keyset(primary_key_id=1)
    keyset.key.add(
        key_data=tink_pb2.KeyData(
            type_url="type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
            value=key.SerializeToString(),
            key_material_type=tink_pb2.KeyData.SYMMETRIC,
        ),
        status=tink_pb2.ENABLED,
        key_id=1,
        output_prefix_type=tink_pb2.RAW,
    )
    handle = tink.proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


EDGES = [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL - 1, FIRST + FULL, FIRST + FULL + 1, 2_500_000]


@pytest.mark.parametrize("size", EDGES)
def test_tink_opens_what_we_seal(size: int) -> None:
    """The body is Tink's streaming AEAD to the byte, our header its associated data."""
    ring = FixedKeyring()
    plain = os.urandom(size)
    data, _ = seal(ring, plain, step=100_000)
    at = header_length(data)
    body = int.from_bytes(data[-20:-12], "big")
    with tink_primitive(ring.data_key).new_decrypting_stream(io.BytesIO(data[at : at + body]), data[:at]) as stream:
        assert stream.read() == plain


@pytest.mark.parametrize("size", EDGES)
def test_we_open_what_tink_seals(size: int) -> None:
    """A body that Tink wrote opens here: it is put in the place of ours, which has the same length."""
    ring = FixedKeyring()
    plain = os.urandom(size)
    data, _ = seal(ring, bytes(size))
    at = header_length(data)
    body = int.from_bytes(data[-20:-12], "big")

    class Kept(io.BytesIO):
        def close(self) -> None:
            """Stay readable: Tink closes what it writes to."""

    out = Kept()
    with tink_primitive(ring.data_key).new_encrypting_stream(out, data[:at]) as stream:
        stream.write(plain)
    foreign = out.getvalue()
    assert len(foreign) == body
    assert open_all(ring, data[:at] + foreign + data[at + body :]) == plain


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(size=st.one_of(st.integers(0, 3000), st.sampled_from(EDGES)), step=st.integers(1, 400_000), data=st.data())
def test_round_trip(ring: FileKeyring, size: int, step: int, data: st.DataObject) -> None:
    """For any size and chunking the plaintext comes back, whole and in any range; digest and count are of the sealed bytes."""
    plain = os.urandom(size)
    sealed, record = seal(ring, plain, step=max(step, size // 2000 + 1))
    assert (record.byte_count, record.sha256, record.object_key) == (len(sealed), hashlib.sha256(sealed).hexdigest(), KEY)
    assert record.key_id == ring.primary_key_id
    opener = Opener(ring, KEY, Blob(sealed).read_at, len(sealed))
    assert opener.plaintext_size == size
    assert opener.footer() == FOOTER
    assert b"".join(opener.chunks()) == plain
    for _ in range(3):
        offset, length = data.draw(st.integers(0, size + 10)), data.draw(st.integers(0, size + 10))
        assert opener.read(offset, length) == plain[offset : offset + length]


def test_nothing_readable(ring: FileKeyring) -> None:
    """Neither plaintext nor record shows in the object, and the same plaintext never seals to the same bytes."""
    one, _ = seal(ring, b"Drawn^Person" * 100)
    other, _ = seal(ring, b"Drawn^Person" * 100)
    assert b"Drawn" not in one
    assert b"summary" not in one
    at = header_length(one)
    assert all(one[start : start + 16] not in other for start in range(at + 1, len(one) - 40, 16))


def test_every_flipped_bit_is_refused(ring: FileKeyring) -> None:
    """No bit of a small object is free to change: header, keys, body, record, trailer."""
    data, _ = seal(ring, b"pixels" * 10)
    assert open_all(ring, data) == b"pixels" * 10
    for at in range(len(data)):
        for bit in (1, 16, 128):
            damaged = bytearray(data)
            damaged[at] ^= bit
            with pytest.raises(IntegrityError):
                open_all(ring, bytes(damaged))


def test_every_truncation_and_extension_is_refused(ring: FileKeyring) -> None:
    """Cut at any offset, from either end, or made longer: refused."""
    data, _ = seal(ring, b"pixels" * 10)
    for cut in range(len(data)):
        for part in (data[:cut], data[cut + 1 :], data[:cut] + data[cut + 1 :], data[:cut] + b"\0" + data[cut:]):
            with pytest.raises(IntegrityError):
                open_all(ring, part)


def test_other_format_version(ring: FileKeyring) -> None:
    """An object of a later format says so, instead of passing for a damaged one."""
    data, _ = seal(ring, b"pixels")
    with pytest.raises(IntegrityError, match="a newer release"):
        open_all(ring, data[:9] + b"\2" + data[10:])


def test_cut_behind_the_back(ring: FileKeyring) -> None:
    """A store that gives fewer bytes than it said is caught at the read."""
    data, _ = seal(ring, bytes(3_000_000))
    blob = Blob(data)
    opener = Opener(ring, KEY, blob.read_at, len(data))
    blob.data = data[:2_000_000]
    assert opener.read(0, 10) == bytes(10)
    with pytest.raises(IntegrityError, match="cut"):
        opener.read(2_500_000, 10)


def test_segments_keep_their_places(ring: FileKeyring) -> None:
    """Swapped, repeated, dropped segments, and those of another object of the same name, are refused."""
    plain = os.urandom(4_500_000)
    data, _ = seal(ring, plain)
    other, _ = seal(ring, plain)
    at = header_length(data)
    one, two, three = (slice(at + number * SEGMENT, at + (number + 1) * SEGMENT) for number in (1, 2, 3))
    variants = {
        "swapped": data[: one.start] + data[two] + data[one] + data[two.stop :],
        "repeated": data[: two.start] + data[one] + data[two.stop :],
        "dropped": data[: three.start] + data[three.stop :],
        "of another object": data[: one.start] + other[one] + data[one.stop :],
        "body of another object": data[:at] + other[at:],
        "record of another object": data[:-400] + other[-400:],
    }
    assert open_all(ring, data) == plain
    for variant in variants.values():
        with pytest.raises(IntegrityError):
            open_all(ring, variant)


def test_dropped_last_segment_is_refused_even_with_a_forged_trailer(ring: FileKeyring) -> None:
    """The record is bound to the body's length, so lengths that add up again do not help."""
    data, _ = seal(ring, bytes(FIRST + FULL + 100))
    at = header_length(data)
    body = int.from_bytes(data[-20:-12], "big")
    short = 2 * SEGMENT
    forged = data[: at + short] + data[at + body : -20] + short.to_bytes(8, "big") + data[-12:]
    with pytest.raises(IntegrityError, match="record"):
        open_all(ring, forged)


def test_objects_cannot_be_exchanged(ring: FileKeyring) -> None:
    """An object opens under its own key only, also when its header is made to say otherwise."""
    data, _ = seal(ring, b"one patient", object_key="a" * 32)
    with pytest.raises(IntegrityError, match="another"):
        open_all(ring, data, "b" * 32)
    with pytest.raises(IntegrityError):
        open_all(ring, data.replace(b"a" * 32, b"b" * 32), "b" * 32)


def test_range_reads_touch_only_their_segments(ring: FileKeyring) -> None:
    """Opening costs two reads, a range one for each segment under it, the same segment again none."""
    plain = os.urandom(5_000_000)
    data, _ = seal(ring, plain)
    blob = Blob(data)
    opener = Opener(ring, KEY, blob.read_at, len(data))
    assert len(blob.reads) == 2
    assert sum(length for _, length in blob.reads) < 30_000
    at = header_length(data)
    blob.reads.clear()
    assert opener.read(2_000_000, 50_000) == plain[2_000_000:2_050_000]
    assert blob.reads == [(at + SEGMENT, SEGMENT)]
    assert opener.read(2_050_000, 1000) == plain[2_050_000:2_051_000]
    assert len(blob.reads) == 1
    blob.reads.clear()
    assert opener.read(FIRST - 1, 2) == plain[FIRST - 1 : FIRST + 1]
    assert blob.reads == [(at + 40, SEGMENT - 40), (at + SEGMENT, SEGMENT)]
    assert opener.read(5_000_000, 10) == b""
    assert len(blob.reads) == 2


def test_damage_elsewhere_does_not_hurt_a_range(ring: FileKeyring) -> None:
    """A range is readable while its own segments are whole; verify_all finds the damage."""
    plain = os.urandom(3_000_000)
    data = bytearray(seal(ring, plain)[0])
    data[header_length(data) + 2 * SEGMENT + 5] ^= 1
    opener = Opener(ring, KEY, Blob(bytes(data)).read_at, len(data))
    assert opener.read(0, 1_500_000) == plain[:1_500_000]
    with pytest.raises(IntegrityError, match="segment 2"):
        opener.verify_all()


def test_long_record(ring: FileKeyring) -> None:
    """A record longer than the first look at the object's end is fetched whole; one beyond the limit is not written."""
    footer = {"text": "x" * 100_000}
    data, _ = seal(ring, b"", footer=footer)
    assert Opener(ring, KEY, Blob(data).read_at, len(data)).footer() == footer
    with pytest.raises(ValueError, match="record is longer"):
        seal(ring, b"", footer={"text": "x" * 17_000_000})


def test_sealing_memory_is_bounded(ring: FileKeyring) -> None:
    """A hundred megabytes pass through a few."""
    sealer = Sealer(ring, KEY, lambda _: None)
    chunk = bytes(131_072)
    tracemalloc.start()
    try:
        for _ in range(800):
            sealer.update(chunk)
        sealer.finish({})
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_error_of_the_sink_comes_through(ring: FileKeyring) -> None:
    """A full disk is reported as what it is."""
    state = {"full": False}

    def sink(_: object) -> None:
        if state["full"]:
            raise OSError(28, "No space left on device")

    sealer = Sealer(ring, KEY, sink)
    state["full"] = True
    with pytest.raises(OSError, match="No space"):
        sealer.update(bytes(3_000_000))


# --- key wrapping and the ring ----------------------------------------------------------------------------------------------------


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
    """RFC 3394 sections 4.1, 4.3, 4.5 and 4.6; the last is the form that the ring uses."""
    assert aes_key_wrap(bytes.fromhex(key), bytes.fromhex(data)).hex().upper() == wrapped
    assert aes_key_unwrap(bytes.fromhex(key), bytes.fromhex(wrapped)).hex().upper() == data


def test_ring_wraps_by_rfc_3394(tmp_path: Path) -> None:
    """The secret in the file is the key-encryption key: another implementation can unwrap."""
    path = tmp_path / "ring.json"
    ring = FileKeyring.create(path)
    key_id, wrapped = ring.wrap(bytes(range(32)))
    secret = base64.b64decode(json.loads(path.read_text())["keys"][key_id]["secret"])
    assert aes_key_unwrap(secret, wrapped) == bytes(range(32))


def test_create_add_load(tmp_path: Path) -> None:
    """A new key becomes primary, old objects still open, and the database's key stays what it was."""
    path = tmp_path / "ring.json"
    first = FileKeyring.create(path)
    old, _ = seal(first, b"old")
    key_id = FileKeyring.add(path)
    ring = FileKeyring.load(path)
    assert ring.primary_key_id == key_id != first.primary_key_id
    assert [(key.key_id, key.primary) for key in ring.keys()]  # noqa: SIM118 - no mapping == [(first.primary_key_id, False), (key_id, True)]
    assert all(key.created_at.tzinfo for key in ring.keys())  # noqa: SIM118 - no mapping
    assert open_all(ring, old) == b"old"
    assert ring.database_key() == first.database_key()
    assert len(ring.database_key()) == 32
    assert ring.derive("audit") == first.derive("audit") != ring.database_key()
    assert FileKeyring.create(tmp_path / "other.json").database_key() != ring.database_key()
    with pytest.raises(IntegrityError, match="not in the ring"):
        open_all(first, seal(ring, b"new")[0])
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_loaded_ring_learns_what_was_added(tmp_path: Path) -> None:
    """A process that runs opens what one started after `keys add` sealed; a foreign ring in the file's place teaches it nothing."""
    path = tmp_path / "ring.json"
    FileKeyring.create(path)
    running = FileKeyring.load(path)
    before = running.primary_key_id
    FileKeyring.add(path)
    started = FileKeyring.load(path)
    sealed, _ = seal(started, b"new")
    assert open_all(running, sealed) == b"new"
    assert running.primary_key_id == before
    latest = FileKeyring.add(path)
    sealed, _ = seal(FileKeyring.load(path), b"newer")
    kept = path.rename(tmp_path / "kept.json")
    with pytest.raises(Unavailable, match="no key ring"):
        open_all(running, sealed)
    FileKeyring.create(path)
    with pytest.raises(IntegrityError, match="not in the ring"):
        open_all(running, sealed)
    kept.replace(path)
    assert open_all(running, sealed) == b"newer"
    assert latest in {key.key_id for key in running.keys()}  # noqa: SIM118 - no mapping


def test_ring_is_for_its_owner_only(tmp_path: Path) -> None:
    """The file is made 0600 whatever the umask; one that others can read is refused with the remedy."""
    path = tmp_path / "ring.json"
    mask = os.umask(0)
    try:
        FileKeyring.create(path)
        FileKeyring.add(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for mode in (0o640, 0o604, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(Unavailable, match="chmod 600"):
            FileKeyring.load(path)
        with pytest.raises(Unavailable, match="chmod 600"):
            FileKeyring.add(path)


def test_create_never_replaces(tmp_path: Path) -> None:
    """An existing ring is kept, byte for byte."""
    path = tmp_path / "ring.json"
    FileKeyring.create(path)
    before = path.read_bytes()
    with pytest.raises(Unavailable, match="keys add"):
        FileKeyring.create(path)
    assert path.read_bytes() == before


def test_faults_name_the_remedy(tmp_path: Path) -> None:
    """A missing ring, directory or permission is a sentence, not a traceback."""
    with pytest.raises(Unavailable, match="keys init"):
        FileKeyring.load(tmp_path / "none.json")
    with pytest.raises(Unavailable, match="make it"):
        FileKeyring.create(tmp_path / "none" / "ring.json")
    with pytest.raises(Unavailable, match="cannot be read"):
        FileKeyring.load(tmp_path)


def _damaged(path: Path) -> list[bytes]:
    whole = path.read_bytes()
    document = json.loads(whole)
    variants = [b"", b"{}", b"[]", b"null", b"\xff", whole[: len(whole) // 2]]
    for key, value in (
        ("format", "other"),
        ("primary", "none"),
        ("keys", {}),
        ("keys", []),
        ("secret", "AAAA"),
        ("secret", "?"),
        ("secret", 1),
    ):
        variants.append(json.dumps({**document, key: value}).encode())
    return variants


def test_damaged_ring(tmp_path: Path) -> None:
    """Whatever the file holds, it is refused in a sentence that shows no secret, and `add` does not touch it."""
    path = tmp_path / "ring.json"
    FileKeyring.create(path)
    secret = json.loads(path.read_text())["secret"]
    for variant in _damaged(path):
        path.write_bytes(variant)
        with pytest.raises(Unavailable, match="restore the file from its backup") as refusal:
            FileKeyring.load(path)
        assert secret not in str(refusal.value)
        with pytest.raises(Unavailable):
            FileKeyring.add(path)
        assert path.read_bytes() == variant


def test_keys_added_at_once_are_all_kept(tmp_path: Path) -> None:
    """Changes wait for each other; a reader in between always finds a whole ring."""
    path = tmp_path / "ring.json"
    FileKeyring.create(path)
    added: list[str] = []
    threads = [threading.Thread(target=lambda: added.append(FileKeyring.add(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        FileKeyring.load(path)
    for thread in threads:
        thread.join()
    ring = FileKeyring.load(path)
    assert {key.key_id for key in ring.keys()} > set(added)  # noqa: SIM118 - no mapping
    assert len(set(added)) == 8
