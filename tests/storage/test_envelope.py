"""Claims on sealed objects: Tink reads them, nothing else of them can be changed, and a range costs only its segments."""

from __future__ import annotations

import hashlib
import io
import os
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import tink
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap, aes_key_wrap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tink import secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

from storage.envelope import SEGMENT, Opener, Sealer, Segments
from storage.errors import IntegrityError
from storage.keys import Ring
from storage.records import SealedObject
from storage.study_keys import StudyKey, StudyKeys
from tests.storage.support import open_database

KEY = "0123456789abcdef" * 2
FOOTER = {"summary": {"rows": "8"}, "received_at": "2026-01-01T00:00:00+00:00", "name": "Grüße"}
FIRST = SEGMENT - 40 - 16
"""Plaintext bytes of the first segment."""
FULL = SEGMENT - 16


STUDY = "1.2.826.0.1.3680043.8.498.1"
OTHER_STUDY = "1.2.826.0.1.3680043.8.498.2"


class FixedKeys:
    """Study keys of one given key, so that another implementation can be handed the data key; keeps what it wrapped."""

    def __init__(self) -> None:
        self.data_key = b""

    def current(self, study_instance_uid: str) -> StudyKey:
        """Return the one key."""
        return StudyKey("0" * 32, study_instance_uid, bytes(32), "k1", b"", datetime.now(UTC))

    def wrap_data_key(self, study_key: StudyKey, data_key: bytes) -> bytes:
        """Remember the data key."""
        self.data_key = data_key
        return aes_key_wrap(study_key.secret, data_key)

    def unwrap(self, study_key_id: str, wrapped: bytes) -> bytes:
        """Unwrap by RFC 3394."""
        assert study_key_id == "0" * 32
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
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyKeys]:
    """Study keys in a database, two of them stored."""
    folder = tmp_path_factory.mktemp("keys")
    ring = Ring.create(folder / "ring.json")
    database = open_database(folder)
    database.migrate()
    keys = StudyKeys(database=database, ring=ring)
    for study in (STUDY, OTHER_STUDY):
        key = keys.current(study)
        database.write(lambda connection, key=key: keys.store_in(connection, key))
    yield keys
    database.close()


def seal(
    keys: Any, plain: bytes, *, object_key: str = KEY, step: int = 0, footer: Any = None, study: str = STUDY
) -> tuple[bytes, SealedObject]:
    """Seal `plain` in chunks of `step` bytes."""
    out = io.BytesIO()
    sealer = Sealer(object_key, out.write)
    for at in range(0, len(plain), step or max(len(plain), 1)):
        sealer.update(memoryview(plain)[at : at + (step or len(plain))])
    sealed = sealer.finish(FOOTER if footer is None else footer, keys.current(study), keys)
    return out.getvalue(), sealed


def open_all(keys: Any, data: bytes, object_key: str = KEY) -> bytes:
    """Open and read everything that can be read."""
    opener = Opener(keys, object_key, Blob(data).read_at, len(data))
    opener.verify_all()
    opener.footer()
    return opener.read(0, opener.plaintext_size)


def header_length(data: bytes | bytearray) -> int:
    """Find the end of our header by its published layout."""
    return 12 + int.from_bytes(data[10:12], "big")


def body_length(data: bytes) -> int:
    """Find the length of the body in the trailer by its published layout."""
    return int.from_bytes(data[-22:-14], "big")


def capsule_length(data: bytes) -> int:
    """Find the length of the capsule in the trailer by its published layout."""
    return int.from_bytes(data[-10:-8], "big")


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
    keys = FixedKeys()
    plain = os.urandom(size)
    data, _ = seal(keys, plain, step=100_000)
    at = header_length(data)
    body = body_length(data)
    with tink_primitive(keys.data_key).new_decrypting_stream(io.BytesIO(data[at : at + body]), data[:at]) as stream:
        assert stream.read() == plain


@pytest.mark.parametrize("size", EDGES)
def test_we_open_what_tink_seals(size: int) -> None:
    """A body that Tink wrote opens here: it is put in the place of ours, which has the same length."""
    keys = FixedKeys()
    plain = os.urandom(size)
    data, _ = seal(keys, bytes(size))
    at = header_length(data)
    body = body_length(data)

    class Kept(io.BytesIO):
        def close(self) -> None:
            """Stay readable: Tink closes what it writes to."""

    out = Kept()
    with tink_primitive(keys.data_key).new_encrypting_stream(out, data[:at]) as stream:
        stream.write(plain)
    foreign = out.getvalue()
    assert len(foreign) == body
    assert open_all(keys, data[:at] + foreign + data[at + body :]) == plain


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(size=st.one_of(st.integers(0, 3000), st.sampled_from(EDGES)), step=st.integers(1, 400_000), data=st.data())
def test_round_trip(keys: StudyKeys, size: int, step: int, data: st.DataObject) -> None:
    """For any size and chunking the plaintext comes back, whole and in any range; digest and count are of the sealed bytes."""
    plain = os.urandom(size)
    sealed, record = seal(keys, plain, step=max(step, size // 2000 + 1))
    assert (record.byte_count, record.sha256, record.object_key) == (len(sealed), hashlib.sha256(sealed).hexdigest(), KEY)
    assert record.key_id == keys.current(STUDY).id == Opener(keys, KEY, Blob(sealed).read_at, len(sealed)).key_id
    opener = Opener(keys, KEY, Blob(sealed).read_at, len(sealed))
    assert opener.plaintext_size == size
    assert opener.footer() == FOOTER
    assert b"".join(opener.chunks()) == plain
    for _ in range(3):
        offset, length = data.draw(st.integers(0, size + 10)), data.draw(st.integers(0, size + 10))
        assert opener.read(offset, length) == plain[offset : offset + length]


def test_nothing_readable(keys: StudyKeys) -> None:
    """Neither plaintext nor record shows in the object, and the same plaintext never seals to the same bytes."""
    one, _ = seal(keys, b"Drawn^Person" * 100)
    other, _ = seal(keys, b"Drawn^Person" * 100)
    assert b"Drawn" not in one
    assert b"summary" not in one
    at = header_length(one)
    behind = 22 + capsule_length(one)
    assert all(one[start : start + 16] not in other for start in range(at + 1, len(one) - behind - 16, 16))
    assert one[-54:-22] not in other  # of the wrapped data key


def test_every_flipped_bit_is_refused(keys: StudyKeys) -> None:
    """No bit of a small object is free to change: header, body, record, capsule, trailer."""
    data, _ = seal(keys, b"pixels" * 10)
    assert open_all(keys, data) == b"pixels" * 10
    for at in range(len(data)):
        for bit in (1, 16, 128):
            damaged = bytearray(data)
            damaged[at] ^= bit
            with pytest.raises(IntegrityError):
                open_all(keys, bytes(damaged))


def test_every_truncation_and_extension_is_refused(keys: StudyKeys) -> None:
    """Cut at any offset, from either end, or made longer: refused."""
    data, _ = seal(keys, b"pixels" * 10)
    for cut in range(len(data)):
        for part in (data[:cut], data[cut + 1 :], data[:cut] + data[cut + 1 :], data[:cut] + b"\0" + data[cut:]):
            with pytest.raises(IntegrityError):
                open_all(keys, part)


def test_other_format_version(keys: StudyKeys) -> None:
    """An object of a later format says so, instead of passing for a damaged one."""
    data, _ = seal(keys, b"pixels")
    with pytest.raises(IntegrityError, match="a newer release"):
        open_all(keys, data[:9] + b"\3" + data[10:])


def test_cut_behind_the_back(keys: StudyKeys) -> None:
    """A store that gives fewer bytes than it said is caught at the read."""
    data, _ = seal(keys, bytes(3_000_000))
    blob = Blob(data)
    opener = Opener(keys, KEY, blob.read_at, len(data))
    blob.data = data[:2_000_000]
    assert opener.read(0, 10) == bytes(10)
    with pytest.raises(IntegrityError, match="cut"):
        opener.read(2_500_000, 10)


def test_segments_keep_their_places(keys: StudyKeys) -> None:
    """Swapped, repeated, dropped segments, and those of another object of the same name, are refused."""
    plain = os.urandom(4_500_000)
    data, _ = seal(keys, plain)
    other, _ = seal(keys, plain)
    at = header_length(data)
    one, two, three = (slice(at + number * SEGMENT, at + (number + 1) * SEGMENT) for number in (1, 2, 3))
    variants = {
        "swapped": data[: one.start] + data[two] + data[one] + data[two.stop :],
        "repeated": data[: two.start] + data[one] + data[two.stop :],
        "dropped": data[: three.start] + data[three.stop :],
        "of another object": data[: one.start] + other[one] + data[one.stop :],
        "body of another object": data[:at] + other[at : at + body_length(data)] + data[at + body_length(data) :],
        "record of another object": data[:-400] + other[-400:],
    }
    assert open_all(keys, data) == plain
    for variant in variants.values():
        with pytest.raises(IntegrityError):
            open_all(keys, variant)


def test_dropped_last_segment_is_refused_even_with_a_forged_trailer(keys: StudyKeys) -> None:
    """The record is bound to the body's length, so lengths that add up again do not help."""
    data, _ = seal(keys, bytes(FIRST + FULL + 100))
    at = header_length(data)
    body = body_length(data)
    short = 2 * SEGMENT
    forged = data[: at + short] + data[at + body : -22] + short.to_bytes(8, "big") + data[-14:]
    with pytest.raises(IntegrityError, match="record"):
        open_all(keys, forged)


def test_objects_cannot_be_exchanged(keys: StudyKeys) -> None:
    """An object opens under its own key only, also when its header is made to say otherwise."""
    data, _ = seal(keys, b"one patient", object_key="a" * 32)
    with pytest.raises(IntegrityError, match="another"):
        open_all(keys, data, "b" * 32)
    with pytest.raises(IntegrityError):
        open_all(keys, data.replace(b"a" * 32, b"b" * 32), "b" * 32)


def test_capsules_cannot_be_exchanged(keys: StudyKeys) -> None:
    """The capsule of another object opens nothing: of the same study, of another study, under the same or another object key."""
    data, _ = seal(keys, b"one picture")
    assert open_all(keys, data) == b"one picture"
    size = capsule_length(data)
    for other in (
        seal(keys, b"one picture")[0],
        seal(keys, b"one picture", object_key="a" * 32)[0],
        seal(keys, b"one picture", study=OTHER_STUDY)[0],
    ):
        assert capsule_length(other) == size
        with pytest.raises(IntegrityError, match="header or record"):
            open_all(keys, data[: -22 - size] + other[-22 - size :])


def test_the_capsule_names_its_study_key(keys: StudyKeys) -> None:
    """Another study key's id, or one that is not there, in the capsule is refused."""
    data, sealed = seal(keys, b"one picture")
    other = keys.current(OTHER_STUDY).id
    with pytest.raises(IntegrityError, match="data key is damaged"):
        open_all(keys, data.replace(sealed.key_id.encode(), other.encode()))
    with pytest.raises(IntegrityError, match="no such study key"):
        open_all(keys, data.replace(sealed.key_id.encode(), b"0" * 32))


def test_capsule_has_one_encoding(keys: StudyKeys) -> None:
    """Moving the border between the capsule's fields, padding it, or leaving it out is refused."""
    data, _ = seal(keys, b"one picture")
    size = capsule_length(data)
    before, capsule, trailer = data[: -22 - size], data[-22 - size : -22], data[-22:]
    for forged in (
        b"",
        capsule + b"\0",
        capsule[:-1],
        b"\0\x1f" + capsule[2:],
        b"\0\x21" + capsule[2:],
        bytes(size),
        b"\xff" * size,
        bytes(2000),
    ):
        with pytest.raises(IntegrityError):
            open_all(keys, before + forged + trailer[:12] + len(forged).to_bytes(2, "big") + trailer[14:])


def test_range_reads_touch_only_their_segments(keys: StudyKeys) -> None:
    """Opening costs two reads, a range one for each segment under it, the same segment again none."""
    plain = os.urandom(5_000_000)
    data, _ = seal(keys, plain)
    blob = Blob(data)
    opener = Opener(keys, KEY, blob.read_at, len(data))
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


def test_damage_elsewhere_does_not_hurt_a_range(keys: StudyKeys) -> None:
    """A range is readable while its own segments are whole; verify_all finds the damage."""
    plain = os.urandom(3_000_000)
    data = bytearray(seal(keys, plain)[0])
    data[header_length(data) + 2 * SEGMENT + 5] ^= 1
    opener = Opener(keys, KEY, Blob(bytes(data)).read_at, len(data))
    assert opener.read(0, 1_500_000) == plain[:1_500_000]
    with pytest.raises(IntegrityError, match="segment 2"):
        opener.verify_all()


def test_long_record(keys: StudyKeys) -> None:
    """A record longer than the first look at the object's end is fetched whole; one beyond the limit is not written."""
    footer = {"text": "x" * 100_000}
    data, _ = seal(keys, b"", footer=footer)
    assert Opener(keys, KEY, Blob(data).read_at, len(data)).footer() == footer
    with pytest.raises(ValueError, match="record is longer"):
        seal(keys, b"", footer={"text": "x" * 17_000_000})


def test_sealing_memory_is_bounded(keys: StudyKeys) -> None:
    """A hundred megabytes pass through a few."""
    sealer = Sealer(KEY, lambda _: None)
    chunk = bytes(131_072)
    tracemalloc.start()
    try:
        for _ in range(800):
            sealer.update(chunk)
        sealer.finish({}, keys.current(STUDY), keys)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_error_of_the_sink_comes_through(keys: StudyKeys) -> None:
    """A full disk is reported as what it is."""
    state = {"full": False}

    def sink(_: object) -> None:
        if state["full"]:
            raise OSError(28, "No space left on device")

    sealer = Sealer(KEY, sink)
    state["full"] = True
    with pytest.raises(OSError, match="No space"):
        sealer.update(bytes(3_000_000))


def test_memory_of_segments_is_used_again_and_never_shared() -> None:
    """What one sealer gave back the next one takes; two at the same time never have the same; nothing of the former's shows."""
    segments = Segments(kept=2)
    held = [segments.take() for _ in range(3)]
    assert len({id(memory) for memory in held}) == 3
    for memory in held:
        segments.give(memory)
    again = [segments.take() for _ in range(3)]
    assert len({id(memory) for memory in again} & {id(memory) for memory in held[:2]}) == 2
    segments.give(bytearray(5))
    assert len(segments.take()) == SEGMENT


@pytest.mark.parametrize("sizes", [(3 * SEGMENT, 100_000, SEGMENT // 2, 70_000, 10)])
def test_used_memory_changes_no_object(keys: StudyKeys, sizes: tuple[int, ...]) -> None:
    """Objects sealed one after the other in the same memory, larger and smaller ones in turn, open to what was sealed."""
    segments, study_key = Segments(), keys.current("1.2.3")
    for size in sizes:
        data, sealed = os.urandom(size), bytearray()
        sealer = Sealer(KEY, sealed.extend, segments)
        for start in range(0, size, 30_000):
            sealer.update(data[start : start + 30_000])
        sealer.finish({}, study_key, keys)
        assert open_all(keys, bytes(sealed)) == data
