"""Packing: nothing lost that is not counted, nothing that fits is cut, rows nearly full, the same every time.

Among the cases are those in which other packers went wrong: a capacity of 2^k + 1 packed nothing (trl#3887), what
overflowed was thrown away (trl#4554, trl#4632), time grew with the square of the documents (LLaMA-Factory's greedy
knapsack).
"""

from __future__ import annotations

import time
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.data.bins import best_fit, best_fit_reference, next_fit, sort_by
from moai_llm.data.packing import CUTS, MOST_TOKENS, STRATEGIES, Packing, pack
from moai_llm.recipe import OverlongName, PackingName
from moai_llm.runtime import MoaiError

NAMES = list(STRATEGIES)
LENGTHS = st.lists(st.integers(0, 40), min_size=0, max_size=60)


def check(packing: Packing, lengths: list[int], whole: bool = True) -> None:
    """Every token is in one row or counted as lost; rows hold at most the capacity; with `whole` what fits is whole."""
    seen = set()
    for document, start, length in zip(packing.document, packing.start, packing.length):
        assert length > 0
        tokens = {(int(document), token) for token in range(start, start + length)}
        assert not tokens & seen and start + length <= lengths[document]
        seen |= tokens
    assert len(seen) + packing.dropped_tokens == sum(lengths)
    assert packing.row_starts[0] == 0 and packing.row_starts[-1] == len(packing.document)
    for a, b in zip(packing.row_starts, packing.row_starts[1:]):
        assert 0 < packing.length[a:b].sum() <= packing.capacity
    pieces, kept = (np.bincount(packing.document, weights, len(lengths)) for weights in (None, packing.length))
    given = np.array(lengths, dtype=np.int64)
    if whole:
        assert (pieces[(given > 0) & (given <= packing.capacity)] == 1).all()
        assert packing.cut_documents <= (given > packing.capacity).sum()
    assert packing.cut_documents == ((pieces > 1) | (kept > 0) & (kept < given)).sum()
    assert packing.dropped_documents == ((given > 0) & (kept == 0)).sum()


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("overlong", CUTS)
@pytest.mark.parametrize("strategy", NAMES)
@given(lengths=LENGTHS, capacity=st.integers(1, 17))
def test_no_token_is_lost_uncounted(strategy: str, overlong: str, lengths: list[int], capacity: int) -> None:
    packing = pack(np.array(lengths, dtype=np.int64), capacity, strategy, overlong)
    check(packing, lengths, whole=strategy != "concat")
    long = np.array([n for n in lengths if n > capacity], dtype=np.int64)
    assert packing.dropped_tokens == {"split": 0, "truncate": (long - capacity).sum(), "drop": long.sum()}[overlong]
    assert packing.dropped_documents == (len(long) if overlong == "drop" else 0)


@pytest.mark.parametrize(
    ("spoil", "what"), [(lambda p: p.length[:-1], "a token"), (lambda p: p.length + 40, "the capacity")]
)
def test_controls_a_wrong_packing_is_seen(spoil, what: str) -> None:  # type: ignore[no-untyped-def]
    lengths = [5, 9, 3, 12, 7]
    good = pack(np.array(lengths), 16)
    check(good, lengths)
    length = spoil(good)
    n = len(length)
    bad = Packing(np.minimum(good.row_starts, n), good.document[:n], good.start[:n], length, 16, good.lengths)
    with pytest.raises(AssertionError):
        check(bad, lengths)
        assert bad.dropped_tokens == 0


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 130), st.integers(0, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_the_compiled_best_fit_is_the_readable_one(capacity: int, n: int, seed: int, sort: bool) -> None:
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, n)
    lengths = -np.sort(-lengths) if sort else lengths
    assert np.array_equal(best_fit(lengths, capacity), best_fit_reference(lengths, capacity))


def test_the_reference_is_best_fit() -> None:
    """Against a scan over all bins: each length goes where the least space stays free."""
    lengths, capacity = np.random.default_rng(1).integers(1, 31, 200), 30
    free: list[int] = []
    for size, into in zip(lengths.tolist(), best_fit_reference(lengths, capacity).tolist()):
        fitting = [space for space in free if space >= size]
        if not fitting:
            assert into == len(free)
            free.append(capacity)
        assert free[into] == min(fitting, default=capacity)
        free[into] -= size


def test_sorting_by_counting() -> None:
    keys = np.random.default_rng(0).integers(0, 50, 999)
    order, starts = sort_by(keys, 50)
    assert np.array_equal(order, np.argsort(keys, kind="stable"))
    assert np.array_equal(starts, np.searchsorted(keys[order], np.arange(51)))


def test_next_fit_is_in_order() -> None:
    assert next_fit(np.array([3, 4, 2, 8, 1, 7]), 8).tolist() == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("capacity", [2**k + 1 for k in range(1, 12)] + [2, 3, 1000, 1024])
def test_capacities_around_powers_of_two(strategy: str, capacity: int) -> None:
    """trl#3887: such a capacity packed nothing."""
    lengths = np.random.default_rng(capacity).integers(1, min(capacity, 60) + 1, 400)
    packing = pack(lengths, capacity, strategy)
    check(packing, lengths.tolist(), whole=strategy != "concat")
    if strategy in ("best-fit", "balanced") and capacity >= 257:
        assert len(packing) <= -(-lengths.sum() // capacity) + 1


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize(
    "lengths",
    [[], [0], [0, 0], [8], [7], [9], [8, 8], [1] * 50, [0, 8, 0, 1, 16, 17], [8, 9, 7], [4] * 11, [100], [1, 100, 1]],
    ids=str,
)
def test_edges(strategy: str, lengths: list[int]) -> None:
    for overlong in CUTS:
        packing = pack(np.array(lengths, dtype=np.int64), 8, strategy, overlong)
        check(packing, lengths, whole=strategy != "concat")
    if lengths == [1] * 50:
        assert len(pack(np.array(lengths), 8, strategy)) == (50 if strategy == "none" else 7)
    if lengths == [8, 8]:
        assert len(packing) == 2


def test_what_each_strategy_makes() -> None:
    lengths = np.array([3, 5, 9, 2, 4])

    def rows(strategy: str, overlong: str = "split") -> list[list[tuple[int, int, int]]]:
        p = pack(lengths, 8, strategy, overlong)
        pieces = list(zip(p.document.tolist(), p.start.tolist(), p.length.tolist()))
        return [pieces[a:b] for a, b in zip(p.row_starts, p.row_starts[1:])]

    assert rows("best-fit") == [[(2, 0, 8)], [(1, 0, 5), (0, 0, 3)], [(4, 0, 4), (3, 0, 2), (2, 8, 1)]]
    assert rows("next-fit") == [[(0, 0, 3), (1, 0, 5)], [(2, 0, 8)], [(2, 8, 1), (3, 0, 2), (4, 0, 4)]]
    assert rows("none", "truncate") == [[(0, 0, 3)], [(1, 0, 5)], [(2, 0, 8)], [(3, 0, 2)], [(4, 0, 4)]]
    assert rows("concat") == [[(0, 0, 3), (1, 0, 5)], [(2, 0, 8)], [(2, 8, 1), (3, 0, 2), (4, 0, 4)]]
    assert rows("concat", "drop") == [[(0, 0, 3), (1, 0, 5)], [(3, 0, 2), (4, 0, 4)]]
    assert pack(np.array([5, 5, 5]), 8, "concat").cut_documents == 1  # 0-4 | 5-7, 8-9 | 10-14
    assert sorted(map(sorted, rows("balanced"))) == sorted(map(sorted, rows("best-fit")))


def test_concat_leaves_no_gap() -> None:
    lengths = np.random.default_rng(0).integers(0, 70, 200)
    packing = pack(lengths, 33, "concat")
    assert len(packing) == -(-lengths.sum() // 33) and packing.cut_documents > 100


def lognormal(n: int) -> np.ndarray:
    return np.minimum(np.random.default_rng(0).lognormal(5, 1.3, n).astype(np.int64) + 1, 50_000)


@pytest.mark.parametrize("strategy", ["best-fit", "balanced"])
def test_it_is_deterministic_and_nearly_full(strategy: str) -> None:
    lengths = lognormal(20_000)
    first, second = pack(lengths, 2048, strategy), pack(lengths, 2048, strategy)
    assert all(
        np.array_equal(getattr(first, n), getattr(second, n)) for n in ("row_starts", "document", "start", "length")
    )
    assert first.efficiency > 0.999 and len(first) <= len(pack(lengths, 2048))
    assert pack(lengths, 2048, "next-fit").efficiency < 0.9  # control


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_balanced_takes_no_more_rows_than_best_fit(lengths: list[int]) -> None:
    assert len(pack(np.array(lengths), 64, "balanced")) <= len(pack(np.array(lengths), 64))


def test_levels_mix_short_documents() -> None:
    """Best-fit decreasing makes rows of equal lengths out of short documents, the levels do not."""
    lengths = np.random.default_rng(0).integers(4, 60, 20_000)

    def spread(strategy: str) -> float:
        p = pack(lengths, 2048, strategy)
        rows = [np.percentile(p.length[a:b], (25, 75)) for a, b in zip(p.row_starts, p.row_starts[1:])]
        return float(np.mean(np.diff(rows)))

    assert spread("balanced") > 4 * spread("best-fit")


@pytest.mark.parametrize("kind", ["equal", "ones", "two sizes", "mixed"])
@pytest.mark.parametrize("strategy", NAMES)
def test_time_does_not_grow_with_the_square(strategy: str, kind: str) -> None:
    """A greedy knapsack over a list needs hours for 300,000 equal documents."""
    n = 300_000
    lengths = {
        "equal": np.full(n, 700), "ones": np.ones(n, np.int64), "two sizes": np.where(np.arange(n) % 2, 1500, 900),
        "mixed": lognormal(n),
    }[kind]  # fmt: skip
    pack(lengths[:10], 2048, strategy)  # compiled
    start = time.process_time()
    pack(lengths, 2048, strategy)
    assert time.process_time() - start < 2


def test_counts_are_shown() -> None:
    lengths = np.array([3, 25, 0, 10, 11])
    cut, dropped, split = (pack(lengths, 10, overlong=way) for way in ("truncate", "drop", "split"))
    assert cut.summary() == "4 rows of 10 tokens, 82.5% full; 2 of 5 documents are cut; 16 tokens are lost"
    assert dropped.summary() == "2 rows of 10 tokens, 65.0% full; 2 of 5 documents are dropped; 36 tokens are lost"
    assert "; 2 of 5 documents are cut" in split.summary() and "lost" not in split.summary()
    assert cut.costs().tolist() == [100, 100, 100, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3], 8, "bestfit"), "no packing 'bestfit'.*did you mean 'best-fit'"),
        (([3], 8, "best-fit", "truncated"), "did you mean 'truncate'"),
        (([3], 0), "a row has 1 to"),
        (([3], MOST_TOKENS + 1), "a row has 1 to"),
        (([3, -2], 8), "document 1 has -2 tokens"),
    ],
)
def test_mistakes(arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(MoaiError, match=message):
        pack(np.array(arguments[0]), *arguments[1:])


def test_the_recipe_knows_the_names() -> None:
    assert get_args(PackingName) == tuple(STRATEGIES) and get_args(OverlongName) == tuple(CUTS)
