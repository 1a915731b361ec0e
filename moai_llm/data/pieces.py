"""What a row holds, document by document, for looking at; `loader.py` makes tensors of it for training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moai_llm.data.overview import pack_part
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError


class Piece(NamedTuple):
    """What a row holds of a document."""

    store: Store  # a plain one
    document: int
    start: int
    length: int
    of: int  # tokens of the document

    def ids(self) -> np.ndarray:
        return self.store.document(self.document, self.start, self.start + self.length)

    def learned(self, *, in_row: bool = True) -> np.ndarray:
        """(length,) bool. In a row nothing is learned of the first token: nothing stands before it."""
        mask = self.store.learn(self.document, self.start, self.start + self.length)
        learned = np.ones(self.length, dtype=bool) if mask is None else mask.astype(bool)
        if in_row:
            learned[:1] = False
        return learned


def row_pieces(store: Store, row: int, seq_len: int, packing: str, overlong: str | None = None) -> list[Piece]:
    """The pieces of a row, in the order of packing. The rows of a merged store are those of its parts, one part after
    the other.

    Raises:
        MoaiError: there is no such row.
    """
    total = 0
    for part in store.parts():
        lengths = part.store.lengths()
        packed = pack_part(part.store, lengths, seq_len, packing, overlong)
        if 0 <= row - total < len(packed):
            pieces = slice(*packed.row_starts[row - total : row - total + 2])
            columns = (packed.document[pieces], packed.start[pieces], packed.length[pieces])
            return [
                Piece(part.store, document, start, length, int(lengths[document]))
                for document, start, length in zip(*(column.tolist() for column in columns))
            ]
        total += len(packed)
    raise MoaiError(f"there are {total:,} rows of {seq_len:,} tokens, counted from 0")


def whole_document(store: Store, number: int) -> Piece:
    """A document of a store, merged or not.

    Raises:
        MoaiError: there is no such document.
    """
    if not 0 <= number < len(store):
        raise MoaiError(f"there are {len(store):,} documents, counted from 0")
    for part in store.parts():
        if number < len(part.store):
            break
        number -= len(part.store)
    length = len(part.store.document(number))
    return Piece(part.store, number, 0, length, length)
