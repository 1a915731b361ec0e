"""How good vectors of texts are: on a prepared store while a model trains, and on records of texts from files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moai_llm.data.embedding_records import Related
from moai_llm.data.embedding_store import ANCHOR
from moai_llm.data.loader import Batch
from moai_llm.evaluation.ranking import Retrieval, retrieval, spearman
from moai_llm.training.contrastive import Contrastive, Texts, right_answers, terms
from moai_llm.training.objective import add_up, to_floats
from moai_llm.training.precision import Precision


class Search(NamedTuple):
    """Queries, the documents among which they are to find theirs, and which those are."""

    queries: list[str]
    documents: list[str]
    relevant: list[list[int]]


class Graded(NamedTuple):
    """Pairs of texts and how alike somebody found them."""

    first: list[str]
    second: list[str]
    score: np.ndarray


def as_search(records: Iterable[Related]) -> Search:
    """Every text once: an anchor asks for the right answers of all records it stands in, among the right and wrong
    answers of all.
    """
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    relevant: list[dict[int, None]] = []
    for record in records:
        for text in (*record.right, *record.wrong):
            documents.setdefault(text, len(documents))
        if record.right:
            number = queries.setdefault(record.anchor, len(queries))
            if number == len(relevant):
                relevant.append({})
            relevant[number].update(dict.fromkeys(documents[text] for text in record.right))
    return Search(list(queries), list(documents), [list(found) for found in relevant])


def as_graded(records: Iterable[Related]) -> Graded:
    """The pairs that have a grade."""
    rows = [(record.anchor, text, record.score) for record in records if record.score is not None
            for text in record.right]  # fmt: skip
    first, second, score = zip(*rows) if rows else ((), (), ())
    return Graded(list(first), list(second), np.array(score, np.float64))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) of the rows of both, in fp64; 0 for a vector of zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.where(size > 0, size, 1))


@torch.no_grad()
def evaluate_texts(
    objective: Contrastive, model: Any, batches: Sequence[Batch], precision: Precision
) -> dict[str, float]:
    """The loss over all texts of the batches, and how well anchors find their right answers among all others; where
    pairs are graded, how well cosines follow the grades.
    """
    vectors, texts = [], []
    for batch in batches:
        on_device = {key: tensor.to(precision.device) for key, tensor in batch.items()}
        with precision.autocast():
            output = model(
                on_device["input_ids"], position_ids=on_device["position_ids"], seq_idx=on_device["seq_idx"],
                documents=on_device["role"].shape[1],
            )  # fmt: skip
        vectors.append(output.embeddings[on_device["role"] > 0])
        texts.append(Texts.of(on_device))
    every, known = torch.cat(vectors), Texts.joined(texts)
    sums: dict[str, torch.Tensor] = {}
    for term, said in terms(objective.loss, every, known, every, known, model.log_scale):
        add_up(sums, {"loss": term, **said})
    numbers = {"eval_loss": to_floats(sums)["loss"]}
    numbers |= _of_ranks(_search(every, known, objective))
    graded = (known.score >= 0).nonzero()[:, 0]
    if len(graded):
        place = torch.arange(len(every), device=every.device)
        anchor = torch.where(known.role == ANCHOR, place, 0).cummax(0).values[graded]
        alike = cosines(every[anchor].cpu().numpy(), every[graded].cpu().numpy())
        numbers["spearman"] = spearman(alike, known.score[graded].cpu().numpy())
    return numbers


def _search(every: torch.Tensor, known: Texts, objective: Contrastive) -> Retrieval:
    """Each document once, however often its text stands there."""
    text, record, role = (x.cpu().numpy() for x in (known.text, known.record, known.role))
    right, vectors = right_answers(objective.loss, known).cpu().numpy(), every.float().cpu().numpy()
    answers, anchors = np.flatnonzero(role != ANCHOR), np.flatnonzero(role == ANCHOR)
    _, first, number = np.unique(text[answers], return_index=True, return_inverse=True)
    of_record: dict[int, list[int]] = {}
    for i, document in zip(answers.tolist(), number.tolist()):
        if right[i]:
            of_record.setdefault(int(record[i]), []).append(document)
    of_text: dict[int, dict[int, None]] = {}  # equal anchors ask for the same
    for i in anchors.tolist():
        of_text.setdefault(int(text[i]), {}).update(dict.fromkeys(of_record.get(int(record[i]), ())))
    relevant = [list(of_text[int(text[i])]) for i in anchors.tolist()]
    return retrieval(vectors[anchors], vectors[answers][first], relevant, (1, 10))


def _of_ranks(found: Retrieval) -> dict[str, float]:
    if not found.queries:
        return {}
    return {"recall_at_1": found.recall[1], "recall_at_10": found.recall[10], "mrr": found.mrr,
            "ndcg_at_10": found.ndcg[10]}  # fmt: skip
