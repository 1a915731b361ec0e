"""How much of a text repeats itself: n-grams, lines, paragraphs (Gopher, arXiv 2112.11446, appendix A, table A1).

Shares are of characters within units (words, or single characters); white space and punctuation do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moai_llm.data.units import OF_UNITS, Polynomials, located_units


class Repetition(NamedTuple):
    """Of the n-grams of one size: the share of the commonest one, and of all that stood in the text before."""

    top: float
    duplicate: float


class Repetitions:
    """The n-grams of a text; a gram of n words is one of n * `gram` characters where those are the units.

    Ask for sizes in rising order: only where a shorter n-gram stands twice can a longer one, so little is left to
    compare.
    """

    def __init__(self, text: str, gram: int = 1) -> None:
        hashes, alone, spans = located_units(text)
        self._lengths = spans[:, 1] - spans[:, 0]
        self._before = np.concatenate([[0], np.cumsum(self._lengths)])  # characters before each unit
        self._factor = gram if 2 * int(alone.sum()) > len(alone) else 1
        self._hashes = Polynomials(hashes, OF_UNITS)
        self._size, self._starts = 0, np.arange(len(hashes))  # where an n-gram of this size may stand twice

    def of(self, n: int) -> Repetition:
        n *= self._factor
        if n < self._size:
            self._starts = np.arange(len(self._lengths))
        starts = self._starts[self._starts + n <= len(self._lengths)]
        self._size = n
        if len(starts) < 2:
            self._starts = starts[:0]
            return Repetition(0.0, 0.0)
        grams = self._hashes(starts, starts + n)
        order = np.argsort(grams)
        grams = grams[order]
        borders = np.flatnonzero(grams[1:] != grams[:-1]) + 1  # equal ones lie together
        groups = np.concatenate([[0], borders])
        counts = np.concatenate([borders, [len(grams)]]) - groups
        several = counts > 1
        stands_twice = np.empty(len(starts), bool)
        stands_twice[order] = np.repeat(several, counts)
        self._starts = starts[stands_twice]
        if not len(self._starts):
            return Repetition(0.0, 0.0)
        first = np.minimum.reduceat(order, groups)[several]
        stands_twice[first] = False
        again, first = starts[stands_twice], starts[first]
        before, total = self._before, int(self._before[-1])
        top = int((counts[several] * (before[first + n] - before[first])).max())
        begins = again.copy()  # of what is not covered by the one before it
        begins[1:] = np.maximum(again[1:], again[:-1] + n)
        duplicate = int((before[again + n] - before[begins]).sum())
        return Repetition(min(1.0, top / total), duplicate / total)


def reference_repetition(units: Sequence[str], n: int) -> Repetition:
    """`Repetitions.of` in plain Python: the definition."""
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    total = sum(map(len, units))
    if len(grams) < 2:
        return Repetition(0.0, 0.0)
    counts = Counter(grams)
    top = max(count * sum(map(len, gram)) if count > 1 else 0 for gram, count in counts.items())
    seen, covered = set(), [False] * len(units)
    for i, gram in enumerate(grams):
        if gram in seen:
            covered[i : i + n] = [True] * n
        seen.add(gram)
    return Repetition(min(1.0, top / total), sum(len(u) for u, c in zip(units, covered) if c) / total)


def duplicate_share(parts: Sequence[str]) -> tuple[float, float]:
    """(share of the parts, share of their characters) that stood there before."""
    seen: set[str] = set()
    parts_twice, characters = 0, 0
    for part in parts:
        if part in seen:
            parts_twice, characters = parts_twice + 1, characters + len(part)
        seen.add(part)
    return parts_twice / max(1, len(parts)), characters / max(1, sum(map(len, parts)))
