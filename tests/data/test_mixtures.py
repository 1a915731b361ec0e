"""Several stores and stages in one loader: a pure function of seed and step, whoever reads which part of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moai_llm.data.ahead import Ahead
from moai_llm.data.loader import Batch, Loader, Source, Stage
from moai_llm.data.shards import Part, Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.data.test_rows import make_store

STEP = 4


@pytest.fixture
def stores(tmp_path: Path, tokenizer: Tokenizer) -> list[Store]:
    """Text, conversations, and a larger text."""
    kinds = (("text", 1), ("chat", 1), ("text", 5))
    return [
        make_store(tmp_path / str(i), tokenizer, kind, seed=i, repeat=repeat)  # type: ignore[arg-type]
        for i, (kind, repeat) in enumerate(kinds)
    ]


def mixed(stores: list[Store], *weights: float, **end: float) -> Stage:
    return Stage([Source(store, weight) for store, weight in zip(stores, weights)], **end)


def staged(stores: list[Store], seed: int = 3) -> Loader:
    stages = [mixed(stores, 0.5, 0.2, 0.3, until=3000.0), mixed(stores[1:], 0.3, 0.7, epochs=1.0), mixed(stores, 1, 1)]
    return Loader(stages, 50, seed, step_rows=STEP)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def keys(batch: Batch) -> list[bytes]:
    return [row.numpy().tobytes() for row in batch["input_ids"]]


def sources_of(loader: Loader, batch: Batch) -> list[int]:
    """Which store each row comes from, by its tokens."""
    known = {
        row["input_ids"].numpy().tobytes(): number
        for number, first in enumerate(loader._borders[:-1])
        for row in (loader.row(i) for i in range(int(first), int(loader._borders[number + 1])))
    }
    return [known[key] for key in keys(batch)]


def test_any_step_is_a_pure_function_of_its_number(stores: list[Store]) -> None:
    loader = staged(stores)
    steps = [loader.step(i) for i in range(70)]
    assert loader.stage(0) == 0 and loader.stage(69) == 2
    for i in (0, 13, 14, 15, 16, 41, 69, 2):  # in any order, and from a loader that was nowhere before
        assert equal(loader.step(i), steps[i]) and equal(staged(stores).step(i), steps[i])
    assert equal(loader.rows(5, 110), {key: torch.cat([step[key] for step in steps])[5:115] for key in steps[0]})
    assert not equal(staged(stores, seed=4).step(13), steps[13])  # control


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_step(stores: list[Store], world: int) -> None:
    loader = staged(stores)
    for number in (0, 14, 15, 40):
        whole = loader.step(number)
        parts = [staged(stores).step(number, rank, world) for rank in range(world)]
        for key, tensor in whole.items():
            assert torch.equal(torch.stack([part[key] for part in parts], 1).reshape(tensor.shape), tensor)


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (1, 5), (3, 2)])
def test_workers_change_nothing(stores: list[Store], workers: int, prefetch: int) -> None:
    truth = [staged(stores).step(i) for i in range(10, 40)]
    with Ahead(staged(stores).step, 10, 40, workers=workers, prefetch=prefetch) as batches:
        assert all(equal(a, b) for a, b in zip(batches, truth, strict=True))


def test_shares_are_kept_in_every_stage(stores: list[Store]) -> None:
    loader = staged(stores)
    spans = loader.curriculum.spans
    assert spans[0].last == 60 and (spans[1].last or 0) % STEP == 0  # 3,000 tokens are 60 rows of 50
    for span, shares in zip(spans, ({0: 0.5, 1: 0.2, 2: 0.3}, {1: 0.3, 2: 0.7})):
        assert span.last is not None
        counted = Counter(sources_of(loader, loader.rows(span.first, span.last - span.first)))
        for number, share in shares.items():
            assert abs(counted[number] - share * (span.last - span.first)) < 1
        assert set(counted) == set(shares)
    assert loader.curriculum.read(60).tolist() == [30, 12, 18]


def test_a_stage_goes_on_where_the_one_before_left_a_store(stores: list[Store]) -> None:
    """Nothing is read twice before all of it was read once."""
    large = stores[2]
    rows = len(Loader(large, 50))
    stages = [
        mixed([large], 1, until=50.0 * STEP * 3),
        mixed([stores[0], large], 1, 1, until=50.0 * STEP * 7),
        mixed([large], 1),
    ]
    loader = Loader(stages, 50, step_rows=STEP)
    position = next(n for n in range(10_000) if loader.curriculum.read(n)[0] == rows)
    read = [
        key
        for key, number in zip(*(lambda b: (keys(b), sources_of(loader, b)))(loader.rows(0, position)))
        if number == 0
    ]
    assert len(read) == rows == len(set(read))


def test_one_store_after_the_other_each_once(stores: list[Store]) -> None:
    stages = [mixed([store], 1, epochs=1.0) for store in (stores[0], stores[2])]
    loader = Loader(stages, 50, step_rows=1)
    sizes = [len(Loader(store, 50)) for store in (stores[0], stores[2])]
    assert len(loader) == loader.end == sum(sizes)
    read = loader.rows(0, len(loader))
    assert sources_of(loader, read) == [0] * sizes[0] + [1] * sizes[1]
    assert len(set(keys(read))) == len(loader)
    assert len(Loader(stages, 50, step_rows=STEP)) == sum(-(-size // STEP) * STEP for size in sizes)  # to whole steps


def test_stores_without_weights_are_read_alike(stores: list[Store]) -> None:
    loader = Loader([Stage([Source(store) for store in stores])], 50)
    sizes = [len(rows) for rows in loader.sources]
    assert loader.curriculum.read(sum(sizes)).tolist() == sizes
    assert len(set(keys(loader.rows(0, sum(sizes))))) == sum(sizes) == len(loader)


def test_conversations_in_a_mixture_keep_their_masks(stores: list[Store]) -> None:
    loader = Loader([mixed(stores, 1, 1)], 200, step_rows=STEP)
    batch = loader.rows(0, 6)
    for row, number in enumerate(sources_of(loader, batch)):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        inside = (ids != loader.pad_id) & (batch["position_ids"][row] > 0)
        learned = int((labels[inside] != -100).sum())
        assert learned == inside.sum() if number == 0 else 0 < learned < inside.sum()


def test_a_store_of_stores_multiplies_its_weight_out(stores: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    merged = Store(stores[0].path)
    monkeypatch.setattr(merged, "parts", lambda: [Part(stores[0], 0.25), Part(stores[1], 0.75)])
    loader = Loader([Stage([Source(merged, 0.8), Source(stores[2], 0.2)])], 50)
    assert loader.curriculum.quotas[0].shares == pytest.approx([0.2, 0.6, 0.2])
    alone = Loader(merged, 50, seed=None)
    assert len(list(alone.epoch(1))) == len(alone) == len(Loader(stores[0], 50)) + len(Loader(stores[1], 50))
    assert len(alone.packing) == len(alone) and alone.packing.lengths.sum() == sum(
        s.manifest.tokens for s in stores[:2]
    )
    again = Loader([Stage([Source(merged, 1), Source(stores[1], 1)])], 50)  # one of its parts a second time
    assert again.curriculum.quotas[0].shares == pytest.approx([0.125, 0.875])


def test_evaluation_reads_all_sources_in_order(stores: list[Store]) -> None:
    loader = Loader([mixed(stores, 1, 1, 1)], 50, seed=None)
    read = loader.rows(0, len(loader))
    assert sources_of(loader, read) == sorted(sources_of(loader, read))
    assert equal(read, {key: torch.cat([batch[key] for batch in loader.epoch(7)]) for key in read})


def test_balanced_steps_of_one_store_after_the_other(stores: list[Store]) -> None:
    stages = [mixed([stores[2]], 1, until=50.0 * STEP * 5), mixed([stores[0]], 1, epochs=1.0), mixed([stores[2]], 1)]
    loader = Loader(stages, 50, packing="balanced", step_rows=STEP)
    alone = Loader(stores[2], 50, packing="balanced", step_rows=STEP)
    later = (loader.curriculum.spans[2].first) // STEP
    assert equal(loader.step(later), alone.step(5))
    with pytest.raises(MoaiError, match="steps of a mixture hold rows of several: use best-fit, or one store after"):
        Loader([mixed(stores, 1, 1)], 50, packing="balanced", step_rows=STEP)


def test_wrong_mixtures_say_what_to_do(stores: list[Store], tmp_path: Path) -> None:
    from moai_llm.tokenizer.train import train_tokenizer

    other = make_store(tmp_path / "other", train_tokenizer(["other words in this text " * 20], 270))
    with pytest.raises(MoaiError, match=f"other was prepared with another tokenizer.*--tokenizer {stores[0].path}"):
        Loader([mixed([stores[0], other], 1, 1)], 50)
    with pytest.raises(MoaiError, match="data.stages.1 ends with 3,000 tokens .*`until` counts from the beginning"):
        Loader([mixed(stores, 1, until=3000.0), mixed(stores, 1, until=2999.0)], 50)


def test_what_must_not_change_is_in_the_identity(stores: list[Store]) -> None:
    def identity(*stages: Stage) -> object:
        return Loader(list(stages), 50, step_rows=STEP).identity

    assert identity(mixed(stores, 1)) == stores[0].fingerprint
    first = identity(mixed(stores, 1, 2))
    assert first == identity(mixed(stores, 0.5, 1.0))
    different = (
        [mixed(stores, 1, 3)],
        [mixed(stores[::-1], 1, 2)],
        [mixed(stores, 1, 2, until=3000.0), mixed(stores, 1)],
    )
    assert all(first != identity(*stages) for stages in different)


def test_random_draws_of_numpy_and_torch_do_not_matter(stores: list[Store]) -> None:
    loader = staged(stores)
    first = loader.step(3)
    np.random.seed(5)
    torch.manual_seed(5)
    assert equal(staged(stores).step(3), first)
