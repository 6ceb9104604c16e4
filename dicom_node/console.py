"""What every command shares: where it writes, how it fails, the --config option, a bar for long work."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from dicom_node import config
from dicom_node.config import ConfigurationError, Settings
from dicom_node.errors import StartError
from storage.errors import StorageError

_CONFIG_FILE: ContextVar[Path | None] = ContextVar("config_file", default=None)
"""What the command under way was given by --config."""


def _remember(path: Path | None) -> Path | None:
    _CONFIG_FILE.set(path)
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="The configuration file; default: $DICOM_NODE_CONFIG, else the built-in defaults.",
        show_default=False,
        callback=_remember,
    ),
]

_COMMAND = re.compile(r"`dicom-node ([^`]+)`")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def runnable(text: str) -> str:
    """Return `text` with every command in backticks as the user would have to type it: this program, and this configuration.

    The hints of our sentences name commands in short, ```dicom-node keys list```; one typed like that would look at the default
    configuration, where the user's own command was given another by ``--config``.
    """
    return _COMMAND.sub(lambda found: f"`{command_line(found[1], _CONFIG_FILE.get())}`", text)


def command_line(arguments: str, config_file: Path | None) -> str:
    """Return a command of this program as the user would have to type it."""
    program = sys.argv[0]
    if not program.endswith("/dicom-node") or shutil.which("dicom-node") == program:
        program = "dicom-node"
    given = f" --config {shlex.quote(str(config_file))}" if config_file is not None and "--config" not in arguments else ""
    return f"{program} {arguments}{given}"


def fail(*messages: str) -> typer.Exit:
    """Say what is wrong and leave with status 1."""
    for message in messages:
        err.print(Text("error: ", style="bold red") + Text(runnable(message)))
    return typer.Exit(1)


@contextmanager
def faults_as_sentences() -> Iterator[None]:
    """Turn the errors we know into sentences; what we do not know stays a traceback, since it is a bug."""
    try:
        yield
    except (ConfigurationError, StartError) as error:
        raise fail(*error.faults) from error
    except StorageError as error:
        raise fail(str(error)) from error
    except BrokenPipeError:
        # The reader of our output went away (`dicom-node trace … | head`).
        sys.stderr.close()
        raise typer.Exit(0) from None


def settings_of(path: Path | None) -> Settings:
    """Return the configuration; faults as `config.load`."""
    return config.load(path)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal: call it with (done, total)."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns, whole: identifiers are copied from them, so nothing is cut or folded whatever the terminal's width."""
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for number, row in enumerate(table):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        out.print(Text(line, style="" if number else "bold"))
