"""Scales that hold what they must, points that keep their peaks, lines in the colour of their number."""

from __future__ import annotations

import math
import random
import re

import pytest

from moai_llm.pages.html import document, framed, plain_table
from moai_llm.pages.plots import HEIGHT, LEFT, RIGHT, WIDTH, Line, heat, lines, powers, short, thin, ticks


def test_scales_hold_both_ends_in_few_round_steps() -> None:
    generator = random.Random(0)
    for _ in range(300):
        low = generator.uniform(-1, 1) * 10 ** generator.randint(-6, 9)
        high = low + abs(low) * 10 ** generator.uniform(-3, 3)
        marks = [value for value, _ in ticks(low, high)]
        assert marks[0] <= low + 1e-9 * abs(low) and high - 1e-9 * abs(high) <= marks[-1] and 2 <= len(marks) <= 7
        steps = [b - a for a, b in zip(marks, marks[1:])]
        assert max(steps) == pytest.approx(min(steps), rel=1e-6)
        lead = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(lead - round_) for round_ in (1, 2, 5)) < 1e-6
    assert len(ticks(3.0, 3.0)) >= 2  # a flat line has a scale too
    assert [value for value, _ in powers(0.02, 900)] == [0.01, 0.1, 1, 10, 100, 1000]
    assert len(powers(1e-9, 1e12)) <= 7


def test_short_numbers() -> None:
    shown = {0: "0", 0.0003: "3e-4", 0.25: "0.25", 12000: "12k", 1.5e6: "1.5M", -2e9: "-2G", 3e15: "3e15"}
    assert {value: short(value) for value in shown} == shown


def test_thin_lines_keep_their_peaks() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[777] = (777.0, -5.0)
    kept = thin(points, 400)
    assert len(kept) <= 402 and (4321.0, 99.0) in kept and (777.0, -5.0) in kept
    assert kept == sorted(kept) and thin(points[:10], 400) == points[:10]


def test_lines_lie_where_their_numbers_say() -> None:
    marks = [(0.0, "0"), (5.0, "5"), (10.0, "10")]
    svg = lines("t", [Line("a", [(0, 0), (10, 10), (10, 99)], 3)], x_label="x", x_ticks=marks, y_ticks=marks)
    (found,) = re.findall(r'<polyline class="c3" points="([^"]*)"', svg)
    (x0, y0), (x1, y1), outside = (tuple(map(float, point.split(","))) for point in found.split())
    assert (x0, x1) == (LEFT, WIDTH - RIGHT) and 0 < y1 < y0 < HEIGHT and outside == (x1, y1)
    steps = [(1.0, "1"), (100.0, "100")]
    svg = lines("t", [Line("a", [(1, 1), (10, 10)])], x_label="x", x_ticks=steps, y_ticks=steps, log_x=True, log_y=True)
    x = float(re.findall(r'points="[^ ]+ ([\d.]+),', svg)[0])
    assert x == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) / 2)  # ten is half way to a hundred


def test_a_map_has_a_cell_for_each_number() -> None:
    svg = heat("t", 2, [[0.0, 1.0]] * 5, ("a", "b"), ["1", "2"])
    assert svg.count("<rect") == 10 and {float(o) for o in re.findall(r'fill-opacity="([\d.]+)"', svg)} == {0.04, 1.0}
    many = heat("t", 0, [[0.5] * 128], ("a", "b"), [str(i) for i in range(128)])
    assert many.count('class="tick"') < 20


def test_what_comes_from_outside_is_escaped() -> None:
    evil = "</script><b>"
    text = document(evil, [framed(evil, *plain_table([evil], [(evil, ["1"])]))], data='{"a": "</script>"}')
    assert evil not in text and text.count("</script>") == 1
