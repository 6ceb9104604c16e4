"""User identity: passcodes, guessing, tokens and their tricks."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dicom_node import identity, tokens
from dicom_node.cli_users import users_app
from dicom_node.errors import StartError
from dicom_node.identity import KERBEROS, PASSCODE, SAML, TOKEN, USERNAME, Identities, IdentityRefused, Principal, User, hash_passcode
from dicom_node.throttle import Patience, Throttle
from dicom_node.tokens import TokenKey, TokenRefused, Tokens
from storage.errors import Unavailable

HOME, ELSEWHERE = "192.0.2.1", "198.51.100.7"
ALICE = User("alice", hash_passcode(b"correct horse"))
BOB = User("bob", hash_passcode(b"battery staple"))
SCANNER = User("scanner")


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Hashing:
    """Watches the library's Argon2id: what was hashed, and how many at once."""

    def __init__(self) -> None:
        self.passcodes: list[bytes] = []
        self.against: list[str] = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def verify_phc_encoded(self, passcode: bytes, expected: str) -> None:
        """As the library's, and counted."""
        with self._lock:
            self.passcodes.append(passcode)
            self.against.append(expected)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            Argon2id.verify_phc_encoded(passcode, expected)
        finally:
            with self._lock:
                self._now -= 1


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> Hashing:
    """Watch the hashing."""
    hashing = Hashing()
    monkeypatch.setattr(identity, "Argon2id", hashing)
    return hashing


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's."""
    return Clock()


@pytest.fixture
def identities(clock: Clock) -> Identities:
    """Three users."""
    return Identities([ALICE, BOB, SCANNER], clock=clock)


def refused(identities: Identities, name: bytes, passcode: bytes, address: str = HOME, kind: int = PASSCODE) -> IdentityRefused:
    """Try, and be refused."""
    with pytest.raises(IdentityRefused) as caught:
        identities.verify(name, passcode, kind, address)
    return caught.value


# Passcodes


def test_right_passcode(identities: Identities) -> None:
    """User and passcode together are let in."""
    assert identities.verify(b"alice", b"correct horse", PASSCODE, HOME) == Principal("alice", PASSCODE)


def test_who_is_let_in_is_told_and_nobody_else(clock: Clock) -> None:
    """Each identity that is believed is told with its address, those that are known from before too; a wrong one is not."""
    told: list[tuple[str, str]] = []
    identities = Identities([ALICE, SCANNER], clock=clock, identified=lambda principal, address: told.append((principal.name, address)))
    identities.verify(b"alice", b"correct horse", PASSCODE, HOME)
    identities.verify(b"alice", b"correct horse", PASSCODE, HOME)
    identities.verify(b"scanner", b"", USERNAME, ELSEWHERE)
    refused(identities, b"alice", b"wrong")
    refused(identities, b"nobody", b"", kind=USERNAME)
    assert told == [("alice", HOME), ("alice", HOME), ("scanner", ELSEWHERE)]


def test_who_cannot_be_recorded_is_kept_out_for_now(clock: Clock) -> None:
    """Nothing is done without its audit record: with the trail away the right passcode is refused, as something that passes."""

    def fail(_principal: Principal, _address: str) -> None:
        raise Unavailable("the disk of the data directory is full: free some space; senders will try again")

    refusal = refused(Identities([ALICE], clock=clock, identified=fail), b"alice", b"correct horse")
    assert refusal.retry_after_s > 0
    assert "the disk of the data directory is full" in refusal.reason


def test_a_token_that_counts_once_counts_after_a_failed_record(clock: Clock, issuer: Issuer) -> None:
    """The trail was away for a moment: the token that was refused for that is good at the next try, and at no third."""
    away = [True, False]

    def identified(_principal: Principal, _address: str) -> None:
        if away.pop(0):
            raise Unavailable("the disk of the data directory is full: free some space; senders will try again")

    identities = Identities([], tokens=Tokens(issuer.keys, once=True), clock=clock, identified=identified)
    token = issuer.token(jti="a")
    assert "cannot be recorded" in refused(identities, token, b"", kind=TOKEN).reason
    assert identities.verify(token, b"", TOKEN, HOME).name
    assert "used before" in refused(identities, token, b"", kind=TOKEN).reason


def test_unknown_user_and_wrong_passcode_cannot_be_told_apart(identities: Identities, hashing: Hashing) -> None:
    """Unknown user, wrong passcode, a user without one, an empty or endless one: same words, and a hash of the same cost each (row 12)."""
    answers = [
        refused(identities, b"alice", b"wrong"),
        refused(identities, b"nobody", b"wrong"),
        refused(identities, b"scanner", b"wrong"),
        refused(identities, b"alice", b""),
        refused(identities, b"bob", b"x" * 65_535),
        refused(identities, b"n" * 65_535, b"x"),
        refused(identities, b"\xff\xfe", b"x"),
    ]
    assert len({str(answer) for answer in answers}) == 1
    assert len(hashing.against) == len(answers)
    assert len({expected.split("$")[3] for expected in hashing.against}) == 1
    assert max(len(passcode) for passcode in hashing.passcodes) <= 1024


def test_hash_of_an_empty_passcode_lets_nobody_in(clock: Clock) -> None:
    """Where another program made a hash of nothing, neither an empty passcode nor one too long, which is hashed as nothing, is right."""
    empty = Argon2id(salt=b"s" * 16, length=32, iterations=2, lanes=1, memory_cost=8192).derive_phc_encoded(b"")
    identities = Identities([User("carol", empty)], clock=clock)
    for passcode in (b"", b"x" * 1025):
        assert identity.WRONG in str(refused(identities, b"carol", passcode))


def test_decoys_cost_what_users_cost(clock: Clock, hashing: Hashing) -> None:
    """Where users' hashes differ in cost, an unknown name takes the cost of one of them, the same each time."""
    dear = Argon2id(salt=b"s" * 16, length=32, iterations=3, lanes=1, memory_cost=8192).derive_phc_encoded(b"x")
    identities = Identities([ALICE, User("dear", dear)], clock=clock)
    for number in range(20):
        refused(identities, b"nobody-%d" % number, b"x", f"192.0.2.{number}")
        refused(identities, b"nobody-%d" % number, b"x", f"192.0.2.{number}")
    costs = [expected.split("$")[3] for expected in hashing.against]
    assert set(costs) == {"m=19456,t=2,p=1", "m=8192,t=3,p=1"}
    assert costs[::2] == costs[1::2]


def test_user_without_passcode(identities: Identities) -> None:
    """A user without a passcode identifies by name alone; one with a passcode does not (type 1)."""
    assert identities.verify(b"scanner", b"", USERNAME, HOME) == Principal("scanner", USERNAME)
    assert str(refused(identities, b"alice", b"", kind=USERNAME)) == str(refused(identities, b"nobody", b"", kind=USERNAME))


@pytest.mark.parametrize("kind", [KERBEROS, SAML, 0, 6, 255])
def test_other_kinds_are_refused(identities: Identities, kind: int) -> None:
    """Kerberos, SAML and what does not exist are refused in words, and tokens where none are configured."""
    assert "not supported" in str(refused(identities, b"alice", b"correct horse", kind=kind))
    assert "not configured" in str(refused(identities, b"a.b.c", b"", kind=TOKEN))


def test_credentials_without_tls(identities: Identities, hashing: Hashing) -> None:
    """A passcode that came in the clear is not even looked at, except from this machine or where that is configured (row 96)."""
    with pytest.raises(IdentityRefused, match="without TLS"):
        identities.verify(b"alice", b"correct horse", PASSCODE, HOME, secured=False)
    assert hashing.passcodes == []
    assert identities.verify(b"alice", b"correct horse", PASSCODE, "127.0.0.1", secured=False)
    assert Identities([ALICE], plaintext=True).verify(b"alice", b"correct horse", PASSCODE, HOME, secured=False)


def test_right_passcode_is_hashed_once_a_minute(identities: Identities, clock: Clock, hashing: Hashing) -> None:
    """A sender that associates for every instance pays for one hash a minute; a wrong passcode is never taken for the known one."""
    for _ in range(100):
        identities.verify(b"alice", b"correct horse", PASSCODE, HOME)
    assert len(hashing.passcodes) == 1
    refused(identities, b"alice", b"correct Horse")
    refused(identities, b"bob", b"correct horse")
    identities.verify(b"alice", b"correct horse", PASSCODE, ELSEWHERE)
    assert len(hashing.passcodes) == 4
    clock.now += 61
    identities.verify(b"alice", b"correct horse", PASSCODE, HOME)
    assert len(hashing.passcodes) == 5


# Guessing


def guess(identities: Identities, clock: Clock, count: int, *, every_s: float, name: bytes = b"alice", address: str = HOME) -> int:
    """Guess; returns how many guesses were heard."""
    heard = 0
    for number in range(count):
        heard += refused(identities, name, b"guess-%d" % number, address).retry_after_s == 0
        clock.now += every_s
    return heard


def test_ten_thousand_guesses(identities: Identities, clock: Clock, hashing: Hashing) -> None:
    """Of 10 000 guesses in 1 000 s about twenty are heard, the rest costs no hash; after the wait the user comes in (rows 12, 82)."""
    heard = guess(identities, clock, 10_000, every_s=0.1)
    assert heard == len(hashing.passcodes)
    assert 15 <= heard <= 30
    answer = refused(identities, b"alice", b"correct horse")
    assert 0 < answer.retry_after_s <= 60
    clock.now += 300
    assert identities.verify(b"alice", b"correct horse", PASSCODE, HOME)


def test_guessing_many_names_from_one_address(identities: Identities, clock: Clock, hashing: Hashing) -> None:
    """Other names do not help who guesses from one address: about thirty of 10 000 are heard."""
    heard = sum(guess(identities, clock, 1, every_s=0.1, name=b"user-%d" % number) for number in range(10_000))
    assert heard == len(hashing.passcodes)
    assert heard <= 40


def test_guesses_from_many_addresses(identities: Identities, clock: Clock) -> None:
    """Other addresses do not help who guesses one user: of 2 000 within 100 s, a hundred and a few are heard."""
    heard = sum(guess(identities, clock, 1, every_s=0.05, address=f"203.0.{number // 250}.{number % 250}") for number in range(2_000))
    assert 100 <= heard <= 110


def test_one_network_of_ipv6_is_one_source(identities: Identities, clock: Clock) -> None:
    """A subscriber of IPv6 has 2**64 addresses; they count as one."""
    heard = sum(guess(identities, clock, 1, every_s=0.01, name=b"u%d" % number, address=f"2001:db8::{number:x}") for number in range(300))
    assert heard <= 25


def test_nobody_locks_out_an_honest_client(identities: Identities, clock: Clock) -> None:
    """While others guess the same user elsewhere, and other users beside it, an honest client comes in each time (row 82)."""
    assert identities.verify(b"alice", b"correct horse", PASSCODE, HOME)
    for number in range(300):
        guess(identities, clock, 2, every_s=0.0, address=f"203.0.113.{number % 250}")
        guess(identities, clock, 1, every_s=0.0, name=b"bob")
        guess(identities, clock, 1, every_s=0.0, name=b"mallory")
        clock.now += 7.0
        assert identities.verify(b"alice", b"correct horse", PASSCODE, HOME)


def test_attempts_within_a_wait_do_not_extend_it(identities: Identities, clock: Clock) -> None:
    """Who keeps knocking is heard when the wait is over, no later."""
    for _ in range(5):
        refused(identities, b"alice", b"wrong")
    waits = []
    for _ in range(5):
        waits.append(refused(identities, b"alice", b"correct horse").retry_after_s)
        clock.now += 0.15
    assert waits == sorted(waits, reverse=True)
    clock.now += 1
    assert identities.verify(b"alice", b"correct horse", PASSCODE, HOME)


def test_two_hashes_at_once(identities: Identities, hashing: Hashing) -> None:
    """Thirty associations at once from thirty addresses: not more than two passcodes are hashed at a time, and all are answered."""

    def come(number: int) -> Principal:
        return identities.verify(b"alice", b"correct horse", PASSCODE, f"192.0.2.{number}")

    with ThreadPoolExecutor(30) as pool:
        assert len(list(pool.map(come, range(30)))) == 30
    assert hashing.most <= 2
    assert len(hashing.passcodes) == 30


def test_many_associations_of_one_sender_at_once(identities: Identities, hashing: Hashing) -> None:
    """Fifty at once from one address are all let in, at the price of few hashes: none is taken for guessing."""
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: identities.verify(b"alice", b"correct horse", PASSCODE, HOME), range(50)))
    assert len(answers) == 50
    assert len(hashing.passcodes) <= 2


@settings(max_examples=60, deadline=None)
@example([(23.0, "fail")], 0, 1.9)
@given(
    st.lists(st.tuples(st.floats(0, 200), st.sampled_from(["fail", "ask", "forget"])), max_size=60), st.integers(0, 5), st.floats(1, 100)
)
def test_throttle_waits_in_bounds(steps: list[tuple[float, str]], free: int, longest: float) -> None:
    """However it is used: no wait before the free failures are spent, none longer than the longest, and none that asking extends."""
    clock = Clock()
    throttle = Throttle(Patience(free, longest), clock=clock)
    failures = 0
    for pause, step in steps:
        clock.now += pause
        if step == "fail":
            throttle.failed("x")
            failures += 1
        elif step == "forget":
            throttle.forget("x")
            failures = 0
        wait = throttle.wait_s("x")
        assert 0 <= wait <= longest
        assert wait == throttle.wait_s("x")
        if failures < free:
            assert wait == 0
    clock.now += longest
    assert throttle.wait_s("x") == 0


def test_throttle_is_bounded() -> None:
    """A flood of sources costs a bounded memory, and the newest is remembered."""
    throttle = Throttle(Patience(0, 60.0), capacity=100)
    for number in range(10_000):
        throttle.failed(number)
    assert len(throttle) == 100
    assert throttle.wait_s(9_999) > 0


# Configuration

UNUSABLE = {
    "plain text": "secret",
    "argon2i": "$argon2i$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI",
    "bcrypt": "$2b$12$abcdefghijklmnopqrstuuYl1dV1a5yJ1G2ZpVm1lq0r1mJ8n8qXe",
    "2 GiB": "$argon2id$v=19$m=2097152,t=2,p=1$c2FsdHNhbHRzYWx0$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI",
    "100 passes": "$argon2id$v=19$m=19456,t=100,p=1$c2FsdHNhbHRzYWx0$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI",
    "nothing": "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHRzYWx0$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI",
}


@pytest.mark.parametrize("kind", list(UNUSABLE))
def test_unusable_hashes_keep_the_node_from_starting(kind: str) -> None:
    """A passcode in the clear, another algorithm, too much or too little work: the start is refused, in words."""
    with pytest.raises(StartError, match="dicom-node users hash") as caught:
        Identities([User("carol", UNUSABLE[kind])])
    assert "secret" not in str(caught.value)


def test_two_users_of_one_name() -> None:
    """Two users of one name are a fault, and so is a user without one."""
    with pytest.raises(StartError, match="one name"):
        Identities([ALICE, ALICE])
    with pytest.raises(StartError, match="usable name"):
        Identities([User(" ")])


def test_users_hash_command() -> None:
    """The command prints a hash that lets the passcode in, and refuses an empty one."""
    done = CliRunner().invoke(users_app, ["hash", "--stdin"], input="correct horse\n")
    assert done.exit_code == 0
    assert Identities([User("x", done.stdout.strip())]).verify(b"x", b"correct horse", PASSCODE, HOME)
    asked = CliRunner().invoke(users_app, ["hash"], input="one\none\n")
    assert "$argon2id$" in asked.stdout
    assert CliRunner().invoke(users_app, ["hash", "--stdin"], input="\n").exit_code == 1


# Tokens


class Issuer:
    """Issues tokens, honest and forged."""

    def __init__(self, folder: Path) -> None:
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        self.secret = b"0123456789abcdef0123456789abcdef"
        self.files = {"rsa": folder / "rsa.pem", "ec": folder / "ec.pem", "ed": folder / "ed.pem", "hs": folder / "hs.key"}
        for name, key in (("rsa", self.rsa), ("ec", self.ec), ("ed", self.ed)):
            self.files[name].write_bytes(public_pem(key))
        self.files["hs"].write_bytes(self.secret + b"\n")
        self.keys = [
            TokenKey("rsa", "RS256", self.files["rsa"], "https://issuer", "DERM_NODE"),
            TokenKey("ec", "ES256", self.files["ec"], "https://issuer", "DERM_NODE"),
            TokenKey("ed", "EdDSA", self.files["ed"], "https://issuer", "DERM_NODE"),
            TokenKey("hs", "HS256", self.files["hs"], "https://issuer", "DERM_NODE"),
        ]

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good claims; None takes one away."""
        claims = {"sub": "alice", "iss": "https://issuer", "aud": "DERM_NODE", "exp": int(time.time()) + 600, "jti": "1", **changes}
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, *, headers: dict[str, Any] | None = None, **changes: Any) -> bytes:
        """A token of the RSA key."""
        return jwt.encode(self.claims(**changes), self.rsa, "RS256", headers={"kid": "rsa", **(headers or {})}).encode()

    def forged(self, header: dict[str, Any] | str, signature: bytes = b"", **changes: Any) -> bytes:
        """A token put together by hand."""
        text = header if isinstance(header, str) else json.dumps(header)
        return b".".join(coded(part) for part in (text.encode(), json.dumps(self.claims(**changes)).encode())) + b"." + coded(signature)


def public_pem(key: Any) -> bytes:
    """The public half."""
    encoded: bytes = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded


def coded(data: bytes) -> bytes:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Issuer:
    """One issuer for the module."""
    return Issuer(tmp_path_factory.mktemp("issuer"))


def test_good_tokens(issuer: Issuer) -> None:
    """A token of each algorithm is believed; name, issuer and end come out of it."""
    identities = Identities(tokens=Tokens(issuer.keys))
    for kid, key, algorithm in (
        ("rsa", issuer.rsa, "RS256"),
        ("ec", issuer.ec, "ES256"),
        ("ed", issuer.ed, "EdDSA"),
        ("hs", issuer.secret, "HS256"),
    ):
        token = jwt.encode(issuer.claims(), key, algorithm, headers={"kid": kid}).encode()
        principal = identities.verify(token, b"", TOKEN, HOME)
        assert (principal.name, principal.issuer, principal.kind) == ("alice", "https://issuer", TOKEN)
        assert principal.expires_at is not None
    for algorithm in ("RS512", "PS384"):
        keys = [TokenKey("x", algorithm, issuer.files["rsa"], "https://issuer", "DERM_NODE")]  # type: ignore[arg-type]
        assert Tokens(keys).verify(jwt.encode(issuer.claims(), issuer.rsa, algorithm).encode())
    alone = Tokens(issuer.keys[:1])
    assert alone.verify(jwt.encode(issuer.claims(aud=["x", "DERM_NODE"]), issuer.rsa, "RS256").encode()).name == "alice"


def tricks(issuer: Issuer) -> dict[str, bytes]:
    """Every trick of rows 78 to 80."""
    now = int(time.time())
    rsa_head = {"alg": "RS256", "kid": "rsa"}
    public = issuer.files["rsa"].read_bytes()
    good = issuer.token()
    confused = issuer.forged({"alg": "HS256", "kid": "rsa"})
    confused = confused + coded(hmac.digest(public, confused[:-1], sha256))
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    head, _, signature = good.split(b".")
    return {
        "alg none": issuer.forged({"alg": "none", "kid": "rsa"}),
        "alg None": issuer.forged({"alg": "None", "kid": "rsa"}, b"x"),
        "alg missing": issuer.forged({"kid": "rsa"}, b"x"),
        "alg a list": issuer.forged({"alg": ["RS256"], "kid": "rsa"}, b"x"),
        "empty signature": issuer.forged(rsa_head),
        "wrong signature": issuer.forged(rsa_head, b"x" * 256),
        "other key": jwt.encode(issuer.claims(), other, "RS256", headers={"kid": "rsa"}).encode(),
        "changed body": b".".join((head, coded(json.dumps(issuer.claims(sub="root")).encode()), signature)),
        "RS to HS": confused,
        "algorithm of another key": jwt.encode(issuer.claims(), issuer.secret, "HS256", headers={"kid": "ec"}).encode(),
        "PS with the key for RS": jwt.encode(issuer.claims(), issuer.rsa, "PS256", headers={"kid": "rsa"}).encode(),
        "kid unknown": issuer.token(headers={"kid": "../../dev/null"}),
        "kid a list": issuer.forged({"alg": "RS256", "kid": ["rsa"]}, b"x"),
        "no kid among several": jwt.encode(issuer.claims(), issuer.rsa, "RS256").encode(),
        "jku": issuer.token(headers={"jku": "http://192.0.2.9/keys"}),
        "x5u": issuer.token(headers={"x5u": "http://192.0.2.9/chain"}),
        "x5c": issuer.token(headers={"x5c": ["MII"]}),
        "jwk": issuer.token(headers={"jwk": {"kty": "oct", "k": "AAAA"}}),
        "crit": issuer.token(headers={"crit": ["exp"]}),
        "b64": issuer.forged({**rsa_head, "b64": False}, b"x"),
        "encrypted": issuer.token(headers={"enc": "A256GCM"}),
        "typ": issuer.token(headers={"typ": "logout+jwt"}),
        "two algs": issuer.forged('{"alg":"none","alg":"RS256","kid":"rsa"}', b"x"),
        "header a list": issuer.forged("[]", b"x"),
        "header deep": issuer.forged("[" * 5000, b"x"),
        "wrong aud": issuer.token(aud="OTHER"),
        "aud a number": issuer.token(aud=7),
        "no aud": issuer.token(aud=None),
        "wrong iss": issuer.token(iss="https://evil"),
        "no iss": issuer.token(iss=None),
        "no exp": issuer.token(exp=None),
        "exp text": issuer.token(exp="never"),
        "exp infinite": issuer.token(exp=float("inf")),
        "expired 61 s ago": issuer.token(exp=now - 61),
        "nbf in 62 s": issuer.token(nbf=now + 62),
        "iat ahead": issuer.token(iat=now + 3600),
        "no name": issuer.token(sub=None),
        "name empty": issuer.token(sub=""),
        "name long": issuer.token(sub="x" * 257),
        "name with a line end": issuer.token(sub="a\nb"),
        "endless": issuer.token(filler="x" * 20_000),
        "five parts": good + b".x.y",
        "one part": b"x",
        "empty": b"",
    }


def test_tricks_with_tokens(issuer: Issuer) -> None:
    """Alg none, confusion, kid/jku/x5u, crit, wrong or missing aud, iss, exp, nbf: none is believed (rows 78, 79, 80)."""
    tokens = Tokens(issuer.keys)
    for kind, token in tricks(issuer).items():
        said = ""
        try:
            tokens.verify(token)
        except TokenRefused as error:
            said = str(error)
        assert said, f"{kind} was believed"
        assert "alice" not in said


def test_clocks_may_differ_by_a_minute(issuer: Issuer) -> None:
    """A token that ended, or begins, within 59 s of now is believed (row 80)."""
    tokens = Tokens(issuer.keys)
    now = int(time.time())
    assert tokens.verify(issuer.token(exp=now - 55))
    assert tokens.verify(issuer.token(nbf=now + 59))


def test_end_of_time(issuer: Issuer) -> None:
    """An end beyond what a date can hold is the last one."""
    assert Tokens(issuer.keys).verify(issuer.token(exp=10**400)).expires_at.year == 9999


def test_tokens_that_count_once(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens count once, the second use is refused, and one without jti; a full memory refuses rather than forgets."""
    once = Tokens(issuer.keys, once=True)
    assert once.verify(issuer.token(jti="a"))
    with pytest.raises(TokenRefused, match="used before"):
        once.verify(issuer.token(jti="a"))
    with pytest.raises(TokenRefused, match="no identifier"):
        once.verify(issuer.token(jti=None))
    monkeypatch.setattr(tokens, "_REMEMBERED", 3)
    assert once.verify(issuer.token(jti="b"))
    assert once.verify(issuer.token(jti="c"))
    with pytest.raises(TokenRefused, match="too many"):
        once.verify(issuer.token(jti="d"))
    with pytest.raises(TokenRefused, match="used before"):
        once.verify(issuer.token(jti="a"))


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200), st.lists(st.binary(max_size=40), min_size=3, max_size=3).map(lambda parts: b".".join(map(coded, parts)))
    )
)
def test_any_bytes_for_a_token(issuer: Issuer, token: bytes) -> None:
    """Whatever a stranger sends is refused by our own error."""
    with pytest.raises(TokenRefused):
        Tokens(issuer.keys).verify(token)


def test_bad_tokens_are_slowed(issuer: Issuer, clock: Clock) -> None:
    """From one address some fifty bad tokens are looked at, then one in ten seconds; a good one elsewhere is not held up."""
    identities = Identities(tokens=Tokens(issuer.keys), clock=clock)
    heard = 0
    for _ in range(500):
        heard += refused(identities, b"a.b.c", b"", kind=TOKEN).retry_after_s == 0
        clock.now += 0.1
    assert 50 <= heard <= 62
    assert identities.verify(issuer.token(), b"", TOKEN, ELSEWHERE).name == "alice"


def test_keys_that_are_none(issuer: Issuer, tmp_path: Path) -> None:
    """A public key for HS256, a short secret, another kind of key, no file: the start is refused."""
    short = tmp_path / "short"
    short.write_bytes(b"secret")
    small = tmp_path / "small.pem"
    small.write_bytes(public_pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)))  # noqa: S505 - to be refused
    for algorithm, file in (
        ("HS256", issuer.files["rsa"]),
        ("HS256", short),
        ("RS256", issuer.files["ec"]),
        ("ES256", issuer.files["ed"]),
        ("ES384", issuer.files["ec"]),
        ("RS256", small),
        ("RS256", short),
        ("EdDSA", tmp_path / "absent"),
    ):
        with pytest.raises(StartError, match="token key k"):
            Tokens([TokenKey("k", algorithm, file, "i", "a")])  # type: ignore[arg-type]
