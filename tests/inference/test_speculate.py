"""Guessing ahead changes the speed and not the text, also where a state must be taken back; drawn guesses leave the
model's distribution as it is.
"""

from __future__ import annotations

import pytest
import torch

from moai_llm.inference import Engine, Sampling, TextModel
from moai_llm.inference.engine import Counters
from moai_llm.inference.sampling import Distribution, Draw
from moai_llm.inference.speculate import Drafter, DraftModel, Guess, PromptLookup, checked
from moai_llm.modeling.slots import SlotCache
from moai_llm.runtime import MoaiError
from tests.inference.conftest import alone, greedy, ids_model

PROMPT = [1, 2, 3, 4, 5, 6] * 3
KINDS = ["attention", "sliding", "mamba", "hybrid"]


def like(model: TextModel, kind: str) -> TextModel:
    """A model that often says the same."""
    other = ids_model(kind)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return other


def run(model: TextModel, drafter: Drafter | None, sampling: Sampling) -> tuple[list[list[int]], Counters]:
    """Two texts one after the other, and a third that joins the second for a while."""
    engine, found = Engine(model, max_batch=2, drafter=drafter), []
    for prompt in (PROMPT, PROMPT[:7]):
        found.append(engine.submit(prompt, sampling))
        for _ in range(6):
            engine.step()
    found.append(engine.submit(PROMPT[::-1], greedy(4)))
    while engine.busy:
        engine.step()
    return [request.tokens for request in found], engine.counters


@pytest.mark.parametrize(
    ("kind", "drafter"),
    [*((kind, "draft") for kind in KINDS), ("attention", "lookup"), ("mamba", "lookup"), ("hybrid", "itself")],
)
def test_greedy_text_is_the_same(kind: str, drafter: str) -> None:
    model = ids_model(kind)
    made = {"lookup": lambda: PromptLookup(), "draft": lambda: DraftModel(like(model, kind), model),
            "itself": lambda: DraftModel(ids_model(kind), model)}[drafter]()  # fmt: skip
    texts, counters = run(model, made, greedy(18))
    assert texts[:2] == [alone(model, prompt, 18) for prompt in (PROMPT, PROMPT[:7])]
    assert texts[2] == alone(model, PROMPT[::-1], 4)
    assert drafter == "lookup" or counters.taken_tokens > 0
    assert (counters.taken_tokens == counters.guessed_tokens) == (drafter == "itself")


class Told:
    """Guesses what the texts are known to be, but for the last of each."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def guess(self, tokens: list[int], count: int, draw: Draw) -> Guess:
        for text in self.texts:
            if text[: len(tokens)] == tokens:
                right = text[len(tokens) : len(tokens) + count]
                return Guess([*right[:-1], (right[-1] + 1) % 61] if right else [])
        return Guess()


@pytest.mark.parametrize(("kind", "method"), [("mamba", "put_states"), ("hybrid", "put_states"), ("attention", "cut")])
def test_control_what_is_not_taken_back_shows(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ids_model(kind)
    truth = [alone(model, prompt, 18) for prompt in (PROMPT, PROMPT[:7])]
    told = Told([[*prompt, *text] for prompt, text in zip((PROMPT, PROMPT[:7]), truth)])
    assert run(model, told, greedy(18))[0][:2] == truth
    monkeypatch.setattr(SlotCache, method, lambda *_: None)
    assert run(model, told, greedy(18))[0][:2] != truth


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_guesses_that_were_not_drawn_leave_a_sampled_text_as_it_is(kind: str) -> None:
    model, sampling = ids_model(kind), Sampling(24, 0.8, 0, 0.9, seed=3, frequency_penalty=0.1)
    truth = run(model, None, sampling)[0]
    told = Told([[*prompt, *text] for prompt, text in zip((PROMPT, PROMPT[:7]), truth)])
    texts, counters = run(model, told, sampling)
    assert texts == truth and 0 < counters.taken_tokens < counters.guessed_tokens


def test_drawn_guesses_leave_the_distribution_as_it_is() -> None:
    """Chi-squared of the first and of the second token over 4 degrees of freedom: above 23.5 once in 10,000 times."""
    p = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.5, 0.2, 0.2, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]])
    q = torch.tensor([[0.1, 0.3, 0.3, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    drawn_from = [Distribution(row, torch.arange(5)) for row in q]
    draw, count = Draw(Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=11), []), 1000
    first, second, guessed = [0] * 5, [0] * 5, [0] * 5
    for _ in range(count):
        guess = Guess([d.at(draw.uniform()) for d in drawn_from], drawn_from)
        choices, taken = checked(p.log(), guess, draw, set())
        assert len(choices) == taken + 1
        first[choices[0].token] += 1
        guessed[guess.tokens[0]] += 1
        if taken:
            second[choices[1].token] += 1

    def distance(seen: list[int], expected: torch.Tensor) -> float:
        return sum((n - sum(seen) * x) ** 2 / (sum(seen) * x) for n, x in zip(seen, expected.tolist()))

    assert distance(first, p[0]) < 23.5 and distance(second, p[1]) < 23.5
    assert distance(guessed, p[0]) > 100  # the control: what is guessed is not what the model says
    overlap = float(torch.minimum(p[0].double(), q[0]).sum())  # the share that is taken, section 3.1
    assert sum(second) / count == pytest.approx(overlap, abs=0.05)


def test_a_draft_of_another_tokenizer_is_refused() -> None:
    draft = ids_model()
    draft.tokenizer.fingerprint = "another"
    with pytest.raises(MoaiError, match="another tokenizer"):
        DraftModel(draft, ids_model())


def test_prompt_lookup() -> None:
    draw, lookup = Draw(greedy(1), []), PromptLookup()
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3], 3, draw).tokens == [9, 1, 2]
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 7], 3, draw).tokens == []
    assert lookup.guess([1, 2, 3, 9, 1, 2, 3, 7, 2, 3], 3, draw).tokens == [7, 2, 3]  # the latest of them
    assert lookup.guess([4, 5, 4], 8, draw).tokens == [5, 4]  # another text
    assert PromptLookup().guess([4], 3, draw).tokens == []
