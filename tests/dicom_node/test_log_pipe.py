"""Nobody waits for the log: stuck readers, full volumes, readers that are gone; and nothing is lost that need not be."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.log_pipe import LogPipe

LINES = 6000
SPEAK = f"""
import os, sys, time, warnings
import structlog
from dicom_node.log_pipe import LIMIT_BYTES
from dicom_node.observability import Metrics, configure_logging, exposition
pipe = configure_logging(form="json", level="info", role="test")
log = structlog.get_logger()
for number in range({LINES}):
    log.info("line", number=number, text="x" * 300, more="y" * 499)
assert pipe._size <= LIMIT_BYTES
"""
TELL = """
warnings.warn("a warning")
print("done", pipe.lost, flush=True)
sys.stdin.readline()
"""


@contextmanager
def full_pipe() -> Iterator[tuple[int, int, int]]:
    """Give a pipe that takes nothing more: where to read, where to write, how many bytes are in it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    held = 0
    try:
        while True:
            held += os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    try:
        yield reader, writer, held
    finally:
        os.close(reader)
        os.close(writer)


def speaker(program: str, stderr: int) -> subprocess.Popen[str]:
    """Start a process that logs; the log is set up once a process."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def heard(program: str) -> tuple[int, list[str]]:
    """Run such a process to its end; what it wrote."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, done.stderr.splitlines()


def test_a_stuck_reader_stops_nobody_and_what_is_lost_is_told() -> None:
    """Nobody reads: the work is done, lines beyond the limit are counted; who reads again gets the rest, and how many it missed."""
    with full_pipe() as (reader, writer, held):
        process = speaker(SPEAK + TELL, writer)
        assert process.stdin is not None
        assert process.stdout is not None
        word, lost = process.stdout.readline().split()
        assert word == "done"
        assert 0 < int(lost) < LINES
        filler, got = held, bytearray()
        process.stdin.write("\n")
        process.stdin.close()
        while process.poll() is None or select.select([reader], [], [], 0)[0]:
            if select.select([reader], [], [], 0.05)[0]:
                got += os.read(reader, 65536)
        assert process.returncode == 0
        process.stdout.close()
    lines = got[filler:].decode().splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    (gap,) = [index for index, line in enumerate(told) if line["event"] == "log.lines_lost"]
    assert told[gap]["lost"] == int(lost)
    assert (told[gap]["level"], told[gap]["role"]) == ("warning", "test")
    assert [line["number"] for line in told[:gap]] == list(range(LINES - int(lost)))
    assert told[gap + 1 :] == []
    assert "a warning" in "\n".join(lines[gap:])


def test_a_stuck_reader_is_not_waited_for_at_the_end() -> None:
    """Nobody ever reads: the process ends well all the same."""
    with full_pipe() as (_, writer, _):
        process = speaker(SPEAK, writer)
        process.communicate()
        assert process.returncode == 0


def test_control_without_the_pipe_a_stuck_reader_stops_the_process() -> None:
    """Negative control: lines written to standard error in the thread that logs wait for the reader, as the node once did."""
    direct = "import sys, structlog\nstructlog.configure(logger_factory=structlog.WriteLoggerFactory(file=sys.stderr))\n"
    with full_pipe() as (reader, writer, _):
        process = speaker(direct + "print('begin', flush=True)\nstructlog.get_logger().info('line')\nprint('done', flush=True)", writer)
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        assert select.select([process.stdout], [], [], 1.0)[0] == []
        os.read(reader, 65536)
        assert process.stdout.readline() == "done\n"
        process.communicate()


@pytest.mark.parametrize("gone", [False, True], ids=["volume full", "reader gone"])
def test_what_cannot_be_written_is_lost_and_kills_nobody(*, gone: bool) -> None:
    """ENOSPC and EPIPE: every line is counted, the process goes on and ends well, its metric says how many."""
    counts = (
        "pipe.drain(60)\nmetrics = Metrics()\npipe.counted_by(metrics.log_lines_dropped)\nlog.error('last')\npipe.drain(60)\n"
        "print(pipe.lost, exposition((), metrics.registry).decode())"
    )
    reader, writer = os.pipe()
    if gone:
        os.close(reader)
    full = writer if gone else os.open("/dev/full", os.O_WRONLY)
    process = speaker(SPEAK + counts, full)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert said.startswith(f"{LINES + 1} ")
    assert f"dicom_node_log_lines_dropped_total {LINES + 1}.0" in said
    for descriptor in {writer, full} | (set() if gone else {reader}):
        os.close(descriptor)


def test_the_parent_counts_with_its_children(tmp_path: Path) -> None:
    """The lines that the supervisor lost stand in the counter of all processes."""
    program = (
        "from pathlib import Path\nimport sys\n"
        "from dicom_node.observability import *\n"
        "prepare_metrics(Path(sys.argv[1]))\nlines_dropped_of_parent()(7)\nprint(exposition(()).decode())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "dicom_node_log_lines_dropped_total 7.0" in done.stdout


def test_nothing_is_lost_at_a_normal_end() -> None:
    """With a reader every line comes out, in order, up to the last."""
    code, lines = heard(SPEAK)
    assert code == 0
    assert [json.loads(line)["number"] for line in lines] == list(range(LINES))


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("raise ValueError('the cause')", 1, "ValueError: the cause"),
        ("log.error('the cause')\nsys.stderr.flush()\nos._exit(3)", 3, "the cause"),
        ("import threading\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()", 0, "ZeroDivisionError"),
        ("import logging\nlogging.getLogger('storage').error('the %d cause', 'no')", 0, "TypeError"),
        ("import atexit\natexit.register(lambda: log.error('the cause'))", 0, "the cause"),
        ("class Last:\n    def __del__(self): log.error('the cause')\nlast = Last()", 0, "the cause"),
    ],
    ids=["uncaught", "cut", "thread", "bad line", "at exit", "finalizer"],
)
def test_the_last_words_come_out(end: str, code: int, words: str) -> None:
    """Whatever ends a process, short of a signal: what it said last is written, and tracebacks too."""
    status, lines = heard(SPEAK + end)
    assert status == code
    assert words in "\n".join(lines[LINES:])


def test_closed_standard_error(tmp_path: Path) -> None:
    """A node started without standard error and output starts."""
    program = tmp_path / "program.py"
    program.write_text(SPEAK + "from dicom_node.observability import say\nsay('ready')\n")
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} {program} >&- 2>&-"], check=False)
    assert done.returncode == 0


def test_a_forked_child_writes_its_own_lines() -> None:
    """After a fork both write, each line once."""
    fork = "child = os.fork()\nlog.info('of', child=not child)\nif child: os.waitpid(child, 0)\n"
    code, lines = heard(SPEAK + fork)
    assert code == 0
    told = [json.loads(line) for line in lines]
    assert sorted(line["number"] for line in told if "number" in line) == list(range(LINES))
    assert sorted(line["child"] for line in told if "child" in line) == [False, True]


def test_room_again(tmp_path: Path) -> None:
    """A full volume has room again: what comes then is written, after a line that says how many were lost."""
    target = tmp_path / "log"
    target.touch()
    descriptor = os.open("/dev/full", os.O_WRONLY)
    pipe = LogPipe(descriptor, lost_line=lambda count: f"lost {count}\n")
    for number in range(5):
        pipe.write(f"{number}\n")
    assert pipe.drain(60)
    assert pipe.lost == 5
    there = os.open(target, os.O_WRONLY)
    os.dup2(there, descriptor)
    os.close(there)
    pipe.write("6\n")
    pipe.write("7\n")
    assert pipe.drain(60)
    pipe.close()
    os.close(descriptor)
    assert target.read_text() == "lost 5\n6\n7\n"


@given(st.lists(st.tuples(st.text(max_size=50), st.booleans()), max_size=40), st.integers(1, 400))
def test_every_line_is_written_or_counted(texts: list[tuple[str, bool]], limit: int) -> None:
    """Whatever is written and however small the room: a text comes out whole and in order, or its lines are told as lost, in its place."""
    reader, writer = os.pipe()
    pipe = LogPipe(writer, lost_line=lambda count: f"\0{count}\0", limit_bytes=limit)
    expected: list[Any] = []
    for text, waits in texts:
        before = pipe.lost
        line = text.replace("\0", "") + "\n"
        pipe.write(line)
        expected.append(pipe.lost - before or line)
        if waits:
            assert pipe.drain(60)
    assert pipe.drain(60)
    pipe.close()
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        got = file.read().decode("utf-8")
    merged: list[Any] = []
    for one in expected:
        if isinstance(one, int) and merged and isinstance(merged[-1], int):
            merged[-1] += one
        else:
            merged.append(one)
    wanted = "".join(f"\0{one}\0" if isinstance(one, int) else one for one in merged)
    assert [piece for piece in got.split("\0")[::2] if piece] == [piece for piece in wanted.split("\0")[::2] if piece]
    assert sum(map(int, got.split("\0")[1::2])) == pipe.lost
