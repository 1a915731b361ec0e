"""Texts that belong together in a store: what a contrastive loss compares.

A record is several documents that follow each other: the anchor, its right answers, its wrong ones. What a document is
stands in its mask, whose bytes are all the same: 1 an anchor, with which a record begins, 2 a right answer, 3 a wrong
one, and from 5 on a right answer with a grade from 0 to 1, in steps of 1/200. Each ends with the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moai_llm.data.embedding_records import EmbeddingOptions, Related
from moai_llm.data.sft.encode import Dropped, Encoded
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

ANCHOR, RIGHT, WRONG = 1, 2, 3
_GRADE, _STEPS = 5, 200


def encode_related(tokenizer: Tokenizer, record: Related, options: EmbeddingOptions | None = None) -> list[Encoded]:
    """The documents of a record.

    Raises:
        Dropped: an anchor without text, or without an answer that differs from it though it had one.
    """
    limit = (options or EmbeddingOptions()).max_length
    if not record.anchor.strip():
        raise Dropped("an anchor without text")
    right = [text for text in dict.fromkeys(record.right) if text.strip() and text != record.anchor]
    if record.right and not right:
        raise Dropped("no right answer that differs from the anchor")
    wrong = [text for text in dict.fromkeys(record.wrong) if text.strip() and text not in (record.anchor, *right)]
    graded = RIGHT if record.score is None else _GRADE + round(record.score * _STEPS)
    texts = [(record.anchor, ANCHOR), *((text, graded) for text in right), *((text, WRONG) for text in wrong)]
    made = []
    for text, code in texts:
        ids = tokenizer.encode(text)
        kept = ids if limit is None else ids[: limit - 1]
        size = len(text.encode("utf-8", "replace"))
        made.append(Encoded([*kept, tokenizer.eos_id], [code] * (len(kept) + 1), size, len(kept) < len(ids)))  # type: ignore[list-item]
    return made


class Groups(NamedTuple):
    """The records of a store. Record r holds documents first[r] to first[r + 1], the anchor first."""

    first: np.ndarray  # (records + 1,) int64
    role: np.ndarray  # (documents,) int8: ANCHOR, RIGHT, WRONG
    score: np.ndarray  # (documents,) float32, the grade of a right answer; -1: none


def read_groups(store: Store | str | Path) -> Groups:
    """
    Raises:
        MoaiError: a store of another kind, or one that does not begin with an anchor.
    """
    store = store if isinstance(store, Store) else Store(store)
    if store.manifest.kind != "embedding":
        raise MoaiError(
            f"{store.path} holds {store.manifest.kind}, not texts that belong together: prepare them with "
            "`moai data prepare --embedding`"
        )
    codes = np.concatenate(list(_codes(store)))
    if not len(codes) or codes[0] != ANCHOR or codes.min() < ANCHOR or (codes == 4).any():
        raise MoaiError(f"{store.path}: its masks mark no records: prepare the data again")
    graded = codes >= _GRADE
    score = np.where(graded, (codes.astype(np.float32) - _GRADE) / _STEPS, -1).astype(np.float32)
    first = np.append(np.flatnonzero(codes == ANCHOR), len(codes))
    return Groups(first, np.where(graded, RIGHT, codes).astype(np.int8), score)


def _codes(store: Store) -> Iterable[np.ndarray]:
    """The byte of each document."""
    for part in store.parts():
        for mask, borders in zip(part.store._masks, part.store._borders):
            yield mask[borders[:-1]]
