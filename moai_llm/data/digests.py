"""How many documents of a store were there before, byte by byte: hashes on disk, compared part by part."""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import numpy as np
import xxhash

MEMORY = 1 << 23  # hashes compared at a time: 64 MiB, and as much again for their order
BLOCK = 1 << 16  # documents between two writes


class Repeated(NamedTuple):
    documents: int  # that were there before
    first: int  # of them
    of: int  # and what it repeats


class Digests:
    """A 64-bit hash of every document. Two different ones among a hundred million share one with a chance of 0.0003.

    Args:
        memory: hashes that are compared at a time; they are gone through as often as that takes.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.documents, self._memory = 0, memory
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, tokens: np.ndarray, borders: np.ndarray) -> None:
        """The documents of a shard."""
        content, size = tokens.view(np.uint8).data, tokens.itemsize
        for start in range(0, len(borders) - 1, BLOCK):
            ends = (borders[start : start + BLOCK + 1] * size).tolist()
            hashes = [xxhash.xxh3_64_intdigest(content[a:b]) for a, b in zip(ends, ends[1:])]
            self._file.write(np.array(hashes, dtype=np.uint64).tobytes())
            self.documents += len(hashes)

    def repeated(self) -> Repeated:
        """Among all that were added, one after the other."""
        turns = max(1, -(-self.documents // self._memory))
        count, first = 0, (-1, -1)
        for turn in range(turns):
            hashes, places = self._chosen(turn, turns)
            order = np.argsort(hashes, kind="stable")
            hashes, places = hashes[order], places[order]
            same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
            count += len(same)
            if len(same):
                at = same[places[same].argmin()]
                found = int(places[at]), int(places[np.searchsorted(hashes, hashes[at])])
                first = found if first[0] < 0 else min(first, found)
        return Repeated(count, *first)

    def _chosen(self, turn: int, turns: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, numbers of their documents) that this turn compares."""
        hashes, places, number = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
        self._file.seek(0)
        while content := self._file.read(1 << 20):
            block = np.frombuffer(content, dtype=np.uint64)
            chosen = np.flatnonzero(block % np.uint64(turns) == turn)
            hashes.append(block[chosen])
            places.append(chosen + number)
            number += len(block)
        return np.concatenate(hashes), np.concatenate(places)
