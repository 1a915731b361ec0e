"""Hard negatives: wrong answers that a model takes for nearly right ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from moai_llm.data.embedding_records import Related
from moai_llm.inference.embed import Embedder, embed
from moai_llm.ops.contrastive import meanings

SCORES = 1 << 24  # in memory at a time


def mine(
    embedder: Embedder, records: Sequence[Related], *, count: int = 5, margin: float = 0.05,
    max_length: int | None = None, progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Related]:  # fmt: skip
    """The records with right answers, each with up to `count` wrong ones more: of the answers of all records those that
    are most like the anchor, the most alike first. A pure function of its arguments on one machine.

    Left out is what is known to mean the same (`ops/contrastive.py`), and what is more alike than the best right answer
    less `margin`, which is likely to be right too (TopK-MarginPos of NV-Retriever, arXiv 2407.15831, section 3.2).

    Args:
        progress: called with the number of texts done since the last call.
    """
    asked = [record for record in records if record.right]
    texts = list(dict.fromkeys(text for record in records for text in (record.anchor, *record.right, *record.wrong)))
    number = {text: i for i, text in enumerate(texts)}
    meaning = _meanings(records, number)
    vectors = embed(embedder, texts, max_length=max_length, progress=progress)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    answers = np.array(sorted({number[text] for record in records for text in (*record.right, *record.wrong)}))
    step = max(1, SCORES // max(1, len(answers)))
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        scores = vectors[[number[record.anchor] for record in part]] @ vectors[answers].T
        for record, row in zip(part, scores):
            own = vectors[[number[text] for text in record.right]] @ vectors[number[record.anchor]]
            fine = (row <= own.max() - margin) & (meaning[answers] != meaning[number[record.anchor]])
            order = np.argsort(-np.where(fine, row, -np.inf), kind="stable")[: int(fine.sum())]
            found = [texts[answers[i]] for i in order.tolist()]
            new = [text for text in found if text not in record.wrong][:count]
            yield record._replace(wrong=(*record.wrong, *new))


def _meanings(records: Sequence[Related], number: dict[str, int]) -> np.ndarray:
    """(texts,) equal for texts that are known to mean the same."""
    rows = [
        (number[text], i, is_right)
        for i, record in enumerate(records)
        for text, is_right in [
            (record.anchor, True), *((text, True) for text in record.right), *((text, False) for text in record.wrong)
        ]
    ]  # fmt: skip
    text, of, merges = (torch.tensor(column) for column in zip(*rows))
    found = np.empty(len(number), np.int64)
    found[text.numpy()] = meanings(text, of, merges).numpy()
    return found
