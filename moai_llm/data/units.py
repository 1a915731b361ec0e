"""Text to units and their n-grams as numbers: what near-duplicates and overlap with evaluation sets are found by.

A unit is a word, or a single character in scripts without spaces between words (Han, kana, Thai, ...) and in Hangul,
where endings stick to words. Case, punctuation and full-width forms make no difference. The tables come from Unicode
3.2, which every Python carries, so the same text gives the same numbers everywhere and for good.

`split_units`, `reference_grams` and `reference_hash` are the definition. A hash is a polynomial of the code points (of
a unit) or of the hashes (of an n-gram), modulo 2^64, so those of all parts of a text come from one running sum.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

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
OF_CHARACTERS, OF_UNITS = 1099511628211, 0x9E3779B97F4A7C15  # what the polynomials are in; odd, so it has an inverse


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
    """(hash uint64, is it a single character bool) of each unit."""
    hashes, alone, _ = located_units(text)
    return hashes, alone


def located_units(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Like `unit_hashes`, with (units, 2) int64: where each begins and ends in the text."""
    codes = code_points(text)
    classes, folded = tables()
    kinds = classes[codes]
    word, single = kinds == _WORD, kinds == _ALONE
    in_word = np.concatenate([[False], word, [False]])
    starts = np.flatnonzero(single | (word & ~in_word[:-2]))
    ends = np.flatnonzero(single | (word & ~in_word[2:])) + 1
    hashes = mix(Polynomials(folded[codes], OF_CHARACTERS)(starts, ends))
    return hashes, single[starts], np.stack([starts, ends], 1)


def gram_hashes(text: str, words: int, characters: int, whole: bool = True) -> np.ndarray:
    """The n-gram that begins at each unit, uint64: of `words` units, or of `characters` where that unit is a single
    character.

    Args:
        whole: a text shorter than an n-gram gives one of all its units; nothing when false.
    """
    hashes, alone = unit_hashes(unicodedata.normalize("NFC", text))
    starts, ends = _grams(alone, words, characters)
    if not len(starts) and whole and len(hashes):
        starts, ends = np.array([0]), np.array([len(hashes)])
    return mix(Polynomials(hashes, OF_UNITS)(starts, ends))


def located_grams(text: str, words: int, characters: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash of each n-gram uint64, (n-grams, 2) int64 where it begins and ends in the text)."""
    hashes, alone, spans = located_units(text)
    starts, ends = _grams(alone, words, characters)
    return mix(Polynomials(hashes, OF_UNITS)(starts, ends)), np.stack([spans[starts, 0], spans[ends - 1, 1]], 1)


def _grams(alone: np.ndarray, words: int, characters: int) -> tuple[np.ndarray, np.ndarray]:
    """First unit of each n-gram, and the one after its last."""
    starts = np.arange(len(alone))
    ends = starts + np.where(alone, characters, words)
    fits = ends <= len(alone)
    return starts[fits], ends[fits]


class Polynomials:
    """Of spans of some values, value[start] base^(n-1) + ... + value[end - 1], modulo 2^64.

    Args:
        values: (n,) unsigned.
        base: odd.
    """

    def __init__(self, values: np.ndarray, base: int) -> None:
        self._up, down = _powers(base, len(values).bit_length())
        self._sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * down[: len(values)], dtype=np.uint64, out=self._sums[1:])

    def __call__(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(spans,) uint64, of spans with start < end."""
        return (self._sums[ends] - self._sums[starts]) * self._up[ends - 1]


@lru_cache(maxsize=64)
def _powers(base: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """base^k and base^-k modulo 2^64, for all k below 2^bits."""
    several = np.ones((2, 1 << bits), np.uint64)
    several[:, 1:] = np.array([[base], [pow(base, -1, 1 << 64)]], np.uint64)
    up, down = np.cumprod(several, 1, dtype=np.uint64)
    return up, down


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
        h = 0
        for character in unit:
            h = (h * OF_CHARACTERS + ord(character)) & _MASK
        total = (total * OF_UNITS + reference_mix(h)) & _MASK
    return reference_mix(total)


def reference_mix(x: int) -> int:
    """`mix` of one number."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
