"""Draw what C-STORE measured: bars of instances a second, as multiples of Orthanc's rate in the same run. Plain SVG, nothing to install."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

COLOURS = {"node": "#1b6ca8", "Orthanc": "#b0b0b0", "storescp": "#d0d0d0", "pynetdicom": "#c9b27c", "floor": "#8fb996"}
"""Who is drawn."""
SIZES = {"tiny": "tiny, 8 kB", "small": "small, 0.5 MB", "jpeg": "jpeg, 1.1 MB", "raw": "raw, 36 MB"}
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _LIMIT = 860, 130, 190, 12, 12, 4.0


def draw(results: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Write the figure of the settings that have Orthanc in them.

    Parameters
    ----------
    results
        What ``bench.dimse.run`` returned.
    title
        Stands above: machine and day.
    """
    body: list[str] = []
    y = 62
    for setting, found in results.items():
        lines = {kind: line for kind, line in found.items() if isinstance(line, dict) and "Orthanc" in line}
        if not lines:
            continue
        load = " to ".join(str(one) for one in found["load"])
        body.append(_text(12, y, setting, bold=True))
        body.append(_text(_WIDTH - 12, y, f"load {load}", anchor="end", colour="#666"))
        y += 8
        top = y
        for kind, line in lines.items():
            middle = y + len([name for name in line if name in COLOURS]) * (_BAR + 2) // 2 + 4
            body.append(_text(12, middle, SIZES.get(kind, kind)))
            for name in COLOURS:
                if name in line:
                    body.extend(_bar(y, name, line[name]["per second"], line[name].get("ratio", 1.0)))
                    y += _BAR + 2
            y += _GAP
        body.append(f'<line x1="{_x(1)}" x2="{_x(1)}" y1="{top}" y2="{y - _GAP}" stroke="#444" stroke-dasharray="3 3"/>')
        y += 18
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" font-family="sans-serif" '
        f'font-size="11"><rect width="{_WIDTH}" height="{y}" fill="#fff"/>'
        + _text(12, 22, "C-STORE: instances a second, as multiples of Orthanc's in the same run", bold=True)
        + _text(12, 39, title, colour="#666")
        + "\n".join(body)
        + "</svg>\n"
    )


def _bar(y: int, name: str, rate: float, ratio: float) -> Iterator[str]:
    cut = ratio > _LIMIT
    yield f'<rect x="{_LEFT}" y="{y}" width="{_x(min(ratio, _LIMIT)) - _LEFT:.1f}" height="{_BAR}" fill="{COLOURS[name]}"/>'
    words = f"{name}  {ratio:.2f}  ({rate:,.{1 if rate < 100 else 0}f}/s{', bar cut' if cut else ''})"
    yield _text(_x(min(ratio, _LIMIT)) + 5, y + _BAR - 2, words)


def _x(ratio: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ratio / _LIMIT


def _text(x: float, y: float, words: str, *, bold: bool = False, anchor: str = "start", colour: str = "#000") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(words)}</text>'
