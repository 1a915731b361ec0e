"""Text to a table of words and how often each occurs: all that learning a vocabulary needs to know of a corpus.

A word here is a piece of the split (`O200K_SPLIT`): no merge crosses its ends, so a corpus may be
forgotten once its words are counted. The table stays small where the corpus grows, is saved, and serves every
vocabulary size. `split_words` is the definition; `WordCounts.add` does the same for UTF-8 bytes in one pass of
compiled code.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.split import O200K_SPLIT

LONGEST_WORD = 1024  # bytes; a longer one is counted in pieces
PIECE = 1 << 16  # characters split at a time; a word across the border is cut there
MOST_WORDS = 1 << 23  # distinct words kept; beyond it the rarest are forgotten

# classes of characters, as far as the split tells them apart
_OTHER, _UPPER, _LOWER, _LETTER, _MARK, _NUMBER, _BLANK, _NEWLINE, _SPACE = range(9)
_CLASS_OF_CATEGORY = {
    "Lu": _UPPER, "Lt": _UPPER, "Ll": _LOWER, "Lm": _LETTER, "Lo": _LETTER,
    "Mn": _MARK, "Mc": _MARK, "Me": _MARK, "Nd": _NUMBER, "Nl": _NUMBER, "No": _NUMBER,
}  # fmt: skip
_WHITE_SPACE = [9, 11, 12, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]


class WordCounts:
    """Distinct words (bytes) and their counts, in the order of their first occurrence.

    Args:
        most_words: distinct words kept. When there are more, those seen least are dropped until half are left, and
            `forgotten` counts their occurrences (lossy counting; Manku and Motwani, VLDB 2002).
    """

    def __init__(self, most_words: int = MOST_WORDS) -> None:
        self.most_words, self.forgotten = most_words, 0
        self._arena = np.empty(1 << 16, np.uint8)
        self._ends = np.zeros(1 << 12, np.int64)  # of word i in the arena; it begins where word i - 1 ends
        self._counts = np.zeros(1 << 12, np.int64)
        self._table = np.full(1 << 14, -1, np.int32)  # open addressing: hash -> word
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def counts(self) -> np.ndarray:
        """(words,) int64."""
        return self._counts[: self._size]

    @property
    def ends(self) -> np.ndarray:
        """(words,) int64: where each word ends in `data`."""
        return self._ends[: self._size]

    @property
    def data(self) -> np.ndarray:
        """uint8: the words' bytes one after the other."""
        return self._arena[: int(self._ends[self._size - 1]) if self._size else 0]

    @property
    def text_bytes(self) -> int:
        """Bytes of text the counted words make up."""
        return int(np.dot(np.diff(self.ends, prepend=0), self.counts)) if self._size else 0

    def words(self) -> Iterator[bytes]:
        data, start = self.data.tobytes(), 0
        for end in self.ends.tolist():
            yield data[start:end]
            start = end

    def items(self) -> Iterator[tuple[bytes, int]]:
        yield from zip(self.words(), self.counts.tolist())

    def add(self, text: str) -> None:
        """Count the words of a text, split like `split_words`. Lone surrogates count as U+FFFD."""
        classes = character_classes()
        for start in range(0, len(text), PIECE):
            raw = np.frombuffer(text[start : start + PIECE].encode("utf-8", "replace"), np.uint8)
            self._add(raw, *_split(raw, classes))

    def add_words(self, words: Iterable[bytes], count: int = 1) -> None:
        """Count words as they are, `count` times each."""
        for word in words:
            raw = np.frombuffer(word, np.uint8)
            self._add(raw, np.array([len(word)], np.int32), 1 if word else 0, count)

    def _add(self, raw: np.ndarray, ends: np.ndarray, words: int, count: int = 1) -> None:
        self._reserve(words, len(raw))
        self._size = _insert(raw, ends, words, count, self._arena, self._ends, self._counts, self._table, self._size)
        if self._size > self.most_words:
            self._forget()

    def _reserve(self, words: int, size: int) -> None:
        """Room for so many more words and bytes."""
        used = int(self._ends[self._size - 1]) if self._size else 0
        if used + size > len(self._arena):
            self._arena = _grown(self._arena, used + size)
        if self._size + words > len(self._ends):
            self._ends = _grown(self._ends, self._size + words)
            self._counts = _grown(self._counts, self._size + words)
        if 2 * (self._size + words) > len(self._table):
            self._table = np.full(4 * len(self._ends), -1, np.int32)
            _index(self._arena, self._ends, self._size, self._table)

    def _forget(self) -> None:
        """Keep the more frequent half."""
        order = np.argsort(-self.counts, kind="stable")[: self.most_words // 2]
        kept = self._taken(np.sort(order))
        kept.forgotten = self.forgotten + int(self.counts.sum() - kept.counts.sum())
        self.__dict__.update(kept.__dict__)

    def _taken(self, which: np.ndarray) -> WordCounts:
        """A table of some of the words."""
        lengths = np.diff(self.ends, prepend=0)[which]
        starts = self.ends[which] - lengths
        taken = WordCounts(self.most_words)
        new_ends = np.cumsum(lengths)
        offsets = np.repeat(starts - (new_ends - lengths), lengths) + np.arange(int(lengths.sum()))
        taken._set(self.data[offsets], new_ends, self.counts[which])
        return taken

    def _set(self, data: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> None:
        self._arena, self._size = np.ascontiguousarray(data, np.uint8), len(ends)
        self._ends, self._counts = ends.astype(np.int64), counts.astype(np.int64)
        size = 1 << 14
        while size < 4 * len(ends):
            size *= 2
        self._table = np.full(size, -1, np.int32)
        _index(self._arena, self._ends, self._size, self._table)

    def save(self, file: str | Path) -> None:
        """Write a .npz that `load_word_counts` reads, most frequent words first."""
        ordered = self._taken(np.argsort(-self.counts, kind="stable"))
        lengths = np.diff(ordered.ends, prepend=0).astype(np.uint16)
        with Path(file).open("wb") as out:
            np.savez_compressed(
                out, data=ordered.data, lengths=lengths, counts=ordered.counts, forgotten=self.forgotten,
                split=O200K_SPLIT,
            )  # fmt: skip


def load_word_counts(file: str | Path) -> WordCounts:
    """What `WordCounts.save` wrote.

    Raises:
        MoaiError: no such file, or not a table of word counts of this split.
    """
    path = Path(file)
    if not path.is_file():
        raise MoaiError(f"{path}: no such table of word counts")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            data, lengths, counts = saved["data"], saved["lengths"], saved["counts"]
            split, forgotten = str(saved["split"]), int(saved["forgotten"])
    except Exception as error:  # numpy, zipfile and zlib have each their own
        raise MoaiError(f"{path} is not a table of word counts that `moai tokenizer train` saved: {error}") from None
    if split != O200K_SPLIT:
        raise MoaiError(f"{path} was counted with another split: count the text again")
    ends = np.cumsum(lengths.astype(np.int64))
    whole = len(lengths) == len(counts) and (len(ends) == 0 or ends[-1] == len(data)) and (counts > 0).all()
    if not whole:
        raise MoaiError(f"{path} is damaged: count the text again")
    table = WordCounts()
    table._set(data, ends, counts)
    table.forgotten = forgotten
    return table


def split_words(text: str, pattern: str = O200K_SPLIT) -> Iterator[str]:
    """The pieces of a split pattern, by the regex library: the definition."""
    import regex

    return (match.group() for match in regex.finditer(pattern, text))


def count_words(texts: Iterable[str], pattern: str = O200K_SPLIT, table: WordCounts | None = None) -> WordCounts:
    """The word table of texts, or `table` with their words added. A split pattern other than ours goes through the
    regex library, several times slower.
    """
    table = WordCounts() if table is None else table
    if pattern == O200K_SPLIT:
        for text in texts:
            table.add(text)
        return table
    for text in texts:
        text = text.encode("utf-8", "replace").decode("utf-8")
        for start in range(0, len(text), PIECE):
            for word, count in Counter(split_words(text[start : start + PIECE], pattern)).items():
                raw = word.encode()
                table.add_words((raw[i : i + LONGEST_WORD] for i in range(0, len(raw), LONGEST_WORD)), count)
    return table


@lru_cache(maxsize=1)
def character_classes() -> np.ndarray:
    """(0x110000,) uint8: the class of every code point, by this Python's Unicode tables."""
    category = unicodedata.category
    classes = np.fromiter(
        (_CLASS_OF_CATEGORY.get(category(chr(c)), _OTHER) for c in range(0x110000)), np.uint8, 0x110000
    )
    classes[_WHITE_SPACE] = _BLANK
    classes[[10, 13]] = _NEWLINE
    classes[32] = _SPACE
    return classes


def _grown(array: np.ndarray, needed: int) -> np.ndarray:
    size = len(array)
    while size < needed:
        size *= 2
    grown = np.zeros(size, array.dtype)
    grown[: len(array)] = array
    return grown


@njit(cache=True, nogil=True)
def _split(raw: Any, classes: Any) -> Any:  # pragma: no cover - compiled
    """(ends of words in bytes, how many): the alternatives of O200K_SPLIT in their order, without backtracking."""
    size = len(raw)
    kind = np.empty(size + 1, np.uint8)  # class of each character
    at = np.empty(size + 1, np.int32)  # where it begins
    n, i = 0, 0
    while i < size:
        first = np.uint32(raw[i])
        at[n] = i
        if first < 0x80:
            code, i = first, i + 1
        elif first < 0xE0:
            code, i = ((first & 0x1F) << 6) | (raw[i + 1] & 0x3F), i + 2
        elif first < 0xF0:
            code, i = ((first & 0x0F) << 12) | ((raw[i + 1] & 0x3F) << 6) | (raw[i + 2] & 0x3F), i + 3
        else:
            code = ((first & 0x07) << 18) | ((raw[i + 1] & 0x3F) << 12) | ((raw[i + 2] & 0x3F) << 6)
            code, i = code | (raw[i + 3] & 0x3F), i + 4
        kind[n] = classes[code]
        n += 1
    at[n] = size
    ends = np.empty(n + size // 1024 + 1, np.int32)
    words, begin = 0, 0
    while begin < n:
        end = _next(raw, kind, at, n, begin)
        start, stop = at[begin], at[end]
        while stop - start > 1024:  # LONGEST_WORD
            start += 1024
            ends[words] = start
            words += 1
        ends[words] = stop
        words += 1
        begin = end
    return ends, words


@njit(cache=True, nogil=True)
def _next(raw: Any, kind: Any, at: Any, n: int, i: int) -> int:  # pragma: no cover - compiled
    """Where the word that begins at character i ends."""
    first = kind[i]
    may_lead = first != 7 and not (1 <= first <= 3) and first != 5  # [^\r\n\p{L}\p{N}]
    if may_lead:
        end = _cased(kind, n, i + 1, True)
        if end < 0 and first == 4:
            end = _cased(kind, n, i, True)
        if end < 0:
            end = _cased(kind, n, i + 1, False)
    else:
        end = -1
    if end < 0 and 1 <= first <= 4:
        end = _cased(kind, n, i, True)
        if end < 0:
            end = _cased(kind, n, i, False)
    if end >= 0:
        return _contraction(raw, at, n, end)
    if first == 5:
        end = i + 1
        while end < n and end < i + 3 and kind[end] == 5:
            end += 1
        return end
    j = i + 1 if first == 8 and i + 1 < n and (kind[i + 1] == 0 or kind[i + 1] == 4) else i
    if kind[j] == 0 or kind[j] == 4:
        while j < n and (kind[j] == 0 or kind[j] == 4):
            j += 1
        while j < n and (kind[j] == 7 or raw[at[j]] == 47):
            j += 1
        return j
    end, newline = i, -1
    while end < n and kind[end] >= 6:
        if kind[end] == 7:
            newline = end
        end += 1
    if newline >= 0:
        return newline + 1
    return end - 1 if end < n and end - 1 > i else end


@njit(cache=True, nogil=True)
def _cased(kind: Any, n: int, j: int, lower: bool) -> int:  # pragma: no cover - compiled
    """End of [upper]*[lower]+ (`lower`) or [upper]+[lower]* at character j, -1 where it does not match; letters
    without case and marks count as both.
    """
    k, both = j, -1
    while k < n and (kind[k] == 1 or kind[k] == 3 or kind[k] == 4):
        if kind[k] != 1:
            both = k
        k += 1
    if k < n and kind[k] == 2:
        if k == j and not lower:
            return -1
    elif lower:
        return both + 1 if both >= 0 else -1
    elif k == j:
        return -1
    while k < n and 2 <= kind[k] <= 4:
        k += 1
    return k


@njit(cache=True, nogil=True)
def _contraction(raw: Any, at: Any, n: int, end: int) -> int:  # pragma: no cover - compiled
    """Take 's 't 'm 'd 're 've 'll in any case after a word."""
    if end + 1 >= n or raw[at[end]] != 39:
        return end
    one = raw[at[end + 1]] | 0x20
    if one == 115 or one == 116 or one == 109 or one == 100:
        return end + 2
    if raw[at[end + 1]] == 0xC5 and raw[at[end + 1] + 1] == 0xBF:  # long s, which folds to s
        return end + 2
    if end + 2 < n:
        two = raw[at[end + 2]] | 0x20
        if (two == 101 and (one == 114 or one == 118)) or (one == 108 and two == 108):
            return end + 3
    return end


@njit(cache=True, nogil=True)
def _hash(raw: Any, start: int, stop: int) -> Any:  # pragma: no cover - compiled
    h = np.uint64(14695981039346656037)
    for i in range(start, stop):
        h = (h ^ np.uint64(raw[i])) * np.uint64(1099511628211)
    return h ^ (h >> np.uint64(29))


@njit(cache=True, nogil=True)
def _insert(raw, ends, words, count, arena, all_ends, counts, table, size):
    """Count words; new ones go to the end of the arena. Returns how many distinct words there are now."""
    mask = np.uint64(len(table) - 1)
    start = 0
    for w in range(words):
        stop = ends[w]
        slot = _hash(raw, start, stop) & mask
        while True:
            found = table[slot]
            if found < 0:
                begin = all_ends[size - 1] if size else 0
                for i in range(start, stop):
                    arena[begin + i - start] = raw[i]
                all_ends[size] = begin + stop - start
                counts[size] = count
                table[slot] = size
                size += 1
                break
            begin = all_ends[found - 1] if found else 0
            length = all_ends[found] - begin
            if length == stop - start:
                same = True
                for i in range(length):
                    if arena[begin + i] != raw[start + i]:
                        same = False
                        break
                if same:
                    counts[found] += count
                    break
            slot = (slot + np.uint64(1)) & mask
        start = stop
    return size


@njit(cache=True, nogil=True)
def _index(arena, ends, size, table):
    """Fill an empty table with the words."""
    mask = np.uint64(len(table) - 1)
    for w in range(size):
        slot = _hash(arena, ends[w - 1] if w else 0, ends[w]) & mask
        while table[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        table[slot] = w
