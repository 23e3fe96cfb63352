"""This file writes HTML: whole pages, escaped text, tables that sort, lists of definitions."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from mergekit_lit.reports.tables import UNKNOWN, interval, number


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is read.
        value: the number that the column is sorted by; None sorts by the text.
        note: smaller text after it, such as an interval.
    """

    text: str
    value: float | None = None
    note: str = ""


def measured(
    value: float | None, bounds: tuple[float, float] | None = None, *, digits: int = 3
) -> Cell:
    """Return the cell of a number with its interval."""
    return Cell(number(value, digits), value, interval(bounds, digits))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table whose columns sort when their headings are pressed.

    The first column holds words and names its row; a column that has no number at all holds words.
    """
    held = [list(row) for row in rows]
    words = [
        index == 0 or all(row[index].value is None and row[index].text != UNKNOWN for row in held)
        for index in range(len(columns))
    ]
    heads = "".join(
        f'<th scope="col"{_class(word=word)}><button>{escaped(name)}</button></th>'
        for name, word in zip(columns, words, strict=True)
    )
    noted = [any(row[index].note for row in held) for index in range(len(columns))]
    body = "".join(f"<tr>{_row(row, words, noted)}</tr>" for row in held)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(caption)}">'
        f'<table class="sortable"><caption>{escaped(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def document(title: str, *parts: str) -> str:
    """Return a whole page that holds its own style and script, and may load nothing."""
    files = resources.files("mergekit_lit.reports") / "files"
    style, script = ((files / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>{''.join(parts)}</main>\n<script>\n{script}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a section under a heading, or nothing where it has no parts."""
    inner = "".join(parts)
    return f"<section><h2>{escaped(title)}</h2>{inner}</section>" if inner else ""


def paragraph(text: str, *, class_: str = "") -> str:
    """Return a paragraph of plain text."""
    return f"<p{_attribute('class', class_)}>{escaped(text)}</p>"


def definitions(entries: Mapping[str, str]) -> str:
    """Return a list of terms and what they mean."""
    inner = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v)}</dd>" for k, v in entries.items())
    return f"<dl>{inner}</dl>"


def flags(warnings: Sequence[str]) -> str:
    """Return a box of sentences to keep in mind, or nothing where there are none."""
    inner = "".join(f"<li>{escaped(text)}</li>" for text in warnings)
    return f'<div class="flags"><b>To keep in mind</b><ul>{inner}</ul></div>' if inner else ""


def folded(summary: str, *parts: str, open_: bool = False) -> str:
    """Return parts that show when their summary is pressed."""
    state = " open" if open_ else ""
    return f"<details{state}><summary>{escaped(summary)}</summary>{''.join(parts)}</details>"


def block(text: str) -> str:
    """Return text as it stands, in a monospaced block."""
    return f"<pre>{escaped(text)}</pre>"


def escaped(text: str) -> str:
    """Return text that HTML reads as text."""
    return html.escape(str(text))


def _row(row: Sequence[Cell], words: Sequence[bool], noted: Sequence[bool]) -> str:
    cells = zip(row, words, noted, strict=True)
    return "".join(
        _cell(cell, first=index == 0, word=word, noted=with_note)
        for index, (cell, word, with_note) in enumerate(cells)
    )


def _cell(cell: Cell, *, first: bool, word: bool, noted: bool) -> str:
    """Return one cell; where the column has notes, an empty one keeps the numbers in line."""
    value = "" if word or cell.value is None else f' data-value="{cell.value}"'
    note = f"<i>{escaped(cell.note)}</i>" if noted else ""
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    return f"<{tag}{scope}{_class(word=word)}{value}>{escaped(cell.text)}{note}</{tag}>"


def _class(*, word: bool) -> str:
    return ' class="text"' if word else ""


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escaped(value)}"' if value else ""
