"""What a fault program has seen, and its last line: how much it did, for the soak that started it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tests.faults.ground import Verdict

_PREFIX: Final = "tally "
_SHOWN: Final = 50


@dataclass
class Tally:
    """What many hits of nodes have shown, each judged on its own."""

    acknowledged: int = 0
    lost: int = 0
    orphans: int = 0
    faults: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)
    """How often what happened where."""

    def take(self, verdict: Verdict | None, about: str, *, acknowledged: int) -> None:
        """Count a verdict; None: the node did not start again, so that all it had `acknowledged` is lost."""
        if verdict is None:
            self.lost += acknowledged
            self.faults.append(f"{about}: the node did not start again")
            return
        self.acknowledged += verdict.acknowledged
        self.lost += verdict.lost
        self.orphans += verdict.orphans
        self.faults += [f"{about}: {fault}" for fault in verdict.faults]

    def end(self, what: str, counts: dict[str, int], report: Callable[[str], None]) -> int:
        """Report where `what` happened and what was wrong, tell the counts, return the exit status."""
        for place, count in sorted(self.where.items()):
            report(f"  {what} at {place}: {count}")
        for fault in self.faults[:_SHOWN]:
            report(f"  FAULT {fault}")
        broken = len(self.faults) + self.lost
        tell({**counts, "acknowledged": self.acknowledged, "broken": broken})
        return 1 if broken else 0


def tell(counts: dict[str, int]) -> None:
    """Print how much was done; ``broken``: how many promises were broken."""
    sys.stdout.write(f"{_PREFIX}{json.dumps(counts)}\n")
    sys.stdout.flush()


def heard(output: str) -> dict[str, int]:
    """Return what a program told at its end; nothing when it did not come to its end."""
    last = output.rstrip().rpartition("\n")[2]
    return dict(json.loads(last.removeprefix(_PREFIX))) if last.startswith(_PREFIX) else {}
