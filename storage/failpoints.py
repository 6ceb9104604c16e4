"""Failpoints: named steps of the durable path at which a test may stop the process. For tests only.

Every durable step calls ``reach(name)``. In production that is `unarmed`, which does nothing. A fault test sets
``DICOM_NODE_FAILPOINT`` in the environment of the process it is going to kill.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

VARIABLE = "DICOM_NODE_FAILPOINT"
ONCE = "DICOM_NODE_FAILPOINT_ONCE"
_GRAMMAR = re.compile(r"(?P<name>[a-z_.]+):(?P<nth>[1-9][0-9]*)(?::(?P<action>kill|pause|raise=(?P<message>.+)))?")


def unarmed(name: str) -> None:
    """Do nothing: no failpoint is armed."""


def failpoint_from_environment(environ: Mapping[str, str]) -> Callable[[str], None]:
    """Return the ``reach`` callable that ``DICOM_NODE_FAILPOINT`` asks for; `unarmed` when it is absent or empty.

    The value is ``name:nth[:action]``: at the `nth` time (from 1, counted over all threads of the process) that ``reach(name)`` is
    called, ``kill`` (the default) ends the process by SIGKILL, as a crash would; ``pause`` writes one line to standard error
    and sleeps until the process is killed; ``raise=message`` raises RuntimeError with that message, as a library would. With
    ``DICOM_NODE_FAILPOINT_ONCE``, the path of a file that is made then, it fires in one process of all that share it: a successor
    that met the same work again would die for ever.

    Raises
    ------
    ValueError
        The value does not follow that grammar.
    """
    setting = environ.get(VARIABLE, "")
    if not setting:
        return unarmed
    parsed = _GRAMMAR.fullmatch(setting)
    if parsed is None:
        raise ValueError(f"{VARIABLE}={setting!r} is no failpoint; write name:nth[:kill|:pause|:raise=message], or unset it")
    armed, nth, action, message = parsed["name"], int(parsed["nth"]), parsed["action"] or "kill", parsed["message"]
    once = environ.get(ONCE, "")
    lock = threading.Lock()
    reached = 0

    def reach(name: str) -> None:
        nonlocal reached
        if name != armed:
            return
        with lock:
            reached += 1
            due = reached == nth
        if not due or (once and not _first(once)):
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if message is not None:
            raise RuntimeError(message)
        sys.stderr.write(f"failpoint {armed}:{nth} reached, process {os.getpid()} is paused\n")
        sys.stderr.flush()
        while True:
            time.sleep(3600)

    return reach


def _first(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True
