"""The last line of a fault program: how much it did, for the soak that started it."""

from __future__ import annotations

import json
import sys
from typing import Final

_PREFIX: Final = "tally "


def tell(counts: dict[str, int]) -> None:
    """Print how much was done; ``broken``: how many promises were broken."""
    sys.stdout.write(f"{_PREFIX}{json.dumps(counts)}\n")
    sys.stdout.flush()


def heard(output: str) -> dict[str, int]:
    """Return what a program told at its end; nothing when it did not come to its end."""
    last = output.rstrip().rpartition("\n")[2]
    return dict(json.loads(last.removeprefix(_PREFIX))) if last.startswith(_PREFIX) else {}
