"""Stages of mixtures, one after the other: which source stands at each position of the whole run. Integers only, no
stores.

A source that several stages use goes on in each where the one before left it, so nothing is read twice before all of it
was read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moai_llm.data.mixing import Quotas


@dataclass(frozen=True)
class Span:
    """Positions first to last (None: to the end) of the run, and the weight of each source that is in it."""

    first: int
    last: int | None
    weights: Mapping[int, float]  # number of a source -> weight


class Curriculum:
    """A pure function of the position.

    Args:
        sources: how many there are.
        spans: in order, each beginning where the one before ends.
    """

    def __init__(self, sources: int, spans: Sequence[Span]) -> None:
        assert spans and spans[0].first == 0 and all(a.last == b.first for a, b in zip(spans, spans[1:]))
        self.spans = list(spans)
        self.quotas = [Quotas(list(span.weights.values())) for span in spans]
        self._members = [np.array(list(span.weights), dtype=np.int64) for span in spans]
        self._read = [np.zeros(sources, dtype=np.int64)]  # rows of each source that were read before each stage
        for i, span in enumerate(spans[:-1]):
            assert span.last is not None
            read = self._read[-1].copy()
            read[self._members[i]] += self.quotas[i].counts(span.last - span.first)
            self._read.append(read)

    def stage(self, position: int) -> int:
        """Number of the stage at a position, counted from 0."""
        return sum(span.last is not None and span.last <= position for span in self.spans[:-1])

    def read(self, position: int) -> np.ndarray:
        """(sources,) int64: rows of each source among the positions before this one."""
        number = self.stage(position)
        read = self._read[number].copy()
        read[self._members[number]] += self.quotas[number].counts(position - self.spans[number].first)
        return read

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions start to start + count.

        Returns:
            (count,) int64, the source of each; (count,) int64, its place in that source's own endless stream.
        """
        source, index = np.empty(count, np.int64), np.empty(count, np.int64)
        at = 0
        while at < count:
            number = self.stage(start + at)
            span = self.spans[number]
            following = self.spans[number + 1 : number + 2]
            take = min([count - at, *(later.first - start - at for later in following)])
            members, here = self._members[number], slice(at, at + take)
            which, index[here] = self.quotas[number].locate(start + at - span.first, take)
            source[here] = members[which]
            index[here] += self._read[number][source[here]]
            at += take
        return source, index
