"""Claims on keys in a key service: they wrap for one purpose and name only, and every refusal is a sentence of the right class."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import IntegrityError, Unavailable
from storage.keys import Ring
from storage.kms import KmsKey
from tests.storage.key_service import REGION, KeyService, key_service, moto_server


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    """One for all tests here."""
    with moto_server() as address:
        yield address


@pytest.fixture
def service(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyService]:
    """A key service, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    with key_service(moto) as service:
        yield service


def key_of(arn: str, service: KeyService, *, pause_s: float = 0.0, read_timeout_s: float = 30.0) -> KmsKey:
    """A key that asks twice; patient, so that a slow machine is not taken for a silent service."""
    return KmsKey(arn, endpoint_url=service.url, connect_timeout_s=0.5, read_timeout_s=read_timeout_s, attempts=2, pause_s=pause_s)


def test_round_trip(service: KeyService) -> None:
    """What was generated or wrapped is unwrapped, by another process too; the region comes from the ARN."""
    arn = service.make_key()
    key, other = key_of(arn, service), key_of(arn, service)
    secret, wrapped = key.generate("study key", "a")
    assert len(secret) == 32
    assert secret not in wrapped
    assert other.unwrap(wrapped, "study key", "a") == secret
    assert other.unwrap(key.wrap(secret, "study key", "b"), "study key", "b") == secret
    assert key.document() == {"kind": "kms", "arn": arn, "region": REGION, "endpoint_url": service.url}
    assert service.requests == ["GenerateDataKey", "Decrypt", "Encrypt", "Decrypt"]


def test_context_is_part_of_the_key(service: KeyService) -> None:
    """A secret wrapped for another name, another purpose, or damaged, is refused for good."""
    key = key_of(service.make_key(), service)
    _, wrapped = key.generate("study key", "a")
    for bytes_, purpose, name in (
        (wrapped, "study key", "b"),
        (wrapped, "ring secret", "a"),
        (wrapped[:-1] + bytes((wrapped[-1] ^ 1,)), "study key", "a"),
    ):
        with pytest.raises(IntegrityError, match="does not open"):
            key.unwrap(bytes_, purpose, name)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDeniedException", "allow kms:GenerateDataKey, kms:Encrypt and kms:Decrypt"),
        ("DisabledException", "enable it"),
        ("KMSInvalidStateException", "cancel the deletion"),
        ("NotFoundException", "look at ARN, region and endpoint"),
        ("ExpiredTokenException", "renew them"),
        ("ThrottlingException", "quota"),
        ("InvalidKeyUsageException", "symmetric"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_refusals_name_the_remedy(service: KeyService, code: str, remedy: str) -> None:
    """Each refusal of the service is Unavailable, with what to do; nothing of it is a reason to think the data damaged."""
    key = key_of(service.make_key(), service)
    _, wrapped = key.generate("study key", "a")
    service.refuse(code)
    with pytest.raises(Unavailable, match=remedy):
        key.unwrap(wrapped, "study key", "a")
    with pytest.raises(Unavailable, match=remedy):
        key.generate("study key", "a")
    with pytest.raises(Unavailable, match=remedy):
        key.wrap(bytes(32), "study key", "a")
    service.recover()
    assert len(key.unwrap(wrapped, "study key", "a")) == 32


@pytest.mark.parametrize("code", ["ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException"])
def test_credentials_renewed_in_their_file(
    service: KeyService, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is refused for its credentials is tried once more with those that the file has now; with the same ones it is not."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    def renew(access_key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = secret\n")

    renew("first")
    key = key_of(service.make_key(), service)
    _, wrapped = key.generate("study key", "a")
    key._renewed_at = float("-inf")
    service.access_keys.clear()
    service.refuse(code, times=1)
    with pytest.raises(Unavailable, match=r"credentials|signature"):
        key.unwrap(wrapped, "study key", "a")
    assert service.access_keys == ["first"]
    renew("second")
    key._renewed_at = float("-inf")  # looked up a moment ago
    service.refuse(code, times=1)
    assert len(key.unwrap(wrapped, "study key", "a")) == 32
    key.wrap(bytes(32), "study key", "a")
    assert service.access_keys == ["first", "first", "second", "second"]
    assert "secret" not in caplog.text
    service.refuse("AccessDeniedException", times=1)
    with pytest.raises(Unavailable, match="access is denied"):
        key.unwrap(wrapped, "study key", "a")
    assert len(service.access_keys) == 5


def test_credentials_that_come_late(service: KeyService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none were found at first, the file that somebody writes then is read, by all that share the key at once."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    key = key_of(service.make_key(), service)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(Unavailable, match="no credentials are found"):
        key.generate("study key", "a")
    file.write_text("[default]\naws_access_key_id = first\naws_secret_access_key = secret\n")
    key._renewed_at = float("-inf")
    threads = [threading.Thread(target=key.generate, args=("study key", "a")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.access_keys == ["first"] * 4


@pytest.mark.parametrize("code", ["InvalidCiphertextException", "IncorrectKeyException"])
def test_what_means_damage(service: KeyService, code: str) -> None:
    """Only what the service says of the ciphertext itself is IntegrityError."""
    key = key_of(service.make_key(), service)
    service.refuse(code)
    with pytest.raises(IntegrityError):
        key.unwrap(b"w", "study key", "a")


def test_throttled_once_is_not_noticed(service: KeyService) -> None:
    """A throttled request, and one answered with 500, are tried again."""
    key = key_of(service.make_key(), service)
    for code, status in (("ThrottlingException", 400), ("KMSInternalException", 500)):
        service.requests.clear()
        service.refuse(code, status=status, times=1)
        key.generate("study key", "a")
        assert service.requests == ["GenerateDataKey"] * 2


def test_gone_and_back(service: KeyService) -> None:
    """Gone or silent, it is not reachable; it works again when it is back."""
    key = key_of(service.make_key(), service)
    _, wrapped = key.generate("study key", "a")
    service.go()
    with pytest.raises(Unavailable, match="not reachable"):
        key.unwrap(wrapped, "study key", "a")
    service.come_back()
    key.unwrap(wrapped, "study key", "a")
    service.hang()
    with pytest.raises(Unavailable, match="not reachable"):
        key_of(key.place, service, read_timeout_s=0.5).unwrap(wrapped, "study key", "a")
    service.recover()
    key.unwrap(wrapped, "study key", "a")


def test_only_the_first_waits(service: KeyService) -> None:
    """While the service is found unreachable, further callers are refused without asking it."""
    key = key_of(service.make_key(), service, pause_s=3600, read_timeout_s=0.5)
    service.hang()
    service.requests.clear()
    for _ in range(5):
        with pytest.raises(Unavailable, match="not reachable"):
            key.generate("study key", "a")
    assert len(service.requests) == 2


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"not JSON", b'{"Plaintext": "AAAA", "CiphertextBlob": "AAAA", "KeyId": "k"}'])
def test_rubbish_is_refused(service: KeyService, body: bytes) -> None:
    """A 200 with anything but a secret of 32 bytes is refused, in words of ours."""
    key = key_of(service.make_key(), service)
    service.answer(body)
    with pytest.raises((Unavailable, IntegrityError)):
        key.generate("study key", "a")
    with pytest.raises((Unavailable, IntegrityError)):
        key.unwrap(b"w", "study key", "a")


def test_no_credentials(service: KeyService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials or region the sentence says so."""
    arn = service.make_key()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Unavailable, match="no credentials"):
        key_of(arn, service).generate("study key", "a")
    with pytest.raises(Unavailable, match="no region"):
        key_of("alias/node", service).generate("study key", "a")


@pytest.mark.parametrize(
    "url",
    [
        "http://kms.example.org",
        "http://10.0.0.1:8080",
        "ftp://127.0.0.1",
        "kms.example.org",
        "http://127.0.0.1.example.org",
        "http://[",
        "https://",
    ],
)
def test_keys_never_cross_in_clear(url: str) -> None:
    """An endpoint without TLS is refused unless it is this machine."""
    with pytest.raises(Unavailable, match="https"):
        KmsKey("arn:aws:kms:eu-central-1:1:key/a", endpoint_url=url)


@pytest.mark.parametrize("url", ["https://kms.example.org", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"])
def test_safe_endpoints(url: str) -> None:
    """TLS, or this machine."""
    assert KmsKey("arn:aws:kms:eu-central-1:1:key/a", endpoint_url=url).document()["endpoint_url"] == url


# --- in the ring ------------------------------------------------------------------------------------------------------


def test_alias_is_resolved(service: KeyService) -> None:
    """What comes into the ring is the key's ARN: the alias may point to another key tomorrow."""
    arn = service.make_key()
    service.make_alias("node", arn)
    key = KmsKey("alias/node", region=REGION, endpoint_url=service.url).resolved()
    assert key.place == arn


@pytest.mark.parametrize("operation", ["GenerateDataKey", "Encrypt", "Decrypt"])
def test_a_key_that_may_not_do_all_is_not_taken(service: KeyService, tmp_path: Path, operation: str) -> None:
    """A role that may wrap but not unwrap is found out when the key comes into the ring, not when the archive is read."""
    key = key_of(service.make_key(), service)
    service.refuse("AccessDeniedException", operation=operation)
    with pytest.raises(Unavailable, match="access is denied"):
        key.resolved()
    service.recover()
    service.refuse("AccessDeniedException", operation="Decrypt")
    with pytest.raises(Unavailable, match="access is denied"):
        Ring.create(tmp_path / "ring.json", key)
    assert not (tmp_path / "ring.json").exists()


def test_no_secret_on_the_disk(service: KeyService, tmp_path: Path) -> None:
    """The file of a ring made with a key of the service holds addresses and ciphertext: without the service it opens nothing."""
    path = tmp_path / "ring.json"
    ring = Ring.create(path, key_of(service.make_key(), service))
    document = json.loads(path.read_text())
    assert [set(entry) for entry in document["keys"].values()] == [{"kind", "arn", "region", "endpoint_url", "created_at"}]
    assert Ring.load(path).database_key() == ring.database_key()
    service.refuse("AccessDeniedException")
    with pytest.raises(Unavailable, match="access is denied"):
        Ring.load(path)
    assert [info.place for info in Ring.shown(path)] == [ring.keys()[0].place]  # a listing needs no service


def test_from_file_key_to_key_service(service: KeyService, tmp_path: Path) -> None:
    """Add a key of the service, re-wrap, remove the file's key: derived keys are the same, no secret is left in the file."""
    path = tmp_path / "ring.json"
    ring = Ring.create(path)
    old_id = ring.primary_key_id
    before = path.read_text()
    wrapping_key_id, secret, wrapped = ring.generate("a" * 32)
    assert wrapping_key_id == old_id
    new_id = Ring.add(path, key_of(service.make_key(), service))
    moved = Ring.load(path)
    assert moved.database_key() == ring.database_key()
    assert moved.unwrap(old_id, wrapped, "a" * 32) == secret
    now_id, again = moved.wrap(secret, "a" * 32)
    assert now_id == new_id
    Ring.remove(path, old_id)
    assert Ring.load(path).unwrap(new_id, again, "a" * 32) == secret
    assert Ring.load(path).database_key() == ring.database_key()
    text = path.read_text()
    former = json.loads(before)
    assert former["keys"][old_id]["secret"] not in text
    assert former["secret"] not in text
    assert '"file"' not in text
    # and back: a node may leave the service
    file_id = Ring.add(path)
    assert Ring.load(path).database_key() == ring.database_key()
    assert Ring.load(path).wrap(secret, "a" * 32)[0] == file_id


def test_adding_a_key_that_cannot_be_used_changes_nothing(service: KeyService, tmp_path: Path) -> None:
    """With the service gone the ring stays byte for byte."""
    path = tmp_path / "ring.json"
    Ring.create(path)
    arn = service.make_key()
    before = path.read_bytes()
    service.go()
    with pytest.raises(Unavailable, match="not reachable"):
        Ring.add(path, key_of(arn, service))
    service.come_back()
    assert path.read_bytes() == before


def test_the_service_log_names_the_study_key(service: KeyService, tmp_path: Path) -> None:
    """A secret of one study key is refused under the id of another, by the service itself."""
    ring = Ring.create(tmp_path / "ring.json", key_of(service.make_key(), service))
    wrapping_key_id, _, wrapped = ring.generate("a" * 32)
    with pytest.raises(IntegrityError):
        ring.unwrap(wrapping_key_id, wrapped, "b" * 32)


def test_many_threads_share_a_key(service: KeyService) -> None:
    """One client serves all threads."""
    key = key_of(service.make_key(), service)
    good: list[bool] = []

    def work(name: str) -> None:
        secret, wrapped = key.generate("study key", name)
        good.append(key.unwrap(wrapped, "study key", name) == secret)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 8
