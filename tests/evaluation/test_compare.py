"""The paired bootstrap against one written out, against chance, and against what it must not be taken for."""

from __future__ import annotations

import math
import random
from statistics import mean

import numpy as np
import pytest

from moai_llm.evaluation.compare import bootstrap, compare_paired, compare_results, interval
from moai_llm.evaluation.results import Item, ModelFacts, Results, Score
from moai_llm.runtime import MoaiError

FACTS = ModelFacts("m", "MoaiForCausalLM", 1, "float32", "cpu", 8, "w", "t", 8)


def written_out(a: list[float], b: list[float], resamples: int, seed: int) -> tuple[float, float, float]:
    """(low, high, p) with loops and Python's own random numbers."""
    rng, n = random.Random(seed), len(a)
    observed = mean(a) - mean(b)
    drawn = []
    for _ in range(resamples):
        chosen = [rng.randrange(n) for _ in range(n)]
        drawn.append(mean(a[i] for i in chosen) - mean(b[i] for i in chosen))
    drawn.sort()
    beyond = sum(abs(d - observed) >= abs(observed) for d in drawn)
    return drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples)], beyond / resamples


def pairs(n: int, effect: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of very different difficulty, on which A is a little better than B."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 3, n)
    return hard + effect + rng.normal(0, 1, n), hard + rng.normal(0, 1, n)


def test_against_one_written_out() -> None:
    a, b = pairs(80, 0.3, 1)
    found = compare_paired(a, b, resamples=4000)
    low, high, p = written_out(a.tolist(), b.tolist(), 1500, 7)
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)
    assert found.p == pytest.approx(p, abs=0.04)
    assert found.wins == np.mean(a > b)


def test_against_the_formula_of_a_mean() -> None:
    a, b = pairs(400, 0.1, 2)
    found, spread = compare_paired(a, b), (a - b).std(ddof=1) / 20
    assert found.low == pytest.approx(found.difference - 1.96 * spread, abs=0.1 * spread)
    assert found.high == pytest.approx(found.difference + 1.96 * spread, abs=0.1 * spread)
    z = abs(found.difference) / spread
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)


def test_a_resample_is_a_resample() -> None:
    values = np.arange(7.0)[:, None]
    drawn = bootstrap(values, np.ones_like(values), 20_000, seed=3)[:, 0]
    assert drawn.mean() == pytest.approx(3.0, abs=0.03)
    assert drawn.std() == pytest.approx(values.std() / math.sqrt(7), rel=0.03)
    assert (bootstrap(values, np.ones_like(values), 50, seed=3)[:, 0] == drawn[:50]).all()
    assert not (bootstrap(values, np.ones_like(values), 50, seed=4)[:, 0] == drawn[:50]).all()


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = unpaired = false = 0
    for seed in range(200):
        a, b = pairs(60, 0.5, seed)
        found = compare_paired(a, b, resamples=400, seed=seed)
        held += found.low <= 0.5 <= found.high
        rng = np.random.default_rng(seed)
        alone = compare_paired(a, rng.permutation(b), resamples=400, seed=seed)  # control: pairs taken apart
        unpaired += alone.high - alone.low > 2 * (found.high - found.low)
        same, other = pairs(60, 0.0, 1000 + seed)
        false += compare_paired(same, other, resamples=400, seed=seed).p < 0.05
    assert 0.89 <= held / 200 <= 0.98
    assert false / 200 <= 0.11  # where there is no difference, one in twenty seems to be one
    assert unpaired > 195  # it would need many times the documents


def test_a_ratio_of_sums() -> None:
    """Bits per byte: a long document counts more than a short one."""
    bits, size = np.array([[10.0, 20.0], [300.0, 200.0]]), np.array([[10.0, 10.0], [100.0, 100.0]])
    found = compare_paired(bits[:, 0], bits[:, 1], size, higher_is_better=False, resamples=200)
    assert (found.a, found.b) == pytest.approx((310 / 110, 220 / 110))
    assert found.wins == 0.5  # lower is better: A wins the first, B the second
    low, high = interval(bits[:, 0], size[:, 0])
    assert low == pytest.approx(1.0) and high == pytest.approx(3.0)
    assert math.isnan(interval(bits[:1, 0], size[:1, 0])[0])


def results(values: dict[str, list[float]], kind: str = "tasks") -> Results:
    items = [
        Item(str(i), task, {"acc": value}, {"group": "all of them"})
        for task, of_task in values.items()
        for i, value in enumerate(of_task)
    ]
    scores = [Score(task, "acc", mean(v), len(v), higher_is_better=True) for task, v in values.items()]
    return Results(kind, [FACTS], {}, scores, items)  # type: ignore[arg-type]


def test_by_task_and_by_group() -> None:
    a = results({"x": [1, 1, 0, 1], "y": [0, 0, 1]})
    b = results({"x": [0, 1, 0], "y": [1, 0, 1], "z": [1]})
    found = {one.task: one for one in compare_results(a, b, resamples=100)}
    assert set(found) == {"x", "y", "all of them"}
    assert found["x"].documents == 3 and found["x"].a == pytest.approx(2 / 3) and found["x"].b == pytest.approx(1 / 3)
    assert found["all of them"].documents == 6 and found["all of them"].difference == pytest.approx(0)


def test_by_language() -> None:
    def of(factor: float) -> Results:
        items = [
            Item(
                str(i),
                "f",
                {"nats": factor * (1 + i), "bytes": 10.0, "tokens": 5.0},
                {"language": "ko" if i % 2 else "en"},
            )
            for i in range(8)
        ]
        return Results("perplexity", [FACTS], {}, [], items)

    found = compare_results(of(1.0), of(2.0), resamples=100)
    assert [one.task for one in found] == ["f", "language en", "language ko"]
    assert all(one.metric == "bits_per_byte" and one.difference < 0 and one.wins == 1.0 for one in found)


def test_what_cannot_be_compared() -> None:
    a = results({"x": [1, 0]})
    with pytest.raises(MoaiError, match="no document is in both"):
        compare_results(a, results({"y": [1, 0]}))
    with pytest.raises(MoaiError, match="cannot be compared"):
        compare_results(a, results({"x": [1, 0]}, "perplexity"))
    with pytest.raises(MoaiError, match="too few"):
        compare_paired(np.ones(1), np.zeros(1))
