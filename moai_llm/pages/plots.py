"""Plots as inline SVG: bars side by side, histograms, lines and maps of heat. Colours are CSS classes `c0` ..
`c7`, given by the page.

Every plot carries a title for those who cannot see it, and every mark its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

COLORS = 8  # classes of the page; the next ones begin again, with dashed lines
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
    number: int = -1  # of its colour; its place among the lines when below 0
    raw: Sequence[tuple[float, float]] = ()  # drawn faint behind it: what it smooths
    dots: Sequence[tuple[float, float, str]] = ()  # places that say their number to who points at them


Ticks = Sequence[tuple[float, str]]  # place and label, ascending; the first and last are the ends of the scale


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
    title: str, series: Sequence[Line], *, x_label: str, x_ticks: Ticks, y_ticks: Ticks, log_x: bool = False,
    log_y: bool = False, mark: tuple[float, str] | None = None,
) -> str:  # fmt: skip
    """One line each over a common scale. What lies outside of it is drawn at its border.

    Args:
        mark: a place along the bottom that gets an upright line, and what is written beside it.
    """
    across, up = (_scale(ticks, log) for ticks, log in ((x_ticks, log_x), (y_ticks, log_y)))

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + across(x) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up(y) * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))

    parts = []
    for value, label in y_ticks:
        _, y = place(x_ticks[0][0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value, label in x_ticks:
        x, _ = place(value, y_ticks[0][0])
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>'
        )
    if mark is not None and x_ticks[0][0] <= mark[0] <= x_ticks[-1][0]:
        x, _ = place(mark[0], y_ticks[0][0])
        side, anchor = (-5, "end") if x > (LEFT + WIDTH) / 2 else (5, "start")
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x + side:.1f}" y="{TOP + 10}" text-anchor="{anchor}">'
                     f"{escape(mark[1])}</text>")  # fmt: skip
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">'
                 f"{escape(x_label)}</text>")  # fmt: skip
    numbered = [(i if line.number < 0 else line.number, line) for i, line in enumerate(series)]
    for i, line in numbered:
        if line.raw:
            parts.append(f'<polyline class="{color(i)} raw" points="{path(line.raw)}"/>')
    for i, line in numbered:
        dashed = ' stroke-dasharray="6 4"' if i >= COLORS else ""
        parts.append(f'<polyline class="{color(i)}" points="{path(line.points)}"{dashed}>'
                     f"<title>{escape(line.name)}</title></polyline>")  # fmt: skip
        for *at, text in line.dots:
            x, y = place(at[0], at[1])
            parts.append(f'<circle class="{color(i)}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(text)}</title>'
                         "</circle>")  # fmt: skip
    return _svg(title, "a line for each of " + ", ".join(line.name for line in series), WIDTH, HEIGHT, parts)


def heat(
    title: str, number: int, columns: Sequence[Sequence[float]], labels: tuple[str, str], row_names: Sequence[str]
) -> str:
    """A map: a column for each moment, a cell for each row in it, the stronger the larger; values of 0 to 1.

    Args:
        number: of the colour.
        labels: what the first and the last column are.
        row_names: of the rows, from the top; written where there are few.
    """
    left, rows = 30, len(row_names)
    height, width = max(6.0, min(20.0, 150 / rows)), (PANEL - left) / len(columns)
    parts = []
    for c, values in enumerate(columns):
        for r, value in enumerate(values):
            parts.append(
                f'<rect class="{color(number)} cell" x="{left + c * width:.2f}" y="{r * height:.1f}" '
                f'width="{width + 0.3:.2f}" height="{height - 1:.1f}" fill-opacity="{0.04 + 0.96 * value:.2f}"/>'
            )
    for r, name in enumerate(row_names):
        if rows <= 16 or r % (rows // 8) == 0:
            y = r * height + height / 2 + 4
            parts.append(f'<text class="tick" x="{left - 6}" y="{y:.1f}" text-anchor="end">{escape(name)}</text>')
    floor = rows * height + 14
    parts.append(f'<text class="tick" x="{left}" y="{floor:.1f}">{escape(labels[0])}</text>')
    parts.append(f'<text class="tick" x="{PANEL}" y="{floor:.1f}" text-anchor="end">{escape(labels[1])}</text>')
    return _svg(title, f"{rows} rows over {len(columns)} moments", PANEL, round(floor + 6), parts)


def percents(top: float) -> Ticks:
    """A scale of percent from 0 to `top`."""
    return [(top * i / 4, f"{top * i / 4:.0%}") for i in range(5)]


def ticks(low: float, high: float) -> Ticks:
    """A scale of round numbers that holds both: 2 to 6 steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    step = next(
        size
        for power in range(-30, 31)
        for size in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if span / size <= 4.5
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [(i * step, short(i * step)) for i in range(first, last + 1)]


def powers(low: float, high: float) -> Ticks:
    """A logarithmic scale that holds both, above 0, with at most six labels."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    each = math.ceil((last - first) / 5)
    return [(10.0**i, short(10.0**i)) for i in range(first, last + each, each)]


def short(value: float) -> str:
    """A number for a scale: 0.0003 -> 3e-4, 12000 -> 12k."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        digits, power = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    scale, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= s), (1.0, ""))
    return f"{value / scale:.4g}{unit}"


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _scale(marks: Ticks, log: bool) -> Callable[[float], float]:
    """Value -> share of the scale."""
    low, high = marks[0][0], marks[-1][0]

    def share(value: float) -> float:
        value = min(max(value, low), high)
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    return share


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
