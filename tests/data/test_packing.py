"""Packing: nothing lost, nothing that fits is cut, rows nearly full, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.data.packing import pack_best_fit


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 17))
def test_every_token_is_in_exactly_one_row(lengths: list[int], capacity: int) -> None:
    packing = pack_best_fit(np.array(lengths), capacity)
    seen = {}
    for document, start, length in zip(packing.document, packing.start, packing.length):
        for token in range(start, start + length):
            assert (document, token) not in seen
            seen[document, token] = True
    assert len(seen) == sum(lengths) and packing.dropped_tokens == 0
    for a, b in zip(packing.row_starts, packing.row_starts[1:]):
        assert 0 < packing.length[a:b].sum() <= capacity
    pieces = np.bincount(packing.document, minlength=len(lengths))
    assert all(pieces[i] == -(-length // capacity) for i, length in enumerate(lengths))  # what fits is one piece
    assert packing.row_starts[-1] == len(packing.document)


def test_it_is_deterministic_and_nearly_full() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1.3, 20_000).astype(int) + 1, 50_000)
    first, second = pack_best_fit(lengths, 2048), pack_best_fit(lengths, 2048)
    assert all(
        np.array_equal(getattr(first, n), getattr(second, n)) for n in ("row_starts", "document", "start", "length")
    )
    assert first.efficiency > 0.999
    row, used = 1, 0  # control: next fit, in the order of the documents
    for length in np.concatenate([np.full(n // 2048, 2048).tolist() + [n % 2048] for n in lengths]):
        row, used = (row + 1, length) if used + length > 2048 else (row, used + length)
    assert lengths.sum() / (row * 2048) < 0.9


def test_truncation_keeps_beginnings_and_counts_the_rest() -> None:
    packing = pack_best_fit(np.array([3, 25, 0, 10]), 10, "truncate")
    assert sorted(zip(packing.document, packing.start, packing.length)) == [(0, 0, 3), (1, 0, 10), (3, 0, 10)]
    assert packing.dropped_tokens == 15


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing(lengths: list[int]) -> None:
    assert len(pack_best_fit(np.array(lengths, dtype=np.int64), 8)) == 0
