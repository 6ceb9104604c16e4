"""``make bench``: measure, print medians and ratios, write ``bench/results/<date>.json``.

Only ratios within one run count: the machine may be noisy. Contenders take turns. Some minutes a section, ``growth`` an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.figure import draw

SECTIONS = ("dimse", "parts", "ingest", "growth", "rotation", "reindex")


def measured(sections: set[str], rounds: int, *, short: bool, share: float) -> dict[str, Any]:
    """Run the sections; each imports what it needs."""
    results: dict[str, Any] = {}
    if "dimse" in sections:
        from bench import dimse

        results["dimse"] = dimse.run(rounds, short=short, share=share)
    if "parts" in sections:
        from bench import parts

        with tempfile.TemporaryDirectory() as name:
            results["parts"] = parts.run(Path(name))
    if "ingest" in sections:
        from bench import ingest

        results["ingest"] = ingest.run(rounds)
    if "growth" in sections:
        from bench import growth

        results["growth"] = growth.run(rounds)
    if sections & {"rotation", "reindex"}:
        from bench import care

        results["care"] = care.run(sections & {"rotation", "reindex"})
    return results


def main() -> None:
    """Run what was asked for, as far as this machine can."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=(*SECTIONS, "all"), action="append", help="may be given several times")
    parser.add_argument("--short", action="store_true", help="of dimse: a round of a minute, to see that it works; no figures to quote")
    parser.add_argument("--share", type=float, default=1.0, help="of dimse: of the usual number of instances a turn")
    arguments = parser.parse_args()
    only = set(arguments.only or ["all"])
    sections = set(SECTIONS) if "all" in only else only
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "rounds": arguments.rounds, "load before": os.getloadavg()[0]}
    target = Path(__file__).parent / "results"
    target.mkdir(exist_ok=True)
    path = target / f"{datetime.now(UTC):%Y-%m-%d}.json"
    found = measured(sections, arguments.rounds, short=arguments.short, share=arguments.share)
    if arguments.short:
        return
    if found.get("dimse"):
        title = f"{platform.machine()}, {os.cpu_count()} processors, {datetime.now(UTC):%Y-%m-%d}; medians of {arguments.rounds} rounds"
        draw(found["dimse"], Path(__file__).parent.parent / "docs" / "performance.svg", title=title)
    results = {**about, **found}
    if path.exists():  # the sections of a day may be measured one after the other
        results = {**json.loads(path.read_text()), **results}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
