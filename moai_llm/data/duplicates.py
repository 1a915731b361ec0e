"""Which documents are duplicates of which: keys of every document in files, sorted part by part, joined by union-find.

Knows numbers only, no texts. Of a document it keeps 16 bytes of a digest, 8 bytes for each band and its length; what is
sorted at a time is bounded by `memory`, so a corpus may be much larger than that. The same documents in the same order
give the same clusters on every machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numba import njit

from moai_llm.data.minhash import NO_KEY, MinHashOptions, jaccard
from moai_llm.runtime import MoaiError, write_atomically

FORMAT = 1
MEMORY = 256 << 20  # bytes that sorting may take
BUFFER = 1 << 13  # documents between two writes
_BYTES_A_KEY = 64  # what sorting one key takes: key, document, order, and copies


class DuplicateIndex:
    """Keys of documents in a folder. An index that is there is gone on with: its documents come first.

    Args:
        memory: bytes that sorting may take.
        verify: also keep the shingles, so that candidates can be compared by their true Jaccard similarity.

    Raises:
        MoaiError: the folder holds an index made with other options.
    """

    def __init__(
        self, folder: Path, options: MinHashOptions, *, verify: bool = False, kind: str = "", memory: int = MEMORY
    ) -> None:
        self.folder, self.options, self.verify, self.memory = folder, options, verify, memory
        self._made_with = {"format": FORMAT, **asdict(options), "verify": verify, "kind": kind}
        names = ["exact", "lengths", *(f"band-{i:02d}" for i in range(options.bands))]
        self._types = {name: np.dtype(np.uint64) for name in names} | {
            "exact": np.dtype((np.uint64, 2)),
            "lengths": np.dtype(np.int64),
        }
        if verify:
            self._types |= {"shingles": np.dtype(np.uint64), "shingle-ends": np.dtype(np.int64)}
        self._waiting = 0  # documents that are not yet written
        self._exact, self._lengths = np.empty((BUFFER, 2), np.uint64), np.empty(BUFFER, np.int64)
        self._keys = np.empty((options.bands, BUFFER), np.uint64)
        self._sets: list[np.ndarray] = []
        self._set_ends: list[int] = []
        self._set_bytes = 0
        self.earlier, self._shingles = self._open()
        self.documents = self.earlier

    def _open(self) -> tuple[int, int]:
        """(documents, shingles) of the index that is there. What a run that died wrote after it is cut off."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about, documents, shingles = self.folder / "index.json", 0, 0
        if about.exists():
            try:
                found = json.loads(about.read_text(encoding="utf-8"))
                documents, shingles = found.pop("documents"), found.pop("shingles")
            except (ValueError, KeyError, AttributeError):
                raise MoaiError(f"{about} is not an index of `moai data dedup`; name another folder") from None
            if found != self._made_with:
                differ = sorted(k for k in {*found, *self._made_with} if found.get(k) != self._made_with.get(k))
                raise MoaiError(f"{self.folder} was made with other options ({', '.join(differ)}): use another folder")
        elif any(self.folder.iterdir()):
            raise MoaiError(f"{self.folder} is not empty and holds no index; name another folder")
        for name, kind in self._types.items():
            size = (shingles if name == "shingles" else documents) * kind.itemsize
            path = self._path(name)
            with path.open("ab"):
                pass
            if path.stat().st_size < size:
                raise MoaiError(f"{path} is cut short: delete the index and build it again")
            os.truncate(path, size)
        return documents, shingles

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def add(self, digest: bytes, length: int, band_keys: np.ndarray, shingles: np.ndarray | None = None) -> None:
        """The next document.

        Args:
            digest: 16 bytes; equal ones are duplicates.
            shingles: a sorted set, where the index verifies.
        """
        k = self._waiting
        self._exact[k] = np.frombuffer(digest, np.uint64)
        self._lengths[k] = length
        self._keys[:, k] = band_keys
        if self.verify:
            assert shingles is not None
            self._shingles += len(shingles)
            self._sets.append(shingles)
            self._set_ends.append(self._shingles)
            self._set_bytes += shingles.nbytes
        self.documents, self._waiting = self.documents + 1, k + 1
        if self._waiting == BUFFER or self._set_bytes > 16 << 20:
            self._flush()

    def _flush(self) -> None:
        n = self._waiting
        if not n:
            return
        parts = {"exact": self._exact[:n], "lengths": self._lengths[:n]}
        parts |= {f"band-{i:02d}": keys[:n] for i, keys in enumerate(self._keys)}
        if self.verify:
            parts |= {"shingles": np.concatenate(self._sets), "shingle-ends": np.array(self._set_ends, np.int64)}
        for name, part in parts.items():
            with self._path(name).open("ab") as file:
                part.tofile(file)
        self._sets, self._set_ends = [], []
        self._waiting = self._set_bytes = 0

    def save(self) -> None:
        """Keep what was added for a later run."""
        self._flush()
        about = {**self._made_with, "documents": self.documents, "shingles": self._shingles}
        write_atomically(self.folder / "index.json", json.dumps(about))

    def exact_roots(self) -> np.ndarray:
        """(documents,) int64 in a file: the first document that has the same digest."""
        self._flush()
        roots = self._mapped("roots", np.dtype(np.int64))
        for start in range(0, self.documents, 1 << 20):
            roots[start : start + (1 << 20)] = np.arange(start, min(start + (1 << 20), self.documents))
        for keys, documents in self._sorted("exact", None):
            equal = (keys[1:] == keys[:-1]).all(1)
            _join_runs(equal, documents, roots)
        _flatten(roots)
        return roots

    def near_roots(self, threshold: float | None = None) -> np.ndarray:
        """(documents,) int64 in a file: the first document of the cluster each belongs to, near-duplicates included.

        Args:
            threshold: least Jaccard similarity of two documents that are joined, where the index verifies; every pair
                of candidates is joined when None.
        """
        roots = self.exact_roots()
        first = self._mapped("first", np.dtype(np.uint8))  # only the first of equal texts need be compared
        for start in range(0, self.documents, 1 << 20):
            block = roots[start : start + (1 << 20)]
            first[start : start + (1 << 20)] = block == np.arange(start, start + len(block))
        sets = None if threshold is None else (self._read("shingles"), self._read("shingle-ends"))
        for band in range(self.options.bands):
            for keys, documents in self._sorted(f"band-{band:02d}", first):
                equal = keys[1:] == keys[:-1]
                if sets is None or threshold is None:
                    _join_runs(equal, documents, roots)
                else:
                    self._join_verified(equal, documents, roots, threshold, *sets)
        _flatten(roots)
        return roots

    def winners(self, roots: np.ndarray, longest: bool = False) -> np.ndarray:
        """(documents,) int64 in a file: of each document the one that is kept of its cluster: the first, or the
        longest.        A cluster that has a document of an earlier run has been kept there.
        """
        if longest:
            best = self._mapped("best", np.dtype(np.int64))
            _longest(roots, self._read("lengths"), self.earlier, best)
            _take(best, roots)
        return roots

    def cluster_sizes(self, roots: np.ndarray) -> tuple[int, int]:
        """(clusters of more than one document, documents of the largest cluster)."""
        return _cluster_sizes(roots, self._mapped("best", np.dtype(np.int64)))

    def digests(self) -> np.ndarray:
        """(documents, 2) uint64, in the file."""
        self._flush()
        return self._read("exact").reshape(-1, 2)

    def remove_results(self) -> None:
        """Delete what only this run needed."""
        for name in ("roots", "first", "best"):
            self._path(name).unlink(missing_ok=True)

    def _mapped(self, name: str, kind: np.dtype) -> np.ndarray:
        return np.memmap(self._path(name), kind, "w+", shape=(max(1, self.documents),))[: self.documents]

    def _read(self, name: str) -> np.ndarray:
        """A file of the index, mapped; an empty one cannot be."""
        kind = self._types[name].base
        return np.memmap(self._path(name), kind, "r") if self._path(name).stat().st_size else np.zeros(0, kind)

    def _sorted(self, name: str, wanted: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(keys, documents) ordered by key, then document, a range of keys at a time. Keys are evenly spread, so ranges
        of equal width hold equally many.
        """
        if not self.documents:
            return
        parts = max(1, -(-self.documents * _BYTES_A_KEY // self.memory))
        width = 2**64 // parts
        kind = self._types[name]
        for part in range(parts):
            low, high = np.uint64(part * width), np.uint64((part + 1) * width - 1 if part < parts - 1 else 2**64 - 1)
            keys, documents = [], []
            for start, block in self._blocks(name, kind):
                lead = block if block.ndim == 1 else block[:, 0]
                chosen = (lead >= low) & (lead <= high)
                if wanted is not None:
                    chosen &= (lead != NO_KEY) & (wanted[start : start + len(block)] == 1)
                keys.append(block[chosen])
                documents.append(np.flatnonzero(chosen) + start)
            key, document = np.concatenate(keys), np.concatenate(documents)
            del keys, documents
            order = np.argsort(key, kind="stable") if key.ndim == 1 else np.lexsort((key[:, 1], key[:, 0]))
            yield key[order], document[order]

    def _blocks(self, name: str, kind: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
        """(first document, keys) of the file, a piece at a time."""
        count = max(1024, min(1 << 20, self.memory // 64))
        with self._path(name).open("rb") as file:
            start = 0
            while start < self.documents:
                block = np.fromfile(file, kind, min(count, self.documents - start))
                yield start, block
                start += len(block)

    def _join_verified(
        self, equal: np.ndarray, documents: np.ndarray, roots: np.ndarray, threshold: float, flat: np.ndarray,
        ends: np.ndarray,
    ) -> None:  # fmt: skip
        """Within each run of equal keys, join a document to the first it is alike enough."""

        def members(document: int) -> np.ndarray:
            return flat[ends[document - 1] if document else 0 : ends[document]]

        borders = np.flatnonzero(~equal) + 1
        for run in np.split(documents, borders):
            leaders: list[tuple[int, np.ndarray]] = []
            for document in run.tolist() if len(run) > 1 else []:
                mine = members(document)
                for leader, theirs in leaders:
                    if jaccard(theirs, mine) >= threshold:
                        _join(roots, leader, document)
                        break
                else:
                    leaders.append((document, mine))


@njit(cache=True)
def _find(roots, i):  # pragma: no cover - compiled
    while roots[i] != i:
        roots[i] = roots[roots[i]]
        i = roots[i]
    return i


@njit(cache=True)
def _join(roots, i, j):  # pragma: no cover - compiled
    """One cluster of two; its root is the least of its members."""
    i, j = _find(roots, i), _find(roots, j)
    if i < j:
        roots[j] = i
    else:
        roots[i] = j


@njit(cache=True)
def _join_runs(equal, documents, roots):  # pragma: no cover - compiled
    for k in range(len(equal)):
        if equal[k]:
            _join(roots, documents[k], documents[k + 1])


@njit(cache=True)
def _flatten(roots):  # pragma: no cover - compiled
    for i in range(len(roots)):
        roots[i] = _find(roots, i)


@njit(cache=True)
def _longest(roots, lengths, earlier, best):  # pragma: no cover - compiled
    """Of each cluster, at the place of its root: its longest member, the first of equals; the root where that is from
    an earlier run.
    """
    for i in range(len(roots)):
        best[i] = i
    for i in range(len(roots)):
        root = roots[i]
        if root >= earlier and lengths[i] > lengths[best[root]]:
            best[root] = i


@njit(cache=True)
def _take(best, roots):  # pragma: no cover - compiled
    for i in range(len(roots)):
        roots[i] = best[roots[i]]


@njit(cache=True)
def _cluster_sizes(roots, sizes):  # pragma: no cover - compiled
    clusters, largest = 0, 0
    sizes[:] = 0
    for i in range(len(roots)):
        sizes[roots[i]] += 1
    for size in sizes:
        clusters += size > 1
        largest = max(largest, size)
    return clusters, largest
