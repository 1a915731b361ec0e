"""Small stores for the tests of what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moai_llm.data.shards import Kind, Store
from moai_llm.data.writer import StoreWriter
from moai_llm.tokenizer import Tokenizer


def write_store(
    out: Path, tokenizer: Tokenizer, documents: Sequence[list[int]], kind: Kind = "text", shard_tokens: int = 200
) -> Store:
    """Documents as they are, in shards, with all checksums; of any kind but text every other token is learned."""
    with StoreWriter(out, tokenizer, kind, shard_tokens=shard_tokens) as writer:
        for ids in documents:
            learn = None if kind == "text" else [i % 2 == 1 for i in range(len(ids))]
            writer.add(ids, 3 * len(ids), learn)
        writer.close(["test"])
    return Store(out)


def some_documents(tokenizer: Tokenizer, count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Of ordinary ids, each with the end of a text behind it."""
    rng = np.random.default_rng(seed)
    low, high = 5, 300
    return [rng.integers(low, high, int(rng.integers(1, longest))).tolist() + [tokenizer.eos_id] for _ in range(count)]
