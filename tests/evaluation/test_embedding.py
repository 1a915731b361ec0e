"""Measures of rankings against other definitions and other libraries; TF-IDF; search and grades from records."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moai_llm.data.embedding_records import Related
from moai_llm.evaluation.embedding import as_graded, as_search, cosines
from moai_llm.evaluation.ranking import pearson, ranks_of, retrieval, spearman
from moai_llm.evaluation.tfidf import tfidf_scores


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_by_sorting(seed: int) -> None:
    """Each query sorted in full, with scores that often tie."""
    generator = np.random.default_rng(seed)
    queries, documents = (
        generator.integers(-2, 3, (13, 3)).astype(float),
        generator.integers(-2, 3, (29, 3)).astype(float),
    )
    relevant = [sorted(set(generator.integers(0, 29, generator.integers(0, 5)).tolist())) for _ in range(13)]
    found = retrieval(queries, documents, relevant, (1, 3, 10))
    recalls: dict[int, list[float]] = {1: [], 3: [], 10: []}
    gains: dict[int, list[float]] = {1: [], 3: [], 10: []}
    firsts = []
    for query, right in zip(queries, relevant):
        if not right:
            continue
        scores = documents @ query
        order = sorted(range(29), key=lambda d: (-scores[d], d in right))  # what is relevant comes last among equals
        hits = [d in right for d in order]
        firsts.append(1 / (1 + hits.index(True)))
        for k in recalls:
            recalls[k].append(sum(hits[:k]) / len(right))
            ideal = sum(1 / math.log2(2 + i) for i in range(min(k, len(right))))
            gains[k].append(sum(hit / math.log2(2 + i) for i, hit in enumerate(hits[:k])) / ideal)
    assert found.queries == len(firsts) and found.documents == 29
    assert found.mrr == pytest.approx(np.mean(firsts), rel=1e-12)
    for k in recalls:
        assert found.recall[k] == pytest.approx(np.mean(recalls[k]), rel=1e-12)
        assert found.ndcg[k] == pytest.approx(np.mean(gains[k]), rel=1e-12)


def test_ndcg_is_that_of_sklearn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(1)
    queries, documents = generator.normal(size=(9, 4)), generator.normal(size=(21, 4))
    relevant = [generator.choice(21, 3, replace=False).tolist() for _ in range(9)]
    truth = np.zeros((9, 21))
    for row, found in zip(truth, relevant):
        row[found] = 1
    ours = retrieval(queries, documents, relevant, (1, 10))
    assert ours.ndcg[10] == pytest.approx(metrics.ndcg_score(truth, queries @ documents.T, k=10), rel=1e-12)


def test_a_model_that_cannot_tell_texts_apart_finds_nothing() -> None:
    same = np.ones((6, 3))
    assert retrieval(same, same, [[i] for i in range(6)], (1, 5)).recall == {1: 0.0, 5: 0.0}
    assert ranks_of(np.ones(6), [2, 4]).tolist() == [5, 6]


def test_correlations_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for size in (2, 7, 101):
        a, b = generator.integers(0, 9, size).astype(float), generator.normal(size=size)
        b[: size // 2] = a[: size // 2]
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-10)
        assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, rel=1e-10)
    assert math.isnan(spearman(np.ones(4), np.arange(4)))


def test_tfidf_by_hand() -> None:
    texts = ["the deposit", "a deposit", "은행 이자", "xyz"]
    scores = tfidf_scores(["deposit", "이자", "qqq", ""], texts)

    def vector(text: str) -> dict[str, float]:
        padded = f" {text} " if text else "  "
        counts: dict[str, int] = {}
        for n in (2, 3, 4):
            for i in range(len(padded) - n + 1):
                counts[padded[i : i + n]] = counts.get(padded[i : i + n], 0) + 1
        df = {gram: sum(gram in f" {other} " for other in texts) for gram in counts}
        weights = {g: (1 + math.log(c)) * math.log(5 / (1 + df[g])) for g, c in counts.items() if df[g]}
        size = math.sqrt(sum(w * w for w in weights.values())) or 1
        return {g: w / size for g, w in weights.items()}

    for query, row in zip(("deposit", "이자", "qqq"), scores):
        for text, score in zip(texts, row):
            q, d = vector(query), vector(text)
            assert score == pytest.approx(sum(w * d.get(g, 0) for g, w in q.items()), abs=1e-12)
    assert scores[1].argmax() == 2 and not scores[2:].any()


def test_records_as_a_search_and_as_grades() -> None:
    records = [Related("a", ("x", "y"), ("z",)), Related("a", ("w",)), Related("b", ("x",)), Related("alone")]
    search = as_search(records)
    assert search.queries == ["a", "b"] and search.documents == ["x", "y", "z", "w"]
    assert search.relevant == [[0, 1, 3], [0]]
    graded = as_graded([*records, Related("p", ("q",), (), 0.25)])
    assert (graded.first, graded.second, graded.score.tolist()) == (["p"], ["q"], [0.25])
    assert cosines(np.array([[3.0, 4], [0, 0]]), np.array([[6.0, 8], [1, 1]])).tolist() == [1.0, 0.0]
