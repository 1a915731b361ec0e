"""Batches of packed records of texts that belong together, a pure function of (seed, step) as those of `loader.py`.

A record stays together: its texts are documents of the same row, the anchor first. A step has the same number of tokens
as any other, so how many records it holds depends on their lengths. A text that stands alone gets its right answer
here, by `augment.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch

from moai_llm.data.augment import Augment, view
from moai_llm.data.embedding_store import ANCHOR, RIGHT, WRONG, read_groups
from moai_llm.data.group_loader import GroupLoader, refuse_cutting
from moai_llm.data.loader import Batch
from moai_llm.data.packing import Packing, pack
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError


class EmbeddingLoader(GroupLoader):
    """Packed rows of a store of texts that belong together.

    Args:
        seq_len: tokens per row; all texts of a record lie in one.
        seed: of the order and of what `augment` makes; None keeps the rows in the order of packing, for evaluation.
        packing: how records become rows, see `packing.py`.
        overlong: what becomes of records longer than a row: truncate (the longest texts lose their end first) or drop.
            None truncates.
        augment, augment_share: how a text that stands alone becomes two views of itself.
        step_rows, pinned: as of `Loader`.

    Raises:
        MoaiError: not such a store, a way to pack that cuts records, no record fits, or texts that stand alone without
            `augment`.
    """

    def __init__(
        self,
        store: Store,
        seq_len: int,
        seed: int | None = 0,
        *,
        packing: str = "best-fit",
        overlong: str | None = None,
        augment: Augment = "none",
        augment_share: float | None = None,
        step_rows: int = 1,
        pinned: bool = False,
    ) -> None:
        groups = read_groups(store)
        super().__init__(store, seq_len, seed, step_rows, step_rows if packing == "balanced" else 1, pinned)
        refuse_cutting(packing, overlong, "texts that belong together")
        self.groups, self.augment, self.augment_share = groups, augment, augment_share
        first, last = groups.first[:-1], groups.first[1:]
        rights = np.add.reduceat(groups.role == RIGHT, first)
        self.alone = rights == 0
        if self.alone.any() and augment == "none":
            raise MoaiError(
                f"{store.path}: {int(self.alone.sum()):,} of {len(first):,} records hold no right answer: let two "
                "views of the text belong together, embedding.augment=crop, or prepare pairs"
            )
        lengths = store.lengths()
        total = np.add.reduceat(lengths, first)
        total = total + np.where(self.alone, lengths[first], 0)
        fits = np.where(total <= seq_len, total, 0 if overlong == "drop" else seq_len)
        fits[(last - first + self.alone) * 2 > seq_len] = 0  # not two tokens for each text
        self._lengths = lengths
        self.packing: Packing = replace(pack(fits, seq_len, packing, "drop"), lengths=total, unit="records")
        if not len(self):
            raise MoaiError(f"{store.path}: no record fits into a row of {seq_len} tokens: raise data.seq_len")
        held = np.where(self.alone, last - first + 1, last - first)[self.packing.document]
        self.most = int(np.add.reduceat(held, self.packing.row_starts[:-1]).max())  # texts in a row

    @property
    def tells_apart(self) -> bool:
        """Whether something says which texts do not belong together."""
        return bool((self.groups.role == WRONG).any() or (self.groups.score >= 0).any())

    def row(self, index: int, position: int | None = None) -> Batch:
        """One packed row: input_ids, position_ids and seq_idx, each (seq_len,), and of its texts, each (most,): record
        (its number in the store, then -1), role, score (-1: none) and text (equal where texts are).
        """
        size = self.seq_len
        ids = np.full(size, self.pad_id, dtype=np.int64)
        positions, documents = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int32)
        of_texts: dict[str, np.ndarray] = {
            "record": np.full(self.most, -1, np.int64), "role": np.zeros(self.most, np.int64),
            "score": np.full(self.most, -1, np.float32), "text": np.zeros(self.most, np.int64),
        }  # fmt: skip
        held = self.packing.document[self.packing.row_starts[index] : self.packing.row_starts[index + 1]]
        at = number = 0
        for record in held.tolist():
            for tokens, role, score, text in self._texts(record, index if position is None else position):
                piece = slice(at, at + len(tokens))
                ids[piece], positions[piece], documents[piece] = tokens, np.arange(len(tokens)), number
                for name, value in zip(of_texts, (record, role, score, text)):
                    of_texts[name][number] = value
                at, number = at + len(tokens), number + 1
        positions[at:] = np.arange(size - at)
        documents[at:] = self.most  # no text has this number
        arrays = {"input_ids": ids, "position_ids": positions, "seq_idx": documents, **of_texts}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def _texts(self, record: int, position: int) -> list[tuple[np.ndarray, int, float, int]]:
        """(tokens, role, score, what its text is known by) of each text of a record."""
        first, last = self.groups.first[record : record + 2].tolist()
        documents = list(range(first, last))
        roles = self.groups.role[first:last].tolist()
        if self.alone[record]:
            documents, roles = [first, *documents], [ANCHOR, RIGHT, *roles[1:]]
        caps = _fair(self._lengths[documents], self.seq_len)
        made = []
        for i, (document, role, cap) in enumerate(zip(documents, roles, caps)):
            whole = self.store.document(document)
            tokens = whole if len(whole) <= cap else np.append(whole[: cap - 1], whole[-1:])
            if self.alone[record] and i < 2:
                generator = np.random.default_rng([self.seed or 0, position, document, i])
                kept = view(tokens[:-1], self.augment, self.augment_share, generator)
                tokens = np.append(kept, tokens[-1:])
            known = hashlib.blake2b(whole.astype("<u4").tobytes(), digest_size=8).digest()
            made.append(
                (tokens, role, float(self.groups.score[document]), int.from_bytes(known, "little", signed=True))
            )
        return made


def _fair(lengths: np.ndarray, size: int) -> list[int]:
    """The longest texts lose their end first, until all fit."""
    if lengths.sum() <= size:
        return [int(length) for length in lengths]
    order = np.argsort(lengths, kind="stable")
    caps, left = np.zeros(len(lengths), np.int64), size
    for done, i in enumerate(order):
        caps[i] = min(int(lengths[i]), left // (len(lengths) - done))
        left -= int(caps[i])
    return [int(cap) for cap in caps]
