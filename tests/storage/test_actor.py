"""The audit trail names people, not programs."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

import pytest

from storage.actor import operator


@pytest.mark.parametrize(
    ("login", "user"),
    [
        ("0", "root"),
        (str(pwd.getpwnam("daemon").pw_uid), "daemon"),
        ("4123456789", "4123456789"),
        (str(2**32 - 1), pwd.getpwuid(os.getuid()).pw_name),
        ("", pwd.getpwuid(os.getuid()).pw_name),
    ],
    ids=["root", "other", "nameless", "no-login", "no-such-kernel"],
)
def test_who_logged_in_is_named(tmp_path: Path, login: str, user: str) -> None:
    """The user of the login, if the kernel knows one; else that of the process; and the machine."""
    file = tmp_path / "loginuid"
    file.write_text(login)
    assert operator(file) == f"operator:{user}@{socket.gethostname()}"


def test_without_the_file(tmp_path: Path) -> None:
    """Where the kernel keeps none, it is the process that counts."""
    assert operator(tmp_path / "none") == f"operator:{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"
