"""STOW-RS over a real socket into a real archive."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicomweb.context import WebLimits
from dicomweb.multipart import MultipartLimits
from storage.records import Limits
from tests.dicomweb.door import ANY_SYNTAX, MULTIPART, Door, file_of, multipart, path_of
from tests.storage.samples import chunks_of_video, new_uid, photograph

Doors = Callable[..., Door]


def references(document: dict[str, Any]) -> list[str]:
    """SOP Instance UIDs of the Referenced SOP Sequence."""
    return [item["00081155"]["Value"][0] for item in document.get("00081199", {}).get("Value", [])]


def failures(document: dict[str, Any]) -> dict[str, int]:
    """SOP Instance UID -> Failure Reason of the Failed SOP Sequence."""
    return {item["00081155"]["Value"][0]: item["00081197"]["Value"][0] for item in document.get("00081198", {}).get("Value", [])}


def test_all_stored(door: Door) -> None:
    """200; each instance is referenced with a URL that works at once, the study on top; the bytes are those that were sent."""
    study = new_uid()
    samples = [photograph(study=study) for _ in range(3)]
    answer = door.store(*map(file_of, samples))
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/dicom+json"
    document = answer.json
    assert document["00081190"] == {"vr": "UR", "Value": [f"{door.base}/studies/{study}"]}
    assert "00081198" not in document
    for sample, item in zip(samples, document["00081199"]["Value"], strict=True):
        assert item["00081150"]["Value"] == [sample.sop_class_uid]
        assert item["00081155"]["Value"] == [sample.sop_instance_uid]
        got = door.request("GET", item["00081190"]["Value"][0], headers=ANY_SYNTAX)
        assert got.status == 200
        assert got.parts[0][1].endswith(sample.data_set)
        assert door.house.read(sample.sop_instance_uid) == sample.data_set
    assert len(door.get(f"/studies/{study}/instances").json) == 3


def test_again_is_success_and_one_copy(door: Door) -> None:
    """The identical instance again: 200, and nothing is written twice."""
    sample = door.stored()
    objects = door.house.objects()
    answer = door.store(file_of(sample))
    assert answer.status == 200
    assert references(answer.json) == [sample.sop_instance_uid]
    assert door.house.objects() == objects


def test_partly_stored(door: Door) -> None:
    """202: the good ones are durable, each failed one is named with its reason in a number and in words."""
    good, other, known = photograph(), photograph(), door.stored()
    changed = photograph(sop=known.sop_instance_uid, study=known.study_instance_uid, series=known.series_instance_uid)
    cut = file_of(other)[:-7]
    answer = door.store(file_of(good), cut, b"no DICOM at all" * 20, file_of(changed))
    assert answer.status == 202
    assert references(answer.json) == [good.sop_instance_uid]
    assert failures(answer.json) == {other.sop_instance_uid: 0xC000, known.sop_instance_uid: 0x0111}
    (unnamed,) = answer.json["0008119A"]["Value"]
    assert unnamed["00081197"]["Value"] == [0xC000]
    assert "no DICOM file" in unnamed["00091001"]["Value"][0]
    assert len(unnamed["00000902"]["Value"][0]) <= 64
    assert door.house.read(known.sop_instance_uid) == known.data_set
    assert door.get(path_of(other)).status == 404


def test_none_stored(door: Door) -> None:
    """409 with the same typed body when the request was well formed and nothing could be stored."""
    sample = photograph()
    answer = door.store(file_of(sample), path=f"/studies/{new_uid()}")
    assert answer.status == 409
    assert answer.headers["content-type"] == "application/dicom+json"
    assert failures(answer.json) == {sample.sop_instance_uid: 0xA900}
    assert answer.json["00081190"] == {"vr": "UR"}
    assert door.get(f"/studies/{sample.study_instance_uid}").status == 404


def test_study_in_the_path(door: Door) -> None:
    """Only the instances of the study in the path are taken; the others fail with 0xA900."""
    ours, foreign = photograph(), photograph()
    answer = door.store(file_of(ours), file_of(foreign), path=f"/studies/{ours.study_instance_uid}")
    assert answer.status == 202
    assert references(answer.json) == [ours.sop_instance_uid]
    assert failures(answer.json) == {foreign.sop_instance_uid: 0xA900}


def test_failures_are_named_by_the_data_set(door: Door) -> None:
    """File meta information of another instance does not put the blame on that one."""
    sample, other = photograph(), photograph()
    prefix = file_of(other)[: -len(other.data_set)]
    answer = door.store(prefix + sample.data_set[:-3])
    assert failures(answer.json) == {sample.sop_instance_uid: 0xC000}


def test_who_sent(door: Door) -> None:
    """The origin is the socket's peer; behind a trusted proxy it is the address that the proxy wrote last, if it is one."""
    said = {"X-Forwarded-For": "198.51.100.7, 203.0.113.9"}
    with Door(door.house, trusted_proxy=True) as proxied:
        for running, header, address in (
            (door, said, "127.0.0.1"),
            (proxied, said, "203.0.113.9"),
            (proxied, {"X-Forwarded-For": "x"}, "127.0.0.1"),
        ):
            sample = photograph()
            assert running.store(file_of(sample), headers=header).status == 200
            origin = door.house.index.find(sample.sop_instance_uid).origin
            assert (origin.door, origin.address, origin.called_ae_title) == ("dicomweb", address, "NODE")


def test_sop_class_and_transfer_syntax_not_supported(doors: Doors) -> None:
    """A SOP class that is not accepted is 0x0122; a transfer syntax nobody knows is refused by its own reason."""
    door = doors(archive={"accept_sop_class": lambda _: False})
    sample = photograph()
    answer = door.store(file_of(sample))
    assert answer.status == 409
    assert failures(answer.json) == {sample.sop_instance_uid: 0x0122}
    assert "SOP class" in answer.json["00081198"]["Value"][0]["00091001"]["Value"][0]
    unknown = file_of(sample).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0")
    assert door.store(unknown).status == 409


@pytest.mark.parametrize("boundary", ["'()+_,-./:=?", "a b", "x" * 70, "=_:", "?"])
@pytest.mark.parametrize("quoted", [True, False])
def test_every_boundary(door: Door, boundary: str, quoted: bool) -> None:
    """Every punctuation of RFC 2046 in the boundary, quoted or not, type quoted or not."""
    sample = photograph()
    written = f'"{boundary}"' if quoted else boundary
    kind = '"application/dicom"' if quoted else "application/dicom"
    answer = door.store(file_of(sample), boundary=boundary, headers={"Content-Type": f"multipart/related; type={kind}; boundary={written}"})
    assert answer.status == 200
    assert references(answer.json) == [sample.sop_instance_uid]


def test_shapes_of_a_body(door: Door) -> None:
    """Preamble, epilogue, no part headers, many part headers, Content-Location: all are read."""
    samples = [photograph() for _ in range(3)]
    heads = [b"", b"content-type:application/dicom;transfer-syntax=1.2.840.10008.1.2.1\r\nContent-Location: x/y\r\nContent-Length: 5\r\n",
             b"CONTENT-TYPE: Application/DICOM\r\n"]  # fmt: skip
    body = b"This is a message in MIME format.\r\n"
    body += b"".join(
        multipart([file_of(sample)], head=head).removesuffix(b"--boundary--\r\n") for sample, head in zip(samples, heads, strict=True)
    )
    answer = door.request(
        "POST",
        "/studies",
        headers={"Content-Type": MULTIPART.format("boundary")},
        body=body + b"--boundary--\r\nepilogue\r\n--boundary\r\n",
    )
    assert answer.status == 200
    assert references(answer.json) == [sample.sop_instance_uid for sample in samples]


def test_parts_of_another_type(door: Door) -> None:
    """A part that says it is something else fails by itself."""
    good, bad = photograph(), photograph()
    body = multipart([file_of(bad)], head=b"Content-Type: image/jpeg\r\n").removesuffix(b"--boundary--\r\n") + multipart([file_of(good)])
    answer = door.request("POST", "/studies", headers={"Content-Type": MULTIPART.format("boundary")}, body=body)
    assert answer.status == 202
    assert references(answer.json) == [good.sop_instance_uid]
    assert "Content-Type" in answer.json["0008119A"]["Value"][0]["00091001"]["Value"][0]


def test_single_part(door: Door) -> None:
    """A bare application/dicom body is one instance."""
    sample = photograph()
    answer = door.request("POST", "/studies", headers={"Content-Type": "application/dicom"}, body=file_of(sample))
    assert answer.status == 200
    assert references(answer.json) == [sample.sop_instance_uid]
    assert door.request("POST", "/studies", headers={"Content-Type": "application/dicom"}, body=b"").problem["status"] == 400


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_chunked_bodies(door: Door, size: int) -> None:
    """Chunks of any size are the same body."""
    samples = [photograph(), photograph(rows=200, columns=200)]
    body = multipart(map(file_of, samples[: 1 if size < 100 else 2]))
    answer = door.request(
        "POST",
        "/studies",
        headers={"Content-Type": MULTIPART.format("boundary")},
        body=(body[at : at + size] for at in range(0, len(body), size)),
    )
    assert answer.status == 200
    assert references(answer.json) == [sample.sop_instance_uid for sample in samples[: 1 if size < 100 else 2]]


@pytest.mark.parametrize(
    ("content_type", "body", "status", "words"),
    [
        ('multipart/related; type="application/dicom"', b"x", 400, "boundary"),
        (MULTIPART.format("b" * 71), b"x", 400, "boundary"),
        (MULTIPART.format("b"), b"", 400, "no delimiter"),
        (MULTIPART.format("b"), b"hello", 400, "no delimiter"),
        (MULTIPART.format("b"), b"--b--", 400, "no part"),
        (MULTIPART.format("b"), b"--b\r\nbroken header\r\n\r\nx\r\n--b--", 400, "header"),
        (MULTIPART.format('"b'), b"--b--", 415, "Content-Type"),
        ("multipart/form-data; boundary=b", b"--b--", 415, "multipart/related"),
        ('multipart/related; type="application/dicom+json"; boundary=b', b"--b--", 415, "application/dicom"),
        ('multipart/related; type="application/dicom+xml"; boundary=b', b"--b--", 415, "application/dicom"),
        ("application/zip", b"PK", 415, "application/dicom"),
        ("", b"x", 415, "Content-Type"),
        ("nonsense", b"x", 415, "Content-Type"),
    ],
)
def test_requests_that_are_refused(door: Door, content_type: str, body: bytes, status: int, words: str) -> None:
    """Bad syntax is 400, another media type is 415; each says why."""
    answer = door.request("POST", "/studies", headers={"Content-Type": content_type}, body=body)
    assert answer.status == status
    assert words in answer.problem["detail"]


def test_the_answer_type_is_checked_before_anything_is_stored(door: Door) -> None:
    """An answer in XML is not on offer: 406, and the instance is not there."""
    sample = photograph()
    answer = door.store(file_of(sample), headers={"Accept": "application/dicom+xml"})
    assert answer.status == 406
    assert "application/dicom+json" in answer.problem["detail"]
    assert door.get(path_of(sample)).status == 404


def test_encoded_bodies_are_not_taken(door: Door) -> None:
    """A content coding is 415 before a byte is inflated."""
    for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
        answer = door.store(file_of(photograph()), headers={"Content-Encoding": coding})
        assert answer.status == 415, coding
        assert "coding" in answer.problem["detail"]


def test_a_body_without_its_end(door: Door) -> None:
    """No closing delimiter: 400; whole parts before the cut are named as stored, the cut part leaves nothing."""
    whole, cut = photograph(), photograph()
    body = multipart([file_of(whole), file_of(cut)])
    objects = len(door.house.objects())
    for end in (len(body) - len("\r\n--boundary--\r\n"), len(body) - 300, len(body) - len("-\r\n")):
        answer = door.request("POST", "/studies", headers={"Content-Type": MULTIPART.format("boundary")}, body=body[:end])
        assert answer.status == 400
        assert references(answer.problem["stored"]) == [whole.sop_instance_uid]
        assert door.get(path_of(whole)).status == 200
        assert door.get(path_of(cut)).status == 404
    assert len(door.house.objects()) == objects + 1
    assert door.house.landing_files() == []


def test_a_client_that_hangs_up(doors: Doors) -> None:
    """A connection lost in the middle of a part leaves no file and no instance; the part before it may be there."""
    door = doors()
    whole, cut = photograph(), photograph(rows=900, columns=1000)
    body = multipart([file_of(whole), file_of(cut)])
    head = (
        f"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Type: {MULTIPART.format('boundary')}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for sent in (len(body) // 2, len(body) - 5):
        with socket.create_connection(("127.0.0.1", door.port)) as connection:
            connection.sendall(head.encode() + body[:sent])
            eventually(lambda: bool(door.house.landing_files()))
        eventually(lambda: not door.house.landing_files())
        assert door.get(path_of(cut)).status == 404
    assert door.house.objects() == [door.house.index.find(whole.sop_instance_uid).sealed.object_key]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something happens that nothing tells us of."""
    for _ in range(400):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.one_of(st.binary(max_size=400), st.lists(st.sampled_from(
        [b"--b", b"--", b"\r\n", b"\r\n\r\n", b"Content-Type: application/dicom", b"\0" * 128 + b"DICM", b"\2\0\0\0UL\4\0\xff\xff\xff\xff", b"x"]),  # noqa: E501
        max_size=14).map(b"".join)),
    closed=st.booleans(),
)  # fmt: skip
def test_hostile_bodies(door: Door, body: bytes, closed: bool) -> None:
    """Whatever the body, the answer is of the 400 class, typed, and nothing is left behind."""
    before = door.house.objects()
    answer = door.request(
        "POST", "/studies", headers={"Content-Type": MULTIPART.format("b")}, body=body + (b"\r\n--b--" if closed else b"")
    )
    assert answer.status in {400, 409, 413}
    assert answer.headers["content-type"] in {"application/dicom+json", "application/problem+json"}
    json.loads(answer.body)
    assert door.house.objects() == before
    assert door.house.landing_files() == []


def test_limits(doors: Doors) -> None:
    """Too long a body, too many parts, too long part headers: 413, and what was stored before is named."""
    limits = WebLimits(body_bytes=20_000, multipart=MultipartLimits(parts=3, header_bytes=200))
    door = doors(limits=limits)
    samples = [photograph() for _ in range(4)]
    many = door.store(*map(file_of, samples))
    assert many.status == 413
    assert references(many.problem["stored"]) == [sample.sop_instance_uid for sample in samples[:3]]
    assert door.get(path_of(samples[3])).status == 404
    big = file_of(photograph(rows=200, columns=200))
    assert "20000" in door.store(big).problem["detail"]
    chunked = door.request("POST", "/studies", headers={"Content-Type": MULTIPART.format("boundary")}, body=iter([multipart([big])]))
    assert chunked.status == 413
    long = door.request(
        "POST",
        "/studies",
        headers={"Content-Type": MULTIPART.format("boundary")},
        body=multipart([b"x"], head=b"A: " + b"a" * 300 + b"\r\n"),
    )
    assert long.status == 413
    assert door.house.landing_files() == []


def test_limit_of_one_instance(doors: Doors) -> None:
    """An instance beyond the archive's own limit fails by itself, with the reason; its neighbour is stored."""
    door = doors(archive={"limits": Limits(object_bytes=10_000)})
    big, small = photograph(rows=200, columns=200), photograph()
    answer = door.store(file_of(big), file_of(small))
    assert answer.status == 202
    assert failures(answer.json) == {big.sop_instance_uid: 0xC000}
    assert "limit" in answer.json["00081198"]["Value"][0]["00091001"]["Value"][0]


def test_no_room(doors: Doors) -> None:
    """When the disk is too full to take anything: 503 or 507 with Retry-After, and each instance with 0xA700."""
    door = doors(archive={"min_free_bytes": 1 << 60})
    sample = photograph()
    answer = door.store(file_of(sample))
    assert answer.status in {503, 507}
    assert answer.headers["retry-after"]
    assert failures(answer.json) == {sample.sop_instance_uid: 0xA700}


def test_deadlines(doors: Doors) -> None:
    """A body that pauses or trickles is answered 408 at the deadline, though each byte came in time."""
    door = doors(limits=WebLimits(receive_s=1.0, idle_s=0.6))
    head = (
        f"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Type: {MULTIPART.format('b')}\r\nContent-Length: 100000\r\n\r\n--b\r\n\r\n"
    )

    def trickle(pause: float) -> bytes:
        with socket.create_connection(("127.0.0.1", door.port)) as connection:
            connection.settimeout(20)
            connection.sendall(head.encode())
            for _ in range(int(10 / pause)):
                connection.settimeout(pause)
                try:
                    return connection.recv(100)
                except TimeoutError:
                    connection.sendall(b"x")
        return b"nothing"

    with ThreadPoolExecutor(2) as pool:
        slow, idle = pool.map(trickle, (0.2, 5.0))
    assert slow.startswith(b"HTTP/1.1 408 ")
    assert idle.startswith(b"HTTP/1.1 408 ")
    assert door.house.landing_files() == []
    assert door.store(file_of(photograph())).status == 200


def test_too_many_uploads(doors: Doors) -> None:
    """One upload more than allowed gets 503 with Retry-After, and the running one is not disturbed."""
    door = doors(limits=WebLimits(uploads=1))
    body = multipart([file_of(photograph())])
    head = (
        f"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nContent-Type: {MULTIPART.format('boundary')}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.sendall(head.encode() + body[:100])
        for _ in range(100):
            second = door.store(file_of(photograph()))
            if second.status == 503:
                break
        assert second.headers["retry-after"]
        assert second.problem["status"] == 503
        connection.sendall(body[100:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_parallel_posts_of_one_study(door: Door) -> None:
    """Many posts of one study at once: each is stored, the study has them all."""
    study, series = new_uid(), new_uid()
    samples = [photograph(study=study, series=series) for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda sample: door.store(file_of(sample)), samples))
    assert [answer.status for answer in answers] == [200] * 24
    (found,) = door.get(f"/studies?StudyInstanceUID={study}").json
    assert found["00201208"]["Value"] == [24]
    assert found["00201206"]["Value"] == [1]


async def test_memory_is_bounded(door: Door) -> None:
    """A part of 200 MiB streams through: the process grows by much less than the part."""

    async def body() -> AsyncIterator[bytes]:
        yield b"--b\r\n\r\n" + file_of(photograph())[:-1] + b"\0\r\n--b\r\n\r\n"
        prefix = file_of(photograph())
        yield prefix[: prefix.index(b"\x08\x00\x16\x00")]
        for chunk in chunks_of_video(200 << 20):
            yield chunk
        yield b"\r\n--b--"

    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{door.base}/studies", data=body(), headers={"Content-Type": MULTIPART.format("b")}) as response,
    ):
        answer = await response.json(content_type="application/dicom+json")
    assert response.status == 200, answer
    assert len(references(answer)) == 2
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"{grown} KiB"


async def test_another_client_is_served_meanwhile(door: Door) -> None:
    """While an upload waits for its sender, others are answered."""
    go = asyncio.Event()
    sample = photograph()

    async def body() -> AsyncIterator[bytes]:
        whole = multipart([file_of(sample)])
        yield whole[:500]
        await go.wait()
        yield whole[500:]

    async with aiohttp.ClientSession() as session:
        upload = asyncio.create_task(
            session.post(f"{door.base}/studies", data=body(), headers={"Content-Type": MULTIPART.format("boundary")})
        )
        for _ in range(5):
            async with session.get(f"{door.base}/studies?limit=1") as response:
                assert response.status == 200
        assert not upload.done()
        go.set()
        async with await upload as response:
            assert response.status == 200


def test_many_small_chunks_cost_linear_time(door: Door) -> None:
    """A hundred thousand chunks of one byte are read like any other body."""
    sample = photograph(rows=320, columns=320)
    body = multipart([file_of(sample)])

    def single() -> Iterator[bytes]:
        for at in range(0, len(body), 1000):
            yield b"".join(b"1\r\n%c\r\n" % byte for byte in body[at : at + 1000])
        yield b"0\r\n\r\n"

    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.sendall(
            f"POST /dicomweb/studies HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Type: {MULTIPART.format('boundary')}\r\n\r\n".encode()  # noqa: E501
        )
        for piece in single():
            connection.sendall(piece)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
