"""Batches of packed preference pairs, with the laws of `loader.py`: a pure function of (seed, step).

A pair stays together. Its two answers are two documents of the same row, the better first, so that any rows make a
batch whose pairs are whole: documents 2k and 2k + 1 of a row are its k-th pair. A step has the same number of tokens as
any other, so how many pairs it holds depends on their lengths.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from moai_llm.data.group_loader import GroupLoader, refuse_cutting
from moai_llm.data.loader import Batch
from moai_llm.data.packing import Packing, pack
from moai_llm.data.preference import Pairs
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError


class PairLoader(GroupLoader):
    """Packed rows of a preference store.

    Args:
        seq_len: tokens per row; both answers of a pair, each with the prompt, lie in one.
        seed: of the order; None keeps the rows in the order of packing, for evaluation.
        packing: how pairs become rows, see `packing.py`. `balanced` takes a pair for one document of both lengths.
        overlong: what becomes of pairs longer than a row: truncate (the longer answer loses its end first, a pair of
            which nothing is left to compare is dropped) or drop. None truncates.
        step_rows: rows of a step; `balanced` puts rows that cost attention the same into each.
        pinned: batches lie in memory from which a CUDA device copies while the program goes on.

    Raises:
        MoaiError: not a store of pairs, a way to pack that cuts them, or no pair is left.
    """

    def __init__(
        self,
        store: Store,
        seq_len: int,
        seed: int | None = 0,
        *,
        packing: str = "best-fit",
        overlong: str | None = None,
        step_rows: int = 1,
        pinned: bool = False,
    ) -> None:
        super().__init__(store, seq_len, seed, step_rows, step_rows if packing == "balanced" else 1, pinned)
        self.pairs = Pairs(store)
        refuse_cutting(packing, overlong, "pairs of answers")
        lengths = store.lengths().reshape(-1, 2)
        self.kept = self._keep(lengths, overlong or "truncate")
        self.packing: Packing = replace(
            pack(self.kept.sum(1), seq_len, packing, "drop"), lengths=lengths.sum(1), unit="pairs"
        )
        if not len(self):
            raise MoaiError(f"{store.path}: no pair fits into a row of {seq_len} tokens: raise data.seq_len")
        self.most = int(np.diff(self.packing.row_starts).max())  # pairs in a row

    def _keep(self, lengths: np.ndarray, overlong: str) -> np.ndarray:
        """(pairs, 2) tokens of each answer that are used; 0 of a pair that is dropped."""
        kept, size = lengths.copy(), self.seq_len
        long = np.flatnonzero(lengths.sum(1) > size)
        if overlong == "drop":
            kept[long] = 0
            return kept
        kept[long, 0] = np.minimum(lengths[long, 0], np.maximum(size - lengths[long, 1], size // 2))
        kept[long, 1] = np.minimum(lengths[long, 1], size - kept[long, 0])
        for i in long.tolist():
            if not all(self._learn(2 * i + side, int(kept[i, side]))[1:].any() for side in (0, 1)):
                kept[i] = 0
        return kept

    def _learn(self, document: int, length: int) -> np.ndarray:
        learn = self.store.learn(document, 0, length)
        assert learn is not None
        return learn

    def row(self, index: int, position: int | None = None) -> Batch:
        """One packed row: input_ids, labels (-100: nothing to predict), position_ids and seq_idx, each (seq_len,), and
        pairs (most,): which pairs of the store it holds, then -1.
        """
        size = self.seq_len
        ids = np.full(size, self.pad_id, dtype=np.int64)
        labels = np.full(size, -100, dtype=np.int64)
        positions, documents = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int32)
        held = self.packing.document[self.packing.row_starts[index] : self.packing.row_starts[index + 1]]
        at = number = 0
        for pair in held.tolist():
            for side in (0, 1):
                document, length = 2 * pair + side, int(self.kept[pair, side])
                piece = slice(at, at + length)
                ids[piece] = self.store.document(document, 0, length)
                labels[piece] = np.where(self._learn(document, length), ids[piece], -100)
                labels[at] = -100  # nothing stands before it
                positions[piece] = np.arange(length)
                documents[piece] = number
                at, number = at + length, number + 1
        positions[at:] = np.arange(size - at)
        documents[at:] = number
        pairs = np.full(self.most, -1, dtype=np.int64)
        pairs[: len(held)] = held
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_idx": documents, "pairs": pairs}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}
