"""MinHash signatures and their bands: texts that share most of their n-grams share a band with high probability.

Broder, On the resemblance and containment of documents, 1997; banding after Indyk and Motwani, STOC 1998. Two texts
whose sets of shingles have Jaccard similarity J meet in one of b bands of r rows with probability 1 - (1 - J^r)^b:
with 16 bands of 8 rows that is 0.06 at J = 0.5, 0.61 at 0.7, 0.95 at 0.8 and 1.00 at 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from moai_llm.data.units import reference_mix
from moai_llm.data.units_compiled import gram_hashes, mix
from moai_llm.runtime import MoaiError

NO_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)  # of a text without a single unit: it is like no other


@dataclass(frozen=True)
class MinHashOptions:
    """bands x rows permutations; shingles of so many words, or characters where a script has no spaces or is Hangul."""

    bands: int = 16
    rows: int = 8
    words: int = 5
    characters: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bands", "rows", "words", "characters"):
            if getattr(self, name) < 1:
                raise MoaiError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def permutations(self) -> int:
        return self.bands * self.rows


class MinHash:
    """Signatures and band keys of texts. Integers only, so every machine gives the same."""

    def __init__(self, options: MinHashOptions | None = None) -> None:
        self.options = options = options or MinHashOptions()
        draw = [reference_mix((options.seed << 32) + i + 1) for i in range(2 * options.permutations)]
        self._a, self._b = np.array(draw, np.uint64).reshape(2, -1)

    def shingles(self, text: str) -> np.ndarray:
        """The set of shingles of a text: sorted uint64, each once."""
        return np.unique(gram_hashes(text, self.options.words, self.options.characters))

    def signature(self, text: str) -> np.ndarray:
        """(permutations,) uint32: the least value each permutation gives to a shingle; all ones for none."""
        return _signature(gram_hashes(text, self.options.words, self.options.characters), self._a, self._b)

    def band_keys(self, text: str) -> np.ndarray:
        """(bands,) uint64; texts that agree in one of them are candidates. `NO_KEY` for a text without units."""
        grams = gram_hashes(text, self.options.words, self.options.characters)
        if not len(grams):
            return np.full(self.options.bands, NO_KEY)
        return _band_keys(_signature(grams, self._a, self._b), self.options.bands)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Shared over all members of two sorted sets; 0 for two empty ones."""
    shared = _shared(left, right)
    return shared / max(1, len(left) + len(right) - shared)


@njit(cache=True, nogil=True)
def _signature(grams, a, b):  # pragma: no cover - compiled
    """Multiply-shift hashing of 32 bits, strongly universal (Dietzfelbinger, STACS 1996)."""
    least = np.full(len(a), np.uint32(0xFFFFFFFF), np.uint32)
    for gram in grams:
        x = gram >> np.uint64(32)
        for k in range(len(a)):
            value = np.uint32((a[k] * x + b[k]) >> np.uint64(32))
            least[k] = min(least[k], value)
    return least


@njit(cache=True, nogil=True)
def _band_keys(signature, bands):  # pragma: no cover - compiled
    rows = len(signature) // bands
    keys = np.empty(bands, np.uint64)
    for band in range(bands):
        total = np.uint64(band + 1)
        for k in range(band * rows, (band + 1) * rows):
            total = total * np.uint64(0x9E3779B97F4A7C15) + np.uint64(signature[k]) + np.uint64(1)
            total = mix(total)
        keys[band] = total
    return keys


@njit(cache=True, nogil=True)
def _shared(left, right):  # pragma: no cover - compiled
    i = j = n = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            i, j, n = i + 1, j + 1, n + 1
        elif left[i] < right[j]:
            i += 1
        else:
            j += 1
    return n
