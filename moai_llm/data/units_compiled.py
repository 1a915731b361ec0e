"""`units.gram_hashes` in one pass of compiled code, for finding near-duplicates, where it is most of the work.

numba takes more than 100 MB of memory, so what every worker of `data prepare` does uses `units` alone.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from numba import njit

from moai_llm.data.units import OF_CHARACTERS, OF_UNITS, code_points, tables


def gram_hashes(text: str, words: int, characters: int) -> np.ndarray:
    """The n-grams of a text; see `units.gram_hashes`."""
    codes = code_points(unicodedata.normalize("NFC", text))
    hashes, alone = np.empty(len(codes), np.uint64), np.empty(len(codes), np.uint8)
    n = _units(codes, *tables(), hashes, alone)
    return _grams(hashes[:n], alone[:n], words, characters)


@njit(cache=True, nogil=True)
def mix(x: Any) -> Any:  # pragma: no cover - compiled
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def _units(codes, classes, folded, hashes, alone):  # pragma: no cover - compiled
    n, i, size = 0, 0, len(codes)
    while i < size:
        kind = classes[codes[i]]
        if kind == 0:
            i += 1
            continue
        h = np.uint64(0)
        while True:
            h = h * np.uint64(OF_CHARACTERS) + np.uint64(folded[codes[i]])
            i += 1
            if kind == 2 or i == size or classes[codes[i]] != 1:
                break
        hashes[n], alone[n] = mix(h), 1 if kind == 2 else 0
        n += 1
    return n


@njit(cache=True, nogil=True)
def _grams(hashes, alone, words, characters):  # pragma: no cover - compiled
    grams, n = np.empty(max(1, len(hashes)), np.uint64), 0
    for i in range(len(hashes)):
        length = characters if alone[i] else words
        if i + length <= len(hashes):
            grams[n] = _gram(hashes, i, length)
            n += 1
    if not n and len(hashes):
        grams[0], n = _gram(hashes, 0, len(hashes)), 1
    return grams[:n]


@njit(cache=True, nogil=True)
def _gram(hashes, start, length):  # pragma: no cover - compiled
    total = np.uint64(0)
    for j in range(start, start + length):
        total = total * np.uint64(OF_UNITS) + hashes[j]
    return mix(total)
