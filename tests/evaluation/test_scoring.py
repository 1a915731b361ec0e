"""Scores of many sequences are those of each by itself, whatever they share, for every pair of bricks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from moai_llm.evaluation import scoring
from moai_llm.evaluation.prefixes import Node, tree
from moai_llm.evaluation.scoring import Request, Scored, score
from tests.conftest import PAIRS, tiny_model

VOCABULARY = 58  # of 61 rows; the others stand for no token


def requests(seed: int = 0) -> list[Request]:
    """Questions of one task with its examples, each with several answers; some alike, some alone, some very short."""
    rng = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

    examples, found = some(30, 30), []
    for question in range(4):
        context = examples[: 30 if question < 2 else 11] + some(3, 20)
        found += [Request(context + some(1, 6), len(context)) for _ in range(3)]
    found += [Request(context + [3], len(context)), Request(context + [3, 4], len(context))]  # one goes on the other
    return [*found, Request([1, 2, 3], 1), Request([5, 6], 1), found[0], found[5]]


def by_hand(model: Any, request: Request) -> Scored:
    with torch.no_grad():
        log_p = model(torch.tensor([list(request.tokens)])).logits[0, :, :VOCABULARY].log_softmax(-1)
    wanted, rows = torch.tensor(request.tokens[request.start :]), log_p[request.start - 1 : -1]
    return Scored(rows.gather(1, wanted[:, None])[:, 0].numpy(), (rows.argmax(-1) == wanted).numpy())


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_together_is_alone(pair: tuple[str, str]) -> None:
    model, asked = tiny_model(*pair), requests()
    expected = [by_hand(model, request) for request in asked]
    for options in ({"worth": 1}, {"share": False}, {"worth": 20, "batch_tokens": 30}):
        for got, wanted in zip(score(model, asked, vocabulary=VOCABULARY, **options), expected):
            assert np.allclose(got.log_probs, wanted.log_probs, rtol=0, atol=1e-9)
            assert (got.greedy == wanted.greedy).all()


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_control_a_cache_must_branch(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_model(mixer), requests()
    expected = [by_hand(model, request).total for request in asked]
    real = scoring.fork

    def one_for_all(cache: Any, rows: int) -> Any:
        if rows > 1:
            return real(cache, rows)
        return cache  # what one branch adds, the next one sees

    monkeypatch.setattr(scoring, "fork", one_for_all)
    wrong = [got.total for got in score(model, asked, vocabulary=VOCABULARY, worth=1)]
    assert not np.allclose(wrong, expected, atol=1e-6)


def test_a_greedy_answer_is_one() -> None:
    model = tiny_model()
    ids = [1, 2, 3]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    right, wrong = score(model, [Request(ids, 3), Request([*ids[:-1], (ids[-1] + 1) % 61], 3)], vocabulary=61)
    assert right.greedy.all() and right.greedy.shape == (4,)
    assert wrong.greedy.tolist() == [True, True, True, False]


def tokens_through(model: Any, run: Any) -> int:
    counted = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return sum(counted)


def test_what_is_shared_is_computed_once() -> None:
    """Ten questions of one task with four answers each: its examples, and each question, go through the model once."""
    rng = random.Random(0)
    examples = [rng.randrange(61) for _ in range(60)]
    asked = []
    for _ in range(10):
        question = examples + [rng.randrange(61) for _ in range(20)]
        asked += [Request(question + [rng.randrange(61) for _ in range(4)], len(question)) for _ in range(4)]
    model = tiny_model()
    shared = tokens_through(model, lambda: score(model, asked, vocabulary=61, worth=16))
    alone = tokens_through(model, lambda: score(model, asked, vocabulary=61, share=False))
    assert alone == 40 * 83 and shared <= 60 + 10 * 20 + 40 * 3 + 10


def test_logits_are_formed_where_they_are_asked_for() -> None:
    model, rows = tiny_model(), []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    context = list(range(50))
    score(model, [Request([*context, answer], 50) for answer in (1, 2, 3)], vocabulary=61)
    handle.remove()
    assert sum(rows) == 1  # three answers of one token at one place


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length(kind: str) -> None:
    """A row beside a longer one, or after a shared beginning, would get other frequencies."""
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}
    model, asked = tiny_model(max_position_embeddings=16, rope_parameters=rope), requests()
    for got, request in zip(score(model, asked, vocabulary=VOCABULARY, worth=1), asked):
        assert np.allclose(got.log_probs, _truth(model, request), rtol=0, atol=1e-9)


def _truth(model: Any, request: Request) -> np.ndarray:
    """The inputs alone, without the last token, whose presence changes the frequencies."""
    with torch.no_grad():
        log_p = model(torch.tensor([list(request.tokens[:-1])])).logits[0, :, :VOCABULARY].log_softmax(-1)
    wanted = torch.tensor(request.tokens[request.start :])
    return log_p[request.start - 1 :].gather(1, wanted[:, None])[:, 0].numpy()


def leaves(nodes: list[Node]) -> list[int]:
    found = []
    for node in nodes:
        below = leaves(node.children)
        found += [*below, *(i for i in node.members if i not in below)]
    return found


@pytest.mark.parametrize("worth", [1, 3, 10, 1000])
def test_a_tree_holds_every_sequence_once(worth: int) -> None:
    rng = random.Random(worth)
    sequences = [[rng.randrange(2) for _ in range(rng.randint(1, 9))] for _ in range(200)]

    def check(nodes: list[Node], begin: int) -> None:
        for node in nodes:
            pieces = {tuple(sequences[i][node.begin : node.end]) for i in node.members}
            assert node.begin == begin < node.end and len(pieces) == 1
            check(node.children, node.end)
            ends = {i for i in node.members if len(sequences[i]) == node.end}
            assert ends | {i for child in node.children for i in child.members} == set(node.members)

    nodes = tree(sequences, worth)
    check(nodes, 0)
    assert sorted(leaves(nodes)) == list(range(200))
