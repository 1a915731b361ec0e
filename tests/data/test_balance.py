"""HierarchicalBalancePacker: whole sequences, steps of equal attention cost, a pure function of its arguments."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moai_llm.data import HierarchicalBalancePacker
from moai_llm.data.balance import imbalance, rows_of_stream
from moai_llm.data.order import permute
from moai_llm.data.packing import pack
from moai_llm.runtime import MoaiError


def mixture(n: int, seed: int = 0) -> np.ndarray:
    """Lengths of chats, articles and a few books."""
    rng = np.random.default_rng(seed)
    chats, articles, books = rng.poisson(60, n // 2) + 1, rng.lognormal(6, 1, n // 3), rng.integers(2000, 8000, n // 9)
    return rng.permutation(np.concatenate([chats, np.minimum(articles.astype(np.int64) + 1, 8000), books]))


def test_every_sequence_is_in_one_bin() -> None:
    lengths = mixture(3000)
    steps = HierarchicalBalancePacker(8192, 8).pack(lengths)
    assert sorted(i for step in steps for bin in step for i in bin) == list(range(len(lengths)))
    assert all(len(step) == 8 for step in steps)
    assert all(lengths[bin].sum() <= 8192 for step in steps for bin in step)
    assert all(bin for step in steps[:-1] for bin in step)


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_attention_is_balanced(capacity: int) -> None:
    """At most 0.1 over at least 50 steps of 8 ranks, and not without the sort."""
    lengths = np.minimum(mixture(9000), capacity)
    packer = HierarchicalBalancePacker(capacity, 8)
    steps = packer.pack(lengths)
    costs = np.array([[float((lengths[bin].astype(float) ** 2).sum()) for bin in step] for step in steps])
    assert np.array_equal(costs, packer.costs())
    assert len(steps) >= 50 and imbalance(costs) <= 0.1 and packer.packing.efficiency >= 0.99
    plain = pack(lengths, capacity).costs()
    shuffled = np.random.default_rng(0).permutation(plain)[: len(plain) // 8 * 8].reshape(-1, 8)
    assert imbalance(shuffled) > 0.2  # control: best fit in random order


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_shares_a_step_evenly(ranks: int) -> None:
    """Rank r of W takes rows r, r + W, ...: even in each pass of one row a rank, and over the step."""
    packer = HierarchicalBalancePacker(2048, 64)
    packer.pack(np.minimum(mixture(9000), 2048))
    costs = packer.costs()[:-1].reshape(-1, 64 // ranks, ranks)
    assert len(costs) >= 15
    assert imbalance(costs.reshape(-1, ranks)) <= 0.05 and imbalance(costs.sum(axis=1)) <= 0.05
    in_blocks = packer.costs()[:-1].reshape(-1, ranks, 64 // ranks).sum(axis=2)  # control: the rows in one piece each
    assert imbalance(in_blocks) > 2 * imbalance(costs.sum(axis=1))


def test_steps_are_shuffled_by_the_seed_alone() -> None:
    lengths = mixture(3000)
    first, again, other = (HierarchicalBalancePacker(4096, 4, seed=seed).pack(lengths) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(map(str, first)) == sorted(map(str, other))  # the same steps in another order
    packer = HierarchicalBalancePacker(4096, 4)
    packer.pack(lengths)
    dearest = packer.costs().max(axis=1)[:-1]
    assert abs(np.corrcoef(np.arange(len(dearest)), dearest)[0, 1]) < 0.3  # neither dear nor cheap ones first


def test_sequences_and_lengths_are_the_same_thing() -> None:
    lengths = [5, 3, 8, 1, 0, 2]
    sequences = [list(range(n)) for n in lengths]
    results = [
        HierarchicalBalancePacker(8, 2).pack(given)
        for given in (lengths, sequences, np.array(lengths), [np.array(s) for s in sequences])
    ]
    assert all(result == results[0] for result in results)
    assert sorted(i for step in results[0] for bin in step for i in bin) == [0, 1, 2, 3, 5]  # the empty one is nowhere
    assert HierarchicalBalancePacker(8, 2).pack([]) == []
    assert HierarchicalBalancePacker(8, 3).pack([[1, 2]]) == [[[0], [], []]]


def test_long_sequences_are_counted() -> None:
    lengths = [5, 30, 8]
    cut = HierarchicalBalancePacker(8, 1)
    assert sorted(map(str, cut.pack(lengths))) == ["[[0]]", "[[1]]", "[[2]]"]
    assert (cut.packing.cut_documents, cut.packing.dropped_tokens) == (1, 22)
    dropping = HierarchicalBalancePacker(8, 1, overlong="drop")
    assert sorted(map(str, dropping.pack(lengths))) == ["[[0]]", "[[2]]"]
    assert (dropping.packing.dropped_documents, dropping.packing.dropped_tokens) == (1, 30)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HierarchicalBalancePacker(8, 0), "num_bins is the number of rows in a step"),
        (lambda: HierarchicalBalancePacker(0, 8), "a row has 1 to"),
        (lambda: HierarchicalBalancePacker(8, 8, overlong="split"), "cannot hold pieces.*truncate or drop"),
        (lambda: HierarchicalBalancePacker(8, 8, overlong="cut"), "choose split, truncate, drop"),
        (lambda: HierarchicalBalancePacker(8, 8).pack([3, [1, 2]]), "all lengths .* or all sequences"),
    ],
)
def test_mistakes(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MoaiError, match=message):
        make()


def test_the_measure() -> None:
    assert imbalance(np.array([[4, 4], [2, 2]])) == 0
    assert imbalance(np.array([[4, 2], [8, 8]])) == pytest.approx(0.125)
    assert imbalance(np.zeros((0, 8))) == 0 == imbalance(np.zeros((3, 8)))


def test_it_is_imported_without_torch() -> None:
    code = "import sys, moai_llm.data; assert 'numpy' not in sys.modules; moai_llm.data.HierarchicalBalancePacker; " \
           "assert 'torch' not in sys.modules"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import moai_llm.data

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moai_llm.data.nothing


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
