"""Preference pairs in a store: what a loss such as DPO (arXiv 2305.18290) compares.

A pair is two documents that follow each other, the better answer first: documents 2i and 2i + 1 of a store of kind
`preference`. Both begin with the same prompt, and their masks are set on the answers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError


class PairTokens(NamedTuple):
    """Ids of both conversations, where each is learned, and how many tokens at their beginning are the same prompt."""

    chosen: np.ndarray  # (tokens,) uint16 or uint32
    chosen_learn: np.ndarray  # (tokens,) bool
    rejected: np.ndarray
    rejected_learn: np.ndarray
    prompt: int


class Pairs:
    """The pairs of a store, read where they are needed.

    Raises:
        MoaiError: a store of another kind, or with half a pair.
    """

    def __init__(self, store: Store | str | Path) -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        if self.store.manifest.kind != "preference":
            raise MoaiError(
                f"{self.store.path} holds {self.store.manifest.kind}, not preference pairs: prepare chosen and "
                "rejected answers with `moai data prepare --preference`"
            )
        if len(self.store) % 2:
            raise MoaiError(f"{self.store.path}: {len(self.store)} documents are no pairs: prepare the data again")

    def __len__(self) -> int:
        return len(self.store) // 2

    def __getitem__(self, i: int) -> PairTokens:
        if not 0 <= i < len(self):
            raise IndexError(i)
        chosen, rejected = (self.store.document(2 * i + side) for side in (0, 1))
        masks = [self._learn(2 * i + side) for side in (0, 1)]
        prompt = min(int(mask.argmax()) for mask in masks)
        return PairTokens(chosen, masks[0], rejected, masks[1], prompt)

    def _learn(self, document: int) -> np.ndarray:
        learn = self.store.learn(document)
        assert learn is not None  # every kind but text has masks
        return learn.astype(bool)
