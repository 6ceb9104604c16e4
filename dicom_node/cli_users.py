"""`dicom-node users`: what the configuration needs to know of users."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dicom_node.console import fail

users_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Users that identify themselves when they associate.")


@users_app.callback()
def users() -> None:
    """Users that identify themselves when they associate."""


@users_app.command("hash")
def users_hash(
    stdin: Annotated[bool, typer.Option("--stdin", help="Read the passcode from standard input, up to its first line end.")] = False,
) -> None:
    """Print the hash of a passcode for [[identities.users]]. The passcode is asked for, and never an argument: others could see it."""
    from dicom_node.identity import hash_passcode

    if stdin:
        passcode = sys.stdin.buffer.readline().rstrip(b"\r\n")
    else:
        passcode = str(typer.prompt("Passcode", hide_input=True, confirmation_prompt=True)).encode()
    try:
        typer.echo(hash_passcode(passcode))
    except ValueError as error:
        raise fail(f"{error}; choose another") from error
