"""Which source stands at each position of a mixture, so that no source is ever a row ahead or behind its share.

Among the first n positions a source of share w has between wn - (1 - d) and wn + (1 - d), for every n and k >= 2
sources, d = 1 / (2k - 2): the best possible bound (Tijdeman, "The chairman assignment problem", 1980). Random draws are
off by the square root of n, and what they owe a small source they may pay much later.

The j-th row of a source may stand where wn >= j - 1 + d and must stand at the latest where wn > j - d first holds.
Among the rows that may stand, the one whose time runs out first gets the position, which keeps every time.

What this gives at position n does not need the n positions before. Let E(m) be the number of rows that might have stood
among the first m and did not: the sum of what each source may have by m, less m. A row that waits at n has waited since
its first possible place, so of the rows with a first place up to m at most E(m) wait. Of all sets that satisfy this the
rule leaves the one whose times run out last, and a greedy choice finds it (a matroid: unit jobs in nested intervals).
E is a sum of floors, so it is walked back from n, and no further than the longest wait, 1 / (smallest share).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from moai_llm.runtime import MoaiError

FINEST = 1 << 40  # shares are multiples of 1 / FINEST, unless they are exact fractions with a smaller denominator
SMALLEST = 1e-7  # a share; the time to enter a mixture at any place grows with its inverse


class State(NamedTuple):
    """Where a mixture stands after some positions."""

    position: int
    counts: np.ndarray  # (sources,) int64 rows of each so far
    lags: np.ndarray  # (sources,) int64, in units of 1 / unit: what each is owed


class Quotas:
    """A mixture of sources by their shares, a pure function of the position.

    Args:
        weights: of the sources, positive; shares are weights over their sum.

    Raises:
        MoaiError: a weight that is not positive, or a share too small to mean anything.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if any(not 0 < weight < float("inf") for weight in weights):
            raise MoaiError(f"weights of a mixture are positive numbers, not {list(weights)}")
        parts = _whole_numbers(weights)
        self.shares = [part / sum(parts) for part in parts]
        if min(self.shares) < SMALLEST:
            raise MoaiError(
                f"a share of {min(self.shares):.1e} is less than one row in {1 / SMALLEST:,.0f}: leave that source "
                "out, or join it with another"
            )
        scale = max(2, 2 * len(parts) - 2)
        self._slack = sum(parts)  # d in units of 1 / unit
        self._unit = sum(parts) * scale
        self._steps = np.array([part * scale for part in parts], dtype=np.int64)
        self._state = State(0, np.zeros(len(parts), np.int64), np.zeros(len(parts), np.int64))

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions start to start + count.

        Returns:
            (count,) int64, the source of each; (count,) int64, which of that source's rows it is, counted from 0.
        """
        state = self._state  # where the last call ended: most calls go on from there
        if state.position != start:
            state = self._enter(start)
        counts, lags = state.counts.copy(), state.lags.copy()
        source, index = np.empty(count, np.int64), np.empty(count, np.int64)
        _assign(counts, lags, self._steps, self._unit, self._slack, source, index)
        self._state = State(start + count, counts, lags)
        return source, index

    def counts(self, n: int) -> np.ndarray:
        """(sources,) int64: rows of each source among the first n positions."""
        return self._enter(n).counts

    def _enter(self, n: int) -> State:
        """The state after n positions."""
        unit, slack, steps = self._unit, self._slack, self._steps
        whole, part = zip(*(divmod(step * n, unit) for step in steps.tolist()))  # Python's integers: exact for any n
        fraction = np.array(part, dtype=np.int64)
        possible = np.array(whole, dtype=np.int64) + (fraction >= slack)
        pending = np.flatnonzero((fraction >= slack) & (fraction <= unit - slack))
        counts = possible - _waiting(fraction, steps, unit, slack, pending)
        lags = fraction + (np.array(whole, dtype=np.int64) - counts) * unit
        assert counts.sum() == n
        return State(n, counts, lags)


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of the weights as they are written (0.7 is 7/10), or nearest to it."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    together = min(FINEST, math.lcm(*(share.denominator for share in shares)))
    parts = [int(share * together) for share in shares]
    rests = sorted(range(len(parts)), key=lambda i: (parts[i] - shares[i] * together, i))
    for i in rests[: together - sum(parts)]:
        parts[i] += 1
    return parts


def _waiting(fraction: np.ndarray, steps: np.ndarray, unit: int, slack: int, pending: np.ndarray) -> np.ndarray:
    """(sources,) int64: 1 where a source's next row might have stood already and waits."""
    waits = np.zeros(len(steps), np.int64)
    if not len(pending):
        return waits
    since = (fraction[pending] - slack) // steps[pending]  # positions back to the first possible place
    due = (unit - slack - fraction[pending]) // steps[pending]
    by_wait = np.argsort(since, kind="stable")
    excess = int((fraction >= slack).sum()) - sum(fraction.tolist()) // unit
    most = _least_excess(excess, fraction - slack, steps, unit, since[by_wait])  # how many may wait, by how long
    place = np.empty(len(pending), np.int64)
    place[by_wait] = np.arange(len(pending))
    for i in np.lexsort((pending, due))[::-1]:  # the latest first; among equals the last source
        until = place[i] + 1
        if most[:until].min() > 0:
            most[:until] -= 1
            waits[pending[i]] = 1
    return waits


@njit(cache=True, nogil=True)
def _least_excess(excess: int, back: Any, steps: Any, unit: int, since: Any) -> Any:  # pragma: no cover - compiled
    """The least E(m) for m from n - since[i] up to before n - since[i - 1], for each i. `since` ascends.

    Args:
        excess: E(n).
        back: (sources,) int64, how far each is beyond its last first possible place, in units of 1 / unit; it may be
            negative by less than a unit. Written over.
    """
    least = np.zeros(len(since), np.int64)
    for s in range(len(steps)):
        if back[s] < 0:
            back[s] += unit
    d = 0
    for i in range(len(since)):
        least[i] = len(steps)  # no more can wait; stays so where the span is empty
        while d <= since[i]:
            least[i] = min(least[i], excess)
            if excess == 0:
                return least  # what was possible by then does not wait
            for s in range(len(steps)):
                back[s] -= steps[s]
                if back[s] < 0:
                    back[s] += unit
                    excess -= 1
            excess += 1
            d += 1
    return least


@njit(cache=True, nogil=True)
def _assign(  # pragma: no cover - compiled
    counts: Any, lags: Any, steps: Any, unit: int, slack: int, source: Any, index: Any
) -> None:
    """The next positions; counts and lags go on."""
    for i in range(len(source)):
        best, best_due = -1, 0
        for s in range(len(steps)):
            lags[s] += steps[s]
            if lags[s] >= slack:
                left = unit - slack - lags[s]
                due = left // steps[s] + 1 if left >= 0 else 0
                if best < 0 or due < best_due:
                    best, best_due = s, due
        source[i], index[i] = best, counts[best]
        counts[best] += 1
        lags[best] -= unit
