"""Quotas: no source is ever a row off its share, and any position can be entered without those before it."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.data.mixing import Quotas
from moai_llm.runtime import MoaiError

weights = st.one_of(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=12),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.lists(st.sampled_from([1.0, 1.0, 0.5, 1e-3]), min_size=1, max_size=30),
)


def errors(source: np.ndarray, start: int, counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How far each source is from its share after each position."""
    after = counts + np.cumsum(source[:, None] == np.arange(len(shares)), axis=0)
    return np.abs(after - np.outer(np.arange(start + 1, start + len(source) + 1), shares))


def bound(sources: int) -> float:
    return 1 - 1 / max(2, 2 * sources - 2) + 1e-6


@settings(max_examples=80, deadline=None)
@given(weights, st.data())
def test_no_source_is_a_row_off_at_any_prefix(chosen: list[float], data: st.DataObject) -> None:
    shares = np.array(chosen) / sum(chosen)
    source, index = Quotas(chosen).locate(0, 400)
    assert errors(source, 0, np.zeros(len(shares)), shares).max() <= bound(len(shares)) < 1
    for number in range(len(shares)):
        assert np.array_equal(index[source == number], np.arange((source == number).sum()))  # each row once, in order
    start = data.draw(st.integers(0, 400))
    late, place = Quotas(chosen).locate(start, 400 - start)  # entered there, by a mixture that was nowhere before
    assert np.array_equal(late, source[start:]) and np.array_equal(place, index[start:])


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 10**9))
def test_far_positions_keep_the_bound_and_join(chosen: list[float], start: int) -> None:
    shares = np.array(chosen) / sum(chosen)
    quotas = Quotas(chosen)
    counts = quotas.counts(start)
    assert counts.sum() == start
    source, index = quotas.locate(start, 300)
    # 1e-6: what float64 leaves of a share times 1e9
    assert errors(source, start, counts, shares).max() <= bound(len(shares))
    assert np.array_equal(index[:1], counts[source[:1]])
    middle, _ = Quotas(chosen).locate(start + 100, 200)
    assert np.array_equal(middle, source[100:])


def test_control_random_draws_are_off_by_many_rows() -> None:
    shares = np.array([0.7, 0.3])
    drawn = np.random.default_rng(0).choice(2, 3000, p=shares)
    assert errors(drawn, 0, np.zeros(2), shares).max() > 5


def test_two_sources_are_half_a_row_off_at_most() -> None:
    source, _ = Quotas([2, 1]).locate(0, 9)
    assert source.tolist() == [0, 1, 0] * 3
    source, _ = Quotas([0.123456789, 0.876543211]).locate(10**8, 5000)
    shares = np.array([0.123456789, 0.876543211])
    assert errors(source, 10**8, Quotas([0.123456789, 0.876543211]).counts(10**8), shares).max() <= 0.5 + 1e-6


def test_weights_are_read_as_they_are_written() -> None:
    """0.1 is a tenth and not the nearest binary fraction, so the mixture repeats after ten rows for ever."""
    assert Quotas([0.1, 0.2, 0.7]).counts(10**15).tolist() == [10**14, 2 * 10**14, 7 * 10**14]
    source, _ = Quotas([0.1, 0.2, 0.7]).locate(10**15, 40)
    assert np.array_equal(source.reshape(4, 10), np.tile(source[:10], (4, 1)))


def test_entering_far_away_is_quick() -> None:
    """Also with many sources and a small one, at places where its row has waited long."""
    rng = random.Random(0)
    quotas = Quotas([*(rng.random() for _ in range(40)), 1e-4])
    quotas.locate(0, 1)  # compiled by now
    began = time.process_time()
    for _ in range(20):
        quotas.counts(rng.randrange(10**9, 2 * 10**9))
    assert (time.process_time() - began) / 20 < 0.1


@pytest.mark.parametrize("wrong", [[1, 0], [1, -1], [float("nan")], [1, float("inf")]])
def test_impossible_weights(wrong: list[float]) -> None:
    with pytest.raises(MoaiError, match="positive numbers"):
        Quotas(wrong)


def test_a_share_that_would_never_be_read() -> None:
    with pytest.raises(MoaiError, match=r"a share of 1.0e-09 is less than one row in 10,000,000: leave that source"):
        Quotas([1, 1e-9])
