"""The frame of a page and what pages share: cards, legends, tables. Text that comes from outside is escaped here or by
the caller; an argument named `inner` or `body` is HTML already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from moai_llm.pages.plots import color

STYLE = Path(__file__).with_name("style.css")


def document(title: str, body: Iterable[str], *, style: str = "", data: str = "") -> str:
    """A whole page.

    Args:
        style: CSS of this kind of page, beside that of all.
        data: JSON to lie in the page, for programs.
    """
    inner = "\n".join(body)
    held = data.replace("<", "\\u003c")
    script = f'<script type="application/json" id="report">{held}</script>\n' if data else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}{style}</style>\n</head>\n<body>\n<main>\n{inner}\n</main>\n"
        f"{script}</body>\n</html>\n"
    )


def card(title: str, inner: str, *, count: str = "", number: int | None = None) -> str:
    """A framed part with a heading; `count` stands small at its right, `number` gives it a colour and a swatch."""
    small = f'<span class="count">{escape(count)}</span>' if count else ""
    style, swatch, name = "card", "", "h3"
    if number is not None:
        style, swatch, name = f"card {color(number)}", '<span class="swatch"></span>', 'h3 class="name"'
    return f'<section class="{style}"><{name}>{small}{swatch}{escape(title)}</h3>{inner}</section>'


def side_by_side(panels: Iterable[tuple[str, str, str]], *, wide: bool = False) -> Iterator[str]:
    """Plots in cards, each with its name and its unit."""
    yield f'<div class="grid{" wide" * wide}">'
    yield from (card(name, svg, count=unit) for name, unit, svg in panels)
    yield "</div>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of a name and what stands at the right of it; the second is HTML."""
    items = "".join(f"<li><span>{escape(name)}</span>{value}</li>" for name, value in pairs)
    return f'<ul class="facts">{items}</ul>'


def legend(names: Sequence[str]) -> str:
    """Which colour is which name."""
    items = [f'<li class="{color(i)}"><span class="swatch"></span>{escape(name)}</li>' for i, name in enumerate(names)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def plain_table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> tuple[str, str]:
    """Head and body of a table for `framed`; the values of a row are HTML, its name is text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = [
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
        for name, values in rows
    ]
    return head, "".join(body)


def framed(caption: str, head: str, body: str) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    name = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
