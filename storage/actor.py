"""Who does what is typed, for the audit trail."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path
from typing import Final

_LOGIN: Final = Path("/proc/self/loginuid")
_NOBODY: Final = 2**32 - 1
"""What the kernel says of a process that no login began, as in a container."""


def operator(login: Path = _LOGIN) -> str:
    """Return ``operator:USER@HOST``: who logged in, as the kernel knows it (`sudo` changes nothing of that), else whose the process is."""
    return f"operator:{_user(login)}@{socket.gethostname()}"


def _user(login: Path) -> str:
    try:
        found = int(login.read_text(encoding="ascii"))
    except (OSError, ValueError):  # another kernel
        found = _NOBODY
    number = os.getuid() if found == _NOBODY else found
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)  # an id without a name, as containers have them
