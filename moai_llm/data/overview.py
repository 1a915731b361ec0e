"""What is in a store, in numbers: sizes, lengths of documents, how full rows become by each way of packing.

The rows of a merged store are packed part by part, as a row holds documents of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from moai_llm.data.balance import imbalance, rows_of_stream
from moai_llm.data.embedding_loader import EmbeddingLoader
from moai_llm.data.merge import epochs
from moai_llm.data.packing import STRATEGIES, Packing, pack
from moai_llm.data.pair_loader import PairLoader
from moai_llm.data.shards import Part, Store

RANKS = 8  # for which it is said how even the work is


class Lengths(NamedTuple):
    """Tokens of the documents: the value below which half of them lie, ..., and shares by powers of two."""

    p50: int
    p90: int
    p99: int
    largest: int
    bins: list[int]  # the largest length in each: 1, 2, 4, ...
    documents: list[float]  # share of the documents in each
    tokens: list[float]  # share of the tokens


class Rows(NamedTuple):
    """What one way of packing makes."""

    packing: str
    rows: int
    fullness: float
    cut: int  # documents
    dropped: int
    dropped_tokens: int
    wait: float | None  # share of the time that ranks wait for each other in attention; None where there is no step


@dataclass(frozen=True)
class Summary:
    """Of a plain store."""

    name: str
    kind: str
    documents: int
    tokens: int
    share: float  # of the rows
    epochs: float  # while as many tokens are read as all parts have together
    lengths: Lengths
    rows: Rows | None  # None for preference pairs, which are not packed


@dataclass(frozen=True)
class Overview:
    path: str
    kind: str
    documents: int
    tokens: int
    text_bytes: int
    vocab_size: int
    dtype: str
    strategy: str  # of a merged store
    seq_len: int
    lengths: Lengths
    packings: list[Rows]  # of all parts together; the chosen one is the first
    parts: list[Summary]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def look(store: Store, seq_len: int, packing: str, overlong: str | None = None, *, every: bool = False) -> Overview:
    """Look at a store as `moai train` would with these options.

    Args:
        every: all ways of packing, not only this one.
    """
    manifest, parts = store.manifest, store.parts()
    lengths = [part.store.lengths() for part in parts]
    others = (name for name in STRATEGIES if every and name != packing)
    packs = [
        packing,
        *(name for name in others if manifest.kind not in ("preference", "embedding") or name != "concat"),
    ]
    rows = [
        [pack_part(part.store, each, seq_len, name, overlong) for part, each in zip(parts, lengths)] for name in packs
    ]
    summaries = [
        Summary(
            short_name(part.store, parts),
            part.store.manifest.kind,
            len(part.store),
            part.store.manifest.tokens,
            part.weight,
            share.whole,
            describe(each),
            summarize(packing, [rows[0][i]]) if rows else None,
        )
        for i, (part, each, share) in enumerate(zip(parts, lengths, epochs(parts)))
    ]
    return Overview(
        str(store.path),
        manifest.kind,
        manifest.documents,
        manifest.tokens,
        manifest.text_bytes,
        manifest.vocab_size,
        manifest.dtype,
        manifest.strategy,
        seq_len,
        describe(np.concatenate(lengths)),
        [summarize(name, of_parts) for name, of_parts in zip(packs, rows)],
        summaries,
    )


def pack_part(store: Store, lengths: np.ndarray, seq_len: int, packing: str, overlong: str | None) -> Packing:
    """The rows of a plain store. Without `overlong` a conversation loses its end, and a text is split."""
    if store.manifest.kind == "preference":
        return PairLoader(store, seq_len, packing=packing, overlong=overlong).packing
    if store.manifest.kind == "embedding":
        return EmbeddingLoader(store, seq_len, packing=packing, overlong=overlong, augment="twins").packing
    default = "truncate" if store.manifest.kind == "chat" else "split"
    return pack(lengths, seq_len, packing, overlong or default)


def summarize(name: str, packings: Sequence[Packing]) -> Rows:
    """Of all parts together."""
    rows = sum(map(len, packings))
    held = sum(int(packing.length.sum()) for packing in packings)
    return Rows(
        name,
        rows,
        held / (max(1, rows) * packings[0].capacity),
        sum(packing.cut_documents for packing in packings),
        sum(packing.dropped_documents for packing in packings),
        sum(packing.dropped_tokens for packing in packings),
        _wait(name, packings[0]) if len(packings) == 1 else None,
    )


def _wait(name: str, packing: Packing) -> float | None:
    """How much longer than needed attention takes where `RANKS` ranks do one row each and wait for each other."""
    steps = len(packing) // RANKS
    if not steps:
        return None
    group = RANKS if name == "balanced" else 1
    order = rows_of_stream(np.arange(steps * RANKS), len(packing), seed=0, step=group)
    return imbalance(packing.costs()[order].reshape(steps, RANKS))


def describe(lengths: np.ndarray) -> Lengths:
    """Lengths of documents; a bin holds the lengths above the one before it, up to its own."""
    ordered = np.sort(lengths)
    p50, p90, p99 = (int(ordered[min(len(ordered) - 1, len(ordered) * q // 100)]) for q in (50, 90, 99))
    count = int(ordered[-1] - 1).bit_length() + 1
    which = np.frexp(np.maximum(ordered - 1, 0).astype(np.float64))[1]  # 1: 0, 2: 1, 3 and 4: 2, ...
    documents = np.bincount(which, minlength=count) / len(ordered)
    tokens = np.bincount(which, weights=ordered, minlength=count) / ordered.sum()
    return Lengths(p50, p90, p99, int(ordered[-1]), [2**i for i in range(count)], documents.tolist(), tokens.tolist())


def short_name(store: Store, parts: Sequence[Part]) -> str:
    """The name of its folder, with as much before it as it takes to tell it from the others."""
    own = store.path.resolve().parts
    others = [part.store.path.resolve().parts for part in parts if part.store is not store]
    length = next(n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in others))
    return "/".join(own[-length:])
