"""The model of py3langid, so read that it takes little memory of each worker.

The library holds 75 MB: an automaton that finds, at each byte of a text, the longest n-gram of bytes that the model
knows, and a row of 142 weights for each n-gram. Here the n-grams are sorted numbers, 1 MB, looked up for all bytes of
a text at once, and the rows stay in a file that has no name any more, from which those of a text are read. What is
computed with them is the library's, to the bit.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from moai_llm.runtime import MoaiError, require

RECENT = 8192  # rows of weights, four fifths of those of the next text
BLOCK = 4096  # rows of the automaton that are in memory at a time
FILTER_BITS = 18  # of a hash that tells most n-grams that are not there; a search takes five times as long


class LanguageModel:
    """
    Raises:
        MoaiError: py3langid is not installed.
    """

    def __init__(self) -> None:
        try:
            library = require("py3langid.langid", "clean")
        except MoaiError as error:
            raise MoaiError(f"{error}; or set `language: script` or `language: en` in the clean.yaml") from None
        if os.name != "posix":  # where an open file cannot lose its name
            self._model = library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)
            return

        class Identifier(library.LanguageIdentifier):  # type: ignore[name-defined]
            """The library's, with its reading of the tables replaced."""

            def _raw_score(self, text: bytes) -> np.ndarray:
                visits = dict(zip(*known.counts(text)))
                return np.zeros(len(self.nb_classes), np.float32) if not visits else self._sparse_score(visits, weights)

        with tempfile.TemporaryDirectory() as name:
            folder = _unpacked(library.MODEL_DIR / library.MODEL_FILE, Path(name))
            classes, priors = np.load(folder / "classes.npy").tolist(), np.load(folder / "pc.npy")
            known, weights = Grams(folder), Rows(folder / "ptc.npy", len(classes))
        self._model = Identifier(weights, priors, classes, None, None, norm_probs=True, tk_row=())

    def __call__(self, text: str) -> tuple[str, float]:
        """(ISO 639 code, probability)."""
        code, probability = self._model.classify(text)
        return str(code), float(probability)


@lru_cache(maxsize=1)
def language_model() -> LanguageModel:
    """The one of this process."""
    return LanguageModel()


class Rows:
    """A matrix in a file, read where it is asked for. `RECENT` rows stay in memory, each at its number modulo that."""

    def __init__(self, path: Path, width: int) -> None:
        header = np.load(path, mmap_mode="r")
        self._file = os.open(path, os.O_RDONLY)
        self._dtype, self._start, self._width = header.dtype, header.offset, width
        self._size = width * self._dtype.itemsize
        self.count = header.size // width
        self._recent, self._which = np.zeros((RECENT, width), self._dtype), np.full(RECENT, -1)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        slots = rows % RECENT
        new = self._which[slots] != rows
        found = self._recent[slots]
        found[new] = self._recent[slots[new]] = self._read(rows[new])
        self._which[slots[new]] = rows[new]  # of several at one place the last stays, here and above
        return found

    def _read(self, rows: np.ndarray) -> np.ndarray:
        return self._array(
            b"".join([os.pread(self._file, self._size, self._start + i * self._size) for i in rows.tolist()])
        )

    def block(self, first: int, count: int) -> np.ndarray:
        return self._array(os.pread(self._file, count * self._size, self._start + first * self._size))

    def _array(self, read: bytes) -> np.ndarray:
        return np.frombuffer(read, self._dtype).reshape(-1, self._width)

    def __del__(self) -> None:
        os.close(self._file)


class Grams:
    """The n-grams of bytes that an Aho-Corasick automaton knows, and the feature of each, -1 for none.

    A state of such an automaton is an n-gram, and after every byte it is in the longest one that the text so far ends
    with. So the states of a text can be looked up, longest first, without walking.

    Args:
        folder: with the automaton: the next state by row and byte, the row of each state, the feature of each state.
    """

    def __init__(self, folder: Path) -> None:
        features = np.load(folder / "out_feat.npy")
        self._levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for states, grams in _levels(Rows(folder / "nextmove.npy", 256), np.load(folder / "nextmove_row.npy")):
            order, may_be = np.argsort(grams), np.zeros(1 << FILTER_BITS, bool)
            may_be[_hashed(grams)] = True
            self._levels.append((may_be, grams[order], features[states[order]]))
        self._place = np.zeros(features.max() + 1, np.int32)  # scratch

    def counts(self, text: bytes) -> tuple[list[int], list[int]]:
        """(features, how often), in the order in which they come first."""
        grams = [np.frombuffer(text, np.uint8).astype(np.uint64)]
        while len(grams) < min(len(self._levels), len(text)):
            grams.append((grams[-1][:-1] << np.uint64(8)) | grams[0][len(grams) :])
        found = np.full(len(text), -1, np.int32)
        known = np.zeros(len(text), bool)  # places that have their n-gram
        for length in range(len(grams), 0, -1):
            may_be, sorted_grams, features = self._levels[length - 1]
            wanted = grams[length - 1]
            maybe = np.flatnonzero(may_be[_hashed(wanted)] & ~known[length - 1 :])
            wanted = wanted[maybe]
            at = np.searchsorted(sorted_grams, wanted).clip(max=len(sorted_grams) - 1)
            hit = sorted_grams[at] == wanted
            places = maybe[hit] + (length - 1)
            found[places], known[places] = features[at[hit]], True
        found = found[found >= 0]
        count = np.arange(len(found), dtype=np.int32)
        self._place[found[::-1]] = count[::-1]  # of several the last one stays: the first place of each
        kinds = found[self._place[found] == count]
        self._place[kinds] = count[: len(kinds)]
        return kinds.tolist(), np.bincount(self._place[found]).tolist()


def _hashed(grams: np.ndarray) -> np.ndarray:
    return (grams * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - FILTER_BITS)


def _levels(table: Rows, row_of: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The states of each depth and their n-grams, as numbers whose lowest byte is the last.

    The shortest way to a state spells its n-gram. A row that several states share leads to new ones from the first of
    them: they would be longer n-grams of two endings otherwise.
    """
    seen, read = np.zeros(len(row_of), bool), np.zeros(table.count, bool)
    states, grams = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    seen[0] = True
    while True:
        rows, which = np.unique(row_of[states], return_index=True)
        rows, which = rows[~read[rows]], which[~read[rows]]
        read[rows] = True
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, table.count, BLOCK):
            begin, end = np.searchsorted(rows, [first, first + BLOCK])
            if begin < end:
                next_states = table.block(first, BLOCK)[rows[begin:end] - first]
                new, byte = np.nonzero(~seen[next_states])
                found.append(
                    (next_states[new, byte], (grams[which[begin:end]][new] << np.uint64(8)) | byte.astype(np.uint64))
                )
        if not found:
            return
        states, grams = (np.concatenate(column) for column in zip(*found))
        seen[states] = True
        yield states, grams


def _unpacked(packed: Path, folder: Path) -> Path:
    """The arrays of an .npz.xz as files of their own."""
    with lzma.open(packed) as source, (folder / "model.npz").open("wb") as unpacked:
        shutil.copyfileobj(source, unpacked, 1 << 20)
    with zipfile.ZipFile(folder / "model.npz") as archive:
        archive.extractall(folder)
    return folder
