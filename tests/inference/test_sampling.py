"""Filters and penalties: against their definitions in plain Python, against transformers, and by counting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import generation as theirs

from moai_llm.inference.sampling import Draw, Sampling, choose, distributions, penalised
from moai_llm.runtime import MoaiError

FILTERS: list[dict[str, Any]] = [
    {}, {"top_k": 1}, {"top_k": 5}, {"top_k": 2000}, {"top_p": 0.01}, {"top_p": 0.7}, {"min_p": 0.2}, {"min_p": 1.0},
    {"typical_p": 0.3}, {"typical_p": 0.95}, {"temperature": 0.3}, {"temperature": 2.5},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.6},
]  # fmt: skip
PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.7}, {"repetition_penalty": 0.5}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.7},
]  # fmt: skip


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **changes})


def dense(logits: Tensor, settings: Sampling) -> list[float]:
    """What the row draws from, for every token."""
    found = distributions(logits[None], [Draw(settings, [])], [0])[0]
    result = [0.0] * len(logits)
    for token, p in zip(found.ids.tolist(), found.probabilities.tolist()):
        result[token] += p
    return result


def defined(logits: Tensor, settings: Sampling) -> list[float]:
    """The definitions of the papers, one token at a time."""
    kept = {i: x / settings.temperature for i, x in enumerate(logits.double().tolist())}

    def probabilities() -> dict[int, float]:
        high = max(kept.values())
        total = sum(math.exp(x - high) for x in kept.values())
        return {i: math.exp(x - high) / total for i, x in kept.items()}

    def smallest(order: list[int], mass: float) -> None:
        p, total, chosen = probabilities(), 0.0, set()
        for i in order:
            if chosen and total >= mass:
                break
            chosen.add(i)
            total += p[i]
        for i in list(kept):
            if i not in chosen:
                del kept[i]

    if settings.top_k:
        smallest(sorted(kept, key=lambda i: -kept[i])[: settings.top_k], 2.0)
    if settings.top_p < 1:
        smallest(sorted(kept, key=lambda i: -kept[i]), settings.top_p)
    if settings.min_p:
        p = probabilities()
        for i in [i for i in p if p[i] < settings.min_p * max(p.values())]:
            del kept[i]
    if settings.typical_p < 1:
        p = probabilities()
        entropy = -sum(x * math.log(x) for x in p.values() if x)
        smallest(sorted(p, key=lambda i: abs(-math.log(max(p[i], 1e-300)) - entropy)), settings.typical_p)
    p = probabilities()
    return [p.get(i, 0.0) for i in range(len(logits))]


@pytest.mark.parametrize("changes", FILTERS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 13, 401])
def test_filters_are_what_they_are_defined_to_be(changes: dict[str, Any], size: int) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3
    assert dense(logits, sampling(**changes)) == pytest.approx(defined(logits, sampling(**changes)), abs=1e-12)


@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_filters_are_those_of_transformers(changes: dict[str, Any]) -> None:
    s, ids = sampling(**changes), torch.zeros(1, 1, dtype=torch.long)
    logits = torch.randn(1, 401, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    chain = [theirs.TemperatureLogitsWarper(s.temperature)]
    chain += [theirs.TopKLogitsWarper(s.top_k)] if s.top_k else []
    chain += [theirs.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    chain += [theirs.MinPLogitsWarper(s.min_p)] if s.min_p else []
    chain += [theirs.TypicalLogitsWarper(s.typical_p)] if s.typical_p < 1 else []
    expected = theirs.LogitsProcessorList(chain)(ids, logits.clone())[0].softmax(-1)
    assert dense(logits[0], s) == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_batch_of_different_settings_is_each_row_alone() -> None:
    logits = torch.randn(len(FILTERS), 61, generator=torch.Generator().manual_seed(0)) * 3
    draws = [Draw(sampling(**changes), []) for changes in FILTERS]
    together = distributions(logits, draws, list(range(len(draws))))
    for i, (found, draw) in enumerate(zip(together, draws)):
        single = distributions(logits[i : i + 1], [draw], [0])[0]
        kept = int(single.probabilities.count_nonzero())
        assert int(found.probabilities.count_nonzero()) == kept
        for token in single.ids[:kept].tolist():
            assert found.of(token) == pytest.approx(single.of(token), abs=1e-14)


@pytest.mark.parametrize("changes", PENALTIES, ids=str)
def test_penalties(changes: dict[str, float]) -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, prompt, answer = sampling(**changes), [1, 2, 2], [3, 4, 4, 4, 1]
    draw, before = Draw(s, prompt), logits.clone()
    for token in answer:
        draw.add(token)
    got = penalised(logits, [Draw(sampling(), prompt), draw, Draw(s, [])])
    expected = logits[1].clone()
    for i in range(11):
        if i in prompt + answer:
            expected[i] = expected[i] / s.repetition_penalty if expected[i] > 0 else expected[i] * s.repetition_penalty
        expected[i] -= s.presence_penalty * (i in answer) + s.frequency_penalty * answer.count(i)
    assert torch.allclose(got[1], expected) and torch.equal(got[0], before[0]) and torch.equal(got[2], before[2])
    assert torch.equal(logits, before)  # what log probabilities are reported from
    if s.repetition_penalty != 1:
        processor = theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)
        alone = Draw(sampling(repetition_penalty=s.repetition_penalty), prompt + answer)
        assert torch.allclose(
            penalised(before[:1], [alone]), processor(torch.tensor([prompt + answer]), before[:1].clone())
        )


def test_tokens_come_as_often_as_they_should() -> None:
    """Chi-squared over 4 degrees of freedom: above 23.5 once in 10,000 times, and the seed is fixed."""
    p, count = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), 1000
    draws = [Draw(sampling(seed=7), [])]
    seen = [0] * 5
    for _ in range(count):
        seen[choose(p.log()[None], draws)[0].token] += 1

    def distance(expected: list[float]) -> float:
        return sum((n - count * x) ** 2 / (count * x) for n, x in zip(seen, expected))

    assert distance(p.tolist()) < 23.5 < distance([0.25, 0.45, 0.15, 0.1, 0.05])  # and the control


@pytest.mark.parametrize(
    "wrong",
    [{"min_p": -0.1}, {"min_p": 1.1}, {"typical_p": 0}, {"typical_p": 1.1}, {"presence_penalty": math.inf},
     {"frequency_penalty": math.nan}, {"stop": ("",)}, {"stop": "text"}, {"logprobs": -1}, {"temperature": math.nan}],
)  # fmt: skip
def test_wrong_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(MoaiError, match=f"{next(iter(wrong))} = .* is out of range"):
        Sampling(**wrong)
