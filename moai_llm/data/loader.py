"""Batches of packed rows, as a pure function of (seed, step): there is no state to lose.

Row number i of the endless stream is row `permute(i mod rows)` of epoch `i div rows`; a step takes the next
rows_per_step of them. So a run resumes at any step, and any number of ranks can share the rows of a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moai_llm.data.packing import Packing, pack_best_fit
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError

Batch = dict[str, Tensor]


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A permutation of range(size) chosen by `key`, evaluated at `index`, without ever making the whole of it.

    A four-round Feistel network on the next power of four, walked until the value falls below `size`.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    value = np.asarray(index, dtype=np.uint64).copy()
    pending = np.ones(value.shape, dtype=bool)
    while pending.any():
        left, right = value[pending] >> np.uint64(half), value[pending] & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(right, key + turn) & mask)
        value[pending] = (left << np.uint64(half)) | right
        pending = value >= np.uint64(size)
    return value.astype(np.int64)


def _hash(x: np.ndarray, key: int) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 on x + key times the golden ratio."""
    with np.errstate(over="ignore"):
        x = x + np.uint64((key * 0x9E3779B97F4A7C15) & (2**64 - 1)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Loader:
    """Packed rows of a store.

    Args:
        seq_len: tokens per row.
        seed: of the order; None keeps the rows in the order of packing, for evaluation.

    Raises:
        MoaiError: no row holds a token to learn.
    """

    def __init__(self, store: Store, seq_len: int, seed: int | None = 0) -> None:
        self.store, self.seq_len, self.seed = store, seq_len, seed
        if store.manifest.kind == "preference":
            raise MoaiError(
                f"{store.path} holds preference pairs: to train on both answers as if they were text would teach the "
                "worse one too, and a loss that compares them is not there yet"
            )
        self.pad_id = store.tokenizer().pad_id
        chat = store.manifest.kind == "chat"
        # the tail of a conversation makes no sense without its beginning; the tail of a text does
        self.packing: Packing = pack_best_fit(store.lengths(), seq_len, "truncate" if chat else "split")
        if not any(bool((self.row(i)["labels"] != -100).any()) for i in range(len(self))):
            raise MoaiError(f"{store.path}: no row has a token to learn (rows of {seq_len} tokens): raise data.seq_len")

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.packing)

    def rows(self, start: int, count: int) -> Batch:
        """Rows start to start + count of the endless stream, stacked."""
        position = np.arange(start, start + count)
        epoch, within = position // len(self), position % len(self)
        if self.seed is not None:
            for e in np.unique(epoch):
                within[epoch == e] = permute(within[epoch == e], len(self), self.seed * 1_000_003 + int(e))
        return self._stack(within)

    def _stack(self, numbers: np.ndarray) -> Batch:
        rows = [self.row(int(i)) for i in numbers]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def row(self, index: int) -> Batch:
        """One packed row: input_ids, labels (-100: nothing to predict), position_ids and seq_idx, each (seq_len,)."""
        packing, size = self.packing, self.seq_len
        ids = np.full(size, self.pad_id, dtype=np.int64)
        labels = np.full(size, -100, dtype=np.int64)
        positions, documents = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int32)
        at = number = 0
        for p in range(packing.row_starts[index], packing.row_starts[index + 1]):
            document, start, length = int(packing.document[p]), int(packing.start[p]), int(packing.length[p])
            piece = slice(at, at + length)
            ids[piece] = self.store.document(document, start, start + length)
            learn = self.store.learn(document, start, start + length)
            labels[piece] = ids[piece] if learn is None else np.where(learn, ids[piece], -100)
            labels[at] = -100  # nothing stands before it
            positions[piece] = np.arange(length)
            documents[piece] = number
            at, number = at + length, number + 1
        positions[at:] = np.arange(size - at)
        documents[at:] = number
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_idx": documents}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def epoch(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The rows of one pass in batches; the last may be smaller.

        With `limit` so many of them, spread evenly: the first rows hold the longest documents and say little about the
        others.
        """
        total = len(self) if limit is None else min(limit, len(self))
        chosen = (2 * np.arange(total) + 1) * len(self) // (2 * total)
        for start in range(0, total, batch_size):
            yield self._stack(chosen[start : start + batch_size])

    def cut_documents(self) -> int:
        """Conversations longer than a row, which lose their end. The pieces of a text are all there."""
        chat = self.store.manifest.kind == "chat"
        return int((self.store.lengths() > self.seq_len).sum()) if chat else 0
