"""What the pages of reports are made of: the frame with its style, panels side by side, tables.

A page is whole: no script, no other file, nothing fetched; light and dark, for a phone and for paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("report.css")


def frame(title: str, sections: Iterable[str], data: Mapping[str, Any]) -> str:
    """The whole page; `data`, the numbers that it shows, lie in it as JSON."""
    held = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="report">{held}</script>\n</body>\n</html>\n'
    )


def side_by_side(panels: Sequence[tuple[str, str, str]], *, wide: bool = False) -> Iterator[str]:
    """Plots, each with its name and its unit."""
    yield f'<div class="grid{" wide" * wide}">'
    for label, unit, svg in panels:
        small = f'<span class="count">{escape(unit)}</span>' if unit else ""
        yield f'<section class="card"><h3>{small}{escape(label)}</h3>{svg}</section>'
    yield "</div>"


def plain_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, str]:
    """(head, body) for `framed`. The first column names its row; the values are HTML."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = [
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
        for name, values in rows
    ]
    return head, "".join(body)


def framed(caption: str, head: str, body: str) -> str:
    """A table that scrolls where the screen is narrow."""
    name = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
