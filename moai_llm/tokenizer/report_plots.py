"""Plots as inline SVG: bars side by side, and lines. Colours are CSS classes `c0` .. `c7`, given by the page.

Every plot carries a title for those who cannot see it, and every mark its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLORS = 8  # classes of the page; the next tokenizers begin again, with dashed lines
WIDTH, HEIGHT = 330, 215  # of a plot of lines, in units of its own
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 12, 38  # margins of it
PANEL = 270  # width of a panel of bars or of a histogram; it stays readable where four stand side by side
NAME, NUMBER = 98, 40  # room for the name before a bar and the number behind it
BAR, GAP = 21, 7  # height of a bar, room between two
LETTER = 7.0  # width of a letter of a name, about
STEMS = 120  # height of a histogram


class Bar(NamedTuple):
    name: str
    value: float
    text: str
    faint: bool = False  # the number is not to be compared


class Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]


def color(number: int) -> str:
    return f"c{number % COLORS}"


def bars(title: str, values: Sequence[Bar], largest: float) -> str:
    """One horizontal bar a tokenizer, on a scale of 0 to `largest` that panels of one kind share."""
    room = PANEL - NAME - NUMBER
    parts = []
    for i, bar in enumerate(values):
        y = i * (BAR + GAP)
        width = room * bar.value / largest if largest and math.isfinite(bar.value) else 0.0
        faint = " faint" if bar.faint else ""
        parts.append(
            f'<text class="name" x="{NAME - 7}" y="{y + 15}" text-anchor="end">{escape(_fit(bar.name))}</text>'
            f'<rect class="{color(i)}{faint}" x="{NAME}" y="{y}" width="{max(width, 1):.1f}" height="{BAR}" rx="3">'
            f"<title>{escape(f'{bar.name}: {bar.text}')}</title></rect>"
            f'<text class="value" x="{NAME + max(width, 1) + 6:.1f}" y="{y + 15.5}">{escape(bar.text)}</text>'
        )
    return _svg(title, values_as_text(values), PANEL, len(values) * (BAR + GAP) - GAP, parts)


def values_as_text(values: Sequence[Bar]) -> str:
    return "; ".join(f"{bar.name} {bar.text}" for bar in values)


def histogram(
    title: str,
    number: int,
    behind: Sequence[float],
    front: Sequence[float],
    names: tuple[str, str],
    top: float,
    *,
    labels: Sequence[str],
    unit: str,
    ticks: Sequence[tuple[int, str]],
) -> str:
    """Shares by length: wide pale bars behind narrow strong ones, on a scale of 0 to `top`.

    Args:
        number: which tokenizer or store, for its colour.
        names: what the pale and the strong bars are.
        labels: the length of each bar, in units.
        ticks: which bars have something written below them, and what.
    """
    left, floor, step = 34, STEMS, (PANEL - 34) / len(behind)
    parts = []
    for share in (0.0, top / 2, top):
        y = floor - share / top * (STEMS - 8)
        parts.append(f'<line class="grid" x1="{left}" x2="{PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for values, style, width, name in ((behind, " pale", 0.86, names[0]), (front, "", 0.36, names[1])):
        for i, share in enumerate(values):
            height = share / top * (STEMS - 8)
            if height > 0:
                x = left + (i + (1 - width) / 2) * step
                parts.append(
                    f'<rect class="{color(number)}{style}" x="{x:.1f}" y="{floor - height:.1f}" '
                    f'width="{width * step:.1f}" height="{height:.1f}">'
                    f"<title>{labels[i]} {unit}: {share:.1%} {escape(name)}</title></rect>"
                )
    for i, label in ticks:
        x = left + (i + 0.5) * step
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{label}</text>')
    description = f"wide bars {names[0]}, narrow bars {names[1]}, for {labels[0]} to {labels[-1]} {unit}"
    return _svg(title, description, PANEL, STEMS + 20, parts)


def lines(
    title: str,
    series: Sequence[Line],
    *,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]],
    log_x: bool = False,
    top: float | None = None,
    mark: tuple[float, str] | None = None,
) -> str:
    """Shares over something, one line a tokenizer; y is a share of 1 and shown in percent.

    Args:
        x_ticks: (place, label) along the bottom; the first and last are the ends of the scale.
        log_x: a logarithmic scale.
        top: the largest share of the scale; the largest there is, rounded up, when None.
        mark: a place along the bottom that gets an upright line, and what is written beside it.
    """

    def scale(x: float) -> float:
        low, high, x = x_ticks[0][0], x_ticks[-1][0], min(max(x, x_ticks[0][0]), x_ticks[-1][0])
        share = math.log(x / low) / math.log(high / low) if log_x else (x - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    largest = max((y for line in series for _, y in line.points), default=0.0)
    top = top or round_up(largest)

    def height(y: float) -> float:
        return HEIGHT - BOTTOM - (y / top) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for i in range(5):
        y = height(top * i / 4)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * i / 4:.0%}</text>')
    for x, label in x_ticks:
        parts.append(
            f'<text class="tick" x="{scale(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
        )
    if mark is not None and x_ticks[0][0] <= mark[0] <= x_ticks[-1][0]:
        x, left = scale(mark[0]), scale(mark[0]) > (LEFT + WIDTH) / 2
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x - 5 if left else x + 5:.1f}" y="{TOP + 10}" '
                     f'text-anchor="{"end" if left else "start"}">{escape(mark[1])}</text>')  # fmt: skip
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">'
                 f"{escape(x_label)}</text>")  # fmt: skip
    for i, line in enumerate(series):
        path = " ".join(f"{scale(x):.1f},{height(y):.1f}" for x, y in line.points)
        dashed = ' stroke-dasharray="6 4"' if i >= COLORS else ""
        parts.append(f'<polyline class="{color(i)}" points="{path}"{dashed}><title>{escape(line.name)}</title>'
                     "</polyline>")  # fmt: skip
    return _svg(title, "a line for each of " + ", ".join(line.name for line in series), WIDTH, HEIGHT, parts)


def _svg(title: str, description: str, width: int, height: int, parts: Sequence[str]) -> str:
    label = escape(f"{title}: {description}", quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _fit(name: str) -> str:
    """A name on the room beside a bar; its end tells more than its beginning."""
    letters = int((NAME - 7) / LETTER)
    return name if len(name) <= letters else "…" + name[-(letters - 1) :]


def round_up(share: float) -> float:
    """The end of a scale for shares up to this."""
    return next((top for top in (0.04, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if share <= top), 1.0)
