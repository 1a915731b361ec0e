"""Batches of packed rows, as a pure function of (seed, step): there is no state to lose.

Which row stands at position i of the endless stream is computed from i and the seed; a step takes the next step_rows of
them. So a run resumes at any step, and any number of ranks can share the rows of a step: rank r of W takes its rows r,
r + W, ...
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moai_llm.data.balance import rows_of_stream
from moai_llm.data.packing import Packing, pack
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError

Batch = dict[str, Tensor]


class Loader:
    """Packed rows of a store.

    Args:
        seq_len: tokens per row.
        seed: of the order; None keeps the rows in the order of packing, for evaluation.
        packing: how documents become rows, see `packing.py`.
        overlong: what becomes of documents longer than a row: split, truncate or drop. None splits a text and truncates
            a conversation: the tail of a conversation makes no sense without its beginning, the tail of a text does.
        step_rows: rows of a step; `balanced` puts rows that cost attention the same into each.

    Raises:
        MoaiError: no row holds a token to learn.
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
    ) -> None:
        self.store, self.seq_len, self.seed = store, seq_len, seed
        if store.manifest.kind == "preference":
            raise MoaiError(
                f"{store.path} holds preference pairs: to train on both answers as if they were text would teach the "
                "worse one too. Compare them: loss.type=dpo train.init_from=MODEL_DIR"
            )
        self.pad_id = store.tokenizer().pad_id
        self.group = step_rows if packing == "balanced" else 1
        overlong = overlong or ("truncate" if store.manifest.kind == "chat" else "split")
        self.packing: Packing = pack(store.lengths(), seq_len, packing, overlong)
        if not len(self):
            raise MoaiError(
                f"{store.path}: every document is longer than a row of {seq_len} tokens, and data.overlong=drop leaves "
                "them out: raise data.seq_len or set data.overlong=split"
            )
        if not any(bool((self.row(i)["labels"] != -100).any()) for i in range(len(self))):
            raise MoaiError(f"{store.path}: no row has a token to learn (rows of {seq_len} tokens): raise data.seq_len")

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.packing)

    def rows(self, start: int, count: int) -> Batch:
        """Rows start to start + count of the endless stream, stacked."""
        position = np.arange(start, start + count)
        if self.seed is None:
            return self._stack(position % len(self))
        return self._stack(rows_of_stream(position, len(self), self.seed, self.group))

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
