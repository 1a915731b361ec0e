"""Documents into rows of a fixed length, by one of five strategies.

| strategy | in the field's words | a document that fits in a row |
|---|---|---|
| best-fit | best-fit decreasing (BFD), arXiv 2404.10830 | is never cut |
| balanced | hierarchical balance packing (HBP), arXiv 2503.07680, see `balance.py` | is never cut |
| next-fit | greedy packing in the order of the documents | is never cut |
| concat | concat and split | is cut wherever a row ends |
| none | one document a row, padded | is never cut |

Each is a pure function of its arguments, and no token is lost that is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moai_llm.data.bins import best_fit, next_fit, sort_by
from moai_llm.data.order import permute
from moai_llm.runtime import MoaiError, did_you_mean

Overlong = Literal["split", "truncate", "drop"]
MOST_TOKENS = 1 << 24  # of a row: the tables of free space are as long


@dataclass(frozen=True)
class Packing:
    """Rows made of pieces. Row r holds pieces row_starts[r] to row_starts[r + 1]."""

    row_starts: np.ndarray  # (rows + 1,) int64
    document: np.ndarray  # (pieces,) int64
    start: np.ndarray  # (pieces,) int64, first token of the document in this piece
    length: np.ndarray  # (pieces,) int64
    capacity: int
    lengths: np.ndarray = field(repr=False)  # (documents,) int64, as they came
    unit: str = "documents"  # what is packed, as a reader of `summary` calls it

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def efficiency(self) -> float:
        """Share of the rows that is text, not padding."""
        return float(self.length.sum() / (max(1, len(self)) * self.capacity))

    @property
    def dropped_tokens(self) -> int:
        """Tokens that are in no row."""
        return int(self.lengths.sum() - self.length.sum())

    @property
    def dropped_documents(self) -> int:
        """Documents of which nothing is in a row, though they have tokens."""
        return int(((self._kept() == 0) & (self.lengths > 0)).sum())

    @property
    def cut_documents(self) -> int:
        """Documents that lie in more than one piece or lost their end."""
        kept = self._kept()
        several = np.bincount(self.document, minlength=len(self.lengths)) > 1
        return int((several | ((kept > 0) & (kept < self.lengths))).sum())

    def _kept(self) -> np.ndarray:
        kept = np.zeros_like(self.lengths)
        np.add.at(kept, self.document, self.length)
        return kept

    def costs(self) -> np.ndarray:
        """(rows,) float64: what attention costs in each row, the sum of its documents' squared lengths."""
        squares = np.concatenate([[0.0], (self.length.astype(np.float64) ** 2).cumsum()])
        return np.diff(squares[self.row_starts])

    def summary(self) -> str:
        """One line: how full the rows are, and every document that did not stay whole."""
        text = f"{len(self):,} rows of {self.capacity:,} tokens, {self.efficiency:.1%} full"
        cut, dropped, lost = self.cut_documents, self.dropped_documents, self.dropped_tokens
        if cut:
            text += f"; {cut:,} of {len(self.lengths):,} {self.unit} are cut"
        if dropped:
            text += f"; {dropped:,} of {len(self.lengths):,} {self.unit} are dropped"
        return text + (f"; {lost:,} tokens are lost" if lost else "")


def pack(lengths: np.ndarray, capacity: int, strategy: str = "best-fit", overlong: str = "split") -> Packing:
    """Pack documents of these lengths into rows of `capacity` tokens.

    Args:
        lengths: (documents,) tokens of each; a document without any is in no row.
        strategy: a key of `STRATEGIES`.
        overlong: what becomes of documents longer than a row: cut into pieces of a row and a rest (`split`), cut to
            their beginning (`truncate`), or left out (`drop`).

    Raises:
        MoaiError: an unknown strategy or way with long documents, a row or a document of impossible length.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if strategy not in STRATEGIES:
        raise MoaiError(f"there is no packing {strategy!r}: choose {', '.join(STRATEGIES)}"
                        f"{did_you_mean(strategy, STRATEGIES)}")  # fmt: skip
    if overlong not in CUTS:
        raise MoaiError(f"long documents cannot be {overlong!r}: choose {', '.join(CUTS)}"
                        f"{did_you_mean(overlong, CUTS)}")  # fmt: skip
    if not 1 <= capacity <= MOST_TOKENS:
        raise MoaiError(f"a row has 1 to {MOST_TOKENS:,} tokens, not {capacity:,}")
    if len(lengths) and lengths.min() < 0:
        raise MoaiError(f"document {int(lengths.argmin()):,} has {int(lengths.min()):,} tokens")
    return STRATEGIES[strategy](lengths, capacity, CUTS[overlong])


Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]  # document, start, length of each
Cut = Callable[[np.ndarray, int], Pieces]


def _split(lengths: np.ndarray, capacity: int) -> Pieces:
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)) * capacity
    return document, start, np.minimum(lengths[document] - start, capacity)


def _truncate(lengths: np.ndarray, capacity: int) -> Pieces:
    document = np.flatnonzero(lengths)
    return document, np.zeros_like(document), np.minimum(lengths[document], capacity)


def _drop(lengths: np.ndarray, capacity: int) -> Pieces:
    document = np.flatnonzero((lengths > 0) & (lengths <= capacity))
    return document, np.zeros_like(document), lengths[document]


CUTS: dict[str, Cut] = {"split": _split, "truncate": _truncate, "drop": _drop}


def _best_fit(lengths: np.ndarray, capacity: int, cut: Cut) -> Packing:
    """Longest first, each into the fullest row that still takes it; ties by the number of the document."""
    pieces = cut(lengths, capacity)
    order, _ = sort_by(capacity - pieces[2], capacity)
    return _rows(lengths, capacity, pieces, order, best_fit(pieces[2][order], capacity))


def _balanced(lengths: np.ndarray, capacity: int, cut: Cut) -> Packing:
    """Best fit down the levels of length, rows in the order of their attention cost, the dearest first.

    A level holds the lengths up to a power of two and above the next lower one. Lengths above a sixteenth of a row go
    in longest first, as that decides how full the rows become. The levels below fill what is left, each in a keyed
    order: rows then hold a mixture of them, where best-fit decreasing makes rows of equal lengths. Should that take
    more rows, all levels go in longest first.
    """
    pieces = cut(lengths, capacity)
    length = pieces[2]
    level = np.frexp(np.maximum(length - 1, 0).astype(np.float64))[1].astype(np.int64)  # 1: 0, 2: 1, 3 and 4: 2, ...
    lowest = capacity + 64
    key = np.where(length > capacity // 16, capacity - length, lowest - level)
    mixed = permute(np.arange(len(length)), len(length), key=0)
    order = mixed[sort_by(key[mixed], lowest + 1)[0]]
    packing = _rows(lengths, capacity, pieces, order, best_fit(length[order], capacity))
    plain = _best_fit(lengths, capacity, cut)
    packing = plain if len(plain) < len(packing) else packing
    by_cost = np.argsort(-packing.costs(), kind="stable")
    rank = np.empty(len(packing), dtype=np.int64)
    rank[by_cost] = np.arange(len(packing))
    of_piece = np.repeat(rank, np.diff(packing.row_starts))
    now = packing.document, packing.start, packing.length
    return _rows(lengths, capacity, now, np.arange(len(of_piece)), of_piece)


def _next_fit(lengths: np.ndarray, capacity: int, cut: Cut) -> Packing:
    """In the order of the documents, into the last row where they fit, else into a new one."""
    pieces = cut(lengths, capacity)
    return _rows(lengths, capacity, pieces, np.arange(len(pieces[2])), next_fit(pieces[2], capacity))


def _one_per_row(lengths: np.ndarray, capacity: int, cut: Cut) -> Packing:
    """Every piece alone."""
    pieces = cut(lengths, capacity)
    return Packing(np.arange(len(pieces[0]) + 1), *pieces, capacity, lengths)


def _concat(lengths: np.ndarray, capacity: int, cut: Cut) -> Packing:
    """One after the other without a gap, cut wherever a row ends."""
    document, start, length = cut(lengths, capacity)
    ends = length.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    rows = np.arange(0, total, capacity)
    # the pieces of a long document touch: only rows cut it; to sort is to merge two sorted runs
    begins = np.sort(np.concatenate([(ends - length)[start == 0], rows]), kind="stable")
    begins = begins[np.diff(begins, prepend=-1) > 0]
    within = np.searchsorted(ends, begins, side="right")
    return Packing(
        np.append(np.searchsorted(begins, rows), len(begins)),
        document[within],
        start[within] + begins - (ends - length)[within],
        np.diff(begins, append=total),
        capacity,
        lengths,
    )


def _rows(lengths: np.ndarray, capacity: int, pieces: Pieces, order: np.ndarray, row: np.ndarray) -> Packing:
    """The rows when piece order[i] goes to row[i]."""
    document, start, length = pieces
    within, starts = sort_by(row, int(row.max()) + 1 if len(row) else 0)
    flat = order[within]
    return Packing(starts, document[flat], start[flat], length[flat], capacity, lengths)


def join(packings: Sequence[Packing]) -> Packing:
    """The rows of several, and their documents, one after the other."""
    if len(packings) == 1:
        return packings[0]
    pieces = np.cumsum([0, *(len(packing.length) for packing in packings)])
    documents = np.cumsum([0, *(len(packing.lengths) for packing in packings)])
    return Packing(
        np.concatenate([packing.row_starts[:-1] + first for packing, first in zip(packings, pieces)] + [pieces[-1:]]),
        np.concatenate([packing.document + first for packing, first in zip(packings, documents)]),
        np.concatenate([packing.start for packing in packings]),
        np.concatenate([packing.length for packing in packings]),
        packings[0].capacity,
        np.concatenate([packing.lengths for packing in packings]),
    )


STRATEGIES: dict[str, Callable[[np.ndarray, int, Cut], Packing]] = {
    "best-fit": _best_fit,
    "balanced": _balanced,
    "next-fit": _next_fit,
    "concat": _concat,
    "none": _one_per_row,
}
