"""The loader: a pure function of the step, rows that mark their borders, targets that stay inside documents."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from moai_llm.data.balance import imbalance
from moai_llm.data.loader import Loader
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.recipe import PackingName
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer, text_file: Path) -> Store:
    prepare([text_file], tokenizer, tmp_path / "store")
    return Store(tmp_path / "store")


def test_rows_are_a_pure_function_of_their_number(store: Store) -> None:
    loader = Loader(store, 64, seed=3)
    together = loader.rows(5, 12)
    apart = [Loader(store, 64, seed=3).rows(5 + i, 1) for i in range(12)]
    assert all(torch.equal(together[key], torch.cat([row[key] for row in apart])) for key in together)
    assert not torch.equal(together["input_ids"], Loader(store, 64, seed=4).rows(5, 12)["input_ids"])


def test_an_epoch_holds_every_token_once_and_epochs_differ(store: Store) -> None:
    loader = Loader(store, 64)
    n = len(loader)
    first, second = (loader.rows(e * n, n)["input_ids"] for e in (0, 1))
    expected = np.bincount(np.concatenate([store.document(i) for i in range(len(store))]), minlength=512)
    for epoch in (first, second):
        counted = torch.bincount(epoch.flatten(), minlength=512).numpy()
        counted[loader.pad_id] = 0
        assert np.array_equal(counted, expected)
    assert not torch.equal(first, second)


def test_borders(store: Store, tokenizer: Tokenizer) -> None:
    loader = Loader(store, 64, seed=None)
    for i in range(len(loader)):
        row = {key: t.numpy() for key, t in loader.row(i).items()}
        starts = np.flatnonzero(np.diff(row["seq_idx"], prepend=-1))
        assert (row["position_ids"][starts] == 0).all()
        assert np.array_equal(np.flatnonzero(row["position_ids"] == 0), starts)
        assert (row["labels"][starts] == -100).all()  # nothing before the first token of a document predicts it
        padding = row["input_ids"] == loader.pad_id
        assert (row["labels"][padding] == -100).all()
        inside = ~padding
        inside[starts] = False
        assert np.array_equal(row["labels"][inside], row["input_ids"][inside])


def test_conversations_learn_what_the_assistant_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(f'{{"Q": "question {i}", "A": "answer {i}"}}\n' for i in range(5)))
    prepare([file], tokenizer, tmp_path / "s", kind="chat")
    row = Loader(Store(tmp_path / "s"), 256, seed=None).row(0)
    learned = tokenizer.decode(row["labels"][row["labels"] != -100])
    assert sorted(learned.split("<|im_end|>")) == ["", *(f"answer {i}" for i in range(5))]


def test_rows_without_anything_to_learn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text('{"Q": "a very long question that fills the whole row and more", "A": "answer"}\n')
    prepare([file], tokenizer, tmp_path / "s", kind="chat")
    with pytest.raises(MoaiError, match="no row has a token to learn .*raise data.seq_len"):
        Loader(Store(tmp_path / "s"), 8)


def test_evaluation_order(store: Store) -> None:
    loader = Loader(store, 64, seed=None)
    batches = list(loader.epoch(4))
    assert sum(len(b["input_ids"]) for b in batches) == len(loader)
    assert torch.equal(batches[0]["input_ids"], loader.rows(0, 4)["input_ids"])
    assert [len(b["input_ids"]) for b in loader.epoch(4, limit=6)] == [4, 2]


def long_and_short(tmp_path: Path, tokenizer: Tokenizer) -> Store:
    from moai_llm.data.prepare import prepare_chats

    chats = [
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * n}], "") for n in (2, 90, 99)
    ]
    prepare_chats(chats, tokenizer, tmp_path / "chats", [])
    return Store(tmp_path / "chats")


def test_conversations_longer_than_a_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = long_and_short(tmp_path, tokenizer)
    assert [Loader(store, size).packing.cut_documents for size in (64, 1024)] == [2, 0]
    lost = int(np.maximum(store.lengths() - 64, 0).sum())
    assert Loader(store, 64).packing.dropped_tokens == lost > 0  # conversations keep their beginning
    assert Loader(store, 64, overlong="split").packing.dropped_tokens == 0
    dropped = Loader(store, 64, overlong="drop").packing
    assert len(dropped) == 1 and dropped.dropped_documents == 2
    with pytest.raises(MoaiError, match="every document is longer than a row of 8 tokens.*raise data.seq_len"):
        Loader(store, 8, overlong="drop")


@pytest.mark.parametrize("packing", get_args(PackingName))
def test_every_packing_holds_every_token_once_an_epoch(store: Store, packing: str) -> None:
    loader = Loader(store, 100, packing=packing, step_rows=4)
    n = len(loader)
    expected = np.bincount(np.concatenate([store.document(i) for i in range(len(store))]), minlength=512)
    for epoch in range(3):
        counted = torch.bincount(loader.rows(epoch * n, n)["input_ids"].flatten(), minlength=512).numpy()
        counted[loader.pad_id] = 0
        assert np.array_equal(counted, expected)


def test_balanced_steps_resume_and_do_not_know_the_world_size(store: Store) -> None:
    def balanced(seed: int = 3) -> Loader:
        return Loader(store, 64, seed, packing="balanced", step_rows=4)

    steps = [balanced().rows(4 * step, 4) for step in range(30)]  # each from a loader of its own: there is no state
    together = balanced().rows(0, 120)["input_ids"]
    assert torch.equal(together, torch.cat([step["input_ids"] for step in steps]))
    assert not torch.equal(together, balanced(4).rows(0, 120)["input_ids"])
    costs = [[float((np.bincount(row) ** 2).sum()) for row in step["seq_idx"].numpy()] for step in steps]
    shuffled = Loader(store, 64, 3, packing="balanced", step_rows=1).rows(0, 120)["seq_idx"].numpy()  # control
    loose = np.array([float((np.bincount(row) ** 2).sum()) for row in shuffled]).reshape(-1, 4)
    assert imbalance(np.array(costs)) < 0.5 * imbalance(loose)
