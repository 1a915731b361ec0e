"""Orders that are pure functions."""

from __future__ import annotations

import numpy as np
import pytest

from moai_llm.data.order import permute, permute_reference


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permutations(size: int) -> None:
    shuffled = permute(np.arange(size), size, key=5)
    assert sorted(shuffled) == list(range(size))
    assert np.array_equal(shuffled[2:5], permute(np.arange(size)[2:5], size, key=5))  # pointwise, no state
    if size > 60:
        assert not np.array_equal(shuffled, permute(np.arange(size), size, key=6))
        assert np.abs(np.corrcoef(np.arange(size), shuffled)[0, 1]) < 0.3


@pytest.mark.parametrize("size", [1, 2, 5, 63, 1000, 10**6 + 3, 2**40 + 1])
@pytest.mark.parametrize("key", [0, 7, -3, 2**70 + 1])
def test_compiled_equals_reference(size: int, key: int) -> None:
    index = np.linspace(0, size - 1, 50).astype(np.int64)
    assert np.array_equal(permute(index, size, key), permute_reference(index, size, key))
