"""Orders that are pure functions: permutations, and the stream of epochs cut into steps."""

from __future__ import annotations

import numpy as np
import pytest

from moai_llm.data.balance import rows_of_stream
from moai_llm.data.order import permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permutations(size: int) -> None:
    shuffled = permute(np.arange(size), size, key=5)
    assert sorted(shuffled) == list(range(size))
    assert np.array_equal(shuffled[2:5], permute(np.arange(size)[2:5], size, key=5))  # pointwise, no state
    if size > 60:
        assert not np.array_equal(shuffled, permute(np.arange(size), size, key=6))
        assert np.abs(np.corrcoef(np.arange(size), shuffled)[0, 1]) < 0.3


@pytest.mark.parametrize("rows", [1, 3, 8, 29, 64])
@pytest.mark.parametrize("step", [1, 2, 5, 8, 40])
def test_the_stream(rows: int, step: int) -> None:
    """Every epoch is a permutation, and whole steps are groups of neighbours."""
    stream = rows_of_stream(np.arange(6 * rows), rows, seed=2, step=step)
    for epoch in stream.reshape(6, rows):
        assert sorted(epoch) == list(range(rows))
    for p in range(0, 6 * rows - 3, 7):  # pointwise, no state
        assert np.array_equal(stream[p : p + 3], rows_of_stream(np.arange(p, p + 3), rows, 2, step))
    for start in range(0, 6 * rows - step + 1, step):
        within = stream[start : start + step]
        if start // rows == (start + step - 1) // rows and rows > 2 * step:  # the step lies in one epoch
            assert np.array_equal(within, np.arange(within[0], within[0] + step))
        elif rows > 2 * step:  # the step lies across two: the last rows, which cost about the same
            assert within.min() >= rows - 2 * step
    if rows > 20 and step < 8:
        assert not np.array_equal(stream, rows_of_stream(np.arange(6 * rows), rows, 3, step))
        assert not np.array_equal(stream[:rows], stream[rows : 2 * rows])


def test_without_steps_the_stream_is_the_permutation() -> None:
    expected = np.concatenate([permute(np.arange(50), 50, 7 * 1_000_003 + epoch) for epoch in range(4)])
    assert np.array_equal(rows_of_stream(np.arange(200), 50, seed=7), expected)
