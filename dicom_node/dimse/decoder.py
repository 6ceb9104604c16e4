"""Decodes compressed frames in a process of its own, one for the frames of an instance.

Codecs are native code that gets the bytes of strangers: what they crash over, loop over or swell over costs that one instance, not the
associations of all the others. Run as a program it reads requests from standard input and answers on standard output: a line of JSON that
says what the picture is; then for each frame its length (8 bytes, big endian) and bytes, answered by the length of a JSON text, the text,
and the decoded frame.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final, Self

from storage.errors import UnsupportedInstance

FRAME_S: Final = 60.0
"""For one frame, the start of the process included."""
_CPU_S = 900
_MEMORY_BYTES = 8 * 1024**3
_LENGTH = struct.Struct(">Q")
_ANSWER_BYTES = 65_536
_LOOK_S = 0.25


class Turns:
    """How many decoders there may be at once; who asks for one more waits for his turn.

    Parameters
    ----------
    count
        None: one for each processor.
    """

    def __init__(self, count: int | None = None) -> None:
        self._free = threading.BoundedSemaphore(count or len(os.sched_getaffinity(0)))

    @contextlib.contextmanager
    def take(self, wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Hold a turn for the length of a block.

        Parameters
        ----------
        wanted
            Asked while it waits.

        Raises
        ------
        UnsupportedInstance
            It is not wanted any more.
        """
        while not self._free.acquire(timeout=_LOOK_S):
            if not wanted():
                raise UnsupportedInstance("the decoding is not wanted any more")
        try:
            yield
        finally:
            self._free.release()


class Decoder:
    """Decodes the frames of one instance. A context manager; the process starts with the first frame.

    Parameters
    ----------
    image
        Fields of `inference.codecs.ImagePixel`.
    frame_bytes
        Of a decoded frame.
    frame_s
        Longest time for one frame.
    """

    def __init__(self, image: Mapping[str, Any], *, frame_bytes: int, frame_s: float = FRAME_S) -> None:
        self._image = dict(image)
        self._frame_bytes = frame_bytes
        self._frame_s = frame_s
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, stream: bytes) -> tuple[bytes, str]:
        """Decode a frame: its samples, little endian, colour by pixel; and its photometric interpretation.

        Raises
        ------
        UnsupportedInstance
            It cannot be decoded, or took too long.
        """
        deadline = time.monotonic() + self._frame_s
        head = b""
        if self._process is None:
            # the interpreter and a module of ours; nothing of the peer's is on the command line
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dicom_node.dimse.decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            head = json.dumps(self._image).encode() + b"\n"
        try:
            self._write(head + _LENGTH.pack(len(stream)) + stream, deadline)
            (size,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
            if size > _ANSWER_BYTES:
                raise UnsupportedInstance("the decoder gave no answer that makes sense")
            answer = json.loads(self._read(size, deadline))
            if "error" in answer:
                raise UnsupportedInstance(f"the pixels cannot be decoded: {answer['error']}")
            return self._read(self._frame_bytes, deadline), str(answer["photometric_interpretation"])
        except (OSError, ValueError) as error:
            raise UnsupportedInstance("the decoder died over the pixels, or took too long") from error

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes, deadline: float) -> None:
        pipe = self._pipe("stdin")
        os.set_blocking(pipe.fileno(), False)
        view = memoryview(data)
        while view:
            _await(pipe, select.POLLOUT, deadline)
            view = view[os.write(pipe.fileno(), view) :]

    def _read(self, size: int, deadline: float) -> bytes:
        pipe = self._pipe("stdout")
        pieces = bytearray()
        while len(pieces) < size:
            _await(pipe, select.POLLIN, deadline)
            piece = os.read(pipe.fileno(), min(size - len(pieces), 1024**2))
            if not piece:
                raise ConnectionError("the decoder ended")
            pieces += piece
        return bytes(pieces)

    def _pipe(self, name: str) -> Any:
        if self._process is None:
            raise ConnectionError("the decoder was not started")
        return getattr(self._process, name)


def _await(pipe: BinaryIO, event: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(pipe.fileno(), event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("the decoder takes too long")


def _main() -> None:
    import resource  # noqa: PLC0415 - what follows belongs to the child alone

    for limit, value in ((resource.RLIMIT_CPU, _CPU_S), (resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    import numpy as np  # noqa: PLC0415

    from inference.codecs import ImagePixel, decode_stream  # noqa: PLC0415
    from inference.errors import UnsupportedPixels  # noqa: PLC0415

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    image = ImagePixel(**json.loads(requests.readline()))
    width = {8: "u1", 16: "<u2"}[image.bits_allocated]
    while head := requests.read(_LENGTH.size):
        (size,) = _LENGTH.unpack(head)
        samples = b""
        try:
            decoded = decode_stream(image, requests.read(size))
            # A sign is kept by the width of the type first, then the bits are taken as they are.
            values = decoded.stored.astype(np.int16 if image.signed else np.uint16)
            samples = np.ascontiguousarray(values.astype(width)).tobytes()
            answer = {"photometric_interpretation": decoded.photometric_interpretation}
        except UnsupportedPixels as error:
            answer = {"error": str(error)}
        text = json.dumps(answer).encode()
        answers.write(_LENGTH.pack(len(text)) + text + samples)
        answers.flush()


if __name__ == "__main__":
    _main()
