"""A document of numbered headings, paragraphs, lists and tables, written as Markdown or as one HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
h1,h2,h3,h4{line-height:1.25;margin:2rem 0 .75rem}table{border-collapse:collapse;margin:1rem 0;width:100%}
th,td{border:1px solid #c8ccd0;padding:.3rem .6rem;text-align:left;vertical-align:top}th{background:#f0f2f4}
code{font:14px ui-monospace,monospace;background:#f4f5f6;padding:.1rem .25rem;border-radius:3px;overflow-wrap:anywhere}
nav ul{list-style:none;padding-left:1.25rem}nav a{text-decoration:none}@media print{nav{page-break-after:always}}"""
_CODE = re.compile(r"`([^`]*)`")


@dataclass(frozen=True, slots=True)
class Heading:
    """``depth`` 2 to 4; the number stands in the text."""

    depth: int
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text; code in backticks."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Columns with a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Block = Heading | Paragraph | Bullets | Table


@dataclass(slots=True)
class Document:
    """Grows by block; headings number themselves."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    _numbers: list[int] = field(default_factory=list)

    def heading(self, depth: int, text: str) -> None:
        """Begin a section; depth 1 is a chapter."""
        del self._numbers[depth:]
        self._numbers += [0] * (depth - len(self._numbers))
        self._numbers[depth - 1] += 1
        self.blocks.append(Heading(depth + 1, f"{'.'.join(map(str, self._numbers))} {text}"))

    def paragraph(self, text: str) -> None:
        """Add running text."""
        self.blocks.append(Paragraph(text))

    def bullets(self, *items: str) -> None:
        """Add a list."""
        self.blocks.append(Bullets(items))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table.

        Raises
        ------
        ValueError
            A row has not as many cells as the header.
        """
        if any(len(row) != len(header) for row in rows):
            raise ValueError("each row needs as many cells as the header")
        self.blocks.append(Table(tuple(header), tuple(map(tuple, rows))))

    def markdown(self) -> str:
        """Write it as Markdown."""
        parts = [f"# {self.title}"]
        for block in self.blocks:
            match block:
                case Heading(depth, text):
                    parts.append(f"{'#' * depth} {text}")
                case Paragraph(text):
                    parts.append(text)
                case Bullets(items):
                    parts.append("\n".join(f"- {item}" for item in items))
                case Table(header, rows):
                    lines = [header, ("---",) * len(header), *rows]
                    parts.append("\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines))
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Write it as one page with its contents in front; nothing is loaded from elsewhere."""
        headings = [block for block in self.blocks if isinstance(block, Heading)]
        contents = "".join(
            f'<li style="margin-left:{block.depth - 2}rem"><a href="#{_anchor(block.text)}">{_escaped(block.text)}</a></li>'
            for block in headings
            if block.depth < 4
        )
        body = "\n".join(_as_html(block) for block in self.blocks)
        title = _escaped(self.title)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n<nav><ul>{contents}</ul></nav>\n{body}\n</body></html>\n"
        )


def _as_html(block: Block) -> str:
    match block:
        case Heading(depth, text):
            return f'<h{depth} id="{_anchor(text)}">{_escaped(text)}</h{depth}>'
        case Paragraph(text):
            return f"<p>{_escaped(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_escaped(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{_escaped(cell)}</th>" for cell in header)
            lines = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _escaped(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", html.escape(text))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
