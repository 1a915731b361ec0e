"""Whether one model is better than another, or only seems so: a paired bootstrap over documents.

Both models answered the same documents. Documents are drawn again and again with replacement, always the same for both,
and the difference of the two is computed each time: the spread of these differences is how far chance carries (Koehn,
Statistical Significance Tests for Machine Translation Evaluation, 2004).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moai_llm.evaluation.results import Item, Results, Score
from moai_llm.runtime import MoaiError

RESAMPLES = 10_000
CELLS = 1 << 22  # numbers in memory at a time
FEW = 20  # documents; an interval over fewer is too narrow, for they stand for too little


@dataclass(frozen=True)
class Compared:
    """Values of A and B and their difference A - B, with what chance may make of it.

    Attributes:
        low, high: ends of the 95 % interval of the difference.
        p: two-sided: how often a difference at least this far from 0 comes about where there is none.
        wins: share of the documents on which A is better, ties counted half.
    """

    task: str
    metric: str
    documents: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    wins: float
    higher_is_better: bool


def bootstrap(
    numerators: np.ndarray, denominators: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Ratios of sums over documents drawn with replacement, (R, K) for numerators and denominators of (N, K).

    With denominators of one this is the mean. How often each document is drawn is a row of a multinomial distribution,
    so that a resample is one row of a matrix product.
    """
    count = len(numerators)
    generator = np.random.default_rng(seed)
    found = np.empty((resamples, numerators.shape[1]))
    step = max(1, CELLS // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.integers(0, count, (size, count), dtype=np.int64)
        drawn += np.arange(size)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)
        found[start : start + size] = (weights @ numerators) / np.maximum(weights @ denominators, 1e-300)
    return found


def interval(
    numerators: np.ndarray, denominators: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a ratio of sums over documents, from percentiles; NaN for fewer than two documents."""
    if len(numerators) < 2:
        return math.nan, math.nan
    found = bootstrap(numerators[:, None], denominators[:, None], resamples, seed)[:, 0]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def compare_paired(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None, *, higher_is_better: bool = True,
    resamples: int = RESAMPLES, seed: int = 0, task: str = "", metric: str = "",
) -> Compared:  # fmt: skip
    """Two models on the same documents.

    Args:
        a, b: (N,) values of each document; sums over documents where there are weights.
        weights: (N,) or (N, 2) what the sums are divided by, for each model where they differ; 1 when None.

    Raises:
        MoaiError: fewer than two documents.
    """
    if len(a) < 2:
        raise MoaiError(f"{task or 'this'}: {len(a)} documents in common are too few to compare")
    top = np.stack([a, b], 1).astype(float)
    bottom = np.ones_like(top)
    if weights is not None:
        bottom = bottom * weights.reshape(len(a), -1)
    value_a, value_b = (top.sum(0) / bottom.sum(0)).tolist()
    drawn = bootstrap(top, bottom, resamples, seed)
    spread = drawn[:, 0] - drawn[:, 1]
    low, high = np.quantile(spread, (0.025, 0.975))
    difference = value_a - value_b
    # moved so that there is no difference: how often is it as far away as the one that was seen
    beyond = np.count_nonzero(np.abs(spread - difference) >= abs(difference) - 1e-12)
    p = (beyond + 1) / (resamples + 1)
    each = top / np.where(bottom == 0, 1, bottom)
    better = each[:, 0] - each[:, 1] if higher_is_better else each[:, 1] - each[:, 0]
    wins = float(np.mean(np.where(better > 0, 1.0, np.where(better < 0, 0.0, 0.5))))
    return Compared(
        task, metric, len(a), value_a, value_b, difference, float(low), float(high), min(1.0, p), wins, higher_is_better
    )


def compare_results(a: Results, b: Results, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Compared]:
    """Two evaluations of one kind: for each task and metric that both have, for each label such as a language, and over
    everything where there are several tasks of a perplexity.

    Raises:
        MoaiError: they are of different kinds, or have no document in common.
    """
    if a.kind != b.kind:
        raise MoaiError(f"results of `moai eval {a.kind}` and of `moai eval {b.kind}` cannot be compared")
    theirs = {(item.task, item.id): item for item in b.items}
    pairs = [(item, theirs[item.task, item.id]) for item in a.items if (item.task, item.id) in theirs]
    if not pairs:
        raise MoaiError(
            "no document is in both: compare evaluations of the same files or tasks, with the same --limit, and keep "
            "their documents with --json"
        )
    found = []
    for task, metric, chosen in _groups(pairs, a):
        better = _higher_is_better(a.scores, task, metric)
        weights = None
        if metric == "bits_per_byte":
            values = np.array([[item.values["nats"] / math.log(2) for item in pair] for pair in chosen])
            weights = np.array([[item.values["bytes"] for item in pair] for pair in chosen])
        else:
            values = np.array([[item.values[metric] for item in pair] for pair in chosen])
        found.append(
            compare_paired(
                values[:, 0], values[:, 1], weights, higher_is_better=better, resamples=resamples, seed=seed, task=task,
                metric=metric,
            )
        )  # fmt: skip
    return found


Pairs = list[tuple[Item, Item]]


def _groups(pairs: Pairs, results: Results) -> Iterator[tuple[str, str, Pairs]]:
    """(name, metric, pairs) of what is compared."""
    by_task: dict[str, Pairs] = {}
    by_label: dict[str, Pairs] = {}
    for pair in pairs:
        by_task.setdefault(pair[0].task, []).append(pair)
        for kind, label in pair[0].labels.items():
            by_label.setdefault(label if kind == "group" else f"{kind} {label}", []).append(pair)
    named = [*by_task.items(), *((name, chosen) for name, chosen in by_label.items() if len(chosen) < len(pairs))]
    named += [(name, chosen) for name, chosen in by_label.items() if len(chosen) == len(pairs) and len(by_task) > 1]
    if results.kind == "perplexity" and len(by_task) > 1:
        named.append(("all", pairs))
    for name, chosen in named:
        metrics = ["bits_per_byte"] if results.kind == "perplexity" else list(chosen[0][0].values)
        for metric in metrics:
            having = [pair for pair in chosen if metric == "bits_per_byte" or all(metric in i.values for i in pair)]
            if len(having) > 1:
                yield name, metric, having


def _higher_is_better(scores: list[Score], task: str, metric: str) -> bool:
    """As the task says; of a label, as any task with this metric says."""
    if metric == "bits_per_byte":
        return False
    known = [score.higher_is_better for score in scores if score.metric == metric]
    own = [score.higher_is_better for score in scores if (score.task, score.metric) == (task, metric)]
    return all(value is not False for value in (own or known)[:1])
