"""What loaders of groups of documents share: rows that hold groups whole, read as a pure function of (seed, step).

A group is a pair of answers or a record of texts that belong together; `row` of a loader says what is in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

from moai_llm.data.balance import rows_of_stream
from moai_llm.data.loader import Batch
from moai_llm.data.packing import Packing
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError


def refuse_cutting(packing: str, overlong: str | None, what: str) -> None:
    """Raises `MoaiError` for ways to make rows that would cut groups apart."""
    if packing == "concat" or overlong == "split":
        name = "data.packing=concat" if packing == "concat" else "data.overlong=split"
        raise MoaiError(f"{name} would cut {what} apart: choose another way")


class GroupLoader(ABC):
    """Packed rows of one store.

    Args:
        group: rows that stay together in the order, see `balance.py`.

    Attributes:
        stages, sources, end: as of `Loader`: one stage of one store, without an end.
    """

    packing: Packing

    def __init__(self, store: Store, seq_len: int, seed: int | None, step_rows: int, group: int, pinned: bool) -> None:
        self.store, self.seq_len, self.seed = store, seq_len, seed
        self.step_rows, self.group, self.pinned = step_rows, group, pinned
        self.pad_id = store.tokenizer().pad_id

    @abstractmethod
    def row(self, index: int, position: int | None = None) -> Batch:
        """One packed row, each tensor without the dimension of rows. `position` is where in the stream it stands."""

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.packing)

    end = None

    @property
    def sources(self) -> list[GroupLoader]:
        return [self]

    @property
    def stages(self) -> list[GroupLoader]:
        return [self]

    @property
    def identity(self) -> str:
        """What must be the same when a run is resumed."""
        return self.store.fingerprint

    def stage(self, step: int) -> int:
        return 0

    def step(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows of a step, counted from 0; of `world` ranks each takes its own."""
        positions = np.arange(step * self.step_rows, (step + 1) * self.step_rows)[rank::world]
        return self._stack(self._at(positions), positions)

    def rows(self, start: int, count: int) -> Batch:
        """Rows start to start + count of the endless stream, stacked."""
        positions = np.arange(start, start + count)
        return self._stack(self._at(positions), positions)

    def _at(self, position: np.ndarray) -> np.ndarray:
        if self.seed is None:
            return position % len(self)
        return rows_of_stream(position, len(self), self.seed, self.group)

    def _stack(self, numbers: np.ndarray, positions: np.ndarray | None = None) -> Batch:
        rows = [self.row(int(i), int(at)) for i, at in zip(numbers, numbers if positions is None else positions)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        return {key: tensor.pin_memory() for key, tensor in batch.items()} if self.pinned else batch

    def epoch(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The rows of one pass in batches; the last may be smaller. With `limit` so many of them, spread evenly."""
        total = len(self) if limit is None else min(limit, len(self))
        chosen = (2 * np.arange(total) + 1) * len(self) // (2 * total)
        for start in range(0, total, batch_size):
            yield self._stack(chosen[start : start + batch_size])
