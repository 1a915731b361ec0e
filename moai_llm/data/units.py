"""Text to units and their n-grams as numbers: what near-duplicates and overlap with evaluation sets are found by.

A unit is a word, or a single character in scripts without spaces between words (Han, kana, Thai, ...) and in Hangul,
where endings stick to words. Case, punctuation and full-width forms make no difference. The tables come from Unicode
3.2, which every Python carries, so the same text gives the same numbers everywhere and for good.

`split_units` and `reference_grams` are the definition; `gram_hashes` does the same in one pass of compiled code.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

CODE_POINTS = 0x110000
_BREAK, _WORD, _ALONE = range(3)
_ALONE_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1100, 0x11FF),  # Hangul jamo
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007), (0x3040, 0x30FF), (0x3130, 0x318F), (0x31F0, 0x31FF),  # kana, Hangul compatibility jamo
    (0x3400, 0x9FFF), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF),  # Han, Hangul
    (0xFF66, 0xFF9F),  # half-width kana
    (0x20000, 0x3FFFF),
)  # fmt: skip
_MASK = (1 << 64) - 1


@lru_cache(maxsize=1)
def tables() -> tuple[np.ndarray, np.ndarray]:
    """(class, folded) of every code point, uint8 and uint32. What Unicode 3.2 does not know belongs to words."""
    old = unicodedata.ucd_3_2_0.category
    classes = np.full(CODE_POINTS, _WORD, np.uint8)
    folded = np.arange(CODE_POINTS, dtype=np.uint32)
    for code in range(0x20000):
        kind = old(chr(code))
        if kind[0] in "PSZC" and kind != "Cn":
            classes[code] = _BREAK
        elif kind in ("Lu", "Lt"):
            lower = chr(code).lower()
            folded[code] = ord(lower) if len(lower) == 1 else code
    for first, last in _ALONE_RANGES:
        span = classes[first : last + 1]
        span[span == _WORD] = _ALONE
    wide = np.arange(0xFF01, 0xFF5F)
    folded[wide] = folded[wide - 0xFEE0]
    classes[wide] = classes[wide - 0xFEE0]
    classes[0xD800:0xE000] = _BREAK  # lone surrogates
    return classes, folded


def code_points(text: str) -> np.ndarray:
    """(characters,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def unit_hashes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(hash uint64, is it a single character uint8) of each unit."""
    hashes, alone, _ = located_units(text)
    return hashes, alone


def located_units(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Like `unit_hashes`, with (units, 2) int64: where each begins and ends in the text."""
    codes = code_points(text)
    hashes, alone = np.empty(len(codes), np.uint64), np.empty(len(codes), np.uint8)
    spans = np.empty((len(codes), 2), np.int64)
    n = _units(codes, *tables(), hashes, alone, spans)
    return hashes[:n], alone[:n], spans[:n]


def gram_hashes(text: str, words: int, characters: int, whole: bool = True) -> np.ndarray:
    """The n-gram that begins at each unit, uint64: of `words` units, or of `characters` where that unit is a single
    character.

    Args:
        whole: a text shorter than an n-gram gives one of all its units; nothing when false.
    """
    hashes, alone = unit_hashes(unicodedata.normalize("NFC", text))
    grams, n = _all_grams(hashes, alone, words, characters)
    if not n and whole and len(hashes):
        return _grams_of(hashes, np.zeros(1, np.int64), len(hashes))
    return grams[:n]


def located_grams(text: str, words: int, characters: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash of each n-gram uint64, (n-grams, 2) int64 where it begins and ends in the text)."""
    hashes, alone, spans = located_units(text)
    starts = np.arange(len(hashes))
    ends = starts + np.where(alone == 1, characters, words)
    starts = starts[ends <= len(hashes)]
    grams, n = _all_grams(hashes, alone, words, characters)
    return grams[:n], np.stack([spans[starts, 0], spans[ends[starts] - 1, 1]], 1)


def split_units(text: str) -> list[str]:
    """The units of a text, folded, as strings: the definition."""
    classes, folded = tables()
    units, word = [], ""
    for character in text:
        kind, code = classes[ord(character)], int(folded[ord(character)])
        if kind == _WORD:
            word += chr(code)
            continue
        if word:
            units.append(word)
            word = ""
        if kind == _ALONE:
            units.append(chr(code))
    return [*units, word] if word else units


def reference_grams(units: Sequence[str], words: int, characters: int) -> list[tuple[str, ...]]:
    """The n-grams of `gram_hashes` as tuples of units: the definition."""
    classes, _ = tables()
    grams = []
    for i, unit in enumerate(units):
        n = characters if classes[ord(unit[0])] == _ALONE else words
        if i + n <= len(units):
            grams.append(tuple(units[i : i + n]))
    return grams if grams or not units else [tuple(units)]


def reference_hash(gram: Sequence[str]) -> int:
    """The number of an n-gram, in plain Python."""
    total = 0
    for unit in gram:
        h = 14695981039346656037
        for character in unit:
            h = ((h ^ ord(character)) * 1099511628211) & _MASK
        total = (total * 0x9E3779B97F4A7C15 + _reference_mix(h)) & _MASK
    return _reference_mix(total)


def _reference_mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@njit(cache=True, nogil=True)
def mix(x: Any) -> Any:  # pragma: no cover - compiled
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def _units(codes, classes, folded, hashes, alone, spans):  # pragma: no cover
    n, i, size = 0, 0, len(codes)
    while i < size:
        kind = classes[codes[i]]
        if kind == 0:
            i += 1
            continue
        h, start = np.uint64(14695981039346656037), i
        while True:
            h = (h ^ np.uint64(folded[codes[i]])) * np.uint64(1099511628211)
            i += 1
            if kind == 2 or i == size or classes[codes[i]] != 1:
                break
        hashes[n], alone[n] = mix(h), 1 if kind == 2 else 0
        spans[n, 0], spans[n, 1] = start, i
        n += 1
    return n


@njit(cache=True, nogil=True)
def _all_grams(hashes, alone, words, characters):  # pragma: no cover
    grams, n = np.empty(len(hashes), np.uint64), 0
    for i in range(len(hashes)):
        length = characters if alone[i] else words
        if i + length <= len(hashes):
            total = np.uint64(0)
            for j in range(i, i + length):
                total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[j]
            grams[n] = mix(total)
            n += 1
    return grams, n


@njit(cache=True, nogil=True)
def _grams_of(hashes, starts, length):  # pragma: no cover
    """The n-grams of one length that begin at these units."""
    grams = np.empty(len(starts), np.uint64)
    for k in range(len(starts)):
        total = np.uint64(0)
        for j in range(starts[k], starts[k] + length):
            total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[j]
        grams[k] = mix(total)
    return grams
