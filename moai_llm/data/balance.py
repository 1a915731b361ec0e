"""Steps whose ranks have equally much to do (HBP, "Hierarchical Balance Packing", arXiv 2503.07680).

What attention costs in a row is the sum of its documents' squared lengths. Ranks that work on one step wait for the
slowest of them, so rows of similar cost go to the same step (the paper's balance packing), and the steps are shuffled.
Rows then differ in how many targets they hold; the loss of a step must be the sum over all its targets divided by their
number over all ranks (the paper's stable loss normaliser), which is how `training/loop.py` computes every loss.

The paper also packs to several row lengths, each with its own sequence parallelism. A run here has one row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moai_llm.data.order import permute
from moai_llm.data.packing import Packing, pack
from moai_llm.runtime import MoaiError


def imbalance(costs: np.ndarray) -> float:
    """The paper's attention balance ratio: how much of the time of its slowest rank a rank waits, on average.

    Args:
        costs: (steps, ranks) what each rank has to do.

    Returns:
        The mean of (max - x) / max over the ranks of a step and over the steps: 0 is even.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if not costs.size:
        return 0.0
    slowest = costs.max(axis=1, keepdims=True)
    return float(((slowest - costs) / np.where(slowest > 0, slowest, 1)).mean())


def rows_of_stream(position: np.ndarray, rows: int, seed: int, step: int = 1) -> np.ndarray:
    """Which row stands at each position of the endless stream of epochs, as a pure function of position and seed.

    Every epoch holds every row once. With `step` = 1 its order is a permutation of the rows. With a larger one, groups
    of `step` consecutive rows stay together, in their order, and fall on the steps of the stream (positions 0 to
    step - 1, step to 2 step - 1, ...): the groups are permuted. Where an epoch ends within a step, that step holds the
    last rows of both epochs.

    Args:
        position: (n,) int64.
        rows: in an epoch.
        step: rows in a step.

    Returns:
        (n,) int64, each from 0 to rows - 1.
    """
    epochs, within = np.divmod(np.asarray(position, dtype=np.int64), max(1, rows))
    chosen = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        head = min(rows, -epoch * rows % step)  # what completes the last step of the epoch before
        groups = (rows - head) // step
        at = within[here] - head
        group, offset = np.divmod(at, step)
        grouped = (at >= 0) & (group < groups)
        row = np.where(at < 0, rows + at, at)  # not grouped: the last rows, those of the end before those of the head
        if groups:
            row[grouped] = permute(group[grouped], groups, seed * 1_000_003 + epoch) * step + offset[grouped]
        chosen[here] = row
    return chosen


class HierarchicalBalancePacker:
    """Sequences into steps of rows that cost attention equally much.

    Length levels (powers of two) are gone through from the longest down, each by best fit into rows of
    `max_seq_length` tokens; the rows are sorted by attention cost, each `num_bins` neighbours become a step, and the
    steps are shuffled by a permutation that the seed chooses. The same arguments give the same result everywhere.

    Args:
        max_seq_length: tokens in a row. Levels reach up to it, a power of two or not.
        num_bins: rows in a step that are to cost the same: the number of data-parallel ranks, or of ranks times
            micro-batches. Rank r of W then takes bins r, r + W, ... of each step.
        overlong: `truncate` counts a longer sequence as its first `max_seq_length` tokens, which is what the caller
            must cut it to; `drop` leaves it out. To split sequences into pieces use `moai_llm.data.packing.pack`.
        seed: of the order of the steps.

    Attributes:
        packing: the rows of the last call as a `Packing`: efficiency, cut and dropped documents, lost tokens.

    Raises:
        MoaiError: a number below 1, or another `overlong`.

    Source: arXiv 2503.07680, method: hierarchical groups, balance packing, stable loss normaliser.
    """

    packing: Packing

    def __init__(self, max_seq_length: int, num_bins: int, *, overlong: str = "truncate", seed: int = 0) -> None:
        if num_bins < 1:
            raise MoaiError(f"num_bins is the number of rows in a step, at least 1, not {num_bins}")
        if overlong == "split":
            raise MoaiError("bins of whole sequences cannot hold pieces: overlong is truncate or drop here; "
                            "moai_llm.data.packing.pack splits")  # fmt: skip
        self.max_seq_length, self.num_bins, self.overlong, self.seed = max_seq_length, num_bins, overlong, seed
        self.packing = pack(np.zeros(0, dtype=np.int64), max_seq_length, "balanced", overlong)

    def pack(self, sequences: Sequence[Any] | np.ndarray) -> list[list[list[int]]]:
        """Steps of bins of indices into `sequences`.

        Args:
            sequences: token sequences, or their lengths as integers. What is empty is in no bin.

        Returns:
            For each step its `num_bins` bins, for each bin the indices of what it holds. Where the rows do not divide
            evenly, the last bins of the last step are empty.
        """
        self.packing = pack(_lengths(sequences), self.max_seq_length, "balanced", self.overlong)
        rows, step = len(self.packing), self.num_bins
        document, starts = self.packing.document.tolist(), self.packing.row_starts.tolist()
        order = rows_of_stream(np.arange(rows), rows, self.seed, step).tolist()
        bins = [document[starts[row] : starts[row + 1]] for row in order]
        bins += [[] for _ in range(-rows % step)]
        return [bins[first : first + step] for first in range(0, len(bins), step)]

    def costs(self) -> np.ndarray:
        """(steps, num_bins) float64: the attention cost of each bin of the last call, 0 for an empty one."""
        rows, step = len(self.packing), self.num_bins
        order = rows_of_stream(np.arange(rows), rows, self.seed, step)
        return np.append(self.packing.costs()[order], np.zeros(-rows % step)).reshape(-1, step)


def _lengths(sequences: Sequence[Any] | np.ndarray) -> np.ndarray:
    if isinstance(sequences, np.ndarray) and sequences.ndim == 1 and sequences.dtype.kind in "iu":
        return sequences.astype(np.int64)
    numbers = [isinstance(item, (int, np.integer)) for item in sequences]
    if any(numbers) and not all(numbers):
        raise MoaiError("sequences are either all lengths (integers) or all sequences of tokens; here both are mixed")
    return np.fromiter((int(s) if n else len(s) for s, n in zip(sequences, numbers)), np.int64, len(sequences))
