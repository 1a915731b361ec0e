"""Documents into rows of a fixed length: best-fit decreasing (arXiv 2404.10830), so that what fits is never cut.

Bins are looked up by their free space in a bit set held in one integer: finding the fullest bin that still takes a
document is two shifts, whatever the number of bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Rows made of pieces. Row r holds pieces row_starts[r] to row_starts[r + 1]."""

    row_starts: np.ndarray  # (rows + 1,) int64
    document: np.ndarray  # (pieces,) int64
    start: np.ndarray  # (pieces,) int64, first token of the document in this piece
    length: np.ndarray  # (pieces,) int64
    capacity: int
    dropped_tokens: int  # tokens of over-long documents that no piece holds (`truncate`)

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def efficiency(self) -> float:
        """Share of the rows that is text, not padding."""
        return float(self.length.sum() / (max(1, len(self)) * self.capacity))


def pack_best_fit(lengths: np.ndarray, capacity: int, overlong: Literal["split", "truncate"] = "split") -> Packing:
    """Pack documents of these lengths into rows of `capacity` tokens.

    Args:
        overlong: documents longer than a row are cut into pieces (`split`) or to their beginning (`truncate`).

    Longest first, each into the fullest row that still takes it; ties by document number, so the result is a pure
    function of its arguments.
    """
    document, start, length = _pieces(np.asarray(lengths, dtype=np.int64), capacity, overlong)
    order = np.lexsort((start, document, -length))
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where some row has s tokens free
    for piece, size in zip(order.tolist(), length[order].tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            row, space = len(rows), capacity
            rows.append([])
        rows[row].append(piece)
        left = space - size
        if left:
            by_space[left].append(row)
            spaces |= 1 << left
    counts = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    flat = np.fromiter((piece for row in rows for piece in row), dtype=np.int64, count=len(document))
    total = int(np.sum(lengths))
    return Packing(
        np.concatenate([[0], counts.cumsum()]),
        document[flat],
        start[flat],
        length[flat],
        capacity,
        total - int(length.sum()),
    )


def _pieces(lengths: np.ndarray, capacity: int, overlong: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of every piece; empty documents have none."""
    if overlong == "truncate":
        document = np.flatnonzero(lengths)
        return document, np.zeros_like(document), np.minimum(lengths[document], capacity)
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)) * capacity
    return document, start, np.minimum(lengths[document] - start, capacity)
