"""The loader: a pure function of the step, rows that mark their borders, targets that stay inside documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moai_llm.data.loader import Loader, permute
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer, text_file: Path) -> Store:
    prepare([text_file], tokenizer, tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permutations(size: int) -> None:
    shuffled = permute(np.arange(size), size, key=5)
    assert sorted(shuffled) == list(range(size))
    assert np.array_equal(shuffled[2:5], permute(np.arange(size)[2:5], size, key=5))  # pointwise, no state
    if size > 60:
        assert not np.array_equal(shuffled, permute(np.arange(size), size, key=6))
        assert np.abs(np.corrcoef(np.arange(size), shuffled)[0, 1]) < 0.3


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


def test_conversations_longer_than_a_row_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from moai_llm.data.prepare import prepare_chats

    chats = [
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * n}], "") for n in (2, 90, 99)
    ]
    prepare_chats(chats, tokenizer, tmp_path / "chats", [])
    store = Store(tmp_path / "chats")
    assert [Loader(store, size).cut_documents() for size in (64, 1024)] == [2, 0]
