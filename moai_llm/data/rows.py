"""Packed rows of one store, built from its memory map where they are needed. `loader.py` says which are.

A row is made in one pass over its pieces, compiled and without Python's lock, so that a thread builds the next batch
while another one trains. `row_reference` makes the same row in NumPy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from moai_llm.data.packing import Packing, pack
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError

NOTHING = -100  # a label where there is nothing to predict


class Arrays(NamedTuple):
    """A batch to write rows into, each (rows, seq_len)."""

    input_ids: np.ndarray  # int64
    labels: np.ndarray  # int64
    position_ids: np.ndarray  # int64, from 0 in each document
    seq_idx: np.ndarray  # int32, the number of the document in its row


class Rows:
    """The rows of a store that holds its own shards.

    Args:
        seq_len: tokens per row.
        packing: how documents become rows, see `packing.py`.
        overlong: what becomes of documents longer than a row: split, truncate or drop. None splits a text and truncates
            a conversation: the tail of a conversation makes no sense without its beginning, the tail of a text does.

    Raises:
        MoaiError: preference pairs, texts that belong together, no row, or no row with a token to learn.
    """

    def __init__(self, store: Store, seq_len: int, packing: str = "best-fit", overlong: str | None = None) -> None:
        self.store, self.seq_len = store, seq_len
        if store.manifest.kind == "preference":
            raise MoaiError(
                f"{store.path} holds preference pairs: to train on both answers as if they were text would teach the "
                "worse one too. Compare them: loss.type=dpo train.init_from=MODEL_DIR"
            )
        if store.manifest.kind == "embedding":
            raise MoaiError(
                f"{store.path} holds texts that belong together, for vectors: train on it with loss.type=info_nce"
            )
        self.pad_id = store.tokenizer().pad_id
        overlong = overlong or ("truncate" if store.manifest.kind == "chat" else "split")
        self.packing: Packing = pack(store.lengths(), seq_len, packing, overlong)
        if not len(self):
            raise MoaiError(
                f"{store.path}: every document is longer than a row of {seq_len} tokens, and data.overlong=drop leaves "
                "them out: raise data.seq_len or set data.overlong=split"
            )
        self._tokens = [_plain(tokens) for tokens in store._tokens]
        self._learn = [_plain(learn) for learn in store._masks]
        self._borders, self._first = store._borders, store._first
        if not self._teaches():
            raise MoaiError(f"{store.path}: no row has a token to learn (rows of {seq_len} tokens): raise data.seq_len")

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.packing)

    def fill(self, numbers: np.ndarray, where: np.ndarray, out: Arrays) -> None:
        """Write rows `numbers` of the packing to rows `where` of a batch; both (n,) int64."""
        packing = self.packing
        starts = packing.row_starts[numbers]
        counts = packing.row_starts[numbers + 1] - starts
        before = counts.cumsum() - counts
        number = np.arange(counts.sum()) - np.repeat(before, counts)  # of the piece in its row
        pieces = np.repeat(starts, counts) + number
        row, length, document = np.repeat(where, counts), packing.length[pieces], packing.document[pieces]
        ends = length.cumsum()
        at = ends - length - np.repeat((ends - length)[before], counts)
        shards = np.searchsorted(self._first, document, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            begin = self._borders[shard][document[here] - self._first[shard]] + packing.start[pieces[here]]
            learn = self._learn[shard] if self._learn else EVERYTHING
            tokens, places = self._tokens[shard], (row[here], at[here], number[here])
            if _copy(tokens, learn, begin, length[here], *places, *out) >= self.store.manifest.vocab_size:
                for damaged in document[here].tolist():
                    self.store.document(damaged)  # raises, and says where
        _pad(where, (at + length)[before + counts - 1], counts, self.pad_id, *out)

    def _teaches(self) -> bool:
        """Whether any row has a label. The first of a document has none, as nothing stands before it."""
        if not self._learn:
            return bool(self.packing.length.max() > 1)
        for start in range(0, len(self), 64):
            numbers = np.arange(start, min(start + 64, len(self)))
            out = new_arrays(len(numbers), self.seq_len)
            self.fill(numbers, numbers - start, out)
            if (out.labels != NOTHING).any():
                return True
        return False


EVERYTHING = np.zeros(0, dtype=np.uint8)
EVERYTHING.flags.writeable = False


def new_arrays(rows: int, seq_len: int) -> Arrays:
    return Arrays(*(np.empty((rows, seq_len), dtype) for dtype in (np.int64, np.int64, np.int64, np.int32)))


def row_reference(rows: Rows, index: int) -> dict[str, np.ndarray]:
    """What `Rows.fill` writes for one row, piece after piece in NumPy."""
    packing, size = rows.packing, rows.seq_len
    ids = np.full(size, rows.pad_id, dtype=np.int64)
    labels = np.full(size, NOTHING, dtype=np.int64)
    positions, documents = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int32)
    at = number = 0
    for p in range(packing.row_starts[index], packing.row_starts[index + 1]):
        document, start, length = int(packing.document[p]), int(packing.start[p]), int(packing.length[p])
        piece = slice(at, at + length)
        ids[piece] = rows.store.document(document, start, start + length)
        learn = rows.store.learn(document, start, start + length)
        labels[piece] = ids[piece] if learn is None else np.where(learn, ids[piece], NOTHING)
        labels[at] = NOTHING  # nothing stands before it
        positions[piece] = np.arange(length)
        documents[piece] = number
        at, number = at + length, number + 1
    positions[at:] = np.arange(size - at)
    documents[at:] = number
    return Arrays(ids, labels, positions, documents)._asdict()


def _plain(mapped: np.ndarray) -> np.ndarray:
    """A read-only array over the memory map; compiled code does not know its class."""
    plain = np.asarray(mapped)
    plain.flags.writeable = False
    return plain


@njit(cache=True, nogil=True)
def _copy(  # pragma: no cover - compiled
    tokens: Any, learn: Any, begin: Any, length: Any, row: Any, at: Any, number: Any,
    ids: Any, labels: Any, positions: Any, documents: Any,
) -> Any:  # fmt: skip
    """Pieces from tokens[begin : begin + length] to columns `at` of their rows; an empty `learn` learns all.

    Returns:
        The largest id.
    """
    largest = np.int64(0)
    for p in range(len(begin)):
        r, a, n, b, document = row[p], at[p], length[p], begin[p], number[p]
        source = tokens[b : b + n]
        ids_here, labels_here = ids[r, a : a + n], labels[r, a : a + n]
        if len(learn):
            mask = learn[b : b + n]
            for i in range(n):
                ids_here[i] = source[i]
                labels_here[i] = source[i] if mask[i] else NOTHING
        else:
            for i in range(n):
                ids_here[i] = source[i]
                labels_here[i] = source[i]
        for i in range(n):
            largest = max(largest, ids_here[i])
        labels_here[0] = NOTHING  # nothing stands before it
        positions_here, documents_here = positions[r, a : a + n], documents[r, a : a + n]
        for i in range(n):
            positions_here[i] = i
            documents_here[i] = document
    return largest


@njit(cache=True, nogil=True)
def _pad(  # pragma: no cover - compiled
    row: Any, used: Any, number: Any, pad_id: int, ids: Any, labels: Any, positions: Any, documents: Any
) -> None:
    """What is free at the end of each row: a document of its own of which nothing is learned."""
    for i in range(len(row)):
        for j in range(used[i], ids.shape[1]):
            ids[row[i], j] = pad_id
            labels[row[i], j] = NOTHING
            positions[row[i], j] = j - used[i]
            documents[row[i], j] = number[i]
