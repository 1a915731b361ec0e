"""The compiled builder of rows makes what the readable one makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moai_llm.data.packing import STRATEGIES
from moai_llm.data.rows import Arrays, Rows, new_arrays, row_reference
from moai_llm.data.shards import Kind, Store
from moai_llm.data.writer import StoreWriter
from moai_llm.tokenizer import Tokenizer

LENGTHS = (1, 2, 3, 7, 1, 64, 13, 130, 5, 31, 32, 33, 1, 97, 2)


def make_store(
    path: Path, tokenizer: Tokenizer, kind: Kind = "text", shard_tokens: int = 100, seed: int = 0, repeat: int = 1
) -> Store:
    """Documents of odd lengths in several shards; in a chat store some of their tokens are learned."""
    rng = np.random.default_rng(seed)
    with StoreWriter(path, tokenizer, kind, shard_tokens=shard_tokens) as writer:
        for length in LENGTHS * repeat:
            learn = None if kind == "text" else (rng.random(length) < 0.4).tolist()
            writer.add(rng.integers(1, 400, length).tolist(), length, learn)
        writer.close()
    return Store(path)


def filled(rows: Rows, numbers: np.ndarray) -> Arrays:
    out = new_arrays(len(numbers), rows.seq_len)
    for array in out:
        array.fill(-7)  # what is not written shows
    where = np.random.default_rng(0).permutation(len(numbers))
    rows.fill(numbers[where], where, out)  # in any order of the batch
    return out


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("packing", STRATEGIES)
@pytest.mark.parametrize("seq_len", [1, 2, 13, 32, 200])
def test_compiled_equals_reference(
    tmp_path: Path, tokenizer: Tokenizer, kind: Kind, packing: str, seq_len: int
) -> None:
    store = make_store(tmp_path / "s", tokenizer, kind)
    assert len(store._tokens) > 2  # several shards
    if seq_len == 1:
        with pytest.raises(ValueError, match="no row has a token to learn"):
            Rows(store, seq_len, packing, "split")
        return
    rows = Rows(store, seq_len, packing, "split")
    numbers = np.arange(len(rows))
    made = filled(rows, numbers)
    for i in numbers:
        for name, truth in row_reference(rows, i).items():
            assert np.array_equal(getattr(made, name)[i], truth), (name, i)


def test_control_a_mask_matters(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat, text = (make_store(tmp_path / kind, tokenizer, kind) for kind in ("chat", "text"))  # type: ignore[arg-type]
    masked, plain = (filled(Rows(store, 200, overlong="split"), np.arange(2)) for store in (chat, text))
    assert (masked.labels != -100).sum() < (plain.labels != -100).sum()


def test_building_rows_leaves_torch_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Compiled code that starts threads of its own is known to change how many torch uses; this one does not."""
    before = torch.get_num_threads()
    filled(Rows(make_store(tmp_path / "s", tokenizer), 32), np.arange(3))
    assert torch.get_num_threads() == before
