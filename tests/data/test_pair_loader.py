"""The loader of pairs: a pure function of the step, pairs that are never apart, every token counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moai_llm.data.pair_loader import PairLoader
from moai_llm.data.preference import Pairs
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer


def prepare_pairs(folder: Path, tokenizer: Tokenizer, count: int = 24, name: str = "pairs") -> Store:
    """Polite answers are better than rude ones; lengths vary."""
    file = folder / f"{name}.jsonl"
    lines = [
        {
            "prompt": f"interest on deposit {i}? " * (1 + i % 2),
            "chosen": f"Paid: {i}." + " The quick fox." * (i % 4),
            "rejected": f"lazy dog {i}." + " and some" * (i % 5),
        }
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare([file], tokenizer, folder / name, kind="preference")
    return Store(folder / name)


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> Store:
    return prepare_pairs(tmp_path, tokenizer)


def test_rows_are_a_pure_function_of_their_number(store: Store) -> None:
    together = PairLoader(store, 256, seed=3).rows(5, 12)
    apart = [PairLoader(store, 256, seed=3).rows(5 + i, 1) for i in range(12)]
    assert all(torch.equal(together[key], torch.cat([row[key] for row in apart])) for key in together)
    assert not torch.equal(together["pairs"], PairLoader(store, 256, seed=4).rows(5, 12)["pairs"])  # control


@pytest.mark.parametrize("packing", ["best-fit", "balanced", "next-fit", "none"])
def test_an_epoch_holds_every_pair_once_and_whole(store: Store, packing: str) -> None:
    loader, pairs = PairLoader(store, 256, packing=packing, step_rows=2), Pairs(store)
    seen = []
    for batch in [loader.rows(i, 1) for i in range(len(loader))]:
        row = {key: tensor[0].numpy() for key, tensor in batch.items()}
        held = row["pairs"][row["pairs"] >= 0].tolist()
        assert row["pairs"].tolist() == [*held, *[-1] * (loader.most - len(held))]
        seen += held
        for k, number in enumerate(held):
            pair = pairs[number]
            for side, (ids, learn) in enumerate(
                ((pair.chosen, pair.chosen_learn), (pair.rejected, pair.rejected_learn))
            ):
                here = row["seq_idx"] == 2 * k + side
                assert np.array_equal(row["input_ids"][here], ids)
                assert np.array_equal(row["labels"][here], np.where(learn, ids.astype(int), -100))
                assert np.array_equal(row["position_ids"][here], np.arange(len(ids)))
        padding = row["seq_idx"] == 2 * len(held)
        assert (row["input_ids"][padding] == loader.pad_id).all() and (row["labels"][padding] == -100).all()
    assert sorted(seen) == list(range(len(pairs)))
    assert loader.packing.summary().endswith("full") and loader.packing.dropped_tokens == 0


def test_pairs_share_rows(store: Store) -> None:
    assert len(PairLoader(store, 256)) < len(store) // 4 and len(PairLoader(store, 256, packing="none")) == 24


def test_pairs_longer_than_a_row(store: Store) -> None:
    lengths = store.lengths().reshape(-1, 2)
    size = int(np.quantile(lengths.sum(1), 0.6))
    long = lengths.sum(1) > size
    loader = PairLoader(store, size)
    assert loader.packing.cut_documents + loader.packing.dropped_documents == long.sum()
    assert (loader.kept.sum(1) <= size).all() and (loader.kept[~long] == lengths[~long]).all()
    cut = long & (loader.kept.sum(1) > 0)
    assert (loader.kept[cut].sum(1) == size).all()  # no more than needed
    assert f"{loader.packing.cut_documents} of 24 pairs are cut" in loader.packing.summary()
    for i in range(len(loader)):  # what is left of both answers can be compared
        row = loader.row(i)
        for document in range(2 * int((row["pairs"] >= 0).sum())):
            assert (row["labels"][row["seq_idx"] == document] != -100).any()
    dropped = PairLoader(store, size, overlong="drop")
    assert dropped.packing.dropped_documents == long.sum() and dropped.packing.cut_documents == 0
    assert f"{long.sum()} of 24 pairs are dropped" in dropped.packing.summary()


def test_a_prompt_that_fills_the_row_leaves_nothing_to_compare(store: Store) -> None:
    with pytest.raises(MoaiError, match="no pair fits into a row of 16 tokens: raise data.seq_len"):
        PairLoader(store, 16)


def test_what_would_cut_pairs_apart(store: Store, tmp_path: Path, tokenizer: Tokenizer, text_file: Path) -> None:
    with pytest.raises(MoaiError, match="data.packing=concat would cut pairs of answers apart"):
        PairLoader(store, 64, packing="concat")
    with pytest.raises(MoaiError, match="data.overlong=split would cut pairs"):
        PairLoader(store, 64, overlong="split")
    prepare([text_file], tokenizer, tmp_path / "text")
    with pytest.raises(MoaiError, match="holds text, not preference pairs"):
        PairLoader(Store(tmp_path / "text"), 64)


def test_evaluation_order(store: Store) -> None:
    loader = PairLoader(store, 256, seed=None)
    rows = torch.cat([batch["pairs"] for batch in loader.epoch(2)])
    assert torch.equal(rows, torch.stack([loader.row(i)["pairs"] for i in range(len(loader))]))
    assert sum(len(batch["pairs"]) for batch in loader.epoch(2, limit=3)) == 3
