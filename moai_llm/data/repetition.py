"""How much of a text repeats itself: n-grams, lines, paragraphs (Gopher, arXiv 2112.11446, appendix A, table A1).

Shares are of characters within units (words, or single characters); white space and punctuation do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from moai_llm.data.units import _grams_of, located_units


class Repetition(NamedTuple):
    """Of the n-grams of one size: the share of the commonest one, and of all that stood in the text before."""

    top: float
    duplicate: float


class Repetitions:
    """The n-grams of a text; a gram of n words is one of n * `gram` characters where those are the units."""

    def __init__(self, text: str, gram: int = 1) -> None:
        self._hashes, alone, spans = located_units(text)
        self._lengths = spans[:, 1] - spans[:, 0]
        self._factor = gram if 2 * int(alone.sum()) > len(alone) else 1

    def of(self, n: int) -> Repetition:
        n *= self._factor
        count = len(self._hashes) - n + 1
        if count < 2:
            return Repetition(0.0, 0.0)
        grams = _grams_of(self._hashes, np.arange(count), n)
        return Repetition(*_repetition(grams, self._lengths, n))


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


@njit(cache=True, nogil=True)
def _repetition(grams, lengths, n):  # pragma: no cover - compiled
    size = 4
    while size < 2 * len(grams):
        size *= 2
    mask = np.uint64(size - 1)
    slots = np.full(size, -1, np.int32)  # hash -> first n-gram with it
    counts = np.zeros(len(grams), np.int32)
    total = 0
    for length in lengths:
        total += length
    width = 0
    for j in range(n):
        width += lengths[j]
    top, duplicate, covered = 0, 0, 0  # covered: units before this one are counted
    for i in range(len(grams)):
        slot = grams[i] & mask
        while slots[slot] >= 0 and grams[slots[slot]] != grams[i]:
            slot = (slot + np.uint64(1)) & mask
        first = slots[slot]
        if first < 0:
            slots[slot] = first = i
        else:
            for j in range(max(covered, i), i + n):
                duplicate += lengths[j]
            covered = max(covered, i + n)
        counts[first] += 1
        if counts[first] > 1:
            top = max(top, counts[first] * width)
        if i + n < len(lengths):
            width += lengths[i + n] - lengths[i]
    return min(1.0, top / total), duplicate / total
