"""A table of numbers as colours: a cell for each pair of a row and a column, its number for who points at it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from moai_llm.pages.plots import LETTER, color

WIDTH = 410  # of the whole, in units of its own
CELL = (7.0, 34.0)  # the least and the most a cell is high
NAMES = 26  # letters of the longest row name that are shown
MORE, LESS = 0, 1  # colours above and below the middle of a scale


def matrix(
    title: str,
    values: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    show: Callable[[float], str] = "{:.3g}".format,
    middle: float | None = None,
    top: float | None = None,
    empty_diagonal: bool = False,
) -> str:
    """Cells are the stronger the larger their number; with a `middle` those above it have one colour, those below
    another, and a number twice the middle is as strong as one of half of it.

    Args:
        top: what is drawn full; the largest number, or four times the middle, when None.
        empty_diagonal: leave out where row and column are the same.
    """
    named = [name if len(name) <= NAMES else f"{name[: NAMES - 1]}…" for name in row_names]
    left = 14 + LETTER * max((sum(2 if ord(c) > 0x2E7F else 1 for c in name) for name in named), default=0)
    width = (WIDTH - left) / max(1, len(column_names))
    height = min(CELL[1], max(CELL[0], width if len(row_names) > 12 else 18.0))
    full = top if top is not None else 4 * middle if middle is not None else max(map(max, values), default=0.0)
    parts = []
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if empty_diagonal and r == c:
                continue
            number, strength = _strength(value, middle, full)
            parts.append(
                f'<rect class="{color(number)} cell" x="{left + c * width:.2f}" y="{r * height:.2f}" '
                f'width="{width - 0.6:.2f}" height="{height - 0.6:.2f}" fill-opacity="{strength:.2f}">'
                f"<title>{escape(f'{row_names[r]}, {column_names[c]}: {show(value)}')}</title></rect>"
            )
    each = max(1, math.ceil(11 / height))
    for r, name in enumerate(named):
        if r % each == 0:
            y = r * height + height / 2 + 4
            parts.append(f'<text class="tick" x="{left - 7:.1f}" y="{y:.1f}" text-anchor="end">{escape(name)}</text>')
    room = LETTER * max(map(len, column_names), default=1) + 6
    each = max(1, math.ceil(room / width))
    floor = len(row_names) * height + 13
    for c, name in enumerate(column_names):
        if c % each == 0:
            x = left + (c + 0.5) * width
            parts.append(f'<text class="tick" x="{x:.1f}" y="{floor:.1f}" text-anchor="middle">{escape(name)}</text>')
    about = f"{len(row_names)} rows by {len(column_names)} columns"
    return (
        f'<svg viewBox="0 0 {WIDTH} {floor + 6:.0f}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(about)}</desc>{''.join(parts)}</svg>"
    )


def _strength(value: float, middle: float | None, full: float) -> tuple[int, float]:
    """Number of the colour, and how opaque."""
    if not math.isfinite(value):
        return MORE, 0.0
    if middle is None:
        return MORE, 0.03 + 0.97 * min(1.0, max(0.0, value / full)) if full > 0 else 0.03
    steps = math.log(max(value, middle / 1e3) / middle) / math.log(max(full / middle, 1.0 + 1e-9))
    return (MORE if steps >= 0 else LESS), 0.03 + 0.97 * min(1.0, abs(steps))
