"""TF-IDF over stretches of characters: what a search finds that knows spelling and nothing else. A baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

SIZES = (2, 3, 4)  # characters


def tfidf_scores(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """(queries, documents) fp64 cosines of weights (1 + log tf) log((1 + N) / (1 + df)), N and df of the documents."""
    counted = [_grams(text) for text in documents]
    frequency = Counter(gram for grams in counted for gram in grams)
    weight = {gram: np.log((1 + len(documents)) / (1 + df)) for gram, df in frequency.items()}
    postings: dict[str, tuple[list[int], list[float]]] = {}
    for i, grams in enumerate(counted):
        for gram, value in _weighted(grams, weight).items():
            numbers, values = postings.setdefault(gram, ([], []))
            numbers.append(i)
            values.append(value)
    arrays = {gram: (np.array(numbers), np.array(values)) for gram, (numbers, values) in postings.items()}
    scores = np.zeros((len(queries), len(documents)))
    for row, text in zip(scores, queries):
        for gram, value in _weighted(_grams(text), weight).items():
            where, weights = arrays[gram]
            row[where] += value * weights
    return scores


def _grams(text: str) -> Counter[str]:
    text = f" {' '.join(text.lower().split())} "
    return Counter(text[i : i + size] for size in SIZES for i in range(len(text) - size + 1))


def _weighted(grams: Counter[str], weight: dict[str, float]) -> dict[str, float]:
    """Of length one; what no document has is left out."""
    found = {gram: (1 + np.log(count)) * weight[gram] for gram, count in grams.items() if weight.get(gram, 0) > 0}
    size = np.sqrt(sum(value * value for value in found.values()))
    return {gram: value / size for gram, value in found.items()}
