"""How well rankings and grades agree with what is known to be right: recall, MRR, nDCG, rank correlation. fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROWS = 1 << 24  # scores in memory at a time


def ranks_of(scores: np.ndarray, relevant: Sequence[int]) -> np.ndarray:
    """(relevant,) the ranks, from 1, of the relevant documents among all, ascending. A relevant one stands behind every
    other that scores the same, so that a model which cannot tell texts apart finds nothing.
    """
    chosen = np.zeros(len(scores), bool)
    chosen[list(relevant)] = True
    own = np.sort(scores[chosen])[::-1]
    others = np.sort(scores[~chosen])
    before = len(others) - np.searchsorted(others, own, side="left")
    return before + np.arange(1, len(own) + 1)


@dataclass(frozen=True)
class Retrieval:
    """Means over the queries that have something to find.

    Attributes:
        recall: k -> the share of what is relevant that is among the first k.
        mrr: one over the rank of the first relevant document.
        ndcg: k -> discounted gain among the first k, of the most that could be had (Jarvelin and Kekalainen 2002).
        chance: the recall of a random order, for the same k.
    """

    queries: int
    documents: int
    recall: dict[int, float]
    mrr: float
    ndcg: dict[int, float]
    chance: dict[int, float]


def retrieval(
    queries: np.ndarray, documents: np.ndarray, relevant: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)
) -> Retrieval:
    """Rank all documents for each query by the product of their vectors.

    Args:
        queries: (n, D). documents: (m, D). relevant: numbers of documents for each query.
    """
    asked = [i for i, found in enumerate(relevant) if len(found)]
    step = max(1, ROWS // max(1, len(documents)))
    ranks = []
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        scores = queries[part] @ documents.T
        ranks += [ranks_of(row, relevant[i]) for row, i in zip(scores, part)]
    return from_ranks(ranks, len(documents), ks)


def from_ranks(ranks: Sequence[np.ndarray], documents: int, ks: Sequence[int] = (1, 5, 10)) -> Retrieval:
    """From the ranks of what is relevant to each query."""
    count = max(1, len(ranks))

    def gain(of: np.ndarray, k: int) -> float:
        return float((1 / np.log2(1 + of[of <= k])).sum())

    recall = {k: sum(float((of <= k).mean()) for of in ranks) / count for k in ks}
    ndcg = {k: sum(gain(of, k) / gain(np.arange(1, len(of) + 1), k) for of in ranks) / count for k in ks}
    mrr = sum(1 / float(of[0]) for of in ranks) / count
    return Retrieval(len(ranks), documents, recall, mrr, ndcg, {k: min(1.0, k / max(1, documents)) for k in ks})


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; equal values share the mean of their ranks. NaN where one of both is constant."""
    return pearson(_mean_ranks(a), _mean_ranks(b))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation; NaN where one of both is constant."""
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (a, b))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else float("nan")


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
